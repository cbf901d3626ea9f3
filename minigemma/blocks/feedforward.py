"""The feed-forward block of every Gemma: GeGLU between three matrices (Shazeer 2020, eq. 6; Gemma 1 §2).

    y = W_down ( gelu(W_gate x) · W_up x )

RecurrentGemma adds a bias to each of the three.
"""

from __future__ import annotations

from dataclasses import dataclass

from ..arrays import F32
from ..formulas.geglu import gated_gelu
from ..formulas.linear import affine, linears, plus
from ..layouts.weight import Weight
from ..taps import Scope


@dataclass(frozen=True)
class FeedForwardWeights:
    """The matrices of one layer's feed-forward block."""

    gate: Weight  # [F, D]
    up: Weight  # [F, D]
    down: Weight  # [D, F]
    gate_bias: F32 | None = None  # [F]
    up_bias: F32 | None = None  # [F]
    down_bias: F32 | None = None  # [D]


def feed_forward(x: F32, w: FeedForwardWeights, taps: Scope) -> F32:
    """x [T, D] → [T, D] float32."""
    gate, up = linears(x, w.gate, w.up)
    hidden = taps("ffn.hidden", gated_gelu(plus(gate, w.gate_bias), plus(up, w.up_bias)))
    return taps("ffn.out", affine(hidden, w.down, w.down_bias))
