"""The feed-forward block of every Gemma: GeGLU between three matrices (Shazeer 2020, eq. 6; Gemma 1 §2).

    h = RMSNorm(x)
    y = x + RMSNorm(W_down ( gelu(W_gate h) · W_up h ))      the norm behind W_down ("post-norm"): Gemma 2 and 3

RecurrentGemma adds a bias to each of the three.
"""

from __future__ import annotations

from dataclasses import dataclass

from ..arrays import F32
from ..formulas.geglu import gated_gelu, gated_gelu_gradient
from ..formulas.linear import Gradients, add, affine, linear_backward, linears, plus
from ..formulas.rmsnorm import rms_norm, rms_norm_gradient
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
    gate, up = taps("ffn.gate", plus(gate, w.gate_bias)), taps("ffn.up", plus(up, w.up_bias))
    hidden = taps("ffn.hidden", gated_gelu(gate, up))
    y = taps("ffn.out", affine(hidden, w.down, w.down_bias))
    return taps("residual.out", x + (y if w.post_norm is None else rms_norm(y, w.post_norm, eps)))


def feed_forward_backward(dy: F32, x: F32, w: FeedForwardWeights, eps: float, kept: Scope, gradients: Gradients) -> F32:
    """dx from dy = ∂L/∂y, line by line back through `feed_forward_block`: dy, x [T, D] float32 → [T, D] float32

    `kept` has what the block named; gradients of the weights are added to `gradients`.
    """
    d = dy
    if w.post_norm is not None:
        d, dnorm = rms_norm_gradient(d, kept["ffn.out"], w.post_norm, eps)
        add(gradients, "ffn.post_norm", dnorm)
    if w.down_bias is not None:
        add(gradients, "ffn.down_bias", d.sum(axis=0))
    d = linear_backward(d, kept["ffn.hidden"], w.down, gradients, "ffn.down")
    dgate, dup = gated_gelu_gradient(d, kept["ffn.gate"], kept["ffn.up"])
    if w.gate_bias is not None and w.up_bias is not None:
        add(gradients, "ffn.gate_bias", dgate.sum(axis=0))
        add(gradients, "ffn.up_bias", dup.sum(axis=0))
    h = rms_norm(x, w.pre_norm, eps)
    dh = linear_backward(dgate, h, w.gate, gradients, "ffn.gate")
    dh += linear_backward(dup, h, w.up, gradients, "ffn.up")
    dx, dnorm = rms_norm_gradient(dh, x, w.pre_norm, eps)
    add(gradients, "ffn.pre_norm", dnorm)
    return dy + dx
