"""A layer with attention, one to sixteen tokens, in one parallel region: `attention_layer` of blocks/layers.py, fused.

1  The definition calls a kernel per formula. Between two of them Python takes microseconds and memory stands idle;
   twenty calls a layer take a quarter of the time of Gemma 3 270M.
2  One region instead: five steps that threads share (projections, attention, output; then the two of the feed-forward
   block), the rest computed by every thread for itself. Every thread also writes the new keys and values into the
   ring, all of them the same values.
3  One call and region per layer, not one per block: `python docs/make_performance.py token` shows what Python and
   regions cost.
4  While a thread waits at a barrier it prefetches the weights of the next step.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from ..arrays import F32, I32
from .attention_decode import Partials, attend_partition, merge_partitions, partitions_of
from .compiler import jit, jit_inner
from .fused_feedforward import STEPS as FEED_FORWARD_STEPS
from .fused_feedforward import (
    FeedForwardArrays,
    FeedForwardRoom,
    feed_forward_room,
    feed_forward_steps,
    receive_feed_forward,
)
from .fused_steps import Team, add_branch, keep_row, normed, product, residual, wait
from .parallel import new_counters, next_task, parallel_for
from .rows import norm_row, rotate
from .scores import Keys, Queries, Scoring
from .weights import KernelWeight, received

STEPS = 3  # and those of the feed-forward block


class AttentionArrays(NamedTuple):
    """The weights of an attention block; an empty array where a model has no such norm or bias."""

    pre_norm: F32  # [D]
    q: KernelWeight
    k: KernelWeight
    v: KernelWeight
    o: KernelWeight
    q_norm: F32  # [H]
    k_norm: F32  # [H]
    o_bias: F32  # [D]
    post_norm: F32  # [D]


class AttentionNumbers(NamedTuple):
    """The numbers of a layer. NumPy's own scalars would cost some microseconds per call to receive."""

    heads: int
    hidden: int  # F
    eps: float
    window: float
    scale: float
    cap: float


class Ring(NamedTuple):
    """A layer's ring, and where the new tokens go."""

    keys: NDArray[Any]  # [slots, K, H] float32, or bf16 as uint16
    values: NDArray[Any]  # [slots, K, H]
    positions: I32  # [S] of the keys in the first S slots, once the new tokens are there
    slot: int  # of the first new token


class Tokens(NamedTuple):
    """Positions of the tokens; cosines and sines of a page of positions, and which row of it is the first token's."""

    positions: I32  # [T]
    cos: F32  # [positions, R/2]
    sin: F32
    first: int


class LayerArrays(NamedTuple):
    """The weights of both blocks."""

    attention: AttentionArrays
    ffn: FeedForwardArrays


class Room(NamedTuple):
    """What threads compute together."""

    counters: NDArray[np.int64]
    q: F32  # [T, N · H]
    k: F32  # [T, K · H]
    v: F32  # [T, K · H]
    partials: Partials
    y: F32  # [rows of the output, D]
    ffn: FeedForwardRoom


@jit_inner
def _normed_heads(x, weight, eps):
    """RMSNorm of every head of x [T, N, H], in place; nothing without a weight."""
    if weight.size:
        for t in range(len(x)):
            for n in range(x.shape[1]):
                norm_row(x[t, n], weight, eps, x[t, n])


@jit_inner
def _scoring(numbers):
    return Scoring(np.float32(numbers.window), np.float32(numbers.scale), np.float32(numbers.cap))


@jit_inner
def _heads_and_ring(w, numbers, ring, tokens, room):
    """Queries [T, N, H] after norm and RoPE; the ring takes in keys and values."""
    T, (K, H) = len(room.q), ring.keys.shape[1:]
    q, k = room.q.copy().reshape((T, numbers.heads, H)), room.k.copy().reshape((T, K, H))
    _normed_heads(q, w.q_norm, numbers.eps)
    _normed_heads(k, w.k_norm, numbers.eps)
    for t in range(T):
        cos, sin = tokens.cos[tokens.first + t], tokens.sin[tokens.first + t]
        rotate(q[t], cos, sin, q[t])
        rotate(k[t], cos, sin, k[t])
        keep_row(k[t].reshape(-1), ring.keys[ring.slot + t].reshape(-1))
        keep_row(room.v[t], ring.values[ring.slot + t].reshape(-1))
    return q


