"""Vectors as Numba values, so that a kernel can say which vector instruction runs.

A modern core multiplies and adds 8 or 16 float32 numbers in one instruction. LLVM finds such vectors in plain loops by
itself only when the loop is simple; where it does not, a kernel says it with this page:

    total = zeros()
    for d in range(0, D, LANES):
        total = fma(load(row, d), load(x, d), total)      # LANES products and sums at once
    y = sum_lanes(total)

`Vector` is a Numba type whose machine form is an LLVM vector of LANES float32 numbers; each operation is an LLVM
instruction and knows no maker's name: LLVM turns it into AVX-512, AVX2 or NEON, whichever the processor has.
`load` takes float32, bf16 (as uint16), int8 and uint8 arrays and widens to float32 on the way.

`Tile` is a block of ROWS x 2 such vectors that stays in registers, the unit of a matrix product:

    tile = tile_zeros()
    for d in range(D):
        tile = tile_add_outer(tile, column of ROWS numbers, row of 2 * LANES numbers)

Each number loaded is then used ROWS or 2 * LANES times, which is what makes a product run at the speed of arithmetic
and not of loads.

Which kernel uses what on which processor, and its fallback: docs/performance.md. The matrix unit's tiles: amx.py.
"""

from __future__ import annotations

import operator
import os
import platform
from collections.abc import Callable
from typing import Any

import numba
from llvmlite import ir
from llvmlite.binding import get_host_cpu_features, get_host_cpu_name, initialize_native_asmparser
from numba import types
from numba.extending import intrinsic, models, overload, register_model

from .compiler import INNER, Inner

_F32, _I8, _I16, _I32 = ir.FloatType(), ir.IntType(8), ir.IntType(16), ir.IntType(32)

# A path below the processor's own can be forced, so that tests can run it. MINIGEMMA_CPU=vectors takes the matrix unit
# away, =imitation puts plain loops in its place (amx.py), =generic takes AVX-512 away too. Numba's cache is keyed by
# these features, so that code compiled for one path is never run on another.
FORCED = os.environ.get("MINIGEMMA_CPU", "")
_features = get_host_cpu_features()
_taken = ("avx512", "avx10", "amx", "f16c") if FORCED == "generic" else ("amx",) if FORCED else ()
if any(_features[name] and name.startswith(_taken) for name in _features):
    for _name in _features:
        _features[_name] = _features[_name] and not _name.startswith(_taken)
    numba.config.CPU_FEATURES = _features.flatten()
# 16 where AVX-512 is; else 8, which is AVX2, or two NEON vectors.
LANES = 16 if _features.get("avx512f") else 8
_HALVES = bool(_features.get("f16c"))
VNNI = LANES == 16 and bool(_features.get("avx512vnni"))
ROWS = 12 if LANES == 16 else 6  # accumulators: 24 of 32 registers, or 12 of 16
# How many places at once a thread reads weights from: AMD's Zen reads up to a quarter faster from two, Intel's slower.
STREAMS = 2 if get_host_cpu_name().startswith("znver") else 1


def paths() -> dict[str, str]:
    """Which path of each kind of kernel runs on this processor, and why."""
    forced = FORCED == "generic"
    wide, why = bool(_features.get("avx512f")), ", as MINIGEMMA_CPU=generic asks" if forced else ""
    instructions = (
        "AVX-512" if wide else "AVX2" if _features.get("avx2") else "the compiler's choice for this processor"
    )
    missing = "" if wide else f"; AVX-512 is not {'used' + why if forced else 'there'}"
    return {
        "vectors": f"{LANES} float32 numbers ({instructions}{missing})",
        "blocks of many tokens": f"{ROWS} x {2 * LANES} sums in registers",
        "int8": f"16-bit products in pairs, {LANES} sums at once",
        "int4, sixteen rows side by side": "8-bit products in fours (VNNI)" if VNNI else "8-bit products in pairs",
        "places read from at once": f"{STREAMS}, as is best on {'AMD' if STREAMS > 1 else 'most'} processors",
        "float16 scales": "an instruction (F16C)" if _HALVES else f"bit operations{why}",
    }


class _VectorType(types.Type):
    """LANES float32 numbers."""

    llvm = ir.VectorType(_F32, LANES)

    def __init__(self) -> None:
        super().__init__(name=f"f32x{LANES}")


class _TileType(types.Type):
    """ROWS x 2 vectors."""

    llvm = ir.ArrayType(_VectorType.llvm, ROWS * 2)

    def __init__(self) -> None:
        super().__init__(name=f"f32x{LANES}x{ROWS}x2")


class _WholeTileType(types.Type):
    """ROWS x 2 vectors of LANES int32 numbers."""

    llvm = ir.ArrayType(ir.VectorType(_I32, LANES), ROWS * 2)

    def __init__(self) -> None:
        super().__init__(name=f"i32x{LANES}x{ROWS}x2")


@register_model(_VectorType)
@register_model(_TileType)
@register_model(_WholeTileType)
class _Model(models.PrimitiveModel):
    def __init__(self, manager, kind):
        super().__init__(manager, kind, kind.llvm)


READABLE = (types.float32, types.int32, types.uint32, types.uint16, types.int16, types.int8, types.uint8)
VECTOR, TILE, WHOLE_TILE = _VectorType(), _TileType(), _WholeTileType()
FOURS = ir.VectorType(_I32, LANES) if VNNI else ir.VectorType(_I16, 2 * LANES)  # sums of products of bytes
if VNNI:
    initialize_native_asmparser()


