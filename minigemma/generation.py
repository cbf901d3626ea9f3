"""Text from a model, token by token: `generate` for all of it, `stream_generate` as it comes."""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from .cache import Cache
from .decoder import PIECE, Decoder
from .prompt import text_ids
from .sampling import Sampler, logprob_of

Prompt = str | Sequence[int]


@dataclass(frozen=True)
class Piece:
    """What one more token brought. `text` may be empty: half a character, or half a stop string, is held back."""

    text: str
    token: int
    logprob: float  # natural logarithm, of the model's own distribution: temperature 1, nothing cut off
    finish_reason: str | None  # "stop": end of text, of a turn, or a stop string; "length"; None: it goes on
    prompt_tokens: int
    generation_tokens: int
    prompt_tps: float  # tokens a second
    generation_tps: float


def generate(
    model: Decoder,
    prompt: Prompt,
    images: Sequence[Any] = (),
    max_new_tokens: int = 256,
    temperature: float = 0.0,
    top_k: int | None = None,
    top_p: float | None = None,
    min_p: float | None = None,
    seed: int | None = None,
    stop: str | Sequence[str] = (),
) -> str:
    """The text that follows `prompt`; the settings are those of `stream_generate`."""
    settings = {"temperature": temperature, "top_k": top_k, "top_p": top_p, "min_p": min_p, "seed": seed, "stop": stop}
    return "".join(p.text for p in stream_generate(model, prompt, images, max_new_tokens, **settings))  # type: ignore[arg-type]


def stream_generate(
    model: Decoder,
    prompt: Prompt,
    images: Sequence[Any] = (),
    max_new_tokens: int = 256,
    temperature: float = 0.0,
    top_k: int | None = None,
    top_p: float | None = None,
    min_p: float | None = None,
    seed: int | None = None,
    stop: str | Sequence[str] = (),
    cache: Cache | None = None,
) -> Iterator[Piece]:
    """Yield a `Piece` for each token that follows `prompt`; the last one has a finish_reason.

    prompt  a text, which BOS is put in front of, or ids, which are taken as they are
    stop    strings that end the text before they would appear in it, also when they span several tokens
    cache   what came before, if anything did; the prompt and all but the last of the new tokens are in it afterwards

    Arguments are checked here, before the first piece is asked for. Raises ValueError for settings out of range, a
    prompt longer than the context, and images for a model that has no vision tower.
    """
    sampler = Sampler(temperature=temperature, top_k=top_k, top_p=top_p, min_p=min_p)
    random = np.random.default_rng(seed)
    stops = (stop,) if isinstance(stop, str) else tuple(stop)
    if max_new_tokens < 1:
        raise ValueError(f"max_new_tokens is {max_new_tokens}; it must be 1 or more")
    if not all(stops) or (stop == ""):
        raise ValueError("a stop string is empty; it would end every text before it begins")
    if len(images):
        raise ValueError(
            f"{model.name or 'this model'} has no vision tower, but {len(images)} image{'s'[: len(images) > 1]} "
            f"{'were' if len(images) > 1 else 'was'} given; use gemma-3-4b or larger"
        )
    if isinstance(prompt, str):
        if model.tokenizer is None:
            raise ValueError("this checkpoint has no tokenizer.model; give the prompt as token ids")
        prompt = text_ids(model.tokenizer, prompt)
    held, context = cache.position if cache else 0, model.config.context
    if held + len(prompt) >= context:
        raise ValueError(f"the prompt has {held + len(prompt):,} tokens and the context holds {context:,}; shorten it")
    room = min(context, held + len(prompt) + max_new_tokens)
    if cache is None:
        cache = model.new_cache(room)
    new = min(max_new_tokens, min(context, cache.max_tokens) - held - len(prompt))
    return _pieces(model, list(prompt), cache, new, sampler, random, stops)


def _pieces(
    model: Decoder,
    prompt: list[int],
    cache: Cache,
    max_new_tokens: int,
    sampler: Sampler,
    random: np.random.Generator,
    stops: tuple[str, ...],
) -> Iterator[Piece]:
    began = time.perf_counter()
    logits = prefill(model, prompt, cache)
    first = time.perf_counter()
    prompt_tps = len(prompt) / (first - began)
    decoder = model.tokenizer.stream() if model.tokenizer else None
    never = [*model.banned, *range(model.vocab_limit, model.config.vocab)]
    pending = ""  # decided text is yielded; this may be the beginning of a stop string
    for count in range(1, max_new_tokens + 1):
        logits[never] = -np.inf
        token = sampler.choose(logits, random)
        logprob = logprob_of(logits, token)
        reason = "stop" if token in model.eos else "length" if count == max_new_tokens else None
        if decoder:
            pending += decoder.push(token) + (decoder.flush() if reason else "")
        text, pending, stopped = _split_at_stop(pending, stops, bool(reason))
        reason = "stop" if stopped else reason
        seconds = time.perf_counter() - first
        speed = (count - 1) / seconds if count > 1 else 0.0
        yield Piece(text, token, logprob, reason, len(prompt), count, prompt_tps, speed)
        if reason:
            return
        logits = model.forward([token], cache, last_only=True)[0]


def prefill(model: Decoder, ids: Sequence[int], cache: Cache) -> np.ndarray:
    """Put `ids` into the cache, PIECE at a time so that memory stays bounded; the logits [V] after the last of them."""
    for begin in range(0, len(ids), PIECE):
        logits = model.forward(ids[begin : begin + PIECE], cache, last_only=True)
    return logits[0]


def _split_at_stop(text: str, stops: tuple[str, ...], last: bool) -> tuple[str, str, bool]:
    """(what can be shown, what must wait, is a stop string there); what may become one waits, unless `last`."""
    found = [at for at in (text.find(s) for s in stops) if at >= 0]
    if found:
        return text[: min(found)], "", True
    if last:
        return text, "", False
    wait = max((n for s in stops for n in range(1, min(len(s), len(text) + 1)) if text.endswith(s[:n])), default=0)
    return text[: len(text) - wait], text[len(text) - wait :], False
