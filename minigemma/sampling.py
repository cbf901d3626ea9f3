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


def log_softmax(logits: F32) -> F32:
    """z - log Σ exp(z) over the last axis, the maximum taken off first: logits [..., V] → [..., V] float32."""
    shifted = logits - logits.max(axis=-1, keepdims=True)
    return shifted - np.log(np.exp(shifted).sum(axis=-1, keepdims=True, dtype=np.float64)).astype(np.float32)


def logprob_of(logits: F32, token: int) -> float:
    """The natural logarithm of one token's probability: logits [V] float32."""
    top = logits.max()
    return float(logits[token] - top - np.log(np.exp(logits - top).sum(dtype=np.float64)))


@dataclass(frozen=True, kw_only=True)
class Sampler:
    """How a token is chosen. Temperature 0 is greedy, always the likeliest, and the rest has nothing to do."""

    temperature: float = 0.0
    top_k: int | None = None
    top_p: float | None = None
    min_p: float | None = None

    def __post_init__(self) -> None:
        """Refuse what has no meaning."""
        if not 0 <= self.temperature < float("inf"):
            raise ValueError(f"temperature is {self.temperature}; it must be 0 (always the likeliest) or more")
        if self.top_k is not None and self.top_k < 1:
            raise ValueError(f"top_k is {self.top_k}; it must be 1 or more, or None for all tokens")
        if self.top_p is not None and not 0 < self.top_p <= 1:
            raise ValueError(f"top_p is {self.top_p}; it must be above 0 and at most 1")
        if self.min_p is not None and not 0 <= self.min_p <= 1:
            raise ValueError(f"min_p is {self.min_p}; it must be from 0 to 1")

    def choose(self, logits: F32, random: np.random.Generator) -> int:
        """A token for logits [V] float32; those at -inf are never chosen. ValueError if all are, or one is NaN."""
        best = int(logits.argmax())
        if not np.isfinite(logits[best]):
            raise ValueError(f"the largest logit is {logits[best]}; the model's weights or the mask leave no token")
        if self.temperature == 0:
            return best
        tokens, probs = self.candidates(logits)
        return int(tokens[min(int(np.searchsorted(np.cumsum(probs), random.random())), len(tokens) - 1)])

    def candidates(self, logits: F32) -> tuple[NDArray[np.intp], NDArray[np.float64]]:
        """The tokens that may be chosen, the likeliest first, and their probabilities."""
        if self.top_k is not None and self.top_k < len(logits):
            tokens = np.argpartition(logits, -self.top_k)[-self.top_k :]
            tokens = tokens[np.argsort(-logits[tokens], kind="stable")]
        else:
            tokens = np.argsort(-logits, kind="stable")
        scaled = logits[tokens].astype(np.float64) / self.temperature
        probs = np.exp(scaled - scaled[0])
        probs /= probs.sum()
        if self.top_p is not None:
            before = np.cumsum(probs) - probs
            tokens, probs = tokens[before < self.top_p], probs[before < self.top_p]
        if self.min_p is not None:
            likely = probs >= self.min_p * probs[0]
            tokens, probs = tokens[likely], probs[likely]
        return tokens, probs / probs.sum()
