"""AMX, the matrix unit of Intel's server processors, as operations that kernels call.

It has eight tiles of 16 rows x 64 bytes, and one instruction that multiplies two of them into a third:

    C [16, 16] += A [16, 32] · B [32, 16]        A, B bf16, C float32: 8,192 products and sums at once

A lies row by row. B lies in pairs: its row i holds B[2i, j], B[2i + 1, j] for j = 0 … 15, so that a multiply-add of two
bf16 numbers finds both in one word. Here a weight's rows, as their file has them, are A, and the tokens are B.

    begin(tiles)
    zero[0](tiles)
    for step in …:
        load[4](tiles, weights, at, 32)          # tile 4 = 16 rows, each 32 numbers after the other
        load[6](tiles, tokens, there, 32)
        multiply[0, 4, 6](tiles)                 # tile 0 += tile 4 · tile 6
    store[0](tiles, sums, 0, 16)
    end(tiles)

A tile's number is part of the instruction, so each has functions of its own: 0 … 3 are sums, float32, and 4 … 7 bf16.
Rows that begin on a cache line load at several times the speed of others: see `arrays.aligned`.

Where there is no AMX, or with MINIGEMMA_CPU=imitation, the tiles are emulated by plain loops over an array, `tiles`:
far too slow for use, but they test the kernels on any machine.
"""

from __future__ import annotations

import ctypes
import os
import platform
import sys
from functools import lru_cache

import numpy as np
from llvmlite.binding import get_host_cpu_features
from numba import get_num_threads

from ..arrays import F32, U16, aligned
from .compiler import jit, jit_inner
from .parallel import chunk, parallel_for
from .simd import bf16_bits
from .simd.operation import I8, VOID, Array, Index, call, constant, operation

DEPTH = 32  # bf16 numbers in a row of a tile
TILE = 16 * DEPTH  # numbers in a tile of them


@lru_cache(maxsize=1)
def _permitted() -> bool:
    """Asks Linux for the tile registers; using them without its permission ends the process."""
    features = get_host_cpu_features()
    if sys.platform != "linux" or platform.machine() != "x86_64" or not features.get("amx-tile"):
        return False
    arch_prctl, request_permission, tile_data = 158, 0x1023, 18
    return bool(features.get("amx-bf16")) and not ctypes.CDLL(None).syscall(arch_prctl, request_permission, tile_data)


def choice() -> tuple[str, str]:
    """What runs a matmul, and why: "unit" (AMX), "imitation" (AMX, emulated) or "vectors"."""
    asked = os.environ.get("MINIGEMMA_CPU", "")
    if asked == "imitation":
        return "imitation", "as MINIGEMMA_CPU=imitation asks"
    if asked in ("generic", "vectors"):
        return "vectors", f"as MINIGEMMA_CPU={asked} asks"
    return ("unit", "it is there") if _permitted() else ("vectors", "this processor has no AMX-BF16")


UNIT = choice()[0] == "unit"  # else the tiles are emulated


def new_tiles() -> U16:
    """The argument `tiles`: 64 bytes of configuration for AMX, or the eight emulated tiles."""
    if not UNIT:
        return np.zeros(8 * TILE, np.uint16)
    config = aligned(32, np.uint16)
    config[:] = 0
    config[0] = 1  # palette 1
    config[8:16] = 64  # bytes in a row of each tile
    config[24:28] = 16 | 16 << 8  # rows of each tile
    return config


# ---- AMX


@operation
def _configure(tiles: Array) -> None:
    call("llvm.x86.ldtilecfg", VOID, tiles[0].bytes())


@operation
def _release(tiles: Array) -> None:
    call("llvm.x86.tilerelease", VOID)


def _zero(tile):
    @operation
    def zero_tile(tiles: Array) -> None:
        call("llvm.x86.tilezero", VOID, constant(tile, I8, 0))

    return zero_tile


