"""Layers with attention in one parallel region: `attention_layer` of blocks/layers.py, fused, for one to sixteen tokens
of one sequence, or the next token of each of several.

1  The definition calls a kernel per formula. Between two of them Python takes microseconds and memory stands idle;
   twenty calls a layer take a quarter of the time of Gemma 3 270M.
2  One region instead: threads share five steps (projections, attention, output; then the two of the feed-forward
   block), and each computes the rest for itself. Each also writes the new keys and values into the ring: equal ones.
3  One call, and one region, for consecutive layers: each layer's weights evict Python's own code from the caches, and
   starting and ending a region takes microseconds, or a millisecond while another program uses one of the cores.
   `python docs/make_performance.py token` shows what Python and regions cost.
4  While a thread waits at a barrier it prefetches the weights of the next step.

A late thread still reads what earlier layers computed, so each layer of a region has buffers of its own. Above MOST
numbers, as for many tokens of a large model, the layers are split into several regions.
"""

from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from ..arrays import F32, I32
from . import fused_feedforward as feed_forward
from .attention_decode import Partials, attend_partition, merge_partitions, partitions_of
from .compiler import jit, jit_inner
from .fused_steps import Team, hand_over, keep_row, normed, product, residual, wait
from .parallel import new_counters, next_task, parallel_for
from .rows import norm_row, rotate
from .scores import Keys, Queries, Scoring
from .weights import KernelWeight, arrays_at, received

STEPS = 3  # and those of the feed-forward block
MOST = 1 << 20  # float32 numbers that the layers of a region compute; more would come from memory, as weights do


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
    """The weights of consecutive layers (weights.addresses), and the numbers in which they differ."""

    attention: tuple[NDArray[Any], ...]  # an array of the type of each of AttentionArrays
    ffn: tuple[NDArray[Any], ...]
    attention_table: NDArray[np.int64]
    ffn_table: NDArray[np.int64]
    scoring: F32  # [layers, 3]: window, scale, cap
    ropes: NDArray[np.int64]  # [layers]: which of the ropes in Tokens


class Rings(NamedTuple):
    """The rings of all layers, one per sequence, layer by layer; they may have more slots than are in use."""

    kinds: tuple[NDArray[Any], NDArray[Any]]  # arrays of the type of keys and of values
    table: NDArray[np.int64]
    limits: NDArray[np.int64]  # [layers · sequences]


class Tokens(NamedTuple):
    """Positions of the tokens; cosines and sines of a page of positions, and which row of it is the first token's."""

    positions: I32  # [T]
    cos: F32  # [ropes, positions, R/2]
    sin: F32
    first: int


class Call(NamedTuple):
    """What all threads and layers have in common."""

    layers: Layers
    numbers: AttentionNumbers
    rings: Rings
    tokens: Tokens


class Ring(NamedTuple):
    """A ring, and the tokens of its sequence."""

    keys: NDArray[Any]  # [slots, K, H] float32, or bf16 as uint16
    values: NDArray[Any]  # [slots, K, H]
    limit: int
    held: int  # tokens, the new ones included


class Step(NamedTuple):
    """How one layer's attention differs from another's."""

    rings: Rings
    first: int  # of the layer's rings
    each: int  # 1 if each token has a ring of its own, 0 if all are of one sequence
    scoring: Scoring
    cos: F32  # [T, R/2] of the tokens
    sin: F32
    positions: I32  # [T]


class LayerArrays(NamedTuple):
    """The weights of both blocks."""

    attention: AttentionArrays
    ffn: feed_forward.FeedForwardArrays


class Room(NamedTuple):
    """What threads compute together in a layer; of several layers all arrays have one axis more."""

    counters: NDArray[np.int64]
    q: F32  # [T, N · H]
    k: F32  # [T, K · H]
    v: F32  # [T, K · H]
    partials: Partials
    y: F32  # [rows of the output, D]
    ffn: feed_forward.FeedForwardRoom


@jit_inner
def _normed_heads(x, weight, eps):
    """RMSNorm of every head of x [T, N, H], in place; nothing without a weight."""
    if weight.size:
        for t in range(len(x)):
            for n in range(x.shape[1]):
                norm_row(x[t, n], weight, eps, x[t, n])


