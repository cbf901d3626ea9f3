"""Operations on weights interleaved by 16 rows (layouts/int4.py), whose blocks lie in an array of uint32 words.

A lane is a row: a block's 16 scales d and 16 minima m, then words of four bytes a row, of which each byte has columns
in its bits. `minima` is the word of a block at which they begin: SCALES, or 0 in a block without any, whose minima are
its scales times a factor. x is int8 with a scale; `total` is Σ x of a block, times that factor. A block's product is

    Σ w x = d · scale of x · Σ q · int8  +  m · total

Sums of products are exact in 16 bits: at most 8 columns of 15 · 127, or of 4 · 3 · 127, in each half of a lane.
"""

from __future__ import annotations

from typing import TypeAlias

from numba import types

from ...layouts.int4 import SIDE
from .cpu import LANES, ROWS
from .memory import half_to_float, round_off
from .operation import (
    F32,
    I8,
    I16,
    I32,
    TYPES,
    Array,
    Float,
    Index,
    Lanes,
    LanesType,
    Pointer,
    constant,
    multiply_add,
    operation,
)
from .products import FOURS, add_products_of_fours, no_fours, sums_of_fours

VECTORS = SIDE // LANES  # that hold a number for each of sixteen rows
SCALES = SIDE // 2  # words that a block's scales take

RowSums: TypeAlias = list[Lanes]
FourRowSums: TypeAlias = list[RowSums]
ByteTile: TypeAlias = list[Lanes]
TYPES["RowSums"] = LanesType(f"f32x{LANES}x{VECTORS}rows", F32, LANES, VECTORS)  # a float32 for each of sixteen rows
TYPES["FourRowSums"] = types.UniTuple(TYPES["RowSums"], 4)  # and for each of four tokens
TYPES["ByteTile"] = LanesType(f"fours{LANES}x{ROWS}x2", FOURS.element, FOURS.count, ROWS * 2)  # products of bytes


def _halves(at: Pointer, part: int) -> Lanes:
    """Scales or minima of LANES rows."""
    return half_to_float(at + part * LANES // 2, LANES)


def _word(words: Pointer, word: int, part: int) -> Lanes:
    """A word of LANES rows, in 16 bits."""
    return (words + (word * SIDE + part * LANES)).load(I16, 2 * LANES)


def _nibbles(words: Pointer, word: int, part: int) -> list[Lanes]:
    """q of columns 8 word … 8 word + 3, then of the next four: 4 · LANES bytes each, LANES of the rows."""
    eight = _word(words, word, part)
    return [(half & 0x0F0F).bits(I8) for half in (eight, eight >> 4)]


def _four_columns(at: Pointer) -> Lanes:
    """The four bytes at an address in every lane."""
    return at.load(I32, 0).splat().bits(I8)


def _add_scaled(sums: Lanes, products: Lanes, scale: Lanes, minimum: Lanes, total: Lanes) -> Lanes:
    """sums + the sums of products · scale + minimum · total: LANES float32."""
    return multiply_add(minimum, total, multiply_add(sums_of_fours(products).to_float(), scale, sums))


@operation
def row_sums_zeros() -> RowSums:
    """Zero for each of sixteen rows."""
    return [constant(0.0)] * VECTORS


@operation
def add_int4_block(
    sums: RowSums, weight: Array, at: Index, minima: Index, x: Array, k: Index, scale: Float, total: Float
) -> RowSums:
    """sums + the products of the block at weight[at] with int8 x[k : k + 32]."""
    block, products = weight[at], [no_fours()] * VECTORS
    own = block + minima
    for word in range(4):
        columns = [_four_columns(x[k] + (8 * word + i)) for i in (0, 4)]
        for part in range(VECTORS):
            for q, four in zip(_nibbles(own + SCALES, word, part), columns, strict=True):
                products[part] = add_products_of_fours(products[part], q, four)
    scale, total = scale.splat(), total.splat()
    for i in range(VECTORS):
        sums[i] = _add_scaled(sums[i], products[i], _halves(block, i) * scale, _halves(own, i), total)
    return sums


@operation
def add_int2_block(sums: RowSums, weight: Array, at: Index, x: Array, k: Index, scale: Float, total: Float) -> RowSums:
    """The same of a block of 64 columns in two bits, without minima. In x, from x[k] on, each four columns stand LANES
    times, so that a product takes them without an instruction to spread them.

    Of a byte's four columns two are multiplied where they are, four times too large, which saves shifting them.
    """
    block = weight[at]
    once, fourfold = ([no_fours()] * VECTORS for _ in range(2))
    for word in range(4):
        for part in range(VECTORS):
            sixteen = _word(block + SCALES, word, part)
            masked = [(half & mask).bits(I8) for half in (sixteen, sixteen >> 4) for mask in (0x0303, 0x0C0C)]
            for i, q in enumerate(masked):
                products, four = fourfold if i % 2 else once, (x[k] + (4 * word + i) * 4 * LANES).load(I8, 4 * LANES)
                products[part] = add_products_of_fours(products[part], q, four)
    scale, total = scale.splat(), total.splat()
    for i in range(VECTORS):
        twice, own = (once[i] << 1) + fourfold[i].shift_signed(1), _halves(block, i)
        sums[i] = _add_scaled(sums[i], twice, own * scale, own, total)
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
    sums: FourRowSums, weight: Array, at: Index, minima: Index, x: Array, scales: Array, block: Index, blocks: Index
) -> FourRowSums:
    """`add_int4_block` for four tokens, of which x has `blocks` blocks each: `block`, `block + blocks` and so on;
    `scales` has the scale and the total of each. What is unpacked of the weights meets all four tokens.
    """
    words, own = weight[at], [block + blocks * i for i in range(4)]
    numbers, products = [x[which * 32] for which in own], [[no_fours()] * VECTORS for _ in range(4)]
    for word in range(4):
        unpacked = [_nibbles(words + minima + SCALES, word, part) for part in range(VECTORS)]
        for address, made in zip(numbers, products, strict=True):
            for half in range(2):
                four = _four_columns(address + (8 * word + 4 * half))
                for part in range(VECTORS):
                    made[part] = add_products_of_fours(made[part], unpacked[part][half], four)
    for token, made, which in zip(sums, products, own, strict=True):
        scale, total = ((scales[which * 2] + i).load_element().splat() for i in range(2))
        for part in range(VECTORS):
            d, m = _halves(words, part) * scale, _halves(words + minima, part)
            token[part] = _add_scaled(token[part], made[part], d, m, total)
    return sums


