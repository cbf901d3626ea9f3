"""Cross-entropy: how far a model's next-token distribution is from its target, and what that says about the logits.

    loss = Σ_k w_k · (ln Σ_v exp(z_v) - z[i_k])          tokens i_k with weights w_k
    dz_v = m · softmax(z)_v - Σ_k w_k · [v = i_k]        m = Σ_k w_k

One target covers what the reports train with. Next token: one id of weight 1, or of 0 where the token does not count.
Distillation: ids drawn from the teacher's distribution, with its probabilities (Gemma 3 §2.2), or all ids (Gemma 2
§3.1). A mixture of both: their ids together, with weights α p and 1 - α.

Logits of all tokens are not kept: 2,048 tokens and 8,192 pieces are 64 MB, and a vocabulary of 262,144 is 2 GB. The
loss is the end of the graph, so CHUNK tokens at a time go forward and back at once.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import NamedTuple

import numpy as np

from ..arrays import F32, I32
from ..definition import definition, require
from ..kernels.compiler import jit_inner
from ..kernels.parallel import chunk, parallel, workers_for
from ..kernels.simd.cpu import LANES
from ..kernels.simd.memory import load, store
from ..kernels.simd.vectors import exp, splat, sum_lanes, zeros
from ..layouts import Weight
from .attention import softmax
from .linear import Gradients, linear, linear_backward
from .sampling import log_sum_exp
from .softcap import soft_cap, soft_cap_gradient

CHUNK = 256  # tokens whose logits are held together, fewer for a large vocabulary
NUMBERS = 1 << 24  # logits that are held together


class Targets(NamedTuple):
    """What each token's next one should be: ids and their weights."""

    ids: I32  # [T, k]
    weights: F32  # [T, k]


LossOf = Callable[[F32, slice], tuple[F32, F32]]
# (logits [t, V], their place among all tokens) → each token's loss [t], and its gradient by the logits [t, V]


@definition
def cross_entropy(logits: F32, targets: Targets) -> F32:
    """Σ_k w_k · (ln Σ_v exp(z_v) - z[i_k])      [Gemma 2 §3.1; Gemma 3 §2.2]

    logits [T, V] float32, targets: ids [T, k] int32 and weights [T, k] float32 → [T] float32
    """
    chosen = np.take_along_axis(logits, targets.ids, axis=1)
    return (targets.weights * (log_sum_exp(logits)[:, None] - chosen)).sum(axis=1)


@cross_entropy.gradient
def cross_entropy_gradient(dy: F32, logits: F32, targets: Targets) -> F32:
    """dz_v = dy · (m · softmax(z)_v - Σ_k w_k · [v = i_k]), m = Σ_k w_k

    dy [T], logits [T, V] float32, targets: ids [T, k] int32 and weights [T, k] float32 → [T, V] float32
    """
    dlogits = softmax(logits) * (dy * targets.weights.sum(axis=1))[:, None]
    tokens = np.broadcast_to(np.arange(len(logits))[:, None], targets.ids.shape)
    np.subtract.at(dlogits, (tokens, targets.ids), dy[:, None] * targets.weights)
    return dlogits


@jit_inner
def _gradient_row(dy, z, ids, weights, dz):
    """dz of one row: all of V are softmax · dy · m, then those of the targets."""
    top, whole, lanes, total, m = z.max(), z.size // LANES * LANES, zeros(), np.float32(0), np.float32(0)
    for v in range(0, whole, LANES):
        p = exp(load(z, v) - splat(top))
        store(dz, v, p)
        lanes = lanes + p
    for v in range(whole, z.size):
        dz[v] = np.exp(z[v] - top)
        total += dz[v]
    for k in range(ids.size):
        m += weights[k]
    scale = dy * m / (total + sum_lanes(lanes))
    for v in range(0, whole, LANES):
        store(dz, v, load(dz, v) * splat(scale))
    for v in range(whole, z.size):
        dz[v] *= scale
    for k in range(ids.size):
        dz[ids[k]] -= dy * weights[k]


@parallel
def _gradient_rows(worker, workers, dy, logits, targets, dlogits):
    for t in chunk(worker, workers, len(logits)):
        _gradient_row(dy[t], logits[t], targets.ids[t], targets.weights[t], dlogits[t])


@cross_entropy_gradient.kernel
def _cross_entropy_gradient(dy, logits, targets):
    (ids, weights), fits = targets, logits.ndim == 2 and dy.shape == logits.shape[:1]
    fits = fits and ids.shape == weights.shape == (len(logits), *ids.shape[1:2]) and ids.size > 0
    require(fits and 0 <= ids.min() <= ids.max() < logits.shape[1], "cross_entropy_gradient", dy, logits, ids, weights)
    dlogits = np.empty_like(logits)
    _gradient_rows(workers_for(logits), dy, logits, targets, dlogits)
    return dlogits


def loss_of_targets(targets: Targets) -> LossOf:
    """`cross_entropy` with these targets, for the chunks below."""

    def loss_of(logits: F32, at: slice) -> tuple[F32, F32]:
        some = Targets(targets.ids[at], targets.weights[at])
        return cross_entropy(logits, some), cross_entropy_gradient(np.ones(len(logits), np.float32), logits, some)

    return loss_of


def _chunks(tokens: int, head: Weight) -> Iterator[slice]:
    size = min(CHUNK, max(16, NUMBERS // head.shape[0]))
    return (slice(first, first + size) for first in range(0, tokens, size))


def chunked_loss(h: F32, head: Weight, cap: float | None, targets: Targets) -> F32:
    """Each token's cross-entropy from the hidden states: h [T, D] float32, head [V, D] → [T] float32."""
    losses = np.empty(len(h), np.float32)
    for at in _chunks(len(h), head):
        logits = linear(h[at], head)
        logits = logits if cap is None else soft_cap(logits, cap)
        losses[at] = cross_entropy(logits, Targets(targets.ids[at], targets.weights[at]))
    return losses


def chunked_loss_and_gradient(
    h: F32, head: Weight, cap: float | None, loss_of: LossOf, scale: float, gradients: Gradients, name: str
) -> tuple[F32, F32]:
    """Each token's loss, and scale · ∂(Σ loss)/∂h; scale · ∂(Σ loss)/∂head is added to the gradient of this name.

    h [T, D] float32, head [V, D] → [T], [T, D] float32
    """
    losses, dh = np.empty(len(h), np.float32), np.empty_like(h)
    for at in _chunks(len(h), head):
        logits = linear(h[at], head)
        losses[at], dlogits = loss_of(logits if cap is None else soft_cap(logits, cap), at)
        if cap is not None:
            dlogits = soft_cap_gradient(dlogits, logits, cap)
        dh[at] = linear_backward(dlogits, h[at] * np.float32(scale), head, gradients, name)
    return losses, dh * np.float32(scale)
