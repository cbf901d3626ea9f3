"""Products of a few tokens with the rows of a weight, each row read once: a token costs what reading the weights costs.

Rows are widened in registers. Whole numbers meet x in whole numbers of 16 bits, with a scale for each token: twice as
many products in an instruction. A rounding is at most 2⁻¹⁶ of the token's largest x, so that even where all of x lies
in one number, y is off by √D / 113,000 of its usual size: for D = 2,304, a tenth of what bf16 would cost. (int4 with
sixteen rows side by side has kernels of its own: int4.py.)

Kernels see arrays as one axis: x [T · D]; a weight [R · D] float32 or uint16, or its bytes, `size` for 32 weights: 34
or 18 in blocks, 32 or 16 after the scale of a row. A slice for each row would be counted, with atomic additions.
"""

from __future__ import annotations

import numpy as np
from numba import types
from numba.extending import overload
from numpy.typing import NDArray

from . import int4
from .arrays import F32, aligned
from .backend import INLINED, INNER, jit, jit_inlined, jit_inner
from .crew import share, share_out
from .sfp8 import SCALE_BYTES, VALUES
from .simd import (
    LANES,
    STREAMS,
    dot_32_nibbles,
    dot_32_signed,
    fma,
    load,
    load_float,
    load_one,
    load_sfp8,
    magnitude,
    max_lanes,
    maximum,
    prefetch,
    prefetch_four,
    splat,
    splat_half,
    store_offsets,
    store_whole,
    sum_lanes,
    zeros,
)

OFFSETS = 2 * LANES  # numbers of 16 bits that a block of x carries along: see dot_32_nibbles
AHEAD = 8192  # bytes read ahead into the second-level cache: the processor's own prefetcher stops at each 4 KiB page


@jit_inlined
def dot_numbers(weight, at, other, x, k, count, ahead, beyond):
    """`count` float32 or bf16 from weight[at] on, times x[k : k + count]; then those from weight[other] on. What begins
    at weight[ahead] and at weight[beyond] is asked for. Four sums of each hide the cycles that a multiply-add takes.
    """
    a, b, c, d, e, f, g, h = zeros(), zeros(), zeros(), zeros(), zeros(), zeros(), zeros(), zeros()
    step = 4 * LANES
    whole = count // step * step
    for j in range(0, whole, step):
        prefetch_four(weight, ahead + j)
        prefetch_four(weight, beyond + j)
        p, q, r, s = load(x, k + j), load(x, k + j + LANES), load(x, k + j + 2 * LANES), load(x, k + j + 3 * LANES)
        a, e = fma(load(weight, at + j), p, a), fma(load(weight, other + j), p, e)
        b, f = fma(load(weight, at + j + LANES), q, b), fma(load(weight, other + j + LANES), q, f)
        c, g = fma(load(weight, at + j + 2 * LANES), r, c), fma(load(weight, other + j + 2 * LANES), r, g)
        d, h = fma(load(weight, at + j + 3 * LANES), s, d), fma(load(weight, other + j + 3 * LANES), s, h)
    one, two = sum_lanes((a + b) + (c + d)), sum_lanes((e + f) + (g + h))
    for j in range(whole, count):
        one += load_one(weight, at + j) * load_one(x, k + j)
        two += load_one(weight, other + j) * load_one(x, k + j)
    return one, two


