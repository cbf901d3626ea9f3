"""Sampling: from logits to a token, by temperature, top-k, top-p and min-p, in this order, as in transformers.

    p = softmax(z / temperature)
    top-k    keeps the k likeliest tokens
    top-p    keeps the fewest, likeliest first, whose probabilities add up to p or more   (Holtzman et al. 2020, §3.1)
    min-p    keeps those at least min_p times as likely as the likeliest                  (Nguyen et al. 2024, §3)

Each filters what the one before it kept, renormalized.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from ..arrays import F32
from ..definition import definition, require
from ..kernels.compiler import jit_inner
from ..kernels.parallel import chunk, parallel, workers, workers_for
from ..kernels.simd.cpu import LANES
from ..kernels.simd.memory import load
from ..kernels.simd.vectors import exp, max_lanes, maximum, splat, sum_lanes, zeros
from .attention import softmax

Ids = NDArray[np.intp]

SMALLEST = float(np.finfo(np.float32).tiny)
STRETCH = 256 * LANES  # exponentials added in float32; the sums of stretches are added in float64


@definition
def log_sum_exp(logits: F32) -> F32:
    """ln Σ exp(z) of each row; the maximum is subtracted first, so that nothing overflows

    logits [T, V] float32 → [T] float32
    """
    top = logits.max(axis=-1, keepdims=True)
    total = np.exp(logits - top).sum(axis=-1, dtype=np.float64)
    return (top[:, 0] + np.log(total)).astype(logits.dtype)


@log_sum_exp.gradient
def log_sum_exp_gradient(dy: F32, logits: F32) -> F32:
    """dlogits = dy · softmax(logits): dy [T], logits [T, V] float32 → [T, V] float32"""
    return dy[:, None] * softmax(logits)


@jit_inner
def log_sum_exp_row(z):
    """ln Σ exp(z) of one row: z [V] → float64."""
    whole = z.size // LANES * LANES
    top = z[0]
    if whole:
        highest = load(z, 0)
        for v in range(LANES, whole, LANES):
            highest = maximum(highest, load(z, v))
        top = max_lanes(highest)
    for v in range(whole, z.size):
        top = max(top, z[v])
    if top == -np.inf:  # a part of a row may be masked
        return top
    total = 0.0
    for first in range(0, whole, STRETCH):
        part = zeros()
        for v in range(first, min(first + STRETCH, whole), LANES):
            part = part + exp(load(z, v) - splat(top))
        total += sum_lanes(part)
    for v in range(whole, z.size):
        total += np.exp(z[v] - top)
    return top + np.log(total)


@parallel
def log_sums(worker, workers, logits, sums):
    """ln Σ exp(z) of all rows: logits [T, V], sums [T]."""
    for t in chunk(worker, workers, len(logits)):
        sums[t] = log_sum_exp_row(logits[t])


@log_sum_exp.kernel
def _log_sum_exp(logits):
    require(logits.ndim == 2 and logits.shape[1] > 0, "log_sum_exp", logits)
    parts = workers() if len(logits) == 1 and logits.shape[1] % workers() == 0 else 1  # of a row alone
    rows = np.ascontiguousarray(logits).reshape(len(logits) * parts, -1)
    sums = np.empty(len(rows), np.float64)
    log_sums(workers_for(rows), rows, sums)
    return (np.logaddexp.reduce(sums, keepdims=True) if parts > 1 else sums).astype(np.float32)


def log_softmax(logits: F32) -> F32:
    """z - ln Σ exp(z) of each row: logits [T, V] float32 → [T, V] float32."""
    return logits - log_sum_exp(logits)[:, None]


def logprob_of(logits: F32, tokens: Sequence[int]) -> F32:
    """log_softmax at one token of each row: logits [T, V] float32, tokens [T] → [T] float32."""
    return logits[np.arange(len(logits)), tokens] - log_sum_exp(logits)


def probabilities(logits: F32, temperature: float = 1.0) -> F32:
    """softmax(z / temperature): logits [V], at least one of them finite → [V] float32."""
    with np.errstate(over="ignore"):  # a temperature near 0 divides all but the largest into -inf, whose exp is 0
        return softmax((logits - logits.max()) / np.float32(max(temperature, SMALLEST)))


def greedy(logits: F32) -> int:
    """argmax z, the first of equals: logits [V]. ValueError if the largest logit is not finite."""
    best = int(logits.argmax())
    if not np.isfinite(logits[best]):
        raise ValueError(f"the largest logit is {logits[best]}; the model's weights or the mask leave no token")
    return best


def keep_top_k(z: F32, k: int) -> Ids:
    """{i : z_i ≥ the k-th largest z}, ascending; ties with the k-th are kept: z [V] → [at least k].

    0.4 ms for 262,144 logits; sorting them takes 44 ms.
    """
    if k >= len(z):
        return np.arange(len(z))
    return np.flatnonzero(z >= np.partition(z, -k)[-k])


def keep_top_p(probs: F32, p: float) -> Ids:
    """The fewest tokens, likeliest first, whose probabilities add up to p or more: probs [V] → [at least 1].

    Of equals the first come first. Sorts the 64 likeliest; if they do not reach p, 16 times as many, and so on.
    """
    count = 64
    while True:
        kept = keep_top_k(probs, count)
        kept = kept[np.argsort(-probs[kept], kind="stable")]
        reached = np.cumsum(probs[kept], dtype=np.float64)
        if reached[-1] >= p or len(kept) == len(probs):
            return kept[: np.searchsorted(reached, p) + 1]
        count *= 16


def keep_min_p(probs: F32, min_p: float) -> Ids:
    """{i : p_i ≥ min_p · max p, p_i > 0}: probs [V] → [at least 1]."""
    return np.flatnonzero((probs >= min_p * probs.max()) & (probs > 0))


def top_logprobs_of(logits: F32, count: int) -> tuple[tuple[int, float], ...]:
    """The `count` likeliest tokens, likeliest first, and log_softmax at them: logits [V] → ((id, logprob), …)."""
    if not count:  # with every generated token
        return ()
    tokens = keep_top_k(logits, count)
    tokens = tokens[np.argsort(-logits[tokens], kind="stable")][:count]
    return tuple((int(v), float(logprob_of(logits[None], [v])[0])) for v in tokens)


@dataclass(frozen=True, kw_only=True)
class Sampler:
    """How a token is chosen. Temperature 0 is greedy: always the likeliest token; the filters then change nothing."""

    temperature: float = 0.0
    top_k: int | None = None
    top_p: float | None = None
    min_p: float | None = None

    def __post_init__(self) -> None:
        """Raises ValueError for settings out of range. A top_k above the vocabulary's size keeps all tokens."""
        if not 0 <= self.temperature < 1e300:
            raise ValueError(f"temperature is {self.temperature}; it must be 0 (greedy) or more, and finite")
        if self.top_k is not None and not (isinstance(self.top_k, int | np.integer) and self.top_k >= 1):
            raise ValueError(f"top_k is {self.top_k}; it must be an integer from 1, or None for all tokens")
        if self.top_p is not None and not 0 < self.top_p <= 1:
            raise ValueError(f"top_p is {self.top_p}; it must be above 0 and at most 1")
        if self.min_p is not None and not 0 <= self.min_p <= 1:
            raise ValueError(f"min_p is {self.min_p}; it must be from 0 to 1")

    def choose(self, logits: F32, random: np.random.Generator) -> int:
        """Draws a token: logits [V] float32 → its id. Never one at -inf. ValueError if all are, or if one is NaN."""
        best = greedy(logits)
        if self.temperature == 0:
            return best
        tokens, probs = self.candidates(logits)
        reached = np.cumsum(probs, dtype=np.float64)
        drawn = np.searchsorted(reached, random.random() * reached[-1], side="right")
        return int(tokens[min(int(drawn), len(tokens) - 1)])

    def candidates(self, logits: F32) -> tuple[Ids, F32]:
        """The tokens that the filters keep and their probabilities, all above 0: logits [V] → ([n], [n])."""
        tokens = keep_top_k(logits, self.top_k or len(logits))
        probs = probabilities(logits[tokens], self.temperature)
        if self.top_p is not None and self.top_p < 1:
            kept = keep_top_p(probs, self.top_p)
            tokens, probs = tokens[kept], probs[kept]
        kept = keep_min_p(probs, self.min_p or 0.0)
        return tokens[kept], probs[kept] / probs[kept].sum()