@jit_inner
def _ring_of(own, t, numbers):
    """The ring of token t."""
    at, last = own.first + t * own.each, t if own.each else len(own.positions) - 1
    keys, values = arrays_at(own.rings.table, at, own.rings.kinds)
    shape = keys.size // (numbers.kv_heads * numbers.head_dim), numbers.kv_heads, numbers.head_dim
    return Ring(keys.reshape(shape), values.reshape(shape), own.rings.limits[at], own.positions[last] + 1)


@jit_inner
def _keys_of(ring):
    """Its keys and values: position p is in slot p modulo the limit (cache.py)."""
    count, limit = ring.held, ring.limit
    positions = np.empty(min(count, limit), np.int32)
    begin = count - count % limit if count > limit else 0  # the position in slot 0
    for slot in range(positions.size):
        positions[slot] = begin + slot if begin + slot < count else begin + slot - limit
    return Keys(ring.keys[: positions.size], ring.values[: positions.size], positions)


@jit_inner
def _heads_and_rings(w, numbers, own, room):
    """Queries [T, N, H] after norm and RoPE; the rings take in keys and values."""
    T = len(room.q)
    q = room.q.copy().reshape((T, numbers.heads, numbers.head_dim))
    k = room.k.copy().reshape((T, numbers.kv_heads, numbers.head_dim))
    _normed_heads(q, w.q_norm, numbers.eps)
    _normed_heads(k, w.k_norm, numbers.eps)
    for t in range(T):
        cos, sin, ring = own.cos[t], own.sin[t], _ring_of(own, t, numbers)
        rotate(q[t], cos, sin, q[t])
        rotate(k[t], cos, sin, k[t])
        slot = own.positions[t] % ring.limit
        keep_row(k[t].reshape(-1), ring.keys[slot].reshape(-1))
        keep_row(room.v[t], ring.values[slot].reshape(-1))
    return q


