"""Text from a model, token by token: `generate` for all of it, `stream_generate` as it comes."""

from __future__ import annotations

from collections.abc import Callable, Generator, Iterable, Sequence
from dataclasses import dataclass
from functools import partial
from types import NoneType
from typing import TYPE_CHECKING, Any, NamedTuple, Unpack

import numpy as np

from ..arrays import F32
from ..cache import Cache
from ..errors import check_type
from ..formulas.sampling import Sampler, log_sum_exp, top_logprobs_of
from ..formulas.softcap import soft_cap
from ..kernels.compiler import running_seconds
from ..kernels.parallel import threads
from ..models.decoder import PREFILL_CHUNK, Decoder, chunks
from ..taps import Taps
from .draft import Ahead, Draft, checked_draft
from .processors import Processor, Steering, processed, processors_for
from .prompt import checked_model, checked_prompt, conversation_ids, text_ids
from .seeing import Seen, look_at

if TYPE_CHECKING:
    from ..files.images import PanAndScan

PAYS = 64  # new tokens from which on the coarse copy of the head saves more time than it takes to make

RELEASED_SAMPLING: dict[str, Any] = {"temperature": 1.0, "top_k": 64, "top_p": 0.95}  # the model cards of Gemma 2 and 3

Prompt = str | Sequence[int]
Progress = Callable[[int, int], None]  # called with tokens done, tokens in all


@dataclass(frozen=True)
class Token:
    """One generated token. `text` may be empty: half a character, or half a stop string, is held back."""

    text: str
    token: int
    logprob: float  # natural logarithm, of the model's own distribution: temperature 1, nothing cut off
    finish_reason: str | None  # "stop": end of text, of a turn, or a stop string; "length"; None: it goes on
    prompt_tokens: int
    generation_tokens: int
    prompt_tps: float  # tokens per second
    generation_tps: float
    index: int = 0  # of the prompt, in `generate_batch`
    top_logprobs: tuple[tuple[int, float], ...] = ()  # the likeliest ids, and the logarithms of the same distribution
    exact: bool = True  # False: the logits of unlikely tokens are approximate, as `exact_logits` allows


Piece = Token  # its name until 0.1


def generate(
    model: Decoder,
    prompt: Prompt,
    images: Sequence[Any] = (),
    max_new_tokens: int = 256,
    temperature: float | None = None,
    top_k: int | None = None,
    top_p: float | None = None,
    min_p: float | None = None,
    seed: int | None = None,
    stop: str | Sequence[str] = (),
    pan_and_scan: PanAndScan | None = None,
    exact_logits: bool = False,
    raw: bool | None = None,
    taps: Taps | None = None,
    draft: Draft | None = None,
    **steering: Unpack[Steering],
) -> str:
    """The text that follows `prompt`; the settings are those of `stream_generate`."""
    settings = max_new_tokens, temperature, top_k, top_p, min_p, seed, stop
    more: dict[str, Any] = {"pan_and_scan": pan_and_scan, "exact_logits": exact_logits, "raw": raw, "taps": taps}
    more["draft"] = draft
    return "".join(token.text for token in stream_generate(model, prompt, images, *settings, **more, **steering))


