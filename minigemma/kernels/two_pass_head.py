"""Kernels of formulas/two_pass_head.py: the coarse copy of a head, and the logits of a few tokens in two passes.

    1  the definition: both products in float32
    2  the coarse product in 8-bit integers, as int4's; columns of two bits are multiplied without unpacking them, and x
       is copied into all lanes once for all rows
    3  one parallel region for both passes: 128 tasks each, since likely tokens lie together, with a barrier between
    4  rows of the second pass lie far apart: two at a time, with a prefetch four rows ahead
    5  of several tokens each meets the same sixteen rows, which then lie in the first-level cache

On the 270M in int8 (Zen 4, two cores) a token takes 5.8 ms with it and 9.4 without: `minigemma bench`.
"""

from typing import NamedTuple

import numpy as np
from numba import float32
from numpy.typing import NDArray

from ..arrays import F32
from ..layouts.int4 import BLOCK, SIDE
from .compiler import jit, jit_inner
from .matvec import dot
from .pairs import pairs_of_task, stream_of
from .parallel import barrier, chunk, new_counters, next_task, parallel, parallel_for
from .prepare import prepare, round_blocks, round_whole
from .simd.cpu import LANES, STREAMS
from .simd.interleaved import SCALES, add_int2_block, add_int4_block, row_sums_zeros, store_row_sums
from .simd.memory import load, load_half, prefetch_ahead, store_half
from .simd.vectors import fma, max_lanes, sum_lanes, zeros
from .weights import SYMMETRIC_WORDS as WORDS
from .weights import row_length, widen_row

DEVIATIONS = 2.0  # above the mean of coarse logits: from here on a row is read in full
COARSE = 64  # columns of a block in two bits
STEP = 0.625  # d / mean |w| of a block: the smallest error for normally distributed weights
ROWS_AHEAD = 4  # likely rows that are prefetched
TASKS = 128  # parts of the vocabulary: likely tokens lie together


class Coarse(NamedTuple):
    """The coarse copy: its words, and how many columns have four bits."""

    words: NDArray[np.uint32]
    fine: int


class Rounded(NamedTuple):
    """x [T, D] in 8 bits, columns in the order of the coarse copy; `spread` has those of two bits, each four in every
    lane.
    """

    whole: NDArray[np.int8]  # [T, D]
    spread: NDArray[np.int8]  # [T, …]
    scales: F32  # [T, …]: of each block the scale and Σ x, times what takes the place of a minimum: -8 d or -3 d


class Shared(NamedTuple):
    """Σ z and Σ z² of each task of the first pass and each token, and the counters of both passes."""

    sums: F32  # [TASKS, T, 2]
    counters: NDArray[np.int64]


# ---- making it


@jit_inner
def _scale(w, first, count):
    """d of a block, before rounding: BLOCK columns in four bits, or COARSE columns in two."""
    high, low, total = float32(0), float32(0), float32(0)
    if count == COARSE:
        for k in range(first, first + COARSE):
            total += abs(w[k])
        return total * float32(STEP / COARSE)
    for k in range(first, first + BLOCK):
        high, low = w[k] if w[k] > high else high, w[k] if w[k] < low else low
    return (high if high > -low else low) / float32(-8)


@jit_inner
def _pack_row(w, q, fine, at, r, scales, words):
    """Packs a row w [D] as row r of the blocks that begin at words[at]; `scales` is `words` as bytes, q [COARSE]."""
    quads, first = q.view(np.uint32), 0
    while first < w.size:
        count = BLOCK if first < fine else COARSE
        store_half(scales, 4 * at + 2 * r, _scale(w, first, count))
        d, bits, per_word = load_half(scales, 4 * at + 2 * r), 4 * BLOCK // count, count // 16
        up, zero, top = float32(1 if count == BLOCK else 0.5), float32(8.5 if count == BLOCK else 2), (1 << bits) - 1
        up = up / d if d != 0 else float32(0)
        for k in range(count):
            q[k] = min(max(np.int32(w[first + k] * up + zero), 0), top)
        for word in range(4):
            packed = np.uint32(0)
            for i in range(per_word):
                packed |= quads[word * per_word + i] << np.uint32(bits * i)
            words[at + SCALES + word * SIDE + r] = packed
        at, first = at + WORDS, first + count


