"""Products of many tokens with a weight: a panel of its rows is unpacked once and meets all tokens in the cache.

    1  the definition: x Wᵀ with all of W widened to float32
    2  a panel of rows and columns is unpacked and meets all tokens while it is in the cache
    3  … in tiles of ROWS x 2 · LANES sums that stay in registers: each number loaded is used ROWS or 2 · LANES times
    4  … with x in a form that the processor multiplies faster: int16 in pairs, int8 in fours, bf16 on AMX
    5  the next panel is prefetched meanwhile

One driver does this for every form of x. A form is a NamedTuple with the packed x and the `height` and `depth` of its
panels. It has five steps (STEPS): open_panel (a thread's buffers), unpack (some columns of some rows of a weight),
multiply, store_sums (to y) and close_panel. dispatch.py chooses the form by layout and processor. `minigemma bench`
compares a prompt with the peak of its multiply instruction.

Tokens are lanes here: x [T, D] is packed so that 2 · LANES tokens lie next to each other, number by number or pair by
pair. (In int4.py rows are; amx_panels.py has the tiles of AMX.)
"""

from typing import NamedTuple

import numpy as np
from numba import get_num_threads
from numpy.typing import NDArray

from ..arrays import F32, U16, aligned
from ..layouts.int8 import BLOCK, BYTES
from .amx_panels import (
    TileTokens,
    TileTokensA,
    close_tile_panel,
    multiply_tiles,
    multiply_tiles_b,
    open_tile_panel,
    store_tiles,
    store_tiles_b,
    unpack_tiles,
    unpack_tiles_b,
)
from .compiler import by_type, jit, jit_inner
from .int4 import ByteTokens, Panel, multiply_bytes, open_byte_panel, store_bytes, unpack_bytes
from .parallel import chunk, parallel, parallel_for, workers_for
from .prepare import round_whole
from .simd.accumulators import (
    int_tile_add_scaled,
    int_tile_zeros,
    tile_add_bf16_pairs,
    tile_add_outer,
    tile_add_pairs,
    tile_load,
    tile_store,
    tile_zeros,
)
from .simd.cpu import LANES, ROWS
from .simd.memory import bf16_bits, load_half, prefetch, prefetch_four
from .simd.products import unpack_32
from .weights import row_length, widen_row

PANEL = 8 * ROWS  # rows of weights that are unpacked together
DEPTH = 640  # columns of them that are; PANEL x DEPTH float32 stay in the second-level cache


class Part(NamedTuple):
    """Rows top … and columns first … of a weight."""

    top: int
    rows: int
    first: int
    width: int


# ---- x in float32, for float32 and bf16


class FloatTokens(NamedTuple):
    """x [T, D] as [T/16, D · 16]: tokens are lanes (2 · LANES of them); the last block repeats the last token."""

    packed: F32
    height: int
    depth: int


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


