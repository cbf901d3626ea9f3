"""Operations on vectors of LANES float32 numbers: load and store in each stored form, arithmetic, functions, sums."""

from __future__ import annotations

import operator
from collections.abc import Callable
from typing import Any

import numba
from llvmlite import ir
from numba import types
from numba.extending import overload

from ..compiler import INNER, Inner
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
    multiply_add,
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
def load_float(array: Array, index: Index) -> Float:
    """The float32 in bytes index … index + 3 of a uint8 array."""
    return array[index].load(F32, 0)


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


# ---- arithmetic


@operation
def splat(value: Float) -> Vector:
    """A number in every lane."""
    return value.splat()


@operation
def zeros() -> Vector:
    """Zero in every lane."""
    return constant(0.0)


@operation
def fma(x: Vector, y: Vector, z: Vector) -> Vector:
    """x · y + z, rounded once."""
    return multiply_add(x, y, z)


@operation
def _add(x: Vector, y: Vector) -> Vector:
    return x + y


@operation
def _subtract(x: Vector, y: Vector) -> Vector:
    return x - y


@operation
def _multiply(x: Vector, y: Vector) -> Vector:
    return x * y


@operation
def _divide(x: Vector, y: Vector) -> Vector:
    return x / y


def _operator(symbol: Callable, apply: Any) -> None:
    """Tell Numba what `x symbol y` is for two vectors."""

    @overload(symbol, jit_options=INNER | {"fastmath": False})
    def of_vectors(x, y):
        return (lambda x, y: apply(x, y)) if x is VECTOR and y is VECTOR else None


_operator(operator.add, _add)
_operator(operator.sub, _subtract)
_operator(operator.mul, _multiply)
_operator(operator.truediv, _divide)


@operation
def where_less(x: Vector, y: Vector, value: Vector, otherwise: Vector) -> Vector:
    """`value` in lanes where x < y, else `otherwise`, also where one of them is NaN."""
    return select(x < y, value, otherwise)


@operation
def root(x: Vector) -> Vector:
    """The square root of each lane."""
    return call(f"llvm.sqrt.v{LANES}f32", VECTOR.llvm, x)


@operation
def round_lanes(x: Vector) -> Vector:
    """Each lane rounded to the nearest integer, ties to even."""
    return call(f"llvm.rint.v{LANES}f32", VECTOR.llvm, x)


@operation
def sum_lanes(x: Vector) -> Float:
    """The sum of all lanes."""
    return call(f"llvm.vector.reduce.fadd.v{LANES}f32", F32, constant(0.0, F32, 0), x, fastmath=("reassoc",))


@operation
def max_lanes(x: Vector) -> Float:
    """The largest lane."""
    return call(f"llvm.vector.reduce.fmax.v{LANES}f32", F32, x)


@operation
def _power_of_two(n: Vector) -> Vector:
    """2ⁿ for integers n in -126 … 127: n goes where a float32 keeps its exponent."""
    return ((n.to_int() + 127) << 23).bits(F32)


# ---- functions made of these. They take no part in fast-math: order and rounding are as written.


def _exact(function: Callable) -> Any:
    """Decorator: a function whose arithmetic is not reordered."""
    return Inner(function, INNER | {"fastmath": False})


@_exact
def maximum(x, y):
    """The larger of each lane; NaN where x is."""
    return where_less(x, y, y, x)


@_exact
def minimum(x, y):
    """The smaller of each lane; NaN where x is."""
    return where_less(y, x, y, x)


@_exact
def magnitude(x):
    """The absolute value of each lane."""
    return maximum(x, zeros() - x)


@_exact
def exp(x):
    """eˣ in every lane; relative error below 2e-7 for -87 < x < 88, 0 below (no subnormals), e⁸⁸ above, NaN for NaN.

    eˣ = 2ⁿ · eʳ with n = round(x / ln 2) and |r| ≤ ln 2 / 2, where a Taylor polynomial of degree 7 suffices.
    ln 2 is subtracted in two parts, so that r keeps all its digits.
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


@_exact
def expm1(x):
    """eˣ - 1 in every lane for x ≤ 88, relative error below 5e-7 also near 0, where eˣ - 1 has no digits left."""
    f = numba.float32
    p = splat(f(1 / 40320))
    for c in (1 / 5040, 1 / 720, 1 / 120, 1 / 24, 1 / 6, 1 / 2, 1.0):
        p = fma(p, x, splat(f(c)))
    return where_less(splat(f(0.25)), x * x, exp(x) - splat(f(1.0)), x * p)


@_exact
def tanh(x):
    """tanh x = 1 - 2 / (e²ˣ + 1) in every lane; absolute error below 2e-7."""
    f = numba.float32
    return splat(f(1.0)) - splat(f(2.0)) / (exp(x + x) + splat(f(1.0)))