def _inline(function: Callable) -> Any:
    """Decorator: an operation made of others."""
    return Inner(function, INNER | {"fastmath": False})


def _constant(value, kind=_F32):
    return ir.Constant(ir.VectorType(kind, LANES), [kind(value)] * LANES)


def _llvm(builder, name, result, *arguments):
    """The LLVM intrinsic `name`, declared once a module."""
    known = builder.module.globals.get(name)
    return known or ir.Function(builder.module, ir.FunctionType(result, arguments), name)


def _splat(builder, scalar, lanes=LANES):
    one = builder.insert_element(ir.Constant(ir.VectorType(scalar.type, lanes), ir.Undefined), scalar, _I32(0))
    return builder.shuffle_vector(one, one, ir.Constant(ir.VectorType(_I32, lanes), [0] * lanes))


def _element(context, builder, array_type, array, index):
    """The address of array[index], for a one-dimensional array without gaps."""
    if array_type.ndim != 1 or array_type.layout != "C" or array_type.dtype not in READABLE:
        raise TypeError(
            f"vectors are read from one axis of float32 or of 8 or 16 bits, without gaps, not from {array_type}"
        )
    data = context.make_array(array_type)(context, builder, array).data
    return builder.gep(data, [index])


def _read(builder, address, element, lanes=LANES):
    vector = ir.VectorType(element, lanes)
    value = builder.load(builder.bitcast(address, vector.as_pointer()))
    value.align = 1  # a mapped file promises no alignment
    return value


def _widened(builder, address, dtype):
    """LANES numbers of `dtype` from `address` on, as float32."""
    if dtype == types.float32:
        return _read(builder, address, _F32)
    words = ir.VectorType(_I32, LANES)
    if dtype == types.uint16:  # bf16 is the upper half of a float32
        high = builder.shl(builder.zext(_read(builder, address, _I16), words), _constant(16, _I32))
        return builder.bitcast(high, VECTOR.llvm)
    extend = builder.sext if dtype == types.int8 else builder.zext
    return builder.sitofp(extend(_read(builder, address, _I8), words), VECTOR.llvm)


@intrinsic
def load(typingctx, array, index):
    """LANES numbers from array[index] on, widened to float32. float32, uint16 (bf16), int8 or uint8, one axis."""

    def codegen(context, builder, signature, args):
        address = _element(context, builder, signature.args[0], *args)
        return _widened(builder, address, signature.args[0].dtype)

    return VECTOR(array, types.intp), codegen


TWO, EIGHT = types.UniTuple(VECTOR, 2), types.UniTuple(VECTOR, 8)


def _two(builder, address, dtype):
    """What `load_even_odd` makes of 2 · LANES numbers."""
    if dtype == types.float32:
        return [_read(builder, builder.gep(address, [_I32(half * LANES)]), _F32) for half in range(2)]
    words = _read(builder, address, _I32)
    words = [builder.shl(words, _constant(16, _I32)), builder.and_(words, _constant(-65536, _I32))]
    return [builder.bitcast(word, VECTOR.llvm) for word in words]


@intrinsic
def load_even_odd(typingctx, array, index):
    """The 2 · LANES numbers from array[index] on as two vectors, in the order that takes the fewest instructions: of
    float32 the first half and the second; of bf16 those at even and at odd places, where a shift or a mask suffices.
    """

    def codegen(context, builder, signature, args):
        address = _element(context, builder, signature.args[0], *args)
        return context.make_tuple(builder, TWO, _two(builder, address, signature.args[0].dtype))

    return TWO(array, types.intp), codegen


def _reordered(places):
    @intrinsic
    def reordered(typingctx, array, a, b):
        def codegen(context, builder, signature, args):
            _, a, b = args
            if signature.args[0].dtype == types.float32:
                return context.make_tuple(builder, TWO, [a, b])
            chosen = [ir.Constant(ir.VectorType(_I32, LANES), half) for half in (places[:LANES], places[LANES:])]
            return context.make_tuple(builder, TWO, [builder.shuffle_vector(a, b, half) for half in chosen])

        return TWO(array, VECTOR, VECTOR), codegen

    return reordered


# Two vectors of 2 · LANES neighbours into the order of `load_even_odd` for `array`, and back.
as_two, from_two = (
    _reordered([*range(0, 2 * LANES, 2), *range(1, 2 * LANES, 2)]),
    _reordered([half * LANES + i for i in range(LANES) for half in range(2)]),
)


@intrinsic
def load_one(typingctx, array, index):
    """array[index] widened to float32: a float32 or a uint16 (bf16)."""

    def codegen(context, builder, signature, args):
        value = builder.load(_element(context, builder, signature.args[0], *args))
        if signature.args[0].dtype == types.float32:
            return value
        return builder.bitcast(builder.shl(builder.zext(value, _I32), _I32(16)), _F32)

    return types.float32(array, types.intp), codegen


@intrinsic
def load_float(typingctx, array, index):
    """The float32 in bytes index … index + 3 of a uint8 array."""

    def codegen(context, builder, signature, args):
        address = _element(context, builder, signature.args[0], *args)
        value = builder.load(builder.bitcast(address, _F32.as_pointer()))
        value.align = 1
        return value

    return types.float32(array, types.intp), codegen


