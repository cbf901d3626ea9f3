"""RoPE: rotates queries and keys by angles that grow with their positions, so that their product depends on the
distance between them (Su et al. 2021, §3.2).

    angle_j = position / scale · base^(-2j / R)          j = 0 … R/2 - 1
    (u, v)  = (x_j, x_{j + R/2})                         pairs lie half the rotated width apart
    u' = u cos(angle_j) - v sin(angle_j)
    v' = v cos(angle_j) + u sin(angle_j)

base    θ: 10,000; 1,000,000 on Gemma 3's global layers (Gemma 3 §2)
scale   divides positions: 8 on the global layers of Gemma 3 4B and larger (Gemma 3 §5.3)
R       rotated width: the whole head, or its first half in RecurrentGemma; the rest of the head is unchanged

Departs from Su et al. in the pairs: they rotate neighbors (2j, 2j + 1), all of Gemma's code rotates (j, j + R/2), and
the weights are trained for it. Angles are float32: bf16 cannot tell neighboring positions past 256 apart.
"""

from __future__ import annotations

from functools import lru_cache

import numpy as np

from ..arrays import F32, I32, read_only
from ..definition import definition, require
from ..kernels.parallel import chunk, parallel, workers_for
from ..kernels.rows import rotate


@lru_cache(maxsize=16)
def frequencies(base: float, scale: float, rotated: int) -> F32:
    """base^(-2j / R) / scale for j = 0 … R/2 - 1, in radians per position."""
    half = rotated // 2
    return read_only((base ** (-np.arange(half) / half) / scale).astype(np.float32))


def angles(positions: I32, base: float, scale: float, rotated: int) -> tuple[F32, F32]:
    """Cosine and sine of position / scale · base^(-2j/R): positions [T] → [T, R/2] each."""
    return _angles(np.asarray(positions, np.int32).tobytes(), base, scale, rotated)


@lru_cache(maxsize=4)  # all layers of a pass with the same base and scale use the same angles
def _angles(positions: bytes, base: float, scale: float, rotated: int) -> tuple[F32, F32]:
    angle = np.frombuffer(positions, np.int32)[:, None].astype(np.float32) * frequencies(base, scale, rotated)
    return read_only(np.cos(angle)), read_only(np.sin(angle))


@definition
def rope(x: F32, positions: I32, base: float, scale: float, rotated: int) -> F32:
    """Rotates the pairs (j, j + R/2) by position / scale · base^(-2j/R), R = rotated      [Su et al. 2021 §3.2]

    x [T, N, H] float32, positions [T] int32 → [T, N, H] float32
    """
    half, (cos, sin) = rotated // 2, (a[:, None] for a in angles(positions, base, scale, rotated))
    u, v, rest = x[..., :half], x[..., half:rotated], x[..., rotated:]
    return np.concatenate([u * cos - v * sin, v * cos + u * sin, rest], axis=-1)


@rope.gradient
def rope_gradient(dy: F32, x: F32, positions: I32, base: float, scale: float, rotated: int) -> F32:
    """The rotation back, by negative positions: dy, x [T, N, H] float32, positions [T] int32 → dx [T, N, H] float32"""
    return rope(dy, -positions, base, scale, rotated)


@parallel
def _rotate_rows(worker, workers, x, cos, sin, y):
    for t in chunk(worker, workers, len(x)):
        rotate(x[t], cos[t], sin[t], y[t])


@rope.kernel
def _rope(x, positions, base, scale, rotated):
    fits = x.ndim == 3 and positions.shape == x.shape[:1] and 0 <= rotated <= x.shape[2]
    require(fits, "rope", x, positions)
    y = np.empty_like(x)
    _rotate_rows(workers_for(x), x, *angles(positions, base, scale, rotated), y)
    return y
