"""Products with int4 weights, sixteen rows side by side (layouts/int4.py).

x is rounded to 8 bits, with a scale for each block of 32 of each token: little beside what four bits did to the
weights (docs/accuracy.md). Sums of whole numbers are exact. Each begins at -8 Σ x, which stands for the 8 in q - 8.
"""

from __future__ import annotations

import numpy as np
from numba import float32
from numpy.typing import NDArray

from ..arrays import F32, aligned
from ..layouts.int4 import BLOCK, BYTES, SIDE
from . import amx
from .compiler import jit, jit_inner, workers_for
from .parallel import chunk, parallel_for
from .simd import (
    LANES,
    ROWS,
    STREAMS,
    add_int4_block,
    add_int4_block_to_four,
    bf16_bits,
    byte_tile_add,
    byte_tile_add_scaled,
    byte_tile_zeros,
    four_row_sums_zeros,
    load,
    magnitude,
    max_lanes,
    maximum,
    prefetch,
    prefetch_ahead,
    round_int4_block,
    round_lanes,
    row_sums_zeros,
    splat,
    store_row_sums,
    store_whole,
    sum_lanes,
    unpack_int4_block,
    zeros,
)

WORDS = BYTES // 4  # as which a kernel sees them, uint32
QUADS = BLOCK // 4
DEPTH = 1024  # columns that are unpacked together, for many tokens
UNIT_DEPTH = 2304  # columns of 32 rows that are, for the matrix unit


# ---- x in whole numbers of 8 bits


@jit_inner
def round_to_8_bits(x, k, count, zero, whole):
    """x[k : k + count] ≈ whole[k : …] · scale, where x is float32 and `count` a multiple of LANES. Returns the scale,
    and -zero · Σ whole: where a sum of products with weights q - zero begins.
    """
    highest, total = zeros(), zeros()
    for i in range(k, k + count, LANES):
        highest = maximum(highest, magnitude(load(x, i)))
    largest = max_lanes(highest)
    up = splat(float32(127) / largest if largest > 0 else float32(0))
    for i in range(k, k + count, LANES):
        q = round_lanes(load(x, i) * up)
        store_whole(whole, i, q)
        total = total + q
    return largest / float32(127), np.int32(-zero * sum_lanes(total))


@jit_inner
def round_blocks(x, whole, scales, starts, first, last):
    """Blocks first … last - 1 of x, for int4."""
    for block in range(first, last):
        scales[block], starts[block] = round_to_8_bits(x, block * BLOCK, BLOCK, 8, whole)


