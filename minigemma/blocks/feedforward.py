"""The feed-forward block of every Gemma: GeGLU between three matrices (Shazeer 2020, eq. 6; Gemma 1 §2).

    h = RMSNorm(x)
    y = x + RMSNorm(W_down ( gelu(W_gate h) · W_up h ))      the norm behind W_down ("post-norm"): Gemma 2 and 3

RecurrentGemma adds a bias to each of the three.
"""

from __future__ import annotations

from dataclasses import dataclass

from ..arrays import F32
from ..formulas.geglu import gated_gelu
from ..formulas.linear import affine, linears, plus
from ..formulas.rmsnorm import rms_norm
from ..layouts.weight import Weight
from ..taps import Scope


@dataclass(frozen=True, eq=False, kw_only=True)
class FeedForwardWeights:
    """The weights of one feed-forward block."""

    pre_norm: F32  # [D]
    gate: Weight  # [F, D]
    up: Weight  # [F, D]
    down: Weight  # [D, F]
    gate_bias: F32 | None = None  # [F], RecurrentGemma's, as the next two
    up_bias: F32 | None = None  # [F]
    down_bias: F32 | None = None  # [D]
    post_norm: F32 | None = None  # [D], Gemma 2's and 3's


def feed_forward_block(x: F32, w: FeedForwardWeights, eps: float, taps: Scope) -> F32:
    """y = x + norm(W_down (gelu(W_gate h) · W_up h)), h = norm(x)      [Shazeer 2020 eq. 6; Gemma 1 §2; Gemma 2 §2]

    x [T, D] float32 → [T, D] float32
    """
    gate, up = linears(rms_norm(x, w.pre_norm, eps), w.gate, w.up)
    hidden = taps("ffn.hidden", gated_gelu(plus(gate, w.gate_bias), plus(up, w.up_bias)))
    y = taps("ffn.out", affine(hidden, w.down, w.down_bias))
    return taps("residual.out", x + (y if w.post_norm is None else rms_norm(y, w.post_norm, eps)))
