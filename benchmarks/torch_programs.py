"""Programs on torch, with the weights in bf16 as they were released: transformers, and DeepMind's RecurrentGemma."""

from __future__ import annotations

import importlib
import sys
import time
from collections.abc import Sequence
from importlib.util import find_spec
from pathlib import Path
from types import ModuleType
from typing import Any

from minigemma.arrays import F32
from minigemma.cli.measure import Program, parameters
from minigemma.config import TextConfig
from minigemma.models.decoder import Decoder
from minigemma.models.gemma2 import Gemma2Config
from minigemma.models.gemma3 import Gemma3Config
from minigemma.models.recurrentgemma import RecurrentGemmaConfig
from minigemma.models.vision import VISION, VISION_LAYER

from .weights import as_bf16, named_weights, torch_for


class Transformers(Program):
    """The transformers library on torch, in bf16, with its own key/value cache."""

    name = "transformers"

    def __init__(self, model: Decoder) -> None:
        self.torch = torch = torch_for(model)
        transformers = importlib.import_module("transformers")
        self.model, self.read_bytes = causal_lm(torch, transformers, model), 2 * parameters(model)
        self.tower = _siglip(torch, transformers, model)

    def look(self, pixels: F32) -> float | None:
        """As every program."""
        if self.tower is None:
            return None
        began = time.perf_counter()
        image = self.torch.from_numpy(pixels[None]).to(self.torch.bfloat16)
        self.seen = self.tower(image).last_hidden_state
        return time.perf_counter() - began

    def prefill(self, ids: Sequence[int]) -> float:
        """As every program."""
        began = time.perf_counter()
        self.state = self.model(self.torch.tensor([list(ids)]), use_cache=True, logits_to_keep=1)
        self.position = len(ids)
        return time.perf_counter() - began

    def decode(self, count: int) -> float:
        """As every program."""
        began = time.perf_counter()
        for _ in range(count):
            token, cache = self.state.logits[:, -1:].argmax(-1), self.state.get("past_key_values")
            at = self.torch.tensor([[self.position]])
            self.state = self.model(token, past_key_values=cache, use_cache=True, position_ids=at)
            self.position += 1
        return (time.perf_counter() - began) / count


def causal_lm(torch: ModuleType, transformers: ModuleType, model: Decoder) -> Any:
    """The language model of `model` as transformers', its weights in bf16."""
    transformers.logging.set_verbosity_error()
    kind, settings = _transformers_config(model.config)
    config = getattr(transformers, f"{kind}{'Text' * (kind == 'Gemma3')}Config")(**settings)
    torch.set_default_dtype(torch.bfloat16)
    try:
        with importlib.import_module("transformers.initialization").no_init_weights():
            made = getattr(transformers, f"{kind}ForCausalLM")(config).eval()
    finally:
        torch.set_default_dtype(torch.float32)
    state = {name: as_bf16(torch, weight) for name, weight in named_weights(model)}
    made.load_state_dict(state | {"lm_head.weight": state["model.embed_tokens.weight"]}, assign=True)
    return made


def _siglip(torch: ModuleType, transformers: ModuleType, model: Decoder) -> Any:
    """The vision tower of `model` as transformers', None if it has none."""
    v, w = model.vision, model.weights.vision
    if v is None or w is None:
        return None
    sizes = {"hidden_size": v.width, "intermediate_size": v.ffn_width, "num_hidden_layers": v.layers}
    sizes |= {"num_attention_heads": v.heads, "image_size": v.side, "patch_size": v.patch}
    config = transformers.SiglipVisionConfig(**sizes, vision_use_head=False)
    tower = transformers.SiglipVisionModel._from_config(config, attn_implementation="sdpa").to(torch.bfloat16).eval()
    state = {}
    for ours, (name, *_) in VISION.items():
        if name.startswith("vision_tower."):
            state[name.removeprefix("vision_tower.")] = as_bf16(torch, getattr(w, ours))
    for i, block in enumerate(w.blocks):
        for ours, (name, *_) in VISION_LAYER.items():
            state[f"encoder.layers.{i}.{name}"] = as_bf16(torch, getattr(block, ours))
    patch = state["embeddings.patch_embedding.weight"]
    state["embeddings.patch_embedding.weight"] = patch.reshape(v.width, 3, v.patch, v.patch)
    tower.load_state_dict(state)
    return tower


def _transformers_config(c: TextConfig) -> tuple[str, dict[str, Any]]:
    """The name of its classes, and the settings of a config that says what ours does."""
    settings: dict[str, Any] = {
        "vocab_size": c.vocab,
        "hidden_size": c.width,
        "intermediate_size": c.ffn_width,
        "num_hidden_layers": c.layers,
        "num_attention_heads": c.heads,
        "num_key_value_heads": c.kv_heads,
        "head_dim": c.head_dim,
        "max_position_embeddings": c.context,
        "query_pre_attn_scalar": int(c.query_pre_attn_scalar or c.head_dim),  # transformers takes no float
    }
    if isinstance(c, RecurrentGemmaConfig):
        sizes = {"intermediate_size": 2 * c.ffn_width, "lru_width": c.lru_width, "attention_window_size": c.window}
        return "RecurrentGemma", settings | sizes
    if isinstance(c, Gemma2Config):
        return "Gemma2", settings | {"sliding_window": c.window}
    if isinstance(c, Gemma3Config):
        wide = {"rope_type": "linear", "rope_theta": c.rope_base, "factor": c.rope_scale}
        ropes = {"full_attention": wide, "sliding_attention": {"rope_type": "default", "rope_theta": c.rope_base_local}}
        layers = {"sliding_window": c.window, "sliding_window_pattern": c.pattern}
        return "Gemma3", settings | layers | {"rope_parameters": ropes}
    return "Gemma", settings


