"""How far a student's Q = softmax(z) is from its teacher's P, in the three ways of GKD (Agarwal et al. 2024).

    β = 0          forward KL     KL(P ‖ Q) = Σ P (ln P - ln Q)          Q covers all that P has
    β = 1          reverse KL     KL(Q ‖ P)                              Q keeps to P's likeliest tokens
    0 < β < 1      JSD(β)         β KL(P ‖ M) + (1 - β) KL(Q ‖ M),       M = β P + (1 - β) Q

Distillation by `cross_entropy` is the first of them, up to P's entropy.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

from ..arrays import F32
from ..definition import definition
from .attention import softmax

TINY = 1e-30  # a probability that is taken for zero


class Toward(NamedTuple):
    """What logits should come near: the teacher's distribution, and in which way."""

    p: F32  # [T, V]
    beta: float


def _log(p: F32) -> F32:
    return np.log(np.maximum(p, p.dtype.type(TINY)))


@definition
def divergence(logits: F32, toward: Toward) -> F32:
    """D(P ‖ softmax(z))      [Agarwal et al. 2024 eq. 1, §3]

    logits [T, V] float32, toward: p [T, V] float32 and β → [T] float32
    """
    (p, beta), q = toward, softmax(logits)
    if beta in (0, 1):
        first, second = (p, q) if beta == 0 else (q, p)
        return (first * (_log(first) - _log(second))).sum(axis=1)
    m = _log(beta * p + (1 - beta) * q)
    return (beta * p * (_log(p) - m) + (1 - beta) * q * (_log(q) - m)).sum(axis=1)


@divergence.gradient
def divergence_gradient(dy: F32, logits: F32, toward: Toward) -> F32:
    """dz = dy (Q - P), or dy Q (a - ⟨Q, a⟩), a = ln Q - ln P of the reverse KL, (1 - β)(ln Q - ln M) of the JSD

    dy [T], logits [T, V] float32, toward: p [T, V] float32 and β → [T, V] float32
    """
    (p, beta), q = toward, softmax(logits)
    if beta == 0:
        return dy[:, None] * (q - p)
    a = _log(q) - _log(p) if beta == 1 else (1 - beta) * (_log(q) - _log(beta * p + (1 - beta) * q))
    return dy[:, None] * q * (a - (q * a).sum(axis=1, keepdims=True))
