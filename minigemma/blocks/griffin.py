"""The recurrent block of Griffin (De et al. 2024, §2.3, Figure 2): two branches, one of which has a memory.

    x̂ = RMSNorm(x)
    u = gelu(W_y x̂ + b_y)                                    the gate of the memory's output
    z = RG-LRU( conv1d( W_x x̂ + b_x ) )                      the memory
    y = x + W_out (z · u) + b_out

Its state has the same size after a million tokens as after ten: h, and the last three inputs of the convolution.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from ..arrays import F32, U16
from ..cache import RecurrentState, TokenPositions
from ..formulas.conv1d import causal_conv1d
from ..formulas.geglu import gated_gelu
from ..formulas.linear import affine, linear, linears, plus
from ..formulas.rglru import block_diagonal, decay_and_input, linear_scan, rg_lru
from ..formulas.rmsnorm import rms_norm
from ..layouts.weight import Weight
from ..taps import Scope


@dataclass(frozen=True, eq=False, kw_only=True)
class RecurrentWeights:
    """The weights of one recurrent block; E is `lru_width`, and the gates have M blocks of I = E / M channels."""

    pre_norm: F32  # [D]
    y: Weight  # [E, D]
    y_bias: F32  # [E]
    x: Weight  # [E, D]
    x_bias: F32  # [E]
    out: Weight  # [D, E]
    out_bias: F32  # [D]
    conv: F32  # [4, E], the current token's row last
    conv_bias: F32  # [E]
    recurrence_gate: F32 | U16  # [M, I, I]: block, input, output
    recurrence_bias: F32  # [M, I]
    input_gate: F32 | U16  # [M, I, I]
    input_bias: F32  # [M, I]
    decay: F32  # [E], softplus(Λ)


def recurrent_block(
    x: F32, w: RecurrentWeights, eps: float, state: RecurrentState, tokens: TokenPositions, taps: Scope
) -> F32:
    """y = x + W_out (RG-LRU(conv1d(W_x h)) · gelu(W_y h)), h = norm(x), with biases      [De et al. 2024 §2.3, Fig. 2]

    x [T, D] float32, the residual of `tokens` → [T, D] float32, or the last `tokens.outputs` rows of it

    `state` holds its new value until the cache commits it.
    """
    h, start = rms_norm(x, w.pre_norm, eps), tokens.first == 0
    u, z = linears(h, w.y, w.x) if tokens.outputs == len(x) else (linear(tokens.last(h), w.y), linear(h, w.x))
    u, z = plus(u, w.y_bias), taps("recurrent.x", plus(z, w.x_bias))
    tail, before = state.read()
    conv = taps("recurrent.conv", causal_conv1d(z, w.conv, w.conv_bias, tail))
    recurrence = taps("recurrent.recurrence_gate", block_diagonal(conv, w.recurrence_gate, w.recurrence_bias))
    entering = taps("recurrent.input_gate", block_diagonal(conv, w.input_gate, w.input_bias))
    if taps.wants("recurrent.decay"):  # a value that the kernel never forms
        decay, gated = decay_and_input(conv, recurrence, entering, w.decay, start)
        hs = linear_scan(gated, taps("recurrent.decay", decay), before)
    else:
        hs = rg_lru(conv, recurrence, entering, w.decay, before, start)
    hs = taps("recurrent.state", hs)
    state.propose(np.concatenate([tail, z])[-len(tail) :], hs[-1])
    y = taps("recurrent.out", affine(gated_gelu(u, tokens.last(hs)), w.out, w.out_bias))
    return taps("residual.middle", tokens.last(x) + y)
