"""The linear map y = x Wᵀ over weights as their files hold them. No Gemma text projection has a bias.

A weight is one array; its dtype and shape say its format:

    f32       float32 [R, D]
    bf16      uint16  [R, D]           the upper 16 bits of each float32
    int8      uint8   [R, D/32, 34]    blocks of 32: a float16 scale d, then 32 signed bytes q;      w = d · q
    int4      uint8   [R, D/32, 18]    blocks of 32: a float16 scale d, then 16 bytes of two nibbles; w = d · (q - 8)
                                       (low nibbles are weights 0 … 15, high ones 16 … 31)
    sfp8      uint8   [R, 4 + D]       a float32 scale for the row, then a code of 8 bits for each weight: see sfp8.py
    int8-row  int8    [R, 4 + D]       per channel: a float32 scale d for the row, then D signed bytes;  w = d · q
    int4-row  uint8   [R, 1, 4 + D/2]  per channel: the same, then nibbles, 16 bytes as in int4 for each 32 weights

int8 and int4 row by row are GGUF's Q8_0 and Q4_0, so that such tensors run from the mapped file. 8.5 and 4.5 bits a
weight. The formats with a scale a row take 8 and 4, as Gemma 3's "per channel" int4 does (Gemma 3 §2.3); D is a
multiple of 32.

Nothing is unpacked ahead: one token reads every weight once and widens it in a register (that read is the cost of a
token); many tokens share a panel of rows that is widened to float32 once and stays in the second-level cache. Sums are
float32. Against whole numbers the few tokens' x is rounded to 16 bits, with a scale for each token: products of whole
numbers, twice as many in an instruction. A rounding is at most 2⁻¹⁶ of the token's largest x, so that even where all of
x lies in one number, y is off by √D / 113,000 of its usual size: for D = 2,304, a tenth of what bf16 would cost.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numba import get_num_threads, types
from numba.extending import overload
from numpy.typing import NDArray

from . import amx, int4
from .arrays import F32, aligned, read_only, widen_bf16
from .backend import INLINED, INNER, definition, jit, jit_inlined, jit_inner, require, runs_formulas, workers_for
from .crew import share, share_out
from .sfp8 import SCALE_BYTES, VALUES, dequantise_sfp8
from .simd import (
    LANES,
    ROWS,
    STREAMS,
    bf16_bits,
    dot_32_nibbles,
    dot_32_signed,
    fma,
    load,
    load_float,
    load_half,
    load_high_nibbles,
    load_low_nibbles,
    load_one,
    load_sfp8,
    magnitude,
    max_lanes,
    maximum,
    prefetch,
    prefetch_four,
    splat,
    splat_half,
    store,
    store_offsets,
    store_whole,
    sum_lanes,
    tile_add_outer,
    tile_add_pairs,
    tile_add_scaled,
    tile_load,
    tile_store,
    tile_zeros,
    unpack_32_nibbles,
    unpack_32_signed,
    whole_tile_zeros,
    zeros,
)

BLOCK = 32  # weights that share a scale, or that are packed together
# Bytes of 32 weights: with the float16 scale of a block; without the float32 scale in front of a row.
BLOCK_BYTES = {"int8": 2 + BLOCK, "int4": 2 + BLOCK // 2, "int8-row": BLOCK, "int4-row": BLOCK // 2}
OFFSETS = 2 * LANES  # numbers of 16 bits that a block of x carries along: see dot_32_nibbles
NO_ROWS = np.empty((0, 0), np.float32)
TOGETHER = 3  # weights that one x is multiplied by in one go: q, k and v
FEW = 8  # up to so many tokens a row of weights is used as it is read, without a panel
PANEL = 8 * ROWS  # rows of weights that are widened together
DEPTH = 512  # columns of them that are; PANEL x DEPTH float32 stay in the second-level cache
UNIT_DEPTH = 2304  # columns of 32 rows of them that are rounded to bf16 together for the matrix unit
AHEAD = 8192  # bytes read ahead into the second-level cache: the processor's own prefetcher stops at each 4 KiB page

Weight = NDArray[Any]  # one of the formats above


def format_of(weight: Weight) -> str:
    """The name of a weight's format: "f32", "bf16", "int8", "int4", "sfp8", "int8-row" or "int4-row"."""
    if weight.ndim == 2 and weight.dtype in (np.float32, np.uint16):
        return "f32" if weight.dtype == np.float32 else "bf16"
    if weight.ndim == 2 and weight.dtype == np.uint8:
        return "sfp8"
    if weight.ndim == 2 and weight.dtype == np.int8 and weight.shape[1] % BLOCK == SCALE_BYTES:
        return "int8-row"
    if weight.ndim == 3 and weight.dtype == np.uint8:
        for name in ("int8", "int4"):
            if weight.shape[2] == BLOCK_BYTES[name]:
                return name
        if weight.shape[2] == int4.BYTES:
            return "int4"
        if weight.shape[1] == 1 and weight.shape[2] % BLOCK_BYTES["int4-row"] == SCALE_BYTES:
            return "int4-row"
    raise ValueError(f"{weight.dtype} {list(weight.shape)} is no weight: see the formats at the top of linear.py")


