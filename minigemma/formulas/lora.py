"""LoRA: a matrix W [R, D] that is changed by the product of two narrow ones (Hu et al. 2021, §4.1).

    W' = W + s B A                     A [r, D], B [R, r]; s = α / r, or α / √r in rsLoRA (Kalajdzievski 2023)
    y  = x W'ᵀ = x Wᵀ + s (x Aᵀ) Bᵀ

W may have any layout and stays as it is; x Wᵀ is `linear`'s product, and the second term is added to it in float32. It
costs r (1/R + 1/D) of the first: a hundredth for r = 8. `Adapted` (layouts/weight.py) holds W, A, B and s.
"""

from __future__ import annotations

import numpy as np

from ..arrays import F32
from ..definition import definition, require
from ..kernels.product import multiply


@definition
def low_rank(x: F32, a: F32, b: F32, scale: float) -> F32:
    """y = s (x Aᵀ) Bᵀ      [Hu et al. 2021 eq. 3]

    x [T, D], a [r, D], b [R, r] float32 → [T, R] float32
    """
    u: F32 = x @ a.T
    y: F32 = u @ b.T
    return y * np.float32(scale)


@low_rank.gradient
def low_rank_gradient(dy: F32, x: F32, a: F32, b: F32, scale: float) -> tuple[F32, F32, F32]:
    """du = s dy B, dx = du A, dA = duᵀ x, dB = s dyᵀ (x Aᵀ)

    dy [T, R], x [T, D], a [r, D], b [R, r] float32 → dx [T, D], da [r, D], db [R, r] float32
    """
    u: F32 = x @ a.T
    du: F32 = dy @ b
    du *= np.float32(scale)
    return du @ a, du.T @ x, dy.T @ (u * np.float32(scale))


@low_rank.kernel
def _low_rank(x, a, b, scale):
    require(_fit(x, a, b), "low_rank", x, a, b)
    u = multiply(x, a.T, np.empty((len(x), len(a)), np.float32))
    u *= np.float32(scale)
    return multiply(u, b.T, np.empty((len(x), len(b)), np.float32))


@low_rank_gradient.kernel
def _low_rank_gradient(dy, x, a, b, scale):
    fits = _fit(x, a, b) and dy.shape == (len(x), len(b)) and dy.dtype == np.float32
    require(fits, "low_rank_gradient", dy, x, a, b)
    u, du = (np.empty((len(x), len(a)), np.float32) for _ in range(2))
    multiply(x, a.T, u)
    multiply(dy, b, du)
    u *= np.float32(scale)
    du *= np.float32(scale)
    dx, da, db = (np.empty(array.shape, np.float32) for array in (x, a, b))
    return multiply(du, a, dx), multiply(du.T, x, da), multiply(dy.T, u, db)


def _fit(x: F32, a: F32, b: F32) -> bool:
    matrices = x.ndim == a.ndim == b.ndim == 2 and all(array.dtype == np.float32 for array in (x, a, b))
    return matrices and x.shape[1] == a.shape[1] and len(a) == b.shape[1]
