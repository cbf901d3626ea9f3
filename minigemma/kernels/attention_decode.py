"""Attention for decoding: a few queries, each of which reads all keys it sees. Vectors hold numbers of one head.

 1  The definition: scores of all keys, a softmax, a weighted sum of values; keys and values are widened to float32.
 2  Online softmax (Milakov & Gimelshein 2018): keys go in blocks, and each query head keeps its largest score so far,
    the sum of exponentials and the weighted sum of values; a larger score rescales both sums. No row of scores is kept.
 3  bf16 keys and values are widened in registers. `load_even_odd` takes the even and the odd numbers of a row apart, so
    the query is put in that order once.
 4  HEADS query heads of a group share each load: eight sums, of two keys and four heads, stay in registers.
 5  Keys are cut into partitions, shared among threads, and merged (as "flash decoding": Dao et al. 2023).
 6  On AMD the two keys of a pair come from the two halves of the partition: Zen 3 reads up to a quarter faster from two
    places at once.
 7  Keys are prefetched AHEAD rows before use. Farther ahead changes nothing.

Against PyTorch's attention in bf16, for 4 query heads of 256 on one key head: 1.4 times as fast at 512 keys, 2.8 times
at 32,768. `python docs/make_performance.py attention` measures this.
"""

from typing import NamedTuple

import numpy as np

from ..arrays import F32
from .compiler import jit, jit_inner
from .pairs import Pairs, pairs_of, partner_of, some_pairs
from .parallel import chunk, parallel_for
from .scores import LOWEST, Keys, is_visible, soft_cap_lanes
from .simd.accumulators import eight_zeros, store_sums
from .simd.cpu import LANES
from .simd.memory import from_even_odd, load, load_even_odd, load_one, prefetch, store, to_even_odd
from .simd.vectors import exp, fma, maximum, splat, where_less, zeros

DECODE_QUERIES, FAR = 8, 1024  # queries that still count as decoding; twice as many before FAR keys
BLOCK = 64  # keys of one softmax update, in pairs
HEADS = 4  # query heads that share each load of a key
AHEAD = 8  # keys from the one that is read to the one that is prefetched
PAIRS_AT_ONCE = 2  # pairs of values that are added in one pass over a head's sums
PARTITION = 32  # keys of one key head that a partition has at least


class Partials(NamedTuple):
    """Results of all partitions, in the order query, key head, partition."""

    states: F32  # [T · K · partitions, G, 2], the largest score and the sum of exponentials of each head
    totals: F32  # [T · K · partitions, G, H], the weighted sum of values


class Heads(NamedTuple):
    """K key heads, G query heads on each, H numbers in a head."""

    K: int
    G: int
    H: int


class KeyPair(NamedTuple):
    """Where two keys begin, and how far behind each to prefetch."""

    first: int
    second: int
    ahead: int


class Walk(NamedTuple):
    """One query on its way through one partition. Arrays have one axis."""

    query: int
    last_visible: int
    q: F32  # [K · G · H], in the order of `load_even_odd`
    states: F32  # of all Partials
    totals: F32
    row: int  # of Partials: the first group's
    stride: int  # of Partials: from one group's row to the next
    scores: F32  # [K · ⌈G / HEADS⌉ · BLOCK · HEADS]
    mask: F32  # [BLOCK · HEADS], 0 or -inf
    lanes: F32  # [3 · LANES], to take vectors apart


def is_decode(queries: int, before: int) -> bool:
    """Does this kernel serve `queries` queries after `before` keys? Each query reads all keys."""
    return queries <= (DECODE_QUERIES if before > FAR else 2 * DECODE_QUERIES)