def _dot_whole(size):
    """A function: `blocks` times 32 whole numbers of `size` bytes from weight[at] on, times int16 x[k :], whose offsets
    begin at x[o]; then those from weight[other] on. What begins at weight[ahead] and at weight[beyond] is asked for.
    """
    scaled = size % 16  # the bytes of a block's scale, 2; or 0, where the row has one for all

    @jit_inlined
    def block(weight, at, x, k, o, total):
        if size >= 32:
            products = dot_32_signed(weight, at + scaled, x, k)
        else:
            products = dot_32_nibbles(weight, at + scaled, x, k, o)
        return fma(products, splat_half(weight, at), total) if scaled else products + total

    @jit_inlined
    def dot(weight, at, other, x, k, o, blocks, ahead, beyond):
        a, b, c, d = zeros(), zeros(), zeros(), zeros()
        for _ in range(blocks // 2):
            for line in range(0, 2 * size, 64):
                prefetch(weight, ahead + line)
                prefetch(weight, beyond + line)
            a, b = block(weight, at, x, k, o, a), block(weight, other, x, k, o, b)
            c = block(weight, at + size, x, k + 32, o + OFFSETS, c)
            d = block(weight, other + size, x, k + 32, o + OFFSETS, d)
            at, other, k, o = at + 2 * size, other + 2 * size, k + 64, o + 2 * OFFSETS
            ahead, beyond = ahead + 2 * size, beyond + 2 * size
        for _ in range(blocks % 2):
            a, b = block(weight, at, x, k, o, a), block(weight, other, x, k, o, b)
        return sum_lanes(a + c), sum_lanes(b + d)

    return dot


_dot_int8, _dot_int4, _dot_int8_row, _dot_int4_row = map(_dot_whole, (34, 18, 32, 16))


@jit_inner
def _dot_sfp8(weight, at, x, k, count):
    """`count` codes from weight[at] on, times x[k :]."""
    a, b = zeros(), zeros()
    whole = count // (2 * LANES) * (2 * LANES)
    for j in range(0, whole, 2 * LANES):
        prefetch(weight, at + j + AHEAD)
        a = fma(load_sfp8(weight, at + j), load(x, k + j), a)
        b = fma(load_sfp8(weight, at + j + LANES), load(x, k + j + LANES), b)
    total = sum_lanes(a + b)
    for j in range(whole, count):
        total += VALUES[weight[at + j]] * load_one(x, k + j)
    return total


@jit_inner
def pairs(piece, pieces, per, count):
    """Which of `count` rows are a piece, of which each thread has `per`: the rows of the first of two places in memory
    that a thread reads at once, how far behind each its partner lies, and the last row of all.

    Where two STREAMS are best, a thread reads both halves of its share, a line of the one and a line of the other: a
    core that waits for two places waits less for each. A piece takes the next rows of both halves, so that what is
    asked for ahead of it is what the next one begins with.
    """
    mine = share(piece // per, pieces // per, count)
    half = len(mine) if STREAMS == 1 else (len(mine) + 1) // 2
    own = share(piece % per, per, half)
    return range(mine.start + own.start, mine.start + own.stop), half, mine.stop - 1


@jit_inlined
def partner(row, half, last):
    """The row that is read together with this one: itself, if one place is best, or if it has none. The compiler sees
    that both are the same, and leaves out what it would do twice.
    """
    return row if STREAMS == 1 else min(row + half, last)


@jit_inner
def _few_rows(x, D, weight, places, y):
    (rows, half, last), ahead = places, AHEAD // weight.itemsize
    for r in rows:
        other = partner(r, half, last)
        at, there = r * D, other * D
        for t in range(len(y)):
            y[t, r], y[t, other] = dot_numbers(weight, at, there, x, t * D, D, at + ahead, there + ahead)


def dot_blocks(weight, at, other, x, k, o, blocks, ahead, beyond):
    """The dot products of two rows of `blocks` that have each their scale."""


def _dot_row(weight, at, other, x, k, o, blocks, ahead, beyond):
    """The dot products of two rows of `blocks` that share a scale."""


@overload(dot_blocks, jit_options=INLINED)
def _choose_dot_blocks(weight, at, other, x, k, o, blocks, ahead, beyond):
    return (_dot_int8 if weight.dtype == types.int8 else _dot_int4).py_func


@overload(_dot_row, jit_options=INLINED)
def _choose_dot_row(weight, at, other, x, k, o, blocks, ahead, beyond):
    return (_dot_int8_row if weight.dtype == types.int8 else _dot_int4_row).py_func


@jit_inner
def _few_block_rows(x, blocks, weight, size, places, y):
    (whole, scales), (rows, half, last), stride = x, places, blocks * size + (0 if size % 16 else SCALE_BYTES)
    for r in rows:
        other = partner(r, half, last)
        at, there = r * stride, other * stride
        for t in range(len(y)):
            k, scale = t * blocks * (32 + OFFSETS), load_one(scales, t)
            o = k + blocks * 32
            if size % 16:
                one, two = dot_blocks(weight, at, there, whole, k, o, blocks, at + AHEAD, there + AHEAD)
                y[t, r], y[t, other] = one * scale, two * scale
            else:
                a, b = at + SCALE_BYTES, there + SCALE_BYTES
                one, two = _dot_row(weight, a, b, whole, k, o, blocks, a + AHEAD, b + AHEAD)
                y[t, r], y[t, other] = one * scale * load_float(weight, at), two * scale * load_float(weight, there)


@jit_inner
def _few_sfp8_rows(x, D, weight, places, y):
    rows, half, last = places
    for first in rows:
        for stream in range(STREAMS):
            r = partner(first, half, last) if stream else first
            at = r * (SCALE_BYTES + D)
            for t in range(len(y)):
                y[t, r] = _dot_sfp8(weight, at + SCALE_BYTES, x, t * D, D) * load_float(weight, at)


@jit_inner
def few_tokens_piece(piece, pieces, per, x, D, weights, ys):
    """One of `pieces` of the rows of each weight, `per` of them a thread: each row is read once, in order."""
    for i in range(len(weights)):
        _few_rows(x, D, weights[i], pairs(piece, pieces, per, ys[i].shape[1]), ys[i])


def _block_rows_piece(piece, pieces, per, x, blocks, weight, size, y):
    """The piece of one weight."""


@jit_inner
def _row_by_row_piece(piece, pieces, per, x, blocks, weight, size, y):
    _few_block_rows(x, blocks, weight, size, pairs(piece, pieces, per, y.shape[1]), y)


@jit_inner
def _side_by_side_piece(piece, pieces, per, x, blocks, weight, size, y):
    groups, half, last = pairs(piece, pieces, per, y.shape[1] // int4.SIDE)
    for group in groups:
        int4.few_rows(x, blocks, weight, group, partner(group, half, last), y)


@overload(_block_rows_piece, jit_options=INNER)
def _choose_block_rows_piece(piece, pieces, per, x, blocks, weight, size, y):
    return (_side_by_side_piece if weight.dtype == types.uint32 else _row_by_row_piece).py_func


@jit_inner
def few_tokens_blocks_piece(piece, pieces, per, x, blocks, weights, size, ys):
    """The same for rows of whole numbers, 32 of them in `size` bytes; x in whole numbers too, with their scales."""
    for i in range(len(weights)):
        _block_rows_piece(piece, pieces, per, x, blocks, weights[i], size, ys[i])


@jit_inner
def _few_sfp8_piece(piece, pieces, x, D, weights, ys):
    """The same for rows of codes."""
    for i in range(len(weights)):
        _few_sfp8_rows(x, D, weights[i], pairs(piece, pieces, 1, ys[i].shape[1]), ys[i])


@jit
def few_tokens(workers, x, D, weights, ys):
    """x Wᵀ for each weight, a contiguous range of its rows a thread."""
    share_out(few_tokens_piece, workers, (1, x, D, weights, ys))


@jit
def few_tokens_blocks(workers, x, blocks, weights, size, ys):
    """The same for rows of whole numbers."""
    share_out(few_tokens_blocks_piece, workers, (1, x, blocks, weights, size, ys))


@jit
def few_tokens_sfp8(workers, x, D, weights, ys):
    """The same for rows of codes."""
    share_out(_few_sfp8_piece, workers, (x, D, weights, ys))


def rounded(tokens: int, columns: int) -> NDArray[np.int16]:
    """Room for what `round_to_16_bits` makes of x [T, D]."""
    return aligned(tokens * (columns // 32 * (32 + OFFSETS)), np.int16)


@jit
def round_to_16_bits(x, whole, scales):
    """x ≈ whole · scale, a scale for each token: x [T · D] float32, whole [T · D] int16, scales [T]; D in whole 32s.
    Where `whole` has the room of `rounded`, each token's numbers are followed by the offsets of their blocks, for
    weights that are nibbles.
    """
    D, length = x.size // scales.size, whole.size // scales.size
    for t in range(scales.size):
        first, at, highest = t * D, t * length, zeros()
        for k in range(first, first + D, LANES):
            highest = maximum(highest, magnitude(load(x, k)))
        largest = max_lanes(highest)
        scales[t] = largest / np.float32(32767)
        up = splat(np.float32(32767) / largest if largest > 0 else np.float32(0))
        for k in range(0, D, LANES):
            store_whole(whole, at + k, load(x, first + k) * up)
        for block in range(D // 32 if length > D else 0):
            store_offsets(whole, at + block * 32, at + D + block * OFFSETS)


def in_whole_numbers(x: F32, side_by_side: bool) -> tuple[NDArray, ...]:
    """x [T, D] for few tokens, as weights of whole numbers want it."""
    if side_by_side:
        return int4.in_8_bits(x)
    whole, scales = rounded(*x.shape), np.empty(len(x), np.float32)
    round_to_16_bits(x.reshape(-1), whole, scales)
    return whole, scales
