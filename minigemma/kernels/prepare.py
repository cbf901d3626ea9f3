"""x in the form that a layout's rows multiply, for 1 … 16 tokens.

    float32, bf16   float32                                                     Numbers
    int8            16-bit integers, a scale per token                          Numbers
    int4            8-bit integers, a scale per block of 32 of a token          Bytes

An instruction multiplies twice as many integers as floats, and sums of integers are exact. Rounding to 16 bits changes
a number by at most 2⁻¹⁶ of the token's largest x: in the worst case, a single nonzero x, y is off by √D / 113,000 of
its usual size, for D = 2,304 a tenth of the error of bf16. Rounding to 8 bits changes less than four bits did to the
weights (docs/accuracy.md). Σ x of a block, as rounded, is what its minimum multiplies.

Several tokens are stored in fours, so that each load of two rows meets four tokens and eight sums stay in registers:

    [T/4] fours of tokens, in each the blocks of 2 · LANES columns (32 for integers), in each the four tokens
"""

from typing import Any, NamedTuple

import numpy as np
from numba import float32
from numpy.typing import NDArray

from ..arrays import F32
from ..layouts.int4 import BLOCK
from .amx import on_cache_line
from .compiler import by_type, jit_inner
from .simd.cpu import LANES
from .simd.memory import load, store, store_whole, to_even_odd
from .simd.vectors import magnitude, max_lanes, maximum, round_lanes, splat, sum_lanes, zeros
from .weights import BF16Rows, F32Rows, Int4Rows, Int8Rows, factor_of_minima


class Numbers(NamedTuple):
    """x [T, D] as float32 or int16, token by token or in fours; x = numbers · scale of the token."""

    numbers: NDArray[Any]
    scales: F32  # [T]


class Bytes(NamedTuple):
    """x [T, D] as int8; x = whole · scale of the block of 32. `scales`: of each block the scale and Σ x, times -8 for
    weights without minima.
    """

    whole: NDArray[np.int8]
    scales: F32


@jit_inner
def round_whole(x, k, count, top, whole, to, step):
    """Rounds x[k : k + count] ≈ whole · scale to integers from -top to top; returns the scale and Σ whole.

    x float32, `count` a multiple of 32; block i of 32 integers begins at whole[to + i · step].
    """
    highest, total = zeros(), zeros()
    for i in range(k, k + count, LANES):
        highest = maximum(highest, magnitude(load(x, i)))
    largest = max_lanes(highest)
    up = splat(float32(top) / largest if largest > 0 else float32(0))
    for block in range(count // BLOCK):
        for j in range(0, BLOCK, LANES):
            q = round_lanes(load(x, k + block * BLOCK + j) * up)
            store_whole(whole, to + block * step + j, q)
            total = total + q
    return largest / float32(top), sum_lanes(total)


@jit_inner
def round_blocks(x, first, last, whole, scales, factor):
    """Rounds blocks of 32 first … last - 1 of x to 8 bits, for int4; scales[2 b :] = the scale and factor · Σ x."""
    for block in range(first, last):
        k = block * BLOCK
        scale, total = round_whole(x, k, BLOCK, 127, whole, k, BLOCK)
        scales[2 * block], scales[2 * block + 1] = scale, float32(factor) * total * scale


@jit_inner
def _in_numbers(x, weight):
    (T, D), flat, scales = x.shape, x.reshape(-1), np.empty(len(x), np.float32)
    for t in range(T):
        scales[t] = 1
    if T == 1:
        return Numbers(flat, scales)
    size = (T + 3) // 4 * 4 * D
    fours = on_cache_line(np.empty(size + 16, np.float32), size)
    for t in range((T + 3) // 4 * 4):
        begin, row, lane = t // 4 * 4 * D, min(t, T - 1) * D, t % 4
        for d in range(0, D, 2 * LANES):
            a, b = to_even_odd(weight.data, load(flat, row + d), load(flat, row + d + LANES))
            store(fours, begin + 4 * d + lane * 2 * LANES, a)
            store(fours, begin + 4 * d + lane * 2 * LANES + LANES, b)
    return Numbers(fours, scales)


@jit_inner
def _in_16_bits(x, weight):
    (T, D), flat, scales = x.shape, x.reshape(-1), np.empty(len(x), np.float32)
    side = 1 if T == 1 else 4
    size = (T + side - 1) // side * side * D
    whole = on_cache_line(np.empty(size + 32, np.int16), size)
    for t in range((T + side - 1) // side * side):
        token, to = min(t, T - 1), t // side * side * D + t % side * BLOCK
        scales[token], _ = round_whole(flat, token * D, D, 32767, whole, to, BLOCK * side)
    return Numbers(whole, scales)


@jit_inner
def _in_8_bits(x, weight):
    T, D = x.shape
    room, blocks = D if T == 1 else (T + 3) // 4 * 4 * D, T * D // BLOCK
    whole, scales = np.zeros(room, np.int8), np.zeros(room // BLOCK * 2, np.float32)
    round_blocks(x.reshape(-1), 0, blocks, whole, scales, factor_of_minima(weight))
    return Bytes(whole, scales)


prepare = by_type(
    "prepare", {F32Rows: _in_numbers, BF16Rows: _in_numbers, Int8Rows: _in_16_bits, Int4Rows: _in_8_bits}, on="weight"
)
