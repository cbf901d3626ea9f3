"""The sizes of every released Gemma as frozen dataclasses, in the order of the reports' tables.

Gemma 1: Gemma Team 2024a, Tables 1-2. Gemma 2: Gemma Team 2024b, Tables 1-3. Gemma 3: Gemma Team 2025, Tables 1-2.
RecurrentGemma: Botev et al. 2024, Table 1. The reports print the feed-forward width of both GeGLU branches together;
`ffn_width` is that of one.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass, fields
from math import isqrt
from typing import Any


@dataclass(frozen=True, kw_only=True)
class AttentionConfig:
    """What one layer's attention is. Local and global layers differ in these numbers and in nothing else."""

    window: int | None  # W: keys a query sees, itself included; None: all earlier ones
    rope_base: float  # θ
    rope_scale: float = 1.0  # positions are divided by it
    rope_fraction: float = 1.0  # of each head, from its beginning, is turned
    query_scale: float  # scores are multiplied by it
    soft_cap: float | None = None


@dataclass(frozen=True, kw_only=True)
class VisionConfig:
    """The image encoder of Gemma 3 4B, 12B and 27B, the same in all three: SigLIP So400m/14 at 896 pixels (§2.1)."""

    width: int = 1152  # C
    layers: int = 27
    heads: int = 16
    ffn_width: int = 4304
    side: int = 896  # pixels of an image, in both directions
    patch: int = 14  # pixels of a patch, in both directions
    eps: float = 1e-6
    tokens: int = 256  # that an image becomes, after pooling
    image_token: int = 262_144  # the id that marks the place of one of them
    start_token: int = 255_999  # <start_of_image>, before them
    end_token: int = 256_000  # <end_of_image>, after them

    def __post_init__(self) -> None:
        """Refuse sizes that cannot be."""
        for field in fields(self):
            if not 0 < getattr(self, field.name) < 1 << 31:
                raise ValueError(f"{field.name} of the vision tower is {getattr(self, field.name)}; it must be above 0")
        if self.width % self.heads:
            raise ValueError(f"the vision tower's width {self.width} does not divide among {self.heads} heads")
        if self.side % self.patch:
            raise ValueError(f"{self.side} pixels do not divide into patches of {self.patch}")
        if self.pooled**2 != self.tokens or self.grid % self.pooled:
            raise ValueError(f"{self.grid} x {self.grid} patches cannot be pooled to {self.tokens} tokens")
        if self.layers > 1000:
            raise ValueError(f"{self.layers} layers of the vision tower; Gemma 3's has 27")

    @property
    def grid(self) -> int:
        """Patches in a row, and rows of them: 64."""
        return self.side // self.patch

    @property
    def pooled(self) -> int:
        """Tokens in a row after pooling, and rows of them: 16."""
        return isqrt(self.tokens)

    @property
    def parameters(self) -> int:
        """Of the tower alone, without the projection to the text model."""
        C, F = self.width, self.ffn_width
        block = 4 * (C * C + C) + 2 * C * F + F + C + 4 * C
        return self.grid**2 * C + 3 * self.patch**2 * C + C + self.layers * block + 2 * C


@dataclass(frozen=True, kw_only=True)
class TextConfig(ABC):
    """What all generations have."""

    name: str = ""
    width: int  # D
    layers: int
    heads: int  # N
    kv_heads: int  # K
    head_dim: int  # H
    ffn_width: int  # F, of one branch
    vocab: int  # V: rows of the embedding
    context: int  # longest sequence it was made for, in tokens
    eps: float = 1e-6
    rope_base: float = 10_000.0
    query_pre_attn_scalar: float | None = None  # scores are divided by its root; None: by the root of H
    logit_cap: float | None = None

    family = "gemma"
    norms_per_block = 2
    head_norms = 0  # norms over a head: q and k in Gemma 3

    def __post_init__(self) -> None:
        """Refuse sizes that cannot be."""
        for field in fields(self):
            value = getattr(self, field.name)
            if isinstance(value, (int, float)) and not isinstance(value, bool) and not 0 < value < 1 << 31:
                raise ValueError(f"{field.name} is {value}; it must be a number above 0")
        if self.heads % self.kv_heads:
            raise ValueError(f"{self.heads} query heads cannot share {self.kv_heads} key/value heads evenly")
        if self.head_dim % 2:
            raise ValueError(f"head_dim is {self.head_dim}; rope turns pairs, so it must be even")
        if self.layers > 1000:
            raise ValueError(f"{self.layers} layers; no Gemma has more than 62")

    @property
    def query_scale(self) -> float:
        """What scores are multiplied by: query_pre_attn_scalar^-1/2, which is H^-1/2 in most sizes."""
        return float(self.query_pre_attn_scalar or self.head_dim) ** -0.5

    @abstractmethod
    def attention(self, layer: int) -> AttentionConfig:
        """The attention of layer `layer`, counted from 0."""

    def kind(self, layer: int) -> str:
        """ "local" or "global" attention, or "recurrent"."""
        return "local" if self.attention(layer).window else "global"

    @property
    def embedding_parameters(self) -> int:
        """V · D; the head is tied to it."""
        return self.vocab * self.width

    @property
    def non_embedding_parameters(self) -> int:
        """Everything else that the text model has."""
        D, H = self.width, self.head_dim
        attention = 2 * self.heads * H * D + 2 * self.kv_heads * H * D + self.head_norms * H
        return self.layers * (attention + 3 * D * self.ffn_width + self.norms_per_block * D) + D

    def cache_bytes(self, tokens: int, bytes_per_value: int = 2) -> int:
        """Keys and values of `tokens` tokens, local layers keeping only their window."""
        kept = sum(min(tokens, self.attention(i).window or tokens) for i in range(self.layers))
        return kept * 2 * self.kv_heads * self.head_dim * bytes_per_value