@intrinsic
def load_half(typingctx, array, index):
    """The float16 in bytes index and index + 1 of a uint8 array, as float32. Finite ones only.

    Most processors have an instruction for it. Without one: shifted into a float32's place its exponent is too small by
    127 - 15 = 112, and a product sets that right, also for subnormals.
    """

    def codegen(context, builder, signature, args):
        return _half(builder, _element(context, builder, signature.args[0], *args))

    return types.float32(array, types.intp), codegen


@intrinsic
def splat_half(typingctx, array, index):
    """The same number in every lane, spread before it is widened: two instructions, where one number takes three."""

    def codegen(context, builder, signature, args):
        return _splat_half(builder, _element(context, builder, signature.args[0], *args))

    return VECTOR(array, types.intp), codegen


def _splat_half(builder, address):
    if not _HALVES:
        return _splat(builder, _half(builder, address))
    kind = ir.VectorType(ir.HalfType(), LANES)
    half = builder.load(builder.bitcast(address, ir.HalfType().as_pointer()))
    half.align = 1
    one = builder.insert_element(ir.Constant(kind, ir.Undefined), half, _I32(0))
    return builder.fpext(
        builder.shuffle_vector(one, one, ir.Constant(ir.VectorType(_I32, LANES), [0] * LANES)), VECTOR.llvm
    )


def _half(builder, address, lanes=0):
    """One float16 at an address, or `lanes` of them, as float32."""

    def each(kind, value=None):
        kind = ir.VectorType(kind, lanes) if lanes else kind
        return kind if value is None else ir.Constant(kind, [kind.element(value)] * lanes if lanes else value)

    kind = each(ir.HalfType() if _HALVES else _I16)
    half = builder.load(builder.bitcast(address, kind.as_pointer()))
    half.align = 1
    if _HALVES:
        return builder.fpext(half, each(_F32))
    bits = builder.zext(half, each(_I32))
    magnitude = builder.shl(builder.and_(bits, each(_I32, 0x7FFF)), each(_I32, 13))
    magnitude = builder.fmul(builder.bitcast(magnitude, each(_F32)), each(_F32, 2.0**112))
    sign = builder.shl(builder.and_(bits, each(_I32, 0x8000)), each(_I32, 16))
    return builder.bitcast(builder.or_(builder.bitcast(magnitude, each(_I32)), sign), each(_F32))


@intrinsic
def bf16_bits(typingctx, value):
    """The upper 16 bits of a float32, rounded to nearest, ties to even; NaN stays NaN."""

    def codegen(context, builder, signature, args):
        bits = builder.bitcast(args[0], _I32)
        odd = builder.and_(builder.lshr(bits, _I32(16)), _I32(1))
        rounded = builder.add(builder.add(bits, _I32(0x7FFF)), odd)
        chosen = builder.select(builder.fcmp_unordered("uno", *args * 2), builder.or_(bits, _I32(0x400000)), rounded)
        return builder.trunc(builder.lshr(chosen, _I32(16)), _I16)

    return types.uint16(types.float32), codegen


@intrinsic
def store_half(typingctx, array, index, value):
    """Bytes index and index + 1 of a uint8 array = a float32 rounded to float16, to nearest even; |value| < 65,520.

    The way of `load_half` back: 2⁻¹¹² brings the exponent into place, and 13 bits are rounded off.
    """

    def codegen(context, builder, signature, args):
        bits = builder.bitcast(args[2], _I32)
        magnitude = builder.bitcast(builder.and_(bits, _I32(0x7FFFFFFF)), _F32)
        scaled = builder.bitcast(builder.fmul(magnitude, _F32(2.0**-112)), _I32)
        odd = builder.and_(builder.lshr(scaled, _I32(13)), _I32(1))
        rounded = builder.lshr(builder.add(builder.add(scaled, _I32(0xFFF)), odd), _I32(13))
        half = builder.or_(rounded, builder.and_(builder.lshr(bits, _I32(16)), _I32(0x8000)))
        address = _element(context, builder, signature.args[0], args[0], args[1])
        word = _I16
        builder.store(builder.trunc(half, word), builder.bitcast(address, word.as_pointer())).align = 1
        return context.get_dummy_value()

    return types.void(array, types.intp, types.float32), codegen


@intrinsic
def load_signed(typingctx, array, index):
    """LANES numbers from array[index] on, of a uint8 array whose bytes are two's complement (int8)."""

    def codegen(context, builder, signature, args):
        return _widened(builder, _element(context, builder, signature.args[0], *args), types.int8)

    return VECTOR(array, types.intp), codegen


@intrinsic
def load_sfp8(typingctx, array, index):
    """LANES numbers from array[index] on, of a uint8 array in SFP8 (sfp8.py): bits moved to where float32 has them.

    With the switch, c = 64 + 8 e + m means exponent e - 7: c + 896 in place gives 127 - 7 + e and m. Without it,
    c = 4 e + m means e - 23: c + 416, one bit further left.
    """

    def codegen(context, builder, signature, args):
        words = ir.VectorType(_I32, LANES)
        code = builder.zext(_read(builder, _element(context, builder, signature.args[0], *args), _I8), words)
        c = builder.and_(code, _constant(127, _I32))
        large = builder.shl(builder.add(c, _constant(896, _I32)), _constant(20, _I32))
        small = builder.shl(builder.add(c, _constant(416, _I32)), _constant(21, _I32))
        small = builder.select(builder.icmp_unsigned("==", c, _constant(0, _I32)), c, small)
        bits = builder.select(builder.icmp_unsigned("<", c, _constant(64, _I32)), small, large)
        sign = builder.shl(builder.lshr(code, _constant(7, _I32)), _constant(31, _I32))
        return builder.bitcast(builder.or_(bits, sign), VECTOR.llvm)

    return VECTOR(array, types.intp), codegen


