"""Gemma 3, its text model (Gemma Team 2025, "Gemma 3 Technical Report", §2).

    h = x + norm(attention(norm(x)))         five local layers (512 or 1,024 tokens), then a global one
    y = h + norm(feed_forward(norm(h)))

New since Gemma 2: 5 local layers to 1 global, norms on queries and keys in place of the soft-caps, a rope base of
1,000,000 on global layers, whose positions are divided by 8 in 4B and larger, and so a context of 128K with a small
cache. All of that is numbers (`Gemma3Config.attention`) and two more norms in `AttentionWeights`; the block itself is
Gemma 2's.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from ..config import AttentionConfig, TextConfig, VisionConfig, released
from . import gemma, gemma2
from .decoder import Decoder
from .fields import Fields, Json, Rope, period_from_gguf, period_from_json, rope_of
from .registry import Family
from .vision import vision_from_json


@dataclass(frozen=True, kw_only=True)
class Gemma3Config(TextConfig):
    """Gemma 3's text model: five local layers to a global one, norms on queries and keys."""

    context: int = 131_072
    window: int = 1024  # W
    rope_base: float = 1_000_000.0  # of global layers
    rope_base_local: float = 10_000.0
    rope_scale: float = 1.0  # of global layers: 8 in 4B, 12B and 27B
    pattern: int = 6  # every so many layers one is global

    family = "gemma3"
    norms_per_block = 4
    head_norms = 2  # QK-norm: AttentionWeights.q_norm and k_norm

    def attention(self, layer: int) -> AttentionConfig:
        """Five local layers, then a global one, beginning with a local one (Gemma 3 §2)."""
        if layer % self.pattern == self.pattern - 1:
            return self.attention_config(window=None, rope_base=self.rope_base, rope_scale=self.rope_scale)
        return self.attention_config(window=self.window, rope_base=self.rope_base_local)


COLUMNS = "width layers heads kv_heads head_dim ffn_width query_pre_attn_scalar"  # the scalar: H, but D / N in 27B
SMALL = {
    "gemma-3-270m": (640, 18, 4, 1, 256, 2048, 256),
    "gemma-3-1b": (1152, 26, 4, 1, 256, 6912, 256),
}
LARGE = {
    "gemma-3-4b": (2560, 34, 8, 4, 256, 10240, 256),
    "gemma-3-12b": (3840, 48, 16, 8, 256, 15360, 256),
    "gemma-3-27b": (5376, 62, 32, 16, 128, 21504, 168),
}
RELEASED = (  # Tables 1 and 2
    *released(Gemma3Config, COLUMNS, SMALL, vocab=262_144, context=32_768, window=512),
    *released(Gemma3Config, COLUMNS, LARGE, vocab=262_208, rope_scale=8.0, vision=VisionConfig()),
)


class Gemma3(Decoder):
    """Gemma 3, text. A layer is `attention_layer` of blocks/layers.py, with the norms of `LAYER` below (§2)."""


# ------------------------------------------------------------------------------------------------------------- files

LAYER = gemma2.LAYER | {
    "attention.q_norm": ("self_attn.q_norm.weight", "attn_q_norm.weight", "H"),
    "attention.k_norm": ("self_attn.k_norm.weight", "attn_k_norm.weight", "H"),
}
JSON_DEFAULTS = gemma2.JSON_DEFAULTS | {
    "vocab_size": 262_208,
    "max_position_embeddings": 131_072,
    "rope_theta": 1_000_000.0,
    "rope_local_base_freq": 10_000.0,
    "attn_logit_softcapping": None,
    "final_logit_softcapping": None,
}


def rope_from_json(f: Fields) -> tuple[Rope, Rope]:
    """The rope of global and of local layers, from rope_parameters (one object per kind) and the older fields.

    `rope_scaling` is about global layers. One flat rope_parameters for all layers is used by no reader as it stands, so
    it may only repeat what the global layers have anyway.
    """
    base, local_base = f.number("rope_theta"), f.number("rope_local_base_freq")
    f.expect("partial_rotary_factor", 1.0)
    newer, older = f.object("rope_parameters"), f.object("rope_scaling")
    kinds = {"full_attention", "sliding_attention"}
    if flat := {name: value for name, value in newer.items() if name not in kinds}:
        if newer.keys() & kinds:
            raise ValueError(f"rope_parameters has {next(iter(flat))!r}, which minigemma does not know")
        newer = {}
        if rope_of(flat, base) != rope_of({}, base):
            raise ValueError(f"rope_parameters is {flat}, which does not say for which layers; state both kinds")
    by_kind = Fields(newer, prefix="rope_parameters.")
    local = rope_of(by_kind.object("sliding_attention"), local_base, name="rope_parameters.sliding_attention")
    if local.scale != 1:
        raise ValueError(f"rope of sliding_attention is scaled by {local.scale:g}; Gemma 3 scales global layers only")
    name = "rope_scaling" if older else "rope_parameters.full_attention"
    rope = rope_of(by_kind.object("full_attention") | older, base, name=name)
    if (rope.fraction, local.fraction) != (1, 1):
        raise ValueError("partial_rotary_factor is not 1; Gemma 3 rotates whole heads")
    return rope, local


