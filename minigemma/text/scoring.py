"""How likely a text is to a model: the probability of each token given those before it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from ..arrays import F32
from ..formulas.sampling import logprob_of
from ..models.decoder import Decoder
from .prompt import text_ids

TOGETHER = 64  # tokens whose logits exist at once: with 262,144 of them each, 67 MB


@dataclass(frozen=True, eq=False)
class Score:
    """Of T tokens, the T - 1 that something comes before."""

    ids: tuple[int, ...]
    logprobs: F32  # [T - 1], natural logarithms

    @property
    def perplexity(self) -> float:
        """exp of the mean negative log-probability: how many tokens the model was torn between, on average."""
        with np.errstate(over="ignore"):  # beyond 709 nats a token it is infinite
            return float(np.exp(-self.logprobs.mean(dtype=np.float64)))


def score(model: Decoder, text_or_ids: str | Sequence[int]) -> Score:
    """Score a text, which BOS is put in front of, or ids, which are taken as they are.

    Raises ValueError for fewer than two ids, or more than the context.
    """
    if isinstance(text_or_ids, str):
        if model.tokenizer is None:
            raise ValueError("this checkpoint has no tokenizer; give the text as token ids")
        text_or_ids = text_ids(model.tokenizer, text_or_ids)
    ids = [int(i) for i in text_or_ids]
    if len(ids) < 2:
        raise ValueError(
            f"{len(ids)} token{'s'[: len(ids) != 1]} to score; it takes two, since the first has nothing before it"
        )
    if len(ids) > model.config.context:
        raise ValueError(f"the text has {len(ids):,} tokens and the context holds {model.config.context:,}; shorten it")
    cache, found = model.new_cache(len(ids)), []
    for first in range(0, len(ids) - 1, TOGETHER):
        piece = ids[first : min(first + TOGETHER, len(ids) - 1)]
        found.append(logprob_of(model.forward(piece, cache), ids[first + 1 : first + 1 + len(piece)]))
    return Score(tuple(ids), np.concatenate(found))