def is_side_by_side(weight: Weight) -> bool:
    """Is this an int4 weight with sixteen rows side by side?"""
    return weight.ndim == 3 and weight.dtype == np.uint8 and weight.shape[2] == int4.BYTES


def rows_columns(weight: Weight) -> tuple[int, int]:
    """(R, D) of a weight, whatever its format."""
    name, size = format_of(weight), weight.shape[-1]
    if is_side_by_side(weight):
        return weight.shape[0] * int4.SIDE, weight.shape[1] * BLOCK
    if name in ("int8", "int4"):
        return weight.shape[0], weight.shape[1] * BLOCK
    if name == "int4-row":
        return weight.shape[0], (size - SCALE_BYTES) * 2
    return weight.shape[0], size if name in ("f32", "bf16") else size - SCALE_BYTES


def packed_shape(name: str, rows: int, columns: int) -> tuple[int, ...]:
    """The shape of the array of bytes that a weight [R, D] is in one of the formats of bytes; int4 if it can be with
    sixteen rows side by side.
    """
    if name == "int4" and rows % int4.SIDE == 0:
        return rows // int4.SIDE, columns // BLOCK, int4.BYTES
    if name in ("int8", "int4"):
        return rows, columns // BLOCK, BLOCK_BYTES[name]
    return (rows, 1, SCALE_BYTES + columns // 2) if name == "int4-row" else (rows, SCALE_BYTES + columns)


def widen(weight: Weight) -> F32:
    """The weight as float32 [R, D], exact for every format."""
    name = format_of(weight)
    if name == "f32":
        return weight
    if name == "bf16":
        return widen_bf16(weight)
    if name == "sfp8":
        return dequantise_sfp8(weight)
    if is_side_by_side(weight):
        weight = int4.row_by_row(weight)
    size, kind = (2, np.float16) if name in ("int8", "int4") else (SCALE_BYTES, np.float32)
    scale = np.ascontiguousarray(weight[..., :size]).view(kind).astype(np.float32)  # [R, D/32, 1]; a row's: [R, (1,) 1]
    q = weight[..., size:]
    if name in ("int8", "int8-row"):
        q = q.view(np.int8).astype(np.float32)
    else:
        q = q.reshape(len(q), q.shape[1] * q.shape[2] // (BLOCK // 2), BLOCK // 2)
        q = np.concatenate([q & 15, q >> 4], axis=-1).astype(np.float32) - 8  # [R, D/32, 32]
    return (scale * q).reshape(rows_columns(weight))


def embed(ids: np.ndarray, weight: Weight, scale: float) -> F32:
    """Rows `ids` of the embedding, times `scale`: ids [T], weight [V, D] → [T, D] float32      [Gemma 1 §2]"""
    if is_side_by_side(weight):
        sixteen = widen(weight[ids // int4.SIDE]).reshape(len(ids), int4.SIDE, -1)
        return sixteen[np.arange(len(ids)), ids % int4.SIDE] * np.float32(scale)
    return widen(weight[ids]) * np.float32(scale)


@definition
def linear(x: F32, weight: Weight) -> F32:
    """y = x Wᵀ

    x [T, D] float32, weight [R, D] → [T, R] float32
    """
    if weight.size < 1 << 24:
        return x @ widen(weight).T
    # An embedding goes in pieces: all of it in float32 at once would be gigabytes.
    return np.concatenate([x @ widen(weight[r : r + 16384]).T for r in range(0, len(weight), 16384)], axis=-1)


def affine(x: F32, weight: Weight, bias: F32 | None) -> F32:
    """y = x Wᵀ + b, or without b where there is none: x [T, D], weight [R, D], bias [R] → [T, R] float32."""
    return plus(linear(x, weight), bias)


def plus(y: F32, bias: F32 | None) -> F32:
    """y + b, or y where there is no b: y [T, R], bias [R] → [T, R] float32."""
    return y if bias is None else y + bias


# ---- kernels. Those for few tokens see arrays as one axis: x [T · D]; a weight [R · D] float32 or uint16, or its
# ---- bytes, `size` for 32 weights: 34 or 18 in blocks, 32 or 16 after the scale of a row. A slice for each row would
# ---- be counted, with atomic additions.


def flat(weight: Weight) -> Weight:
    """A weight as one axis, read-only: int8 where whole numbers take a byte, uint8 where they are nibbles or codes,
    uint32 where sixteen rows lie side by side; kernels are compiled for each.
    """
    if is_side_by_side(weight):
        return read_only(weight.reshape(-1).view(np.uint32))
    return read_only((weight.view(np.int8) if block_bytes(weight) >= 32 else weight).reshape(-1))


def block_bytes(weight: Weight) -> int:
    """What kernels call `size`: the bytes of 32 weights, or of a block of sixteen rows side by side; 0 in a format that
    has no whole numbers.
    """
    if is_side_by_side(weight):
        return int4.BYTES
    return BLOCK_BYTES.get(format_of(weight), 0)


def _widen_row(weight, at, size, first, count, out, to):
    """out[to : to + count] = columns first … first + count - 1 of the row that begins at weight[at], widened; both
    multiples of 32 where `size` bytes are 32; 0: sfp8.
    """


@jit_inlined
def _dot_plain(weight, at, x, k, count):
    """`count` float32 or bf16 from weight[at] on, times x[k : k + count]. Four sums at once hide the four cycles that
    each multiply-add takes.
    """
    a, b, c, d = zeros(), zeros(), zeros(), zeros()
    step = 4 * LANES
    whole = count // step * step
    for j in range(0, whole, step):
        prefetch_four(weight, at + j + AHEAD // weight.itemsize)
        a = fma(load(weight, at + j), load(x, k + j), a)
        b = fma(load(weight, at + j + LANES), load(x, k + j + LANES), b)
        c = fma(load(weight, at + j + 2 * LANES), load(x, k + j + 2 * LANES), c)
        d = fma(load(weight, at + j + 3 * LANES), load(x, k + j + 3 * LANES), d)
    total = sum_lanes((a + b) + (c + d))
    for j in range(whole, count):
        total += load_one(weight, at + j) * load_one(x, k + j)
    return total


def _dot_whole(size):
    """A function: `blocks` times 32 whole numbers of `size` bytes from weight[at] on, times int16 x[k :], whose offsets
    begin at x[o].
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
    def dot(weight, at, x, k, o, blocks):
        a, b, c, d = zeros(), zeros(), zeros(), zeros()
        for _ in range(blocks // 4):
            for line in range(0, 4 * size, 64):
                prefetch(weight, at + AHEAD + line)
            a = block(weight, at, x, k, o, a)
            b = block(weight, at + size, x, k + 32, o + OFFSETS, b)
            c = block(weight, at + 2 * size, x, k + 64, o + 2 * OFFSETS, c)
            d = block(weight, at + 3 * size, x, k + 96, o + 3 * OFFSETS, d)
            at, k, o = at + 4 * size, k + 128, o + 4 * OFFSETS
        for _ in range(blocks % 4):
            a = block(weight, at, x, k, o, a)
            at, k, o = at + size, k + 32, o + OFFSETS
        return sum_lanes((a + b) + (c + d))

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
def _widen_plain(weight, at, size, first, count, out, to):
    whole = count // LANES * LANES
    for k in range(0, whole, LANES):
        store(out, to + k, load(weight, at + first + k))
    for k in range(whole, count):
        out[to + k] = load_one(weight, at + first + k)


@jit_inner
def _widen_signed(weight, at, size, first, count, out, to):
    for block in range(count // 32):
        here, k = at + (first // 32 + block) * size, to + block * 32
        scale = splat_half(weight, here) if size % 16 else splat(load_float(weight, at))
        here += 2 if size % 16 else SCALE_BYTES
        for j in range(0, 32, LANES):
            store(out, k + j, load(weight, here + j) * scale)


@jit_inner
def _widen_nibbles(weight, at, size, first, count, out, to):
    if size == 0:
        _widen_sfp8(weight, at, first, count, out, to)
    eight = splat(np.float32(8))
    for block in range(count // 32 if size else 0):
        here, k = at + (first // 32 + block) * size, to + block * 32
        scale = splat_half(weight, here) if size % 16 else splat(load_float(weight, at))
        here += 2 if size % 16 else SCALE_BYTES
        for j in range(0, 16, LANES):
            store(out, k + j, (load_low_nibbles(weight, here + j) - eight) * scale)
            store(out, k + 16 + j, (load_high_nibbles(weight, here + j) - eight) * scale)


@jit_inner
def _widen_sfp8(weight, at, first, count, out, to):
    scale = load_float(weight, at)
    here, whole = at + SCALE_BYTES + first, count // LANES * LANES
    for k in range(0, whole, LANES):
        store(out, to + k, load_sfp8(weight, here + k) * splat(scale))
    for k in range(whole, count):
        out[to + k] = VALUES[weight[here + k]] * scale


@overload(_widen_row, jit_options=INNER)
def _choose_widen_row(weight, at, size, first, count, out, to):
    return {types.int8: _widen_signed, types.uint8: _widen_nibbles}.get(weight.dtype, _widen_plain).py_func


@jit_inlined
def _row(i, rows):
    """The i-th of `rows` to be read: where two STREAMS are best, one from the first half, then one from the second."""
    if STREAMS == 1:
        return rows.start + i
    return rows.start + i // 2 + i % 2 * ((len(rows) + 1) // 2)


@jit_inner
def _few_rows(x, D, weight, rows, y):
    for i in range(len(rows)):
        r = _row(i, rows)
        for t in range(len(y)):
            y[t, r] = _dot_plain(weight, r * D, x, t * D, D)


def _dot_blocks(weight, at, x, k, o, blocks):
    """The dot product of `blocks` that have each their scale."""


def _dot_row(weight, at, x, k, o, blocks):
    """The dot product of `blocks` that share a scale."""


@overload(_dot_blocks, jit_options=INLINED)
def _choose_dot_blocks(weight, at, x, k, o, blocks):
    return (_dot_int8 if weight.dtype == types.int8 else _dot_int4).py_func


@overload(_dot_row, jit_options=INLINED)
def _choose_dot_row(weight, at, x, k, o, blocks):
    return (_dot_int8_row if weight.dtype == types.int8 else _dot_int4_row).py_func


@jit_inner
def _few_block_rows(x, scales, blocks, weight, size, rows, y):
    for i in range(len(rows)):
        r = _row(i, rows)
        at = r * (blocks * size + (0 if size % 16 else SCALE_BYTES))
        for t in range(len(y)):
            k, scale = t * blocks * (32 + OFFSETS), load_one(scales, t)
            o = k + blocks * 32
            if size % 16:
                y[t, r] = _dot_blocks(weight, at, x, k, o, blocks) * scale
            else:
                y[t, r] = _dot_row(weight, at + SCALE_BYTES, x, k, o, blocks) * scale * load_float(weight, at)


@jit_inner
def _few_sfp8_rows(x, D, weight, rows, y):
    for i in range(len(rows)):
        r = _row(i, rows)
        at = r * (SCALE_BYTES + D)
        for t in range(len(y)):
            y[t, r] = _dot_sfp8(weight, at + SCALE_BYTES, x, t * D, D) * load_float(weight, at)


@jit_inner
def few_tokens_piece(piece, pieces, x, D, weights, ys):
    """One of `pieces` ranges of the rows of each weight: each row is read once, in order."""
    for i in range(len(weights)):
        _few_rows(x, D, weights[i], share(piece, pieces, ys[i].shape[1]), ys[i])


def _block_rows_piece(piece, pieces, x, blocks, weight, size, y):
    """The piece of one weight."""


@jit_inner
def _row_by_row_piece(piece, pieces, x, blocks, weight, size, y):
    _few_block_rows(x[0], x[1], blocks, weight, size, share(piece, pieces, y.shape[1]), y)


@jit_inner
def _side_by_side_piece(piece, pieces, x, blocks, weight, size, y):
    groups = share(piece, pieces, y.shape[1] // int4.SIDE)
    for i in range(len(groups)):
        int4.few_rows(x, blocks, weight, _row(i, groups), y)


@overload(_block_rows_piece, jit_options=INNER)
def _choose_block_rows_piece(piece, pieces, x, blocks, weight, size, y):
    return (_side_by_side_piece if weight.dtype == types.uint32 else _row_by_row_piece).py_func


@jit_inner
def few_tokens_blocks_piece(piece, pieces, x, blocks, weights, size, ys):
    """The same for rows of whole numbers, 32 of them in `size` bytes; x in whole numbers too, with their scales."""
    for i in range(len(weights)):
        _block_rows_piece(piece, pieces, x, blocks, weights[i], size, ys[i])


@jit_inner
def _few_sfp8_piece(piece, pieces, x, D, weights, ys):
    """The same for rows of codes."""
    for i in range(len(weights)):
        _few_sfp8_rows(x, D, weights[i], share(piece, pieces, ys[i].shape[1]), ys[i])


@jit
def few_tokens(workers, x, D, weights, ys):
    """x Wᵀ for each weight, a contiguous range of its rows a thread."""
    share_out(few_tokens_piece, workers, (x, D, weights, ys))


@jit
def few_tokens_blocks(workers, x, blocks, weights, size, ys):
    """The same for rows of whole numbers."""
    share_out(few_tokens_blocks_piece, workers, (x, blocks, weights, size, ys))


@jit
def _few_tokens_sfp8(workers, x, D, weights, ys):
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


@jit_inner
def _pack_some(worker, workers, x, packed):
    (T, D), lanes = x.shape, 2 * LANES
    for block in share(worker, workers, len(packed)):
        for left in range(0, D, 64):
            # Four tokens at a time: the first-level cache has few places for lines that lie D = 2,048 numbers apart.
            for four in range(0, lanes, 4):
                for d in range(left, min(D, left + 64)):
                    for lane in range(four, four + 4):
                        packed[block, d * lanes + lane] = x[min(block * lanes + lane, T - 1), d]


@jit
def _pack_all(workers, x, packed):
    share_out(_pack_some, workers, (x, packed))


def _pack(x):
    """x [T, D] → [T/16, D · 16]: tokens become lanes (2 · LANES of them); in the last block the last fills up."""
    T, D = x.shape
    lanes = 2 * LANES
    packed = np.empty((-(-T // lanes), D * lanes), np.float32)
    _pack_all(min(get_num_threads(), len(packed)), x, packed)
    return packed


@jit_inner
def _multiply_panel(panel, packed, first, depth, rows, sums):
    """sums [blocks, PANEL, 2 · LANES] += panel [rows, depth] · packed[:, first : first + depth]."""
    lanes = 2 * LANES
    for block in range(len(packed)):
        tokens, out = packed[block], sums[block]
        for r in range(0, rows, ROWS):
            tile = tile_load(out, r * lanes, lanes) if first else tile_zeros()
            for d in range(depth):
                tile = tile_add_outer(tile, panel, r * DEPTH + d, DEPTH, tokens, (first + d) * lanes)
            tile_store(tile, out, r * lanes, lanes)


@jit_inner
def _some_panels(worker, workers, packed, weight, size, columns, height, width, panel, sums, y):
    (T, R), lanes = y.shape, 2 * LANES
    stride = weight.size // max(1, R)
    for p in share(worker, workers, (R + height - 1) // height):
        top, rows = p * height, min(height, R - p * height)
        for first in range(0, columns, width):
            count = min(width, columns - first)
            for r in range(rows):
                _widen_row(weight, (top + r) * stride, size, first, count, panel, r * DEPTH)
                following = (top + height + r) * stride + first * stride // columns
                for k in range(0, count * stride // columns, 4 * LANES):
                    prefetch_four(weight, following + k)
            _multiply_panel(panel, packed, first, count, rows, sums)
        for t in range(T):
            block, lane = t // lanes, t % lanes
            for r in range(rows):
                y[t, top + r] = sums[block, r * lanes + lane]


@jit_inner
def _panels_of_all(worker, workers, packed, weights, size, columns, height, width, ys):
    panel, sums = np.zeros(PANEL * DEPTH, np.float32), np.empty((len(packed), PANEL * 2 * LANES), np.float32)
    for i in range(len(weights)):
        _some_panels(worker, workers, packed, weights[i], size, columns, height, width, panel, sums, ys[i])


@jit
def _many_tokens(workers, packed, weights, size, columns, height, width, ys):
    """x Wᵀ for each weight. `height` of its rows are widened, `width` columns at a time, and used for all tokens while
    in the cache, and the same part of the next rows is asked for: at most PANEL and DEPTH.
    """
    share_out(_panels_of_all, workers, (packed, weights, size, columns, height, width, ys))


# ---- many tokens against whole numbers: x, rounded to 16 bits, and a panel of weights, as they are, in pairs of int16


@jit_inner
def _round_some(worker, workers, x, whole, scales):
    mine, D = share(worker, workers, len(x)), x.shape[1]
    flat_x, first, last = x.reshape(-1), mine.start, mine.stop
    if first < last:
        round_to_16_bits(flat_x[first * D : last * D], whole[first * D : last * D], scales[first:last])


@jit
def _pack_all_pairs(workers, x, whole, scales, words, packed):
    share_out(_round_some, workers, (x, whole, scales))
    share_out(_pack_some, min(workers, len(packed)), (words, packed))


def _pack_pairs(x):
    """x [T, D] → int16 in pairs [T/16, D · 16], tokens as lanes, and the scale of each token."""
    (T, D), lanes = x.shape, 2 * LANES
    whole, scales, blocks = aligned(T * D, np.int16), np.empty(T, np.float32), -(-T // lanes)
    packed = aligned(blocks * D // 2 * lanes, np.int32).reshape(blocks, -1)
    _pack_all_pairs(workers_for(x), x, whole, scales, whole.view(np.int32).reshape(T, -1), packed)
    return packed.view(np.int16), scales


def _unpack_row(weight, at, size, first, count, panel, to, scales, there):
    """panel[to : to + count] = the whole numbers in columns first … first + count - 1 of the row at weight[at], as
    int16; scales[there :] = the scale of each 32.
    """


@jit_inner
def _unpack_signed(weight, at, size, first, count, panel, to, scales, there):
    for block in range(count // BLOCK):
        here = at + (first // BLOCK + block) * size
        scales[there + block] = load_half(weight, here) if size % 16 else load_float(weight, at)
        here += 2 if size % 16 else SCALE_BYTES
        unpack_32_signed(weight, here, panel, to + block * BLOCK)


@jit_inner
def _unpack_nibbles(weight, at, size, first, count, panel, to, scales, there):
    for block in range(count // BLOCK):
        here = at + (first // BLOCK + block) * size
        scales[there + block] = load_half(weight, here) if size % 16 else load_float(weight, at)
        here += 2 if size % 16 else SCALE_BYTES
        unpack_32_nibbles(weight, here, panel, to + block * BLOCK)


@overload(_unpack_row, jit_options=INNER)
def _choose_unpack_row(weight, at, size, first, count, panel, to, scales, there):
    return (_unpack_signed if weight.dtype == types.int8 else _unpack_nibbles).py_func


@jit_inner
def _multiply_whole_panel(panel, scales, packed, first, depth, rows, sums):
    """sums [blocks, PANEL, 2 · LANES] += panel [rows, depth] · packed[:, first : first + depth], a block's sum of whole
    numbers times its scale.
    """
    lanes, blocks = 2 * LANES, DEPTH // BLOCK
    for i in range(len(packed)):
        tokens, out = packed[i], sums[i]
        if first == 0:
            out[: (rows + ROWS - 1) // ROWS * ROWS * lanes] = 0
        for r in range(0, rows, ROWS):
            for block in range(depth // BLOCK):
                tile, at = whole_tile_zeros(), (first + block * BLOCK) * lanes
                for k in range(0, BLOCK, 2):
                    tile = tile_add_pairs(tile, panel, r * DEPTH + block * BLOCK + k, DEPTH, tokens, at + k * lanes)
                tile_add_scaled(tile, scales, r * blocks + block, blocks, out, r * lanes, lanes)


@jit_inner
def _some_whole_panels(worker, workers, packed, token_scales, weight, size, columns, height, panel, scales, sums, y):
    (T, R), lanes, blocks = y.shape, 2 * LANES, DEPTH // BLOCK
    stride = weight.size // max(1, R)
    for p in share(worker, workers, (R + height - 1) // height):
        top, rows = p * height, min(height, R - p * height)
        for first in range(0, columns, DEPTH):
            count = min(DEPTH, columns - first)
            length = count // BLOCK * size
            for r in range(rows):
                at = (top + r) * stride
                _unpack_row(weight, at, size, first, count, panel, r * DEPTH, scales, r * blocks)
                at += height * stride + first // BLOCK * size
                for k in range(0, length, 64):
                    prefetch(weight, at + k)
            _multiply_whole_panel(panel, scales, packed, first, count, rows, sums)
        for t in range(T):
            block, lane = t // lanes, t % lanes
            for r in range(rows):
                y[t, top + r] = sums[block, r * lanes + lane] * token_scales[t]


@jit_inner
def _whole_panels_of_all(worker, workers, packed, token_scales, weights, size, columns, height, ys):
    panel, scales = np.zeros(PANEL * DEPTH, np.int16), np.zeros(PANEL * DEPTH // BLOCK, np.float32)
    sums = np.empty((len(packed), PANEL * 2 * LANES), np.float32)
    for i in range(len(weights)):
        _some_whole_panels(
            worker, workers, packed, token_scales, weights[i], size, columns, height, panel, scales, sums, ys[i]
        )


@jit
def _many_tokens_whole(workers, packed, token_scales, weights, size, columns, height, ys):
    """x Wᵀ for each weight of whole numbers. `height` of its rows, DEPTH columns at a time, are widened to int16 and
    used for all tokens while in the cache.
    """
    share_out(_whole_panels_of_all, workers, (packed, token_scales, weights, size, columns, height, ys))


# ---- many tokens on the matrix unit, for weights that are not float32: x and the weights enter as bf16 (amx.py)


def _round_row(weight, at, size, first, count, wide, panel, r):
    """Row r of the panel: `count` columns of the row at weight[at] as bf16, zeros up to a whole tile; `wide` is room
    for float32.
    """


@jit_inner
def _copy_row(weight, at, size, first, count, wide, panel, r):
    for k in range(0, count, amx.DEPTH):
        to = (k // amx.DEPTH * 32 + r) * amx.DEPTH
        for i in range(amx.DEPTH):
            panel[to + i] = weight[at + first + k + i] if k + i < count else np.uint16(0)


@jit_inner
def _widen_and_round_row(weight, at, size, first, count, wide, panel, r):
    _widen_row(weight, at, size, first, count, wide, 0)
    for k in range(0, count, amx.DEPTH):
        to = (k // amx.DEPTH * 32 + r) * amx.DEPTH
        for i in range(amx.DEPTH):
            panel[to + i] = bf16_bits(wide[k + i]) if k + i < count else np.uint16(0)


@overload(_round_row, jit_options=INNER)
def _choose_round_row(weight, at, size, first, count, wide, panel, r):
    return (_copy_row if weight.dtype == types.uint16 else _widen_and_round_row).py_func


@jit_inner
def _some_panels_on_tiles(worker, workers, packed, registers, weight, size, columns, wide, panel, sums, y):
    T, R = y.shape
    steps, stride = (columns + amx.DEPTH - 1) // amx.DEPTH, weight.size // max(1, R)
    for p in share(worker, workers, (R + 31) // 32):
        rows = min(32, R - p * 32)
        for first in range(0, columns, UNIT_DEPTH):
            count = min(UNIT_DEPTH, columns - first)
            for r in range(rows):
                _round_row(weight, (p * 32 + r) * stride, size, first, count, wide, panel, r)
            depth = (count + amx.DEPTH - 1) // amx.DEPTH
            amx.multiply_panel(registers, panel, packed, steps, first // amx.DEPTH, depth, first > 0, sums)
        for t in range(T):
            at = t // 32 * 1024 + t // 16 % 2 * 256 + t % 16
            for r in range(rows):
                y[t, p * 32 + r] = sums[at + r // 16 * 512 + r % 16 * 16]


@jit_inner
def _panels_of_all_on_tiles(worker, workers, packed, tiles, weights, size, columns, ys):
    blocks, registers, wide = (len(ys[0]) + 31) // 32, tiles.copy(), np.empty(UNIT_DEPTH, np.float32)
    panel = amx.on_cache_line(np.zeros(32 * UNIT_DEPTH + 32, np.uint16), 32 * UNIT_DEPTH)
    sums = amx.on_cache_line(np.empty(blocks * 1024 + 16, np.float32), blocks * 1024)
    amx.begin(registers)
    for i in range(len(weights)):
        _some_panels_on_tiles(worker, workers, packed, registers, weights[i], size, columns, wide, panel, sums, ys[i])
    amx.end(registers)


@jit
def _many_tokens_on_tiles(workers, packed, tiles, weights, size, columns, ys):
    """x Wᵀ for each weight. 32 of its rows at a time, UNIT_DEPTH columns of them, are rounded into tiles and used for
    all tokens.
    """
    share_out(_panels_of_all_on_tiles, workers, (packed, tiles, weights, size, columns, ys))


def in_whole_numbers(x, side_by_side):
    """x [T, D] for few tokens, as weights of whole numbers want it."""
    if side_by_side:
        return int4.in_8_bits(x)
    whole, scales = rounded(*x.shape), np.empty(len(x), np.float32)
    round_to_16_bits(x.reshape(-1), whole, scales)
    return whole, scales


def _products(x, weights):
    """x Wᵀ for up to TOGETHER weights of one format."""
    (T, D), rows, size = x.shape, [flat(weight) for weight in weights], block_bytes(weights[0])
    ys, workers = [np.empty((T, rows_columns(w)[0]), np.float32) for w in weights], get_num_threads()
    missing = TOGETHER - len(weights)  # a kernel is compiled for one number of weights
    padded, outs = tuple(rows + [rows[0][:0]] * missing), tuple(ys + [NO_ROWS] * missing)
    on_unit, side_by_side = amx.choice()[0] != "vectors", rows[0].dtype == np.uint32
    if T > FEW and side_by_side and on_unit:
        int4.many_tokens_on_tiles(workers, int4.tokens_in_tiles(x), amx.new_tiles(), padded, D, outs)
    elif T > FEW and side_by_side:
        int4.many_tokens_side_by_side(workers, int4.in_8_bits(x), padded, D, outs)
    elif T > FEW and rows[0].dtype != np.float32 and on_unit:
        _many_tokens_on_tiles(workers, amx.pack_tokens(x), amx.new_tiles(), padded, size, D, outs)
    elif T > FEW and size:
        packed, scales = _pack_pairs(x)
        _many_tokens_whole(workers, packed, scales, padded, size, D, ROWS if len(packed) == 1 else PANEL, outs)
    elif T > FEW:
        packed = _pack(x)
        panel = (ROWS, DEPTH // 2) if len(packed) == 1 else (PANEL, DEPTH)  # of the first- or second-level cache
        _many_tokens(workers, packed, padded, size, D, *panel, outs)
    elif size == 0 and rows[0].dtype.itemsize > 1:
        few_tokens(workers, x.reshape(-1), D, padded, outs)
    elif size == 0:
        _few_tokens_sfp8(workers, x.reshape(-1), D, padded, outs)
    else:
        few_tokens_blocks(workers, in_whole_numbers(x, side_by_side), D // BLOCK, padded, size, outs)
    return ys


@linear.kernel
def _linear(x, weight):
    require(x.ndim == 2 and rows_columns(weight)[1] == x.shape[1], "linear", x, weight)
    return _products(x, [weight])[0]


def linears(x: F32, *weights: Weight) -> list[F32]:
    """[linear(x, weight) for each weight], at most TOGETHER of them. If they are of one format, they go through one
    parallel region: its start takes as long as a small product.
    """
    if runs_formulas():
        return [linear(x, weight) for weight in weights]
    for weight in weights:
        require(x.ndim == 2 and rows_columns(weight)[1] == x.shape[1], "linears", x, weight)
    alike = len({(weight.dtype, weight.ndim, weight.shape[2:]) for weight in weights}) == 1
    return _products(x, weights) if alike else [linear(x, weight) for weight in weights]
