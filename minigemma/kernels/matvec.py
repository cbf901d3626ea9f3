"""Products of a few tokens with the rows of a weight, read once: a token costs what reading the weights costs.

Rows are widened in registers. Whole numbers meet x in whole numbers of 16 bits, with a scale for each token: twice as
many products in an instruction. A rounding is at most 2⁻¹⁶ of the token's largest x, so that even where all of x lies
in one number, y is off by √D / 113,000 of its usual size: for D = 2,304, a tenth of what bf16 would cost. (int4 with
sixteen rows side by side has kernels of its own: int4.py.)

Several tokens go in fours: what is loaded of two rows meets four tokens, so that eight sums stay in registers, and x is
laid out so that it is read in order:

    [T/4] fours of tokens, in each the blocks of 2 · LANES columns (of whole numbers 32), in each the four tokens;
    then the columns that are left over, one by one, or the offsets of whole numbers, block by block

Kernels see arrays as one axis: a weight [R · D] float32 or uint16, or its bytes, `size` for 32 weights: 34 or 18 in
blocks, 32 or 16 after the scale of a row. A slice for each row would be counted, with atomic additions.
"""

from __future__ import annotations

import numpy as np
from numba import types
from numba.extending import overload

from ..layouts.int4 import BLOCK, SIDE
from ..layouts.sfp8 import SCALE_BYTES, VALUES
from . import int4
from .amx import on_cache_line
from .compiler import INLINED, INNER, jit, jit_inlined, jit_inner
from .pairs import pairs_of_task, partner_of, some_pairs, stream_of
from .parallel import parallel_for
from .simd import (
    AHEAD,
    LANES,
    STREAMS,
    add_blocks,
    add_fours,
    add_scaled_blocks,
    dot_32,
    eight_zeros,
    fma,
    load,
    load_float,
    load_one,
    load_sfp8,
    magnitude,
    max_lanes,
    maximum,
    prefetch,
    prefetch_ahead,
    prefetch_four,
    splat,
    splat_half,
    store,
    store_offsets,
    store_sums,
    store_whole,
    sum_lanes,
    to_even_odd,
    zeros,
)

OFFSETS = 2 * LANES  # numbers of 16 bits that a block of x carries along: see dot_32
IN_BLOCKS = (types.int8, types.uint8)  # weights that are blocks of whole numbers
FEW = 16  # tokens, from which on a panel of rows that is widened once is as soon done (many_tokens.py)
IN_CACHE = 16384  # bytes of four tokens that stay in the first-level cache
PAIRS = 32  # of rows that meet them


@jit_inlined
def dot_numbers(weight, at, other, x, count, ahead, beyond):
    """`count` float32 or bf16 from weight[at] on, times x[: count]; then those from weight[other] on. What begins
    at weight[ahead] and at weight[beyond] is asked for. Four sums of each hide the cycles that a multiply-add takes.
    """
    a, b, c, d, e, f, g, h = zeros(), zeros(), zeros(), zeros(), zeros(), zeros(), zeros(), zeros()
    step = 4 * LANES
    whole = count // step * step
    for j in range(0, whole, step):
        prefetch_four(weight, ahead + j)
        prefetch_four(weight, beyond + j)
        p, q, r, s = load(x, j), load(x, j + LANES), load(x, j + 2 * LANES), load(x, j + 3 * LANES)
        a, e = fma(load(weight, at + j), p, a), fma(load(weight, other + j), p, e)
        b, f = fma(load(weight, at + j + LANES), q, b), fma(load(weight, other + j + LANES), q, f)
        c, g = fma(load(weight, at + j + 2 * LANES), r, c), fma(load(weight, other + j + 2 * LANES), r, g)
        d, h = fma(load(weight, at + j + 3 * LANES), s, d), fma(load(weight, other + j + 3 * LANES), s, h)
    one, two = sum_lanes((a + b) + (c + d)), sum_lanes((e + f) + (g + h))
    for j in range(whole, count):
        one += load_one(weight, at + j) * load_one(x, j)
        two += load_one(weight, other + j) * load_one(x, j)
    return one, two


