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

from ..arrays import F32, U16, joined
from ..cache import States, TokenPositions, each_sequence
from ..formulas.conv1d import causal_conv1d, causal_conv1d_gradient
from ..formulas.geglu import gated_gelu, gated_gelu_gradient
from ..formulas.linear import Gradients, add, affine, linear, linear_backward, linears, plus
from ..formulas.rglru import (
    block_diagonal,
    block_diagonal_gradient,
    decay_and_input,
    linear_scan,
    rg_lru,
    rg_lru_gradient,
)
from ..formulas.rmsnorm import rms_norm, rms_norm_gradient
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


def recurrent_block(x: F32, w: RecurrentWeights, eps: float, state: States, tokens: TokenPositions, taps: Scope) -> F32:
    """y = x + W_out (RG-LRU(conv1d(W_x h)) · gelu(W_y h)), h = norm(x), with biases      [De et al. 2024 §2.3, Fig. 2]

    x [T, D] float32, the residual of `tokens` → [T, D] float32, or the last `tokens.outputs` rows of it

    `state` holds its new value until the cache commits it. With a tuple of states, token t is the next one of the
    sequence of state t.
    """
    h, each = rms_norm(x, w.pre_norm, eps), each_sequence(state, tokens)
    u, z = linears(h, w.y, w.x) if tokens.outputs == len(x) else (linear(tokens.last(h), w.y), linear(h, w.x))
    u, z = taps("recurrent.gate", plus(u, w.y_bias)), taps("recurrent.x", plus(z, w.x_bias))
    parts = [causal_conv1d(z[at], w.conv, w.conv_bias, own.read()[0]) for at, own, _ in each]
    conv = taps("recurrent.conv", joined(parts))
    recurrence = taps("recurrent.recurrence_gate", block_diagonal(conv, w.recurrence_gate, w.recurrence_bias))
    entering = taps("recurrent.input_gate", block_diagonal(conv, w.input_gate, w.input_bias))
    parts = [
        memory(conv[at], recurrence[at], entering[at], w.decay, own.read()[1], its.first == 0, taps)
        for at, own, its in each
    ]
    hs = taps("recurrent.state", joined(parts))
    for at, own, _ in each:
        own.propose(np.concatenate([own.read()[0], z[at]])[1 - len(w.conv) :], hs[at][-1])
    gated = taps("recurrent.gated", gated_gelu(u, tokens.last(hs)))
    y = taps("recurrent.out", affine(gated, w.out, w.out_bias))
    return taps("residual.middle", tokens.last(x) + y)


def memory(x: F32, recurrence: F32, entering: F32, decay_rate: F32, before: F32, start: bool, taps: Scope) -> F32:
    """The RG-LRU of one sequence, by its decays where a tap wants them: all [T, E] float32 but two of [E] → [T, E]."""
    if taps.wants("recurrent.decay"):  # a value that the kernel never forms
        decay, gated = decay_and_input(x, recurrence, entering, decay_rate, start)
        return linear_scan(gated, taps("recurrent.decay", decay), before)
    return rg_lru(x, recurrence, entering, decay_rate, before, start)


def recurrent_backward(
    dy: F32, x: F32, w: RecurrentWeights, eps: float, tokens: TokenPositions, kept: Scope, gradients: Gradients
) -> F32:
    """dx from dy = ∂L/∂y, line by line back through `recurrent_block`: dy, x [T, D] float32 → [T, D] float32

    `kept` has what the block named for whole sequences; gradients of the weights are added to `gradients`, that of
    softplus(Λ) as "recurrent.decay".
    """
    names = ("gate", "x", "conv", "recurrence_gate", "input_gate", "state", "gated")
    u, z, conv, recurrence, entering, hs, gated = (kept[f"recurrent.{name}"] for name in names)
    add(gradients, "recurrent.out_bias", dy.sum(axis=0))
    du, dhs = gated_gelu_gradient(linear_backward(dy, gated, w.out, gradients, "recurrent.out"), u, hs)
    dconv, drecurrence, dentering = (np.empty_like(conv) for _ in range(3))
    for at, _ in tokens.sequences:
        memory = conv[at], recurrence[at], entering[at], w.decay, np.zeros_like(w.decay), True
        dconv[at], drecurrence[at], dentering[at], ddecay, _ = rg_lru_gradient(dhs[at], *memory)
        add(gradients, "recurrent.decay", ddecay)
    for name, d in (("recurrence", drecurrence), ("input", dentering)):
        gate = getattr(w, f"{name}_gate"), getattr(w, f"{name}_bias")
        dx, dgate, dbias = block_diagonal_gradient(d, conv, *gate)
        dconv += dx
        add(gradients, f"recurrent.{name}_gate", dgate)
        add(gradients, f"recurrent.{name}_bias", dbias)
    dz, nothing = np.empty_like(z), np.zeros_like(z, shape=(len(w.conv) - 1, z.shape[1]))
    for at, _ in tokens.sequences:
        dz[at], dweight, dbias, _ = causal_conv1d_gradient(dconv[at], z[at], w.conv, w.conv_bias, nothing)
        add(gradients, "recurrent.conv", dweight)
        add(gradients, "recurrent.conv_bias", dbias)
    h, dh = rms_norm(x, w.pre_norm, eps), np.zeros_like(x)
    for name, weight, d in (("y", w.y, du), ("x", w.x, dz)):
        dh += linear_backward(d, h, weight, gradients, f"recurrent.{name}")
        add(gradients, f"recurrent.{name}_bias", d.sum(axis=0))
    dx, dnorm = rms_norm_gradient(dh, x, w.pre_norm, eps)
    add(gradients, "recurrent.pre_norm", dnorm)
    return dy + dx