@jit_inner
def partitions_of(queries, keys, heads, workers):
    """How many partitions the keys of each query are cut into, so that all threads have work; keys have `heads`."""
    return max(1, min((workers + queries - 1) // queries, keys * heads // PARTITION))


@jit_inner
def head_offsets(first, last, size):
    """Start offsets of the HEADS heads from `first` on, of `size` numbers each, clamped to the head `last`."""
    return first * size, min(first + 1, last) * size, min(first + 2, last) * size, min(first + 3, last) * size


@jit_inner
def dot_pair(k, pair, q, offsets, H, scores, to):
    """scores[to : to + 2 · HEADS] = Σ_h k[key + h] · q[i + h], i in `offsets`, of the first key, then of the second.

    k float32 or bf16, q in the order of `load_even_odd`, H a multiple of 2 · LANES.
    """
    first, second, ahead = pair
    i, j, m, n = offsets
    a, b, c, d, e, f, g, o = eight_zeros()
    for h in range(0, H, 2 * LANES):
        prefetch(k, first + ahead + h)
        prefetch(k, second + ahead + h)
        (x, y), (u, v) = load_even_odd(k, first + h), load_even_odd(k, second + h)
        p, r = load(q, i + h), load(q, i + h + LANES)
        a, e = fma(y, r, fma(x, p, a)), fma(v, r, fma(u, p, e))
        p, r = load(q, j + h), load(q, j + h + LANES)
        b, f = fma(y, r, fma(x, p, b)), fma(v, r, fma(u, p, f))
        p, r = load(q, m + h), load(q, m + h + LANES)
        c, g = fma(y, r, fma(x, p, c)), fma(v, r, fma(u, p, g))
        p, r = load(q, n + h), load(q, n + h + LANES)
        d, o = fma(y, r, fma(x, p, d)), fma(v, r, fma(u, p, o))
    store_sums(scores, to, (a, b, c, d, e, f, g, o))


@jit_inner
def mask_block(walk, positions, window, pairs):
    """walk.mask = 0 for every head of a key that the query sees, -inf for other keys and where there is none."""
    mask, query, last_visible = walk.mask, walk.query, walk.last_visible
    for s in range(BLOCK):
        key = pairs.first + s // 2 * pairs.step + s % 2 * pairs.partner
        exists = s < 2 * pairs.length and key < pairs.end
        seen = exists and is_visible(query, last_visible, positions[key], window)
        for i in range(s * HEADS, s * HEADS + HEADS):
            mask[i] = 0 if seen else -np.inf


@jit_inner
def online_softmax_update(scores, walk, scoring, first, heads, H):
    """Turns a block's products of HEADS heads into exponentials: scores [BLOCK · HEADS], a lane's head is lane % HEADS.

    Brings the maxima, sums and weighted values of the `heads` heads from `first` on up to date.
    """
    states, totals, lanes, mask, cap = walk.states, walk.totals, walk.lanes, walk.mask, scoring.cap
    for i in range(LANES):
        lanes[i] = states[2 * (first + min(i % HEADS, heads - 1))]
    before = load(lanes, 0)
    highest = before
    for s in range(0, BLOCK * HEADS, LANES):
        x = load(scores, s) * splat(scoring.scale)
        if cap > 0:
            x = soft_cap_lanes(x, cap)
        shown = load(mask, s)
        x = where_less(shown, zeros(), shown, x)
        store(scores, s, x)
        highest = maximum(highest, x)
    store(lanes, 0, highest)
    for i in range(LANES):
        lanes[LANES + i] = lanes[i]
        for j in range(i % HEADS, LANES, HEADS):  # the same head's other lanes, which have other keys
            lanes[LANES + i] = max(lanes[LANES + i], lanes[j])
    top, added = load(lanes, LANES), zeros()
    for s in range(0, BLOCK * HEADS, LANES):
        p = exp(load(scores, s) - top)
        store(scores, s, p)
        added = added + p
    store(lanes, 0, exp(before - top))
    store(lanes, 2 * LANES, added)
    for i in range(heads):
        here, shrink, total = first + i, lanes[i], np.float32(0)
        for j in range(i, LANES, HEADS):
            total += lanes[2 * LANES + j]
        states[2 * here], states[2 * here + 1] = lanes[LANES + i], states[2 * here + 1] * shrink + total
        for h in range(here * H, here * H + H if shrink < 1 else here * H, LANES):
            store(totals, h, load(totals, h) * splat(shrink))


@jit_inner
def add_values(v, pairs, scores, p, totals, offsets, H):
    """totals[i : i + H] += Σ_s scores[p + …] · v[row s of `pairs`], i in `offsets`, in the order of `load_even_odd`.

    The pairs count numbers of v, not rows, and `end` is where the last row begins: a pair without a second row reads
    that one, with a score of 0. Prefetches two calls ahead.
    """
    (i, j, m, n), (first, partner, step, count, end) = offsets, pairs
    ahead = 2 * count * step
    for h in range(0, H, 2 * LANES):
        a, b = load(totals, i + h), load(totals, i + h + LANES)
        c, d = load(totals, j + h), load(totals, j + h + LANES)
        e, f = load(totals, m + h), load(totals, m + h + LANES)
        g, o = load(totals, n + h), load(totals, n + h + LANES)
        for s in range(2 * count):
            row, score = min(first + s // 2 * step + s % 2 * partner, end) + h, p + s * HEADS
            prefetch(v, row + ahead)
            x, y = load_even_odd(v, row)
            share = splat(load_one(scores, score))
            a, b = fma(share, x, a), fma(share, y, b)
            share = splat(load_one(scores, score + 1))
            c, d = fma(share, x, c), fma(share, y, d)
            share = splat(load_one(scores, score + 2))
            e, f = fma(share, x, e), fma(share, y, f)
            share = splat(load_one(scores, score + 3))
            g, o = fma(share, x, g), fma(share, y, o)
        store(totals, i + h, a)
        store(totals, i + h + LANES, b)
        store(totals, j + h, c)
        store(totals, j + h + LANES, d)
        store(totals, m + h, e)
        store(totals, m + h + LANES, f)
        store(totals, n + h, g)
        store(totals, n + h + LANES, o)


@jit_inner
def attend_block(walk, keys, scoring, pairs, heads):
    """One block of keys: products, online softmax, weighted values, for all heads of one query.

    Row s of k and v, in one axis, begins at s · K · H. Heads of a group run HEADS at a time; spare slots repeat the
    last head.
    """
    (K, G, H), (k, v, positions), q = heads, keys, walk.q
    row, fours, size = K * H, (G + HEADS - 1) // HEADS, BLOCK * HEADS
    mask_block(walk, positions, scoring.window, pairs)
    scores, totals, last = walk.scores, walk.totals, pairs.end - 1
    for s in range(pairs.length):
        key = pairs.first + s * pairs.step
        partner = partner_of(pairs, key)
        for head in range(K):
            pair = KeyPair(key * row + head * H, partner * row + head * H, AHEAD * row)
            for i in range(fours):
                offsets = head_offsets(head * G + i * HEADS, head * G + G - 1, H)
                dot_pair(k, pair, q, offsets, H, scores, (head * fours + i) * size + 2 * s * HEADS)
    for head in range(K):
        for i in range(fours):
            block, first = (head * fours + i) * size, (walk.row + head * walk.stride) * G + i * HEADS
            online_softmax_update(scores[block : block + size], walk, scoring, first, min(HEADS, G - i * HEADS), H)
    for s in range(0, pairs.length, PAIRS_AT_ONCE):
        several = min(PAIRS_AT_ONCE, pairs.length - s)
        for head in range(K):
            first, group = (pairs.first + s * pairs.step) * row + head * H, (walk.row + head * walk.stride) * G
            values = Pairs(first, pairs.partner * row, pairs.step * row, several, last * row + head * H)
            for i in range(fours):
                offsets = head_offsets(group + i * HEADS, group + G - 1, H)
                add_values(v, values, scores, (head * fours + i) * size + 2 * s * HEADS, totals, offsets, H)


@jit_inner
def walk_of(queries, k, partitions, task, partials):
    """The walk of task // partitions, a query, through its partition task % partitions, with sums of nothing."""
    K, G, H = queries.q.shape[1:]
    t, q, given = task // partitions, np.empty(K * G * H, np.float32), queries.q.reshape(-1)
    for h in range(0, q.size, 2 * LANES):
        a, b = to_even_odd(k, load(given, t * q.size + h), load(given, t * q.size + h + LANES))
        store(q, h, a)
        store(q, h + LANES, b)
    states, totals = partials.states.reshape(-1), partials.totals.reshape(-1)
    row = t * K * partitions + task % partitions
    for i in range(row, row + K * partitions, partitions):
        for g in range(2 * i * G, 2 * (i + 1) * G, 2):
            states[g], states[g + 1] = LOWEST, 0
        for h in range(i * G * H, (i + 1) * G * H, LANES):
            store(totals, h, zeros())
    scores = np.zeros(K * ((G + HEADS - 1) // HEADS) * BLOCK * HEADS, np.float32)
    mask, lanes = np.empty(BLOCK * HEADS, np.float32), np.empty(3 * LANES, np.float32)
    position, last_visible = queries.positions[t], queries.last_visible[t]
    return Walk(position, last_visible, q, states, totals, row, partitions, scores, mask, lanes)


@jit_inner
def attend_partition(queries, keys, scoring, partitions, task, partials):
    """One query, one partition of the keys; `task` counts queries, and partitions within them."""
    heads = Heads(queries.q.shape[1], queries.q.shape[2], queries.q.shape[3])
    flat = Keys(keys.k.reshape(-1), keys.v.reshape(-1), keys.positions)
    walk = walk_of(queries, flat.k, partitions, task, partials)
    size = (len(keys.k) + partitions - 1) // partitions
    first = task % partitions * size
    end = min(len(keys.k), first + size)
    pairs = pairs_of(first, max(first, end), False)
    for s in range(0, pairs.length, BLOCK // 2):
        attend_block(walk, flat, scoring, some_pairs(pairs, s, BLOCK // 2), heads)
    totals, size = walk.totals, heads.G * heads.H
    for i in range(walk.row, walk.row + heads.K * partitions, partitions):
        for h in range(i * size, (i + 1) * size, 2 * LANES):
            a, b = from_even_odd(flat.k, load(totals, h), load(totals, h + LANES))
            store(totals, h, a)
            store(totals, h + LANES, b)


@jit_inner
def merge_partitions(partials, out):
    """Adds up the partitions of each group and divides by the sum of exponentials: out [groups, G, H]."""
    (groups, G, H), partitions = out.shape, len(partials.states) // len(out)
    states, totals, merged = partials.states.reshape(-1), partials.totals.reshape(-1), out.reshape(-1)
    for i in range(groups * G):
        first, top, summed = i // G * partitions * G + i % G, LOWEST, np.float32(0)
        for row in range(first, first + partitions * G, G):
            top = max(top, states[2 * row])
        for row in range(first, first + partitions * G, G):
            share = np.exp(states[2 * row] - top)
            summed += share * states[2 * row + 1]
            for h in range(H):
                before = merged[i * H + h] if row > first else np.float32(0)
                merged[i * H + h] = before + share * totals[row * H + h]
        for h in range(i * H, i * H + H):
            merged[h] /= summed


@jit_inner
def _attend_partitions(worker, workers, queries, keys, scoring, partitions, partials):
    for task in chunk(worker, workers, len(queries.q) * partitions):
        attend_partition(queries, keys, scoring, partitions, task, partials)


@jit
def attention_decode(workers, queries, keys, scoring, out):
    """out [T, K, G, H] = attention of `queries` to `keys`, a task per partition. H is a multiple of 2 · LANES."""
    T, K, G, H = queries.q.shape
    partitions = partitions_of(T, len(keys.k), K, workers)
    rows = T * K * partitions
    partials = Partials(np.empty((rows, G, 2), np.float32), np.empty((rows, G, H), np.float32))
    parallel_for(_attend_partitions, workers, (queries, keys, scoring, partitions, partials))
    merge_partitions(partials, out.reshape((T * K, G, H)))
