"""The feed-forward block of one to sixteen tokens as two steps of a fused layer: blocks/feedforward.py.

W_gate and W_up together, then W_down (fused_attention.py says why layers are fused).
"""

from typing import NamedTuple

import numpy as np

from ..arrays import F32
from .compiler import jit_inner
from .fused_steps import gated, normed, plus_bias, product, residual
from .weights import KernelWeight, received

STEPS = 2


class FeedForwardArrays(NamedTuple):
    """The weights of a feed-forward block; an empty array where a model has no such norm or bias."""

    pre_norm: F32  # [D]
    gate: KernelWeight
    up: KernelWeight
    down: KernelWeight
    gate_bias: F32  # [F]
    up_bias: F32  # [F]
    down_bias: F32  # [D]
    post_norm: F32  # [D]


class FeedForwardRoom(NamedTuple):
    """What threads compute together; of several layers all arrays have one axis more."""

    gate: F32  # [T, F]
    up: F32  # [T, F]
    y: F32  # [T, D]


@jit_inner
def receive(arrays, width, hidden):
    """FeedForwardArrays from a plain tuple of its arrays; `width` is D and `hidden` F."""
    pre_norm, gate, up, down, gate_bias, up_bias, down_bias, post_norm = arrays
    gate, up, down = received(gate, hidden, width), received(up, hidden, width), received(down, width, hidden)
    return FeedForwardArrays(pre_norm, gate, up, down, gate_bias, up_bias, down_bias, post_norm)


@jit_inner
def new_rooms(layers, rows, width, hidden):
    """Room for `rows` tokens in several layers."""
    gate, up = np.empty((layers, rows, hidden), np.float32), np.empty((layers, rows, hidden), np.float32)
    return FeedForwardRoom(gate, up, np.empty((layers, rows, width), np.float32))


@jit_inner
def room_at(rooms, i):
    """The room of layer i."""
    return FeedForwardRoom(rooms.gate[i], rooms.up[i], rooms.y[i])


@jit_inner
def run_steps(team, step, x, w, eps, room, following):
    """x + norm(W_down (gelu(W_gate h) · W_up h)), h = norm(x): two steps. `following` is the weight read next."""
    h, nothing = normed(x, w.pre_norm, eps), room.y[:0]
    product(team, step, h, (w.gate, w.up, w.up), (room.gate, room.up, room.up[:0]), w.down)
    hidden = gated(plus_bias(room.gate, w.gate_bias), plus_bias(room.up, w.up_bias))
    product(team, step + 1, hidden, (w.down, w.down, w.down), (room.y, nothing, nothing), following)
    return residual(x, room.y, w.down_bias, w.post_norm, eps, len(x))