# ---- many tokens


@operation
def unpack_int4_block(weight: Array, at: Index, minima: Index, panel: Array, to: Index, stride: Index) -> None:
    """The block at weight[at] as bytes q: columns 4 i … 4 i + 3 of all rows at panel[to + i · stride :], the four of a
    row together; uint8.
    """
    words = weight[at] + minima + SCALES
    for word in range(4):
        for part in range(VECTORS):
            for i, four in enumerate(_nibbles(words, word, part)):
                panel[to + stride * (2 * word + i) + part * 4 * LANES].store(four)


@operation
def unpack_int8_block(row: Array, at: Index, panel: Array, to: Index, stride: Index) -> None:
    """32 int8 from row[at] on as uint8, 128 larger, four of them at panel[to + i · stride :] for i in 0 … 7."""
    for i in range(8):
        panel[to + stride * i].store((row[at] + 4 * i).load(I32, 0) ^ -0x7F7F7F80)


@operation
def unpack_halves(weight: Array, at: Index, factor: Float, out: Array, to: Index) -> None:
    """out[to : to + 16] = the sixteen float16 from weight[at] on, times a factor; float32."""
    for part in range(VECTORS):
        out[to + part * LANES].store(_halves(weight[at], part) * factor.splat())


@operation
def round_int4_block(weight: Array, at: Index, minima: Index, factor: Float, panel: Array, to: Index) -> None:
    """The block at weight[at] as bf16, a tile of AMX (amx.py): columns 2 i and 2 i + 1 of all rows, in pairs, at
    panel[to + 32 i :]; uint16. `factor`: of its minima.
    """
    block = weight[at]
    scales, lowest = half_to_float(block, SIDE), half_to_float(block + minima, SIDE) * factor.splat(SIDE)

    def rounded(eight: Lanes, shift: int) -> Lanes:
        """Its upper 16 bits are the bf16."""
        return round_off(multiply_add((eight >> shift & 15).to_float(), scales, lowest).bits(I32), 16)

    for word in range(4):
        eight = (block + minima + (SCALES + word * SIDE)).load(I32, SIDE)
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
    tile: ByteTile, halves: Array, own: Index, scales: Array, block: Index, blocks: Index, out: Array, index: Index
) -> None:
    """out[index + t · 2 · LANES :] += tile[t, :], the products of a block of x and 2 · LANES rows, whose scales, then
    minima, begin at halves[own]. `scales` has the scale and the total of the block of each of ROWS tokens: blocks
    `block`, `block + blocks` and so on.
    """
    row, of_token, of_rows = out[index], scales[block * 2], [(halves[own] + i * LANES).load(F32) for i in range(4)]
    for t in range(ROWS):
        scale, total = ((of_token + i).load_element().splat() for i in range(2))
        for half in range(2):
            place, d = row + (2 * t + half) * LANES, of_rows[half] * scale
            place.store(_add_scaled(place.load(F32), tile[2 * t + half], d, of_rows[2 + half], total))
        of_token = of_token + blocks * 2
