"""Peaks of this machine: bytes per second read from memory, operations per second of each multiply instruction.

A token reads every weight once, so its limit is memory bandwidth; a prompt's limit is arithmetic. A kernel measures
each limit with the instructions that the products use.
"""

import time
from collections.abc import Callable
from statistics import median
from typing import Any, NamedTuple

import numpy as np
from numba import get_num_threads
from numpy.typing import NDArray

from ..arrays import F32, U8, U16, aligned
from ..layouts import Weight
from ..layouts.int8 import BLOCK
from . import amx, dispatch, int4
from .compiler import by_type, jit_inner
from .parallel import chunk, parallel, threads
from .simd.accumulators import (
    int_tile_add_scaled,
    int_tile_zeros,
    tile_add_bf16_pairs,
    tile_add_outer,
    tile_add_pairs,
    tile_store,
    tile_zeros,
)
from .simd.cpu import AHEAD, LANES, ROWS, STREAMS
from .simd.interleaved import byte_tile_add, byte_tile_add_scaled, byte_tile_zeros
from .simd.memory import load, prefetch_four
from .simd.vectors import sum_lanes, zeros

READ_BYTES = 1 << 29  # far more than any cache holds
STEPS = 1 << 20  # of the arithmetic loop
AMX_DEPTH = 8  # tiles in a row of the AMX loop: 16 KB each of rows and tokens
AMX_STEPS = 4096 if amx.PRESENT else 4  # of that loop; emulated, it is slow


