"""The logits of the next token in two passes: a preview of all, then the likely ones in full (Shim et al. 2017,
"SVD-Softmax: Fast Softmax Approximation on Large Vocabulary Neural Networks", §3).

    preview = Ê x                       Ê: the head in few bits
    logit_v = E_v x        where preview_v > mean preview + 2 standard deviations
              preview_v    elsewhere

Gemma's vocabulary is large: of the 270M's weights two thirds are the head's 262,144 rows. All of them are read for each
token, and all but a few say that their token does not come next. The preview reads a third of an int8 head, a sixth of
one in bf16; the one row in fifty that it finds likely is then read whole. The paper's preview is made of the leading
columns of a singular value decomposition; ours of all columns in fewer bits. The paper counts the likely rows; here a
preview counts as likely by how far it lies above the others, which needs no sorting.

How many bits a column needs, the gain of the final norm tells: x_d is as large as the gain makes it, and that differs
by hundreds in the 270M. The fifth of the columns with the largest gain has four bits, the others two. So the preview's
error is 0.3 of the logits' standard deviation, where likely logits lie four to eight above the mean; with two bits for
all columns it would be 0.5.

Logits of tokens found likely are exact, also their order; what the others' errors do to the distribution as a whole
is in docs/accuracy.md. Only sampling uses it (text/generation.py): `forward` returns exact logits.

Ê is an array of uint8 [R/16, blocks, 288], sixteen rows side by side as in int4.py: first the blocks of int4, which
cover 32 columns, then those in two bits, which cover 64. A block of these is

    16 float16                 the scale d of each row
    [4, 16, 4] bytes           byte j of row r in word w holds four columns, 16 w + j in its lowest two bits, then
                               16 w + 4 + j and so on;  weight = d · (2 q - 3), one of -3 d, -d, d and 3 d
"""

from __future__ import annotations

import numpy as np
from numba import float32, get_num_threads, types
from numba.extending import overload
from numpy.typing import NDArray

from ..arrays import F32, U8, read_only
from ..definition import definition, require
from ..kernels import int4
from ..kernels.compiler import INLINED, jit, jit_inlined, jit_inner
from ..kernels.int4 import WORDS
from ..kernels.matmul import widen_row
from ..kernels.matvec import dot_blocks, dot_numbers, ready
from ..kernels.pairs import pairs_of_task, stream_of
from ..kernels.parallel import barrier, chunk, new_counters, next_task, parallel_for
from ..kernels.rows import norm_row
from ..kernels.simd import (
    LANES,
    SCALES,
    STREAMS,
    add_int2_block,
    add_int4_block,
    fma,
    load,
    load_half,
    magnitude,
    max_lanes,
    maximum,
    minimum,
    prefetch_ahead,
    round_lanes,
    row_sums_zeros,
    splat,
    store_half,
    store_row_sums,
    store_whole,
    sum_lanes,
    zeros,
)
from ..layouts.int4 import BYTES, SIDE, side_by_side
from ..layouts.weight import BLOCK, Weight, block_bytes, flat, format_of, rows_columns, widen
from .linear import linear

DEVIATIONS = 2.0  # above the mean: what a preview must be for its row to be read whole
COARSE = 64  # columns of a block in two bits
STEP = 0.625  # d in mean |w| of a block: what misses normally distributed numbers least
FROM = ("f32", "bf16", "int8")  # formats of a head that can have a preview
LARGE = 1 << 24  # weights of a head that are worth it
AHEAD = 4  # likely rows that are asked for ahead
NO_GAIN = read_only(np.empty(0, np.float32))  # of a norm that has been
PIECES = 128  # parts of the vocabulary that threads take one by one: likely tokens lie together

Order = NDArray[np.int32]


