"""GeGLU: a feed-forward layer whose one half opens and shuts the other (Shazeer 2020, eq. 6).

    GeGLU(x) = W_down ( gelu(W_gate x) · W_up x )
    gelu(z)  = z / 2 · (1 + tanh(√(2/π) · (z + 0.044715 z³)))

All Gemma models and SigLIP use this tanh form of GELU, also where an old config.json says plain "gelu".
The reports print the feed-forward width as the sum of both branches; F here is that of one.
"""

from __future__ import annotations

import numpy as np

from ..arrays import F32
from ..definition import definition, require
from ..kernels.compiler import jit, jit_inner, workers_for
from ..kernels.parallel import chunk, parallel_for
from ..kernels.rows import CUBIC, SLOPE, gated_gelu_row, gelu_lanes, gelu_one
from ..kernels.simd import LANES, load, store


@definition
def gelu(z: F32) -> F32:
    """z / 2 · (1 + tanh(√(2/π) · (z + 0.044715 z³)))      [Hendrycks & Gimpel 2016 §2]

    z [P, F] float32 → [P, F] float32
    """
    return z * np.float32(0.5) * (1 + np.tanh(SLOPE * (z + CUBIC * z * z * z)))


@definition
def gated_gelu(gate: F32, up: F32) -> F32:
    """gelu(gate) · up      [Shazeer 2020 eq. 6; Gemma 1 §2]

    gate [T, F] float32, up [T, F] float32 → [T, F] float32
    """
    return gelu(gate) * up


@jit_inner
def _some_gated(worker, workers, gate, up, y):
    for t in chunk(worker, workers, len(gate)):
        gated_gelu_row(gate[t], up[t], y[t])


@jit
def gated_rows(workers, gate, up, y):
    """All rows, [T, F] each."""
    parallel_for(_some_gated, workers, (gate, up, y))


@gated_gelu.kernel
def _gated_gelu(gate, up):
    require(gate.ndim == 2 and gate.shape == up.shape, "gated_gelu", gate, up)
    y = np.empty_like(gate)
    gated_rows(workers_for(gate), gate, up, y)
    return y


@jit_inner
def _gelu_row(z, y):
    whole = z.size // LANES * LANES
    for f in range(0, whole, LANES):
        store(y, f, gelu_lanes(load(z, f)))
    for f in range(whole, z.size):
        y[f] = gelu_one(z[f])


@jit_inner
def _some_rows(worker, workers, z, y):
    for p in chunk(worker, workers, len(z)):
        _gelu_row(z[p], y[p])


@jit
def _rows(workers, z, y):
    parallel_for(_some_rows, workers, (z, y))


@gelu.kernel
def _gelu(z):
    require(z.ndim == 2, "gelu", z)
    y = np.empty_like(z)
    _rows(workers_for(z), z, y)
    return y
