"""What every model's config has: the sizes of the text model, of one layer's attention and of the vision tower.

Each paper's own config stands on its page: models/gemma.py, gemma2.py, gemma3.py, …. The reports print
the feed-forward width of both GeGLU branches together; `ffn_width` is that of one.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from dataclasses import dataclass, fields
from importlib import import_module
from math import isqrt
from typing import Any


@dataclass(frozen=True, kw_only=True)
class AttentionConfig:
    """The attention of one layer. Local and global layers differ in these numbers and in nothing else."""

    heads: int  # N
    head_dim: int  # H
    eps: float  # of the norms
    window: int | None  # W: keys a query sees, itself included; None: all earlier ones
    rope_base: float  # θ
    rope_scale: float = 1.0  # positions are divided by it
    rope_fraction: float = 1.0  # of each head, from its beginning, is rotated
    query_scale: float  # scores are multiplied by it
    soft_cap: float | None = None

    @property
    def rotated(self) -> int:
        """R: the width of a head that rope rotates."""
        return int(self.head_dim * self.rope_fraction)


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
    tokens: int = 256  # per image, after pooling
    image_token: int = 262_144  # id of the placeholder of one of them
    start_token: int = 255_999  # <start_of_image>, before them
    end_token: int = 256_000  # <end_of_image>, after them

    def __post_init__(self) -> None:
        """Refuse impossible sizes with ValueError."""
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
        """Parameters of the tower alone, without the projection to the text model."""
        C, F = self.width, self.ffn_width
        block = 4 * (C * C + C) + 2 * C * F + F + C + 4 * C
        return self.grid**2 * C + 3 * self.patch**2 * C + C + self.layers * block + 2 * C


@dataclass(frozen=True, kw_only=True)
class TextConfig(ABC):
    """The sizes that all generations have."""

    name: str = ""
    width: int  # D
    layers: int
    heads: int  # N
    kv_heads: int  # K
    head_dim: int  # H
    ffn_width: int  # F, of one branch
    vocab: int  # V: rows of the embedding
    context: int  # longest sequence of the training, in tokens
    eps: float = 1e-6
    rope_base: float = 10_000.0
    query_pre_attn_scalar: float | None = None  # scores are divided by its root; None: by the root of H
    logit_cap: float | None = None
    vision: VisionConfig | None = None  # the image encoder, of Gemma 3 from 4B up

    family = ""
    norms_per_block = 2
    head_norms = 0  # norms over a head: q and k in Gemma 3

    def __post_init__(self) -> None:
        """Refuse impossible sizes with ValueError."""
        for field in fields(self):
            value = getattr(self, field.name)
            if isinstance(value, (int, float)) and not isinstance(value, bool) and not 0 < value < 1 << 31:
                raise ValueError(f"{field.name} is {value}; it must be a number above 0")
        if self.heads % self.kv_heads:
            raise ValueError(f"{self.heads} query heads cannot share {self.kv_heads} key/value heads evenly")
        if self.head_dim % 2:
            raise ValueError(f"head_dim is {self.head_dim}; rope rotates pairs, so it must be even")
        if self.layers > 1000:
            raise ValueError(f"{self.layers} layers; no Gemma has more than 62")

    @property
    def query_scale(self) -> float:
        """The factor of the scores: query_pre_attn_scalar^-1/2, which is H^-1/2 in most sizes."""
        return float(self.query_pre_attn_scalar or self.head_dim) ** -0.5

    def attention_config(self, **own: Any) -> AttentionConfig:
        """The attention of a layer: what all layers share, and its own window, rope and cap."""
        shared: dict[str, Any] = {"heads": self.heads, "head_dim": self.head_dim, "eps": self.eps}
        return AttentionConfig(query_scale=self.query_scale, **shared, **own)

    @abstractmethod
    def attention(self, layer: int) -> AttentionConfig:
        """The attention of layer `layer`, counted from 0."""

    def kind(self, layer: int) -> str:
        """ "local" or "global" attention, or "recurrent"."""
        return "local" if self.attention(layer).window else "global"

    @property
    def axes(self) -> dict[str, int]:
        """The sizes that the letters in the page's table of tensors stand for."""
        found = {"V": self.vocab, "D": self.width, "F": self.ffn_width, "H": self.head_dim, "1": 1}
        return found | {"NH": self.heads * self.head_dim, "KH": self.kv_heads * self.head_dim}

    @property
    def embedding_parameters(self) -> int:
        """V · D; the head is tied to it."""
        return self.vocab * self.width

    @property
    def non_embedding_parameters(self) -> int:
        """All other parameters of the text model."""
        D, H = self.width, self.head_dim
        attention = 2 * self.heads * H * D + 2 * self.kv_heads * H * D + self.head_norms * H
        return self.layers * (attention + 3 * D * self.ffn_width + self.norms_per_block * D) + D

    def cache_bytes(self, tokens: int, bytes_per_value: int = 2) -> int:
        """Bytes of the keys and values of `tokens` tokens, where local layers keep only their window."""
        kept = sum(min(tokens, self.attention(i).window or tokens) for i in range(self.layers))
        return kept * 2 * self.kv_heads * self.head_dim * bytes_per_value


def released(
    kind: Callable[..., Any], columns: str, rows: Mapping[str, tuple[int, ...]], **shared: Any
) -> tuple[Any, ...]:
    """The configs of a report's table: a row per model name, a column per field, and what all rows share."""
    names = columns.split()
    return tuple(kind(name=name, **dict(zip(names, row, strict=True)), **shared) for name, row in rows.items())


PAGES = {"GemmaConfig": "gemma", "Gemma2Config": "gemma2", "Gemma3Config": "gemma3"}
PAGES |= {"RecurrentGemmaConfig": "recurrentgemma", "RELEASED": "registry"}


def __getattr__(name: str) -> Any:
    """The configs that stand on the models' pages, imported when used, so that older imports from here still work."""
    if name not in PAGES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"minigemma.models.{PAGES[name]}"), name)
