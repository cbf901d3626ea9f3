"""Loads and stores of vectors of LANES numbers, in every stored form, and prefetches."""

from __future__ import annotations

from llvmlite import ir
from numba import types

from .cpu import AHEAD, F16C, LANES
from .operation import (
    F16,
    F32,
    I8,
    I16,
    I32,
    VECTOR,
    VOID,
    Array,
    Float,
    Index,
    Lanes,
    Pointer,
    TwoVectors,
    Vector,
    Word,
    call,
    constant,
    operation,
    select,
)

# ---- load


def widened(at: Pointer) -> Lanes:
    """LANES float32, bf16 (uint16), int8 or uint8 numbers from an address on, as float32."""
    if at.dtype == types.float32:
        return at.load(F32)
    if at.dtype == types.uint16:  # bf16 is the upper half of a float32
        return (at.load(I16).zero_extended(I32) << 16).bits(F32)
    number = at.load(I8)
    return (number.sign_extended(I32) if at.dtype == types.int8 else number.zero_extended(I32)).to_float()


def even_odd(at: Pointer) -> list[Lanes]:
    """What `load_even_odd` makes of the 2 · LANES numbers from an address on."""
    if at.dtype == types.float32:
        return [at.load(F32), (at + LANES).load(F32)]
    pairs = at.load(I32)
    return [(pairs << 16).bits(F32), (pairs & -65536).bits(F32)]


def half_to_float(at: Pointer, lanes: int = 0) -> Lanes:
    """A float16 at an address, or `lanes` of them, as float32. Finite numbers only.

    Without an instruction for it: at a float32's place the exponent is too small by 127 - 15 = 112, which a
    multiplication corrects, of subnormals, too.
    """
    if F16C:
        return at.load(F16, lanes).to_float()
    half = at.load(I16, lanes).zero_extended(I32)
    size = ((half & 0x7FFF) << 13).bits(F32) * 2.0**112
    return (size.bits(I32) | (half & 0x8000) << 16).bits(F32)


def splat_of_half(at: Pointer) -> Lanes:
    """A float16 in every lane: spread, then converted, which is an instruction less than the other way around."""
    return at.load(F16, 0).splat().to_float() if F16C else half_to_float(at).splat()


@operation
def load(array: Array, index: Index) -> Vector:
    """LANES numbers from array[index] on, widened to float32. float32, uint16 (bf16), int8 or uint8, one axis."""
    return widened(array[index])


@operation
def load_even_odd(array: Array, index: Index) -> TwoVectors:
    """The 2 · LANES numbers from array[index] on as two vectors, in the order that takes the fewest instructions: of
    float32 the first half and the second; of bf16 those at even and at odd places, where a shift or a mask suffices.
    """
    return even_odd(array[index])


@operation
def to_even_odd(array: Array, a: Vector, b: Vector) -> TwoVectors:
    """2 · LANES consecutive numbers, reordered as `load_even_odd` returns those of `array`."""
    if array.dtype == types.float32:
        return [a, b]
    return [a.shuffle(range(odd, 2 * LANES, 2), b) for odd in (0, 1)]


@operation
def from_even_odd(array: Array, a: Vector, b: Vector) -> TwoVectors:
    """The inverse of `to_even_odd`."""
    if array.dtype == types.float32:
        return [a, b]
    order = [odd * LANES + i for i in range(LANES) for odd in (0, 1)]
    return [a.shuffle(half, b) for half in (order[:LANES], order[LANES:])]


@operation
def load_one(array: Array, index: Index) -> Float:
    """array[index] widened to float32: a float32 or a uint16 (bf16)."""
    value = array[index].load_element()
    return value if array.dtype == types.float32 else (value.zero_extended(I32) << 16).bits(F32)


@operation
def load_half(array: Array, index: Index) -> Float:
    """The float16 in bytes index and index + 1 of a uint8 array, as float32. Finite numbers only."""
    return half_to_float(array[index])


@operation
def splat_half(array: Array, index: Index) -> Vector:
    """The same number in every lane."""
    return splat_of_half(array[index])


@operation
def prefetch(array: Array, index: Index) -> None:
    """Fetches the cache line of array[index] into the second-level cache. The index may lie outside of the array."""
    fetch(array[index], 1)


@operation
def prefetch_ahead(array: Array, index: Index) -> None:
    """The same of the cache line AHEAD bytes behind array[index]."""
    fetch(array[index].bytes() + AHEAD, 1)


@operation
def prefetch_four(array: Array, index: Index) -> None:
    """The same of the cache lines of the 4 · LANES numbers from array[index] on."""
    fetch(array[index], 4 * LANES)


def fetch(at: Pointer, count: int) -> None:
    """Prefetch the cache lines of `count` numbers."""
    for line in range(0, count * at.dtype.bitwidth // 8, 64):
        read, second_level, data = constant(0, I32, 0), constant(2, I32, 0), constant(1, I32, 0)
        call("llvm.prefetch.p0", VOID, at.bytes() + line, read, second_level, data)


# ---- store


def round_off(bits: Lanes, count: int) -> Lanes:
    """Integers rounded to nearest, ties to even, in all but the lowest `count` bits, which are left over."""
    return bits + ((1 << (count - 1)) - 1) + (bits >> count & 1)


@operation
def store(array: Array, index: Index, value: Vector) -> None:
    """array[index : index + LANES] = value, float32."""
    array[index].store(value)


@operation
def store_whole(array: Array, index: Index, value: Vector) -> None:
    """array[index : index + LANES] = value, rounded to the nearest integer, ties to even, of an array of int16 or
    int8: |value| ≤ 32,767 or 127.
    """
    nearest = call(f"llvm.rint.v{LANES}f32", VECTOR.llvm, value)
    array[index].store(nearest.to_int().truncated(ir.IntType(array.dtype.bitwidth)))


@operation
def store_half(array: Array, index: Index, value: Float) -> None:
    """Bytes index and index + 1 of a uint8 array = a float32 rounded to float16, to nearest even; |value| < 65,520.

    The inverse of `load_half`: 112 is taken off the exponent, and 13 bits are rounded off. A number below 2⁻¹⁴ becomes
    a subnormal: in the sum with 0.5, which is rounded to multiples of 2⁻²⁴, as those are.
    """
    bits = value.bits(I32)
    size = bits & 0x7FFFFFFF
    normal = round_off(size - (112 << 23), 13) >> 13
    subnormal = (size.bits(F32) + 0.5).bits(I32) - 0x3F000000
    half = select(size < 113 << 23, subnormal, normal)
    array[index].store((half | bits >> 16 & 0x8000).truncated(I16))


@operation
def bf16_bits(value: Float) -> Word:
    """The upper 16 bits of a float32, rounded to nearest, ties to even; NaN stays NaN."""
    bits = value.bits(I32)
    is_nan = Lanes(Lanes.builder.fcmp_unordered("uno", value.value, value.value))
    return (select(is_nan, bits | 0x400000, round_off(bits, 16)) >> 16).truncated(I16)
