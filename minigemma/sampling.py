"""From the logits of a next token to a token: temperature, top-k, top-p, min-p, in this order, as transformers has it.

    p = softmax(z / temperature)
    top-k    keep the k likeliest
    top-p    of these, the fewest that together have probability p at least      (Holtzman et al. 2020, §3.1)
    min-p    of these, those at least min_p times as likely as the likeliest     (Nguyen et al. 2024, §3)

Each works on what the one before it left, renormalised.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from .arrays import F32

F64 = NDArray[np.float64]
Ids = NDArray[np.intp]


def log_sum_exp(logits: F32) -> F64:
    """ln Σ exp(z) over the last axis, the maximum taken off first: logits [..., V] float32 → [...] float64."""
    top = logits.max(axis=-1, keepdims=True)
    shifted = logits - top
    return top[..., 0] + np.log(np.exp(shifted, out=shifted).sum(axis=-1, dtype=np.float64))


def log_softmax(logits: F32) -> F32:
    """z - ln Σ exp(z) over the last axis: logits [..., V] → [..., V] float32."""
    return logits - log_sum_exp(logits).astype(np.float32)[..., None]


def logprob_of(logits: F32, tokens: int | NDArray[np.integer]) -> F64:
    """log_softmax at one token of each distribution, no more: logits [..., V], tokens [...] → [...] float64."""
    at = np.asarray(tokens)[..., None]
    return np.take_along_axis(logits, at, axis=-1)[..., 0] - log_sum_exp(logits)


def softmax(logits: F32, temperature: float = 1.0) -> F64:
    """p_i = exp(z_i / t) / Σ exp(z_j / t): logits [V], at least one of them finite → [V] float64."""
    with np.errstate(over="ignore"):  # by a temperature near 0 all but the likeliest go to exp(-inf) = 0
        p = np.exp((logits.astype(np.float64) - logits.max()) / temperature)
    return p / p.sum()


def greedy(logits: F32) -> int:
    """argmax z, the first of equals: logits [V]. ValueError if that is not a number: all masked, or weights broken."""
    best = int(logits.argmax())
    if not np.isfinite(logits[best]):
        raise ValueError(f"the largest logit is {logits[best]}; the model's weights or the mask leave no token")
    return best


def keep_top_k(z: NDArray[np.floating], k: int) -> Ids:
    """{i : z_i ≥ the k-th largest z}, ascending; equals of the k-th stay, so there may be more: z [V] → [at least k].

    0.4 ms for 262,144; sorting those takes 44.
    """
    if k >= len(z):
        return np.arange(len(z))
    return np.flatnonzero(z >= np.partition(z, -k)[-k])


def keep_top_p(probs: F64, p: float) -> Ids:
    """The fewest likeliest that together have probability p or more, the likeliest first: probs [V] → [at least 1].

    Of equals the first come first. As the likeliest are few, 64 are sorted, 16 times as many if that does not do, …
    """
    count = 64
    while True:
        kept = keep_top_k(probs, count)
        kept = kept[np.argsort(-probs[kept], kind="stable")]
        reached = np.cumsum(probs[kept])
        if reached[-1] >= p or len(kept) == len(probs):
            return kept[: np.searchsorted(reached, p) + 1]
        count *= 16


def keep_min_p(probs: F64, min_p: float) -> Ids:
    """{i : p_i ≥ min_p · max p, p_i > 0}: probs [V] → [at least 1]."""
    return np.flatnonzero((probs >= min_p * probs.max()) & (probs > 0))


@dataclass(frozen=True, kw_only=True)
class Sampler:
    """How a token is chosen. Temperature 0 is greedy, always the likeliest, and the rest has nothing to do."""

    temperature: float = 0.0
    top_k: int | None = None
    top_p: float | None = None
    min_p: float | None = None

    def __post_init__(self) -> None:
        """Refuse what has no meaning. A top_k above the number of tokens keeps them all."""
        if not 0 <= self.temperature < float("inf"):
            raise ValueError(f"temperature is {self.temperature}; it must be 0 (always the likeliest) or more")
        if self.top_k is not None and not (isinstance(self.top_k, int | np.integer) and self.top_k >= 1):
            raise ValueError(f"top_k is {self.top_k}; it must be a whole number from 1, or None for all tokens")
        if self.top_p is not None and not 0 < self.top_p <= 1:
            raise ValueError(f"top_p is {self.top_p}; it must be above 0 and at most 1")
        if self.min_p is not None and not 0 <= self.min_p <= 1:
            raise ValueError(f"min_p is {self.min_p}; it must be from 0 to 1")

    def choose(self, logits: F32, random: np.random.Generator) -> int:
        """A token for logits [V] float32; those at -inf are never chosen. ValueError if all are, or one is NaN."""
        best = greedy(logits)
        if self.temperature == 0:
            return best
        tokens, probs = self.candidates(logits)
        reached = np.cumsum(probs)
        drawn = np.searchsorted(reached, random.random() * reached[-1], side="right")
        return int(tokens[min(int(drawn), len(tokens) - 1)])

    def candidates(self, logits: F32) -> tuple[Ids, F64]:
        """The tokens that may be chosen, and their probabilities, none of them 0: logits [V] → ([n], [n])."""
        tokens = keep_top_k(logits, self.top_k or len(logits))
        probs = softmax(logits[tokens], self.temperature)
        if self.top_p is not None and self.top_p < 1:
            kept = keep_top_p(probs, self.top_p)
            tokens, probs = tokens[kept], probs[kept]
        kept = keep_min_p(probs, self.min_p or 0.0)
        return tokens[kept], probs[kept] / probs[kept].sum()
