"""Products of 1 … 16 tokens with the rows of a weight, at the speed of reading the weight once.

    1  the definition: x Wᵀ, which would widen all of W first
    2  rows are widened in registers: 50 … 85 % of memory bandwidth
    3  … in explicit vectors, four sums at a time, which hide the latency of a multiply-add, with a prefetch 8 KB ahead,
       since the processor's own prefetcher stops at each 4 KiB page: 90 … 100 %
    4  … as two streams where that is faster (AMD's Zen): a thread reads both halves of its share
    5  integer weights multiply x in integers (prepare.py), two or four products per lane
    6  several tokens in fours: each load of two rows meets four tokens, and eight sums stay in registers

`minigemma bench` compares a token with memory bandwidth.

Kernels see arrays as one axis (weights.py): slicing a row would cost two atomic additions for its reference count.
"""

import numpy as np

from ..layouts import int4 as int4_layout
from ..layouts import int8
from . import int4
from .compiler import by_type, jit, jit_inlined, jit_inner
from .pairs import pairs_of_task, partner_of, some_pairs, stream_of
from .parallel import parallel_for
from .prepare import prepare
from .simd.accumulators import add_fours, add_scaled_blocks, eight_zeros, store_sums
from .simd.cpu import AHEAD, LANES
from .simd.memory import load, prefetch, prefetch_four, splat_half
from .simd.products import dot_32
from .simd.vectors import fma, sum_lanes, zeros
from .weights import BF16Rows, F32Rows, Int4Rows, Int8Rows, KernelWeight, row_length

FEW = 16  # the largest T for these kernels; above it matmul.py is as fast
TOGETHER = 3  # weights of one call: q, k and v
IN_CACHE = 16384  # bytes of four tokens that stay in the first-level cache
PAIRS = 32  # of rows that meet them
BLOCK, BYTES = int8.BLOCK, int8.BYTES


def takes(weight: KernelWeight) -> bool:
    """Can these kernels take the weight? Its rows must be a multiple of two vectors."""
    return weight.columns % (2 * LANES) == 0


# ---- one row after the other: float32, bf16 and int8


@jit_inlined
def _dot_numbers(weight, at, other, x, ahead, beyond):
    """The dot products of x [D] with the rows that begin at weight.data[at] and at `other`; prefetches from `ahead` and
    `beyond` on.
    """
    a, b, c, d, e, f, g, h = zeros(), zeros(), zeros(), zeros(), zeros(), zeros(), zeros(), zeros()
    step, row = 4 * LANES, weight.data
    whole = weight.columns // step * step
    for j in range(0, whole, step):
        prefetch_four(row, ahead + j)
        prefetch_four(row, beyond + j)
        p, q, r, s = load(x, j), load(x, j + LANES), load(x, j + 2 * LANES), load(x, j + 3 * LANES)
        a, e = fma(load(row, at + j), p, a), fma(load(row, other + j), p, e)
        b, f = fma(load(row, at + j + LANES), q, b), fma(load(row, other + j + LANES), q, f)
        c, g = fma(load(row, at + j + 2 * LANES), r, c), fma(load(row, other + j + 2 * LANES), r, g)
        d, h = fma(load(row, at + j + 3 * LANES), s, d), fma(load(row, other + j + 3 * LANES), s, h)
    for j in range(whole, weight.columns, LANES):
        a, e = fma(load(row, at + j), load(x, j), a), fma(load(row, other + j), load(x, j), e)
    return sum_lanes((a + b) + (c + d)), sum_lanes((e + f) + (g + h))


@jit_inlined
def _block(row, at, x, k, total):
    return fma(dot_32(row, at + 2, x, k), splat_half(row, at), total)


