"""Arithmetic, functions and sums of vectors of LANES float32 numbers."""

from __future__ import annotations

import operator
from collections.abc import Callable
from typing import Any

import numba
from numba.extending import overload

from ..compiler import INNER, Inner
from .cpu import LANES
from .operation import F32, VECTOR, Float, Vector, call, constant, multiply_add, operation, select


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