def _dot_of_blocks(size):
    """A function: `blocks` times 32 whole numbers of `size` bytes from weight[at] on, times int16 x, behind which are
    its offsets; then those from weight[other] on. What begins at weight[ahead] and at weight[beyond] is asked for.
    """
    scaled = size % 16  # the bytes of a block's scale, 2; or 0, where the row has one for all

    @jit_inlined
    def block(weight, at, x, k, o, total):
        products = dot_32(weight, at + scaled, x, k, o)
        return fma(products, splat_half(weight, at), total) if scaled else products + total

    @jit_inlined
    def dot(weight, at, other, x, blocks, ahead, beyond):
        a, b, c, d, k, o = zeros(), zeros(), zeros(), zeros(), 0, blocks * 32
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


_dot_int8, _dot_int4, _dot_int8_row, _dot_int4_row = map(_dot_of_blocks, (34, 18, 32, 16))


@jit_inner
def _dot_sfp8(weight, at, x, count):
    """`count` codes from weight[at] on, times x."""
    a, b = zeros(), zeros()
    whole = count // (2 * LANES) * (2 * LANES)
    for j in range(0, whole, 2 * LANES):
        prefetch_ahead(weight, at + j)
        a = fma(load_sfp8(weight, at + j), load(x, j), a)
        b = fma(load_sfp8(weight, at + j + LANES), load(x, j + LANES), b)
    total = sum_lanes(a + b)
    for j in range(whole, count):
        total += VALUES[weight[at + j]] * load_one(x, j)
    return total


def _one_token(x, D, weight, size, pairs, y):
    """y [1, R] of these rows."""


@jit_inner
def _one_token_of_numbers(x, D, weight, size, pairs, y):
    (numbers, _), ahead = x, AHEAD // weight.itemsize
    for r in range(pairs.first, pairs.first + pairs.length):
        other = stream_of(pairs, r)
        at, there = r * D, other * D
        y[0, r], y[0, other] = dot_numbers(weight, at, there, numbers, D, at + ahead, there + ahead)


def dot_blocks(weight, at, other, x, blocks, ahead, beyond):
    """The dot products of two rows of `blocks` that have each their scale."""


def _dot_row(weight, at, other, x, blocks, ahead, beyond):
    """The dot products of two rows of `blocks` that share a scale."""


@overload(dot_blocks, jit_options=INLINED)
def _choose_dot_blocks(weight, at, other, x, blocks, ahead, beyond):
    return (_dot_int8 if weight.dtype == types.int8 else _dot_int4).py_func


@overload(_dot_row, jit_options=INLINED)
def _choose_dot_row(weight, at, other, x, blocks, ahead, beyond):
    return (_dot_int8_row if weight.dtype == types.int8 else _dot_int4_row).py_func


@jit_inner
def _one_token_in_blocks(x, D, weight, size, pairs, y):
    (whole, scales), blocks = x, D // 32
    stride = weight.size // y.shape[1]
    for r in range(pairs.first, pairs.first + pairs.length):
        other = stream_of(pairs, r)
        at, there = r * stride, other * stride
        if size % 16:
            one, two = dot_blocks(weight, at, there, whole, blocks, at + AHEAD, there + AHEAD)
            y[0, r], y[0, other] = one * scales[0], two * scales[0]
        else:
            a, b = at + SCALE_BYTES, there + SCALE_BYTES
            one, two = _dot_row(weight, a, b, whole, blocks, a + AHEAD, b + AHEAD)
            y[0, r], y[0, other] = one * scales[0] * load_float(weight, at), two * scales[0] * load_float(weight, there)


@overload(_one_token, jit_options=INNER)
def _choose_one_token(x, D, weight, size, pairs, y):
    return (_one_token_in_blocks if weight.dtype in IN_BLOCKS else _one_token_of_numbers).py_func


# ---- several tokens


def _dots(x, D, weight, size, at, other, four, first, count, sums):
    """sums [8] = the products of columns first … first + count - 1 of the row that begins at weight[at] with
    the tokens of a four, then those of the row at weight[other].
    """


@jit_inlined
def _dots_of_numbers(x, D, weight, size, at, other, four, first, count, sums):
    made, k, whole = eight_zeros(), 4 * (four * D + first), count // (2 * LANES) * (2 * LANES)
    for j in range(first, first + whole, 2 * LANES):
        made = add_fours(made, weight, at + j, other + j, x, k)
        k += 8 * LANES
    store_sums(sums, 0, made)
    for j in range(first + whole, first + count):
        for i in range(4):
            sums[i] += load_one(weight, at + j) * x[k]
            sums[4 + i] += load_one(weight, other + j) * x[k]
            k += 1