class Machine:
    """The peaks of this machine, measured in the same rounds as the programs, since the machine may be shared."""

    def __init__(self, count: int, matrix: Weight) -> None:
        self.threads = count
        self.numbers, self._peak = peak_for(matrix)
        self._room = np.ones(READ_BYTES // 4, np.float32)
        self._bandwidths: list[float] = []
        self._peaks: list[float] = []

    def look(self) -> None:
        """Measures both peaks once more."""
        with threads(self.threads):
            self._bandwidths.append(read_bandwidth(self._room))
            self._peaks.append(self._peak())

    @property
    def bandwidth(self) -> float:
        """Bytes read per second."""
        return median(self._bandwidths)

    @property
    def peak(self) -> float:
        """Multiplications and additions per second."""
        return median(self._peaks)


def peak_for(matrix: Weight) -> tuple[str, Callable[[], float]]:
    """The instruction that multiplies a prompt by this weight, and the function that measures its peak."""
    multiplies = dispatch.path(matrix.layout.name, "many").multiplies
    return multiplies, PEAKS[multiplies]


def median_seconds(run: Callable[[], Any]) -> float:
    """The median time of five runs, after one to warm up."""
    run()
    times = []
    for _ in range(5):
        began = time.perf_counter()
        run()
        times.append(time.perf_counter() - began)
    return median(times)


@parallel
def read_all(worker, workers, numbers, sums):
    """Reads these float32 numbers from memory."""
    a, b, c, d = zeros(), zeros(), zeros(), zeros()
    step, part = 4 * LANES, numbers.size // STREAMS
    for place in chunk(worker, workers, part // step):
        for i in range(place * step, numbers.size, part):
            if STREAMS == 1:
                prefetch_four(numbers, i + AHEAD // 4)
            a, b = a + load(numbers, i), b + load(numbers, i + LANES)
            c, d = c + load(numbers, i + 2 * LANES), d + load(numbers, i + 3 * LANES)
    sums[worker] = sum_lanes((a + b) + (c + d))  # keeps LLVM from removing the loads


def read_bandwidth(numbers: F32 | None = None) -> float:
    """Bytes per second that all threads together read from memory, of `numbers` or 512 MB: a median of five."""
    numbers = np.ones(READ_BYTES // 4, np.float32) if numbers is None else numbers
    sums = np.empty(get_num_threads(), np.float32)
    return numbers.nbytes / median_seconds(lambda: read_all(len(sums), numbers, sums))


class Floats(NamedTuple):
    """Operands of a float32 tile."""

    a: F32
    b: F32


class Rounded(NamedTuple):
    """Operands of a tile of bf16 products."""

    a: U16
    b: U16


class Pairs(NamedTuple):
    """Operands of a tile of 16-bit integers."""

    a: NDArray[np.int16]
    b: NDArray[np.int16]
    scales: F32


class Fours(NamedTuple):
    """Operands of a tile of 8-bit integers."""

    x: int4.ByteTokens
    panel: U8
    scales: F32  # and minima


class Tiles(NamedTuple):
    """Operands of AMX."""

    registers: U16
    rows: U16
    tokens: U16


@jit_inner
def _multiply_floats(operands, steps, out):
    tile = tile_zeros()
    for step in range(steps):
        tile = tile_add_outer(tile, operands.a, step % 64, 64, operands.b, step % 64 * 2 * LANES)
    tile_store(tile, out, 0, 2 * LANES)


@jit_inner
def _multiply_rounded(operands, steps, out):
    tile = tile_zeros()
    for step in range(steps):
        at = step % 64 * 2
        tile = tile_add_bf16_pairs(tile, operands.a, at, 128, operands.b, at * 2 * LANES)
    tile_store(tile, out, 0, 2 * LANES)


@jit_inner
def _multiply_pairs(operands, steps, out):
    for step in range(steps // 16):
        tile = int_tile_zeros()
        for pair in range(16):
            tile = tile_add_pairs(tile, operands.a, 2 * pair, BLOCK, operands.b, pair * 4 * LANES)
        int_tile_add_scaled(tile, operands.scales, step % 2, 1, out, 0, 2 * LANES)


@jit_inner
def _multiply_fours(operands, steps, out):
    x, panel, scales = operands
    for step in range(steps // int4.QUADS):
        tile = byte_tile_zeros()
        for four in range(int4.QUADS):
            tile = byte_tile_add(tile, x.whole, 4 * four, BLOCK, panel, four * 8 * LANES)
        byte_tile_add_scaled(tile, scales, 0, x.scales, step % 2, 1, out, 0)


@jit_inner
def _multiply_tiles(operands, steps, out):
    registers = operands.registers.copy()
    amx.begin(registers)
    for _ in range(steps):
        amx.multiply_panel(registers, operands.rows, operands.tokens, AMX_DEPTH, 0, AMX_DEPTH, False, out)
    amx.end(registers)


_multiply = by_type(
    "multiply",
    {
        Floats: _multiply_floats,
        Rounded: _multiply_rounded,
        Pairs: _multiply_pairs,
        Fours: _multiply_fours,
        Tiles: _multiply_tiles,
    },
)


@parallel
def _multiply_one(worker, workers, operands, steps, out):
    _multiply(operands, steps, out[worker])


def _peak(operands: tuple, products: int, steps: int = STEPS) -> float:
    """Multiplications and additions per second of all threads, of `steps` steps of `products` products."""
    workers = get_num_threads()
    out = aligned(workers * amx.SUMS, np.float32).reshape(workers, -1)
    out[:] = 0
    return 2 * products * steps * workers / median_seconds(lambda: _multiply_one(workers, operands, steps, out))


def arithmetic_peak() -> float:
    """Multiplications and additions per second of float32 vectors that never leave the first-level cache."""
    a, b = np.zeros(64 * (ROWS + 1), np.float32), np.zeros(64 * 2 * LANES, np.float32)
    return _peak(Floats(a, b), ROWS * 2 * LANES)


def rounded_peak() -> float:
    """The same of bf16, two products per lane."""
    a, b = np.zeros(128 * (ROWS + 1), np.uint16), np.zeros(128 * 2 * LANES, np.uint16)
    return _peak(Rounded(a, b), ROWS * 4 * LANES)


def pairs_peak() -> float:
    """The same of 16-bit integers, with a scale per 32."""
    a, b = np.ones(BLOCK * ROWS, np.int16), aligned(BLOCK * 2 * LANES, np.int16)
    b[:] = 0
    return _peak(Pairs(a, b, np.ones(2 * ROWS, np.float32)), ROWS * 4 * LANES)


def fours_peak() -> float:
    """The same of 8-bit integers."""
    panel = aligned(BLOCK * 2 * LANES, np.uint8)
    panel[:] = 0
    x = int4.byte_tokens(np.ones((2 * ROWS, BLOCK), np.float32))
    return _peak(Fours(x, panel, np.ones(4 * LANES, np.float32)), ROWS * 8 * LANES)


def amx_peak() -> float:
    """The same of AMX, 32 x 32 sums of bf16 products at a time; emulated where there is none."""
    rows, tokens = (aligned(2 * amx.TILE * AMX_DEPTH, np.uint16) for _ in range(2))
    rows[:] = tokens[:] = 0
    return _peak(Tiles(amx.new_tiles(), rows, tokens), 32 * 32 * amx.DEPTH * AMX_DEPTH, AMX_STEPS)


PEAKS = {
    dispatch.FLOATS: arithmetic_peak,
    dispatch.ROUNDED: rounded_peak,
    dispatch.PAIRS: pairs_peak,
    dispatch.FOURS: fours_peak,
    dispatch.TILES: amx_peak,
}
