"""The feed-forward block of every Gemma: GeGLU between three matrices (Shazeer 2020, eq. 6; Gemma 1 §2).

y = W_down ( gelu(W_gate x) · W_up x )
"""

from __future__ import annotations

from dataclasses import dataclass

from .arrays import F32
from .geglu import gated_gelu
from .linear import Weight, linear
from .taps import Scope


@dataclass(frozen=True)
class FeedForwardWeights:
    """The matrices of one layer's feed-forward block."""

    gate: Weight  # [F, D]
    up: Weight  # [F, D]
    down: Weight  # [D, F]


def feed_forward(x: F32, w: FeedForwardWeights, taps: Scope) -> F32:
    """x [T, D] → [T, D] float32."""
    hidden = taps("ffn.hidden", gated_gelu(linear(x, w.gate), linear(x, w.up)))
    return taps("ffn.out", linear(hidden, w.down))
