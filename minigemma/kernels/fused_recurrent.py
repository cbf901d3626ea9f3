"""The recurrent block of one to sixteen tokens in one parallel region: blocks/griffin.py, fused.

Three steps that threads share: W_y and W_x; the recurrence, in parts of a block of its gates; W_out (fused_attention.py
says why).
"""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from ..arrays import F32
from .compiler import jit, jit_inner
from .fused_steps import Team, add_branch, gated, last_product, normed, plus_bias, product, wait
from .parallel import PIECES, chunk, new_counters, next_task, parallel_for
from .rows import conv_row
from .scan import block_row, token_row
from .simd import LANES
from .weights import KernelWeight

STEPS = 3


class RecurrentArrays(NamedTuple):
    """The weights of a recurrent block."""

    pre_norm: F32  # [D]
    y: KernelWeight
    x: KernelWeight
    out: KernelWeight
    y_bias: F32  # [E]
    x_bias: F32  # [E]
    out_bias: F32  # [D]
    conv: F32  # [C, E]
    conv_bias: F32  # [E]
    recurrence_gate: NDArray[Any]  # [M · I · I] float32, or bf16 as uint16
    recurrence_bias: F32  # [M, I]
    input_gate: NDArray[Any]  # [M · I · I]
    input_bias: F32  # [M, I]
    decay: F32  # [E]


class State(NamedTuple):
    """The state before the tokens, and room for the one after them."""

    tail: F32  # [C - 1, E]
    h: F32  # [E]
    start: bool  # the first token has position 0
    after: F32  # [C, E]: the tail, then h


class Room(NamedTuple):
    """What threads compute together."""

    y: F32  # [T, E]
    x: F32  # [T, E]
    h: F32  # [T, E]
    out: F32  # [rows of the output, D]


@jit_inner
def _convolved(seen, w, T):
    """The convolution of the last T rows of seen [C - 1 + T, E]."""
    z = np.empty((T, seen.shape[1]), np.float32)
    for t in range(T):
        conv_row(seen, t, w.conv, w.conv_bias, z[t])
    return z


@jit_inner
def _with_tail(tail, x):
    """The tail [C - 1, E] and x [T, E] behind it."""
    seen = np.empty((len(tail) + len(x), x.shape[1]), np.float32)
    for c in range(len(seen)):
        for e in range(x.shape[1]):
            seen[c, e] = tail[c, e] if c < len(tail) else x[c - len(tail), e]
    return seen


@jit_inner
def _scan_channels(z, seen, w, state, m, first, last, hs, gates):
    """Channels `first` … `last` - 1, of block m of the gates: every h, and the state after the tokens."""
    size, tail, T = w.input_bias.shape[1], len(state.tail), len(z)
    begin, end = first - m * size, last - m * size
    for t in range(T):
        block_row(z[t], w.recurrence_gate, w.recurrence_bias, m, begin, end, gates[0])
        block_row(z[t], w.input_gate, w.input_bias, m, begin, end, gates[1])
        before = hs[t - 1] if t else state.h
        start, channels = state.start and t == 0, range(first, last, LANES)
        token_row(z[t], gates[0], gates[1], w.decay, before, start, channels, hs[t])
    for e in range(first, last):
        for c in range(tail):
            state.after[c, e] = seen[T + c, e]
        state.after[tail, e] = hs[T - 1, e]


@jit_inner
def _scan(team, z, seen, w, state, hs):
    """The recurrence step, a task per part of a block of the gates."""
    M, size = w.input_bias.shape
    gates = np.empty((2, z.shape[1]), np.float32)
    parts = min(size // LANES, (PIECES * team.workers // 2 + M - 1) // M)  # few: rows of a block are best read whole
    tasks, done = M * parts, 0
    task = next_task(team.counters, 1, team.worker, team.workers, tasks)
    while task >= 0:
        m, vectors = task // parts, chunk(task % parts, parts, size // LANES)
        first, last = m * size + vectors.start * LANES, m * size + vectors.stop * LANES
        _scan_channels(z, seen, w, state, m, first, last, hs, gates)
        done += 1
        task = next_task(team.counters, 1, team.worker, team.workers, tasks)
    wait(team, 1, done, tasks, w.out.data)


@jit_inner
def _thread(worker, workers, counters, x, w, eps, state, room):
    team, rows = Team(counters, worker, workers), len(room.out)
    h = normed(x, w.pre_norm, eps)
    product(team, 0, h, (w.y, w.x, w.x), (room.y, room.x, room.x[:0]), w.out)
    seen = _with_tail(state.tail, plus_bias(room.x, w.x_bias))
    _scan(team, _convolved(seen, w, len(x)), seen, w, state, room.h)
    mixed = gated(plus_bias(room.y[len(x) - rows :], w.y_bias), room.h[len(x) - rows :])
    last_product(team, 2, mixed, w.out, room.out)


@jit
def fused_recurrent(workers, x, w, eps, state, out):
    """out = the residual after the block, x [T, D] before it, the last rows if out has fewer; and `state.after`."""
    shape = len(x), w.decay.size
    ys, xs, hs = np.empty(shape, np.float32), np.empty(shape, np.float32), np.empty(shape, np.float32)
    room = Room(ys, xs, hs, np.empty(out.shape, np.float32))
    parallel_for(_thread, workers, (new_counters(STEPS, workers), x, w, eps, state, room))
    add_branch(x, room.out, w.out_bias, w.decay[:0], eps, out)
