"""Operations on weights interleaved by 16 rows (layouts/int4.py), whose blocks lie in an array of uint32 words.

A lane is a row: a block's 16 scales, then words of four bytes a row, of which each byte has columns in its bits. x is
int8. Sums of products are exact in 16 bits: at most 8 columns of 15 · 127, or of 4 · 3 · 127, in each half of a lane.
"""

from __future__ import annotations

from typing import TypeAlias

from numba import types

from ...layouts.int4 import SIDE
from .cpu import LANES, ROWS
from .operation import (
    F32,
    I8,
    I16,
    I32,
    TYPES,
    Array,
    Float,
    Index,
    Int,
    Lanes,
    LanesType,
    Pointer,
    TwoVectors,
    constant,
    multiply_add,
    operation,
)
from .products import FOURS, add_products_of_fours, no_fours, sums_of_fours
from .vectors import half_to_float, round_off

VECTORS = SIDE // LANES  # that hold a number for each of sixteen rows
SCALES = SIDE // 2  # words that a block's scales take

RowSums: TypeAlias = list[Lanes]
FourRowSums: TypeAlias = list[RowSums]
ByteTile: TypeAlias = list[Lanes]
TYPES["RowSums"] = LanesType(f"f32x{LANES}x{VECTORS}rows", F32, LANES, VECTORS)  # a float32 for each of sixteen rows
TYPES["FourRowSums"] = types.UniTuple(TYPES["RowSums"], 4)  # and for each of four tokens
TYPES["ByteTile"] = LanesType(f"fours{LANES}x{ROWS}x2", FOURS.element, FOURS.count, ROWS * 2)  # products of bytes


