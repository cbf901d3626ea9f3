"""Rows of formulas in vectors, shared by the formulas' own kernels and the fused kernels.

The equations are on the pages formulas/rmsnorm.py, rope.py, conv1d.py and geglu.py. Remainders that do not fill a
vector run as scalars.
"""

import numpy as np
from numba import float32

from ..arrays import F32
from .compiler import jit_inner
from .parallel import chunk
from .simd.cpu import LANES
from .simd.memory import load, store
from .simd.vectors import fma, splat, sum_lanes, tanh, zeros

SLOPE = np.float32(np.sqrt(2 / np.pi))
CUBIC = np.float32(0.044715)


def whole_vectors(*arrays: F32) -> tuple[F32, ...]:
    """The arrays [..., E], with zeros appended until E is a multiple of LANES, as in every released model."""
    missing = -arrays[0].shape[-1] % LANES
    return tuple(np.pad(x, [(0, 0)] * (x.ndim - 1) + [(0, missing)]) for x in arrays) if missing else arrays


@jit_inner
def vectors_of(worker, workers, size):
    """Where this worker's vectors begin, of an axis of whole vectors."""
    vectors = chunk(worker, workers, size // LANES)
    return range(vectors.start * LANES, vectors.stop * LANES, LANES)


@jit_inner
def norm_row(x, weight, eps, y):
    """RMSNorm of one row: x, weight and y [D]; y may be x itself."""
    whole, lanes, squares = x.size // LANES * LANES, zeros(), np.float32(0)
    for d in range(0, whole, LANES):
        lanes = fma(load(x, d), load(x, d), lanes)
    for d in range(whole, x.size):
        squares += x[d] * x[d]
    squares += sum_lanes(lanes)
    scale = np.float32(1) / np.sqrt(squares / np.float32(x.size) + np.float32(eps))
    for d in range(0, whole, LANES):
        scaled = load(x, d) * splat(scale)
        store(y, d, fma(scaled, load(weight, d), scaled))
    for d in range(whole, x.size):
        y[d] = x[d] * scale * (np.float32(1) + weight[d])


@jit_inner
def norm_gradient_row(dy, x, weight, eps, dx, dweight):
    """Gradient of RMSNorm of one row: dx, and dweight with this row's share added; all [D]."""
    D, whole = x.size, x.size // LANES * LANES
    squares, pulls, square, pull = zeros(), zeros(), float32(0), float32(0)
    for d in range(0, whole, LANES):
        row, scaled = load(x, d), fma(load(dy, d), load(weight, d), load(dy, d))
        squares, pulls = fma(row, row, squares), fma(scaled, row, pulls)
    for d in range(whole, D):
        square, pull = square + x[d] * x[d], pull + dy[d] * (float32(1) + weight[d]) * x[d]
    scale = float32(1) / np.sqrt((square + sum_lanes(squares)) / float32(D) + float32(eps))
    pull = (pull + sum_lanes(pulls)) / float32(D) * scale * scale * scale
    for d in range(0, whole, LANES):
        row, scaled = load(x, d), fma(load(dy, d), load(weight, d), load(dy, d))
        store(dweight, d, fma(load(dy, d) * row, splat(scale), load(dweight, d)))
        store(dx, d, scaled * splat(scale) - row * splat(pull))
    for d in range(whole, D):
        dweight[d] += dy[d] * x[d] * scale
        dx[d] = dy[d] * (float32(1) + weight[d]) * scale - x[d] * pull


@jit_inner
def rotate(x, cos, sin, y):
    """RoPE of one token: x and y [N, H], cosine and sine of each pair's angle [R/2]; y may be x itself."""
    half, rotated = cos.size, 2 * cos.size
    for n in range(len(x)):
        for j in range(half):
            u, v = x[n, j], x[n, j + half]
            y[n, j] = u * cos[j] - v * sin[j]
            y[n, j + half] = v * cos[j] + u * sin[j]
        for j in range(rotated, x.shape[1]):
            y[n, j] = x[n, j]


@jit_inner
def conv_row(seen, t, weight, bias, y):
    """Causal convolution of one token: rows t … t + C - 1 of seen [B + T, E] meet weight [C, E]; bias and y [E]."""
    for e in range(y.size):
        y[e] = bias[e]
    for c in range(len(weight)):
        for e in range(y.size):
            y[e] += weight[c, e] * seen[t + c, e]


@jit_inner
def gelu_lanes(z):
    """GELU of one vector."""
    bent = fma(splat(CUBIC) * z * z, z, z)
    return z * splat(float32(0.5)) * (splat(float32(1)) + tanh(splat(SLOPE) * bent))


@jit_inner
def gelu_one(z):
    """GELU of one number."""
    return z * float32(0.5) * (float32(1) + np.tanh(SLOPE * (z + CUBIC * z * z * z)))


@jit_inner
def gated_gelu_row(gate, up, y):
    """gelu(gate) · up of one row, [F] each; y may be one of the others."""
    whole = gate.size // LANES * LANES
    for f in range(0, whole, LANES):
        store(y, f, gelu_lanes(load(gate, f)) * load(up, f))
    for f in range(whole, gate.size):
        y[f] = gelu_one(gate[f]) * up[f]


@jit_inner
def gelu_and_slope_lanes(z):
    """GELU of one vector, and its derivative."""
    one, half = splat(float32(1)), splat(float32(0.5))
    t = tanh(splat(SLOPE) * fma(splat(CUBIC) * z * z, z, z))
    bend = fma(splat(float32(3) * CUBIC) * z, z, one) * splat(SLOPE)
    return z * half * (one + t), half * (one + t + z * (one - t * t) * bend)


@jit_inner
def gelu_slope_one(z):
    """The derivative of GELU of one number."""
    t = np.tanh(SLOPE * (z + CUBIC * z * z * z))
    bend = (float32(1) + float32(3) * CUBIC * z * z) * SLOPE
    return float32(0.5) * (float32(1) + t + z * (float32(1) - t * t) * bend)


@jit_inner
def gated_gelu_gradient_row(dy, gate, up, dgate, dup):
    """Gradient of gelu(gate) · up of one row, [F] each."""
    whole = gate.size // LANES * LANES
    for f in range(0, whole, LANES):
        gelu, slope = gelu_and_slope_lanes(load(gate, f))
        store(dgate, f, load(dy, f) * load(up, f) * slope)
        store(dup, f, load(dy, f) * gelu)
    for f in range(whole, gate.size):
        dgate[f] = dy[f] * up[f] * gelu_slope_one(gate[f])
        dup[f] = dy[f] * gelu_one(gate[f])
