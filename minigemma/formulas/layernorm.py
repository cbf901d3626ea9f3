"""LayerNorm: subtracts each vector's mean and divides by its standard deviation (Ba et al. 2016, §3).

    y = (x - mean(x)) / √(var(x) + ε) · w + b

SigLIP's norm. The gain is w, not 1 + w as in Gemma's RMSNorm.
"""

from __future__ import annotations

import numpy as np

from ..arrays import F32
from ..definition import definition, require
from ..kernels.compiler import jit_inner
from ..kernels.parallel import chunk, parallel, workers_for


@definition
def layer_norm(x: F32, weight: F32, bias: F32, eps: float) -> F32:
    """y = (x - mean(x)) / √(var(x) + ε) · w + b      [Ba et al. 2016 §3; SigLIP: Zhai et al. 2023]

    x [P, C] float32, weight [C] float32, bias [C] float32 → [P, C] float32

    >>> layer_norm(np.array([[1.0, 3.0]], np.float32), np.ones(2, np.float32), np.zeros(2, np.float32), 0.0)
    array([[-1.,  1.]], dtype=float32)
    """
    centered = x - np.mean(x, axis=-1, keepdims=True)
    deviation = np.sqrt(np.mean(centered * centered, axis=-1, keepdims=True) + np.float32(eps))
    return centered / deviation * weight + bias


@layer_norm.gradient
def layer_norm_gradient(dy: F32, x: F32, weight: F32, bias: F32, eps: float) -> tuple[F32, F32, F32]:
    """dx = (ĝ - mean(ĝ) - n · mean(ĝ n)) / σ, dw = Σ dy · n and db = Σ dy, with n = (x - mean(x)) / σ, ĝ = dy · w

    dy, x [P, C] float32, weight, bias [C] float32 → dx [P, C], dweight [C], dbias [C] float32
    """
    centered = x - np.mean(x, axis=-1, keepdims=True)
    deviation = np.sqrt(np.mean(centered * centered, axis=-1, keepdims=True) + np.float32(eps))
    normed, scaled = centered / deviation, dy * weight
    dx = scaled - np.mean(scaled, axis=-1, keepdims=True) - normed * np.mean(scaled * normed, axis=-1, keepdims=True)
    return dx / deviation, (dy * normed).sum(axis=0), dy.sum(axis=0)


@jit_inner
def _row(x, weight, bias, eps, y):
    mean, squares = np.float32(0), np.float32(0)
    for c in range(x.size):
        mean += x[c]
    mean /= np.float32(x.size)
    for c in range(x.size):
        squares += (x[c] - mean) * (x[c] - mean)
    scale = np.float32(1) / np.sqrt(squares / np.float32(x.size) + np.float32(eps))
    for c in range(x.size):
        y[c] = (x[c] - mean) * scale * weight[c] + bias[c]


@parallel
def _norm_rows(worker, workers, x, weight, bias, eps, y):
    for p in chunk(worker, workers, len(x)):
        _row(x[p], weight, bias, eps, y[p])


@layer_norm.kernel
def _layer_norm(x, weight, bias, eps):
    require(x.ndim == 2 and weight.shape == bias.shape == x.shape[1:], "layer_norm", x, weight, bias)
    y = np.empty_like(x)
    _norm_rows(workers_for(x), x, weight, bias, eps, y)
    return y