@parallel
def _pack_some(worker, workers, weight, order, fine, scales, words):
    D = order.size
    wide, ordered, q = np.empty(D, np.float32), np.empty(D, np.float32), np.empty(COARSE, np.uint8)
    size = (fine // BLOCK + (D - fine) // COARSE) * WORDS  # of sixteen rows
    for group in chunk(worker, workers, weight.rows // SIDE):
        for r in range(SIDE):
            widen_row(weight, group * SIDE + r, 0, D, wide, 0)
            for k in range(D):
                ordered[k] = wide[order[k]]
            _pack_row(ordered, q, fine, group * size, r, scales, words)


def pack(workers, weight, order, fine, out):
    """out [R/16, blocks, 288] = the rows in few bits: `in_few_bits`."""
    scales = out.reshape(-1)
    _pack_some(workers, weight, order, fine, scales, scales.view(np.uint32))


# ---- the first pass


@jit_inner
def _coarse_rows(x, coarse, groups, y):
    """y[:, 16 · group :] = the coarse logits of groups of sixteen rows, two groups at a time (pairs.py)."""
    (words, columns), (T, V), out = coarse, y.shape, y.reshape(-1)
    whole, spread, scales = x.whole.reshape(-1), x.spread.reshape(-1), x.scales.reshape(-1)
    D, fine, blocks = whole.size // T, columns // BLOCK, scales.size // (2 * T)
    for group in range(groups.first, groups.first + groups.length):
        other = stream_of(groups, group)
        for t in range(T):
            one, two, at, there = row_sums_zeros(), row_sums_zeros(), group * blocks * WORDS, other * blocks * WORDS
            for block in range(blocks):
                for line in range(0, WORDS if t == 0 else 0, 16):
                    prefetch_ahead(words, at + line)
                    if STREAMS == 2:
                        prefetch_ahead(words, there + line)
                own = 2 * (t * blocks + block)
                scale, total = scales[own], scales[own + 1]
                if block < fine:
                    k = t * D + block * BLOCK
                    one = add_int4_block(one, words, at, 0, whole, k, scale, total)
                    if STREAMS == 2:
                        two = add_int4_block(two, words, there, 0, whole, k, scale, total)
                else:
                    k = (t * (D - columns) + (block - fine) * COARSE) * LANES
                    one = add_int2_block(one, words, at, spread, k, scale, total)
                    if STREAMS == 2:
                        two = add_int2_block(two, words, there, spread, k, scale, total)
                at, there = at + WORDS, there + WORDS
            store_row_sums(one, out, t * V + group * SIDE)
            if STREAMS == 2:
                store_row_sums(two, out, t * V + other * SIDE)


@jit_inner
def _sums(logits, first, last):
    """Σ z and Σ z² of logits[first : last], whole sixteens."""
    total, squares = zeros(), zeros()
    for v in range(first, last, LANES):
        z = load(logits, v)
        total, squares = total + z, fma(z, z, squares)
    return sum_lanes(total), sum_lanes(squares)


@jit_inner
def _lowest(sums, t, V):
    """The threshold of a token's likely coarse logits, from the sums of all tasks."""
    total, squares = 0.0, 0.0
    for i in range(TASKS):
        total, squares = total + sums[i, t, 0], squares + sums[i, t, 1]
    mean = total / V
    return np.float32(mean + DEVIATIONS * np.sqrt(max(squares / V - mean * mean, 0.0)))


# ---- the second pass


@jit_inner
def _refine_rows(x, weight, groups, lowest, found, logits, own):
    """Replaces a token's coarse logits above `lowest`, in these groups of rows, by the exact products; its logits begin
    at logits[own].
    """
    count, length = 0, row_length(weight)
    for first in range(groups.start * SIDE, groups.stop * SIDE, LANES):
        if max_lanes(load(logits, own + first)) > lowest:
            for v in range(first, first + LANES):
                found[count] = v
                count += logits[own + v] > lowest
    for i in range(0, count, 2):
        v, w = found[i], found[min(i + 1, count - 1)]
        after, beyond = found[min(i + ROWS_AHEAD, count - 1)], found[min(i + ROWS_AHEAD + 1, count - 1)]
        one, two = dot(weight, v * length, w * length, x.numbers, after * length, beyond * length)
        logits[own + v], logits[own + w] = one * x.scales[0], two * x.scales[0]


@jit_inner
def _likely_some(worker, workers, rounded, coarse, x, weight, shared, y):
    (T, V), done, logits, (sums, counters) = y.shape, 0, y.reshape(-1), shared
    found = np.empty((V // SIDE // TASKS + 1) * SIDE + 1, np.int64)
    task = next_task(counters, 0, worker, workers, TASKS)
    while task >= 0:
        groups = chunk(task, TASKS, V // SIDE)
        _coarse_rows(rounded, coarse, pairs_of_task(task, TASKS, 1, V // SIDE, True), y)
        for t in range(T):
            sums[task, t, 0], sums[task, t, 1] = _sums(logits, t * V + groups.start * SIDE, t * V + groups.stop * SIDE)
        done += 1
        task = next_task(counters, 0, worker, workers, TASKS)
    barrier(counters, 0, done, workers, TASKS, weight.data, 0)
    task = next_task(counters, 1, worker, workers, TASKS)
    while task >= 0:
        for t in range(T):
            own = prepare(x[t : t + 1], weight)
            _refine_rows(own, weight, chunk(task, TASKS, V // SIDE), _lowest(sums, t, V), found, logits, t * V)
        task = next_task(counters, 1, worker, workers, TASKS)


@jit_inner
def _round(ordered, fine):
    """x [T, D] in the coarse copy's order as `Rounded`."""
    (T, D), side = ordered.shape, fine // BLOCK
    blocks = side + (D - fine) // COARSE
    whole, scales = np.empty((T, D), np.int8), np.empty((T, 2 * blocks), np.float32)
    spread = np.empty((T, (D - fine) // 4 * LANES), np.uint32)
    for t in range(T):
        own, its = whole[t], scales[t]
        round_blocks(ordered[t], 0, side, own, its, -8)
        for block in range(side, blocks):
            k = fine + (block - side) * COARSE
            scale, total = round_whole(ordered[t], k, COARSE, 127, own, k, BLOCK)
            its[2 * block], its[2 * block + 1] = scale, float32(-3) * total * scale
        fours = own.view(np.uint32)
        for i in range(spread.shape[1]):
            spread[t, i] = fours[fine // 4 + i // LANES]
    return Rounded(whole, spread.view(np.int8), scales)


@jit
def likely_logits(workers, x, order, coarse, weight, y):
    """Writes the logits y [T, V] of x [T, D]; False, and nothing, if x has an infinity or NaN, which integers hide."""
    T, D = x.shape
    ordered = np.empty((T, D), np.float32)
    for t in range(T):
        for k in range(D):
            ordered[t, k] = x[t, order[k]]
            if not np.isfinite(ordered[t, k]):
                return False
    rounded = _round(ordered, coarse.fine)
    shared = Shared(np.empty((TASKS, T, 2), np.float32), new_counters(2, workers))
    parallel_for(_likely_some, workers, (rounded, coarse, x, weight, shared, y))
    return True