@jit_inner
def _partitions(own, numbers, workers):
    """How many partitions the keys of each token are cut into."""
    longest, total = 0, 0
    for t in range(len(own.positions)):
        ring = _ring_of(own, t, numbers)
        keys = min(ring.held, ring.limit)
        longest, total = max(longest, keys), total + keys
    return partitions_of(total // longest, longest, numbers.kv_heads, workers)


@jit_inner
def _attend(team, q, own, numbers, room, following):
    """The attention step, a task per partition of a token's keys → [T, N · H]."""
    (T, N, H), K, partitions = q.shape, numbers.kv_heads, _partitions(own, numbers, team.workers)
    queries = Queries(q.reshape((T, K, N // K, H)), own.positions, own.positions)
    partials = Partials(room.partials.states[: T * K * partitions], room.partials.totals[: T * K * partitions])
    tasks, done = T * partitions, 0
    task = next_task(team.counters, 1, team.worker, team.workers, tasks)
    while task >= 0:
        keys = _keys_of(_ring_of(own, task // partitions, numbers))
        attend_partition(queries, keys, own.scoring, partitions, task, partials)
        done += 1
        task = next_task(team.counters, 1, team.worker, team.workers, tasks)
    wait(team, 1, done, tasks, following.data)
    mixed = np.empty((T * K, N // K, H), np.float32)
    merge_partitions(partials, mixed)
    return mixed.reshape((T, N * H))


@jit_inner
def _layer(team, x, layer, numbers, own, room, following):
    """The residual after a layer, x [T, D] before it; the last rows if `room` is for fewer."""
    w, eps, rows, nothing = layer.attention, numbers.eps, len(room.y), room.y[:0]
    product(team, 0, normed(x, w.pre_norm, eps), (w.q, w.k, w.v), (room.q, room.k, room.v), w.o)
    mixed = _attend(team, _heads_and_rings(w, numbers, own, room), own, numbers, room, w.o)
    product(team, 2, mixed[len(x) - rows :], (w.o, w.o, w.o), (room.y, nothing, nothing), layer.ffn.gate)
    middle = residual(x, room.y, w.o_bias, w.post_norm, eps, rows)
    return feed_forward.run_steps(team, STEPS, middle, layer.ffn, eps, room.ffn, following)


@jit_inner
def _layer_at(layers, i, D, numbers):
    """The weights of layer i."""
    NH, KH = numbers.heads * numbers.head_dim, numbers.kv_heads * numbers.head_dim
    pre_norm, q, k, v, o, q_norm, k_norm, o_bias, post_norm = arrays_at(layers.attention_table, i, layers.attention)
    q, k, v, o = received(q, NH, D), received(k, KH, D), received(v, KH, D), received(o, D, NH)
    attention = AttentionArrays(pre_norm, q, k, v, o, q_norm, k_norm, o_bias, post_norm)
    return LayerArrays(attention, feed_forward.receive(arrays_at(layers.ffn_table, i, layers.ffn), D, numbers.hidden))


@jit_inner
def _step_at(call, i):
    """The numbers of layer i."""
    layers, rings, tokens = call.layers, call.rings, call.tokens
    (window, scale, cap), rope = layers.scoring[i], layers.ropes[i]
    span = slice(tokens.first, tokens.first + len(tokens.positions))
    cos, sin, sequences = tokens.cos[rope, span], tokens.sin[rope, span], len(rings.limits) // len(layers.ropes)
    each = 1 if sequences > 1 else 0
    return Step(rings, i * sequences, each, Scoring(window, scale, cap), cos, sin, tokens.positions)


@jit_inner
def _rooms(layers, T, rows, D, numbers, workers):
    """Room for several layers."""
    N, K, H, parts = numbers.heads, numbers.kv_heads, numbers.head_dim, T * numbers.kv_heads * workers
    states = np.empty((layers, parts, N // K, 2), np.float32)
    partials = Partials(states, np.empty((layers, parts, N // K, H), np.float32))
    q, k = np.empty((layers, T, N * H), np.float32), np.empty((layers, T, K * H), np.float32)
    v, y = np.empty((layers, T, K * H), np.float32), np.empty((layers, rows, D), np.float32)
    counters = new_counters(layers * (STEPS + feed_forward.STEPS), workers).reshape((layers, -1))
    return Room(counters, q, k, v, partials, y, feed_forward.new_rooms(layers, rows, D, numbers.hidden))


@jit_inner
def _room_at(rooms, i):
    """The room of layer i."""
    states, totals = rooms.partials
    partials, ffn = Partials(states[i], totals[i]), feed_forward.room_at(rooms.ffn, i)
    return Room(rooms.counters[i], rooms.q[i], rooms.k[i], rooms.v[i], partials, rooms.y[i], ffn)


@jit_inner
def _thread(worker, workers, x, first, call, rooms, out):
    """Layers from the first on, as many as there is room for."""
    D, layers = x.shape[1], len(call.layers.ropes)
    layer = _layer_at(call.layers, first, D, call.numbers)
    for i in range(len(rooms.y)):
        room, own = _room_at(rooms, i), _step_at(call, first + i)
        following = _layer_at(call.layers, (first + i + 1) % layers, D, call.numbers)
        team = Team(room.counters, worker, workers)
        x = _layer(team, x, layer, call.numbers, own, room, following.attention.q)
        layer = following
    if worker == 0:
        hand_over(x, out)


@jit
def fused_attention_layers(workers, x, layers, numbers, rings, tokens, out):
    """out = the residual after the layers, x [T, D] before them; of a single layer its last rows if out has fewer. The
    rings take in keys and values. layers, numbers, rings and tokens are Layers … as plain tuples.
    """
    call = Call(Layers(*layers), AttentionNumbers(*numbers), Rings(*rings), Tokens(*tokens))
    (T, D), (heads, kv_heads, head_dim, hidden, _), count = x.shape, call.numbers, len(call.layers.ropes)
    own = T * (2 * D + 2 * hidden + (2 * heads + 2 * kv_heads) * head_dim)  # numbers of a layer
    several = max(1, min(count, MOST // own))
    for first in range(0, count, several):
        some = min(several, count - first)
        after = out if first + some == count else np.empty((T, D), np.float32)
        rooms = _rooms(some, T, len(after), D, call.numbers, workers)
        parallel_for(_thread, workers, (x, first, call, rooms, after))
        x = after