def fine_columns(columns: int) -> int:
    """How many columns of a head have four bits: a fifth, in whole blocks of 64."""
    return -(-columns // (5 * COARSE)) * COARSE


def by_gain(weight: F32) -> Order:
    """The columns of a head, those first where the norm before it, with gain 1 + w, makes x largest: w [D] → [D]."""
    return np.argsort(-abs(1 + weight), kind="stable").astype(np.int32)


@definition
def in_few_bits(weight: Weight, order: Order) -> U8:
    """The leading fifth of the columns in four bits, the others in two

    Four: whole numbers from -8 to 7, of which -8 is the one farthest from 0 of its 32, times a float16 scale that may
    be negative. Two: see above.

    weight [R, D] of any format, R in whole sixteens, D in whole 64s; order [D] → [R/16, blocks, 288] uint8
    """
    w, fine = widen(weight)[:, order], fine_columns(len(order))
    R = len(w)
    blocks = w[:, :fine].reshape(R, -1, BLOCK)
    high, low = blocks.max(axis=-1, keepdims=True), blocks.min(axis=-1, keepdims=True)
    d = (np.where(high > -low, high, low) / np.float32(-8)).astype(np.float16)
    up = np.divide(1, d, out=np.zeros_like(high), where=d != 0, dtype=np.float32)
    q = (np.rint(blocks * up).clip(-8, 7) + 8).astype(np.uint8)
    four = side_by_side(np.concatenate([d.view(np.uint8), q[..., :16] | q[..., 16:] << 4], axis=-1))

    blocks = w[:, fine:].reshape(R, -1, COARSE)
    d = (np.float32(STEP) * abs(blocks).mean(axis=-1, keepdims=True)).astype(np.float16)
    up = np.divide(0.5, d, out=np.zeros_like(blocks[..., :1]), where=d != 0, dtype=np.float32)
    q = np.rint(blocks * up + np.float32(1.5)).clip(0, 3).astype(np.uint8)
    q = q.reshape(R // SIDE, SIDE, -1, 4, 4, 4).transpose(0, 2, 3, 1, 4, 5)  # [R/16, block, word, row, i, j]
    packed = q[..., 0, :] | q[..., 1, :] << 2 | q[..., 2, :] << 4 | q[..., 3, :] << 6
    scales = d.reshape(R // SIDE, SIDE, -1).transpose(0, 2, 1)
    packed = packed.reshape(R // SIDE, blocks.shape[1], 4 * SIDE * 4)
    two = np.concatenate([np.ascontiguousarray(scales).view(np.uint8), packed], axis=-1)
    return np.concatenate([four, two], axis=1)


def widened(packed: U8, order: Order) -> F32:
    """The way back: → float32 [R, D], the columns where they were."""
    fine = fine_columns(len(order))
    two = packed[:, fine // BLOCK :]
    scales = np.ascontiguousarray(two[..., : 2 * SIDE]).view(np.float16).astype(np.float32)  # [R/16, blocks, 16]
    words = two[..., 2 * SIDE :].reshape(*two.shape[:2], 4, SIDE, 4)
    q = np.stack([words >> 2 * i & 3 for i in range(4)], axis=-2).astype(np.float32)  # [R/16, block, word, row, i, j]
    w = (2 * q - 3) * scales[:, :, None, :, None, None]
    w = w.transpose(0, 3, 1, 2, 4, 5).reshape(len(packed) * SIDE, len(order) - fine)
    out = np.empty((len(w), len(order)), np.float32)
    out[:, order] = np.concatenate([widen(packed[:, : fine // BLOCK]), w], axis=1)
    return out


@definition
def likely_logits(x: F32, packed: U8, order: Order, weight: Weight) -> F32:
    """E_v x where the preview Ê_v x is DEVIATIONS above the mean of all, else the preview      [Shim et al. 2017 §3]

    x [1, D] float32, packed and order as `in_few_bits` has them, weight [V, D] → [1, V] float32
    """
    y = x @ widened(packed, order).T
    rows = np.flatnonzero(y > y.mean() + np.float32(DEVIATIONS) * y.std())
    y[0, rows] = linear.formula(x, weight[rows])[0]
    return y


# ---- making it


@jit_inner
def _scale_of_four(wide, first):
    """d of a block in four bits, before it is rounded."""
    highs, lows = zeros(), zeros()
    for k in range(first, first + BLOCK, LANES):
        highs, lows = maximum(highs, load(wide, k)), maximum(lows, zeros() - load(wide, k))
    high, low = max_lanes(highs), -max_lanes(lows)
    return (high if high > -low else low) / float32(-8)


@jit_inner
def _scale_of_two(wide, first):
    """d of a block in two bits, before it is rounded."""
    total = zeros()
    for k in range(first, first + COARSE, LANES):
        total = total + magnitude(load(wide, k))
    return sum_lanes(total) * float32(STEP / COARSE)


@jit_inner
def _round_to(top, wide, first, count, up, zero, whole):
    """whole[: count] = wide[first :] · up + zero, as whole numbers from 0 to `top`."""
    for k in range(0, count, LANES):
        q = round_lanes(load(wide, first + k) * splat(up) + splat(zero))
        store_whole(whole, k, minimum(maximum(q, zeros()), splat(top)))


@jit_inner
def _sixteen_rows(weight, size, order, fine, group, wide, own, whole, scales, words):
    """Rows 16 · group … in few bits, where they belong in `scales` and `words`, which are the same bytes."""
    D, quads = order.size, whole.view(np.uint32)
    step, blocks = (D // BLOCK * size if size else D), fine // BLOCK + (D - fine) // COARSE
    for r in range(SIDE):
        widen_row(weight, (group * SIDE + r) * step, size, 0, D, wide, 0)
        for k in range(D):
            own[k] = wide[order[k]]
        for block in range(blocks):
            at, four = (group * blocks + block) * WORDS, block < fine // BLOCK
            first = block * BLOCK if four else fine + (block - fine // BLOCK) * COARSE
            store_half(scales, 4 * at + 2 * r, _scale_of_four(own, first) if four else _scale_of_two(own, first))
            d = load_half(scales, 4 * at + 2 * r)
            up = float32(1) / d if d != 0 else float32(0)
            if four:
                _round_to(float32(15), own, first, BLOCK, up, float32(8), whole)
            else:
                _round_to(float32(3), own, first, COARSE, up * float32(0.5), float32(1.5), whole)
            for w in range(4):
                packed = quads[2 * w] | quads[2 * w + 1] << np.uint32(4)
                if not four:
                    packed = np.uint32(0)
                    for i in range(4):
                        packed |= quads[4 * w + i] << np.uint32(2 * i)
                words[at + SCALES + w * SIDE + r] = packed


@jit_inner
def _some_sixteens(worker, workers, weight, size, order, fine, groups, scales, words):
    D = order.size
    wide, own, whole = np.empty(D, np.float32), np.empty(D, np.float32), np.empty(COARSE, np.int8)
    for group in chunk(worker, workers, groups):
        _sixteen_rows(weight, size, order, fine, group, wide, own, whole, scales, words)


@jit
def _all_sixteens(workers, weight, size, order, fine, groups, scales, words):
    parallel_for(_some_sixteens, workers, (weight, size, order, fine, groups, scales, words))


@in_few_bits.kernel
def _in_few_bits(weight, order):
    R, D = rows_columns(weight)
    fits = R > 0 and R % SIDE == 0 and D % COARSE == 0 and format_of(weight) in FROM
    fits = fits and order.dtype == np.int32 and np.array_equal(np.sort(order), np.arange(D))
    require(fits, "in_few_bits", weight, order)
    out = np.empty((R // SIDE, preview_bytes(SIDE, D) // BYTES, BYTES), np.uint8)
    size, scales = block_bytes(weight), out.reshape(-1)
    words, fine = scales.view(np.uint32), fine_columns(D)
    order = np.ascontiguousarray(order)
    _all_sixteens(get_num_threads(), flat(weight), size, order, fine, len(out), scales, words)
    return out


# ---- the first pass


@jit_inner
def _preview_rows(x, fine, packed, groups, y):
    """y[0, 16 · group :] = the previews of groups of sixteen rows, of which two are read at once: see few_tokens.py."""
    whole, spread, scales, starts = x
    blocks = scales.size
    for group in range(groups.first, groups.first + groups.length):
        other = stream_of(groups, group)
        one, two, at, there = row_sums_zeros(), row_sums_zeros(), group * blocks * WORDS, other * blocks * WORDS
        for block in range(blocks):
            for line in range(0, WORDS, 16):
                prefetch_ahead(packed, at + line)
                if STREAMS == 2:
                    prefetch_ahead(packed, there + line)
            scale, start, k = scales[block], starts[block], (block - fine // BLOCK) * COARSE * LANES
            if block < fine // BLOCK:
                one = add_int4_block(one, packed, at, whole, block * BLOCK, scale, start)
                if STREAMS == 2:
                    two = add_int4_block(two, packed, there, whole, block * BLOCK, scale, start)
            else:
                one = add_int2_block(one, packed, at, spread, k, scale, start)
                if STREAMS == 2:
                    two = add_int2_block(two, packed, there, spread, k, scale, start)
            at, there = at + WORDS, there + WORDS
        store_row_sums(one, y.reshape(y.size), group * SIDE)
        if STREAMS == 2:
            store_row_sums(two, y.reshape(y.size), other * SIDE)


@jit_inner
def _sums(logits, rows):
    """Σ z and Σ z² of logits[rows], rows in whole sixteens."""
    total, squares = zeros(), zeros()
    for v in range(rows.start, rows.stop, LANES):
        z = load(logits, v)
        total, squares = total + z, fma(z, z, squares)
    return sum_lanes(total), sum_lanes(squares)


# ---- the second pass


def _two_rows(x, D, weight, size, rows, following):
    """Two rows of the weight times x, while two others are asked for."""


@jit_inlined
def _rows_of_numbers(x, D, weight, size, rows, following):
    (numbers, _), (v, w), (after, beyond) = x, rows, following
    return dot_numbers(weight, v * D, w * D, numbers, D, after * D, beyond * D)


@jit_inlined
def _rows_of_blocks(x, D, weight, size, rows, following):
    (whole, scales), (v, w), (after, beyond), step = x, rows, following, D // BLOCK * size
    one, two = dot_blocks(weight, v * step, w * step, whole, D // BLOCK, after * step, beyond * step)
    return one * scales[0], two * scales[0]


@overload(_two_rows, jit_options=INLINED)
def _choose_two_rows(x, D, weight, size, rows, following):
    return (_rows_of_blocks if weight.dtype == types.int8 else _rows_of_numbers).py_func


@jit_inner
def _refine_rows(x, D, weight, size, rows, lowest, found, y):
    """y[rows], previews, become the products where they are above `lowest`."""
    logits, count = y.reshape(y.size), 0
    for first in range(rows.start, rows.stop, LANES):
        if max_lanes(load(logits, first)) > lowest:
            for v in range(first, first + LANES):
                found[count] = v
                count += logits[v] > lowest
    for i in range(0, count, 2):  # they lie far apart
        rows = found[i], found[min(i + 1, count - 1)]
        following = found[min(i + AHEAD, count - 1)], found[min(i + AHEAD + 1, count - 1)]
        logits[rows[0]], logits[rows[1]] = _two_rows(x, D, weight, size, rows, following)


@jit_inner
def _likely_some(worker, workers, few, fine, packed, x, D, weight, size, sums, board, y):
    V, done, logits = y.shape[1], 0, y.reshape(y.size)
    found = np.empty((V // SIDE // PIECES + 1) * SIDE + 1, np.int64)
    piece = next_task(board, 0, worker, workers, PIECES)
    while piece >= 0:
        groups = chunk(piece, PIECES, V // SIDE)
        _preview_rows(few, fine, packed, pairs_of_task(piece, PIECES, 1, V // SIDE, True), y)
        sums[piece, 0], sums[piece, 1] = _sums(logits, range(groups.start * SIDE, groups.stop * SIDE))
        done += 1
        piece = next_task(board, 0, worker, workers, PIECES)
    barrier(board, 0, done, workers, PIECES, weight, 0)
    total, squares = 0.0, 0.0
    for i in range(PIECES):
        total, squares = total + sums[i, 0], squares + sums[i, 1]
    mean = total / V
    lowest = np.float32(mean + DEVIATIONS * np.sqrt(max(squares / V - mean * mean, 0.0)))
    piece = next_task(board, 1, worker, workers, PIECES)
    while piece >= 0:
        groups = chunk(piece, PIECES, V // SIDE)
        _refine_rows(x, D, weight, size, range(groups.start * SIDE, groups.stop * SIDE), lowest, found, y)
        piece = next_task(board, 1, worker, workers, PIECES)


@jit
def _likely_all(workers, x, gain, eps, order, fine, packed, weight, size, y):
    """The logits y [1, V] of x [D], after an RMSNorm where there is a gain; False, and nothing done, if x has an
    infinity or what is no number, which whole numbers would hide.
    """
    D, normed = x.size, np.empty(x.size, np.float32)
    ordered, whole = np.empty(D, np.float32), np.empty(D, np.int8)
    blocks = fine // BLOCK + (D - fine) // COARSE
    scales, starts = np.empty(blocks, np.float32), np.empty(blocks, np.int32)
    if gain.size:
        norm_row(x, gain, eps, normed)
    else:
        for d in range(D):
            normed[d] = x[d]
    for k in range(D):
        ordered[k] = normed[order[k]]
        if not np.isfinite(ordered[k]):
            return False
    int4.round_blocks(ordered, whole, scales, starts, 0, fine // BLOCK)
    for block in range(fine // BLOCK, blocks):
        k = fine + (block - fine // BLOCK) * COARSE
        scales[block], starts[block] = int4.round_to_8_bits(ordered, k, COARSE, 3, whole)
    fours, spread = whole.view(np.uint32), np.empty((D - fine) // 4 * LANES, np.uint32)
    for i in range(spread.size):
        spread[i] = fours[fine // 4 + i // LANES]
    few = whole, spread.view(np.int8), scales, starts
    sums, board = np.empty((PIECES, 2), np.float32), new_counters(2, workers)
    own = ready(normed.reshape((1, D)), weight)
    parallel_for(_likely_some, workers, (few, fine, packed, own, D, weight, size, sums, board, y))
    return True


@likely_logits.kernel
def _likely_logits(x, packed, order, weight):
    (V, D), made = rows_columns(weight), packed.dtype == np.uint8 and packed.ndim == 3
    fits = x.shape == (1, D) and x.dtype == np.float32 and np.array_equal(np.sort(order), np.arange(D, dtype=np.int32))
    fits = fits and order.dtype == np.int32 and format_of(weight) in FROM and D % COARSE == 0 and V % SIDE == 0
    fits = fits and made and packed.shape == (V // SIDE, preview_bytes(SIDE, D) // BYTES, BYTES)
    require(fits, "likely_logits", x, packed, order, weight)
    y, arguments = np.empty((1, V), np.float32), _arguments(packed, order, weight)
    if not _likely_all(get_num_threads(), np.ascontiguousarray(x)[0], NO_GAIN, 0.0, *arguments, y):
        return linear(x, weight)
    return y


def _arguments(packed: U8, order: Order, weight: Weight) -> tuple[NDArray | int, ...]:
    """Both forms of a head as the kernel takes them."""
    words, fine = read_only(packed.reshape(-1).view(np.uint32)), fine_columns(len(order))
    return read_only(np.array(order)), fine, words, flat(weight), block_bytes(weight)


class Preview:
    """A head, and the same in few bits beside it. final_norm: the w of the norm before it."""

    def __init__(self, head: Weight, final_norm: F32) -> None:
        self.head = head
        order = by_gain(final_norm)
        packed = read_only(in_few_bits(head, order))
        self.nbytes = packed.nbytes  # which each token reads instead of the head
        self._rows, self._arguments = rows_columns(head)[0], _arguments(packed, order, head)

    def logits(self, x: F32) -> F32:
        """Logits [1, V] of a hidden state, x [1, D] after the final norm; exact for likely tokens only."""
        y = np.empty((1, self._rows), np.float32)
        return y if _likely_all(get_num_threads(), x[0], NO_GAIN, 0.0, *self._arguments, y) else linear(x, self.head)


def preview_bytes(rows: int, columns: int) -> int:
    """What a preview of a head [R, D] takes: 18 bytes for 32 columns in four bits, or for 64 in two."""
    fine = fine_columns(columns)
    return rows * (fine // BLOCK + (columns - fine) // COARSE) * (BYTES // SIDE)


def preview_of(head: Weight, final_norm: F32) -> Preview | None:
    """A preview of a head that is large and takes more than four bits; else None."""
    (R, D), name = rows_columns(head), format_of(head)
    fits = name in FROM and name != "f32" and R % SIDE == 0 and D % COARSE == 0
    return Preview(head, final_norm) if fits and R * D >= LARGE else None