def text_fields(f: Fields) -> dict[str, Any]:
    """The fields of a Gemma3Config that the text model's part of config.json states."""
    gemma2.check_activation(f)
    sizes = gemma.sizes_from_json(f)
    f.expect("attn_logit_softcapping", because="Gemma 3 has no cap on scores")
    rope, local = rope_from_json(f)
    return sizes | {
        "query_pre_attn_scalar": f.number("query_pre_attn_scalar"),
        "window": f.integer("sliding_window"),
        "rope_base": rope.base,
        "rope_base_local": local.base,
        "rope_scale": rope.scale,
        "pattern": period_from_json(f, sizes["layers"], 6),
        "logit_cap": f.cap("final_logit_softcapping"),
    }


def from_json(f: Fields) -> Gemma3Config:
    """The config of a Gemma 3's config.json: of the text model alone, or nested beside a vision tower."""
    nested = f.get("model_type") == "gemma3"
    text = f.inner("text_config", JSON_DEFAULTS) if nested else f
    text.expect("model_type", "gemma3_text")
    gemma.causal(text)
    return Gemma3Config(**text_fields(text), vision=vision_from_json(f) if nested else None)


def to_json(config: Gemma3Config) -> Json:
    """The config.json of the text model that transformers reads, and `from_json`."""
    scaled = {"rope_type": "linear", "factor": config.rope_scale} if config.rope_scale != 1 else {}
    own = {
        "architectures": ["Gemma3ForCausalLM"],
        "model_type": "gemma3_text",
        "query_pre_attn_scalar": gemma2.query_scalar(config),
        "sliding_window": config.window,
        "final_logit_softcapping": config.logit_cap,
    }
    rope = {
        "full_attention": gemma.rope_to_json(config.rope_base, **scaled),
        "sliding_attention": gemma.rope_to_json(config.rope_base_local),
    }
    kinds = gemma2.layer_types(config)
    return own | gemma.sizes_to_json(config) | {"layer_types": kinds, "rope_parameters": rope}


def gguf_fields(f: Fields, rows: int, causal: bool = True) -> dict[str, Any]:
    """The fields of a Gemma3Config that a GGUF header states. Not in it: 27B's attention scale, in older files the
    local rope base, the pattern and the factor 8 of the large ones; llama.cpp has these as constants, too.
    """
    sizes = gemma.sizes_from_gguf(f, rows, causal)
    layers, base = sizes["layers"], f.number("rope.freq_base", default=1_000_000.0)
    return sizes | {
        "query_pre_attn_scalar": sizes["width"] / sizes["heads"] if layers == 62 else float(sizes["head_dim"]),
        "window": f.integer("attention.sliding_window"),
        "rope_base": base,
        "rope_base_local": f.number("rope.freq_base_swa", "rope.local.freq_base", default=10_000.0),
        "rope_scale": gemma.rope_scale_from_gguf(f, default=8.0 if layers in (34, 48, 62) else 1.0),
        "pattern": period_from_gguf(f, layers, 6),
        "logit_cap": f.number("final_logit_softcapping", default=0.0) or None,
    }


def from_gguf(f: Fields, rows: int) -> Gemma3Config:
    """The config of a Gemma 3's GGUF header."""
    return Gemma3Config(**gguf_fields(f, rows))


def to_gguf(config: Gemma3Config) -> Json:
    """The fields of a GGUF header that `from_gguf` and llama.cpp read."""
    own = {
        "attention.sliding_window": config.window,
        "attention.sliding_window_pattern": config.pattern,
        "rope.freq_base_swa": config.rope_base_local,
        "rope.scaling.type": "linear",
        "rope.scaling.factor": config.rope_scale,
    }
    cap = {"final_logit_softcapping": config.logit_cap} if config.logit_cap else {}
    return gemma.sizes_to_gguf(config) | own | cap


FAMILY = Family(
    name="gemma3",
    title="Gemma 3",
    model=Gemma3,
    released=RELEASED,
    hub_ids="gemma-3-270m gemma-3-270m-it gemma-3-1b-pt gemma-3-1b-it gemma-3-4b-pt gemma-3-4b-it "
    "gemma-3-12b-pt gemma-3-12b-it gemma-3-27b-pt gemma-3-27b-it",
    tensors=gemma.TENSORS,
    layer_tensors=lambda config, layer: LAYER,
    model_types=("gemma3_text", "gemma3"),
    json_defaults=JSON_DEFAULTS,
    from_json=from_json,
    architecture="gemma3",
    from_gguf=from_gguf,
    to_json=to_json,
    to_gguf=to_gguf,
    system_turn=True,
)