class DeepMind(Program):
    """DeepMind's own RecurrentGemma for torch (PyPI recurrentgemma), in bf16."""

    name = "deepmind"

    def __init__(self, model: Decoder) -> None:
        c = model.config
        if not isinstance(c, RecurrentGemmaConfig):
            raise ImportError("DeepMind's recurrentgemma runs RecurrentGemma only")
        common, griffin = deepmind_modules()
        self.torch = torch = torch_for(model)
        kind = common.TemporalBlockType
        config = common.GriffinConfig(
            vocab_size=c.vocab,
            width=c.width,
            mlp_expanded_width=c.ffn_width,
            num_heads=c.heads,
            lru_width=c.lru_width,
            block_types=tuple(kind.ATTENTION if c.is_attention(i) else kind.RECURRENT for i in range(c.layers)),
            embeddings_scale_by_sqrt_dim=True,
            attention_window_size=c.window,
            logits_soft_cap=c.logit_cap,
        )
        with torch.device("meta"):
            self.model = griffin.Griffin(config, gradient_checkpointing=False, dtype=torch.bfloat16).eval()
        state = deepmind_names(torch, {name: as_bf16(torch, weight) for name, weight in named_weights(model)}, c.layers)
        self.model.load_state_dict(state, assign=True)
        self.read_bytes = 2 * parameters(model)

    def prefill(self, ids: Sequence[int]) -> float:
        """As every program."""
        began = time.perf_counter()
        self.logits, self.state = self.model(
            self.torch.tensor([list(ids)]), self.torch.arange(len(ids))[None], return_logits=True
        )
        self.position = len(ids)
        return time.perf_counter() - began

    def decode(self, count: int) -> float:
        """As every program."""
        began = time.perf_counter()
        for _ in range(count):
            token = self.logits[:, -1:].argmax(-1)
            position = self.torch.tensor([[self.position]])
            self.logits, self.state = self.model(token, position, self.state)
            self.position += 1
        return (time.perf_counter() - began) / count


def deepmind_modules() -> tuple[ModuleType, ModuleType]:
    """The modules common and torch.griffin of DeepMind's package; ImportError where it is not installed.

    Its own __init__ files import jax, and a sampler that 1.0.1 left out; in their place stand two empty packages.
    """
    missing = [name for name in ("recurrentgemma", "einops", "jaxtyping", "torch") if find_spec(name) is None]
    if missing:
        raise ImportError(f"{', '.join(missing)}: pip install --no-deps recurrentgemma==1.0.1 einops jaxtyping")
    spec = find_spec("recurrentgemma")
    at = Path(spec.submodule_search_locations[0])  # type: ignore[union-attr,index]
    before = {name: sys.modules.pop(name) for name in list(sys.modules) if name.split(".")[0] == "recurrentgemma"}
    for name, folder in (("recurrentgemma", at), ("recurrentgemma.torch", at / "torch")):
        package = sys.modules[name] = ModuleType(name)
        package.__path__ = [str(folder)]
    try:
        names = ("recurrentgemma.common", "recurrentgemma.torch.griffin")
        return tuple(importlib.import_module(name) for name in names)  # type: ignore[return-value]
    finally:
        for name in [name for name in sys.modules if name.split(".")[0] == "recurrentgemma"]:
            del sys.modules[name]
        sys.modules.update(before)


def deepmind_names(torch: ModuleType, tensors: dict[str, Any], layers: int) -> dict[str, Any]:
    """The tensors of a Hugging Face RecurrentGemma by DeepMind's names and in its shapes (SPEC: its layers.py)."""
    out = {"embedder.input_embedding": tensors["model.embed_tokens.weight"]}
    out["final_norm.scale"] = tensors["model.final_norm.weight"]
    for i in range(layers):
        prefix = f"model.layers.{i}."
        t = {name.removeprefix(prefix): v for name, v in tensors.items() if name.startswith(prefix)}
        block = {f"{norm}.scale": t[f"{norm}.weight"] for norm in ("temporal_pre_norm", "channel_pre_norm")}
        pair = ("gate", "up")
        block["mlp_block.ffw_up.w"] = torch.stack([t[f"mlp_block.{part}_proj.weight"].T for part in pair])
        block["mlp_block.ffw_up.b"] = torch.stack([t[f"mlp_block.{part}_proj.bias"] for part in pair])[:, None, None]
        block |= {f"mlp_block.ffw_down.{end}": t[f"mlp_block.down_proj.{end}"] for end in ("weight", "bias")}
        temporal = "temporal_block."
        if f"{temporal}q_proj.weight" in t:
            renamed = {f"proj_{part}.weight": f"{part}_proj.weight" for part in "qkv"}
            renamed |= {f"proj_final.{end}": f"o_proj.{end}" for end in ("weight", "bias")}
            block |= {f"attention_block.{ours}": t[temporal + theirs] for ours, theirs in renamed.items()}
        else:
            renamed = {
                f"linear_{part}.{e}": f"linear_{part}.{e}" for part in ("x", "y", "out") for e in ("weight", "bias")
            }
            for ours, theirs in (("a_gate", "recurrent_gate"), ("input_gate", "input_gate")):
                renamed |= {f"rg_lru.{ours}.{end[0]}": f"rg_lru.{theirs}_{end}" for end in ("weight", "bias")}
            renamed |= {"rg_lru.a_param": "rg_lru.recurrent_param", "conv_1d.b": "conv_1d.bias"}
            block |= {f"recurrent_block.{ours}": t[temporal + theirs] for ours, theirs in renamed.items()}
            block["recurrent_block.conv_1d.w"] = t[f"{temporal}conv_1d.weight"][:, 0].T
        out |= {f"blocks.{i}.{name}": tensor for name, tensor in block.items()}
    return out