@jit_inlined
def _dots_of_blocks(x, D, weight, size, at, other, four, first, count, sums):
    made, token, begin = eight_zeros(), _room(D), 0 if size % 16 else SCALE_BYTES
    k, o = 4 * (four * token + first), 4 * (four * token + D + first // 32 * OFFSETS)
    i, j = at + begin + first // 32 * size, other + begin + first // 32 * size
    for _ in range(count // 32 if size % 16 else 0):
        made = add_scaled_blocks(made, weight, i, j, x, k, o)
        i, j, k, o = i + size, j + size, k + 4 * 32, o + 4 * OFFSETS
    for _ in range(0 if size % 16 else count // 32):
        made = add_blocks(made, weight, i, j, x, k, o)
        i, j, k, o = i + size, j + size, k + 4 * 32, o + 4 * OFFSETS
    store_sums(sums, 0, made)
    for i in range(8 if begin else 0):
        sums[i] *= load_float(weight, at if i < 4 else other)


@overload(_dots, jit_options=INLINED)
def _choose_dots(x, D, weight, size, at, other, four, first, count, sums):
    return (_dots_of_blocks if weight.dtype in IN_BLOCKS else _dots_of_numbers).py_func


@jit_inner
def _several_tokens(x, D, weight, size, pairs, y):
    """PAIRS pairs of rows stay in the second-level cache while four tokens after the other meet them, of which as many
    columns at a time as stay in the first-level cache. Meanwhile what comes next is asked for.
    """
    (numbers, scales), T, fours = x, len(y), (len(y) + 3) // 4
    stride, step, lanes = weight.size // y.shape[1], pairs.step, 8 * fours
    line, most = 64 // weight.itemsize, IN_CACHE // (4 * numbers.itemsize)
    width = (D // ((D + most - 1) // most) + 31) // 32 * 32  # equal parts, as near as may be
    made, sums = np.empty(8, np.float32), np.empty(PAIRS * lanes, np.float32)
    for top in range(0, pairs.length, PAIRS):
        some = some_pairs(pairs, top, PAIRS)
        sums[:] = 0
        for first in range(0, D, width):
            count = min(width, D - first)
            begin, span = first * stride // D, count * stride // D
            ahead = begin + span if first + count < D else PAIRS * step * stride
            for four in range(fours):
                to = four * 8
                for pair in range(some.length):
                    r = some.first + pair * step
                    at, other = r * stride, partner_of(some, r) * stride
                    for k in range(ahead + span * four // fours, ahead + span * (four + 1) // fours, line):
                        prefetch(weight, at + k)
                        prefetch(weight, other + k)
                    _dots(numbers, D, weight, size, at, other, four, first, count, made)
                    for i in range(8):
                        sums[to + i] += made[i]
                    to += lanes
        for t in range(T):
            one = t // 4 * 8 + t % 4
            for pair in range(some.length):
                r, to = some.first + pair * step, one + pair * lanes
                y[t, r], y[t, partner_of(some, r)] = sums[to] * scales[t], sums[to + 4] * scales[t]


@jit_inner
def _sfp8_rows(x, D, weight, pairs, y):
    for first in range(pairs.first, pairs.first + pairs.length):
        for stream in range(STREAMS):
            r = stream_of(pairs, first) if stream else first
            at = r * (SCALE_BYTES + D)
            y[0, r] = _dot_sfp8(weight, at + SCALE_BYTES, x, D) * load_float(weight, at)


# ---- a piece of the rows, whatever their format and however many the tokens


def _rows_piece(piece, pieces, per, x, D, weight, size, y):
    """The piece of one weight."""


@jit_inner
def _row_by_row_piece(piece, pieces, per, x, D, weight, size, y):
    pairs = pairs_of_task(piece, pieces, per, y.shape[1], len(y) == 1)
    if len(y) == 1:
        _one_token(x, D, weight, size, pairs, y)
    else:
        _several_tokens(x, D, weight, size, pairs, y)


@jit_inner
def _side_by_side_piece(piece, pieces, per, x, D, weight, size, y):
    groups = pairs_of_task(piece, pieces, per, y.shape[1] // SIDE, True)
    for group in range(groups.first, groups.first + groups.length):
        int4.few_rows(x, D // BLOCK, weight, group, stream_of(groups, group), y)


@overload(_rows_piece, jit_options=INNER)
def _choose_rows_piece(piece, pieces, per, x, D, weight, size, y):
    return (_side_by_side_piece if weight.dtype == types.uint32 else _row_by_row_piece).py_func


@jit_inner
def matvec_task(piece, pieces, per, x, D, weights, size, ys):
    """One of `pieces` of the rows of each weight, `per` of them a thread; x as `ready` makes it. A weight whose y has
    no tokens is left out.
    """
    for i in range(len(weights)):
        if len(ys[i]):
            _rows_piece(piece, pieces, per, x, D, weights[i], size, ys[i])


@jit_inner
def _sfp8_piece(piece, pieces, x, D, weights, ys):
    for i in range(len(weights)):
        _sfp8_rows(x, D, weights[i], pairs_of_task(piece, pieces, 1, ys[i].shape[1], True), ys[i])


@jit
def few_tokens(workers, x, weights, size, ys):
    """x Wᵀ for each weight, a contiguous range of its rows a thread: x [T, D], weights of one format as `flat` makes
    them, ys [T, R].
    """
    parallel_for(matvec_task, workers, (1, ready(x, weights[0]), x.shape[1], weights, size, ys))


@jit
def one_token_sfp8(workers, x, D, weights, ys):
    """The same for one token, x [D], and rows of codes."""
    parallel_for(_sfp8_piece, workers, (x, D, weights, ys))


# ---- x as rows want it


@jit_inlined
def _room(D):
    """The numbers of 16 bits that a token takes: its own, and the offsets of their blocks."""
    return D // 32 * (32 + OFFSETS)


@jit_inner
def round_token(x, first, D, whole, at, offsets, side):
    """x[first : first + D] ≈ whole · scale, in int16, blocks of 32 from whole[at] on, 32 · side apart; and what
    `dot_32` wants from whole[offsets] on, or nothing below 0. Returns the scale.
    """
    highest = zeros()
    for k in range(first, first + D, LANES):
        highest = maximum(highest, magnitude(load(x, k)))
    largest = max_lanes(highest)
    up = splat(np.float32(32767) / largest if largest > 0 else np.float32(0))
    for block in range(D // 32):
        to = at + block * 32 * side
        for j in range(0, 32, LANES):
            store_whole(whole, to + j, load(x, first + block * 32 + j) * up)
        if offsets >= 0:
            store_offsets(whole, to, offsets + block * OFFSETS * side)
    return largest / np.float32(32767)


def _ready(x, weight):
    """What `ready` is, by the weight's format."""


@jit_inner
def _in_numbers(x, weight):
    (T, D), flat, scales = x.shape, x.reshape(x.size), np.empty(len(x), np.float32)
    for t in range(T):
        scales[t] = 1
    if T == 1:
        return flat, scales
    size = (T + 3) // 4 * 4 * D
    fours, whole = on_cache_line(np.empty(size + 16, np.float32), size), D // (2 * LANES) * (2 * LANES)
    for t in range((T + 3) // 4 * 4):
        begin, row, lane = t // 4 * 4 * D, min(t, T - 1) * D, t % 4
        for d in range(0, whole, 2 * LANES):
            a, b = to_even_odd(weight, load(flat, row + d), load(flat, row + d + LANES))
            store(fours, begin + 4 * d + lane * 2 * LANES, a)
            store(fours, begin + 4 * d + lane * 2 * LANES + LANES, b)
        for d in range(whole, D):
            fours[begin + 4 * d + lane] = flat[row + d]
    return fours, scales


@jit_inner
def _in_16_bits(x, weight):
    (T, D), flat, scales = x.shape, x.reshape(x.size), np.empty(len(x), np.float32)
    side = 1 if T == 1 else 4
    size = (T + side - 1) // side * side * _room(D)
    whole = on_cache_line(np.empty(size + 32, np.int16), size)
    for t in range((T + side - 1) // side * side):
        begin, lane, token = t // side * side * _room(D), t % side, min(t, T - 1)
        offsets = begin + side * D + lane * OFFSETS
        scales[token] = round_token(flat, token * D, D, whole, begin + lane * 32, offsets, side)
    return whole, scales


@jit_inner
def _in_8_bits(x, weight):
    return int4.few_in_8_bits(x)


@overload(_ready, jit_options=INNER)
def _choose_ready(x, weight):
    if weight.dtype == types.uint32:
        return _in_8_bits.py_func
    return (_in_16_bits if weight.dtype in IN_BLOCKS else _in_numbers).py_func


@jit_inner
def ready(x, weight):
    """x [T, D] as rows of this weight want it: numbers, and a scale for each token; for int4 with sixteen rows side by
    side as `int4.few_in_8_bits` makes it.
    """
    return _ready(x, weight)
