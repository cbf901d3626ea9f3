"""Soft-capping: a smooth bound on attention scores and logits (Gemma 2 §2, "Logit soft-capping").

    y = cap · tanh(x / cap)          -cap < y < cap, and y ≈ x while |x| is small

Gemma 2 caps the scaled attention scores at 50 before the mask, and the logits at 30; RecurrentGemma caps only the
logits. Before the mask: a masked -∞ capped afterwards would come back as -50.
"""

from __future__ import annotations

import numpy as np

from ..arrays import F32
from ..definition import definition
from ..kernels.compiler import jit, jit_inner, workers_for
from ..kernels.parallel import chunk, parallel_for
from ..kernels.scores import soft_cap_lanes
from ..kernels.simd import LANES, load, store


@definition
def soft_cap(x: F32, cap: float) -> F32:
    """y = cap · tanh(x / cap)      [Gemma 2 §2]

    x [..., V] float32 → [..., V] float32

    >>> soft_cap(np.array([[0.0, 1.0, 1000.0]], np.float32), 30.0).round(4)
    array([[ 0.    ,  0.9996, 30.    ]], dtype=float32)
    """
    return np.float32(cap) * np.tanh(x / np.float32(cap))


@jit_inner
def _row(x, cap, y):
    cap = np.float32(cap)
    whole = x.size // LANES * LANES
    for v in range(0, whole, LANES):
        store(y, v, soft_cap_lanes(load(x, v), cap))
    for v in range(whole, x.size):
        y[v] = cap * np.tanh(x[v] / cap)


@jit_inner
def _some_rows(worker, workers, x, cap, y):
    for t in chunk(worker, workers, len(x)):
        _row(x[t], cap, y[t])


@jit
def _rows(workers, x, cap, y):
    parallel_for(_some_rows, workers, (x, cap, y))


@soft_cap.kernel
def _soft_cap(x, cap):
    rows = np.ascontiguousarray(x).reshape(-1, x.shape[-1])
    y = np.empty_like(rows)
    _rows(workers_for(rows), rows, cap, y)
    return y.reshape(x.shape)
