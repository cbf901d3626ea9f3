"""The logits of the next token in two passes: a preview of all, then the likely ones in full (Shim et al. 2017,
"SVD-Softmax: Fast Softmax Approximation on Large Vocabulary Neural Networks", §3).

    preview = E₄ x                                    E₄: the head in four bits
    logit_v = E_v x        where preview_v > mean preview + 2¼ standard deviations
              preview_v    elsewhere

Gemma's vocabulary is large: of the 270M's weights two thirds are the head's 262,144 rows. All of them are read for each
token, and all but a few say that their token does not come next. The preview reads half as much of an int8 head, a
quarter of one in bf16; the one row in eighty that it finds likely is then read whole. The paper's preview is made of
the leading columns of a singular value decomposition; ours of all columns in fewer bits, the format that int4.py makes
fast. The paper counts the likely rows; here a preview counts as likely by how far it lies above the others, which
needs no sorting. In the 270M its error is a tenth of the logits' standard deviation.

Logits of tokens found likely are exact, also their order; what the others' errors do to the distribution as a whole
is in docs/accuracy.md. Only generation asks for it (`forward(…, likely_only=True)`); the exact mode, and whoever looks
at logits, gets all of them in full.
"""

from __future__ import annotations

import numpy as np
from numba import float32, get_num_threads, types
from numba.extending import overload

from . import int4
from .arrays import F32, U8, read_only
from .backend import INNER, definition, jit, jit_inner, require
from .crew import claim, new_board, share, share_out, together
from .few_tokens import dot_blocks, dot_numbers, in_whole_numbers
from .formats import BLOCK, Weight, block_bytes, flat, format_of, rows_columns, widen
from .linear import linear
from .many_tokens import widen_row
from .simd import (
    LANES,
    fma,
    load,
    load_half,
    max_lanes,
    maximum,
    minimum,
    round_lanes,
    splat,
    store_half,
    store_whole,
    sum_lanes,
    zeros,
)

DEVIATIONS = 2.25  # above the mean: what a preview must be for its row to be read whole
FROM = ("f32", "bf16", "int8")  # formats of a head that can have a preview
LARGE = 1 << 24  # weights of a head that are worth it
AHEAD = 4  # likely rows that are asked for ahead
PIECES = 64  # parts of the vocabulary that threads take one by one: likely tokens lie together


@definition
def in_four_bits(weight: Weight) -> U8:
    """Each 32 weights as whole numbers from -8 to 7, of which -8 is the one farthest from 0, times a float16 scale that
    may be negative; sixteen rows side by side      [int4.py]

    weight [R, D] of any format, R in whole sixteens, D in whole 32s → [R/16, D/32, 288] uint8
    """
    w = widen(weight).reshape(-1, BLOCK)
    high, low = w.max(axis=1, keepdims=True), w.min(axis=1, keepdims=True)
    d = (np.where(high > -low, high, low) / np.float32(-8)).astype(np.float16)
    scale = d.astype(np.float32)
    q = np.rint(np.divide(w, scale, out=np.zeros_like(w), where=scale != 0)).clip(-8, 7) + np.float32(8)
    q = q.astype(np.uint8)
    blocks = np.concatenate([d.view(np.uint8), q[:, :16] | q[:, 16:] << 4], axis=1)
    return int4.side_by_side(blocks.reshape(rows_columns(weight)[0], -1, 18))


@definition
def refined(preview: F32, x: F32, weight: Weight) -> F32:
    """y_v = E_v x where preview_v is DEVIATIONS above the mean, else preview_v      [Shim et al. 2017 §3]

    preview [1, V] float32, x [1, D] float32, weight [V, D] → [1, V] float32
    """
    y, rows = preview.copy(), np.flatnonzero(preview > preview.mean() + np.float32(DEVIATIONS) * preview.std())
    y[0, rows] = linear.formula(x, weight[rows])[0]
    return y


# ---- kernels


