"""Several texts at once: their sequences decode together, so each weight is read once for all of them."""

from __future__ import annotations

from collections.abc import Callable, Generator, Iterator, Sequence
from dataclasses import replace
from functools import partial
from typing import Any, NamedTuple, NoReturn

import numpy as np

from ..arrays import F32
from ..cache import Cache
from ..errors import check_type
from ..kernels.matvec import FEW
from ..models.decoder import Decoder
from ..models.together import hidden_together
from .generation import Prompt, Token, coarse_logits, has_coarse, stream_generate
from .prompt import checked_model


class Answer(NamedTuple):
    """A text that is being written."""

    cache: Cache
    tokens: Generator[Token, F32 | None, None]
    latest: Token  # which is not in the cache yet


def generate_batch(
    model: Decoder,
    prompts: Sequence[Prompt],
    images: Sequence[Any] = (),
    seed: int | Sequence[int] | None = None,
    max_together: int = FEW,
    **settings: Any,
) -> Iterator[Token]:
    """Yield a `Token` for each token that follows each prompt, as it comes; `.index` is the prompt's place.

    images        those of each prompt, as `look_at` takes them; none at all where the sequence is empty
    seed          one for each prompt, or a number: prompt i has `seed` + i
    max_together  how many prompts are answered at once; the others wait until one has its last token
    settings      those of `stream_generate`, for all prompts, but for `cache`, `taps` and `draft`

    Each text is what `generate` makes of its prompt alone with its seed, up to the order of sums. A prompt is read when
    it joins; the others then wait.

    Raises ValueError for other numbers of images or seeds than of prompts, and for a `max_together` below 1, at once;
    as `stream_generate` does, when a prompt joins. An answer that cannot go on (a processor failed) raises as well;
    `minigemma batch` and the server end that answer alone.
    """
    checked_model(model)
    if isinstance(prompts, (str, bytes)) or not hasattr(prompts, "__len__"):
        what = "one text" if isinstance(prompts, (str, bytes)) else repr(prompts)
        raise ValueError(f"prompts is {what}; give a list of texts")
    check_type("max_together", max_together, int, "an integer", optional=False)
    check_type("images", images, Sequence, "a list with the images of each prompt", optional=False)
    check_type("seed", seed, (int, Sequence), "an integer, or one for each prompt")
    count = len(prompts)
    seeds = seed if isinstance(seed, Sequence) else [None if seed is None else seed + i for i in range(count)]
    images = images if len(images) else [()] * count
    for what, given in (("images", images), ("seeds", seeds)):
        if len(given) != count:
            raise ValueError(f"{what} for {len(given)} prompts were given, and there are {count}")
    if max_together < 1:
        raise ValueError(f"max_together is {max_together}; it must be 1 or more")
    if unknown := {"cache", "progress", "taps", "draft"} & set(settings):
        raise ValueError(f"{min(unknown)} is for one text alone, not for several together")

    def begin(i: int) -> Answer:
        return started(model, prompts[i], images[i], seed=seeds[i], **settings)

    return together(model, begin, count, max_together, _raise)


def started(model: Decoder, prompt: Prompt, images: Any = (), **settings: Any) -> Answer:
    """A prompt that is read and has its first token; arguments and errors are those of `stream_generate`."""
    cache = model.new_cache(model.config.context)
    tokens = stream_generate(model, prompt, images, cache=cache, **settings)
    return Answer(cache, tokens, next(tokens))


def together(
    model: Decoder, begin: Callable[[int], Answer], count: int, most: int, failed: Callable[[int, Exception], object]
) -> Iterator[Token]:
    """The tokens of answers 0 … count - 1, at most `most` at once; begin(i) reads a prompt. An error of one answer, in
    its prompt or later, ends it alone: `failed` is told, and may raise.
    """
    answers: dict[int, Answer] = {}
    waiting = iter(range(count))

    def step(i: int, advance: Callable[[], Answer]) -> Iterator[Token]:
        answers.pop(i, None)
        try:
            answer = advance()
        except Exception as error:
            failed(i, error)
            return
        if not answer.latest.finish_reason:
            answers[i] = answer
        yield replace(answer.latest, index=i)

    while True:
        while len(answers) < most and (i := next(waiting, None)) is not None:
            yield from step(i, partial(begin, i))
        if not answers:
            return
        places, several = list(answers), list(answers.values())
        for i, answer, row in zip(places, several, next_logits(model, several), strict=True):
            yield from step(i, partial(_advanced, answer, row))


def _advanced(answer: Answer, row: F32 | None) -> Answer:
    return answer._replace(latest=answer.tokens.send(row))


def _raise(i: int, error: Exception) -> NoReturn:
    error.add_note(f"in the answer to prompt {i}")
    raise error


def next_logits(model: Decoder, answers: Sequence[Answer]) -> Sequence[F32 | None]:
    """What each answer's `tokens.send` takes: the logits after its latest token, which is put into its cache.

    None for one that is alone: its own way may use the coarse copy of the head.
    """
    if len(answers) == 1:
        return [None]
    x = hidden_together(model, [each.latest.token for each in answers], [each.cache for each in answers])
    exact = np.array([each.latest.exact for each in answers]) | (not has_coarse(model))
    found: list[F32 | None] = [None] * len(answers)
    for rows, head in ((exact, model.head), (~exact, partial(coarse_logits, model))):
        if rows.any():
            with model.running():
                for i, row in zip(np.flatnonzero(rows), head(x[rows]), strict=True):
                    found[i] = row
    return found
