"""Gemma 2 (Gemma Team 2024b, "Gemma 2: Improving Open Language Models at a Practical Size", §2).

    h = x + norm(attention(norm(x)))         local (the last 4,096 tokens) and global in turn, scores capped at 50
    y = h + norm(feed_forward(norm(h)))

New since Gemma 1: a norm after each branch as well as before it, local layers, soft-caps on scores and logits, and
two query heads to a key/value head in every size.
"""

from __future__ import annotations

from dataclasses import dataclass

from ..config import AttentionConfig, TextConfig, released
from . import gemma
from .decoder import Decoder
from .fields import TANH_GELU, Fields, Json, period_from_gguf, period_from_json, plain_rope
from .registry import Family


@dataclass(frozen=True, kw_only=True)
class Gemma2Config(TextConfig):
    """Gemma 2: local and global in turn, soft-caps on scores and logits."""

    context: int = 8192
    window: int = 4096  # W
    attention_cap: float | None = 50.0
    logit_cap: float | None = 30.0

    family = "gemma2"
    norms_per_block = 4

    def attention(self, layer: int) -> AttentionConfig:
        """Even layers are local, odd ones global (Gemma 2 §2, "Local sliding window and global attention")."""
        return self.attention_config(
            window=self.window if layer % 2 == 0 else None, rope_base=self.rope_base, soft_cap=self.attention_cap
        )


RELEASED = released(  # Tables 1 to 3; the scalar is H, but D / N in 27B
    Gemma2Config,
    "width layers heads kv_heads head_dim ffn_width query_pre_attn_scalar",
    {
        "gemma-2-2b": (2304, 26, 8, 4, 256, 9216, 256),
        "gemma-2-9b": (3584, 42, 16, 8, 256, 14336, 256),
        "gemma-2-27b": (4608, 46, 32, 16, 128, 36864, 144),
    },
    vocab=256_000,
)


class Gemma2(Decoder):
    """Gemma 2. A layer is `attention_layer` of blocks/layers.py; each branch is normed on its way in and out (§2)."""


# ------------------------------------------------------------------------------------------------------------- files

LAYER = gemma.LAYER | {
    "attention.post_norm": ("post_attention_layernorm.weight", "post_attention_norm.weight", "D"),
    "ffn.pre_norm": ("pre_feedforward_layernorm.weight", "ffn_norm.weight", "D"),
    "ffn.post_norm": ("post_feedforward_layernorm.weight", "post_ffw_norm.weight", "D"),
}
JSON_DEFAULTS = gemma.JSON_DEFAULTS | {
    "num_attention_heads": 8,
    "num_key_value_heads": 4,
    "sliding_window": 4096,
    "query_pre_attn_scalar": 256,
    "attn_logit_softcapping": 50.0,
    "final_logit_softcapping": 30.0,
}


PATTERN = "layer_types or sliding_window_pattern differ from Gemma 2's: local and global in turn"


def check_activation(f: Fields) -> None:
    """ValueError for a hidden_activation other than the tanh form; hidden_act is its name in older files."""
    stated = f.get("hidden_activation", default=None)
    f.expect("hidden_activation", *TANH_GELU, because="Gemma's is gelu_pytorch_tanh")
    f.expect("hidden_act", *TANH_GELU, *(["gelu"] if stated else []), because="Gemma's is gelu_pytorch_tanh")


def from_json(f: Fields) -> Gemma2Config:
    """The config of a Gemma 2's config.json."""
    check_activation(f)
    gemma.causal(f)
    sizes = gemma.sizes_from_json(f)
    if period_from_json(f, sizes["layers"], 2) != 2:
        raise ValueError(PATTERN)
    scalar = f.number("query_pre_attn_scalar")
    if (sizes["width"], sizes["layers"], scalar) == (3584, 42, 224):  # 9B was released so; it was trained with 256
        scalar = 256.0
    window = f.integer("sliding_window")
    f.expect("sliding_window_size", window)
    return Gemma2Config(
        **sizes,
        query_pre_attn_scalar=scalar,
        window=window,
        attention_cap=f.cap("attn_logit_softcapping"),
        logit_cap=f.cap("final_logit_softcapping"),
        rope_base=plain_rope(f),
    )


def layer_types(config: TextConfig) -> list[str]:
    """The kind of each layer as config.json names it, for `period_from_json`."""
    names = {"local": "sliding_attention", "global": "full_attention"}
    return [names[config.kind(i)] for i in range(config.layers)]


def query_scalar(config: TextConfig) -> float:
    """What scores are divided by the root of; an integer as int, since transformers takes no other type."""
    scalar = config.query_pre_attn_scalar or config.head_dim
    return int(scalar) if scalar == int(scalar) else scalar


def to_json(config: Gemma2Config) -> Json:
    """The config.json that transformers reads, and `from_json`."""
    own = {
        "architectures": ["Gemma2ForCausalLM"],
        "model_type": "gemma2",
        "query_pre_attn_scalar": query_scalar(config),
        "sliding_window": config.window,
        "attn_logit_softcapping": config.attention_cap,
        "final_logit_softcapping": config.logit_cap,
    }
    rope = {"layer_types": layer_types(config), "rope_parameters": gemma.rope_to_json(config.rope_base)}
    return own | gemma.sizes_to_json(config) | rope


def from_gguf(f: Fields, rows: int) -> Gemma2Config:
    """The config of a Gemma 2's GGUF header, which does not state the attention scale of 27B."""
    gemma.unscaled_rope(f)
    sizes = gemma.sizes_from_gguf(f, rows)
    if period_from_gguf(f, sizes["layers"], 2) != 2:
        raise ValueError(PATTERN)
    return Gemma2Config(
        **sizes,
        query_pre_attn_scalar=sizes["width"] / sizes["heads"] if sizes["layers"] == 46 else float(sizes["head_dim"]),
        window=f.integer("attention.sliding_window", default=4096),
        attention_cap=f.number("attn_logit_softcapping", default=50.0),
        logit_cap=f.number("final_logit_softcapping", default=30.0),
    )


def to_gguf(config: Gemma2Config) -> Json:
    """The fields of a GGUF header that `from_gguf` and llama.cpp read."""
    caps = {"attn_logit_softcapping": config.attention_cap, "final_logit_softcapping": config.logit_cap}
    return gemma.sizes_to_gguf(config) | caps | {"attention.sliding_window": config.window}


FAMILY = Family(
    name="gemma2",
    title="Gemma 2",
    model=Gemma2,
    released=RELEASED,
    hub_ids="gemma-2-2b gemma-2-2b-it gemma-2-9b gemma-2-9b-it gemma-2-27b gemma-2-27b-it",
    tensors=gemma.TENSORS,
    layer_tensors=lambda config, layer: LAYER,
    model_types=("gemma2",),
    json_defaults=JSON_DEFAULTS,
    from_json=from_json,
    architecture="gemma2",
    from_gguf=from_gguf,
    to_json=to_json,
    to_gguf=to_gguf,
)
