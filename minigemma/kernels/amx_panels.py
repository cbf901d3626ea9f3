"""Many tokens on AMX: x and the weights enter as bf16 (amx.py), 32 rows and 32 tokens at a time.

bf16, int8   a weight's rows are A, one after the other; the tokens are B, in pairs        TileTokens
int4         the interleaved rows are B as stored; the tokens are A                        TileTokensA
"""

from typing import Any, NamedTuple

import numpy as np

from ..arrays import F32, U16, aligned
from ..layouts.int4 import BLOCK, SIDE
from . import amx
from .compiler import by_type, jit_inner
from .parallel import chunk, parallel, workers_for
from .simd.interleaved import round_int4_block
from .simd.memory import bf16_bits
from .weights import BF16Rows, Int8Rows, block_words, factor_of_minima, minima_at, widen_row

DEPTH = 2304  # columns of 32 rows that are rounded to bf16 together
HEIGHT = 32


class TileTokens(NamedTuple):
    """x [T, D] as B: bf16 in pairs, as `amx.pack_tokens` makes them; `tiles` is what `amx.new_tiles` makes."""

    packed: U16
    tiles: U16
    blocks: int  # of 32 tokens
    columns: int
    height: int
    depth: int


class TileTokensA(TileTokens):
    """x [T, D] as A: tiles of 16 tokens and 32 columns, in pairs; zeros fill the last."""


def tile_tokens(x: F32) -> TileTokens:
    """x [T, D] rounded to bf16, for rows of bf16 or int8."""
    return TileTokens(amx.pack_tokens(x), amx.new_tiles(), -(-len(x) // 32), x.shape[1], HEIGHT, DEPTH)


@parallel
def _some_tokens(worker, workers, x, packed, steps):
    for t in chunk(worker, workers, len(x)):
        for step in range(steps):
            at = ((t // 32 * steps + step) * 2 + t % 32 // 16) * amx.TILE + t % 16 * amx.DEPTH
            for k in range(amx.DEPTH):
                packed[at + k] = bf16_bits(x[t, step * amx.DEPTH + k])


def tile_tokens_a(x: F32) -> TileTokensA:
    """x [T, D] rounded to bf16, for rows of int4."""
    T, steps = len(x), x.shape[1] // amx.DEPTH
    packed = aligned(-(-T // 32) * steps * 2 * amx.TILE, np.uint16)
    if T % 32:
        packed[:] = 0
    _some_tokens(workers_for(x), x, packed, steps)
    return TileTokensA(packed, amx.new_tiles(), -(-T // 32), x.shape[1], HEIGHT, DEPTH)


class TilePanel(NamedTuple):
    """32 rows as bf16 tiles, room for a row in float32, sums [blocks of 32 tokens, 4 tiles], and the registers."""

    numbers: Any
    wide: Any
    sums: Any
    registers: Any


@jit_inner
def open_tile_panel(x):
    """A thread's buffers; configures the registers."""
    registers = x.tiles.copy()
    numbers = amx.on_cache_line(np.zeros(HEIGHT * DEPTH + 32, np.uint16), HEIGHT * DEPTH)
    sums = amx.on_cache_line(np.empty(x.blocks * 1024 + 16, np.float32), x.blocks * 1024)
    amx.begin(registers)
    return TilePanel(numbers, np.empty(DEPTH, np.float32), sums, registers)


@jit_inner
def close_tile_panel(x, panel):
    """Releases the registers."""
    amx.end(panel.registers)


@jit_inner
def _copy_row(weight, row, part, panel):
    """Row `row` of the panel: columns of a weight's row as bf16, zeros up to a whole tile."""
    at = (part.top + row) * weight.columns + part.first
    for k in range(0, part.width, amx.DEPTH):
        to = (k // amx.DEPTH * HEIGHT + row) * amx.DEPTH
        for i in range(amx.DEPTH):
            panel.numbers[to + i] = weight.data[at + k + i] if k + i < part.width else np.uint16(0)


@jit_inner
def _widen_and_round_row(weight, row, part, panel):
    widen_row(weight, part.top + row, part.first, part.width, panel.wide, 0)
    for k in range(0, part.width, amx.DEPTH):
        to = (k // amx.DEPTH * HEIGHT + row) * amx.DEPTH
        for i in range(amx.DEPTH):
            panel.numbers[to + i] = bf16_bits(panel.wide[k + i]) if k + i < part.width else np.uint16(0)


_round_row = by_type("round_row", {BF16Rows: _copy_row, Int8Rows: _widen_and_round_row})


@jit_inner
def unpack_tiles(x, weight, part, panel):
    """Rows of the weight as A."""
    for row in range(part.rows):
        _round_row(weight, row, part, panel)


@jit_inner
def unpack_tiles_b(x, weight, part, panel):
    """Sixteen interleaved rows at a time as B."""
    blocks, size = weight.columns // BLOCK, block_words(weight)
    minima, factor = minima_at(weight), factor_of_minima(weight)
    for side in range(part.rows // SIDE):
        at = ((part.top // SIDE + side) * blocks + part.first // BLOCK) * size
        for step in range(part.width // BLOCK):
            tile = (step * 2 + side) * amx.TILE
            round_int4_block(weight.data, at + step * size, minima, factor, panel.numbers, tile)


@jit_inner
def multiply_tiles(x, part, panel):
    """sums = rows · tokens for the first columns, += for the others."""
    steps, first = (x.columns + amx.DEPTH - 1) // amx.DEPTH, part.first // amx.DEPTH
    depth = (part.width + amx.DEPTH - 1) // amx.DEPTH
    amx.multiply_panel(panel.registers, panel.numbers, x.packed, steps, first, depth, first > 0, panel.sums)


@jit_inner
def multiply_tiles_b(x, part, panel):
    """The same, tokens · rows."""
    blocks, first = x.columns // BLOCK, part.first // BLOCK
    for block in range(x.blocks):
        tokens = x.packed[(block * blocks + first) * 2 * amx.TILE :]
        own = panel.sums[block * 1024 : block * 1024 + 1024]
        amx.multiply_panel(panel.registers, tokens, panel.numbers, 0, 0, part.width // BLOCK, first > 0, own)


@jit_inner
def store_tiles(x, part, panel, y):
    """Writes the sums of all tokens to y."""
    for t in range(len(y)):
        at = t // 32 * 1024 + t // 16 % 2 * 256 + t % 16
        for r in range(part.rows):
            y[t, part.top + r] = panel.sums[at + r // 16 * 512 + r % 16 * 16]


@jit_inner
def store_tiles_b(x, part, panel, y):
    """The same, tokens first."""
    for t in range(len(y)):
        at = t // 32 * 1024 + t // 16 % 2 * 512 + t % 16 * 16
        for r in range(part.rows):
            y[t, part.top + r] = panel.sums[at + r // 16 * 256 + r % 16]