def _scales(block: Pointer, part: int) -> Lanes:
    return half_to_float(block + part * LANES // 2, LANES)


def _word(block: Pointer, word: int, part: int) -> Lanes:
    """A word of LANES rows, in 16 bits."""
    return (block + (SCALES + word * SIDE + part * LANES)).load(I16, 2 * LANES)


def _nibbles(block: Pointer, word: int, part: int) -> list[Lanes]:
    """q of columns 8 word … 8 word + 3, then of the next four: 4 · LANES bytes each, LANES of the rows."""
    eight = _word(block, word, part)
    return [(half & 0x0F0F).bits(I8) for half in (eight, eight >> 4)]


def _four_columns(at: Pointer) -> Lanes:
    """The four bytes at an address in every lane."""
    return at.load(I32, 0).splat().bits(I8)


def _add_scaled(sums: Lanes, products: Lanes, start: Lanes, scale: Lanes) -> Lanes:
    """sums + (start + the sums of products) · scale: LANES float32."""
    return multiply_add((sums_of_fours(products) + start).to_float(), scale, sums)


@operation
def row_sums_zeros() -> RowSums:
    """Zero for each of sixteen rows."""
    return [constant(0.0)] * VECTORS


@operation
def add_int4_block(sums: RowSums, weight: Array, at: Index, x: Array, k: Index, scale: Float, start: Int) -> RowSums:
    """sums + the products of the block at weight[at] with int8 x[k : k + 32], times the scales of both; start is
    -8 Σ x.
    """
    block, totals = weight[at], [no_fours()] * VECTORS
    for word in range(4):
        columns = [_four_columns(x[k] + (8 * word + i)) for i in (0, 4)]
        for part in range(VECTORS):
            for q, four in zip(_nibbles(block, word, part), columns, strict=True):
                totals[part] = add_products_of_fours(totals[part], q, four)
    start, scale = start.splat(), scale.splat()
    return [_add_scaled(sums[i], totals[i], start, _scales(block, i) * scale) for i in range(VECTORS)]


@operation
def add_int2_block(sums: RowSums, weight: Array, at: Index, x: Array, k: Index, scale: Float, start: Int) -> RowSums:
    """The same of a block of 64 columns in two bits; start is -3 Σ x. In x, from x[k] on, each four columns stand
    LANES times, so that a product takes them without an instruction to spread them.

    Of a byte's four columns two are multiplied where they are, four times too large, which saves shifting them.
    """
    block = weight[at]
    once, fourfold = ([no_fours()] * VECTORS for _ in range(2))
    for word in range(4):
        for part in range(VECTORS):
            sixteen = _word(block, word, part)
            masked = [(half & mask).bits(I8) for half in (sixteen, sixteen >> 4) for mask in (0x0303, 0x0C0C)]
            for i, q in enumerate(masked):
                total, four = fourfold if i % 2 else once, (x[k] + (4 * word + i) * 4 * LANES).load(I8, 4 * LANES)
                total[part] = add_products_of_fours(total[part], q, four)
    start, scale = start.splat(), scale.splat()
    for i in range(VECTORS):
        twice = (once[i] << 1) + fourfold[i].shift_signed(1)
        sums[i] = _add_scaled(sums[i], twice, start, _scales(block, i) * scale)
    return sums


@operation
def store_row_sums(sums: RowSums, y: Array, index: Index) -> None:
    """y[index : index + 16] = sums; y float32."""
    for part in range(VECTORS):
        y[index + part * LANES].store(sums[part])


# ---- four tokens


@operation
def four_row_sums_zeros() -> FourRowSums:
    """Zero for each of sixteen rows and four tokens."""
    return [[constant(0.0)] * VECTORS] * 4


@operation
def add_int4_block_to_four(
    sums: FourRowSums, weight: Array, at: Index, x: Array, scales: Array, starts: Array, block: Index, blocks: Index
) -> FourRowSums:
    """`add_int4_block` for four tokens, of which x, the scales and the starts have `blocks` each: blocks `block`,
    `block + blocks` and so on. What is unpacked of the weights meets all four.
    """
    words, own = weight[at], [block + blocks * i for i in range(4)]
    numbers, totals = [x[which * 32] for which in own], [[no_fours()] * VECTORS for _ in range(4)]
    for word in range(4):
        unpacked = [_nibbles(words, word, part) for part in range(VECTORS)]
        for address, total in zip(numbers, totals, strict=True):
            for half in range(2):
                four = _four_columns(address + (8 * word + 4 * half))
                for part in range(VECTORS):
                    total[part] = add_products_of_fours(total[part], unpacked[part][half], four)
    for token, total, which in zip(sums, totals, own, strict=True):
        scale, start = (array[which].load_element().splat() for array in (scales, starts))
        for part in range(VECTORS):
            token[part] = _add_scaled(token[part], total[part], start, _scales(words, part) * scale)
    return sums


# ---- many tokens


@operation
def unpack_int4_block(
    weight: Array, at: Index, panel: Array, to: Index, stride: Index, scales: Array, there: Index
) -> None:
    """The block at weight[at] as bytes q: columns 4 i … 4 i + 3 of all rows at panel[to + i · stride :], the four of a
    row together; uint8. Its scales at scales[there :], float32.
    """
    block = weight[at]
    for word in range(4):
        for part in range(VECTORS):
            for i, four in enumerate(_nibbles(block, word, part)):
                panel[to + stride * (2 * word + i) + part * 4 * LANES].store(four)
    for part in range(VECTORS):
        scales[there + part * LANES].store(_scales(block, part))


@operation
def round_int4_block(weight: Array, at: Index, panel: Array, to: Index) -> None:
    """The block at weight[at] as bf16, a tile of AMX (amx.py): columns 2 i and 2 i + 1 of all rows, in pairs, at
    panel[to + 32 i :]; uint16.
    """
    block = weight[at]
    scales = half_to_float(block, SIDE)

    def rounded(eight: Lanes, shift: int) -> Lanes:
        """Its upper 16 bits are the bf16."""
        return round_off((((eight >> shift & 15) - 8).to_float() * scales).bits(I32), 16)

    for word in range(4):
        eight = (block + (SCALES + word * SIDE)).load(I32, SIDE)
        for i, shift in enumerate((0, 16, 4, 20)):
            pair = rounded(eight, shift) >> 16 | rounded(eight, shift + 8) & -65536
            panel[to + (4 * word + i) * 2 * SIDE].store(pair.bits(I16))


@operation
def byte_tile_zeros() -> ByteTile:
    """No products yet."""
    return [no_fours()] * ROWS * 2


@operation
def byte_tile_add(tile: ByteTile, x: Array, start: Index, stride: Index, panel: Array, index: Index) -> ByteTile:
    """tile[t, r] += the products of four columns: x[start + t · stride : … + 4] of ROWS tokens, int8, and of 2 · LANES
    rows panel[index + 4 r : … + 4], uint8.
    """
    q = [(panel[index] + i * 4 * LANES).load(I8, 4 * LANES) for i in range(2)]
    token = x[start]
    for t in range(ROWS):
        four = _four_columns(token)
        for half in range(2):
            tile[2 * t + half] = add_products_of_fours(tile[2 * t + half], q[half], four)
        token = token + stride
    return tile


@operation
def byte_tile_add_scaled(
    tile: ByteTile,
    row_scales: TwoVectors,
    x_scales: Array,
    starts: Array,
    first: Index,
    step: Index,
    out: Array,
    index: Index,
) -> None:
    """out[index + t · 2 · LANES :] += tile[t, :], the products of a block, times the scales of the rows and those of
    ROWS tokens t: x_scales[first + t · step], which start at starts[first + t · step].
    """
    row, scale, start = out[index], x_scales[first], starts[first]
    for t in range(ROWS):
        its_scale, its_start = scale.load_element().splat(), start.load_element().splat()
        for half in range(2):
            place = row + (2 * t + half) * LANES
            place.store(_add_scaled(place.load(F32), tile[2 * t + half], its_start, row_scales[half] * its_scale))
        scale, start = scale + step, start + step
