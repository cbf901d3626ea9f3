"""Scores a text token by token, and compares given answers."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

from ..arrays import F32
from ..errors import check_type
from ..formulas.attention import softmax
from ..formulas.sampling import log_softmax, logprob_of
from ..models.decoder import Decoder
from ..taps import Taps
from .prompt import checked_model, checked_prompt, text_ids

BOS = 2  # in every Gemma
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
    stride: int | None = None,
) -> Score:
    """Score a text, which BOS is put in front of, or ids, which are taken as they are; `Edits` change every pass.

    progress: called with tokens done and tokens in all
    stride: of a text longer than the context, that many tokens are scored at a time, after as many of those before them
    as the context holds beside them, and BOS if the text has one. A smaller stride sees more and takes longer

    Raises ValueError for fewer than two ids, more than the context without a stride, and a stride that is no whole
    number from 1 to half the context.
    """
    check_type("progress", progress, Callable, "a function of the tokens done and of all")
    ids = _ids(model, text_or_ids, longer=stride is not None)
    context = model.config.context
    if len(ids) < 2:
        raise ValueError(
            f"{len(ids)} token{'s'[: len(ids) != 1]} to score; it takes two, since the first has nothing before it"
        )
    if stride is not None and not (isinstance(stride, int) and 1 <= stride <= context // 2):
        raise ValueError(f"stride is {stride!r}; it must be an integer from 1 to half the context, {context // 2:,}")
    done, shown = min(len(ids), context), progress or (lambda *_: None)
    found = [_logprobs(model, ids[:done], 1, taps, lambda count: shown(count, len(ids)))]
    bos = ids[:1] if ids[0] == (model.tokenizer.bos if model.tokenizer else BOS) else []
    while done < len(ids):
        last = min(done + (stride or 0), len(ids))
        before = context - len(bos) - (last - done)
        window = bos + ids[done - before : last]
        found.append(_logprobs(model, window, len(window) - (last - done), taps, lambda *_: None))
        shown(done := last, len(ids))
    return Score(tuple(ids), np.concatenate(found))


def _logprobs(model: Decoder, ids: list[int], first: int, taps: Taps | None, done: Callable[[int], object]) -> F32:
    """log p of ids[first:], each after those before it, [T - first]; `done` is called with how many tokens are read."""
    cache, found = model.new_cache(len(ids)), list[F32]()
    if first > 1:
        model.forward(ids[: first - 1], cache, last_only=True, taps=taps)
    for at in range(first - 1, len(ids) - 1, TOGETHER):
        piece = ids[at : min(at + TOGETHER, len(ids) - 1)]
        found.append(logprob_of(model.forward(piece, cache, taps=taps), ids[at + 1 : at + 1 + len(piece)]))
        done(at + len(piece) + 1)
    return np.concatenate(found)


def score_choices(model: Decoder, text_or_ids: str | Sequence[int], choices: Sequence[str]) -> F32:
    """How likely each of `choices` is to follow: the natural logarithms of their probabilities, float32 [choices].

    That of a text is the sum over its tokens, so a longer one is less likely; divide by their number to compare texts
    of different lengths. Text and ids are taken as by `score`; the text is read once. A choice is encoded by itself.

    Raises ValueError for no choices or an empty one, for no ids, and for more than the context.
    """
    ids = _ids(model, text_or_ids)
    if model.tokenizer is None:
        raise ValueError("this checkpoint has no tokenizer, so its tokens have no texts")
    check_type("answers", choices, Sequence, "a list of texts", optional=False)
    if isinstance(choices, str):
        raise ValueError("answers is one text; give a list of them")
    tokens = [model.tokenizer.encode(choice) for choice in choices]
    if not tokens:
        raise ValueError("answers is empty; give the texts of two or more")
    if not all(tokens):
        raise ValueError("an answer is empty, and has no probability")
    longest = len(ids) + max(map(len, tokens)) - 1
    if longest > model.config.context:
        raise ValueError(f"text and answer have {longest:,} tokens and the context holds {model.config.context:,}")
    cache = model.new_cache(longest)
    first = log_softmax(model.forward(ids, cache, last_only=True))[0]
    found = [float(first[each[0]]) for each in tokens]
    for i, (begin, *rest) in enumerate(tokens):
        if rest:
            logits = model.forward([begin, *rest[:-1]], cache.copy())
            found[i] += float(logprob_of(logits, rest).sum(dtype=np.float64))
    return np.array(found, np.float32)


def choose(model: Decoder, text_or_ids: str | Sequence[int], answers: Sequence[str]) -> F32:
    """How likely each of `answers` is to come next, if one of them does: softmax of `score_choices`, [answers], sum 1.

    ShieldGemma judges a text so, by "Yes" against "No" (Zeng et al. 2024). Arguments and errors are those of
    `score_choices`.
    """
    return softmax(score_choices(model, text_or_ids, answers))


def _ids(model: Decoder, given: str | Sequence[int], longer: bool = False) -> list[int]:
    """BOS and the text, or the ids; ValueError for a text without a tokenizer, and past the context unless `longer`."""
    checked_model(model)
    ids = checked_prompt(given, "text")
    if isinstance(ids, str):
        if model.tokenizer is None:
            raise ValueError("this checkpoint has no tokenizer; give the text as token ids")
        ids = text_ids(model.tokenizer, ids)
    if len(ids) > model.config.context and not longer:
        told = f"the text has {len(ids):,} tokens and the context holds {model.config.context:,}"
        raise ValueError(f"{told}; shorten it, or score it with a stride")
    return ids
