"""What changes the logits before a token is chosen: penalties, a bias, functions of the caller's own, a grammar.

A processor is a function f(ids, logits) → logits. ids [T] int32, read-only, are the prompt and the answer so far, with
what the cache held before; logits [V] float32 are the model's own, and may be changed in place (then None may be
returned) or replaced.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from difflib import get_close_matches
from inspect import signature
from typing import Any, TypedDict

import numpy as np

from ..arrays import F32, I32
from ..formulas.penalties import frequency_penalty, logit_bias, presence_penalty, repetition_penalty
from ..models.decoder import Decoder

Processor = Callable[[I32, F32], F32 | None]


class Steering(TypedDict, total=False):
    """Settings of every generating call that change the logits, in the order in which they do.

    Each can be left out, or None. Penalties, bias and processors hold for greedy text too. A constraint, which is one
    of json_schema, regex and choices, takes the extra [structured].
    """

    repetition_penalty: float | None
    """of tokens in prompt and answer, above 0: 1 changes nothing, 1.2 repeats less; None: as the checkpoint says"""
    frequency_penalty: float | None
    """for each time that a token is in the answer; OpenAI takes -2 … 2"""
    presence_penalty: float | None
    """for each token that is in the answer at all; OpenAI takes -2 … 2"""
    logit_bias: Mapping[int, float] | None
    """added to the logits of these ids; -inf forbids one"""
    logits_processors: Sequence[Processor] | None
    """functions f(ids, logits) → logits, called in this order for every token"""
    json_schema: Mapping[str, Any] | str | None
    """the answer is JSON of this schema, given as a dict or as its JSON text"""
    regex: str | None
    """the answer as a whole matches this regular expression, in the syntax of Rust's regex crate"""
    choices: Sequence[str] | None
    """the answer is one of these texts"""


CONSTRAINTS = ("json_schema", "regex", "choices")
HABITS = {  # settings of other programs, and ours
    "max_length": "max_new_tokens",
    "n_predict": "max_new_tokens",
    "temp": "temperature",
    "do_sample": "temperature, of which 0 takes the likeliest token",
    "repeat_penalty": "repetition_penalty",
    "stream": "mg.stream_generate",
    "grammar": "regex, json_schema or choices",
}
MOST = float(np.finfo(np.float32).max)


def unknown_setting(name: str) -> TypeError:
    """The error for a setting of another name, with what it is called here; the caller raises it."""
    from .generation import stream_generate

    known = [*signature(stream_generate).parameters, *Steering.__annotations__]
    meant = HABITS.get(name) or next(iter(get_close_matches(name, known, 1)), "")
    hint = f"did you mean {meant}?" if meant else "mg.stream_generate has those there are"
    return TypeError(f"there is no setting {name!r}; {hint}")


def processors_for(model: Decoder, start: int, given: Mapping[str, Any]) -> tuple[Processor, ...]:
    """The processors that `given`, settings of Steering, ask for; the answer begins at ids[start].

    Raises TypeError for a setting of another name, ValueError for values out of range.
    """
    if unknown := given.keys() - Steering.__annotations__.keys():
        raise unknown_setting(min(unknown))
    given = {name: value for name, value in given.items() if value is not None}
    found: list[Processor] = []
    own = model.sampling.get("repetition_penalty", 1)
    theta = _number(given.get("repetition_penalty", own), "repetition_penalty")
    if np.float32(theta) <= 0:
        raise ValueError(f"repetition_penalty is {theta}; it must be above 0, where 1 changes nothing")
    if theta != 1:
        found.append(lambda ids, logits: repetition_penalty(logits, ids, theta))
    if often := _number(given.get("frequency_penalty", 0), "frequency_penalty"):
        found.append(lambda ids, logits: frequency_penalty(logits, ids[start:], often))
    if once := _number(given.get("presence_penalty", 0), "presence_penalty"):
        found.append(lambda ids, logits: presence_penalty(logits, ids[start:], once))
    if bias := _checked_bias(given.get("logit_bias", {}), model.config.vocab):
        found.append(lambda ids, logits: logit_bias(logits, bias))
    found += _checked_own(given.get("logits_processors", ()))
    if constraints := [name for name in CONSTRAINTS if name in given]:
        if len(constraints) > 1:
            raise ValueError(f"an answer has one constraint at most, not {' and '.join(constraints)}")
        from .structured import constraint  # and with it llguidance, an extra

        found.append(constraint(model, start, constraints[0], given[constraints[0]]))
    return tuple(found)


def processed(processors: Sequence[Processor], ids: I32, logits: F32) -> F32:
    """What the processors make of logits [V], which they may change, after `ids`.

    Raises ValueError for a processor that returns something else than logits.
    """
    for process in processors:
        after = process(ids, logits)
        if after is not None:
            if not isinstance(after, np.ndarray) or after.shape != logits.shape:
                shape = getattr(after, "shape", type(after).__name__)
                raise ValueError(f"a logits processor returned {shape}; it must be the logits, of shape {logits.shape}")
            logits = after
    return np.asarray(logits, np.float32)


def _number(value: Any, name: str) -> float:
    if isinstance(value, bool) or not isinstance(value, (int, float, np.number)) or not -MOST <= value <= MOST:
        raise ValueError(f"{name} is {value!r}; it must be a finite number")
    return float(value)


def _checked_bias(bias: Any, vocab: int) -> dict[int, float]:
    if not isinstance(bias, Mapping):
        raise ValueError("logit_bias is no mapping; give token ids and what is added to their logits, {id: value}")
    for token, value in bias.items():
        if isinstance(token, bool) or not isinstance(token, (int, np.integer)) or not 0 <= token < vocab:
            raise ValueError(f"logit_bias names the token {token!r}; an id is an integer from 0 to {vocab - 1:,}")
        if value != -np.inf:
            _number(value, f"logit_bias of token {token}")
    return {int(token): float(value) for token, value in bias.items()}


def _checked_own(processors: Any) -> list[Processor]:
    if not isinstance(processors, Iterable) or not all(map(callable, processors)):
        raise ValueError("logits_processors must be a list of functions f(ids, logits)")
    return list(processors)
