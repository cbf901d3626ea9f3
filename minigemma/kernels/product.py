"""The product C = A B or C += A B of float32 matrices in any order of memory: what training multiplies.

    x Wᵀ    forward                  A = x                    B = Wᵀ, a view
    dy W    back to the input        A = dy                   B = W
    dyᵀ x   back to the weight       A = dyᵀ, a view          B = x          added to what is there

    1  the definition: A @ B, then an addition
    2  B is packed: WIDTH columns next to each other, a number of each at a time, so that a tile reads it in one line
    3  … in tiles of ROWS x WIDTH sums that stay in registers over DEPTH products; those are added to C
    4  DEPTH x WIDTH numbers of B stay in the first-level cache while all rows of a BAND of A pass, which stay in the
       second; rows of A lie in memory as a tile reads them, columns (a transposed A) are packed first

`python -m benchmarks.training` compares a training step with PyTorch's.
"""

from typing import NamedTuple

import numpy as np
from numba import get_num_threads

from ..arrays import F32, read_only
from .compiler import jit, jit_inner
from .parallel import chunk, parallel_for
from .simd.accumulators import tile_add_outer, tile_load, tile_store, tile_zeros
from .simd.cpu import LANES, ROWS
from .simd.memory import load, store

WIDTH = 2 * LANES  # columns of a tile
DEPTH = 256  # numbers of a row of A, and of a column of B, that meet at a time
BAND = 16 * ROWS  # rows of A that stay in the second-level cache


class Matrix(NamedTuple):
    """A matrix whose number [i, j] is data[i · down + j · right]; one of the steps is 1."""

    data: F32  # of one axis
    rows: int
    columns: int
    down: int
    right: int


@jit_inner
def _pack_columns(worker, workers, b, packed):
    """packed [blocks, rows · WIDTH] of b, with zeros behind its last column."""
    for block in chunk(worker, workers, len(packed)):
        out, first = packed[block], block * WIDTH
        count = min(WIDTH, b.columns - first)
        if b.right == 1 and count == WIDTH:
            for k in range(b.rows):
                for half in range(0, WIDTH, LANES):
                    store(out, k * WIDTH + half, load(b.data, k * b.down + first + half))
            continue
        if count < WIDTH:
            out[:] = 0
        for top in range(0, b.rows, 64):
            for c in range(count):
                at = (first + c) * b.right
                for k in range(top, min(b.rows, top + 64)):
                    out[k * WIDTH + c] = b.data[at + k * b.down]


@jit_inner
def _pack_rows(a, top, rows, first, depth, out):
    """out [tiles, DEPTH · ROWS] = rows top … of a, `depth` numbers of each from the first on, zeros behind the last."""
    for tile in range((rows + ROWS - 1) // ROWS):
        here, count = top + tile * ROWS, min(ROWS, rows - tile * ROWS)
        start = tile * DEPTH * ROWS
        for k in range(depth):
            at = here * a.down + (first + k) * a.right
            for r in range(ROWS):
                out[start + k * ROWS + r] = a.data[at + r * a.down] if r < count else np.float32(0)


@jit_inner
def _add_tile(left, start, step, stride, right, at, depth, tile):
    """tile += rows of A times WIDTH columns of B over `depth` numbers."""
    for k in range(depth):
        tile = tile_add_outer(tile, left, start + k * step, stride, right, at + k * WIDTH)
    return tile


@jit_inner
def _store_edge(tile, some, c, columns, place, count, adds):
    """The first rows and columns of a tile that does not fit: place = (row, column), count = (rows, columns)."""
    tile_store(tile, some, 0, WIDTH)
    for r in range(count[0]):
        for j in range(count[1]):
            at = (place[0] + r) * columns + place[1] + j
            c[at] = c[at] + some[r * WIDTH + j] if adds else some[r * WIDTH + j]


@jit_inner
def _some_bands(worker, workers, a, packed, columns, c, adds):
    tiles = chunk(worker, workers, (a.rows + ROWS - 1) // ROWS)
    begin, end = tiles.start * ROWS, min(tiles.stop * ROWS, a.rows)
    left, some = np.empty(BAND * DEPTH, np.float32), np.empty(ROWS * WIDTH, np.float32)
    for first in range(0, a.columns, DEPTH):
        depth, more = min(DEPTH, a.columns - first), adds or first > 0
        for top in range(begin, end, BAND):
            rows = min(BAND, end - top)
            direct = rows // ROWS * ROWS if a.right == 1 else 0  # rows that are read where they are
            _pack_rows(a, top + direct, rows - direct, first, depth, left)
            for block in range(len(packed)):
                j, right, at = block * WIDTH, packed[block], first * WIDTH
                full = j + WIDTH <= columns
                for r in range(0, rows, ROWS):
                    place, fits = (top + r) * columns + j, full and r + ROWS <= rows
                    tile = tile_load(c, place, columns) if fits and more else tile_zeros()
                    if r < direct:
                        tile = _add_tile(a.data, (top + r) * a.down + first, 1, a.down, right, at, depth, tile)
                    else:
                        tile = _add_tile(left, (r - direct) * DEPTH, ROWS, 1, right, at, depth, tile)
                    if fits:
                        tile_store(tile, c, place, columns)
                    else:
                        _store_edge(
                            tile, some, c, columns, (top + r, j), (min(ROWS, rows - r), min(WIDTH, columns - j)), more
                        )


@jit
def product(workers, a, b, packed, c, adds):
    """c [rows of a · columns of b] = a b, or with `adds` += a b; packed [blocks, rows of b · WIDTH] is room."""
    parallel_for(_pack_columns, min(workers, len(packed)), (b, packed))
    parallel_for(_some_bands, workers, (a, packed, b.columns, c, adds))


def multiply(a: F32, b: F32, c: F32, adds: bool = False) -> F32:
    """c = a b, or with `adds` c += a b; returns c [I, J], whose numbers lie row by row: a [I, K], b [K, J]."""
    blocks = np.empty((-(-b.shape[1] // WIDTH), len(b) * WIDTH), np.float32)
    product(get_num_threads(), _matrix(a), _matrix(b), blocks, c.reshape(-1), adds)
    return c


def _matrix(x: F32) -> Matrix:
    rows = x if x.flags.c_contiguous else x.T if x.flags.f_contiguous else np.ascontiguousarray(x)
    steps = (1, len(x)) if rows is not x and x.flags.f_contiguous else (x.shape[1], 1)
    return Matrix(read_only(rows.reshape(-1).view()), *x.shape, *steps)
