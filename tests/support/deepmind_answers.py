"""What DeepMind's own RecurrentGemma (its torch part) gives for a folder of ours: recorded, or asked live."""

from __future__ import annotations

import functools
import json
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from support.oracles import Mode, answered_by
from support.tensors import read


def require() -> None:
    """Skip where its package is to be asked and is not installed; it asks for jax, so that no extra can name it."""
    if Mode.live and not all(map(find_spec, ("recurrentgemma", "einops", "jaxtyping"))):
        pytest.skip("pip install --no-deps recurrentgemma==1.0.1 && pip install einops jaxtyping")


@functools.lru_cache(maxsize=2)
def model_of(folder: Path) -> Any:
    """DeepMind's model with the weights of a folder, and the window that its config.json states."""
    import torch

    from benchmarks.torch_programs import deepmind_modules, deepmind_names

    common, module = deepmind_modules()
    stated, kind = json.loads((folder / "config.json").read_text("utf-8")), common.TemporalBlockType
    layers = stated["num_hidden_layers"]
    config = common.GriffinConfig(
        vocab_size=stated["vocab_size"],
        width=stated["hidden_size"],
        mlp_expanded_width=stated["intermediate_size"] // 2,
        num_heads=stated["num_attention_heads"],
        block_types=tuple(kind.ATTENTION if i % 3 == 2 else kind.RECURRENT for i in range(layers)),
        embeddings_scale_by_sqrt_dim=True,
        attention_window_size=stated["attention_window_size"],
        logits_soft_cap=stated["logits_soft_cap"],
        lru_width=stated["lru_width"],
    )
    model = module.Griffin(config, gradient_checkpointing=False)
    tensors = {name: torch.tensor(values) for name, values in read(folder / "model.safetensors").items()}
    model.load_state_dict(deepmind_names(torch, tensors, layers))
    return model.eval()


@answered_by("recurrentgemma", "torch")
def logits(folder: Path, ids: np.ndarray) -> np.ndarray:
    """Of all of ids at once, [T, V]."""
    import torch

    with torch.no_grad():
        found, _ = model_of(folder)(torch.from_numpy(ids)[None], torch.arange(len(ids))[None])
    return found[0].numpy()


@answered_by("recurrentgemma", "torch")
def logits_step_by_step(folder: Path, ids: np.ndarray, prompt: int) -> np.ndarray:
    """The same with its own cache: the first `prompt` ids in one call, the others one by one."""
    import torch

    model = model_of(folder)
    with torch.no_grad():
        logits, state = model(torch.from_numpy(ids[:prompt])[None], torch.arange(prompt)[None])
        found = [logits[0].numpy()]
        for t in range(prompt, len(ids)):
            logits, state = model(torch.from_numpy(ids[t : t + 1])[None], torch.tensor([[t]]), state)
            found.append(logits[0].numpy())
    return np.concatenate(found)
