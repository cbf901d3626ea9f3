"""AMX, the matrix instructions of Intel's server processors, as operations that kernels call.

A core has eight tiles of 16 rows x 64 bytes, and one instruction that multiplies two of them into a third:

    C [16, 16] += A [16, 32] · B [32, 16]        A, B bf16, C float32: 8,192 products and sums at once

A lies row by row. B lies in pairs: its row i holds B[2i, j], B[2i + 1, j] for j = 0 … 15, so that a multiply-add of two
bf16 numbers finds both in one word. Tiles 0 … 3 hold the sums of 32 rows and 32 columns, 4 and 5 the rows of A, 6 and 7
the columns of B: four loads for four products.

    begin(tiles)
    zero_sums(tiles)
    for step in …:
        add_products(tiles, a, at, b, there)     # of 32 rows from a[at] on and 32 columns from b[there] on
    store_sums(tiles, sums, 0)
    end(tiles)

Rows that begin on a cache line load at several times the speed of others: see `arrays.aligned`.

MINIGEMMA_CPU=emulated runs plain loops in place of these operations: too slow for use, but they test the kernels on any
machine. There `tiles` holds the sums.
"""

from __future__ import annotations

import ctypes
import platform
import sys
from functools import lru_cache

import numpy as np
from llvmlite.binding import get_host_cpu_features
from numba import get_num_threads

from ..arrays import F32, U16, aligned
from ..environment import setting
from .compiler import jit_inner
from .parallel import chunk, parallel
from .simd.cpu import PATHS
from .simd.memory import bf16_bits
from .simd.operation import I8, I64, VOID, Array, Index, Lanes, Pointer, call, constant, operation

DEPTH = 32  # bf16 numbers in a row of a tile
TILE = 16 * DEPTH  # numbers in a tile of them
SUMS = 4 * 16 * 16  # of 32 rows and 32 columns


@lru_cache(maxsize=1)
def _permitted() -> bool:
    """Asks Linux for the tile registers; using them without its permission ends the process."""
    features = get_host_cpu_features()
    if sys.platform != "linux" or platform.machine() != "x86_64" or not features.get("amx-tile"):
        return False
    arch_prctl, request_permission, tile_data = 158, 0x1023, 18
    return bool(features.get("amx-bf16")) and not ctypes.CDLL(None).syscall(arch_prctl, request_permission, tile_data)


def choice() -> tuple[str, str]:
    """The path of a matmul, and why: "AMX", "emulated" (AMX in plain loops) or "vectors"."""
    if asked := setting("MINIGEMMA_CPU", PATHS):
        return "emulated" if asked == "emulated" else "vectors", f"as MINIGEMMA_CPU={asked} asks"
    return ("AMX", "it is there") if _permitted() else ("vectors", "this processor has no AMX-BF16")


PRESENT = choice()[0] == "AMX"  # else its operations are emulated


def new_tiles() -> U16:
    """The argument `tiles`: 64 bytes of configuration for AMX, or room for emulated sums, [4, 16, 16] float32."""
    if not PRESENT:
        return np.zeros(2 * SUMS, np.uint16)
    config = aligned(32, np.uint16)
    config[:] = 0
    config[0] = 1  # palette 1
    config[8:16] = 64  # bytes in a row of each tile
    config[24:28] = 16 | 16 << 8  # rows of each tile
    return config


# ---- AMX


def _tile(number: int) -> Lanes:
    return constant(number, I8, 0)


def _load(tile: int, at: Pointer) -> None:
    call("llvm.x86.tileloadd64", VOID, _tile(tile), at.bytes(), constant(64, I64, 0))


@operation
def _configure(tiles: Array) -> None:
    call("llvm.x86.ldtilecfg", VOID, tiles[0].bytes())


@operation
def _release(tiles: Array) -> None:
    call("llvm.x86.tilerelease", VOID)


@operation
def _zero_sums(tiles: Array) -> None:
    for tile in range(4):
        call("llvm.x86.tilezero", VOID, _tile(tile))