@jit_inner
def _round_some(worker, workers, x, whole, scales, starts):
    mine = chunk(worker, workers, x.size // BLOCK)
    round_blocks(x, whole, scales, starts, mine.start, mine.stop)


@jit
def _round_all(workers, x, whole, scales, starts):
    parallel_for(_round_some, workers, (x, whole, scales, starts))


Rounded = tuple[NDArray[np.int8], NDArray[np.float32], NDArray[np.int32]]


def in_8_bits(x: F32) -> Rounded:
    """x [T, D] → whole numbers, their scales and starts, with room for tokens up to a multiple of ROWS."""
    (T, D), tokens = x.shape, -(-len(x) // ROWS) * ROWS
    whole, blocks = aligned(tokens * D, np.int8), tokens * D // BLOCK
    scales, starts = np.zeros(blocks, np.float32), np.zeros(blocks, np.int32)
    whole[T * D :] = 0
    _round_all(workers_for(x), x.reshape(-1), whole, scales, starts)
    return whole, scales, starts


# ---- few tokens


@jit_inner
def few_rows(x, blocks, weight, group, other, y):
    """y[:, 16 group : 16 group + 16] = the products of sixteen rows with each token, and those of the group `other`;
    for one token both are read at once, where two STREAMS are best: see few_tokens.py. x as `few_in_8_bits` makes it.
    """
    (whole, scales, starts), out, (T, R) = x, y.reshape(y.size), y.shape
    if T == 1:
        one, two, at, there = row_sums_zeros(), row_sums_zeros(), group * blocks * WORDS, other * blocks * WORDS
        for block in range(blocks):
            for line in range(0, WORDS, 16):
                prefetch_ahead(weight, at + line)
                if STREAMS == 2:
                    prefetch_ahead(weight, there + line)
            one = add_int4_block(one, weight, at, whole, block * BLOCK, scales[block], starts[block])
            if STREAMS == 2:
                two = add_int4_block(two, weight, there, whole, block * BLOCK, scales[block], starts[block])
            at, there = at + WORDS, there + WORDS
        store_row_sums(one, out, group * SIDE)
        if STREAMS == 2:
            store_row_sums(two, out, other * SIDE)
        return
    for stream in range(STREAMS):
        sixteen = other if stream else group
        for t in range(0, T, 4):
            four, at = four_row_sums_zeros(), sixteen * blocks * WORDS
            for block in range(t * blocks, t * blocks + blocks):
                for line in range(0, WORDS if t == 0 else 0, 16):
                    prefetch_ahead(weight, at + line)
                four = add_int4_block_to_four(four, weight, at, whole, scales, starts, block, blocks)
                at += WORDS
            for i in range(min(4, T - t)):
                store_row_sums(four[i], out, (t + i) * R + sixteen * SIDE)


@jit_inner
def few_in_8_bits(x):
    """As `in_8_bits`, in a kernel: with room for tokens up to a multiple of four, if there are several."""
    T, D = x.shape
    room = D if T == 1 else (T + 3) // 4 * 4 * D
    whole, blocks = np.empty(room, np.int8), T * D // BLOCK
    scales, starts = np.empty(room // BLOCK, np.float32), np.empty(room // BLOCK, np.int32)
    round_blocks(x.reshape(x.size), whole, scales, starts, 0, blocks)
    for block in range(blocks, scales.size):
        scales[block], starts[block] = 0, 0
        for k in range(block * BLOCK, block * BLOCK + BLOCK):
            whole[k] = 0
    return whole, scales, starts


# ---- many tokens


@jit_inner
def _some_panels(worker, workers, x, weight, columns, panel, scales, sums, y):
    (whole, x_scales, starts), (T, R), lanes, blocks = x, y.shape, 2 * LANES, columns // BLOCK
    for p in chunk(worker, workers, (R + lanes - 1) // lanes):
        top, rows = p * lanes, min(lanes, R - p * lanes)
        sums[:] = 0
        for first in range(0, blocks, DEPTH // BLOCK):
            count = min(DEPTH // BLOCK, blocks - first)
            for side in range(rows // SIDE):
                at = ((top // SIDE + side) * blocks + first) * WORDS
                for block in range(count):
                    to = block * BLOCK * lanes + side * 4 * SIDE
                    unpack_int4_block(weight, at, panel, to, 4 * lanes, scales, block * lanes + side * SIDE)
                    for line in range(0, WORDS, 16):
                        prefetch(weight, at + lanes // SIDE * blocks * WORDS + line)
                    at += WORDS
            for t in range(0, T, ROWS):
                for block in range(count):
                    tile, here = byte_tile_zeros(), t * blocks + first + block
                    for four in range(QUADS):
                        k, to = here * BLOCK + 4 * four, (block * QUADS + four) * 4 * lanes
                        tile = byte_tile_add(tile, whole, k, columns, panel, to)
                    own = load(scales, block * lanes), load(scales, block * lanes + LANES)
                    byte_tile_add_scaled(tile, own, x_scales, starts, here, blocks, sums, t * lanes)
        for t in range(T):
            for r in range(rows):
                y[t, top + r] = sums[t * lanes + r]


@jit_inner
def _panels_of_all(worker, workers, x, weights, columns, ys):
    lanes, tokens = 2 * LANES, (len(ys[0]) + ROWS - 1) // ROWS * ROWS
    panel = amx.on_cache_line(np.zeros(DEPTH * lanes + 64, np.uint8), DEPTH * lanes)
    scales, sums = np.zeros(DEPTH // BLOCK * lanes, np.float32), np.empty(tokens * lanes, np.float32)
    for i in range(len(weights)):
        _some_panels(worker, workers, x, weights[i], columns, panel, scales, sums, ys[i])


@jit
def many_tokens_side_by_side(workers, x, weights, columns, ys):
    """x Wᵀ for each weight: DEPTH columns of 2 · LANES rows are unpacked and used for all tokens while in the cache."""
    parallel_for(_panels_of_all, workers, (x, weights, columns, ys))


# ---- many tokens on the matrix unit: the tokens are A, and the weights, whose rows are lanes already, are B (amx.py)


@jit_inner
def _some_tokens(worker, workers, x, packed, steps):
    for t in chunk(worker, workers, len(x)):
        for step in range(steps):
            at = ((t // 32 * steps + step) * 2 + t % 32 // 16) * amx.TILE + t % 16 * amx.DEPTH
            for k in range(amx.DEPTH):
                packed[at + k] = bf16_bits(x[t, step * amx.DEPTH + k])


@jit
def _pack_tokens(workers, x, packed, steps):
    parallel_for(_some_tokens, workers, (x, packed, steps))


def tokens_in_tiles(x: F32) -> NDArray[np.uint16]:
    """x [T, D] as bf16 in tiles of 16 tokens and 32 columns, two by two; the last are filled up with zeros."""
    T, steps = len(x), x.shape[1] // amx.DEPTH
    packed = aligned(-(-T // 32) * steps * 2 * amx.TILE, np.uint16)
    if T % 32:
        packed[:] = 0
    _pack_tokens(workers_for(x), x, packed, steps)
    return packed


@jit_inner
def _some_on_tiles(worker, workers, packed, registers, weight, columns, panel, sums, y):
    (T, R), blocks = y.shape, columns // BLOCK
    for p in chunk(worker, workers, (R + 31) // 32):
        rows = min(32, R - p * 32)
        for first in range(0, blocks, UNIT_DEPTH // BLOCK):
            depth = min(UNIT_DEPTH // BLOCK, blocks - first)
            for side in range(rows // SIDE):
                at = ((p * 2 + side) * blocks + first) * WORDS
                for step in range(depth):
                    round_int4_block(weight, at + step * WORDS, panel, (step * 2 + side) * amx.TILE)
            for block in range((T + 31) // 32):
                tokens = packed[(block * blocks + first) * 2 * amx.TILE :]
                own = sums[block * 1024 : block * 1024 + 1024]
                amx.multiply_panel(registers, tokens, panel, 0, 0, depth, first > 0, own)
        for t in range(T):
            at = t // 32 * 1024 + t // 16 % 2 * 512 + t % 16 * 16
            for r in range(rows):
                y[t, p * 32 + r] = sums[at + r // 16 * 256 + r % 16]


@jit_inner
def _all_on_tiles(worker, workers, packed, tiles, weights, columns, ys):
    blocks, registers = (len(ys[0]) + 31) // 32, tiles.copy()
    panel = amx.on_cache_line(np.zeros(32 * UNIT_DEPTH + 32, np.uint16), 32 * UNIT_DEPTH)
    sums = amx.on_cache_line(np.empty(blocks * 1024 + 16, np.float32), blocks * 1024)
    amx.begin(registers)
    for i in range(len(weights)):
        _some_on_tiles(worker, workers, packed, registers, weights[i], columns, panel, sums, ys[i])
    amx.end(registers)


@jit
def many_tokens_on_tiles(workers, packed, tiles, weights, columns, ys):
    """x Wᵀ for each weight, UNIT_DEPTH columns of 32 rows at a time."""
    parallel_for(_all_on_tiles, workers, (packed, tiles, weights, columns, ys))