def _nibbles(high):
    @intrinsic
    def load_nibbles(typingctx, array, index):
        def codegen(context, builder, signature, args):
            value = _read(builder, _element(context, builder, signature.args[0], *args), _I8)
            value = builder.lshr(value, _constant(4, _I8)) if high else builder.and_(value, _constant(15, _I8))
            return builder.uitofp(builder.zext(value, ir.VectorType(_I32, LANES)), VECTOR.llvm)

        return VECTOR(array, types.intp), codegen

    return load_nibbles


load_low_nibbles, load_high_nibbles = _nibbles(False), _nibbles(True)


def _opaque(builder, vector):
    """The vector itself, of which LLVM may know nothing: as if an instruction that it does not know had made it."""
    if platform.machine() not in ("x86_64", "AMD64"):
        return vector
    return builder.asm(ir.FunctionType(vector.type, [vector.type]), "", "=x,0", [vector], False)


def _products_of_32(builder, weights, numbers):
    """Vectors of 2 · LANES int8 or int16, 32 in all, times the int16 from address `numbers` on, neighbours added: LANES
    sums in int32. Such a product and sum of neighbours is one instruction on most machines.
    """
    step, total = 2 * LANES, _constant(0, _I32)
    for i, some in enumerate(weights):
        others = _read(builder, builder.gep(numbers, [_I32(i * step)]), _I16, step)
        total = builder.add(total, _products_of_pairs(builder, some, others))
    return total


