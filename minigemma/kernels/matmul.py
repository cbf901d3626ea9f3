"""Products of many tokens with a weight: a panel of its rows is widened once, for all tokens, and stays in the cache.

Numbers are widened to float32. Whole numbers stay what they are, in pairs of 16 bits, and meet x rounded to 16 bits as
few tokens do. On the matrix unit both enter as bf16. (int4 with sixteen rows side by side: int4.py.)

Tokens are lanes: x [T, D] is packed so that 2 · LANES tokens lie beside each other, number by number or pair by pair.
"""

from __future__ import annotations

import numpy as np
from numba import get_num_threads, types
from numba.extending import overload

from ..arrays import aligned
from ..layouts.sfp8 import SCALE_BYTES, VALUES
from ..layouts.weight import BLOCK
from . import amx
from .compiler import INNER, jit, jit_inner, workers_for
from .matvec import round_token
from .parallel import chunk, parallel_for
from .simd import (
    LANES,
    ROWS,
    bf16_bits,
    int_tile_add_scaled,
    int_tile_zeros,
    load,
    load_float,
    load_half,
    load_high_nibbles,
    load_low_nibbles,
    load_one,
    load_sfp8,
    prefetch,
    prefetch_four,
    splat,
    splat_half,
    store,
    tile_add_outer,
    tile_add_pairs,
    tile_load,
    tile_store,
    tile_zeros,
    unpack_32,
)

PANEL = 8 * ROWS  # rows of weights that are widened together
DEPTH = 640  # columns of them that are; PANEL x DEPTH float32 stay in the second-level cache
UNIT_DEPTH = 2304  # columns of 32 rows of them that are rounded to bf16 together for the matrix unit


def widen_row(weight, at, size, first, count, out, to):
    """out[to : to + count] = columns first … first + count - 1 of the row that begins at weight[at], widened; both
    multiples of 32 where `size` bytes are 32; 0: sfp8.
    """


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


@overload(widen_row, jit_options=INNER)
def _choose_widen_row(weight, at, size, first, count, out, to):
    return {types.int8: _widen_signed, types.uint8: _widen_nibbles}.get(weight.dtype, _widen_plain).py_func


@jit_inner
def _pack_some(worker, workers, x, packed):
    (T, D), lanes = x.shape, 2 * LANES
    for block in chunk(worker, workers, len(packed)):
        for left in range(0, D, 64):
            # Four tokens at a time: the first-level cache has few places for lines that lie D = 2,048 numbers apart.
            for four in range(0, lanes, 4):
                for d in range(left, min(D, left + 64)):
                    for lane in range(four, four + 4):
                        packed[block, d * lanes + lane] = x[min(block * lanes + lane, T - 1), d]


@jit
def _pack_all(workers, x, packed):
    parallel_for(_pack_some, workers, (x, packed))


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
    for p in chunk(worker, workers, (R + height - 1) // height):
        top, rows = p * height, min(height, R - p * height)
        for first in range(0, columns, width):
            count = min(width, columns - first)
            for r in range(rows):
                widen_row(weight, (top + r) * stride, size, first, count, panel, r * DEPTH)
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
    parallel_for(_panels_of_all, workers, (packed, weights, size, columns, height, width, ys))


# ---- many tokens against whole numbers: x, rounded to 16 bits, and a panel of weights, as they are, in pairs of int16


@jit_inner
def _round_some(worker, workers, x, whole, scales):
    flat_x, D = x.reshape(-1), x.shape[1]
    for t in chunk(worker, workers, len(x)):
        scales[t] = round_token(flat_x, t * D, D, whole, t * D, -1, 1)


@jit
def _pack_all_pairs(workers, x, whole, scales, words, packed):
    parallel_for(_round_some, workers, (x, whole, scales))
    parallel_for(_pack_some, min(workers, len(packed)), (words, packed))


def _pack_pairs(x):
    """x [T, D] → int16 in pairs [T/16, D · 16], tokens as lanes, and the scale of each token."""
    (T, D), lanes = x.shape, 2 * LANES
    whole, scales, blocks = aligned(T * D, np.int16), np.empty(T, np.float32), -(-T // lanes)
    packed = aligned(blocks * D // 2 * lanes, np.int32).reshape(blocks, -1)
    _pack_all_pairs(workers_for(x), x, whole, scales, whole.view(np.int32).reshape(T, -1), packed)
    return packed.view(np.int16), scales


@jit_inner
def _unpack_row(weight, at, size, first, count, panel, to, scales, there):
    """panel[to : to + count] = the whole numbers in columns first … first + count - 1 of the row at weight[at], as
    int16; scales[there :] = the scale of each 32.
    """
    for block in range(count // BLOCK):
        here = at + (first // BLOCK + block) * size
        scales[there + block] = load_half(weight, here) if size % 16 else load_float(weight, at)
        here += 2 if size % 16 else SCALE_BYTES
        unpack_32(weight, here, panel, to + block * BLOCK)


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
                tile, at = int_tile_zeros(), (first + block * BLOCK) * lanes
                for k in range(0, BLOCK, 2):
                    tile = tile_add_pairs(tile, panel, r * DEPTH + block * BLOCK + k, DEPTH, tokens, at + k * lanes)
                int_tile_add_scaled(tile, scales, r * blocks + block, blocks, out, r * lanes, lanes)


@jit_inner
def _some_whole_panels(worker, workers, packed, token_scales, weight, size, columns, height, panel, scales, sums, y):
    (T, R), lanes, blocks = y.shape, 2 * LANES, DEPTH // BLOCK
    stride = weight.size // max(1, R)
    for p in chunk(worker, workers, (R + height - 1) // height):
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
    parallel_for(_whole_panels_of_all, workers, (packed, token_scales, weights, size, columns, height, ys))


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
    widen_row(weight, at, size, first, count, wide, 0)
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
    for p in chunk(worker, workers, (R + 31) // 32):
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
    parallel_for(_panels_of_all_on_tiles, workers, (packed, tiles, weights, size, columns, ys))


# ---- what the choice in linear.py calls


def many_tokens_widened(workers, x, weights, size, ys):
    """ys[i] = x weights[i]ᵀ in float32: x [T, D], weights as `flat` makes them, ys [T, R]."""
    packed = _pack(x)
    panel = (ROWS, DEPTH // 2) if len(packed) == 1 else (PANEL, DEPTH)  # of the first- or second-level cache
    _many_tokens(workers, packed, weights, size, x.shape[1], *panel, ys)


def many_tokens_in_pairs(workers, x, weights, size, ys):
    """The same against whole numbers."""
    packed, scales = _pack_pairs(x)
    height = ROWS if len(packed) == 1 else PANEL
    _many_tokens_whole(workers, packed, scales, weights, size, x.shape[1], height, ys)


def many_tokens_on_tiles(workers, x, weights, size, ys):
    """The same on the matrix unit."""
    _many_tokens_on_tiles(workers, amx.pack_tokens(x), amx.new_tiles(), weights, size, x.shape[1], ys)