def stream_generate(
    model: Decoder,
    prompt: Prompt,
    images: Sequence[Any] | Seen = (),
    max_new_tokens: int = 256,
    temperature: float | None = None,
    top_k: int | None = None,
    top_p: float | None = None,
    min_p: float | None = None,
    seed: int | None = None,
    stop: str | Sequence[str] = (),
    cache: Cache | None = None,
    progress: Progress | None = None,
    pan_and_scan: PanAndScan | None = None,
    exact_logits: bool = False,
    raw: bool | None = None,
    taps: Taps | None = None,
    top_logprobs: int = 0,
    draft: Draft | None = None,
    **steering: Unpack[Steering],
) -> Generator[Token, F32 | None, None]:
    """Yield a `Token` for each token that follows `prompt`; the last one has a finish_reason.

    prompt    a text, or ids, which are taken as they are. A text becomes the user's turn of a conversation where the
              model is instruction-tuned, else BOS and the text; after a filled cache, the text alone
    raw       True: BOS and the text, whatever the model is; False: a turn
    temperature, top_k, top_p, min_p
              None: as the checkpoint's generation_config.json says, else as released: 1.0, 64, 0.95, no min_p;
              temperature 0: always the likeliest token
    images    as `look_at` takes them, or what it made of them; they stand where the text has <start_of_image>, or in
              front of it, or, in ids, where the image tokens are
    stop      strings that end the text before they would appear in it, also when they span several tokens
    cache     what came before, if anything did; the prompt and all but the last of the new tokens are in it afterwards,
              and after an interrupt (Ctrl-C) as many of them as its position says
    progress  called while the prompt is read
    exact_logits  True: compute the logits of every token in full. Otherwise those of unlikely tokens may come from a
              coarse copy of the head (formulas/two_pass_head.py), for 64 tokens or more and a temperature up to 1;
              never with a seed, whose text must not depend on `max_new_tokens`. Greedy text is the same either way
    taps      `Edits` that change every pass, that of the prompt and of each new token; Taps keep the latest pass
    top_logprobs  how many of the likeliest tokens to name with each token, whichever was chosen
    draft     "prompt": look up in the text what may come next; a smaller model with the same tokenizer: let it guess.
              One pass then computes several tokens (text/draft.py). The text is the same, up to the order of sums
    steering  repetition_penalty, frequency_penalty, presence_penalty, logit_bias, logits_processors, json_schema, regex
              and choices, which change the logits; text/processors.py says how. All logits are then exact. With one of
              the last three, an answer that ends for "stop" has that form, and one for "length" is a beginning of it

    Prompt and answer together are never longer than the context, nor than the cache that was given: there the answer
    ends, for "length". Without a tokenizer, for which the prompt must be ids, all text is "".

    Arguments are checked here, before the first piece is asked for. Raises ValueError for settings out of range, a
    prompt that is empty or longer than the context, and images for a model that has no vision tower.
    """
    sampler = sampler_for(model, temperature=temperature, top_k=top_k, top_p=top_p, min_p=min_p)
    top_logprobs = _checked_top(model, top_logprobs)
    check_type("images", images, (Sequence, np.ndarray, Seen), "a list of images")
    draft = checked_draft(model, draft, taps is None and (draft == "prompt" or images is None or not len(images)))
    choice = Choice(sampler, _generator(seed), _stop_strings(model, stop), taps, top_logprobs, draft)
    _check_types(max_new_tokens, cache, taps, progress, raw=raw, exact_logits=exact_logits)
    seen = _seen(model, images, pan_and_scan)
    follows = cache is not None and cache.position > 0
    ids = _checked_ids(model, prompt, seen.crops if seen else (), raw, follows)
    features = seen.features if seen else np.empty((0, 0, 0), np.float32)
    if len(features) != (places := len(model.image_runs(ids))):
        raise ValueError(f"{len(features)} images and crops were given, and the prompt has the tokens of {places}")
    new = min(max_new_tokens, _room(model, cache, len(ids)))
    choice = choice._replace(processors=processors_for(model, (cache.position if cache else 0) + len(ids), steering))
    cache = cache or model.new_cache(len(ids) + new)
    # A temperature above 1 draws unlikely tokens, and the coarse copy of the head must first be made.
    exact = exact_logits or sampler.temperature > 1 or new < PAYS or (seed is not None and sampler.temperature > 0)
    exact = exact or taps is not None or bool(choice.processors) or top_logprobs > 0
    return _tokens(model, (ids, features), cache, new, choice._replace(exact=exact), progress)


def _seen(model: Decoder, images: Sequence[Any] | Seen | None, pan_and_scan: PanAndScan | None) -> Seen | None:
    """The images as the model sees them; None if there are none."""
    if images is None or isinstance(images, Seen):
        return images
    return look_at(model, images, pan_and_scan) if len(images) else None


def _room(model: Decoder, cache: Cache | None, count: int) -> int:
    """How many tokens fit after a prompt of `count`; ValueError if none does."""
    held = cache.position if cache else 0
    limit = min(model.config.context, cache.max_tokens) if cache else model.config.context
    if limit - held - count < 1:
        holder = "context" if limit == model.config.context else "cache"
        told = f"the prompt has {held + count:,} tokens and the {holder} holds {limit:,}"
        raise ValueError(f"{told}, of which the answer needs one at least; shorten the prompt")
    return limit - held - count


def _whole(name: str, value: Any) -> int:
    if isinstance(value, bool) or not isinstance(value, (int, np.integer)):
        raise ValueError(f"{name} is {value!r}; it must be an integer")
    return int(value)


def _check_types(max_new_tokens: int, cache: Any, taps: Any, progress: Any, **flags: bool | None) -> None:
    if _whole("max_new_tokens", max_new_tokens) < 1:
        raise ValueError(f"max_new_tokens is {max_new_tokens}; it must be 1 or more")
    for name, value in flags.items():
        if not isinstance(value, (bool, np.bool_, NoneType)):
            raise ValueError(f"{name} is {value!r}; it must be True, False or None")
    check_type("cache", cache, Cache, "one that model.new_cache made")
    check_type("taps", taps, Taps, "mg.Taps(pattern, …) or mg.Edits")
    check_type("progress", progress, Callable, "a function of the tokens done and of all")