@jit_inner
def _sixteen_rows(weight, size, D, group, wide, whole, scales, words):
    """Rows 16 · group … as int4, where they belong in `scales` and `words`, which are the same bytes."""
    step = D // BLOCK * size if size else D
    eight, fifteen, pairs = splat(float32(8)), splat(float32(15)), whole.view(np.uint32)
    for r in range(int4.SIDE):
        widen_row(weight, (group * int4.SIDE + r) * step, size, 0, D, wide, 0)
        for block in range(D // BLOCK):
            at, first, highs, lows = (group * (D // BLOCK) + block) * int4.WORDS, block * BLOCK, zeros(), zeros()
            for k in range(first, first + BLOCK, LANES):
                highs, lows = maximum(highs, load(wide, k)), maximum(lows, zeros() - load(wide, k))
            high, low = max_lanes(highs), -max_lanes(lows)
            store_half(scales, 4 * at + 2 * r, (high if high > -low else low) / float32(-8))
            d = load_half(scales, 4 * at + 2 * r)
            up = splat(float32(1) / d if d != 0 else float32(0))
            for k in range(0, BLOCK, LANES):
                q = round_lanes(load(wide, first + k) * up) + eight
                store_whole(whole, k, minimum(maximum(q, zeros()), fifteen))
            for word in range(4):
                words[at + int4.SCALES + word * int4.SIDE + r] = pairs[2 * word] | pairs[2 * word + 1] << np.uint32(4)


@jit_inner
def _some_sixteens(worker, workers, weight, size, D, scales, words):
    wide, whole = np.empty(D, np.float32), np.empty(BLOCK, np.int8)
    for group in share(worker, workers, words.size // (D // BLOCK * int4.WORDS)):
        _sixteen_rows(weight, size, D, group, wide, whole, scales, words)


@jit
def _all_sixteens(workers, weight, size, D, scales, words):
    share_out(_some_sixteens, workers, (weight, size, D, scales, words))


@in_four_bits.kernel
def _in_four_bits(weight):
    R, D = rows_columns(weight)
    fits = R > 0 and R % int4.SIDE == 0 and D % BLOCK == 0 and format_of(weight) in FROM
    require(fits, "in_four_bits", weight)
    out = np.empty((R // int4.SIDE, D // BLOCK, int4.BYTES), np.uint8)
    scales = out.reshape(-1)
    _all_sixteens(get_num_threads(), flat(weight), block_bytes(weight), D, scales, scales.view(np.uint32))
    return out


def _row(x, D, weight, size, v, other):
    """Row v of the weight times x, while row `other` is asked for."""


@jit_inner
def _row_of_numbers(x, D, weight, size, v, other):
    return dot_numbers(weight, v * D, x, 0, D, (other - v) * D)


@jit_inner
def _row_of_blocks(x, D, weight, size, v, other):
    whole, scales = x
    step = D // BLOCK * size
    return dot_blocks(weight, v * step, whole, 0, D, D // BLOCK, (other - v) * step) * scales[0]


@overload(_row, jit_options=INNER)
def _choose_row(x, D, weight, size, v, other):
    return (_row_of_blocks if weight.dtype == types.int8 else _row_of_numbers).py_func


@jit_inner
def _sums(logits, rows):
    """Σ z and Σ z² of logits[rows]."""
    whole, total, squares = rows.start + len(rows) // LANES * LANES, zeros(), zeros()
    for v in range(rows.start, whole, LANES):
        z = load(logits, v)
        total, squares = total + z, fma(z, z, squares)
    one, two = sum_lanes(total), sum_lanes(squares)
    for v in range(whole, rows.stop):
        one, two = one + logits[v], two + logits[v] * logits[v]
    return one, two


@jit_inner
def _refine_rows(x, D, weight, size, rows, lowest, found, preview, y):
    """y[rows]: the previews, or the products where these are above `lowest`."""
    logits, count, whole = preview.reshape(-1), 0, len(rows) // LANES * LANES
    for v in rows:
        y[0, v] = logits[v]
    for first in range(rows.start, rows.start + whole, LANES):
        if max_lanes(load(logits, first)) > lowest:
            for v in range(first, first + LANES):
                found[count] = v
                count += logits[v] > lowest
    for v in range(rows.start + whole, rows.stop):
        found[count] = v
        count += logits[v] > lowest
    for i in range(count):  # they lie far apart
        y[0, found[i]] = _row(x, D, weight, size, found[i], found[min(i + AHEAD, count - 1)])


@jit_inner
def _refine_some(worker, workers, x, D, weight, size, preview, sums, board, y):
    V, done, found = y.shape[1], 0, np.empty(y.shape[1] // PIECES + 2, np.int64)
    piece = claim(board, 0, worker, workers, PIECES)
    while piece >= 0:
        sums[piece, 0], sums[piece, 1] = _sums(preview.reshape(-1), share(piece, PIECES, V))
        done += 1
        piece = claim(board, 0, worker, workers, PIECES)
    together(board, 0, done, workers, PIECES, weight, 0)
    total, squares = 0.0, 0.0
    for i in range(PIECES):
        total, squares = total + sums[i, 0], squares + sums[i, 1]
    mean = total / V
    lowest = np.float32(mean + DEVIATIONS * np.sqrt(max(squares / V - mean * mean, 0.0)))
    piece = claim(board, 1, worker, workers, PIECES)
    while piece >= 0:
        _refine_rows(x, D, weight, size, share(piece, PIECES, V), lowest, found, preview, y)
        piece = claim(board, 1, worker, workers, PIECES)


@jit
def _refine_all(workers, x, D, weight, size, preview, y):
    sums = np.empty((PIECES, 2), np.float32)
    share_out(_refine_some, workers, (x, D, weight, size, preview, sums, new_board(2, workers), y))


@refined.kernel
def _refined(preview, x, weight):
    (V, D), size, y = rows_columns(weight), block_bytes(weight), np.empty_like(preview)
    fits = preview.shape == (1, V) and preview.dtype == np.float32 and x.shape == (1, D)
    fits = fits and format_of(weight) in FROM and V >= PIECES
    require(fits, "refined", preview, x, weight)
    _refine_all(
        get_num_threads(), in_whole_numbers(x, False) if size else x.reshape(-1), D, flat(weight), size, preview, y
    )
    return y


class Preview:
    """A head, and the same in four bits beside it."""

    def __init__(self, head: Weight) -> None:
        self.head, self.four_bits = head, read_only(in_four_bits(head))

    @property
    def nbytes(self) -> int:
        """Bytes of the four bits, which each token reads instead of the head."""
        return self.four_bits.nbytes

    def logits(self, x: F32) -> F32:
        """x [1, D] float32 → [1, V] float32."""
        if not np.isfinite(x).all():  # which whole numbers would hide
            return linear(x, self.head)
        return refined(linear(x, self.four_bits), x, self.head)


def preview_bytes(rows: int, columns: int) -> int:
    """What a preview of a head [R, D] takes: 18 bytes for each 32 weights."""
    return rows * columns // BLOCK * (int4.BYTES // int4.SIDE)


def preview_of(head: Weight) -> Preview | None:
    """A preview of a head that is large and takes more than four bits; else None."""
    (R, D), name = rows_columns(head), format_of(head)
    fits = name in FROM and name != "f32" and R % int4.SIDE == 0 and D % BLOCK == 0
    return Preview(head) if fits and R * D >= LARGE else None
