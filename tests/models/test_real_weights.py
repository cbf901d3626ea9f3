"""The real Gemma 3 270M: what it makes of prose is what transformers makes of it with the same weights.

The weights are the demo's GGUF file. The `gguf` package turns its blocks into float32, transformers runs those in
float32, and neither has a line in common with minigemma.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np
import pytest
from support import demo_answers
from support.compare import log_softmax_at

import minigemma as mg

LENGTHS = (66, 300, 1300)  # tokens; the window is 512, so that the last one passes it twice
PROMPTS = ("Once upon a time", "The three laws of thermodynamics are")
NEW_TOKENS = 40


class Oracle(NamedTuple):
    """What transformers says, by number of tokens and by prompt."""

    logprobs: dict[int, np.ndarray]
    continuations: dict[str, list[int]]


def logprobs_of_ours(model: Any, ids: np.ndarray) -> np.ndarray:
    cache = model.new_cache(len(ids))
    chunks = [
        log_softmax_at(model.forward(ids[i : i + 256], cache=cache)[: len(ids) - 1 - i], ids[i + 1 : i + 257])
        for i in range(0, len(ids) - 1, 256)
    ]
    return np.concatenate(chunks)


@pytest.fixture(scope="module")
def as_stored(demo_file):
    return mg.load(demo_file)


@pytest.fixture(scope="module")
def exact(demo_file, oracle):  # after the oracle, whose own gigabyte is free again by then
    return mg.load(demo_file, dtype="f32")


@pytest.fixture(scope="module")
def texts(as_stored, prose) -> dict[int, np.ndarray]:
    """Token ids by length: a part each from other pages of the prose, BOS first."""
    ids = as_stored.tokenizer.encode(prose)
    starts = {66: 700, 300: 1700, 1300: 0}
    made = {n: np.array([2, *ids[starts[n] : starts[n] + n - 1]]) for n in LENGTHS}
    assert all(len(part) == n for n, part in made.items()), f"the prose has only {len(ids)} tokens"
    return made


@pytest.fixture(scope="module")
def prompts(as_stored) -> dict[str, list[int]]:
    return {prompt: [2, *as_stored.tokenizer.encode(prompt)] for prompt in PROMPTS}


@pytest.fixture(scope="module")
def oracle(demo_file, texts, prompts, answers) -> Oracle:
    """transformers runs once; only its answers stay."""
    found = Oracle(
        {n: demo_answers.logprobs(demo_file, ids) for n, ids in texts.items()},
        {prompt: demo_answers.continuation(demo_file, ids, NEW_TOKENS) for prompt, ids in prompts.items()},
    )
    demo_answers.model_of.cache_clear()
    return found


def test_the_oracle_reads_prose_as_a_language_model_does(oracle):
    """A wrong oracle would agree with nothing but the same mistake: this one finds Austen and Carroll likely."""
    assert -4 < np.concatenate(list(oracle.logprobs.values())).mean() < -1


@pytest.mark.parametrize("tokens", LENGTHS)
def test_log_probabilities_as_stored(as_stored, texts, oracle, tokens):
    """The default mode: blocks of 8 bits, activations rounded where that is faster; 0.02 nats a token on average."""
    apart = np.abs(logprobs_of_ours(as_stored, texts[tokens]) - oracle.logprobs[tokens])
    assert apart.shape == (tokens - 1,)
    assert apart.mean() <= 0.02


@pytest.mark.parametrize("tokens", LENGTHS)
def test_log_probabilities_in_float32(exact, texts, oracle, tokens):
    apart = np.abs(logprobs_of_ours(exact, texts[tokens]) - oracle.logprobs[tokens])
    assert apart.shape == (tokens - 1,)
    assert apart.mean() <= 1e-3


def test_greedy_continuation_in_float32(exact, prompts, oracle):
    """Token by token through a cache, the likeliest each time."""
    ids = prompts[PROMPTS[0]]
    cache = exact.new_cache(len(ids) + NEW_TOKENS)
    made = [int(exact.forward(ids, cache=cache, last_only=True).argmax())]
    while len(made) < NEW_TOKENS:
        made.append(int(exact.forward(made[-1:], cache=cache).argmax()))
    assert made == oracle.continuations[PROMPTS[0]]


def test_generate_writes_the_continuation_of_transformers(exact, oracle):
    text = mg.generate(exact, PROMPTS[1], max_new_tokens=NEW_TOKENS, temperature=0.0)
    assert text == exact.tokenizer.decode(oracle.continuations[PROMPTS[1]])