def _checked_top(model: Decoder, count: int) -> int:
    if not 0 <= _whole("top_logprobs", count) <= model.config.vocab:
        raise ValueError(f"top_logprobs is {count}; it must be from 0 to {model.config.vocab:,}")
    return count


def _generator(seed: int | None) -> np.random.Generator:
    if seed is not None and _whole("seed", seed) < 0:
        raise ValueError(f"seed is {seed}; it must be 0 or more, or None for another one each time")
    return np.random.default_rng(seed)


def _stop_strings(model: Decoder, stop: str | Sequence[str]) -> tuple[str, ...]:
    if stop is not None and not isinstance(stop, (str, bytes, Iterable)):
        raise ValueError(f"stop is {stop!r}; give a text, or a list of texts")
    stops = (stop,) if isinstance(stop, (str, bytes)) else tuple(stop or ())
    if not all(isinstance(each, str) for each in stops):
        raise ValueError("a stop string is no text; give a text, or a list of texts")
    if not all(stops):
        raise ValueError("a stop string is empty; it would end every text before it begins")
    if stops and model.tokenizer is None:
        raise ValueError("this checkpoint has no tokenizer, so there is no text that a stop string could end")
    return stops


def sampler_for(model: Decoder, **given: Any) -> Sampler:
    """The settings that are given (not None), the checkpoint's own for the others, else those of the model cards.

    Raises ValueError for settings out of range, and for those that have no effect at temperature 0.
    """
    checked_model(model)
    given = {name: value for name, value in given.items() if value is not None}
    for name, value in given.items():
        if isinstance(value, (bool, str, bytes)) or not np.isscalar(value):
            raise ValueError(f"{name} is {value!r}; it must be a number")
    if given.get("temperature") == 0:
        if useless := [name for name in given if name != "temperature"]:
            told = "which always takes the likeliest token; give a temperature, or leave it out"
            raise ValueError(f"{useless[0]} has no effect at temperature 0, {told}")
        return Sampler(temperature=0.0)
    own = {name: value for name, value in model.sampling.items() if name not in ("do_sample", "repetition_penalty")}
    if not given and model.sampling.get("do_sample") is False:
        return Sampler(temperature=0.0)
    settings = RELEASED_SAMPLING | own | given
    return Sampler(**settings) if settings["temperature"] else Sampler(temperature=0.0)


def prompt_ids(
    model: Decoder,
    text: str,
    *,
    system: str | None = None,
    raw: bool | None = None,
    crops: Sequence[int] = (),
    control: bool = False,
) -> list[int]:
    """A text as ids: the user's turn of a conversation, or with `raw` BOS and the text; None: as the model was taught.

    crops: of each image; control: as in `text_ids`, for a text without turns.

    Raises ValueError where turns must be chosen (a chat template that is not Gemma's), and for a system text without
    turns.
    """
    tokenizer = model.tokenizer
    if tokenizer is None:
        raise ValueError("this checkpoint has no tokenizer; give the prompt as token ids")
    if raw is None and model.instruction_tuned and model.foreign_turns:
        why = f"its chat template writes {model.foreign_turns}, not Gemma's turns"
        raise ValueError(f"{why}; choose --raw (raw=True: write them yourself) or --turns (raw=False: Gemma's turns)")
    if model.instruction_tuned if raw is None else not raw:
        if control:
            raise ValueError("control tokens in a turn would end or begin others; write the turns yourself with --raw")
        messages: list[dict[str, Any]] = [{"role": "user", "content": text, "images": crops}]
        if system:
            messages.insert(0, {"role": "system", "content": system})
        return conversation_ids(tokenizer, model.config.family, messages, vision=model.vision)
    if system:
        why = "--raw has no turns" if raw else f"{model.name} is pretrained only and knows no turns"
        raise ValueError(f"{why}, so --system has no place; put the instruction into the text")
    return text_ids(tokenizer, text, model.vision, crops, control=control)


def _checked_ids(model: Decoder, prompt: Prompt, crops: Sequence[int], raw: bool | None, follows: bool) -> list[int]:
    """The prompt as ids; a text that follows a filled cache is taken as it is, without BOS."""
    prompt = checked_prompt(prompt)
    if isinstance(prompt, str):
        ids = prompt_ids(model, prompt, raw=True if follows else raw, crops=crops)
        return ids[1:] if follows else ids
    if not prompt:
        raise ValueError("the prompt has no ids; it takes one at least, such as that of <bos>")
    return prompt


