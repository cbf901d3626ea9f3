"""Attention: every query reads a weighted mean of the values whose keys it may see (Vaswani et al. 2017, §3.2).

    score[n, t, s] = cap( q[t, n] · k[s, n // G] · scale )          scale: query_pre_attn_scalar^-1/2; cap: softcap.py
    seen[t, s]     = position_s ≤ until_t and position_t - position_s < window
    probs[n, t, :] = softmax over seen keys of score[n, t, :]
    out[t, n]      = Σ_s probs[n, t, s] · v[s, n // G]

Grouped queries (Ainslie et al. 2023): G = N / K neighbouring query heads share a key/value head; G = 1 is multi-head
attention, K = 1 multi-query attention.

until_t is position_t itself: a text is read forward. Only the tokens of an image see each other whole, so theirs is the
last position of their image; and patches in the image encoder all see all. Local layers have a window, global ones
none.

Keys may lie in any order: each has its absolute position, and `visible` alone decides. Keys and values are float32, or
bf16 as uint16.
"""

from __future__ import annotations

import numpy as np
from numba import float32, get_num_threads

from ..arrays import F32, I32, U16, Bool, widen_bf16
from ..definition import definition, require
from ..kernels.compiler import jit, jit_inner
from ..kernels.parallel import chunk, parallel_for
from ..kernels.simd import (
    LANES,
    ROWS,
    STREAMS,
    as_two,
    exp,
    fma,
    from_two,
    load,
    load_even_odd,
    load_one,
    maximum,
    prefetch,
    splat,
    store,
    store_sums,
    tile_add_outer,
    tile_load,
    tile_store,
    tile_zeros,
    where_less,
    zeros,
)
from ..kernels.views import new_array, new_zeros, reshaped
from .softcap import soft_cap, soft_cap_lanes

EVERYTHING = 2**30  # a window wider than any position: a global layer, for kernels
LOWEST = np.float32(-1e30)  # the maximum of no scores at all; finite, so that differences of two stay numbers


def visible(query: I32, until: I32, key: I32, window: int | None) -> Bool:
    """May the token at position `query` look at the token at position `key`?

        key ≤ until and query - key < window          [Gemma 2 §2 "Local sliding window", Gemma 3 §2]

    query, until [T] int32, key [S] int32 → [T, S] bool. Without a window (None) every earlier key is seen. A key
    exactly `window` back is out of sight; RecurrentGemma's code shows one key more, so its window here is its W + 1.
    """
    distance = query[:, None] - key[None, :]
    return (key <= until[:, None]) & (distance < (EVERYTHING if window is None else window))


def softmax(x: F32) -> F32:
    """exp(x) / Σ exp(x) over the last axis, kept in range by taking the maximum off first."""
    e = np.exp(x - x.max(axis=-1, keepdims=True))
    return e / e.sum(axis=-1, keepdims=True)