def _move(name, tile):
    @operation
    def move_tile(tiles: Array, array: Array, index: Index, stride: Index) -> None:
        call(name, VOID, constant(tile, I8, 0), array[index].bytes(), stride * (array.dtype.bitwidth // 8))

    return move_tile


def _multiply(c, a, b):
    @operation
    def multiply_tiles(tiles: Array) -> None:
        call("llvm.x86.tdpbf16ps", VOID, *(constant(tile, I8, 0) for tile in (c, a, b)))

    return multiply_tiles


# ---- AMX, emulated


@jit_inner
def _nothing(tiles):
    pass


def _zero_imitated(tile):
    first = tile * TILE

    @jit_inner
    def zero_tile(tiles):
        for i in range(first, first + TILE):
            tiles[i] = 0

    return zero_tile


def _load_imitated(tile):
    kind, first = (np.float32, tile * TILE // 2) if tile < 4 else (np.uint16, tile * TILE)
    width = 16 if tile < 4 else DEPTH

    @jit_inner
    def load_tile(tiles, array, index, stride):
        own = tiles.view(kind)
        for row in range(16):
            for i in range(width):
                own[first + row * width + i] = array[index + row * stride + i]

    return load_tile


def _store_imitated(tile):
    first = tile * TILE // 2

    @jit_inner
    def store_tile(tiles, array, index, stride):
        own = tiles.view(np.float32)
        for row in range(16):
            for i in range(16):
                array[index + row * stride + i] = own[first + row * 16 + i]

    return store_tile


def _multiply_imitated(c, a, b):
    c, a, b = c * TILE // 2, a * TILE, b * TILE

    @jit_inner
    def multiply_tiles(tiles):
        sums, words = tiles.view(np.float32), tiles.view(np.uint16)
        left, right = np.empty(1, np.uint32), np.empty(1, np.uint32)
        for m in range(16):
            for k in range(DEPTH):
                left[0] = np.uint32(words[a + m * DEPTH + k]) << np.uint32(16)
                for n in range(16):
                    right[0] = np.uint32(words[b + k // 2 * DEPTH + 2 * n + k % 2]) << np.uint32(16)
                    sums[c + m * 16 + n] += left.view(np.float32)[0] * right.view(np.float32)[0]

    return multiply_tiles


PRODUCTS = (
    (0, 4, 6),
    (1, 4, 7),
    (2, 5, 6),
    (3, 5, 7),
)  # 32 rows of weights times 32 tokens, four loads for four products
if UNIT:
    begin, end = _configure, _release
    zero = [_zero(tile) for tile in range(4)]
    load = [_move("llvm.x86.tileloadd64", tile) for tile in range(8)]
    store = [_move("llvm.x86.tilestored64", tile) for tile in range(4)]
    multiply = {tiles: _multiply(*tiles) for tiles in PRODUCTS}
else:
    begin = end = _nothing
    zero = [_zero_imitated(tile) for tile in range(4)]
    load = [_load_imitated(tile) for tile in range(8)]
    store = [_store_imitated(tile) for tile in range(4)]
    multiply = {tiles: _multiply_imitated(*tiles) for tiles in PRODUCTS}

# ---- the product of a panel of 32 rows with all tokens, 32 of them at a time; `steps` = ⌈D / 32⌉

_zero0, _zero1, _zero2, _zero3 = zero
_load0, _load1, _load2, _load3, _rows0, _rows1, _tokens0, _tokens1 = load
_store0, _store1, _store2, _store3 = store
_product0, _product1, _product2, _product3 = (multiply[tiles] for tiles in PRODUCTS)


@jit_inner
def _pack_some(worker, workers, x, packed, steps):
    """A token's 32 numbers of a step become 16 pairs, which go to the 16 rows of its tile."""
    T, D = x.shape
    for block in chunk(worker, workers, (T + 31) // 32):
        words, pairs = np.empty(DEPTH, np.uint16), packed.view(np.uint32)
        for t in range(block * 32, min(block * 32 + 32, T)):
            for step in range(steps):
                at = ((block * steps + step) * 2 + t // 16 % 2) * TILE // 2 + t % 16
                for k in range(DEPTH):
                    d = step * DEPTH + k
                    words[k] = bf16_bits(x[t, d]) if d < D else np.uint16(0)
                two = words.view(np.uint32)
                for i in range(16):
                    pairs[at + i * 16] = two[i]


@jit
def _pack_all(workers, x, packed, steps):
    parallel_for(_pack_some, workers, (x, packed, steps))


def pack_tokens(x: F32) -> U16:
    """x [T, D] float32 → bf16 in pairs, [⌈T/32⌉ · ⌈D/32⌉ · 2 tiles of TILE], zeros where there is no token."""
    steps = -(-x.shape[1] // DEPTH)
    packed = aligned(-(-len(x) // 32) * steps * 2 * TILE, np.uint16)
    if len(x) % 32:
        packed[:] = 0
    _pack_all(get_num_threads(), x, packed, steps)
    return packed


@jit_inner
def on_cache_line(array, size):
    """`size` elements of an array that has room for a cache line more, from where one begins."""
    first = (64 - array.ctypes.data % 64) % 64 // array.itemsize
    return array[first : first + size]


@jit_inner
def multiply_panel(tiles, panel, packed, steps, first, depth, more, sums):
    """sums [⌈T/32⌉ · 4 tiles] = panel [depth · 2 tiles] · steps first … first + depth - 1 of `packed`, or that much
    `more` than they were.

    A block's four tiles of sums: rows 0 … 15 and tokens 0 … 15, then tokens 16 … 31, then the same for rows 16 … 31.
    """
    for block in range(sums.size // 1024):
        c = block * 1024
        if more:
            _load0(tiles, sums, c, 16)
            _load1(tiles, sums, c + 256, 16)
            _load2(tiles, sums, c + 512, 16)
            _load3(tiles, sums, c + 768, 16)
        else:
            _zero0(tiles)
            _zero1(tiles)
            _zero2(tiles)
            _zero3(tiles)
        for step in range(depth):
            a, b = step * 2 * TILE, (block * steps + first + step) * 2 * TILE
            _rows0(tiles, panel, a, DEPTH)
            _rows1(tiles, panel, a + TILE, DEPTH)
            _tokens0(tiles, packed, b, DEPTH)
            _tokens1(tiles, packed, b + TILE, DEPTH)
            _product0(tiles)
            _product1(tiles)
            _product2(tiles)
            _product3(tiles)
        _store0(tiles, sums, c, 16)
        _store1(tiles, sums, c + 256, 16)
        _store2(tiles, sums, c + 512, 16)
        _store3(tiles, sums, c + 768, 16)