@dataclass(frozen=True, kw_only=True)
class GemmaConfig(TextConfig):
    """Gemma 1: every layer global."""

    context: int = 8192

    def attention(self, layer: int) -> AttentionConfig:
        """Every layer sees every earlier token."""
        return AttentionConfig(window=None, rope_base=self.rope_base, query_scale=self.query_scale)


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
        return AttentionConfig(
            window=self.window if layer % 2 == 0 else None,
            rope_base=self.rope_base,
            query_scale=self.query_scale,
            soft_cap=self.attention_cap,
        )


@dataclass(frozen=True, kw_only=True)
class Gemma3Config(TextConfig):
    """Gemma 3's text model: five local layers to a global one, norms on queries and keys."""

    context: int = 131_072
    window: int = 1024  # W
    rope_base: float = 1_000_000.0  # of global layers
    rope_base_local: float = 10_000.0
    rope_scale: float = 1.0  # of global layers: 8 in 4B, 12B and 27B
    pattern: int = 6  # every so many layers one is global
    vision: VisionConfig | None = None  # 270M and 1B have none

    family = "gemma3"
    norms_per_block = 4
    head_norms = 2

    def attention(self, layer: int) -> AttentionConfig:
        """Five local layers, then a global one, beginning with a local one (Gemma 3 §2)."""
        if layer % self.pattern == self.pattern - 1:
            return AttentionConfig(
                window=None, rope_base=self.rope_base, rope_scale=self.rope_scale, query_scale=self.query_scale
            )
        return AttentionConfig(window=self.window, rope_base=self.rope_base_local, query_scale=self.query_scale)


@dataclass(frozen=True, kw_only=True)
class RecurrentGemmaConfig(TextConfig):
    """RecurrentGemma: two recurrent blocks to one of local attention (Botev et al. 2024, Table 1)."""

    context: int = 1 << 20  # nothing grows with it; it was trained on sequences of 8,192
    window: int = 2048  # W: earlier tokens that one sees beside itself
    lru_width: int  # E
    gate_blocks: int  # M: blocks of the RG-LRU's gates
    conv_width: int = 4
    rope_fraction: float = 0.5
    pattern: tuple[str, ...] = ("recurrent", "recurrent", "attention")
    logit_cap: float | None = 30.0

    family = "recurrentgemma"
    norms_per_block = 2

    def __post_init__(self) -> None:
        """Refuse sizes that cannot be."""
        super().__post_init__()
        if self.lru_width % self.gate_blocks:
            raise ValueError(f"lru_width {self.lru_width} does not divide into {self.gate_blocks} blocks of gates")
        if self.conv_width < 2:
            raise ValueError(
                f"conv_width is {self.conv_width}; the convolution sees the current token and one more at least"
            )
        rotated = self.head_dim * self.rope_fraction
        if rotated > self.head_dim or rotated % 2:
            raise ValueError(
                f"rope turns {rotated:g} of {self.head_dim} numbers of a head; it must be an even part of them"
            )
        if not self.pattern or set(self.pattern) - {"recurrent", "attention"}:
            raise ValueError(f"block types are {list(self.pattern)}; each must be 'recurrent' or 'attention'")

    def is_attention(self, layer: int) -> bool:
        """Every third layer; the others are recurrent, and the pattern may end anywhere (De et al. 2024 §3)."""
        return self.pattern[layer % len(self.pattern)] == "attention"

    def attention(self, layer: int) -> AttentionConfig:
        """Local: the window's W earlier tokens and itself, as DeepMind's code has it."""
        return AttentionConfig(
            window=self.window + 1,
            rope_base=self.rope_base,
            rope_fraction=self.rope_fraction,
            query_scale=self.query_scale,
        )

    def kind(self, layer: int) -> str:
        """ "local" attention, or "recurrent"."""
        return "local" if self.is_attention(layer) else "recurrent"

    @property
    def non_embedding_parameters(self) -> int:
        """With the biases of every linear map but q, k and v."""
        D, E, F, size = self.width, self.lru_width, self.ffn_width, self.lru_width // self.gate_blocks
        attention = 2 * self.heads * self.head_dim * D + D + 2 * self.kv_heads * self.head_dim * D
        gates = 2 * (self.gate_blocks * size * size + E) + E
        recurrent = 2 * (D * E + E) + E * D + D + self.conv_width * E + E + gates
        shared = 3 * D * F + 2 * F + D + self.norms_per_block * D
        kinds = [attention if self.is_attention(i) else recurrent for i in range(self.layers)]
        return sum(kinds) + self.layers * shared + D

    def cache_bytes(self, tokens: int, bytes_per_value: int = 2) -> int:
        """Keys and values of at most W + 1 tokens; h and the convolution's tail, float32, of each recurrent layer."""
        attention = sum(self.is_attention(i) for i in range(self.layers))
        keys = attention * min(tokens, self.window + 1) * 2 * self.kv_heads * self.head_dim * bytes_per_value
        return keys + (self.layers - attention) * self.conv_width * self.lru_width * 4


