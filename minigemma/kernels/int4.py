"""Products with int4 weights, sixteen rows side by side (layouts/int4.py).

x is rounded to 8 bits, with a scale for each block of 32 of each token: little beside what four bits did to the
weights (docs/accuracy.md). Sums of whole numbers are exact. Each begins at -8 Σ x, which stands for the 8 in q - 8.
"""

from __future__ import annotations

import numpy as np
from llvmlite import ir
from numba import float32, types
from numba.extending import intrinsic, models, register_model
from numpy.typing import NDArray

from ..arrays import F32, aligned
from ..layouts.int4 import BLOCK, BYTES, SIDE
from . import amx, simd
from .compiler import jit, jit_inner, workers_for
from .parallel import chunk, parallel_for
from .simd import (
    LANES,
    ROWS,
    STREAMS,
    bf16_bits,
    load,
    magnitude,
    max_lanes,
    maximum,
    prefetch,
    round_lanes,
    splat,
    store_whole,
    sum_lanes,
    zeros,
)
from .views import new_array, new_zeros, reshaped

WORDS = BYTES // 4  # as which a kernel sees them, uint32
SCALES = SIDE // 2  # words that the scales take
QUADS = BLOCK // 4
DEPTH = 1024  # columns that are unpacked together, for many tokens
UNIT_DEPTH = 2304  # columns of 32 rows that are, for the matrix unit
AHEAD = 2048  # words read ahead into the second-level cache


# ---- x in whole numbers of 8 bits


@jit_inner
def round_to_8_bits(x, k, count, zero, whole):
    """x[k : k + count] ≈ whole[k : …] · scale, where x is float32 and `count` a multiple of LANES. Returns the scale,
    and -zero · Σ whole: where a sum of products with weights q - zero begins.
    """
    highest, total = zeros(), zeros()
    for i in range(k, k + count, LANES):
        highest = maximum(highest, magnitude(load(x, i)))
    largest = max_lanes(highest)
    up = splat(float32(127) / largest if largest > 0 else float32(0))
    for i in range(k, k + count, LANES):
        q = round_lanes(load(x, i) * up)
        store_whole(whole, i, q)
        total = total + q
    return largest / float32(127), np.int32(-zero * sum_lanes(total))


@jit_inner
def round_blocks(x, whole, scales, starts, first, last):
    """Blocks first … last - 1 of x, for int4."""
    for block in range(first, last):
        scales[block], starts[block] = round_to_8_bits(x, block * BLOCK, BLOCK, 8, whole)


