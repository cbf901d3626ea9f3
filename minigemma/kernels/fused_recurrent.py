"""A recurrent layer in one parallel region: `recurrent_layer` of blocks/layers.py, fused, for one to sixteen tokens of
one sequence, or the next token of each of several.

Threads share five steps: W_y and W_x; the recurrence, in parts of a block of its gates; W_out; and the two of the
feed-forward block (fused_attention.py says why).
"""

from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from ..arrays import F32
from . import fused_feedforward as feed_forward
from .compiler import jit, jit_inner
from .fused_steps import Team, gated, hand_over, normed, plus_bias, product, residual, wait
from .parallel import TASKS_PER_THREAD, chunk, new_counters, next_task, parallel_for
from .rows import conv_row
from .scan import block_row, token_row
from .simd.cpu import LANES
from .weights import KernelWeight, received

STEPS = 3  # and those of the feed-forward block


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
    """The state of each sequence before its tokens, and room for the one after them."""

    tail: F32  # [B, C - 1, E]
    h: F32  # [B, E]
    start: NDArray[np.bool_]  # [B]: the first token has position 0
    after: F32  # [B, C, E]: the tail, then h


class LayerArrays(NamedTuple):
    """The weights of both blocks."""

    recurrent: RecurrentArrays
    ffn: feed_forward.FeedForwardArrays


class Room(NamedTuple):
    """What threads compute together."""

    counters: NDArray[np.int64]
    y: F32  # [T, E]
    x: F32  # [T, E]
    h: F32  # [T, E]
    out: F32  # [rows of the output, D]
    ffn: feed_forward.FeedForwardRoom


class Convolved(NamedTuple):
    """Input and output of the convolution."""

    seen: F32  # [B, C - 1 + T / B, E], the tail of each sequence first
    z: F32  # [T, E]


@jit_inner
def _convolved(tail, x, w):
    """The convolution of x [T, E] behind the tails [B, C - 1, E]."""
    (B, before, E), T = tail.shape, len(x)
    each = T // B  # tokens of a sequence
    seen, z = np.empty((B, before + each, E), np.float32), np.empty(x.shape, np.float32)
    for b in range(B):
        for c in range(before + each):
            for e in range(E):
                seen[b, c, e] = tail[b, c, e] if c < before else x[b * each + c - before, e]
        for t in range(each):
            conv_row(seen[b], t, w.conv, w.conv_bias, z[b * each + t])
    return Convolved(seen, z)


@jit_inner
def _scan_channels(convolved, w, state, m, first, last, hs, gates):
    """Channels `first` … `last` - 1, of block m of the gates: every h, and the states after the tokens."""
    (seen, z), size, (B, tail, _) = convolved, w.input_bias.shape[1], state.tail.shape
    begin, end, each, channels = first - m * size, last - m * size, len(z) // B, range(first, last, LANES)
    for t in range(len(z)):
        block_row(z[t], w.recurrence_gate, w.recurrence_bias, m, begin, end, gates[0])
        block_row(z[t], w.input_gate, w.input_bias, m, begin, end, gates[1])
        b, later = t // each, t % each > 0
        before = hs[t - 1] if later else state.h[b]
        token_row(z[t], gates[0], gates[1], w.decay, before, state.start[b] and not later, channels, hs[t])
    for b in range(B):
        for e in range(first, last):
            for c in range(tail):
                state.after[b, c, e] = seen[b, each + c, e]
            state.after[b, tail, e] = hs[(b + 1) * each - 1, e]


@jit_inner
def _scan(team, convolved, w, state, hs):
    """The recurrence step, a task per part of a block of the gates."""
    M, size = w.input_bias.shape
    gates = np.empty((2, hs.shape[1]), np.float32)
    wanted = TASKS_PER_THREAD * team.workers // 2  # few: long reads are faster
    parts = min(size // LANES, (wanted + M - 1) // M)
    tasks, done = M * parts, 0
    task = next_task(team.counters, 1, team.worker, team.workers, tasks)
    while task >= 0:
        m, vectors = task // parts, chunk(task % parts, parts, size // LANES)
        first, last = m * size + vectors.start * LANES, m * size + vectors.stop * LANES
        _scan_channels(convolved, w, state, m, first, last, hs, gates)
        done += 1
        task = next_task(team.counters, 1, team.worker, team.workers, tasks)
    wait(team, 1, done, tasks, w.out.data)


@jit_inner
def _thread(worker, workers, x, layer, eps, state, room, out):
    team, w, rows, nothing = Team(room.counters, worker, workers), layer.recurrent, len(room.out), room.out[:0]
    product(team, 0, normed(x, w.pre_norm, eps), (w.y, w.x, w.x), (room.y, room.x, room.x[:0]), w.out)
    _scan(team, _convolved(state.tail, plus_bias(room.x, w.x_bias), w), w, state, room.h)
    mixed = gated(plus_bias(room.y[len(x) - rows :], w.y_bias), room.h[len(x) - rows :])
    product(team, 2, mixed, (w.out, w.out, w.out), (room.out, nothing, nothing), layer.ffn.gate)
    middle = residual(x, room.out, w.out_bias, w.decay[:0], eps, rows)
    after = feed_forward.run_steps(team, STEPS, middle, layer.ffn, eps, room.ffn, w.y)
    if worker == 0:
        hand_over(after, out)


@jit_inner
def _receive(arrays, D):
    """RecurrentArrays from a plain tuple of its arrays."""
    (pre_norm, y, x, out), vectors, gates = arrays[:4], arrays[4:9], arrays[9:]
    (y_bias, x_bias, out_bias, conv, conv_bias), E = vectors, vectors[4].size
    y, x, out = received(y, E, D), received(x, E, D), received(out, D, E)
    return RecurrentArrays(
        pre_norm, y, x, out, y_bias, x_bias, out_bias, conv, conv_bias, gates[0], gates[1], gates[2], gates[3], gates[4]
    )


@jit
def fused_recurrent_layer(workers, x, recurrent, ffn, numbers, state, out):
    """out = the residual after the layer, x [T, D] before it, the last rows if out has fewer; and `state.after`.

    recurrent, ffn and state are RecurrentArrays … as plain tuples; numbers are F and ε.
    """
    (hidden, eps), (T, D), rows, now = numbers, x.shape, len(out), State(*state)
    layer = LayerArrays(_receive(recurrent, D), feed_forward.receive(ffn, D, hidden))
    shape = T, layer.recurrent.decay.size
    ys, xs, hs = np.empty(shape, np.float32), np.empty(shape, np.float32), np.empty(shape, np.float32)
    counters, y = new_counters(STEPS + feed_forward.STEPS, workers), np.empty((rows, D), np.float32)
    ffn_room = feed_forward.room_at(feed_forward.new_rooms(1, rows, D, hidden), 0)
    parallel_for(_thread, workers, (x, layer, eps, now, Room(counters, ys, xs, hs, y, ffn_room), out))
