"""What this machine can do: bytes per second read from memory, operations per second of each multiply.

A token reads every weight once, so its limit is memory bandwidth; a prompt's limit is arithmetic. Each limit is
measured by a kernel that does nothing else, on the instructions that the products themselves use.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from statistics import median
from typing import Any

import numpy as np
from numba import get_num_threads

from ..arrays import F32, aligned
from ..layouts import Weight
from ..layouts.int8 import BLOCK
from . import amx, dispatch, int4
from .compiler import jit, jit_inner
from .parallel import chunk, parallel_for, threads
from .simd import (
    AHEAD,
    LANES,
    ROWS,
    STREAMS,
    byte_tile_add,
    byte_tile_add_scaled,
    byte_tile_zeros,
    int_tile_add_scaled,
    int_tile_zeros,
    load,
    prefetch_four,
    sum_lanes,
    tile_add_outer,
    tile_add_pairs,
    tile_store,
    tile_zeros,
    zeros,
)

READ_BYTES = 1 << 29  # far more than any cache holds
STEPS = 1 << 20  # of the arithmetic loop
UNIT_DEPTH = 8  # tiles in a row of the AMX loop: 16 KB each of rows and tokens
UNIT_STEPS = 4096 if amx.UNIT else 4  # of that loop; the emulated unit is slow


class Machine:
    """What this machine can do, measured in the same rounds as the programs, since other programs run on it too."""

    def __init__(self, count: int, matrix: Weight) -> None:
        self.threads = count
        self.numbers, self._peak = peak_for(matrix)
        self._room = np.ones(READ_BYTES // 4, np.float32)
        self._bandwidths: list[float] = []
        self._peaks: list[float] = []

    def look(self) -> None:
        """Measure once more."""
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
    """What multiplies a prompt by this weight, and the function that measures how fast that can be."""
    multiplies = dispatch.path(matrix.layout.name, "many").multiplies
    return multiplies, PEAKS[multiplies]


def median_seconds(run: Callable[[], Any]) -> float:
    """The median of five runs after one that does not count."""
    run()
    times = []
    for _ in range(5):
        began = time.perf_counter()
        run()
        times.append(time.perf_counter() - began)
    return median(times)


@jit_inner
def _read(worker, workers, numbers, sums):
    a, b, c, d = zeros(), zeros(), zeros(), zeros()
    step, part = 4 * LANES, numbers.size // STREAMS
    for place in chunk(worker, workers, part // step):
        for i in range(place * step, numbers.size, part):
            if STREAMS == 1:
                prefetch_four(numbers, i + AHEAD // 4)
            a, b = a + load(numbers, i), b + load(numbers, i + LANES)
            c, d = c + load(numbers, i + 2 * LANES), d + load(numbers, i + 3 * LANES)
    sums[worker] = sum_lanes((a + b) + (c + d))  # keeps LLVM from removing the loads


@jit
def read_all(workers, numbers, sums):
    """Read all of these float32 numbers from memory."""
    parallel_for(_read, workers, (numbers, sums))


def read_bandwidth(numbers: F32 | None = None) -> float:
    """Bytes per second that all threads together read from memory, of `numbers` or 512 MB: a median of five."""
    numbers = np.ones(READ_BYTES // 4, np.float32) if numbers is None else numbers
    sums = np.empty(get_num_threads(), np.float32)
    return numbers.nbytes / median_seconds(lambda: read_all(len(sums), numbers, sums))


@jit_inner
def _multiply(worker, workers, a, b, steps, out):
    tile = tile_zeros()
    for step in range(steps):
        tile = tile_add_outer(tile, a, step % 64, 64, b, step % 64 * 2 * LANES)
    tile_store(tile, out[worker], 0, 2 * LANES)


@jit
def _multiply_all(workers, a, b, steps, out):
    parallel_for(_multiply, workers, (a, b, steps, out))


def arithmetic_peak() -> float:
    """Multiplications and additions per second of float32 vectors that never leave the first-level cache."""
    a, b = np.zeros(64 * (ROWS + 1), np.float32), np.zeros(64 * 2 * LANES, np.float32)
    out = _sums()
    work = 2 * ROWS * 2 * LANES * STEPS * get_num_threads()
    return work / median_seconds(lambda: _multiply_all(len(out), a, b, STEPS, out))


@jit_inner
def _multiply_tiles(worker, workers, tiles, rows, tokens, steps, out):
    registers = tiles.copy()
    amx.begin(registers)
    for _ in range(steps):
        amx.multiply_panel(registers, rows, tokens, UNIT_DEPTH, 0, UNIT_DEPTH, False, out[worker])
    amx.end(registers)


@jit
def _multiply_all_tiles(workers, tiles, rows, tokens, steps, out):
    parallel_for(_multiply_tiles, workers, (tiles, rows, tokens, steps, out))


def unit_peak() -> float:
    """The same of AMX, 32 x 32 sums of bf16 products at a time; emulated where there is none."""
    rows, tokens = (aligned(2 * amx.TILE * UNIT_DEPTH, np.uint16) for _ in range(2))
    rows[:] = tokens[:] = 0
    workers = get_num_threads()
    out = aligned(workers * 1024, np.float32).reshape(workers, 1024)
    work = 2 * 32 * 32 * amx.DEPTH * UNIT_DEPTH * UNIT_STEPS * workers
    return work / median_seconds(lambda: _multiply_all_tiles(workers, amx.new_tiles(), rows, tokens, UNIT_STEPS, out))


@jit_inner
def _multiply_pairs(worker, workers, a, b, scales, steps, out):
    for step in range(steps // 16):
        tile = int_tile_zeros()
        for pair in range(16):
            tile = tile_add_pairs(tile, a, 2 * pair, BLOCK, b, pair * 4 * LANES)
        int_tile_add_scaled(tile, scales, step % 2, 1, out[worker], 0, 2 * LANES)


@jit
def _multiply_all_pairs(workers, a, b, scales, steps, out):
    parallel_for(_multiply_pairs, workers, (a, b, scales, steps, out))


def pairs_peak() -> float:
    """The same of 16-bit integers, with a scale per 32."""
    a, b, out = np.ones(BLOCK * ROWS, np.int16), aligned(BLOCK * 2 * LANES, np.int16), _sums()
    b[:], scales = 0, np.ones(2 * ROWS, np.float32)
    work = 2 * ROWS * 4 * LANES * STEPS * len(out)
    return work / median_seconds(lambda: _multiply_all_pairs(len(out), a, b, scales, STEPS, out))


@jit_inner
def _multiply_fours(worker, workers, x, panel, scales, steps, out):
    for step in range(steps // int4.QUADS):
        tile = byte_tile_zeros()
        for four in range(int4.QUADS):
            tile = byte_tile_add(tile, x.whole, 4 * four, BLOCK, panel, four * 8 * LANES)
        own = load(scales, 0), load(scales, LANES)
        byte_tile_add_scaled(tile, own, x.scales, x.starts, step % 2, 1, out[worker], 0)


@jit
def _multiply_all_fours(workers, x, panel, scales, steps, out):
    parallel_for(_multiply_fours, workers, (x, panel, scales, steps, out))


def fours_peak() -> float:
    """The same of 8-bit integers."""
    x, out = int4.byte_tokens(np.ones((2 * ROWS, BLOCK), np.float32)), _sums()
    panel = aligned(BLOCK * 2 * LANES, np.uint8)
    panel[:], scales = 0, np.ones(2 * LANES, np.float32)
    work = 2 * ROWS * 8 * LANES * STEPS * len(out)
    return work / median_seconds(lambda: _multiply_all_fours(len(out), x, panel, scales, STEPS, out))


def _sums() -> F32:
    return np.zeros((get_num_threads(), ROWS * 2 * LANES), np.float32)


PEAKS = {
    dispatch.FLOATS: arithmetic_peak,
    dispatch.PAIRS: pairs_peak,
    dispatch.FOURS: fours_peak,
    dispatch.TILES: unit_peak,
}