@jit_inner
def _attend(team, q, positions, ring, scoring, partials, following):
    """The attention step, a task per partition of the keys → [T · K, G, H]."""
    (T, N, H), K, S = q.shape, ring.keys.shape[1], len(ring.positions)
    queries = Queries(q.reshape((T, K, N // K, H)), positions, positions)
    keys = Keys(ring.keys[:S], ring.values[:S], ring.positions)
    tasks, done = len(partials.states) // K, 0
    task = next_task(team.counters, 1, team.worker, team.workers, tasks)
    while task >= 0:
        attend_partition(queries, keys, scoring, tasks // T, task, partials)
        done += 1
        task = next_task(team.counters, 1, team.worker, team.workers, tasks)
    wait(team, 1, done, tasks, following.data)
    mixed = np.empty((T * K, N // K, H), np.float32)
    merge_partitions(partials, mixed)
    return mixed


@jit_inner
def _thread(worker, workers, x, layer, numbers, ring, tokens, room):
    team, w, eps, rows = Team(room.counters, worker, workers), layer.attention, numbers.eps, len(room.y)
    product(team, 0, normed(x, w.pre_norm, eps), (w.q, w.k, w.v), (room.q, room.k, room.v), w.o)
    q = _heads_and_ring(w, numbers, ring, tokens, room)
    mixed = _attend(team, q, tokens.positions, ring, _scoring(numbers), room.partials, w.o).reshape(room.q.shape)
    nothing = room.y[:0]
    product(team, 2, mixed[len(x) - rows :], (w.o, w.o, w.o), (room.y, nothing, nothing), layer.ffn.gate)
    middle = residual(x, room.y, w.o_bias, w.post_norm, eps, rows)
    feed_forward_steps(team, STEPS, middle, layer.ffn, eps, room.ffn)


@jit_inner
def _receive(arrays, D, NH, KH):
    """AttentionArrays from a plain tuple of its arrays."""
    pre_norm, q, k, v, o, q_norm, k_norm, o_bias, post_norm = arrays
    q, k, v, o = received(q, NH, D), received(k, KH, D), received(v, KH, D), received(o, D, NH)
    return AttentionArrays(pre_norm, q, k, v, o, q_norm, k_norm, o_bias, post_norm)


@jit_inner
def _room(T, rows, D, ring, numbers, workers):
    (K, H), N = ring.keys.shape[1:], numbers.heads
    parts = T * K * partitions_of(T, len(ring.positions), K, workers)
    partials = Partials(np.empty((parts, N // K, 2), np.float32), np.empty((parts, N // K, H), np.float32))
    q, k, v = np.empty((T, N * H), np.float32), np.empty((T, K * H), np.float32), np.empty((T, K * H), np.float32)
    counters, y = new_counters(STEPS + FEED_FORWARD_STEPS, workers), np.empty((rows, D), np.float32)
    return Room(counters, q, k, v, partials, y, feed_forward_room(rows, D, numbers.hidden))


@jit
def fused_attention_layer(workers, x, attention, ffn, numbers, ring, tokens, out):
    """out = the residual after the layer, x [T, D] before it; its last rows if out has fewer. The ring takes in keys
    and values, from `ring.slot` on. attention, ffn, numbers, ring and tokens are AttentionArrays … as plain tuples.
    """
    numbers, ring, tokens = AttentionNumbers(*numbers), Ring(*ring), Tokens(*tokens)
    D, (K, H), eps = x.shape[1], ring.keys.shape[1:], numbers.eps
    layer = LayerArrays(_receive(attention, D, numbers.heads * H, K * H), receive_feed_forward(ffn, D, numbers.hidden))
    room = _room(len(x), len(out), D, ring, numbers, workers)
    parallel_for(_thread, workers, (x, layer, numbers, ring, tokens, room))
    add_branch(x, room.y, layer.attention.o_bias, layer.attention.post_norm, eps, out)
    add_branch(out, room.ffn.y, layer.ffn.down_bias, layer.ffn.post_norm, eps, out)
