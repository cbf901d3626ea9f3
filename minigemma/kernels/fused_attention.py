"""Layers with attention, one to sixteen tokens, a parallel region each: `attention_layer` of blocks/layers.py, fused.

1  The definition calls a kernel per formula. Between two of them Python takes microseconds and memory stands idle;
   twenty calls a layer take a quarter of the time of Gemma 3 270M.
2  One region instead: five steps that threads share (projections, attention, output; then the two of the feed-forward
   block), the rest computed by every thread for itself. Every thread also writes the new keys and values into the
   ring, all of them the same values.
3  One region per layer, not one per block, and one call for layers that follow one another: each layer's weights drive
   Python's own code out of the caches. `python docs/make_performance.py token` shows what Python and regions cost.
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
from .weights import KernelWeight, arrays_at, received

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
    """What all layers of a call have in common. NumPy's own scalars would take microseconds to receive."""

    heads: int
    kv_heads: int
    head_dim: int
    hidden: int  # F
    eps: float


class Layers(NamedTuple):
    """The weights of layers that follow one another (weights.addresses), and in what they differ."""

    attention: tuple[NDArray[Any], ...]  # an array of the type of each of AttentionArrays
    ffn: tuple[NDArray[Any], ...]
    attention_table: NDArray[np.int64]
    ffn_table: NDArray[np.int64]
    scoring: F32  # [layers, 3]: window, scale, cap
    ropes: NDArray[np.int64]  # [layers]: which of the ropes in Tokens


class Rings(NamedTuple):
    """Their rings, which may have capacity for more than the slots in use."""

    kinds: tuple[NDArray[Any], NDArray[Any]]  # arrays of the type of keys and of values
    table: NDArray[np.int64]
    limits: NDArray[np.int64]  # [layers]


class Tokens(NamedTuple):
    """Positions of the tokens; cosines and sines of a page of positions, and which row of it is the first token's."""

    positions: I32  # [T]
    cos: F32  # [ropes, positions, R/2]
    sin: F32
    first: int


class Ring(NamedTuple):
    """A layer's ring, and where the new tokens go."""

    keys: NDArray[Any]  # [slots, K, H] float32, or bf16 as uint16
    values: NDArray[Any]  # [slots, K, H]
    positions: I32  # [S] of the keys in the first S slots, once the new tokens are there
    slot: int  # of the first new token


class Rotation(NamedTuple):
    """Cosines and sines [T, R/2] of the tokens."""

    cos: F32
    sin: F32


class Step(NamedTuple):
    """How one layer's attention differs from another's."""

    ring: Ring
    scoring: Scoring
    rotation: Rotation
    positions: I32  # [T]


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
def _heads_and_ring(w, numbers, own, room):
    """Queries [T, N, H] after norm and RoPE; the ring takes in keys and values."""
    T, ring = len(room.q), own.ring
    q = room.q.copy().reshape((T, numbers.heads, numbers.head_dim))
    k = room.k.copy().reshape((T, numbers.kv_heads, numbers.head_dim))
    _normed_heads(q, w.q_norm, numbers.eps)
    _normed_heads(k, w.k_norm, numbers.eps)
    for t in range(T):
        cos, sin = own.rotation.cos[t], own.rotation.sin[t]
        rotate(q[t], cos, sin, q[t])
        rotate(k[t], cos, sin, k[t])
        keep_row(k[t].reshape(-1), ring.keys[ring.slot + t].reshape(-1))
        keep_row(room.v[t], ring.values[ring.slot + t].reshape(-1))
    return q