class Choice(NamedTuple):
    """How tokens are chosen, and where the text ends."""

    sampler: Sampler
    random: np.random.Generator
    stops: tuple[str, ...]
    taps: Taps | None
    top_logprobs: int
    draft: Draft | None
    processors: tuple[Processor, ...] = ()
    exact: bool = True  # logits of unlikely tokens too


def _tokens(
    model: Decoder,
    read: tuple[list[int], F32],
    cache: Cache,
    max_new_tokens: int,
    choice: Choice,
    progress: Progress | None,
) -> Generator[Token, F32 | None, None]:
    """Read the prompt, ids and features of its images, and yield the tokens that follow.

    A caller may send logits [V]: it has then run the token through the model itself (batch.py).
    """
    prompt, features = read
    began = running_seconds()
    logits = prefill(model, prompt, cache, features, progress, choice.taps)
    first = running_seconds()
    reading = len(prompt) / max(first - began, 1e-9)  # tokens per second
    decoder = model.tokenizer.stream() if model.tokenizer else None
    banned = [token for token in model.banned if token < len(logits)]  # a small embedding has no rows for the marks
    pending = ""  # decided text is yielded; this may be the beginning of a stop string

    def step(token: int) -> F32:
        if choice.exact:
            return model.forward([token], cache, last_only=True, taps=choice.taps)[0]
        return sampling_logits(model, token, cache)

    head = None if choice.exact or not has_coarse(model) else partial(coarse_logits, model)
    with Ahead(model, cache, choice.draft, step, head) as ahead:
        for count in range(1, max_new_tokens + 1):
            total, best = log_sum_exp(logits[None])[0], top_logprobs_of(logits, choice.top_logprobs)
            allowed = processed(choice.processors, ahead.text, logits if _own(logits, choice) else logits.copy())
            allowed[model.vocab_limit :] = allowed[banned] = -np.inf
            token = choice.sampler.choose(allowed, choice.random)
            logprob = float(logits[token] - total)
            reason = "stop" if token in model.eos else "length" if count == max_new_tokens else None
            if decoder:
                pending += ("" if token in model.eos else decoder.push(token)) + (decoder.flush() if reason else "")
            text, pending, stopped = _split_at_stop(pending, choice.stops, bool(reason))
            reason = "stop" if stopped else reason
            speed = (count - 1) / max(running_seconds() - first, 1e-9)
            sent = yield Token(text, token, logprob, reason, len(prompt), count, reading, speed, 0, best, choice.exact)
            if reason:
                return
            logits = ahead.after(token) if sent is None else sent


def _own(logits: F32, choice: Choice) -> bool:
    """Does nothing else read these logits? A copy would take half as long as all of Python's work on a token."""
    return logits.flags.writeable and not (choice.processors or choice.taps)


def sampling_logits(model: Decoder, token: int, cache: Cache) -> F32:
    """`forward` of one token for sampling: logits [V], exact for likely tokens, approximate for others."""
    if not has_coarse(model):
        return model.forward([token], cache, last_only=True)[0]
    return coarse_logits(model, model.hidden_states([token], cache, last_only=True))[0]


def has_coarse(model: Decoder) -> bool:
    """Has the model a coarse copy of its head, and kernels to use it?"""
    return model.coarse_head is not None and model.backend != "numpy"


def coarse_logits(model: Decoder, x: F32) -> F32:
    """The logits [T, V] of hidden states, x [T, D], by the coarse copy of the head."""
    assert model.coarse_head
    with threads(model.threads):
        logits = model.coarse_head.logits(x)
        return logits if model.config.logit_cap is None else soft_cap(logits, model.config.logit_cap)


def prefill(
    model: Decoder,
    ids: Sequence[int],
    cache: Cache,
    features: F32 | None = None,
    progress: Progress | None = None,
    taps: Taps | None = None,
) -> F32:
    """Put `ids`, and the images among them, into the cache; the logits [V] after the last of them.

    `forward` bounds its own memory. It gets PREFILL_CHUNK tokens at a time only where progress is shown, since each
    call also scores the vocabulary for its last token.
    """
    runs = model.image_runs(ids)
    for first, last in chunks(len(ids), runs, PREFILL_CHUNK if progress else len(ids)):
        inside = [i for i, (begin, _) in enumerate(runs) if first <= begin < last]
        images = features[inside] if inside and features is not None else None
        logits = model.forward(ids[first:last], cache, images, last_only=True, taps=taps)
        if progress:
            progress(last, len(ids))
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
