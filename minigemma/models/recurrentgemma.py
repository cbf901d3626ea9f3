"""RecurrentGemma (Botev et al. 2024, "RecurrentGemma: Moving Past Transformers for Efficient Open Language Models").

    h = x + temporal(norm(x))                two recurrent blocks, then local attention, and so on
    y = h + feed_forward(norm(h))

Attention is local only, over the last 2,048 tokens and the current one, with one key/value head, rope on the first
half of each head, and a bias on its output; so the whole state is of one size from there on. Every linear map of the
recurrent and feed-forward blocks has a bias too. Logits are soft-capped at 30. √D is always rounded to bf16.

Departs from transformers in the window: DeepMind's code lets a token see 2,048 earlier ones and itself, transformers
one fewer.
"""

from __future__ import annotations

from dataclasses import dataclass

from ..cache import LayerState, RecurrentState
from ..config import AttentionConfig, TextConfig, released
from . import gemma
from .decoder import Decoder
from .fields import TANH_GELU, Fields, Json, whole_rope
from .registry import Family, Table


@dataclass(frozen=True, kw_only=True)
class RecurrentGemmaConfig(TextConfig):
    """RecurrentGemma: two recurrent blocks to one of local attention (Botev et al. 2024, Table 1)."""

    context: int = 1 << 20  # nothing grows with it; it was trained on sequences of 8,192
    window: int = 2048  # W: earlier tokens that each sees, besides itself
    lru_width: int  # E
    gate_blocks: int  # M: blocks of the RG-LRU's gates
    conv_width: int = 4
    rope_fraction: float = 0.5
    pattern: tuple[str, ...] = ("recurrent", "recurrent", "attention")
    logit_cap: float | None = 30.0

    family = "recurrentgemma"
    norms_per_block = 2

    def __post_init__(self) -> None:
        """Refuse impossible sizes with ValueError."""
        super().__post_init__()
        if self.lru_width % self.gate_blocks:
            raise ValueError(f"lru_width {self.lru_width} does not divide into {self.gate_blocks} blocks of gates")
        if self.conv_width < 2:
            raise ValueError(
                f"conv_width is {self.conv_width}; the convolution sees the current token and at least one more"
            )
        rotated = self.head_dim * self.rope_fraction
        if rotated > self.head_dim or rotated % 2:
            raise ValueError(
                f"rope rotates {rotated:g} of {self.head_dim} numbers of a head; it must be an even part of them"
            )
        if not self.pattern or set(self.pattern) - {"recurrent", "attention"}:
            raise ValueError(f"block_types is {list(self.pattern)}; each must be 'recurrent' or 'attention'")

    def is_attention(self, layer: int) -> bool:
        """Every third layer; the others are recurrent, and the pattern may end anywhere (De et al. 2024 §3)."""
        return self.pattern[layer % len(self.pattern)] == "attention"

    def attention(self, layer: int) -> AttentionConfig:
        """Local: W earlier tokens and the token itself, as in DeepMind's code."""
        return self.attention_config(window=self.window + 1, rope_base=self.rope_base, rope_fraction=self.rope_fraction)

    def kind(self, layer: int) -> str:
        """ "local" attention, or "recurrent"."""
        return "local" if self.is_attention(layer) else "recurrent"

    @property
    def axes(self) -> dict[str, int]:
        """Letters of the table below: E, and C width of the convolution, M blocks of the gates, I their width."""
        E, M = self.lru_width, self.gate_blocks
        return super().axes | {"E": E, "C": self.conv_width, "M": M, "I": E // M}

    @property
    def non_embedding_parameters(self) -> int:
        """All parameters but the embedding's, with the biases of every linear map but q, k and v."""
        D, E, F, size = self.width, self.lru_width, self.ffn_width, self.lru_width // self.gate_blocks
        attention = 2 * self.heads * self.head_dim * D + D + 2 * self.kv_heads * self.head_dim * D
        gates = 2 * (self.gate_blocks * size * size + E) + E
        recurrent = 2 * (D * E + E) + E * D + D + self.conv_width * E + E + gates
        shared = 3 * D * F + 2 * F + D + self.norms_per_block * D
        kinds = [attention if self.is_attention(i) else recurrent for i in range(self.layers)]
        return sum(kinds) + self.layers * shared + D

    def cache_bytes(self, tokens: int, bytes_per_value: int = 2) -> int:
        """Bytes of at most W + 1 keys and values, and of each recurrent layer's float32 h and convolution tail."""
        attention = sum(self.is_attention(i) for i in range(self.layers))
        keys = attention * min(tokens, self.window + 1) * 2 * self.kv_heads * self.head_dim * bytes_per_value
        return keys + (self.layers - attention) * self.conv_width * self.lru_width * 4


RELEASED = released(  # Table 1
    RecurrentGemmaConfig,
    "width layers heads ffn_width lru_width gate_blocks",
    {
        "recurrentgemma-2b": (2560, 26, 10, 7680, 2560, 10),
        "recurrentgemma-9b": (4096, 38, 16, 12288, 4096, 16),
    },
    kv_heads=1,
    head_dim=256,
    vocab=256_000,
)


class RecurrentGemma(Decoder):
    """RecurrentGemma, and Griffin of any size. A layer is `recurrent_layer` or `attention_layer` of blocks/layers.py;
    each branch is normed on its way in (Botev et al. 2024 §2).
    """

    config: RecurrentGemmaConfig

    def layer_state(self, layer: int, max_tokens: int, dtype: type) -> LayerState:
        """A ring for attention; for a recurrent block its h and the tail of its convolution."""
        if self.config.is_attention(layer):
            return super().layer_state(layer, max_tokens, dtype)
        return RecurrentState(self.config.conv_width, self.config.lru_width)


# ------------------------------------------------------------------------------------------------------------- files

# our name: (name in a Hugging Face folder after "layers.{i}.", none in GGUF, shape in the letters of `axes`)
TENSORS = gemma.TENSORS | {"final_norm": ("final_norm.weight", "", "D")}
LAYER = {
    "ffn.pre_norm": ("channel_pre_norm.weight", "", "D"),
    **{f"ffn.{part}": (f"mlp_block.{part}_proj.weight", "", "F D") for part in ("gate", "up")},
    **{f"ffn.{part}_bias": (f"mlp_block.{part}_proj.bias", "", "F") for part in ("gate", "up")},
    "ffn.down": ("mlp_block.down_proj.weight", "", "D F"),
    "ffn.down_bias": ("mlp_block.down_proj.bias", "", "D"),
}
RECURRENT = {
    "recurrent.pre_norm": ("temporal_pre_norm.weight", "", "D"),
    **{f"recurrent.{part}": (f"temporal_block.linear_{part}.weight", "", "E D") for part in ("x", "y")},
    **{f"recurrent.{part}_bias": (f"temporal_block.linear_{part}.bias", "", "E") for part in ("x", "y")},
    "recurrent.out": ("temporal_block.linear_out.weight", "", "D E"),
    "recurrent.out_bias": ("temporal_block.linear_out.bias", "", "D"),
    "recurrent.conv": ("temporal_block.conv_1d.weight", "", "E 1 C"),
    "recurrent.conv_bias": ("temporal_block.conv_1d.bias", "", "E"),
    "recurrent.decay": ("temporal_block.rg_lru.recurrent_param", "", "E"),
    "recurrent.recurrence_gate": ("temporal_block.rg_lru.recurrent_gate_weight", "", "M I I"),
    "recurrent.recurrence_bias": ("temporal_block.rg_lru.recurrent_gate_bias", "", "M I"),
    "recurrent.input_gate": ("temporal_block.rg_lru.input_gate_weight", "", "M I I"),
    "recurrent.input_bias": ("temporal_block.rg_lru.input_gate_bias", "", "M I"),
}
ATTENTION = {
    "attention.pre_norm": ("temporal_pre_norm.weight", "", "D"),
    "attention.q": ("temporal_block.q_proj.weight", "", "NH D"),
    "attention.k": ("temporal_block.k_proj.weight", "", "KH D"),
    "attention.v": ("temporal_block.v_proj.weight", "", "KH D"),
    "attention.o": ("temporal_block.o_proj.weight", "", "D NH"),
    "attention.o_bias": ("temporal_block.o_proj.bias", "", "D"),
}
JSON_DEFAULTS = gemma.JSON_DEFAULTS | {
    "num_attention_heads": 10,
    "num_key_value_heads": 1,
    "max_position_embeddings": RecurrentGemmaConfig.context,
    "attention_window_size": 2048,
    "conv1d_width": 4,
    "logits_soft_cap": 30.0,
}
KINDS = {"linear_attention": "recurrent", "sliding_attention": "attention"}  # as transformers 5 also writes them


def layer_tensors(config: RecurrentGemmaConfig, layer: int) -> Table:
    """The tensors of an attention or a recurrent layer."""
    return LAYER | (ATTENTION if config.is_attention(layer) else RECURRENT)


def from_json(f: Fields) -> RecurrentGemmaConfig:
    """The config of a RecurrentGemma's config.json, whose intermediate_size counts both branches (2 · F)."""
    f.expect("hidden_activation", *TANH_GELU, because="RecurrentGemma's is gelu_pytorch_tanh")
    f.expect("hidden_act", *TANH_GELU, because="RecurrentGemma's is gelu_pytorch_tanh")
    f.expect("embeddings_scale_by_sqrt_dim", True, because="RecurrentGemma scales its embeddings")
    gemma.causal(f)
    sizes = gemma.sizes_from_json(f)
    if sizes["ffn_width"] % 2:
        raise ValueError(f"intermediate_size is {sizes['ffn_width']}; it counts two branches of one width")
    kinds = f.get("block_types", "_block_types", default=None)
    kinds = ["recurrent", "recurrent", "attention"] if kinds is None else kinds
    if not isinstance(kinds, list) or not all(isinstance(kind, str) for kind in kinds):
        raise ValueError(f"block_types is {str(kinds)[:80]!r}; it must be a list of kinds of blocks")
    has_width = f.get("lru_width", default=None) is not None
    rope = whole_rope(f, fraction=0.5)
    return RecurrentGemmaConfig(
        **sizes | {"ffn_width": sizes["ffn_width"] // 2},
        window=f.integer("attention_window_size", "sliding_window"),
        lru_width=f.integer("lru_width") if has_width else sizes["width"],
        gate_blocks=sizes["heads"],
        conv_width=f.integer("conv1d_width"),
        pattern=tuple(KINDS.get(kind, kind) for kind in kinds),
        logit_cap=f.cap("logits_soft_cap"),
        rope_base=rope.base,
        rope_fraction=rope.fraction,
    )


def to_json(config: RecurrentGemmaConfig) -> Json:
    """The config.json that transformers reads, and `from_json`; the window is DeepMind's (see the top of this page)."""
    own = {
        "architectures": ["RecurrentGemmaForCausalLM"],
        "model_type": "recurrent_gemma",
        "attention_window_size": config.window,
        "block_types": list(config.pattern),
        "conv1d_width": config.conv_width,
        "logits_soft_cap": config.logit_cap,
        "lru_width": config.lru_width,
    }
    rope = gemma.rope_to_json(config.rope_base, partial_rotary_factor=config.rope_fraction)
    both = {"intermediate_size": 2 * config.ffn_width}
    return own | gemma.sizes_to_json(config) | both | {"rope_parameters": rope}


FAMILY = Family(
    name="recurrentgemma",
    title="RecurrentGemma",
    model=RecurrentGemma,
    released=RELEASED,
    hub_ids="recurrentgemma-2b recurrentgemma-2b-it recurrentgemma-9b recurrentgemma-9b-it",
    tensors=TENSORS,
    layer_tensors=layer_tensors,
    model_types=("recurrent_gemma",),
    json_defaults=JSON_DEFAULTS,
    from_json=from_json,
    to_json=to_json,
)