def _products_of_pairs(builder, some, others):
    """int8 or int16 times as many int16, neighbours added: half as many sums in int32."""
    count = some.type.count
    wide = ir.VectorType(_I32, count)
    products = builder.mul(builder.sext(some, wide), builder.sext(others, wide))
    nothing = ir.Constant(wide, ir.Undefined)
    even, odd = (ir.Constant(ir.VectorType(_I32, count // 2), list(range(i, count, 2))) for i in range(2))
    return builder.add(*(builder.shuffle_vector(products, nothing, which) for which in (even, odd)))


def _add_products_of_fours(builder, total, unsigned, signed):
    """total (of type FOURS) + the products of uint8 and int8, 4 · LANES of each, neighbours added.

    One instruction with VNNI, which adds up all four of a lane. Without it neighbours are added in 16 bits, where they
    have to fit. The instruction for that brings what does not fit to the nearest that does, and LLVM takes it for a sum
    that is written so, if it does not know that it always fits; but it does not where AVX-512 could do a part of it.
    """
    if VNNI:
        form = ir.FunctionType(total.type, [total.type, unsigned.type, signed.type])
        return builder.asm(form, "vpdpbusd $3, $2, $0", "=v,0,v,v", [total, unsigned, signed], False)
    if LANES == 16:
        name = "llvm.x86.avx512.pmaddubs.w.512"
        function = _llvm(builder, name, total.type, unsigned.type, signed.type)
        return builder.add(total, builder.call(function, [unsigned, signed]))
    wide, nothing, products = ir.VectorType(_I32, 2 * LANES), ir.Constant(unsigned.type, ir.Undefined), []
    unsigned = _opaque(builder, unsigned)
    for odd in range(2):
        which = ir.Constant(wide, list(range(odd, 4 * LANES, 2)))
        a, b = (builder.shuffle_vector(numbers, nothing, which) for numbers in (unsigned, signed))
        products.append(builder.mul(builder.zext(a, wide), builder.sext(b, wide)))
    some = builder.add(*products)
    for sign, limit in ((">", -(1 << 15)), ("<", (1 << 15) - 1)):
        bound = ir.Constant(wide, [limit] * 2 * LANES)
        some = builder.select(builder.icmp_signed(sign, some, bound), some, bound)
    return builder.add(total, builder.trunc(some, total.type))


def _sums_of_fours(builder, total):
    """The LANES sums in int32 that a `total` of such products is."""
    if VNNI:
        return total
    ones = ir.Constant(total.type, [1] * 2 * LANES)
    return _products_of_pairs(builder, total, _opaque(builder, ones))


def _whole_32(builder, address, dtype):
    """The 32 whole numbers from an address on, in vectors of 2 · LANES: the bytes of int8; of uint8 16 bytes' nibbles,
    low ones, then high ones, and 8 too large.
    """
    if dtype == types.int8:
        return [_read(builder, builder.gep(address, [_I32(i)]), _I8, 2 * LANES) for i in range(0, 32, 2 * LANES)]
    words = ir.VectorType(_I16, 16)
    both = builder.zext(_read(builder, address, _I8, 16), words)
    both = _opaque(builder, both)  # or LLVM would split first and widen each half, an instruction more of each
    parts = [builder.and_(both, ir.Constant(words, [15] * 16)), builder.lshr(both, ir.Constant(words, [4] * 16))]
    if LANES == 16:
        return [builder.shuffle_vector(*parts, ir.Constant(ir.VectorType(_I32, 32), list(range(32))))]
    return parts


def _dot_32(builder, parts, dtype, numbers, left):
    """LANES partial sums, as float32, of the products of 32 whole numbers with as many int16. They are exact:
    32 · 128 · 32,767 is less than 2³¹. Of nibbles Σ (n - 8) x = Σ n x + Σ (-8) x, and the second sum is what is `left`.
    """
    sums = _products_of_32(builder, parts, numbers)
    if dtype != types.int8:
        sums = builder.add(sums, _read(builder, builder.bitcast(left, _I32.as_pointer()), _I32))
    return builder.sitofp(sums, VECTOR.llvm)


@intrinsic
def dot_32(typingctx, row, at, x, k, offsets):
    """LANES partial sums, as float32, of the products of the 32 whole numbers from row[at] on with int16 x[k : k + 32]:
    of bytes if the row is int8, of nibbles less 8 if it is uint8. These want what `store_offsets` has left in
    x[offsets : offsets + 2 · LANES].
    """

    def codegen(context, builder, signature, args):
        dtype, (row, at, x, k, offsets) = signature.args[0].dtype, args
        parts = _whole_32(builder, _element(context, builder, signature.args[0], row, at), dtype)
        numbers, left = (_element(context, builder, signature.args[2], x, i) for i in (k, offsets))
        return _dot_32(builder, parts, dtype, numbers, left)

    return VECTOR(row, types.intp, x, types.intp, types.intp), codegen


@intrinsic
def store_offsets(typingctx, x, k, offsets):
    """x[offsets : offsets + 2 · LANES] = the sums of `dot_32` for int16 x[k : k + 32], were every weight -8."""

    def codegen(context, builder, signature, args):
        step = 2 * LANES
        parts = [ir.Constant(ir.VectorType(_I16, step), [-8] * step)] * (32 // step)
        sums = _products_of_32(builder, parts, _element(context, builder, signature.args[0], args[0], args[1]))
        address = _element(context, builder, signature.args[0], args[0], args[2])
        builder.store(sums, builder.bitcast(address, sums.type.as_pointer())).align = 1
        return context.get_dummy_value()

    return types.void(x, types.intp, types.intp), codegen


@intrinsic
def unpack_32(typingctx, row, at, out, to):
    """out[to : to + 32] = 32 whole numbers from row[at] on, as int16: int8 as they are; of uint8 the nibbles less 8 of
    16 bytes, low ones, then high ones.
    """

    def codegen(context, builder, signature, args):
        words, address = ir.VectorType(_I16, 16), _element(context, builder, signature.args[0], *args[:2])
        if signature.args[0].dtype == types.int8:
            halves = [builder.sext(_read(builder, builder.gep(address, [_I32(i)]), _I8, 16), words) for i in (0, 16)]
        else:
            both = builder.zext(_read(builder, address, _I8, 16), words)
            fifteen, four, eight = (ir.Constant(words, [n] * 16) for n in (15, 4, 8))
            halves = [builder.sub(half, eight) for half in (builder.and_(both, fifteen), builder.lshr(both, four))]
        for i, half in enumerate(halves):
            index = builder.add(args[3], args[3].type(16 * i))
            _write(context, builder, signature.args[2], args[2], index, half)
        return context.get_dummy_value()

    return types.void(row, types.intp, out, types.intp), codegen


def _write(context, builder, kind, array, index, vector):
    """array[index :] = vector."""
    address = _element(context, builder, kind, array, index)
    builder.store(vector, builder.bitcast(address, vector.type.as_pointer())).align = 1


@intrinsic
def store(typingctx, array, index, value):
    """array[index : index + LANES] = value, float32."""

    def codegen(context, builder, signature, args):
        address = _element(context, builder, signature.args[0], args[0], args[1])
        builder.store(args[2], builder.bitcast(address, VECTOR.llvm.as_pointer())).align = 1
        return context.get_dummy_value()

    return types.void(array, types.intp, VECTOR), codegen


@intrinsic
def store_whole(typingctx, array, index, value):
    """array[index : index + LANES] = value, rounded to the nearest whole number, ties to even, of an array of int16 or
    int8: |value| ≤ 32,767 or 127.
    """

    def codegen(context, builder, signature, args):
        nearest = builder.call(_llvm(builder, f"llvm.rint.v{LANES}f32", VECTOR.llvm, VECTOR.llvm), [args[2]])
        words = ir.VectorType(ir.IntType(signature.args[0].dtype.bitwidth), LANES)
        whole = builder.trunc(builder.fptosi(nearest, ir.VectorType(_I32, LANES)), words)
        _write(context, builder, signature.args[0], args[0], args[1], whole)
        return context.get_dummy_value()

    return types.void(array, types.intp, VECTOR), codegen


@intrinsic
def splat(typingctx, value):
    """One number in every lane."""
    return VECTOR(types.float32), lambda context, builder, signature, args: _splat(builder, args[0])


@intrinsic
def zeros(typingctx):
    """Zero in every lane."""
    return VECTOR(), lambda context, builder, signature, args: _constant(0.0)


@intrinsic
def fma(typingctx, x, y, z):
    """x · y + z, rounded once."""

    def codegen(context, builder, signature, args):
        return builder.call(_llvm(builder, f"llvm.fma.v{LANES}f32", *[VECTOR.llvm] * 4), args)

    return VECTOR(VECTOR, VECTOR, VECTOR), codegen


def _binary(symbol, emit):
    """Teach Numba what `x symbol y` is for two vectors."""

    @intrinsic
    def apply(typingctx, x, y):
        return VECTOR(VECTOR, VECTOR), lambda context, builder, signature, args: emit(builder, *args)

    @overload(symbol, jit_options=INNER | {"fastmath": False})
    def overloaded(x, y):
        if x is VECTOR and y is VECTOR:
            return lambda x, y: apply(x, y)
        return None

    return apply


_binary(operator.add, lambda builder, x, y: builder.fadd(x, y))
_binary(operator.sub, lambda builder, x, y: builder.fsub(x, y))
_binary(operator.mul, lambda builder, x, y: builder.fmul(x, y))
_binary(operator.truediv, lambda builder, x, y: builder.fdiv(x, y))


@intrinsic
def where_less(typingctx, x, y, value, otherwise):
    """`value` in lanes where x < y, else `otherwise`, which is also what a NaN gets."""

    def codegen(context, builder, signature, args):
        return builder.select(builder.fcmp_ordered("<", args[0], args[1]), args[2], args[3])

    return VECTOR(*[VECTOR] * 4), codegen


@_inline
def maximum(x, y):
    """The larger of each lane; NaN where x is."""
    return where_less(x, y, y, x)


@_inline
def magnitude(x):
    """The absolute value of each lane."""
    return maximum(x, zeros() - x)


@_inline
def minimum(x, y):
    """The smaller of each lane; NaN where x is."""
    return where_less(y, x, y, x)


def _reduction(name, start):
    @intrinsic
    def reduce(typingctx, x):
        def codegen(context, builder, signature, args):
            full = f"llvm.vector.reduce.{name}.v{LANES}f32"
            if start is None:
                return builder.call(_llvm(builder, full, _F32, VECTOR.llvm), args)
            function = _llvm(builder, full, _F32, _F32, VECTOR.llvm)
            return builder.call(function, [_F32(start), args[0]], fastmath=("reassoc",))

        return types.float32(VECTOR), codegen

    return reduce


sum_lanes, max_lanes = _reduction("fadd", 0.0), _reduction("fmax", None)


@intrinsic
def eight_zeros(typingctx):
    """Eight vectors of zeros."""

    def codegen(context, builder, signature, args):
        return context.make_tuple(builder, EIGHT, [_constant(0.0)] * 8)

    return EIGHT(), codegen


@intrinsic
def add_fours(typingctx, sums, weight, at, other, x, k):
    """Eight sums, of a row and four tokens, then of another row: more by the products of the 2 · LANES numbers from
    weight[at] on, or from weight[other] on, float32 or bf16, with as many of each token, which stand one after the
    other from x[k] on, each in the order of `load_even_odd`.
    """

    def codegen(context, builder, signature, args):
        sums, weight, at, other, x, k = args
        kind, numbers = signature.args[1], _element(context, builder, signature.args[4], x, k)
        multiply_add = _llvm(builder, f"llvm.fma.v{LANES}f32", *[VECTOR.llvm] * 4)
        rows = [_two(builder, _element(context, builder, kind, weight, i), kind.dtype) for i in (at, other)]
        # Each of a token's vectors meets both rows before the next one is loaded: there are sixteen registers.
        for i in range(8):
            number = _read(builder, builder.gep(numbers, [_I32(i * LANES)]), _F32)
            for total, row in zip((i // 2, 4 + i // 2), rows, strict=True):
                more = builder.call(multiply_add, [row[i % 2], number, builder.extract_value(sums, total)])
                sums = builder.insert_value(sums, more, total)
        return sums

    return EIGHT(EIGHT, weight, types.intp, types.intp, x, types.intp), codegen


def _blocks_of_fours(scaled):
    @intrinsic
    def add(typingctx, sums, weight, at, other, x, k, offsets):
        """The same of two blocks of 32 whole numbers; each token's 32 stand one after the other from x[k] on, and so do
        their offsets from x[offsets] on: see `dot_32`.
        """

        def codegen(context, builder, signature, args):
            sums, weight, at, other, x, k, offsets = args
            kind, rows = signature.args[1], []
            numbers, left = (_element(context, builder, signature.args[4], x, i) for i in (k, offsets))
            multiply_add = _llvm(builder, f"llvm.fma.v{LANES}f32", *[VECTOR.llvm] * 4)
            for begin in (at, other):
                block = _element(context, builder, kind, weight, begin)
                scale = _splat_half(builder, block) if scaled else _constant(1.0)
                rows.append((_whole_32(builder, builder.gep(block, [_I32(2 * scaled)]), kind.dtype), scale))
            for i in range(4):
                token = builder.gep(numbers, [_I32(32 * i)]), builder.gep(left, [_I32(2 * LANES * i)])
                for total, (parts, scale) in zip((i, 4 + i), rows, strict=True):
                    products = _dot_32(builder, parts, kind.dtype, *token)
                    more = builder.call(multiply_add, [products, scale, builder.extract_value(sums, total)])
                    sums = builder.insert_value(sums, more, total)
            return sums

        return EIGHT(EIGHT, weight, *[types.intp] * 2, x, *[types.intp] * 2), codegen

    return add


# Of blocks that have each a float16 scale in front, and of those that have none.
add_scaled_blocks, add_blocks = _blocks_of_fours(True), _blocks_of_fours(False)


@intrinsic
def store_sums(typingctx, out, index, vectors):
    """out[index : index + 8] = the sums of the lanes of eight vectors, float32."""

    def codegen(context, builder, signature, args):
        def paired(x, y, *places):
            some, others = (ir.Constant(ir.VectorType(_I32, 8), lanes) for lanes in places)
            return builder.fadd(builder.shuffle_vector(x, y, some), builder.shuffle_vector(x, y, others))

        rows = [builder.extract_value(args[2], i) for i in range(8)]
        if LANES == 16:
            rows = [paired(row, row, [*range(8)], [*range(8, 16)]) for row in rows]
        for places in (NEIGHBOURS, NEIGHBOURS, HALVES):
            rows = [paired(x, y, *places) for x, y in zip(rows[::2], rows[1::2], strict=True)]
        _write(context, builder, signature.args[0], args[0], args[1], rows[0])
        return context.get_dummy_value()

    return types.void(out, types.intp, EIGHT), codegen


# Which of the lanes of two vectors are added to which: within each four, as processors shuffle; at last the halves.
NEIGHBOURS = [0, 2, 8, 10, 4, 6, 12, 14], [1, 3, 9, 11, 5, 7, 13, 15]
HALVES = [0, 1, 2, 3, 8, 9, 10, 11], [4, 5, 6, 7, 12, 13, 14, 15]


@intrinsic
def root(typingctx, x):
    """The square root of each lane."""

    def codegen(context, builder, signature, args):
        return builder.call(_llvm(builder, f"llvm.sqrt.v{LANES}f32", VECTOR.llvm, VECTOR.llvm), args)

    return VECTOR(VECTOR), codegen


@intrinsic
def round_lanes(typingctx, x):
    """Each lane to the nearest whole number, ties to even."""

    def codegen(context, builder, signature, args):
        return builder.call(_llvm(builder, f"llvm.rint.v{LANES}f32", VECTOR.llvm, VECTOR.llvm), args)

    return VECTOR(VECTOR), codegen


@intrinsic
def _power_of_two(typingctx, n):
    """2ⁿ for whole n in -126 … 127: n goes where a float32 keeps its exponent."""

    def codegen(context, builder, signature, args):
        whole = builder.fptosi(args[0], ir.VectorType(_I32, LANES))
        bits = builder.shl(builder.add(whole, _constant(127, _I32)), _constant(23, _I32))
        return builder.bitcast(bits, VECTOR.llvm)

    return VECTOR(VECTOR), codegen


@_inline
def exp(x):
    """eˣ in every lane; relative error below 2e-7 for -87 < x < 88, 0 below (no subnormals), e⁸⁸ above, NaN for NaN.

    eˣ = 2ⁿ · eʳ with n = round(x / ln 2) and |r| ≤ ln 2 / 2, where a Taylor polynomial of degree 7 suffices.
    ln 2 is taken off in two parts, so that r keeps all its digits.
    """
    f = numba.float32
    clamped = minimum(maximum(x, splat(f(-87.0))), splat(f(88.0)))
    n = round_lanes(clamped * splat(f(1.4426950408889634)))
    r = fma(n, splat(f(-0.693359375)), clamped)
    r = fma(n, splat(f(2.12194440e-4)), r)
    p = splat(f(1 / 5040))
    for c in (1 / 720, 1 / 120, 1 / 24, 1 / 6, 1 / 2, 1.0, 1.0):
        p = fma(p, r, splat(f(c)))
    return where_less(x, splat(f(-87.0)), zeros(), p * _power_of_two(n))


@_inline
def expm1(x):
    """eˣ - 1 in every lane for x ≤ 88, relative error below 5e-7 also near 0, where eˣ - 1 has no digits left."""
    f = numba.float32
    p = splat(f(1 / 40320))
    for c in (1 / 5040, 1 / 720, 1 / 120, 1 / 24, 1 / 6, 1 / 2, 1.0):
        p = fma(p, x, splat(f(c)))
    return where_less(splat(f(0.25)), x * x, exp(x) - splat(f(1.0)), x * p)


@_inline
def tanh(x):
    """tanh x = 1 - 2 / (e²ˣ + 1) in every lane; absolute error below 2e-7."""
    f = numba.float32
    return splat(f(1.0)) - splat(f(2.0)) / (exp(x + x) + splat(f(1.0)))


def _prefetch(numbers):
    @intrinsic
    def prefetch_lines(typingctx, array, index):
        def codegen(context, builder, signature, args):
            pointer = builder.bitcast(_element(context, builder, signature.args[0], *args), _I8.as_pointer())
            function = _llvm(builder, "llvm.prefetch.p0", ir.VoidType(), _I8.as_pointer(), _I32, _I32, _I32)
            for line in range(0, numbers * signature.args[0].dtype.bitwidth // 8, 64):
                builder.call(function, [builder.gep(pointer, [_I32(line)]), _I32(0), _I32(2), _I32(1)])
            return context.get_dummy_value()

        return types.void(array, types.intp), codegen

    return prefetch_lines


# Ask for the cache line of array[index], or for those of the 4 · LANES numbers from there on, to come into the
# second-level cache. The index may lie outside.
prefetch, prefetch_four = _prefetch(1), _prefetch(4 * LANES)


@intrinsic
def tile_zeros(typingctx):
    """ROWS x (2 · LANES) zeros."""
    return TILE(), lambda context, builder, signature, args: ir.Constant(TILE.llvm, [_constant(0.0)] * ROWS * 2)


@intrinsic
def tile_load(typingctx, array, start, stride):
    """The tile whose row r is array[start + r · stride : … + 2 · LANES]; float32."""

    def codegen(context, builder, signature, args):
        array, start, stride = args
        row = _element(context, builder, signature.args[0], array, start)
        tile = ir.Constant(TILE.llvm, ir.Undefined)
        for r in range(ROWS):
            for half in range(2):
                value = _read(builder, builder.gep(row, [_I32(half * LANES)]), _F32)
                tile = builder.insert_value(tile, value, r * 2 + half)
            row = builder.gep(row, [stride])
        return tile

    return TILE(array, types.intp, types.intp), codegen


@intrinsic
def tile_add_outer(typingctx, tile, a, start, stride, b, index):
    """tile[r, :] += a[start + r · stride] · b[index : index + 2 · LANES], for r in 0 … ROWS - 1. a, b float32."""

    def codegen(context, builder, signature, args):
        tile, a, start, stride, b, index = args
        multiply_add = _llvm(builder, f"llvm.fma.v{LANES}f32", *[VECTOR.llvm] * 4)
        row = _element(context, builder, signature.args[4], b, index)
        right = [_read(builder, row, _F32), _read(builder, builder.gep(row, [_I32(LANES)]), _F32)]
        left = _element(context, builder, signature.args[1], a, start)
        for r in range(ROWS):
            one = _splat(builder, builder.load(left))
            left = builder.gep(left, [stride])
            for half in range(2):
                before = builder.extract_value(tile, r * 2 + half)
                tile = builder.insert_value(tile, builder.call(multiply_add, [one, right[half], before]), r * 2 + half)
        return tile

    return TILE(TILE, a, types.intp, types.intp, b, types.intp), codegen


@intrinsic
def tile_store(typingctx, tile, out, start, stride):
    """out[start + r · stride : … + 2 · LANES] = tile[r, :], for r in 0 … ROWS - 1. out float32."""

    def codegen(context, builder, signature, args):
        tile, out, start, stride = args
        row = _element(context, builder, signature.args[1], out, start)
        for r in range(ROWS):
            for half in range(2):
                at = builder.gep(row, [_I32(half * LANES)])
                value = builder.extract_value(tile, r * 2 + half)
                builder.store(value, builder.bitcast(at, VECTOR.llvm.as_pointer())).align = 1
            row = builder.gep(row, [stride])
        return context.get_dummy_value()

    return types.void(TILE, out, types.intp, types.intp), codegen


@intrinsic
def whole_tile_zeros(typingctx):
    """ROWS x (2 · LANES) zeros, int32."""
    return WHOLE_TILE(), lambda context, builder, signature, args: ir.Constant(
        WHOLE_TILE.llvm, [_constant(0, _I32)] * ROWS * 2
    )


@intrinsic
def tile_add_pairs(typingctx, tile, a, start, stride, b, index):
    """tile[r, i] += the products of the pairs a[start + r · stride : … + 2] and b[index + 2 i : … + 2], for r in
    0 … ROWS - 1 and i in 0 … 2 · LANES - 1. a, b int16.
    """

    def codegen(context, builder, signature, args):
        tile, a, start, stride, b, index = args
        row = _element(context, builder, signature.args[4], b, index)
        right = [_read(builder, builder.gep(row, [_I32(half * 2 * LANES)]), _I16, 2 * LANES) for half in range(2)]
        left = _element(context, builder, signature.args[1], a, start)
        for r in range(ROWS):
            pair = builder.load(builder.bitcast(left, _I32.as_pointer()))
            pair.align = 4
            pairs = builder.bitcast(_splat(builder, pair), ir.VectorType(_I16, 2 * LANES))
            left = builder.gep(left, [stride])
            for half in range(2):
                before = builder.extract_value(tile, r * 2 + half)
                total = builder.add(before, _products_of_pairs(builder, pairs, right[half]))
                tile = builder.insert_value(tile, total, r * 2 + half)
        return tile

    return WHOLE_TILE(WHOLE_TILE, a, types.intp, types.intp, b, types.intp), codegen


@intrinsic
def tile_add_scaled(typingctx, tile, scales, first, step, out, start, stride):
    """out[start + r · stride : … + 2 · LANES] += tile[r, :] · scales[first + r · step], for r in 0 … ROWS - 1. scales,
    out float32.
    """

    def codegen(context, builder, signature, args):
        tile, scales, first, step, out, start, stride = args
        multiply_add = _llvm(builder, f"llvm.fma.v{LANES}f32", *[VECTOR.llvm] * 4)
        row = _element(context, builder, signature.args[4], out, start)
        scale = _element(context, builder, signature.args[1], scales, first)
        for r in range(ROWS):
            one = _splat(builder, builder.load(scale))
            scale = builder.gep(scale, [step])
            for half in range(2):
                at = builder.gep(row, [_I32(half * LANES)])
                number = builder.sitofp(builder.extract_value(tile, r * 2 + half), VECTOR.llvm)
                value = builder.call(multiply_add, [number, one, _read(builder, at, _F32)])
                builder.store(value, builder.bitcast(at, VECTOR.llvm.as_pointer())).align = 1
            row = builder.gep(row, [stride])
        return context.get_dummy_value()

    return types.void(WHOLE_TILE, scales, types.intp, types.intp, out, types.intp, types.intp), codegen
