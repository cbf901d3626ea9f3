"""Products of bytes: weights of four bits, sixteen rows interleaved (layouts/int4.py), and for many tokens int8; each
lane holds one row. One loop serves blocks with and without minima: those without take their scales, times -8.

For up to 16 tokens x is in 8 bits in blocks of 32 (prepare.py), and a block of weights is unpacked in registers. For
more, DEPTH columns of 2 · LANES rows are unpacked to bytes, which stay in the cache and meet all tokens (matmul.py).
"""

from typing import Any, NamedTuple

import numpy as np
from numba import float32
from numpy.typing import NDArray

from ..arrays import F32, aligned
from ..layouts.int4 import BLOCK, SIDE
from ..layouts.int8 import BYTES as INT8_BYTES
from .amx import on_cache_line
from .compiler import by_type, jit_inner
from .parallel import chunk, parallel, workers_for
from .prepare import round_blocks
from .simd.cpu import LANES, ROWS, STREAMS
from .simd.interleaved import (
    add_int4_block,
    add_int4_block_to_four,
    byte_tile_add,
    byte_tile_add_scaled,
    byte_tile_zeros,
    four_row_sums_zeros,
    row_sums_zeros,
    store_row_sums,
    unpack_halves,
    unpack_int4_block,
    unpack_int8_block,
)
from .simd.memory import load_half, prefetch, prefetch_ahead
from .weights import Int4Rows, Int8Rows, block_words, factor_of_minima, minima_at, row_length

LONGEST = 80  # words of a block
QUADS = BLOCK // 4
DEPTH = 1024  # columns that are unpacked together


@jit_inner
def few_rows(x, weight, group, other, y):
    """y[:, 16 group : 16 group + 16] = the products of a group of rows with each token; same for `other`. One token
    reads both groups at once if there are two STREAMS (pairs.py).
    """
    (whole, scales), out, (T, R), blocks = x, y.reshape(-1), y.shape, weight.columns // BLOCK
    words, size, minima = weight.data, block_words(weight), minima_at(weight)
    if T == 1:
        one, two, at, there = row_sums_zeros(), row_sums_zeros(), group * blocks * size, other * blocks * size
        for block in range(blocks):
            scale, total = scales[2 * block], scales[2 * block + 1]
            for line in range(0, LONGEST, 16):
                prefetch_ahead(words, at + line)
                if STREAMS == 2:
                    prefetch_ahead(words, there + line)
            one = add_int4_block(one, words, at, minima, whole, block * BLOCK, scale, total)
            if STREAMS == 2:
                two = add_int4_block(two, words, there, minima, whole, block * BLOCK, scale, total)
            at, there = at + size, there + size
        store_row_sums(one, out, group * SIDE)
        if STREAMS == 2:
            store_row_sums(two, out, other * SIDE)
        return
    for stream in range(STREAMS):
        sixteen = other if stream else group
        for t in range(0, T, 4):
            four, at = four_row_sums_zeros(), sixteen * blocks * size
            for block in range(t * blocks, t * blocks + blocks):
                for line in range(0, LONGEST if t == 0 else 0, 16):
                    prefetch_ahead(words, at + line)
                four = add_int4_block_to_four(four, words, at, minima, whole, scales, block, blocks)
                at += size
            for i in range(min(4, T - t)):
                store_row_sums(four[i], out, (t + i) * R + sixteen * SIDE)


# ---- many tokens: the steps of matmul.py


class ByteTokens(NamedTuple):
    """x [T, D] as int8 in blocks of 32, padded to a multiple of ROWS tokens; `scales`: of each block, and its total."""

    whole: NDArray[np.int8]
    scales: F32
    tokens: int
    columns: int
    height: int
    depth: int


