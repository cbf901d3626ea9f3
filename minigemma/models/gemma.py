"""Gemma 1 (Gemma Team 2024a, "Gemma: Open Models Based on Gemini Research and Technology", §2): the baseline.

    h = x + attention(norm(x))               every layer sees every earlier token
    y = h + feed_forward(norm(h))

2B has one key/value head for all eight query heads (multi-query attention), 7B one for each (multi-head attention).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from ..config import AttentionConfig, TextConfig, released
from .decoder import Decoder
from .fields import REQUIRED, TANH_GELU, Fields, Json, plain_rope
from .registry import Family


@dataclass(frozen=True, kw_only=True)
class GemmaConfig(TextConfig):
    """Gemma 1: every layer global."""

    context: int = 8192

    family = "gemma"

    def attention(self, layer: int) -> AttentionConfig:
        """Every layer sees every earlier token."""
        return self.attention_config(window=None, rope_base=self.rope_base)


RELEASED = released(  # Tables 1 and 2
    GemmaConfig,
    "width layers heads kv_heads head_dim ffn_width",
    {
        "gemma-2b": (2048, 18, 8, 1, 256, 16384),
        "gemma-7b": (3072, 28, 16, 16, 256, 24576),
    },
    vocab=256_000,
)


class Gemma(Decoder):
    """Gemma 1. A layer is `attention_layer` of blocks/layers.py; each branch is normed on its way in (§2)."""


# ------------------------------------------------------------------------------------------------------------- files

# our name: (name in a Hugging Face folder, name in a GGUF file, shape in the letters of `TextConfig.axes`)
TENSORS = {
    "embedding": ("embed_tokens.weight", "token_embd.weight", "V D"),
    "final_norm": ("norm.weight", "output_norm.weight", "D"),
}
LAYER = {  # after "layers.{i}." or "blk.{i}."
    "attention.pre_norm": ("input_layernorm.weight", "attn_norm.weight", "D"),
    "attention.q": ("self_attn.q_proj.weight", "attn_q.weight", "NH D"),
    "attention.k": ("self_attn.k_proj.weight", "attn_k.weight", "KH D"),
    "attention.v": ("self_attn.v_proj.weight", "attn_v.weight", "KH D"),
    "attention.o": ("self_attn.o_proj.weight", "attn_output.weight", "D NH"),
    "ffn.pre_norm": ("post_attention_layernorm.weight", "ffn_norm.weight", "D"),  # its place in the block, not its role
    "ffn.gate": ("mlp.gate_proj.weight", "ffn_gate.weight", "F D"),
    "ffn.up": ("mlp.up_proj.weight", "ffn_up.weight", "F D"),
    "ffn.down": ("mlp.down_proj.weight", "ffn_down.weight", "D F"),
}
SIZES = {  # our field: (in config.json, in a GGUF header after "gemma.")
    "width": ("hidden_size", "embedding_length"),
    "layers": ("num_hidden_layers", "block_count"),
    "heads": ("num_attention_heads", "attention.head_count"),
    "kv_heads": ("num_key_value_heads", "attention.head_count_kv"),
    "head_dim": ("head_dim", "attention.key_length"),
    "ffn_width": ("intermediate_size", "feed_forward_length"),
    "context": ("max_position_embeddings", "context_length"),
}
JSON_DEFAULTS = {
    "vocab_size": 256_000,
    "num_attention_heads": 16,
    "num_key_value_heads": 16,
    "head_dim": 256,
    "max_position_embeddings": 8192,
    "rms_norm_eps": 1e-6,
}


def sizes_from_json(f: Fields) -> dict[str, Any]:
    """The sizes that every generation's config.json states; ValueError for attention that no generation has."""
    f.expect("attention_bias", False, because="no Gemma has biases on q, k and v")
    sizes: dict[str, Any] = {ours: f.integer(theirs) for ours, (theirs, _) in SIZES.items()}
    return sizes | {"vocab": f.integer("vocab_size"), "eps": f.number("rms_norm_eps")}


def sizes_to_json(config: TextConfig) -> Json:
    """The fields that `sizes_from_json` reads, and those that have one value in every Gemma."""
    sizes = {theirs: getattr(config, ours) for ours, (theirs, _) in SIZES.items()}
    ids = {"pad_token_id": 0, "eos_token_id": 1, "bos_token_id": 2}
    shared = {"attention_bias": False, "tie_word_embeddings": True, "vocab_size": config.vocab}
    return sizes | ids | shared | {"rms_norm_eps": config.eps, "hidden_activation": TANH_GELU[0]}


