"""The update of AdamW and the norm of all gradients, each one pass over memory (the equations: train/optimizer.py).

1. A NumPy expression per equation reads and writes every array several times.
2. Here each number of w, g, m and v is read once and w, m, v and the gradient's zero are written once: 32 bytes.
3. Threads take blocks, and the norm is a sum of the blocks' sums: it does not depend on the number of threads.
"""

from typing import NamedTuple

import numpy as np

from ..arrays import F32
from .compiler import jit_inner
from .parallel import chunk, parallel, workers_for
from .simd.cpu import LANES
from .simd.memory import load
from .simd.vectors import fma, sum_lanes, zeros

BLOCK = 1 << 13  # numbers


class Rates(NamedTuple):
    """The factors of one update, float32."""

    clip: np.float32  # min(1, c / ‖g‖)
    beta1: np.float32
    beta2: np.float32
    kept: np.float32  # 1 - η λ
    rate: np.float32  # η / (1 - β₁ᵗ)
    root: np.float32  # 1 / √(1 - β₂ᵗ)
    eps: np.float32


def sum_of_squares(x: F32) -> float:
    """Σ x² of x [P] float32, P a multiple of 16: float32 within a block, float64 across blocks."""
    sums = np.zeros(-(-x.size // BLOCK), np.float32)
    _sum_blocks(workers_for(x), x, sums)
    return float(sums.sum(dtype=np.float64))


def update(weights: F32, gradients: F32, means: F32, squares: F32, rates: Rates) -> None:
    """Update weights and both moments in place, [P] float32 each, and set the gradients to zero."""
    _update_blocks(workers_for(weights), weights, gradients, means, squares, rates)


@parallel
def _sum_blocks(worker, workers, x, sums):
    for b in chunk(worker, workers, sums.size):
        total, first = zeros(), b * BLOCK
        for i in range(first, min(first + BLOCK, x.size), LANES):
            total = fma(load(x, i), load(x, i), total)
        sums[b] = sum_lanes(total)


@jit_inner
def _update_block(w, g, m, v, r):
    one = np.float32(1)
    for i in range(w.size):
        clipped = g[i] * r.clip
        mean = r.beta1 * m[i] + (one - r.beta1) * clipped
        square = r.beta2 * v[i] + (one - r.beta2) * clipped * clipped
        w[i] = r.kept * w[i] - r.rate * mean / (np.sqrt(square) * r.root + r.eps)
        m[i], v[i], g[i] = mean, square, np.float32(0)


@parallel
def _update_blocks(worker, workers, w, g, m, v, rates):
    for b in chunk(worker, workers, -(-w.size // BLOCK)):
        block = slice(b * BLOCK, min((b + 1) * BLOCK, w.size))
        _update_block(w[block], g[block], m[block], v[block], rates)
