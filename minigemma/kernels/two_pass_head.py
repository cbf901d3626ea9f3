"""Kernels of formulas/two_pass_head.py: the coarse copy of a head, and the logits of one token in two passes.

    1  the definition: both products in float32
    2  the coarse product in 8-bit integers, as int4's; columns of two bits are multiplied without unpacking them, and x
       is copied into all lanes once for all rows
    3  one parallel region for both passes: 128 tasks each, since likely tokens lie together, with a barrier between
    4  rows of the second pass lie far apart: two at a time, with a prefetch four rows ahead

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
    """x in 8 bits, columns in the order of the coarse copy; `spread` has those of two bits, each four in every lane."""

    whole: NDArray[np.int8]
    spread: NDArray[np.int8]
    scales: F32  # of each block the scale and Σ x, times what takes the place of a minimum: -8 d or -3 d


class Shared(NamedTuple):
    """Σ z and Σ z² of each task of the first pass, and the counters of both passes."""

    sums: F32  # [TASKS, 2]
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
    """y[0, 16 · group :] = the coarse logits of groups of sixteen rows, two groups at a time (pairs.py)."""
    (whole, spread, scales), words, fine, out = x, coarse.words, coarse.fine // BLOCK, y.reshape(-1)
    blocks = scales.size // 2
    for group in range(groups.first, groups.first + groups.length):
        other = stream_of(groups, group)
        one, two, at, there = row_sums_zeros(), row_sums_zeros(), group * blocks * WORDS, other * blocks * WORDS
        for block in range(blocks):
            for line in range(0, WORDS, 16):
                prefetch_ahead(words, at + line)
                if STREAMS == 2:
                    prefetch_ahead(words, there + line)
            scale, total, k = scales[2 * block], scales[2 * block + 1], (block - fine) * COARSE * LANES
            if block < fine:
                one = add_int4_block(one, words, at, 0, whole, block * BLOCK, scale, total)
                if STREAMS == 2:
                    two = add_int4_block(two, words, there, 0, whole, block * BLOCK, scale, total)
            else:
                one = add_int2_block(one, words, at, spread, k, scale, total)
                if STREAMS == 2:
                    two = add_int2_block(two, words, there, spread, k, scale, total)
            at, there = at + WORDS, there + WORDS
        store_row_sums(one, out, group * SIDE)
        if STREAMS == 2:
            store_row_sums(two, out, other * SIDE)


@jit_inner
def _sums(logits, first, last):
    """Σ z and Σ z² of logits[first : last], whole sixteens."""
    total, squares = zeros(), zeros()
    for v in range(first, last, LANES):
        z = load(logits, v)
        total, squares = total + z, fma(z, z, squares)
    return sum_lanes(total), sum_lanes(squares)


@jit_inner
def _lowest(sums, V):
    """The threshold of likely coarse logits, from the sums of all tasks."""
    total, squares = 0.0, 0.0
    for i in range(TASKS):
        total, squares = total + sums[i, 0], squares + sums[i, 1]
    mean = total / V
    return np.float32(mean + DEVIATIONS * np.sqrt(max(squares / V - mean * mean, 0.0)))


# ---- the second pass


@jit_inner
def _refine_rows(x, weight, groups, lowest, found, logits):
    """Replaces coarse logits above `lowest`, in these groups of rows, by the exact products."""
    count, length = 0, row_length(weight)
    for first in range(groups.start * SIDE, groups.stop * SIDE, LANES):
        if max_lanes(load(logits, first)) > lowest:
            for v in range(first, first + LANES):
                found[count] = v
                count += logits[v] > lowest
    for i in range(0, count, 2):
        v, w = found[i], found[min(i + 1, count - 1)]
        after, beyond = found[min(i + ROWS_AHEAD, count - 1)], found[min(i + ROWS_AHEAD + 1, count - 1)]
        one, two = dot(weight, v * length, w * length, x.numbers, after * length, beyond * length)
        logits[v], logits[w] = one * x.scales[0], two * x.scales[0]


@jit_inner
def _likely_some(worker, workers, rounded, coarse, x, weight, shared, y):
    V, done, logits, (sums, counters) = y.shape[1], 0, y.reshape(-1), shared
    found = np.empty((V // SIDE // TASKS + 1) * SIDE + 1, np.int64)
    task = next_task(counters, 0, worker, workers, TASKS)
    while task >= 0:
        groups = chunk(task, TASKS, V // SIDE)
        _coarse_rows(rounded, coarse, pairs_of_task(task, TASKS, 1, V // SIDE, True), y)
        sums[task, 0], sums[task, 1] = _sums(logits, groups.start * SIDE, groups.stop * SIDE)
        done += 1
        task = next_task(counters, 0, worker, workers, TASKS)
    barrier(counters, 0, done, workers, TASKS, weight.data, 0)
    lowest = _lowest(sums, V)
    task = next_task(counters, 1, worker, workers, TASKS)
    while task >= 0:
        _refine_rows(x, weight, chunk(task, TASKS, V // SIDE), lowest, found, logits)
        task = next_task(counters, 1, worker, workers, TASKS)


@jit_inner
def _round(ordered, fine):
    """x in the coarse copy's order as `Rounded`."""
    D, blocks = ordered.size, fine // BLOCK + (ordered.size - fine) // COARSE
    whole, scales = np.empty(D, np.int8), np.empty(2 * blocks, np.float32)
    round_blocks(ordered, 0, fine // BLOCK, whole, scales, -8)
    for block in range(fine // BLOCK, blocks):
        k = fine + (block - fine // BLOCK) * COARSE
        scale, total = round_whole(ordered, k, COARSE, 127, whole, k, BLOCK)
        scales[2 * block], scales[2 * block + 1] = scale, float32(-3) * total * scale
    fours, spread = whole.view(np.uint32), np.empty((D - fine) // 4 * LANES, np.uint32)
    for i in range(spread.size):
        spread[i] = fours[fine // 4 + i // LANES]
    return Rounded(whole, spread.view(np.int8), scales)


@jit
def likely_logits(workers, x, order, coarse, weight, y):
    """Writes the logits y [1, V] of x [1, D]; False, and nothing, if x has an infinity or NaN, which integers hide."""
    D = order.size
    ordered = np.empty(D, np.float32)
    for k in range(D):
        ordered[k] = x[0, order[k]]
        if not np.isfinite(ordered[k]):
            return False
    rounded, own = _round(ordered, coarse.fine), prepare(x, weight)
    shared = Shared(np.empty((TASKS, 2), np.float32), new_counters(2, workers))
    parallel_for(_likely_some, workers, (rounded, coarse, own, weight, shared, y))
    return True