@jit_inner
def _attend(team, q, own, partials, following):
    """The attention step, a task per partition of the keys → [T · K, G, H]."""
    (T, N, H), K, S = q.shape, own.ring.keys.shape[1], len(own.ring.positions)
    queries = Queries(q.reshape((T, K, N // K, H)), own.positions, own.positions)
    keys = Keys(own.ring.keys[:S], own.ring.values[:S], own.ring.positions)
    tasks, done = len(partials.states) // K, 0
    task = next_task(team.counters, 1, team.worker, team.workers, tasks)
    while task >= 0:
        attend_partition(queries, keys, own.scoring, tasks // T, task, partials)
        done += 1
        task = next_task(team.counters, 1, team.worker, team.workers, tasks)
    wait(team, 1, done, tasks, following.data)
    mixed = np.empty((T * K, N // K, H), np.float32)
    merge_partitions(partials, mixed)
    return mixed


@jit_inner
def _thread(worker, workers, x, layer, numbers, own, room):
    team, w, eps, rows = Team(room.counters, worker, workers), layer.attention, numbers.eps, len(room.y)
    product(team, 0, normed(x, w.pre_norm, eps), (w.q, w.k, w.v), (room.q, room.k, room.v), w.o)
    q = _heads_and_ring(w, numbers, own, room)
    mixed = _attend(team, q, own, room.partials, w.o).reshape(room.q.shape)
    nothing = room.y[:0]
    product(team, 2, mixed[len(x) - rows :], (w.o, w.o, w.o), (room.y, nothing, nothing), layer.ffn.gate)
    middle = residual(x, room.y, w.o_bias, w.post_norm, eps, rows)
    feed_forward_steps(team, STEPS, middle, layer.ffn, eps, room.ffn)


@jit_inner
def _layer_at(layers, i, D, numbers):
    """The weights of layer i."""
    NH, KH = numbers.heads * numbers.head_dim, numbers.kv_heads * numbers.head_dim
    pre_norm, q, k, v, o, q_norm, k_norm, o_bias, post_norm = arrays_at(layers.attention_table, i, layers.attention)
    q, k, v, o = received(q, NH, D), received(k, KH, D), received(v, KH, D), received(o, D, NH)
    attention = AttentionArrays(pre_norm, q, k, v, o, q_norm, k_norm, o_bias, post_norm)
    return LayerArrays(attention, receive_feed_forward(arrays_at(layers.ffn_table, i, layers.ffn), D, numbers.hidden))


@jit_inner
def _ring_at(rings, i, first, T, numbers):
    """The ring of layer i. Position p is in slot p modulo the limit (cache.py)."""
    K, H, limit, count = numbers.kv_heads, numbers.head_dim, rings.limits[i], first + T
    keys, values = arrays_at(rings.table, i, rings.kinds)
    shape, positions = (keys.size // (K * H), K, H), np.empty(min(count, limit), np.int32)
    begin = count - count % limit if count > limit else 0  # the position in slot 0
    for slot in range(positions.size):
        positions[slot] = begin + slot if begin + slot < count else begin + slot - limit
    return Ring(keys.reshape(shape), values.reshape(shape), positions, first % limit)


@jit_inner
def _step_at(layers, rings, i, tokens, numbers):
    (window, scale, cap), T, rope = layers.scoring[i], len(tokens.positions), layers.ropes[i]
    span = slice(tokens.first, tokens.first + T)
    rotation = Rotation(tokens.cos[rope, span], tokens.sin[rope, span])
    ring = _ring_at(rings, i, tokens.positions[0], T, numbers)
    return Step(ring, Scoring(window, scale, cap), rotation, tokens.positions)


@jit_inner
def _room(T, rows, D, ring, numbers, workers):
    K, N, H = numbers.kv_heads, numbers.heads, numbers.head_dim
    parts = T * K * partitions_of(T, len(ring.positions), K, workers)
    partials = Partials(np.empty((parts, N // K, 2), np.float32), np.empty((parts, N // K, H), np.float32))
    q, k, v = np.empty((T, N * H), np.float32), np.empty((T, K * H), np.float32), np.empty((T, K * H), np.float32)
    counters, y = new_counters(STEPS + FEED_FORWARD_STEPS, workers), np.empty((rows, D), np.float32)
    return Room(counters, q, k, v, partials, y, feed_forward_room(rows, D, numbers.hidden))


@jit
def fused_attention_layers(workers, x, layers, numbers, rings, tokens, out):
    """out = the residual after the layers, x [T, D] before them; its last rows if out has fewer. The rings take in keys
    and values. layers, numbers, rings and tokens are Layers … as plain tuples.
    """
    layers, numbers, rings, tokens = Layers(*layers), AttentionNumbers(*numbers), Rings(*rings), Tokens(*tokens)
    (T, D), eps, last = x.shape, numbers.eps, len(rings.limits) - 1
    for i in range(last + 1):
        layer, own = _layer_at(layers, i, D, numbers), _step_at(layers, rings, i, tokens, numbers)
        after = out if i == last else np.empty((T, D), np.float32)
        room = _room(T, len(after), D, own.ring, numbers, workers)
        parallel_for(_thread, workers, (x, layer, numbers, own, room))
        add_branch(x, room.y, layer.attention.o_bias, layer.attention.post_norm, eps, after)
        add_branch(after, room.ffn.y, layer.ffn.down_bias, layer.ffn.post_norm, eps, after)
        x = after