@parallel
def _round_some(worker, workers, x, whole, scales):
    mine = chunk(worker, workers, x.size // BLOCK)
    round_blocks(x, mine.start, mine.stop, whole, scales, 1)


def byte_tokens(x: F32) -> ByteTokens:
    """x [T, D] rounded to 8 bits, for rows of int4 or int8."""
    (T, D), tokens = x.shape, -(-len(x) // ROWS) * ROWS
    whole, scales = aligned(tokens * D, np.int8), np.zeros(tokens * D // BLOCK * 2, np.float32)
    whole[T * D :] = 0
    _round_some(workers_for(x), x.reshape(-1), whole, scales)
    return ByteTokens(whole, scales, tokens, D, 2 * LANES, DEPTH)


class Panel(NamedTuple):
    """A thread's buffers: the unpacked part (here 2 · LANES rows, four columns together), its scales, and sums."""

    numbers: Any
    scales: Any
    sums: Any


@jit_inner
def open_byte_panel(x):
    """A panel for a thread."""
    lanes = 2 * LANES
    numbers = on_cache_line(np.zeros(DEPTH * lanes + 64, np.uint8), DEPTH * lanes)
    return Panel(numbers, np.zeros(DEPTH // BLOCK * 2 * lanes, np.float32), np.empty(x.tokens * lanes, np.float32))


@jit_inner
def _unpack_int4(x, weight, part, panel):
    """Unpacks columns of 2 · LANES rows to bytes, and scales and minima of each block; prefetches the next rows."""
    lanes, blocks, size, minima = 2 * LANES, weight.columns // BLOCK, block_words(weight), minima_at(weight)
    for side in range(part.rows // SIDE):
        at = ((part.top // SIDE + side) * blocks + part.first // BLOCK) * size
        for block in range(part.width // BLOCK):
            to, there = block * BLOCK * lanes + side * 4 * SIDE, block * 2 * lanes + side * SIDE
            unpack_int4_block(weight.data, at, minima, panel.numbers, to, 4 * lanes)
            unpack_halves(weight.data, at, 1, panel.scales, there)
            unpack_halves(weight.data, at + minima, factor_of_minima(weight), panel.scales, there + lanes)
            for line in range(0, LONGEST, 16):
                prefetch(weight.data, at + lanes // SIDE * blocks * size + line)
            at += size


@jit_inner
def _unpack_int8(x, weight, part, panel):
    """The same of int8, as q = w + 128 and m = -128 d: the instruction takes unsigned bytes."""
    lanes, length, data = 2 * LANES, row_length(weight), weight.data
    for r in range(part.rows):
        at = (part.top + r) * length + part.first // BLOCK * INT8_BYTES
        for block in range(part.width // BLOCK):
            scale, to = load_half(data, at), block * 2 * lanes + r
            panel.scales[to], panel.scales[to + lanes] = scale, float32(-128) * scale
            unpack_int8_block(data, at + 2, panel.numbers, block * BLOCK * lanes + 4 * r, 4 * lanes)
            at += INT8_BYTES
        for k in range(0, part.width // BLOCK * INT8_BYTES, 64):
            prefetch(data, at + (lanes - 1) * length + k)


_unpack_rows = by_type("unpack_rows", {Int4Rows: _unpack_int4, Int8Rows: _unpack_int8}, on="weight")


@jit_inner
def unpack_bytes(x, weight, part, panel):
    """Unpacks some columns of 2 · LANES rows."""
    _unpack_rows(x, weight, part, panel)


@jit_inner
def multiply_bytes(x, part, panel):
    """sums += the products of all tokens with the panel."""
    lanes, blocks, (numbers, scales, sums) = 2 * LANES, x.columns // BLOCK, panel
    if part.first == 0:
        sums[:] = 0
    for t in range(0, x.tokens, ROWS):
        for block in range(part.width // BLOCK):
            tile, here = byte_tile_zeros(), t * blocks + part.first // BLOCK + block
            for four in range(QUADS):
                k, to = here * BLOCK + 4 * four, (block * QUADS + four) * 4 * lanes
                tile = byte_tile_add(tile, x.whole, k, x.columns, numbers, to)
            byte_tile_add_scaled(tile, scales, block * 2 * lanes, x.scales, here, blocks, sums, t * lanes)


@jit_inner
def store_bytes(x, part, panel, y):
    """Writes the sums of all tokens to y."""
    lanes = 2 * LANES
    for t in range(len(y)):
        for r in range(part.rows):
            y[t, part.top + r] = panel.sums[t * lanes + r]
