"""The feed-forward block of one to sixteen tokens in one parallel region: blocks/feedforward.py, fused.

Two steps that threads share: W_gate and W_up together, then W_down (fused_attention.py says why).
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from ..arrays import F32
from .compiler import jit, jit_inner
from .fused_steps import Team, add_branch, gated, last_product, normed, plus_bias, product
from .parallel import new_counters, parallel_for
from .weights import KernelWeight

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


class Room(NamedTuple):
    """What threads compute together."""

    counters: NDArray[np.int64]
    gate: F32  # [T, F]
    up: F32  # [T, F]
    y: F32  # [T, D]


@jit_inner
def _thread(worker, workers, x, w, eps, room):
    team = Team(room.counters, worker, workers)
    h = normed(x, w.pre_norm, eps)
    product(team, 0, h, (w.gate, w.up, w.up), (room.gate, room.up, room.up[:0]), w.down)
    hidden = gated(plus_bias(room.gate, w.gate_bias), plus_bias(room.up, w.up_bias))
    last_product(team, 1, hidden, w.down, room.y)


@jit
def fused_feed_forward(workers, x, w, width, eps, out):
    """out = the residual after the block, x [T, D] before it; `width` is F."""
    gates, ups = np.empty((len(x), width), np.float32), np.empty((len(x), width), np.float32)
    room = Room(new_counters(STEPS, workers), gates, ups, np.empty(x.shape, np.float32))
    parallel_for(_thread, workers, (x, w, eps, room))
    add_branch(x, room.y, w.down_bias, w.post_norm, eps, out)
