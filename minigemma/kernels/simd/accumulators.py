"""Sums that stay in registers: eight vectors for a matvec, tiles of ROWS x (2 · LANES) numbers for a matmul.

A tile's row r meets column c through `tile_add_outer`: each number loaded is used ROWS or 2 · LANES times, which makes
a product run at the speed of arithmetic and not of loads.
"""

from __future__ import annotations

from .cpu import LANES, ROWS
from .memory import even_odd, splat_of_half
from .operation import F32, I16, I32, Array, EightSums, Index, IntTile, Tile, constant, multiply_add, operation
from .products import add_products_of_bf16, dot_of_32, integers_of_32, products_of_pairs

# ---- eight sums: of two rows of a weight and four tokens


@operation
def eight_zeros() -> EightSums:
    """Eight vectors of zeros."""
    return [constant(0.0)] * 8


@operation
def add_fours(sums: EightSums, weight: Array, at: Index, other: Index, x: Array, k: Index) -> EightSums:
    """Eight sums, of a row and four tokens, then of another row, plus the products of the 2 · LANES numbers from
    weight[at] on, or from weight[other] on, float32 or bf16, with as many of each token, which stand one after the
    other from x[k] on, each in the order of `load_even_odd`.
    """
    rows = [even_odd(weight[index]) for index in (at, other)]
    for i in range(8):  # each vector of a token meets both rows before the next one is loaded: registers are sixteen
        number = (x[k] + i * LANES).load(F32)
        for total, row in zip((i // 2, 4 + i // 2), rows, strict=True):
            sums[total] = multiply_add(row[i % 2], number, sums[total])
    return sums


@operation
def add_scaled_blocks(sums: EightSums, weight: Array, at: Index, other: Index, x: Array, k: Index) -> EightSums:
    """The same of two blocks of 32 int8, each behind its float16 scale; the 32 int16 of each token stand one after the
    other from x[k] on.
    """
    rows = [(integers_of_32(weight[index] + 2), splat_of_half(weight[index])) for index in (at, other)]
    for i in range(4):
        for total, (integers, scale) in zip((i, 4 + i), rows, strict=True):
            sums[total] = multiply_add(dot_of_32(integers, x[k] + 32 * i), scale, sums[total])
    return sums


# Which lanes of two vectors are added to which: first within each four, as processors shuffle, at last the halves.
NEIGHBORS = [0, 2, 8, 10, 4, 6, 12, 14], [1, 3, 9, 11, 5, 7, 13, 15]
HALVES = [0, 1, 2, 3, 8, 9, 10, 11], [4, 5, 6, 7, 12, 13, 14, 15]


@operation
def store_sums(out: Array, index: Index, vectors: EightSums) -> None:
    """out[index : index + 8] = the sums of the lanes of eight vectors, float32."""
    rows = vectors
    if LANES == 16:
        rows = [row.shuffle(range(8), row) + row.shuffle(range(8, 16), row) for row in rows]
    for some, others in (NEIGHBORS, NEIGHBORS, HALVES):
        rows = [x.shuffle(some, y) + x.shuffle(others, y) for x, y in zip(rows[::2], rows[1::2], strict=True)]
    out[index].store(rows[0])


# ---- tiles: of ROWS rows and two vectors, number 2 r + half


@operation
def tile_zeros() -> Tile:
    """ROWS x (2 · LANES) zeros, float32."""
    return [constant(0.0)] * ROWS * 2


@operation
def tile_load(array: Array, start: Index, stride: Index) -> Tile:
    """The tile whose row r is array[start + r · stride : … + 2 · LANES]; float32."""
    tile, row = [], array[start]
    for _ in range(ROWS):
        tile += [row.load(F32), (row + LANES).load(F32)]
        row = row + stride
    return tile


@operation
def tile_store(tile: Tile, out: Array, start: Index, stride: Index) -> None:
    """out[start + r · stride : … + 2 · LANES] = tile[r, :], for r in 0 … ROWS - 1. out float32."""
    row = out[start]
    for r in range(ROWS):
        row.store(tile[2 * r])
        (row + LANES).store(tile[2 * r + 1])
        row = row + stride


@operation
def tile_add_outer(tile: Tile, a: Array, start: Index, stride: Index, b: Array, index: Index) -> Tile:
    """tile[r, :] += a[start + r · stride] · b[index : index + 2 · LANES], for r in 0 … ROWS - 1. a, b float32."""
    right, left = [b[index].load(F32), (b[index] + LANES).load(F32)], a[start]
    for r in range(ROWS):
        number = left.load_element().splat()
        for half in range(2):
            tile[2 * r + half] = multiply_add(number, right[half], tile[2 * r + half])
        left = left + stride
    return tile


@operation
def tile_add_bf16_pairs(tile: Tile, a: Array, start: Index, stride: Index, b: Array, index: Index) -> Tile:
    """tile[r, i] += the products of the bf16 pairs a[start + r · stride : … + 2] and b[index + 2 i : … + 2], for r in
    0 … ROWS - 1 and i in 0 … 2 · LANES - 1. a, b uint16.
    """
    right, left = [(b[index] + half * 2 * LANES).load(I32) for half in range(2)], a[start]
    for r in range(ROWS):
        pair = left.load(I32, 0).splat()
        for half in range(2):
            tile[2 * r + half] = add_products_of_bf16(tile[2 * r + half], pair, right[half])
        left = left + stride
    return tile


@operation
def int_tile_zeros() -> IntTile:
    """ROWS x (2 · LANES) zeros, int32."""
    return [constant(0, I32)] * ROWS * 2


@operation
def tile_add_pairs(tile: IntTile, a: Array, start: Index, stride: Index, b: Array, index: Index) -> IntTile:
    """tile[r, i] += the products of the pairs a[start + r · stride : … + 2] and b[index + 2 i : … + 2], for r in
    0 … ROWS - 1 and i in 0 … 2 · LANES - 1. a, b int16.
    """
    right = [(b[index] + half * 2 * LANES).load(I16, 2 * LANES) for half in range(2)]
    left = a[start]
    for r in range(ROWS):
        pair = left.load(I32, 0).splat().bits(I16)
        for half in range(2):
            tile[2 * r + half] = tile[2 * r + half] + products_of_pairs(pair, right[half])
        left = left + stride
    return tile


@operation
def int_tile_add_scaled(
    tile: IntTile, scales: Array, first: Index, step: Index, out: Array, start: Index, stride: Index
) -> None:
    """out[start + r · stride : … + 2 · LANES] += tile[r, :] · scales[first + r · step], for r in 0 … ROWS - 1. scales,
    out float32.
    """
    row, scale = out[start], scales[first]
    for r in range(ROWS):
        number = scale.load_element().splat()
        for half in range(2):
            place = row + half * LANES
            place.store(multiply_add(tile[2 * r + half].to_float(), number, place.load(F32)))
        row, scale = row + stride, scale + step