@operation
def _load_sums(tiles: Array, sums: Array, at: Index) -> None:
    for tile in range(4):
        _load(tile, sums[at] + tile * 256)


@operation
def _add_products(tiles: Array, a: Array, at: Index, b: Array, there: Index) -> None:
    for tile, place in enumerate((a[at], a[at] + TILE, b[there], b[there] + TILE)):
        _load(4 + tile, place)
    for tile in range(4):
        call("llvm.x86.tdpbf16ps", VOID, _tile(tile), _tile(4 + tile // 2), _tile(6 + tile % 2))


@operation
def _store_sums(tiles: Array, sums: Array, at: Index) -> None:
    for tile in range(4):
        call("llvm.x86.tilestored64", VOID, _tile(tile), (sums[at] + tile * 256).bytes(), constant(64, I64, 0))


# ---- AMX, emulated


@jit_inner
def _nothing(tiles):
    pass


@jit_inner
def _zero_emulated(tiles):
    tiles[:] = 0


@jit_inner
def _load_emulated(tiles, sums, at):
    tiles.view(np.float32)[:] = sums[at : at + SUMS]


@jit_inner
def _add_emulated(tiles, a, at, b, there):
    sums, left, right = tiles.view(np.float32), np.empty(1, np.uint32), np.empty(1, np.uint32)
    for tile in range(4):
        for m in range(16):
            for k in range(DEPTH):
                left[0] = np.uint32(a[at + tile // 2 * TILE + m * DEPTH + k]) << np.uint32(16)
                for n in range(16):
                    pair = there + tile % 2 * TILE + k // 2 * DEPTH + 2 * n
                    right[0] = np.uint32(b[pair + k % 2]) << np.uint32(16)
                    sums[tile * 256 + m * 16 + n] += left.view(np.float32)[0] * right.view(np.float32)[0]


@jit_inner
def _store_emulated(tiles, sums, at):
    sums[at : at + SUMS] = tiles.view(np.float32)


begin, end, zero_sums, load_sums, add_products, store_sums = (
    (_configure, _release, _zero_sums, _load_sums, _add_products, _store_sums)
    if PRESENT
    else (_nothing, _nothing, _zero_emulated, _load_emulated, _add_emulated, _store_emulated)
)

# ---- the product of a panel of 32 rows with all tokens, 32 of them at a time; `steps` = ⌈D / 32⌉


@parallel
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


def pack_tokens(x: F32) -> U16:
    """x [T, D] float32 → bf16 in pairs, [⌈T/32⌉ · ⌈D/32⌉ · 2 tiles of TILE], zeros where there is no token."""
    steps = -(-x.shape[1] // DEPTH)
    packed = aligned(-(-len(x) // 32) * steps * 2 * TILE, np.uint16)
    if len(x) % 32:
        packed[:] = 0
    _pack_some(get_num_threads(), x, packed, steps)
    return packed


@jit_inner
def on_cache_line(array, size):
    """`size` elements of a larger array from its first cache line on; it needs room for a cache line more."""
    first = (64 - array.ctypes.data % 64) % 64 // array.itemsize
    return array[first : first + size]


@jit_inner
def multiply_panel(tiles, panel, packed, steps, first, depth, more, sums):
    """sums [⌈T/32⌉ · 4 tiles] = panel [depth · 2 tiles] · steps first … first + depth - 1 of `packed`; with `more`, +=.

    A block's four tiles of sums: rows 0 … 15 and tokens 0 … 15, then tokens 16 … 31, then the same for rows 16 … 31.
    """
    for block in range(sums.size // SUMS):
        if more:
            load_sums(tiles, sums, block * SUMS)
        else:
            zero_sums(tiles)
        for step in range(depth):
            add_products(tiles, panel, step * 2 * TILE, packed, (block * steps + first + step) * 2 * TILE)
        store_sums(tiles, sums, block * SUMS)
