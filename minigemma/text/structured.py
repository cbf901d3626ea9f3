"""Answers of a given form: JSON of a schema, a text that a regular expression matches, one of some choices.

    logit_v = -∞ for each token v after which the text could not become an answer of that form

llguidance (https://github.com/guidance-ai/llguidance, extra [structured]) parses the answer so far and says which
tokens may follow, over the whole vocabulary in well under a millisecond. Where the answer is complete, those that end
it are among them; where nothing can follow it, they alone. What was forbidden before, as marks of images, stays so.

Blanks between the parts of JSON are one blank, or line breaks and at most twenty blanks: a model that is unsure of the
next part would otherwise go on writing blanks.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from types import SimpleNamespace
from typing import Any
from weakref import WeakKeyDictionary

import numpy as np

from ..arrays import F32, I32
from ..models.decoder import Decoder
from .processors import Processor

BLANKS = {"whitespace_pattern": r"( |\n{1,2}[ \t]{0,20})"}

_vocabularies: WeakKeyDictionary[Any, tuple[tuple[int, ...], Any]] = WeakKeyDictionary()


def constraint(model: Decoder, start: int, kind: str, form: Any) -> Processor:
    """A processor for one answer, which begins at ids[start]; `kind` is "json_schema", "regex" or "choices".

    The first one of a model takes a second or two, in which its vocabulary is sorted.

    Raises ValueError for a form that is none, a model without a tokenizer, and where llguidance is missing.
    """
    try:
        from llguidance import LLMatcher
    except ImportError:
        remedy = "pip install 'minigemma[structured]'"
        raise ValueError(f"{kind} takes llguidance, which is not installed: {remedy}") from None
    grammar = _grammar(LLMatcher, kind, form)
    if problem := LLMatcher.validate_grammar(grammar):
        raise ValueError(f"{kind} cannot be used: {_short(problem)}")
    matcher = LLMatcher(_vocabulary(model), grammar, log_level=0)
    read = start

    def process(ids: I32, logits: F32) -> F32:
        nonlocal read
        matcher.consume_tokens(ids[read:].tolist())
        read = len(ids)
        bits = np.frombuffer(matcher.compute_bitmask(), np.uint8)
        if matcher.is_error():
            raise ValueError(f"{kind} cannot be followed: {_short(matcher.get_error())}")
        logits[np.unpackbits(bits, count=len(logits), bitorder="little") == 0] = -np.inf
        return logits

    return process


def _grammar(matcher: Any, kind: str, form: Any) -> str:
    """The form in llguidance's own words."""
    if kind == "json_schema":
        if isinstance(form, str):
            try:
                form = json.loads(form)
            except (ValueError, RecursionError) as error:
                raise ValueError(f"json_schema is not JSON ({error})") from None
        if not isinstance(form, Mapping):
            raise ValueError(
                f"json_schema is {type(form).__name__}; it must be an object, such as {{'type': 'object'}}"
            )
        try:
            return matcher.grammar_from_json_schema(json.dumps(form), overrides=BLANKS)
        except (ValueError, TypeError, RecursionError) as error:
            raise ValueError(f"json_schema cannot be used: {error}") from None
    if kind == "regex":
        if not isinstance(form, str) or not form:
            raise ValueError("regex must be a text that is not empty")
        return matcher.grammar_from_regex(form)
    texts = tuple(form) if isinstance(form, Sequence) and not isinstance(form, str) else ()
    if not texts or not all(isinstance(text, str) and text for text in texts):
        raise ValueError("choices must be a list of texts, none of them empty")
    return matcher.grammar_from_lark("start: " + " | ".join(map(json.dumps, texts)))


def _vocabulary(model: Decoder) -> Any:
    """The tokens as llguidance takes them, made once for a tokenizer."""
    tokenizer, ends = model.tokenizer, tuple(model.eos)
    if tokenizer is None or not ends:
        missing = "no token that ends a text" if tokenizer else "no tokenizer"
        raise ValueError(f"this checkpoint has {missing}, so the form of a text cannot be kept")
    if (found := _vocabularies.get(tokenizer)) is None or found[0] != ends:
        from llguidance import LLTokenizer, TokenizerWrapper

        texts = [tokenizer.bytes_of(i) if i < model.vocab_limit else b"" for i in range(model.config.vocab)]
        facts = {"eos_token_id": ends[0], "bos_token_id": tokenizer.bos, "tokens": texts, "special_token_ids": []}
        wrapped = TokenizerWrapper(_Encoder(**facts, encode=tokenizer.encode))
        found = _vocabularies[tokenizer] = ends, LLTokenizer(wrapped, eos_token=list(ends), slices=[])
    return found[1]


class _Encoder(SimpleNamespace):
    """What TokenizerWrapper reads the vocabulary from."""

    def __call__(self, text: str) -> Sequence[int]:
        return self.encode(text)


def _short(problem: str) -> str:
    """The lines of a message that say something, as one."""
    lines = [line.strip() for line in problem.split("\n<state>")[0].splitlines()]
    return " ".join(line for line in lines if line.strip("^|0123456789 "))[:200]
