"""Soft-capping: a smooth bound on attention scores and logits (Gemma 2 §2, "Logit soft-capping").

    y = cap · tanh(x / cap)          -cap < y < cap, and y ≈ x while |x| is small

Gemma 2 caps the scaled attention scores at 50 before the mask, and the logits at 30; RecurrentGemma caps only the
logits. The cap comes before the mask: after it, a masked -∞ would become -50.
"""

from __future__ import annotations

import numpy as np
from numba import float32

from ..arrays import F32
from ..definition import definition, require
from ..kernels.parallel import parallel, workers_for
from ..kernels.rows import vectors_of, whole_vectors
from ..kernels.scores import soft_cap_lanes
from ..kernels.simd.memory import load, store
from ..kernels.simd.vectors import splat, tanh


@definition
def soft_cap(x: F32, cap: float) -> F32:
    """y = cap · tanh(x / cap)      [Gemma 2 §2]

    x [..., V] float32 → [..., V] float32

    >>> soft_cap(np.array([[0.0, 1.0, 1000.0]], np.float32), 30.0).round(4)
    array([[ 0.    ,  0.9996, 30.    ]], dtype=float32)
    """
    return np.float32(cap) * np.tanh(x / np.float32(cap))


@soft_cap.gradient
def soft_cap_gradient(dy: F32, x: F32, cap: float) -> F32:
    """dx = dy · (1 - (y / cap)²): dy, x [..., V] float32 → [..., V] float32"""
    return dy * (1 - (soft_cap(x, cap) / np.float32(cap)) ** 2)


@parallel
def _some_slopes(worker, workers, dy, x, cap, dx):
    for v in vectors_of(worker, workers, x.size):
        part = tanh(load(x, v) * splat(float32(1) / cap))
        store(dx, v, load(dy, v) * (splat(float32(1)) - part * part))


@soft_cap_gradient.kernel
def _soft_cap_gradient(dy, x, cap):
    require(dy.shape == x.shape, "soft_cap_gradient", dy, x)
    slopes, numbers = whole_vectors(dy.reshape(-1), x.reshape(-1))
    dx = np.empty_like(numbers)
    _some_slopes(workers_for(x), slopes, numbers, np.float32(cap), dx)
    return dx[: x.size].reshape(x.shape)


@parallel
def _some_vectors(worker, workers, x, cap, y):
    for v in vectors_of(worker, workers, x.size):
        store(y, v, soft_cap_lanes(load(x, v), cap))


@soft_cap.kernel
def _soft_cap(x, cap):
    (numbers,) = whole_vectors(x.reshape(-1))
    y = np.empty_like(numbers)
    _some_vectors(workers_for(x), numbers, np.float32(cap), y)
    return y[: x.size].reshape(x.shape)