def float_tokens(x: F32) -> FloatTokens:
    """x [T, D] as it is, packed."""
    T, D = x.shape
    lanes = 2 * LANES
    packed = np.empty((-(-T // lanes), D * lanes), np.float32)
    _pack_all(min(get_num_threads(), len(packed)), x, packed)
    # One block of tokens takes so little time that the panel must come from the first-level cache.
    return FloatTokens(packed, *((ROWS, DEPTH // 2) if len(packed) == 1 else (PANEL, DEPTH)))


@jit_inner
def _open_floats(x):
    sums = np.empty((len(x.packed), PANEL * 2 * LANES), np.float32)
    return Panel(np.zeros(PANEL * DEPTH, np.float32), np.empty(0, np.float32), sums)


@jit_inner
def _unpack_floats(x, weight, part, panel):
    length = row_length(weight)
    for r in range(part.rows):
        widen_row(weight, part.top + r, part.first, part.width, panel.numbers, r * DEPTH)
        following = (part.top + x.height + r) * length + part.first
        for k in range(0, part.width, 4 * LANES):
            prefetch_four(weight.data, following + k)


@jit_inner
def _multiply_floats(x, part, panel):
    """sums += panel [rows, count] · packed[:, first : first + count]."""
    lanes = 2 * LANES
    for block in range(len(x.packed)):
        tokens, out = x.packed[block], panel.sums[block]
        for r in range(0, part.rows, ROWS):
            tile = tile_load(out, r * lanes, lanes) if part.first else tile_zeros()
            for d in range(part.width):
                tile = tile_add_outer(tile, panel.numbers, r * DEPTH + d, DEPTH, tokens, (part.first + d) * lanes)
            tile_store(tile, out, r * lanes, lanes)


@jit_inner
def _store_floats(x, part, panel, y):
    lanes = 2 * LANES
    for t in range(len(y)):
        block, lane = t // lanes, t % lanes
        for r in range(part.rows):
            y[t, part.top + r] = panel.sums[block, r * lanes + lane]


# ---- x in bf16, for bf16: AVX-512's vdpbf16ps, 32 products per instruction


class RoundedTokens(NamedTuple):
    """x [T, D] as bf16 in pairs [T/16, D · 16], tokens as lanes."""

    packed: U16
    height: int
    depth: int


@jit_inner
def _round_rows(worker, workers, x, out):
    for t in chunk(worker, workers, len(x)):
        for d in range(x.shape[1]):
            out[t, d] = bf16_bits(x[t, d])


@jit
def _pack_all_rounded(workers, x, rounded, words, packed):
    parallel_for(_round_rows, workers, (x, rounded))
    parallel_for(_pack_some, min(workers, len(packed)), (words, packed))


def rounded_tokens(x: F32) -> RoundedTokens:
    """x [T, D] rounded to bf16, for bf16 rows."""
    (T, D), lanes = x.shape, 2 * LANES
    rounded, blocks = np.empty((T, D), np.uint16), -(-T // lanes)
    packed = aligned(blocks * D // 2 * lanes, np.uint32).reshape(blocks, -1)
    _pack_all_rounded(workers_for(x), x, rounded, rounded.view(np.uint32), packed)
    return RoundedTokens(packed.view(np.uint16), ROWS if blocks == 1 else PANEL, DEPTH)


@jit_inner
def _open_rounded(x):
    sums = np.empty((len(x.packed), PANEL * 2 * LANES), np.float32)
    return Panel(np.zeros(PANEL * DEPTH, np.uint16), np.empty(0, np.float32), sums)


@jit_inner
def _unpack_rounded(x, weight, part, panel):
    for r in range(part.rows):
        at = (part.top + r) * weight.columns + part.first
        for k in range(part.width):
            panel.numbers[r * DEPTH + k] = weight.data[at + k]
        for k in range(0, part.width, 4 * LANES):
            prefetch_four(weight.data, at + x.height * weight.columns + k)


@jit_inner
def _multiply_rounded(x, part, panel):
    lanes = 2 * LANES
    for block in range(len(x.packed)):
        tokens, out = x.packed[block], panel.sums[block]
        for r in range(0, part.rows, ROWS):
            tile = tile_load(out, r * lanes, lanes) if part.first else tile_zeros()
            for d in range(0, part.width, 2):
                tile = tile_add_bf16_pairs(tile, panel.numbers, r * DEPTH + d, DEPTH, tokens, (part.first + d) * lanes)
            tile_store(tile, out, r * lanes, lanes)


# ---- x in 16 bits, a scale for each token, for int8: both enter in pairs of int16


class PairTokens(NamedTuple):
    """x [T, D] as int16 in pairs [T/16, D · 16], tokens as lanes, and the scale of each token."""

    packed: NDArray[np.int16]
    scales: F32
    height: int
    depth: int


@jit_inner
def _round_some(worker, workers, x, whole, scales):
    flat, D = x.reshape(-1), x.shape[1]
    for t in chunk(worker, workers, len(x)):
        scales[t], _ = round_whole(flat, t * D, D, 32767, whole, t * D, BLOCK)


@jit
def _pack_all_pairs(workers, x, whole, scales, words, packed):
    parallel_for(_round_some, workers, (x, whole, scales))
    parallel_for(_pack_some, min(workers, len(packed)), (words, packed))


def pair_tokens(x: F32) -> PairTokens:
    """x [T, D] rounded to 16 bits, for int8 rows."""
    (T, D), lanes = x.shape, 2 * LANES
    whole, scales, blocks = aligned(T * D, np.int16), np.empty(T, np.float32), -(-T // lanes)
    packed = aligned(blocks * D // 2 * lanes, np.int32).reshape(blocks, -1)
    _pack_all_pairs(workers_for(x), x, whole, scales, whole.view(np.int32).reshape(T, -1), packed)
    return PairTokens(packed.view(np.int16), scales, ROWS if blocks == 1 else PANEL, DEPTH)


@jit_inner
def _open_pairs(x):
    numbers, scales = np.zeros(PANEL * DEPTH, np.int16), np.zeros(PANEL * DEPTH // BLOCK, np.float32)
    return Panel(numbers, scales, np.empty((len(x.packed), PANEL * 2 * LANES), np.float32))


@jit_inner
def _unpack_pairs(x, weight, part, panel):
    length, data = row_length(weight), weight.data
    for r in range(part.rows):
        at = (part.top + r) * length + part.first // BLOCK * BYTES
        for block in range(part.width // BLOCK):
            here = at + block * BYTES
            panel.scales[r * (DEPTH // BLOCK) + block] = load_half(data, here)
            unpack_32(data, here + 2, panel.numbers, r * DEPTH + block * BLOCK)
        for k in range(0, part.width // BLOCK * BYTES, 64):
            prefetch(data, at + x.height * length + k)


@jit_inner
def _multiply_pairs(x, part, panel):
    """The same in integers, each block's sum times its scale."""
    (numbers, scales, sums), lanes, blocks = panel, 2 * LANES, DEPTH // BLOCK
    for i in range(len(x.packed)):
        tokens, out = x.packed[i], sums[i]
        if part.first == 0:
            out[: (part.rows + ROWS - 1) // ROWS * ROWS * lanes] = 0
        for r in range(0, part.rows, ROWS):
            for block in range(part.width // BLOCK):
                tile, at = int_tile_zeros(), (part.first + block * BLOCK) * lanes
                for k in range(0, BLOCK, 2):
                    tile = tile_add_pairs(tile, numbers, r * DEPTH + block * BLOCK + k, DEPTH, tokens, at + k * lanes)
                int_tile_add_scaled(tile, scales, r * blocks + block, blocks, out, r * lanes, lanes)


@jit_inner
def _store_pairs(x, part, panel, y):
    lanes = 2 * LANES
    for t in range(len(y)):
        block, lane = t // lanes, t % lanes
        for r in range(part.rows):
            y[t, part.top + r] = panel.sums[block, r * lanes + lane] * x.scales[t]


# ---- the driver


@jit_inner
def _nothing(x, panel):
    pass


STEPS = {  # of each form: open_panel, unpack, multiply, store_sums, close_panel
    FloatTokens: (_open_floats, _unpack_floats, _multiply_floats, _store_floats, _nothing),
    PairTokens: (_open_pairs, _unpack_pairs, _multiply_pairs, _store_pairs, _nothing),
    RoundedTokens: (_open_rounded, _unpack_rounded, _multiply_rounded, _store_floats, _nothing),
    ByteTokens: (open_byte_panel, unpack_bytes, multiply_bytes, store_bytes, _nothing),
    TileTokens: (open_tile_panel, unpack_tiles, multiply_tiles, store_tiles, close_tile_panel),
    TileTokensA: (open_tile_panel, unpack_tiles_b, multiply_tiles_b, store_tiles_b, close_tile_panel),
}
open_panel, unpack, multiply, store_sums, close_panel = (
    by_type(name, {form: steps[i] for form, steps in STEPS.items()})
    for i, name in enumerate(("open_panel", "unpack", "multiply", "store_sums", "close_panel"))
)


@parallel
def matmul(worker, workers, x, weights, ys):
    """ys[i] [T, R] = x weights[i]ᵀ: x packed in one of the forms above, weights of a layout that goes with it."""
    panel = open_panel(x)
    for i in range(len(weights)):
        weight = weights[i]
        for p in chunk(worker, workers, (weight.rows + x.height - 1) // x.height):
            top = p * x.height
            rows = min(x.height, weight.rows - top)
            for first in range(0, weight.columns, x.depth):
                part = Part(top, rows, first, min(x.depth, weight.columns - first))
                unpack(x, weight, part, panel)
                multiply(x, part, panel)
            store_sums(x, Part(top, rows, 0, weight.columns), panel, ys[i])
    close_panel(x, panel)
