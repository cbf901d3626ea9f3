"""GeGLU: a feed-forward layer in which one branch gates the other (Shazeer 2020, eq. 6).

    GeGLU(x) = W_down ( gelu(W_gate x) · W_up x )
    gelu(z)  = z / 2 · (1 + tanh(√(2/π) · (z + 0.044715 z³)))

All Gemma models and SigLIP use this tanh form of GELU, also where an old config.json says "gelu".
The reports print the sum of both branches' widths; F here is the width of one branch.
"""

from __future__ import annotations

import numpy as np

from ..arrays import F32
from ..definition import definition, require
from ..kernels.parallel import chunk, parallel, workers_for
from ..kernels.rows import CUBIC, SLOPE, gated_gelu_gradient_row, gated_gelu_row, gelu_lanes, vectors_of, whole_vectors
from ..kernels.simd.memory import load, store


@definition
def gelu(z: F32) -> F32:
    """z / 2 · (1 + tanh(√(2/π) · (z + 0.044715 z³)))      [Hendrycks & Gimpel 2016 §2]

    z [P, F] float32 → [P, F] float32
    """
    return z * np.float32(0.5) * (1 + np.tanh(SLOPE * (z + CUBIC * z * z * z)))


@gelu.gradient
def gelu_gradient(dy: F32, z: F32) -> F32:
    """dz = dy · ((1 + τ) / 2 + z / 2 · (1 - τ²) · √(2/π) · (1 + 3 · 0.044715 z²)), τ the tanh in gelu

    dy, z [P, F] float32 → [P, F] float32
    """
    t = np.tanh(SLOPE * (z + CUBIC * z * z * z))
    return dy * np.float32(0.5) * (1 + t + z * (1 - t * t) * SLOPE * (1 + 3 * CUBIC * z * z))


@parallel
def _gelu_vectors(worker, workers, z, y):
    for f in vectors_of(worker, workers, z.size):
        store(y, f, gelu_lanes(load(z, f)))


@gelu.kernel
def _gelu(z):
    require(z.ndim == 2, "gelu", z)
    (numbers,) = whole_vectors(z.reshape(-1))
    y = np.empty_like(numbers)
    _gelu_vectors(workers_for(z), numbers, y)
    return y[: z.size].reshape(z.shape)


@definition
def gated_gelu(gate: F32, up: F32) -> F32:
    """gelu(gate) · up      [Shazeer 2020 eq. 6; Gemma 1 §2]

    gate [T, F] float32, up [T, F] float32 → [T, F] float32
    """
    return gelu(gate) * up


@gated_gelu.gradient
def gated_gelu_gradient(dy: F32, gate: F32, up: F32) -> tuple[F32, F32]:
    """dgate = dy · up · gelu'(gate) and dup = dy · gelu(gate): dy, gate, up [T, F] float32 → two of [T, F] float32"""
    return gelu_gradient(dy * up, gate), dy * gelu(gate)


@parallel
def _gated_rows(worker, workers, gate, up, y):
    for t in chunk(worker, workers, len(gate)):
        gated_gelu_row(gate[t], up[t], y[t])


@gated_gelu.kernel
def _gated_gelu(gate, up):
    require(gate.ndim == 2 and gate.shape == up.shape, "gated_gelu", gate, up)
    y = np.empty_like(gate)
    _gated_rows(workers_for(gate), gate, up, y)
    return y


@parallel
def _gradient_rows(worker, workers, dy, gate, up, dgate, dup):
    for t in chunk(worker, workers, len(gate)):
        gated_gelu_gradient_row(dy[t], gate[t], up[t], dgate[t], dup[t])


@gated_gelu_gradient.kernel
def _gated_gelu_gradient(dy, gate, up):
    fits = gate.ndim == 2 and gate.shape == up.shape == dy.shape
    require(fits, "gated_gelu_gradient", dy, gate, up)
    dgate, dup = np.empty_like(gate), np.empty_like(gate)
    _gradient_rows(workers_for(gate), dy, gate, up, dgate, dup)
    return dgate, dup