def rope_to_json(base: float, **more: Any) -> Json:
    """The fields that `rope_of` reads; `more`: a scale, or the part of each head that is rotated."""
    return {"rope_type": "default", "rope_theta": base} | more


def causal(f: Fields) -> None:
    """ValueError for a config.json whose tokens see later ones."""
    f.expect(
        "use_bidirectional_attention",
        False,
        because="Gemma's text models are causal; EmbeddingGemma has a modules.json",
    )


def sizes_from_gguf(f: Fields, rows: int, causal: bool = True) -> dict[str, Any]:
    """The sizes that every generation's GGUF header states; ValueError for attention that no generation has."""
    heads = f.integer("attention.head_count")
    usual = {"attention.head_count_kv": heads, "attention.key_length": 256}
    sizes: dict[str, Any] = {ours: f.integer(key, default=usual.get(key, REQUIRED)) for ours, (_, key) in SIZES.items()}
    for name in ("attention.value_length", "rope.dimension_count"):
        for layers in ("", "_swa"):
            f.expect(name + layers, sizes["head_dim"], because=f"it must be the head's {sizes['head_dim']}")
    f.expect("attention.causal", causal)
    f.expect("rope.scaling.attn_factor", 1.0)
    eps = round(f.number("attention.layer_norm_rms_epsilon"), 12)  # stored in float32
    return sizes | {"vocab": rows, "eps": eps, "rope_base": f.number("rope.freq_base", default=10_000.0)}


def sizes_to_gguf(config: TextConfig) -> Json:
    """The fields that `sizes_from_gguf` reads."""
    sizes = {theirs: getattr(config, ours) for ours, (_, theirs) in SIZES.items()}
    more = {"attention.layer_norm_rms_epsilon": config.eps, "rope.freq_base": config.rope_base}
    return sizes | more | dict.fromkeys(("attention.value_length", "rope.dimension_count"), config.head_dim)


def rope_scale_from_gguf(f: Fields, default: float = 1.0) -> float:
    """What a GGUF header divides positions by; ValueError for other scalings than linear."""
    factor = f.number("rope.scaling.factor", "rope.scale_linear", default=default) or 1.0  # 0 states nothing
    form = f.get("rope.scaling.type", default="linear")
    if form not in ("linear", "none"):
        raise ValueError(f"rope.scaling.type is {form!r}; minigemma runs linear and none")
    return factor if form == "linear" else 1.0


def unscaled_rope(f: Fields) -> None:
    """ValueError for a GGUF header that scales rope."""
    if (scale := rope_scale_from_gguf(f)) != 1:
        raise ValueError(f"rope.scaling.factor is {scale:g}; only Gemma 3's global layers are scaled")


def from_json(f: Fields) -> GemmaConfig:
    """The config of a Gemma 1's config.json, whose hidden_act "gelu" has always meant the tanh form."""
    causal(f)
    f.expect("hidden_act", "gelu", *TANH_GELU, because="Gemma's is gelu_pytorch_tanh")
    f.expect("hidden_activation", *TANH_GELU, because="Gemma's is gelu_pytorch_tanh")
    return GemmaConfig(**sizes_from_json(f), rope_base=plain_rope(f))


def to_json(config: GemmaConfig) -> Json:
    """The config.json that transformers reads, and `from_json`."""
    kind = {"architectures": ["GemmaForCausalLM"], "model_type": "gemma", "hidden_act": TANH_GELU[0]}
    return kind | sizes_to_json(config) | {"rope_parameters": rope_to_json(config.rope_base)}


def from_gguf(f: Fields, rows: int) -> GemmaConfig:
    """The config of a Gemma 1's GGUF header."""
    unscaled_rope(f)
    return GemmaConfig(**sizes_from_gguf(f, rows))


FAMILY = Family(
    name="gemma",
    title="Gemma 1",
    model=Gemma,
    released=RELEASED,
    hub_ids="gemma-2b gemma-2b-it gemma-7b gemma-7b-it gemma-1.1-2b-it gemma-1.1-7b-it",
    tensors=TENSORS,
    layer_tensors=lambda config, layer: LAYER,
    model_types=("gemma",),
    json_defaults=JSON_DEFAULTS,
    from_json=from_json,
    architecture="gemma",
    from_gguf=from_gguf,
    to_json=to_json,
    to_gguf=sizes_to_gguf,
)
