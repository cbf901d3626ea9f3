"""The recurrent block of Griffin (De et al. 2024, §2.3, Figure 2): two branches, one of which remembers.

    y = gelu(W_y x + b_y)                                    what lets the memory through
    z = RG-LRU( conv1d( W_x x + b_x ) )                      the memory
    out = W_out (z · y) + b_out

Its state is the same size after a million tokens as after ten: h, and the last three inputs of the convolution.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from ..arrays import F32, U16
from ..cache import RecurrentState, TokenPositions
from ..formulas.conv1d import causal_conv1d
from ..formulas.geglu import gated_gelu
from ..formulas.linear import affine, linear, linears, plus
from ..formulas.rglru import block_diagonal, decay_and_input, rg_lru
from ..layouts.weight import Weight
from ..taps import Scope


@dataclass(frozen=True)
class RecurrentWeights:
    """The weights of one recurrent block; E is `lru_width`, and the gates have M blocks of I = E / M channels."""

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


def recurrent_block(x: F32, w: RecurrentWeights, state: RecurrentState, places: TokenPositions, taps: Scope) -> F32:
    """x [T, D], tokens that stand at `places`, → [T, D] float32, or fewer rows where only the last ones are asked for.

    `state` is told what it will be, no more.
    """
    start, asking = places.first == 0, places.asked(x)
    y, z = linears(x, w.y, w.x) if len(asking) == len(x) else (linear(asking, w.y), linear(x, w.x))
    through, z = plus(y, w.y_bias), taps("recurrent.x", plus(z, w.x_bias))
    tail, before = state.read()
    conv = taps("recurrent.conv", causal_conv1d(z, w.conv, w.conv_bias, tail))
    recurrence = taps("recurrent.recurrence_gate", block_diagonal(conv, w.recurrence_gate, w.recurrence_bias))
    entering = taps("recurrent.input_gate", block_diagonal(conv, w.input_gate, w.input_bias))
    if taps.wants("recurrent.decay"):
        taps("recurrent.decay", decay_and_input(conv, recurrence, entering, w.decay, start)[0])
    h = taps("recurrent.state", rg_lru(conv, recurrence, entering, w.decay, before, start))
    state.propose(np.concatenate([tail, z])[-len(tail) :], h[-1])
    return taps("recurrent.out", affine(gated_gelu(through, places.asked(h)), w.out, w.out_bias))
