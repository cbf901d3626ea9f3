"""LoRA adapters as peft writes them, with random numbers, and what peft makes of them."""

from __future__ import annotations

import json
import re
import warnings
from pathlib import Path
from typing import Any

import numpy as np
from support import transformers_answers as theirs
from support.oracles import answered_by
from support.tensors import read, save

# What peft 0.21 writes beside r, lora_alpha and target_modules.
USUAL: dict[str, Any] = {"peft_type": "LORA", "r": 4, "lora_alpha": 8, "lora_dropout": 0.1, "bias": "none"}
USUAL |= {"base_model_name_or_path": "somebody/a-gemma", "inference_mode": True, "init_lora_weights": True}
USUAL |= {"fan_in_fan_out": False, "use_dora": False, "use_rslora": False, "rank_pattern": {}, "alpha_pattern": {}}
USUAL |= {"modules_to_save": None, "layers_to_transform": None, "layers_pattern": None, "exclude_modules": None}
USUAL |= {"loftq_config": {}, "megatron_core": "megatron.core", "qalora_group_size": 16, "lora_bias": False}


def write(folder: Path, model: Path, targets: list[str], ranks: dict[str, int] | None = None, **told: Any) -> Path:
    """An adapter of the modules whose names end in one of `targets`, of rank r or of that in `ranks`."""
    told = USUAL | {"target_modules": targets, "rank_pattern": ranks or {}} | told
    rng, tensors = np.random.default_rng(len(str(told))), {}
    for name, tensor in read(model / "model.safetensors").items():
        module = name.removesuffix(".weight")
        layers, at = told["layers_to_transform"], re.search(r"\.(\d+)\.", module)
        if module.endswith(tuple(targets)) and (layers is None or (at and int(at[1]) in layers)):
            rank = next((rank for end, rank in (ranks or {}).items() if module.endswith(end)), told["r"])
            tensors |= pair(rng, f"base_model.model.{module}", rank, tensor.shape)
        if module.endswith(tuple(told["modules_to_save"] or ())):
            tensors[f"base_model.model.{name}"] = rng.standard_normal(tensor.shape, np.float32) * np.float32(0.3)
    if "lm_head" in targets:
        tensors |= pair(rng, "base_model.model.lm_head", told["r"], tensors_of_embedding(model))
    folder.mkdir()
    save(tensors, folder / "adapter_model.safetensors")
    (folder / "adapter_config.json").write_text(json.dumps(told))
    return folder


def pair(rng: np.random.Generator, module: str, rank: int, shape: tuple[int, ...]) -> dict[str, np.ndarray]:
    a, b = (rng.standard_normal(size, np.float32) * np.float32(0.2) for size in ((rank, shape[1]), (shape[0], rank)))
    if module.endswith("embed_tokens"):
        return {f"{module}.lora_embedding_A": b.T.copy(), f"{module}.lora_embedding_B": a.T.copy()}
    return {f"{module}.lora_A.weight": a, f"{module}.lora_B.weight": b}


def tensors_of_embedding(model: Path) -> tuple[int, ...]:
    return read(model / "model.safetensors")["model.embed_tokens.weight"].shape


@answered_by("peft", "transformers", "torch", file="lora")
def logits(folder: Path, adapters: Path, ids: np.ndarray) -> np.ndarray:
    """Of a model with an adapter, by peft over transformers."""
    torch, _ = theirs.libraries()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # what these deprecate is not ours to mend
        import peft

        model = peft.PeftModel.from_pretrained(theirs.model_of(folder), adapters).eval()
    with torch.no_grad():
        return model(torch.tensor(ids)[None], use_cache=False).logits[0].numpy()