def _gemma(name: str, D: int, layers: int, N: int, K: int, F: int) -> GemmaConfig:
    return GemmaConfig(name=name, width=D, layers=layers, heads=N, kv_heads=K, head_dim=256, ffn_width=F, vocab=256_000)


def _gemma2(name: str, D: int, layers: int, N: int, K: int, H: int, F: int, scalar: int) -> Gemma2Config:
    return Gemma2Config(
        name=name,
        width=D,
        layers=layers,
        heads=N,
        kv_heads=K,
        head_dim=H,
        ffn_width=F,
        vocab=256_000,
        query_pre_attn_scalar=scalar,
    )


def _gemma3(name: str, D: int, layers: int, N: int, K: int, H: int, F: int, scalar: int = 256) -> Gemma3Config:
    small: dict[str, Any] = {"vocab": 262_144, "context": 32_768, "window": 512}
    large: dict[str, Any] = {"vocab": 262_208, "rope_scale": 8.0, "vision": VisionConfig()}
    return Gemma3Config(
        name=name,
        width=D,
        layers=layers,
        heads=N,
        kv_heads=K,
        head_dim=H,
        ffn_width=F,
        query_pre_attn_scalar=scalar,
        **(large if D >= 2560 else small),
    )


def _recurrentgemma(name: str, D: int, layers: int, N: int, F: int) -> RecurrentGemmaConfig:
    return RecurrentGemmaConfig(
        name=name,
        width=D,
        layers=layers,
        heads=N,
        kv_heads=1,
        head_dim=256,
        ffn_width=F,
        vocab=256_000,
        lru_width=D,
        gate_blocks=N,
    )


RELEASED: dict[str, TextConfig] = {
    config.name: config
    for config in (
        _gemma("gemma-2b", 2048, 18, 8, 1, 16384),
        _gemma("gemma-7b", 3072, 28, 16, 16, 24576),
        _gemma2("gemma-2-2b", 2304, 26, 8, 4, 256, 9216, 256),
        _gemma2("gemma-2-9b", 3584, 42, 16, 8, 256, 14336, 256),
        _gemma2("gemma-2-27b", 4608, 46, 32, 16, 128, 36864, 144),  # 144 = D / N, not H
        _gemma3("gemma-3-270m", 640, 18, 4, 1, 256, 2048),
        _gemma3("gemma-3-1b", 1152, 26, 4, 1, 256, 6912),
        _gemma3("gemma-3-4b", 2560, 34, 8, 4, 256, 10240),
        _gemma3("gemma-3-12b", 3840, 48, 16, 8, 256, 15360),
        _gemma3("gemma-3-27b", 5376, 62, 32, 16, 128, 21504, 168),  # 168 = D / N, not H
        _recurrentgemma("recurrentgemma-2b", 2560, 26, 10, 7680),
        _recurrentgemma("recurrentgemma-9b", 4096, 38, 16, 12288),
    )
}