@jit_inlined
def _dot_blocks(weight, at, other, x, ahead, beyond):
    a, b, c, d, k, row, blocks = zeros(), zeros(), zeros(), zeros(), 0, weight.data, weight.columns // BLOCK
    for _ in range(blocks // 2):
        for line in range(0, 2 * BYTES, 64):
            prefetch(row, ahead + line)
            prefetch(row, beyond + line)
        a, b = _block(row, at, x, k, a), _block(row, other, x, k, b)
        c, d = _block(row, at + BYTES, x, k + BLOCK, c), _block(row, other + BYTES, x, k + BLOCK, d)
        at, other, k = at + 2 * BYTES, other + 2 * BYTES, k + 2 * BLOCK
        ahead, beyond = ahead + 2 * BYTES, beyond + 2 * BYTES
    for _ in range(blocks % 2):
        a, b = _block(row, at, x, k, a), _block(row, other, x, k, b)
    return sum_lanes(a + c), sum_lanes(b + d)


dot = by_type("dot", {F32Rows: _dot_numbers, BF16Rows: _dot_numbers, Int8Rows: _dot_blocks})


@jit_inner
def _one_token(x, weight, pairs, y):
    """Writes these rows of y [1, R]."""
    (numbers, scales), length, ahead = x, row_length(weight), AHEAD // weight.data.itemsize
    for r in range(pairs.first, pairs.first + pairs.length):
        other = stream_of(pairs, r)
        at, there = r * length, other * length
        one, two = dot(weight, at, there, numbers, at + ahead, there + ahead)
        y[0, r], y[0, other] = one * scales[0], two * scales[0]


@jit_inlined
def _add_numbers(weight, at, other, x, four, first, count, sums):
    """sums [8] = the dot products of four tokens with the row at weight.data[at], then with the row at `other`, over
    columns first … first + count - 1.
    """
    made, k = eight_zeros(), 4 * (four * weight.columns + first)
    for j in range(first, first + count, 2 * LANES):
        made = add_fours(made, weight.data, at + j, other + j, x, k)
        k += 8 * LANES
    store_sums(sums, 0, made)


@jit_inlined
def _add_blocks(weight, at, other, x, four, first, count, sums):
    made, k = eight_zeros(), 4 * (four * weight.columns + first)
    i, j = at + first // BLOCK * BYTES, other + first // BLOCK * BYTES
    for _ in range(count // BLOCK):
        made = add_scaled_blocks(made, weight.data, i, j, x, k)
        i, j, k = i + BYTES, j + BYTES, k + 4 * BLOCK
    store_sums(sums, 0, made)


add_columns = by_type("add_columns", {F32Rows: _add_numbers, BF16Rows: _add_numbers, Int8Rows: _add_blocks})


@jit_inner
def _several_tokens(x, weight, pairs, y):
    """Writes these rows of y [T, R]. PAIRS pairs of rows stay in the second-level cache for all tokens, and the columns
    of four tokens are cut to fit the first-level cache. The next rows are prefetched.
    """
    (numbers, scales), T, D, fours, step = x, len(y), weight.columns, (len(y) + 3) // 4, pairs.step
    length, lanes = row_length(weight), 8 * fours
    line, most = 64 // weight.data.itemsize, IN_CACHE // (4 * numbers.itemsize)
    width = (D // ((D + most - 1) // most) + 31) // 32 * 32  # nearly equal parts
    made, sums = np.empty(8, np.float32), np.empty(PAIRS * lanes, np.float32)
    for top in range(0, pairs.length, PAIRS):
        some = some_pairs(pairs, top, PAIRS)
        sums[:] = 0
        for first in range(0, D, width):
            count = min(width, D - first)
            begin, span = first * length // D, count * length // D
            ahead = begin + span if first + count < D else PAIRS * step * length
            for four in range(fours):
                to = four * 8
                for pair in range(some.length):
                    r = some.first + pair * step
                    at, other = r * length, partner_of(some, r) * length
                    for k in range(ahead + span * four // fours, ahead + span * (four + 1) // fours, line):
                        prefetch(weight.data, at + k)
                        prefetch(weight.data, other + k)
                    add_columns(weight, at, other, numbers, four, first, count, made)
                    for i in range(8):
                        sums[to + i] += made[i]
                    to += lanes
        for t in range(T):
            one = t // 4 * 8 + t % 4
            for pair in range(some.length):
                r, to = some.first + pair * step, one + pair * lanes
                y[t, r], y[t, partner_of(some, r)] = sums[to] * scales[t], sums[to + 4] * scales[t]


# ---- a task of the rows, in any layout


@jit_inner
def _rows_task(task, tasks, per_thread, x, weight, y):
    """The task of one weight."""
    pairs = pairs_of_task(task, tasks, per_thread, weight.rows, len(y) == 1)
    if len(y) == 1:
        _one_token(x, weight, pairs, y)
    else:
        _several_tokens(x, weight, pairs, y)


@jit_inner
def _interleaved_task(task, tasks, per_thread, x, weight, y):
    groups = pairs_of_task(task, tasks, per_thread, weight.rows // int4_layout.SIDE, True)
    for group in range(groups.first, groups.first + groups.length):
        int4.few_rows(x, weight, group, stream_of(groups, group), y)


_task_of_one = by_type(
    "task_of_one",
    {F32Rows: _rows_task, BF16Rows: _rows_task, Int8Rows: _rows_task, Int4Rows: _interleaved_task},
    on="weight",
)


@jit_inner
def matvec_task(task, tasks, per_thread, prepared, weights, outs):
    """outs[i] [T, R] = x weights[i]ᵀ, in one of `tasks` parts of the rows, `per_thread` for each thread. A weight whose
    out has no tokens is skipped.
    """
    for i in range(len(weights)):
        if len(outs[i]):
            _task_of_one(task, tasks, per_thread, prepared, weights[i], outs[i])


@jit
def matvec(workers, x, weights, outs):
    """outs[i] [T, R] = x weights[i]ᵀ, TOGETHER weights of one layout; x [T, D] float32, D the weights' columns."""
    parallel_for(matvec_task, workers, (1, prepare(x, weights[0]), weights, outs))