def attention_scores(q: F32, k: F32 | U16, scale: float, cap: float | None) -> F32:
    """cap(q · k · scale), before the mask      [Vaswani et al. 2017 eq. 1; Gemma 2 §2]

    q [T, N, H] float32, k [S, K, H] float32 or bf16 → [N, T, S] float32
    """
    T, N, H = q.shape
    grouped = q.reshape(T, k.shape[1], N // k.shape[1], H)
    scores = np.einsum("TKGH,SKH->KGTS", grouped, widen_bf16(k), optimize=True).reshape(N, T, len(k)) * np.float32(
        scale
    )
    return scores if cap is None else soft_cap(scores, cap)


def attention_probs(scores: F32, query_positions: I32, until: I32, key_positions: I32, window: int | None) -> F32:
    """Softmax of the scores of the keys that each query sees: scores [N, T, S] → [N, T, S] float32."""
    seen = visible(query_positions, until, key_positions, window)
    return softmax(np.where(seen, scores, -np.inf).astype(np.float32))


@definition
def attention(
    q: F32,
    k: F32 | U16,
    v: F32 | U16,
    query_positions: I32,
    until: I32,
    key_positions: I32,
    window: int | None,
    scale: float,
    cap: float | None,
) -> F32:
    """softmax(cap(q kᵀ · scale) where visible) v      [Vaswani et al. 2017 eq. 1]

    q [T, N, H] float32, k [S, K, H] and v [S, K, H] float32 or bf16, query_positions [T], until [T] and
    key_positions [S] int32 → [T, N, H] float32
    """
    out, G = np.empty_like(q), q.shape[1] // k.shape[1]
    for i in range(
        k.shape[1]
    ):  # one key head at a time: the scores of all are a gigabyte for an image of 4,096 patches
        group = slice(i * G, (i + 1) * G)
        scores = attention_scores(q[:, group], k[:, i : i + 1], scale, cap)
        probs = attention_probs(scores, query_positions, until, key_positions, window)
        out[:, group] = np.einsum("GTS,SH->TGH", probs, widen_bf16(v[:, i]), optimize=True)
    return out


# ---- kernels. Both walk the keys in blocks and keep, for each query, the maximum so far, the sum of exponentials and
# ---- the weighted sum of values; a new maximum rescales what was summed (Milakov & Gimelshein 2018, "online softmax").

FEW_QUERIES, FAR = 8, 1024  # queries that still count as decoding; twice as many, before so many keys
FEW_BLOCK = 64  # keys at a time while decoding: pairs from two places
HEADS = 4  # query heads that share what is loaded of a key: eight sums, of two keys, in registers
AHEAD = 8  # keys that are read ahead into the second-level cache
AT_ONCE = 2  # pairs of values that are added up together
SPLIT = 32  # keys, of one key head each, that a thread takes at least while decoding
MANY_BLOCK = 8 * ROWS  # keys at a time otherwise
COLUMNS = 8 * 2 * LANES  # queries that share a block of widened keys


def are_few(queries: int, before: int) -> bool:
    """Do so many queries count as decoding, with so many keys before theirs? Each of them reads all keys."""
    return queries <= (FEW_QUERIES if before > FAR else 2 * FEW_QUERIES)


@jit_inner
def parts_of(queries, keys, heads, workers):
    """Into how many parts the keys of each query are cut, so that all threads have work: keys of so many heads."""
    return max(1, min((workers + queries - 1) // queries, keys * heads // SPLIT))


@jit_inner
def _four(first, last, size):
    """Where `size` numbers of each of HEADS heads begin, from `first` on; behind the last one it stands itself."""
    return first * size, min(first + 1, last) * size, min(first + 2, last) * size, min(first + 3, last) * size


@jit_inner
def _dots(k, at, other, q, heads, H, ahead, scores, to):
    """scores[to : to + 2 · HEADS] = Σ_h k[at + h] · q[i + h] for i in `heads`, then the same of the key at `other`; k
    float32 or bf16, and q in the order of `load_even_odd`. Prefetches what lies `ahead` of the keys. H is a multiple
    of 2 · LANES.
    """
    (i, j, m, n), (a, b, c, d), (e, f, g, o) = (
        heads,
        (zeros(), zeros(), zeros(), zeros()),
        (zeros(), zeros(), zeros(), zeros()),
    )
    for h in range(0, H, 2 * LANES):
        prefetch(k, at + ahead + h)
        prefetch(k, other + ahead + h)
        (x, y), (u, v) = load_even_odd(k, at + h), load_even_odd(k, other + h)
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
def mask_block(query, until, keys, window, pairs, last, hidden):
    """hidden [FEW_BLOCK · HEADS]: 0 for each head of a key that is seen, -inf for others and where there is none."""
    first, apart, each, count = pairs
    for s in range(FEW_BLOCK):
        key = first + s // 2 * each + s % 2 * apart
        seen = s < 2 * count and key < last and keys[key] <= until and query - keys[key] < window
        for i in range(s * HEADS, s * HEADS + HEADS):
            hidden[i] = 0 if seen else -np.inf


@jit_inner
def online_softmax_update(scores, hidden, scale, cap, state, total, first, heads, H, room):
    """One block, as many heads as share it, the lanes of scores [FEW_BLOCK · HEADS] in turn: products of q and k become
    exponentials. The maximum and sum, `state`, and the weighted values, `total`, of the `heads` from `first` on are
    brought up to date. `room` has 3 · LANES numbers.
    """
    for i in range(LANES):
        room[i] = state[2 * (first + min(i % HEADS, heads - 1))]
    before = load(room, 0)
    highest = before
    for s in range(0, FEW_BLOCK * HEADS, LANES):
        x = load(scores, s) * splat(scale)
        if cap > 0:
            x = soft_cap_lanes(x, cap)
        shown = load(hidden, s)
        x = where_less(shown, zeros(), shown, x)
        store(scores, s, x)
        highest = maximum(highest, x)
    store(room, 0, highest)
    for i in range(LANES):
        room[LANES + i] = room[i]
        for j in range(i % HEADS, LANES, HEADS):  # a head's other lanes have other keys
            room[LANES + i] = max(room[LANES + i], room[j])
    top, summed = load(room, LANES), zeros()
    for s in range(0, FEW_BLOCK * HEADS, LANES):
        p = exp(load(scores, s) - top)
        store(scores, s, p)
        summed = summed + p
    store(room, 0, exp(before - top))
    store(room, 2 * LANES, summed)
    for i in range(heads):
        here, shrink, added = first + i, room[i], np.float32(0)
        for j in range(i, LANES, HEADS):
            added += room[2 * LANES + j]
        state[2 * here], state[2 * here + 1] = room[LANES + i], state[2 * here + 1] * shrink + added
        for h in range(here * H, here * H + H if shrink < 1 else here * H, LANES):
            store(total, h, load(total, h) * splat(shrink))


@jit_inner
def _add_values(scores, p, v, at, apart, each, count, end, total, heads, H):
    """total[i : i + H] += Σ_s scores[p + …] · v[at + s · each : … + H], and the same of the value `apart` from it, s =
    0 … count - 1, for i in `heads`; total in the order of `load_even_odd`. A value behind the last one, which begins at
    `end`, is that one, with a score of 0. What comes two times as far on is asked for.
    """
    (i, j, m, n), ahead = heads, 2 * count * each
    for h in range(0, H, 2 * LANES):
        a, b = load(total, i + h), load(total, i + h + LANES)
        c, d = load(total, j + h), load(total, j + h + LANES)
        e, f = load(total, m + h), load(total, m + h + LANES)
        g, o = load(total, n + h), load(total, n + h + LANES)
        for s in range(2 * count):
            row, its = min(at + s // 2 * each + s % 2 * apart, end) + h, p + s * HEADS
            prefetch(v, row + ahead)
            x, y = load_even_odd(v, row)
            share = splat(load_one(scores, its))
            a, b = fma(share, x, a), fma(share, y, b)
            share = splat(load_one(scores, its + 1))
            c, d = fma(share, x, c), fma(share, y, d)
            share = splat(load_one(scores, its + 2))
            e, f = fma(share, x, e), fma(share, y, f)
            share = splat(load_one(scores, its + 3))
            g, o = fma(share, x, g), fma(share, y, o)
        store(total, i + h, a)
        store(total, i + h + LANES, b)
        store(total, j + h, c)
        store(total, j + h + LANES, d)
        store(total, m + h, e)
        store(total, m + h + LANES, f)
        store(total, n + h, g)
        store(total, n + h + LANES, o)


@jit_inner
def _few_block(
    q, k, v, K, G, H, query, until, keys, window, scale, cap, pairs, last, task, parts, state, total, scores
):
    """One query position, all its heads, q [K · G · H], and a block of keys, whose row s of k and v [K · H] begins at
    s · K · H: `pairs` are the first key, how far behind each its partner lies, how far the next one, and how many
    there are; from `last` on are none. Heads of a group go in fours; who has no partner is its own. state and total are
    those of `attend_partition`, in one axis; task is the first group's row of them, `parts` before the next one's.
    """
    (first, apart, each, count), step, fours, size = pairs, K * H, (G + HEADS - 1) // HEADS, FEW_BLOCK * HEADS
    hidden, room = scores[K * fours * size :], scores[K * fours * size + size :]
    mask_block(query, until, keys, window, pairs, last, hidden)
    for s in range(count):
        here = first + s * each
        other = min(here + apart, last - 1)
        for head in range(K):
            for i in range(fours):
                g, to = head * G + i * HEADS, (head * fours + i) * size + 2 * s * HEADS
                places = _four(g, head * G + G - 1, H)
                _dots(k, here * step + head * H, other * step + head * H, q, places, H, AHEAD * step, scores, to)
    for head in range(K):
        for i in range(fours):
            at, here = (head * fours + i) * size, (task + head * parts) * G + i * HEADS
            heads = min(HEADS, G - i * HEADS)
            online_softmax_update(scores[at : at + size], hidden, scale, cap, state, total, here, heads, H, room)
    for s in range(0, count, AT_ONCE):
        here, several = first + s * each, min(AT_ONCE, count - s)
        for head in range(K):
            at, end, group = here * step + head * H, (last - 1) * step + head * H, (task + head * parts) * G
            for i in range(fours):
                places, p = _four(group + i * HEADS, group + G - 1, H), (head * fours + i) * size + 2 * s * HEADS
                _add_values(scores, p, v, at, apart * step, each * step, several, end, total, places, H)


@jit_inner
def attend_partition(q, k, v, query_positions, until, keys, window, scale, cap, parts, task, states, totals):
    """One query position, one part of the keys; `task` counts positions and parts."""
    K, G, H = q.shape[1:]
    t, part = task // parts, task % parts
    size = (len(k) + parts - 1) // parts
    flat_k, flat_v = reshaped(k, k.size), reshaped(v, v.size)
    state, total = reshaped(states, states.size), reshaped(totals, totals.size)
    given, flat_q = reshaped(q, q.size), new_array(K * G * H, np.float32)
    for h in range(0, K * G * H, 2 * LANES):
        a, b = as_two(flat_k, load(given, t * K * G * H + h), load(given, t * K * G * H + h + LANES))
        store(flat_q, h, a)
        store(flat_q, h + LANES, b)
    here, last = t * K * parts + part, min(len(k), part * size + size)
    scores = new_zeros((K * ((G + HEADS - 1) // HEADS) + 1) * FEW_BLOCK * HEADS + 3 * LANES, np.float32)
    for i in range(here, here + K * parts, parts):
        for g in range(2 * i * G, 2 * (i + 1) * G, 2):
            state[g], state[g + 1] = LOWEST, 0
        for h in range(i * G * H, (i + 1) * G * H, LANES):
            store(total, h, zeros())
    first, position = part * size, query_positions[t]
    count = (max(0, last - first) + 1) // 2
    apart, each = (count, 1) if STREAMS == 2 else (1, 2)  # the halves of the part side by side, or neighbours
    for s in range(0, count, FEW_BLOCK // 2):
        pairs = first + s * each, apart, each, min(FEW_BLOCK // 2, count - s)
        _few_block(
            flat_q,
            flat_k,
            flat_v,
            K,
            G,
            H,
            position,
            until[t],
            keys,
            window,
            scale,
            cap,
            pairs,
            last,
            here,
            parts,
            state,
            total,
            scores,
        )
    for i in range(here, here + K * parts, parts):
        for h in range(i * G * H, (i + 1) * G * H, 2 * LANES):
            a, b = from_two(flat_k, load(total, h), load(total, h + LANES))
            store(total, h, a)
            store(total, h + LANES, b)


@jit_inner
def join(states, totals, out):
    """Put the parts of each group together.

    states [groups · parts, G, 2], totals [groups · parts, G, H] → out [groups, G, H]
    """
    (groups, G, H), parts = out.shape, len(states) // len(out)
    state, total, joined = reshaped(states, states.size), reshaped(totals, totals.size), reshaped(out, out.size)
    for i in range(groups * G):
        first, top, summed = i // G * parts * G + i % G, LOWEST, np.float32(0)
        for row in range(first, first + parts * G, G):
            top = max(top, state[2 * row])
        for row in range(first, first + parts * G, G):
            share = np.exp(state[2 * row] - top)
            summed += share * state[2 * row + 1]
            for h in range(H):
                before = joined[i * H + h] if row > first else np.float32(0)
                joined[i * H + h] = before + share * total[row * H + h]
        for h in range(i * H, i * H + H):
            joined[h] /= summed


@jit_inner
def _few_some(worker, workers, q, k, v, query_positions, until, keys, window, scale, cap, parts, states, totals):
    for task in chunk(worker, workers, len(q) * parts):
        attend_partition(q, k, v, query_positions, until, keys, window, scale, cap, parts, task, states, totals)


@jit
def attention_decode(workers, q, k, v, query_positions, until, keys, window, scale, cap, out):
    """Decoding: lanes are the head's numbers. The keys are cut in parts, shared out among threads and put together.

    q and out [T, K, G, H], k and v [S, K, H], positions [T], [T] and [S]
    """
    T, K, G, H = q.shape
    parts = parts_of(T, len(k), K, workers)
    states, totals = new_array((T * K * parts, G, 2), np.float32), new_array((T * K * parts, G, H), np.float32)
    arguments = q, k, v, query_positions, until, keys, window, scale, cap, parts, states, totals
    parallel_for(_few_some, workers, arguments)
    join(states, totals, reshaped(out, (T * K, G, H)))


@jit_inner
def _widen_keys(rows, head, first, last, padded, out):
    """rows[first : last, head] of [S, K, H] float32 or bf16 → out [last - first, padded] float32, zeros elsewhere."""
    H = rows.shape[2]
    out[:] = 0
    for s in range(first, last):
        row, start = rows[s, head], (s - first) * padded
        for h in range(0, H // LANES * LANES, LANES):
            store(out, start + h, load(row, h))
        for h in range(H // LANES * LANES, H):
            out[start + h] = load_one(row, h)


@jit_inner
def _many_block(packed, keys, values, H, padded, where, positions, until, window, scale, cap, scores, state, totals):
    """2 · LANES queries as lanes: scores = keys · packed, online softmax down the keys, totals += valuesᵀ · probs."""
    lanes = 2 * LANES
    S = len(where)
    for s in range(0, S, ROWS):
        tile = tile_zeros()
        for h in range(H):
            tile = tile_add_outer(tile, keys, s * padded + h, padded, packed, h * lanes)
        tile_store(tile, scores, s * lanes, lanes)
    hidden, width, multiplier = splat(float32(-np.inf)), splat(window), splat(scale)
    for half in range(0, lanes, LANES):
        query, to, top = load(positions, half), load(until, half), load(state, half)
        before = top
        for s in range(S):
            x = load(scores, s * lanes + half) * multiplier
            if cap > 0:
                x = soft_cap_lanes(x, cap)
            key = splat(where[s])
            x = where_less(to, key, hidden, where_less(query - key, width, x, hidden))
            top = maximum(top, x)
            store(scores, s * lanes + half, x)
        summed = zeros()
        for s in range(S):
            p = exp(load(scores, s * lanes + half) - top)
            summed = summed + p
            store(scores, s * lanes + half, p)
        shrink = exp(before - top)
        store(state, half, top)
        store(state, lanes + half, fma(load(state, lanes + half), shrink, summed))
        for h in range(H):
            store(totals, h * lanes + half, load(totals, h * lanes + half) * shrink)
    for h in range(0, H, ROWS):
        tile = tile_load(totals, h * lanes, lanes)
        for s in range(S):
            tile = tile_add_outer(tile, values, s * padded + h, 1, scores, s * lanes)
        tile_store(tile, totals, h * lanes, lanes)


@jit_inner
def _many_columns(q, k, v, head, query_positions, until, key_positions, window, scale, cap, first, last, out):
    """Columns first … last - 1 of one group: column c is query c // G, head c % G.

    q, out [T, K, G, H]; k, v [S, K, H]
    """
    G, H = q.shape[2:]
    lanes = 2 * LANES
    tiles = (last - first + lanes - 1) // lanes
    padded = (H + ROWS - 1) // ROWS * ROWS
    packed = new_zeros((tiles, H * lanes), np.float32)
    positions, ends = new_array((tiles, lanes), np.float32), new_array((tiles, lanes), np.float32)
    for tile in range(tiles):
        for lane in range(lanes):
            positions[tile, lane] = ends[tile, lane] = LOWEST  # a column of padding sees nothing
    state = new_zeros((tiles, 2 * lanes), np.float32)  # maxima, then sums
    totals = new_zeros((tiles, padded * lanes), np.float32)
    keys, values = new_array(MANY_BLOCK * padded, np.float32), new_array(MANY_BLOCK * padded, np.float32)
    scores, where = new_array(MANY_BLOCK * lanes, np.float32), new_array(MANY_BLOCK, np.float32)
    for c in range(first, last):
        tile, lane = (c - first) // lanes, (c - first) % lanes
        positions[tile, lane], ends[tile, lane] = query_positions[c // G], until[c // G]
        state[tile, lane] = LOWEST
        for h in range(H):
            packed[tile, h * lanes + lane] = q[c // G, head, c % G, h]
    newest, oldest = until[(last - 1) // G], query_positions[first // G]
    for s in range(0, len(k), MANY_BLOCK):
        until = min(s + MANY_BLOCK, len(k))
        first_key, last_key = key_positions[s], key_positions[s]
        for i in range(s, until):
            where[i - s] = key_positions[i]
            first_key, last_key = min(first_key, key_positions[i]), max(last_key, key_positions[i])
        if first_key > newest or last_key <= oldest - window:
            continue  # all in the future, or all out of the window
        _widen_keys(k, head, s, until, padded, keys)
        _widen_keys(v, head, s, until, padded, values)
        for i in range(tiles):
            _many_block(
                packed[i],
                keys,
                values,
                H,
                padded,
                where[: until - s],
                positions[i],
                ends[i],
                window,
                scale,
                cap,
                scores,
                state[i],
                totals[i],
            )
    for c in range(first, last):
        tile, lane = (c - first) // lanes, (c - first) % lanes
        summed = state[tile, lanes + lane]
        for h in range(H):
            out[c // G, head, c % G, h] = totals[tile, h * lanes + lane] / summed


@jit_inner
def _many_chunks(worker, workers, q, k, v, query_positions, until, keys, window, scale, cap, out):
    """Every workers-th chunk of columns: later ones see more keys, so that ranges would be unfair."""
    columns = q.shape[0] * q.shape[2]
    chunks = (columns + COLUMNS - 1) // COLUMNS
    for task in range(worker, q.shape[1] * chunks, workers):
        head, first = task % q.shape[1], task // q.shape[1] * COLUMNS
        last = min(first + COLUMNS, columns)
        _many_columns(q, k, v, head, query_positions, until, keys, window, scale, cap, first, last, out)


@jit
def attention_prefill(workers, q, k, v, query_positions, until, keys, window, scale, cap, out):
    """Prompts: lanes are queries, so that both products run as tiles. Query positions must rise, `until` not fall.

    q and out [T, K, G, H], k and v [S, K, H], positions [T], [T] and [S]
    """
    parallel_for(_many_chunks, workers, (q, k, v, query_positions, until, keys, window, scale, cap, out))


@attention.kernel
def _attention(q, k, v, query_positions, until, key_positions, window, scale, cap):
    fits = q.ndim == 3 and k.ndim == 3 and k.shape == v.shape and k.shape[2] == q.shape[2] and len(k) > 0
    fits = fits and q.shape[1] % k.shape[1] == 0 and key_positions.shape == k.shape[:1]
    fits = fits and query_positions.shape == until.shape == q.shape[:1]
    require(fits, "attention", q, k, v, query_positions, until, key_positions)
    (T, N, H), K = q.shape, k.shape[1]
    attend = attention_decode if are_few(T, len(k) - T) and H % (2 * LANES) == 0 else attention_prefill
    grouped, out = np.ascontiguousarray(q).reshape(T, K, N // K, H), np.empty((T, K, N // K, H), np.float32)
    limits = np.float32(window or EVERYTHING), np.float32(scale), np.float32(cap or 0)
    attend(get_num_threads(), grouped, k, v, query_positions, until, key_positions, *limits, out)
    return out.reshape(q.shape)
