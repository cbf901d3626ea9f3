"""Scores a text token by token, and compares given answers."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

from ..arrays import F32
from ..formulas.attention import softmax
from ..formulas.sampling import logprob_of
from ..models.decoder import Decoder
from ..taps import Taps
from .prompt import checked_model, checked_prompt, text_ids

TOGETHER = 64  # tokens whose logits exist at once: with 262,144 of them each, 67 MB


@dataclass(frozen=True, eq=False)
class Score:
    """Scores of T tokens but the first, which has no context."""

    ids: tuple[int, ...]
    logprobs: F32  # [T - 1], natural logarithms

    @property
    def perplexity(self) -> float:
        """exp of the mean negative log-probability: the number of equally likely tokens with the same uncertainty."""
        with np.errstate(over="ignore"):  # infinite above 709 nats per token
            return float(np.exp(-self.logprobs.mean(dtype=np.float64)))


def score(
    model: Decoder,
    text_or_ids: str | Sequence[int],
    taps: Taps | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> Score:
    """Scores a text, preceded by BOS, or ids, taken as they are; `Edits` change every pass.

    progress: called with tokens done and tokens in all.

    Raises ValueError for fewer than two ids, or more than the context.
    """
    ids = _ids(model, text_or_ids)
    if len(ids) < 2:
        raise ValueError(
            f"{len(ids)} token{'s'[: len(ids) != 1]} to score; it takes two, since the first has nothing before it"
        )
    cache, found = model.new_cache(len(ids)), []
    for first in range(0, len(ids) - 1, TOGETHER):
        piece = ids[first : min(first + TOGETHER, len(ids) - 1)]
        found.append(logprob_of(model.forward(piece, cache, taps=taps), ids[first + 1 : first + 1 + len(piece)]))
        if progress:
            progress(first + len(piece) + 1, len(ids))
    return Score(tuple(ids), np.concatenate(found))


def choose(model: Decoder, text_or_ids: str | Sequence[int], answers: Sequence[str]) -> F32:
    """How likely each of `answers` is to come next, if one of them does: float32 [answers], sum 1.

    ShieldGemma judges a text so, by "Yes" against "No" (Zeng et al. 2024). Text and ids are taken as by `score`.
    Raises ValueError for an answer that is not one token, for no ids, and for more than the context.
    """
    ids = _ids(model, text_or_ids)
    if model.tokenizer is None:
        raise ValueError("this checkpoint has no tokenizer, so its tokens have no texts")
    if isinstance(answers, str):
        raise ValueError("answers is one text; give a list of them")
    if not len(answers):
        raise ValueError("answers is empty; give the texts of two tokens or more")
    tokens = [model.tokenizer.encode(answer) for answer in answers]
    for answer, found in zip(answers, tokens, strict=True):
        if len(found) != 1:
            raise ValueError(f"the answer {answer!r} is {len(found)} tokens; it must be one")
    return softmax(model.forward(ids, last_only=True)[0, np.ravel(tokens)])


def _ids(model: Decoder, given: str | Sequence[int]) -> list[int]:
    """BOS and the text, or the ids; ValueError where they are more than the context, or a text has no tokenizer."""
    checked_model(model)
    ids = checked_prompt(given, "text")
    if isinstance(ids, str):
        if model.tokenizer is None:
            raise ValueError("this checkpoint has no tokenizer; give the text as token ids")
        ids = text_ids(model.tokenizer, ids)
    if len(ids) > model.config.context:
        raise ValueError(f"the text has {len(ids):,} tokens and the context holds {model.config.context:,}; shorten it")
    return ids