@jit_inner
def _round_some(worker, workers, x, whole, scales, starts):
    mine = chunk(worker, workers, x.size // BLOCK)
    round_blocks(x, whole, scales, starts, mine.start, mine.stop)


@jit
def _round_all(workers, x, whole, scales, starts):
    parallel_for(_round_some, workers, (x, whole, scales, starts))


Rounded = tuple[NDArray[np.int8], NDArray[np.float32], NDArray[np.int32]]


def in_8_bits(x: F32) -> Rounded:
    """x [T, D] → whole numbers, their scales and starts, with room for tokens up to a multiple of ROWS."""
    (T, D), tokens = x.shape, -(-len(x) // ROWS) * ROWS
    whole, blocks = aligned(tokens * D, np.int8), tokens * D // BLOCK
    scales, starts = np.zeros(blocks, np.float32), np.zeros(blocks, np.int32)
    whole[T * D :] = 0
    _round_all(workers_for(x), x.reshape(-1), whole, scales, starts)
    return whole, scales, starts


# ---- what a kernel does with a block of sixteen rows

_F32, _I8, _I16, _I32 = ir.FloatType(), ir.IntType(8), ir.IntType(16), ir.IntType(32)
VECTORS = SIDE // LANES  # that hold a number for each of sixteen rows


class _SumsType(types.Type):
    """SIDE float32 numbers, one for each row."""

    llvm = ir.ArrayType(simd.VECTOR.llvm, VECTORS)

    def __init__(self) -> None:
        super().__init__(name=f"f32x{LANES}x{VECTORS}side")


class _TileType(types.Type):
    """ROWS x 2 vectors of sums of products of bytes."""

    llvm = ir.ArrayType(simd.FOURS, ROWS * 2)

    def __init__(self) -> None:
        super().__init__(name=f"fours{LANES}x{ROWS}x2")


@register_model(_SumsType)
@register_model(_TileType)
class _Model(models.PrimitiveModel):
    def __init__(self, manager, kind):
        super().__init__(manager, kind, kind.llvm)


SUMS, TILE = _SumsType(), _TileType()


def _fours(builder, words, word, part):
    """q of columns 8 word … 8 word + 3, then of the next four: 4 · LANES bytes each, LANES of the rows."""
    eight = simd._read(builder, builder.gep(words, [_I32(SCALES + word * SIDE + part * LANES)]), _I16, 2 * LANES)
    fifteen = ir.Constant(eight.type, [0x0F0F] * 2 * LANES)
    halves = eight, builder.lshr(eight, ir.Constant(eight.type, [4] * 2 * LANES))
    return [builder.bitcast(builder.and_(half, fifteen), ir.VectorType(_I8, 4 * LANES)) for half in halves]


def _spread(builder, address):
    """The four bytes at an address in every lane."""
    four = builder.load(builder.bitcast(address, _I32.as_pointer()))
    four.align = 1
    return builder.bitcast(simd._splat(builder, four), ir.VectorType(_I8, 4 * LANES))


def _scales(builder, words, part):
    return simd._half(builder, builder.gep(words, [_I32(part * LANES // 2)]), LANES)


def _no_products():
    return ir.Constant(simd.FOURS, [0] * simd.FOURS.count)


def _scaled(builder, products, start, scale, before):
    """before + (start + the sums of products) · scale: LANES float32."""
    whole = builder.add(simd._sums_of_fours(builder, products), start)
    multiply_add = simd._llvm(builder, f"llvm.fma.v{LANES}f32", *[simd.VECTOR.llvm] * 4)
    return builder.call(multiply_add, [builder.sitofp(whole, simd.VECTOR.llvm), scale, before])


@intrinsic
def no_sums(typingctx):
    """Zero for every row."""
    return SUMS(), lambda context, builder, signature, args: ir.Constant(SUMS.llvm, [simd._constant(0.0)] * VECTORS)


@intrinsic
def add_block(typingctx, sums, weight, at, x, k, scale, start):
    """sums + the products of the block at weight[at : at + WORDS] with int8 x[k : k + 32], times the scales of both.

    In 16 bits they fit: 8 columns of 15 · 127 in each half of a lane's word.
    """

    def codegen(context, builder, signature, args):
        sums, weight, at, x, k, scale, start = args
        words = simd._element(context, builder, signature.args[1], weight, at)
        numbers = simd._element(context, builder, signature.args[3], x, k)
        totals = [_no_products()] * VECTORS
        for word in range(4):
            four = [_spread(builder, builder.gep(numbers, [_I32(8 * word + i)])) for i in (0, 4)]
            for part in range(VECTORS):
                for q, columns in zip(_fours(builder, words, word, part), four, strict=True):
                    totals[part] = simd._add_products_of_fours(builder, totals[part], q, columns)
        start, scale = simd._splat(builder, start), simd._splat(builder, scale)
        for part in range(VECTORS):
            both = builder.fmul(_scales(builder, words, part), scale)
            value = _scaled(builder, totals[part], start, both, builder.extract_value(sums, part))
            sums = builder.insert_value(sums, value, part)
        return sums

    return SUMS(SUMS, weight, types.intp, x, types.intp, types.float32, types.int32), codegen


FOUR = types.UniTuple(SUMS, 4)


@intrinsic
def no_sums_of_four(typingctx):
    """Zero for every row and four tokens."""

    def codegen(context, builder, signature, args):
        return context.make_tuple(builder, FOUR, [ir.Constant(SUMS.llvm, [simd._constant(0.0)] * VECTORS)] * 4)

    return FOUR(), codegen


@intrinsic
def add_block_of_four(typingctx, sums, weight, at, x, scales, starts, block, blocks):
    """The same for four tokens, of which x, the scales and the starts have `blocks` each: blocks `block`, `block +
    blocks` and so on. What is unpacked of the weights meets all four.
    """

    def codegen(context, builder, signature, args):
        sums, weight, at, x, scales, starts, block, blocks = args
        words, made = simd._element(context, builder, signature.args[1], weight, at), []
        own = [builder.add(block, builder.mul(blocks, blocks.type(i))) for i in range(4)]
        numbers = [builder.mul(which, which.type(BLOCK)) for which in own]
        numbers = [simd._element(context, builder, signature.args[3], x, k) for k in numbers]
        totals = [[_no_products()] * VECTORS for _ in range(4)]
        for word in range(4):
            unpacked = [_fours(builder, words, word, part) for part in range(VECTORS)]
            for token, total in zip(numbers, totals, strict=True):
                for half in range(2):
                    four = _spread(builder, builder.gep(token, [_I32(8 * word + 4 * half)]))
                    for part in range(VECTORS):
                        q = unpacked[part][half]
                        total[part] = simd._add_products_of_fours(builder, total[part], q, four)
        for i, (which, total) in enumerate(zip(own, totals, strict=True)):
            scale, start = (
                simd._splat(builder, builder.load(simd._element(context, builder, signature.args[j], array, which)))
                for j, array in ((4, scales), (5, starts))
            )
            token = builder.extract_value(sums, i)
            for part in range(VECTORS):
                both = builder.fmul(_scales(builder, words, part), scale)
                value = _scaled(builder, total[part], start, both, builder.extract_value(token, part))
                token = builder.insert_value(token, value, part)
            made.append(token)
        return context.make_tuple(builder, FOUR, made)

    return FOUR(FOUR, weight, types.intp, x, scales, starts, types.intp, types.intp), codegen


@intrinsic
def store_sums(typingctx, sums, y, index):
    """y[index : index + SIDE] = sums; y float32."""

    def codegen(context, builder, signature, args):
        sums, y, index = args
        for part in range(VECTORS):
            place = builder.add(index, index.type(part * LANES))
            simd._write(context, builder, signature.args[1], y, place, builder.extract_value(sums, part))
        return context.get_dummy_value()

    return types.void(SUMS, y, types.intp), codegen


@intrinsic
def unpack_block(typingctx, weight, at, panel, to, stride, scales, there):
    """The block at weight[at] as bytes q: columns 4 i … 4 i + 3 of all rows at panel[to + i · stride :], a row's four
    together; uint8. Its scales at scales[there :], float32.
    """

    def codegen(context, builder, signature, args):
        weight, at, panel, to, stride, scales, there = args
        words = simd._element(context, builder, signature.args[0], weight, at)
        for word in range(4):
            for part in range(VECTORS):
                for i, four in enumerate(_fours(builder, words, word, part)):
                    place = builder.add(to, builder.mul(stride, stride.type(2 * word + i)))
                    place = builder.add(place, to.type(part * 4 * LANES))
                    simd._write(context, builder, signature.args[2], panel, place, four)
        for part in range(VECTORS):
            place = builder.add(there, there.type(part * LANES))
            simd._write(context, builder, signature.args[5], scales, place, _scales(builder, words, part))
        return context.get_dummy_value()

    return types.void(weight, types.intp, panel, types.intp, types.intp, scales, types.intp), codegen


@intrinsic
def round_block(typingctx, weight, at, panel, to):
    """The block at weight[at] as bf16, a tile of the matrix unit (amx.py): columns 2 i and 2 i + 1 of all rows, in
    pairs, at panel[to + 32 i :]; uint16.
    """

    def codegen(context, builder, signature, args):
        weight, at, panel, to = args
        words = simd._element(context, builder, signature.args[0], weight, at)
        scales, wide = simd._half(builder, words, SIDE), ir.VectorType(_I32, SIDE)

        def each(number):
            return ir.Constant(wide, [number] * SIDE)

        def rounded(eight, shift):
            """The upper 16 bits are the bf16, to nearest even."""
            q = builder.sub(builder.and_(builder.lshr(eight, each(shift)), each(15)), each(8))
            bits = builder.bitcast(builder.fmul(builder.sitofp(q, scales.type), scales), wide)
            odd = builder.and_(builder.lshr(bits, each(16)), each(1))
            return builder.add(builder.add(bits, each(0x7FFF)), odd)

        for word in range(4):
            eight = simd._read(builder, builder.gep(words, [_I32(SCALES + word * SIDE)]), _I32, SIDE)
            for shift in (0, 16, 4, 20):
                even, odd = rounded(eight, shift), rounded(eight, shift + 8)
                pair = builder.or_(builder.lshr(even, each(16)), builder.and_(odd, each(-65536)))
                pair = builder.bitcast(pair, ir.VectorType(_I16, 2 * SIDE))
                simd._write(context, builder, signature.args[2], panel, to, pair)
                to = builder.add(to, to.type(2 * SIDE))
        return context.get_dummy_value()

    return types.void(weight, types.intp, panel, types.intp), codegen


@intrinsic
def tile_of_zeros(typingctx):
    """No products yet."""
    return TILE(), lambda context, builder, signature, args: ir.Constant(TILE.llvm, [_no_products()] * ROWS * 2)


@intrinsic
def tile_add_fours(typingctx, tile, x, start, stride, panel, index):
    """tile[t, r] += the products of four columns: x[start + t · stride : … + 4] of ROWS tokens, int8, and of 2 · LANES
    rows panel[index + 4 r : … + 4], uint8.
    """

    def codegen(context, builder, signature, args):
        tile, x, start, stride, panel, index = args
        row = simd._element(context, builder, signature.args[4], panel, index)
        q = [simd._read(builder, builder.gep(row, [_I32(i * 4 * LANES)]), _I8, 4 * LANES) for i in range(2)]
        token = simd._element(context, builder, signature.args[1], x, start)
        for t in range(ROWS):
            four = _spread(builder, token)
            token = builder.gep(token, [stride])
            for half in range(2):
                before = builder.extract_value(tile, t * 2 + half)
                total = simd._add_products_of_fours(builder, before, q[half], four)
                tile = builder.insert_value(tile, total, t * 2 + half)
        return tile

    return TILE(TILE, x, types.intp, types.intp, panel, types.intp), codegen


@intrinsic
def tile_add_scaled(typingctx, tile, x_scales, starts, first, step, scales, at, out, index):
    """out[index + t · 2 · LANES :] += tile[t, :], a block's products, times the scales of both, for ROWS tokens t.

    A token's scale and start are x_scales[first + t · step] and starts[…]; the rows' scales [at : at + 2 · LANES].
    """

    def codegen(context, builder, signature, args):
        tile, x_scales, starts, first, step, scales, at, out, index = args
        kinds = signature.args
        row = simd._element(context, builder, kinds[7], out, index)
        token = simd._element(context, builder, kinds[1], x_scales, first)
        start = simd._element(context, builder, kinds[2], starts, first)
        own = simd._element(context, builder, kinds[5], scales, at)
        own = [simd._read(builder, builder.gep(own, [_I32(half * LANES)]), _F32) for half in range(2)]
        for t in range(ROWS):
            scale, begin = (simd._splat(builder, builder.load(each)) for each in (token, start))
            for half in range(2):
                place = builder.gep(row, [_I32((2 * t + half) * LANES)])
                both, before = builder.fmul(own[half], scale), simd._read(builder, place, _F32)
                value = _scaled(builder, builder.extract_value(tile, t * 2 + half), begin, both, before)
                builder.store(value, builder.bitcast(place, value.type.as_pointer())).align = 1
            token, start = builder.gep(token, [step]), builder.gep(start, [step])
        return context.get_dummy_value()

    intp = types.intp
    return types.void(TILE, x_scales, starts, intp, intp, scales, intp, out, intp), codegen


# ---- few tokens


@jit_inner
def few_rows(x, blocks, weight, group, other, y):
    """y[:, 16 group : 16 group + 16] = the products of sixteen rows with each token, and those of the group `other`;
    for one token both are read at once, where two STREAMS are best: see few_tokens.py. x as `few_in_8_bits` makes it.
    """
    (whole, scales, starts), out, (T, R) = x, reshaped(y, y.size), y.shape
    if T == 1:
        one, two, at, there = no_sums(), no_sums(), group * blocks * WORDS, other * blocks * WORDS
        for block in range(blocks):
            for line in range(0, WORDS, 16):
                prefetch(weight, at + AHEAD + line)
                if STREAMS == 2:
                    prefetch(weight, there + AHEAD + line)
            one = add_block(one, weight, at, whole, block * BLOCK, scales[block], starts[block])
            if STREAMS == 2:
                two = add_block(two, weight, there, whole, block * BLOCK, scales[block], starts[block])
            at, there = at + WORDS, there + WORDS
        store_sums(one, out, group * SIDE)
        if STREAMS == 2:
            store_sums(two, out, other * SIDE)
        return
    for stream in range(STREAMS):
        sixteen = other if stream else group
        for t in range(0, T, 4):
            four, at = no_sums_of_four(), sixteen * blocks * WORDS
            for block in range(t * blocks, t * blocks + blocks):
                for line in range(0, WORDS if t == 0 else 0, 16):
                    prefetch(weight, at + AHEAD + line)
                four = add_block_of_four(four, weight, at, whole, scales, starts, block, blocks)
                at += WORDS
            for i in range(min(4, T - t)):
                store_sums(four[i], out, (t + i) * R + sixteen * SIDE)


@jit_inner
def few_in_8_bits(x):
    """As `in_8_bits`, in a kernel: with room for tokens up to a multiple of four, if there are several."""
    T, D = x.shape
    room = D if T == 1 else (T + 3) // 4 * 4 * D
    whole, blocks = new_array(room, np.int8), T * D // BLOCK
    scales, starts = new_array(room // BLOCK, np.float32), new_array(room // BLOCK, np.int32)
    round_blocks(reshaped(x, x.size), whole, scales, starts, 0, blocks)
    for block in range(blocks, scales.size):
        scales[block], starts[block] = 0, 0
        for k in range(block * BLOCK, block * BLOCK + BLOCK):
            whole[k] = 0
    return whole, scales, starts


# ---- many tokens


@jit_inner
def _some_panels(worker, workers, x, weight, columns, panel, scales, sums, y):
    (whole, x_scales, starts), (T, R), lanes, blocks = x, y.shape, 2 * LANES, columns // BLOCK
    for p in chunk(worker, workers, (R + lanes - 1) // lanes):
        top, rows = p * lanes, min(lanes, R - p * lanes)
        sums[:] = 0
        for first in range(0, blocks, DEPTH // BLOCK):
            count = min(DEPTH // BLOCK, blocks - first)
            for side in range(rows // SIDE):
                at = ((top // SIDE + side) * blocks + first) * WORDS
                for block in range(count):
                    to = block * BLOCK * lanes + side * 4 * SIDE
                    unpack_block(weight, at, panel, to, 4 * lanes, scales, block * lanes + side * SIDE)
                    for line in range(0, WORDS, 16):
                        prefetch(weight, at + lanes // SIDE * blocks * WORDS + line)
                    at += WORDS
            for t in range(0, T, ROWS):
                for block in range(count):
                    tile, here = tile_of_zeros(), t * blocks + first + block
                    for four in range(QUADS):
                        k, to = here * BLOCK + 4 * four, (block * QUADS + four) * 4 * lanes
                        tile = tile_add_fours(tile, whole, k, columns, panel, to)
                    tile_add_scaled(tile, x_scales, starts, here, blocks, scales, block * lanes, sums, t * lanes)
        for t in range(T):
            for r in range(rows):
                y[t, top + r] = sums[t * lanes + r]


@jit_inner
def _panels_of_all(worker, workers, x, weights, columns, ys):
    lanes, tokens = 2 * LANES, (len(ys[0]) + ROWS - 1) // ROWS * ROWS
    panel = amx.on_cache_line(new_zeros(DEPTH * lanes + 64, np.uint8), DEPTH * lanes)
    scales, sums = new_zeros(DEPTH // BLOCK * lanes, np.float32), new_array(tokens * lanes, np.float32)
    for i in range(len(weights)):
        _some_panels(worker, workers, x, weights[i], columns, panel, scales, sums, ys[i])


@jit
def many_tokens_side_by_side(workers, x, weights, columns, ys):
    """x Wᵀ for each weight: DEPTH columns of 2 · LANES rows are unpacked and used for all tokens while in the cache."""
    parallel_for(_panels_of_all, workers, (x, weights, columns, ys))


# ---- many tokens on the matrix unit: the tokens are A, and the weights, whose rows are lanes already, are B (amx.py)


@jit_inner
def _some_tokens(worker, workers, x, packed, steps):
    for t in chunk(worker, workers, len(x)):
        for step in range(steps):
            at = ((t // 32 * steps + step) * 2 + t % 32 // 16) * amx.TILE + t % 16 * amx.DEPTH
            for k in range(amx.DEPTH):
                packed[at + k] = bf16_bits(x[t, step * amx.DEPTH + k])


@jit
def _pack_tokens(workers, x, packed, steps):
    parallel_for(_some_tokens, workers, (x, packed, steps))


def tokens_in_tiles(x: F32) -> NDArray[np.uint16]:
    """x [T, D] as bf16 in tiles of 16 tokens and 32 columns, two by two; the last are filled up with zeros."""
    T, steps = len(x), x.shape[1] // amx.DEPTH
    packed = aligned(-(-T // 32) * steps * 2 * amx.TILE, np.uint16)
    if T % 32:
        packed[:] = 0
    _pack_tokens(workers_for(x), x, packed, steps)
    return packed


@jit_inner
def _some_on_tiles(worker, workers, packed, registers, weight, columns, panel, sums, y):
    (T, R), blocks = y.shape, columns // BLOCK
    for p in chunk(worker, workers, (R + 31) // 32):
        rows = min(32, R - p * 32)
        for first in range(0, blocks, UNIT_DEPTH // BLOCK):
            depth = min(UNIT_DEPTH // BLOCK, blocks - first)
            for side in range(rows // SIDE):
                at = ((p * 2 + side) * blocks + first) * WORDS
                for step in range(depth):
                    round_block(weight, at + step * WORDS, panel, (step * 2 + side) * amx.TILE)
            for block in range((T + 31) // 32):
                tokens = packed[(block * blocks + first) * 2 * amx.TILE :]
                own = sums[block * 1024 : block * 1024 + 1024]
                amx.multiply_panel(registers, tokens, panel, 0, 0, depth, first > 0, own)
        for t in range(T):
            at = t // 32 * 1024 + t // 16 % 2 * 512 + t % 16 * 16
            for r in range(rows):
                y[t, p * 32 + r] = sums[at + r // 16 * 256 + r % 16]


@jit_inner
def _all_on_tiles(worker, workers, packed, tiles, weights, columns, ys):
    blocks, registers = (len(ys[0]) + 31) // 32, tiles.copy()
    panel = amx.on_cache_line(new_zeros(32 * UNIT_DEPTH + 32, np.uint16), 32 * UNIT_DEPTH)
    sums = amx.on_cache_line(new_array(blocks * 1024 + 16, np.float32), blocks * 1024)
    amx.begin(registers)
    for i in range(len(weights)):
        _some_on_tiles(worker, workers, packed, registers, weights[i], columns, panel, sums, ys[i])
    amx.end(registers)


@jit
def many_tokens_on_tiles(workers, packed, tiles, weights, columns, ys):
    """x Wᵀ for each weight, UNIT_DEPTH columns of 32 rows at a time."""
    parallel_for(_all_on_tiles, workers, (packed, tiles, weights, columns, ys))
