"""RMSNorm: divides each vector by its root mean square (Zhang & Sennrich 2019, eq. 4).

    y = x / √(mean(x²) + ε) · (1 + w)

Gemma's weight w is the gain minus one in every released safetensors file; a GGUF file holds 1 + w. The gain may be
large, zero or negative.
"""

from __future__ import annotations

import numpy as np

from ..arrays import F32
from ..definition import definition, require
from ..kernels.parallel import chunk, parallel, workers_for
from ..kernels.rows import norm_gradient_row, norm_row


@definition
def rms_norm(x: F32, weight: F32, eps: float) -> F32:
    """y = x / √(mean(x²) + ε) · (1 + w)      [Zhang & Sennrich 2019 eq. 4; Gemma 1 §2]

    x [..., D] float32, weight [D] float32 → [..., D] float32

    >>> rms_norm(np.array([[3.0, 4.0]], np.float32), np.zeros(2, np.float32), 0.0).round(3)
    array([[0.849, 1.131]], dtype=float32)
    """
    return x / np.sqrt(np.mean(x * x, axis=-1, keepdims=True) + np.float32(eps)) * (1 + weight)


@rms_norm.gradient
def rms_norm_gradient(dy: F32, x: F32, weight: F32, eps: float) -> tuple[F32, F32]:
    """dx = (ĝ - n · mean(ĝ n)) / r and dw = Σ dy · n, with r = √(mean(x²) + ε), n = x / r, ĝ = dy · (1 + w)

    dy, x [..., D] float32, weight [D] float32 → dx [..., D], dweight [D] float32
    """
    root = np.sqrt(np.mean(x * x, axis=-1, keepdims=True) + np.float32(eps))
    normed, scaled = x / root, dy * (1 + weight)
    dx = (scaled - normed * np.mean(scaled * normed, axis=-1, keepdims=True)) / root
    return dx, (dy * normed).reshape(-1, x.shape[-1]).sum(axis=0)


@parallel
def _norm_rows(worker, workers, x, weight, eps, y):
    for t in chunk(worker, workers, len(x)):
        norm_row(x[t], weight, eps, y[t])


@rms_norm.kernel
def _rms_norm(x, weight, eps):
    require(weight.shape == x.shape[-1:], "rms_norm", x, weight)
    rows = np.ascontiguousarray(x).reshape(-1, x.shape[-1])
    y = np.empty_like(rows)
    _norm_rows(workers_for(rows), rows, weight, eps, y)
    return y.reshape(x.shape)


@parallel
def _gradient_rows(worker, workers, dy, x, weight, eps, dx, dweights):
    for t in chunk(worker, workers, len(x)):
        norm_gradient_row(dy[t], x[t], weight, eps, dx[t], dweights[worker])


@rms_norm_gradient.kernel
def _rms_norm_gradient(dy, x, weight, eps):
    require(weight.shape == x.shape[-1:] and dy.shape == x.shape, "rms_norm_gradient", dy, x, weight)
    drows, rows = (np.ascontiguousarray(each).reshape(-1, x.shape[-1]) for each in (dy, x))
    dx, workers = np.empty_like(rows), workers_for(rows)
    dweights = np.zeros((workers, len(weight)), np.float32)
    _gradient_rows(workers, drows, rows, weight, eps, dx, dweights)
    return dx.reshape(x.shape), dweights.sum(axis=0)
