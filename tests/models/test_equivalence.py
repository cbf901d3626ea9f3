"""One computation, done in two ways: by hypothesis, for whatever prompts, splits, lengths and texts it thinks of."""

from functools import cache
from itertools import pairwise

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import minigemma as mg
from minigemma.cli.random_weights import random_model
from minigemma.formulas.rglru import associative_scan, linear_scan, rg_lru
from minigemma.models.gemma2 import Gemma2Config
from minigemma.models.gemma3 import Gemma3Config
from minigemma.models.recurrentgemma import RecurrentGemmaConfig

MANY = settings(max_examples=25, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck))
SIZES = {"width": 64, "heads": 2, "kv_heads": 1, "head_dim": 32, "ffn_width": 96, "vocab": 300, "context": 256}
CONFIGS = {
    "gemma2": Gemma2Config(**SIZES, layers=2, window=8),
    "gemma3": Gemma3Config(**SIZES, layers=3, window=8, pattern=3, rope_scale=8.0),
    "recurrentgemma": RecurrentGemmaConfig(**SIZES, layers=3, lru_width=64, gate_blocks=2, window=8),
}
ids = st.lists(st.integers(0, 299), min_size=1, max_size=70)
cuts = st.lists(st.integers(1, 69), max_size=6)


@cache
def model(family, layers=None):
    return random_model(CONFIGS[family], "f32", layers=layers)


def near(got, expected):
    np.testing.assert_allclose(got, expected, atol=5e-6 * abs(expected).max())


@pytest.mark.parametrize("family", CONFIGS)
@MANY
@given(ids=ids, cuts=cuts)
def test_a_prompt_in_any_pieces(family, ids, cuts):
    """Logits and what is remembered are those of one piece, however the prompt is cut: also past several windows."""
    whole, parts = model(family).new_cache(80), model(family).new_cache(80)
    expected = model(family).forward(ids, whole)
    edges = sorted({0, len(ids), *(cut for cut in cuts if cut < len(ids))})
    got = [model(family).forward(ids[a:b], parts) for a, b in pairwise(edges)]
    near(np.concatenate(got), expected)
    near(model(family).forward([7], parts), model(family).forward([7], whole))


@pytest.mark.parametrize("family", CONFIGS)
@pytest.mark.parametrize("layers", [1, 3])  # of RecurrentGemma a recurrent block is last, or attention
@MANY
@given(ids=ids, more=ids)
def test_the_last_token_alone(family, layers, ids, more):
    """Where only the last logits are asked for, the last layer makes no others, and yet remembers all tokens."""
    whole, last = model(family, layers).new_cache(160), model(family, layers).new_cache(160)
    for some in (ids, more):
        expected = model(family, layers).forward(some, whole)
        near(model(family, layers).forward(some, last, last_only=True), expected[-1:])
    near(model(family, layers).forward([7, 8], last), model(family, layers).forward([7, 8], whole))


@MANY
@given(ids=ids, cuts=cuts)
def test_a_ring_against_a_cache_that_forgets_nothing(ids, cuts):
    """A local layer's ring keeps 8 keys; with all keys kept, the window alone hides the others."""
    ring, full = model("gemma3").new_cache(80), model("gemma3").new_cache(80)
    for layer in full.layers:
        layer.limit = 80
    edges = sorted({0, len(ids), *(cut for cut in cuts if cut < len(ids))})
    for a, b in pairwise(edges):
        near(model("gemma3").forward(ids[a:b], ring), model("gemma3").forward(ids[a:b], full))
    assert len(ring.layers[0].keys) <= 8 and len(full.layers[0].keys) >= min(len(ids), 80)


@MANY
@given(
    tokens=st.integers(1, 90),
    width=st.integers(1, 70),
    seed=st.integers(0, 999),
    start=st.booleans(),
    cut=st.integers(0, 90),
)
def test_scan_loop_and_tree(tokens, width, seed, start, cut):
    rng = np.random.default_rng(seed)
    x, recurrence, gate = rng.standard_normal((3, tokens, width)).astype(np.float32)
    rate, state = rng.uniform(1e-4, 0.02, width).astype(np.float32), rng.standard_normal(width).astype(np.float32)
    expected = rg_lru.formula(x, recurrence, gate, rate, state, start)
    near(rg_lru(x, recurrence, gate, rate, state, start), expected)
    cut = min(cut, tokens - 1)
    if cut:  # a state that is carried on
        first = rg_lru(x[:cut], recurrence[:cut], gate[:cut], rate, state, start)
        near(rg_lru(x[cut:], recurrence[cut:], gate[cut:], rate, first[-1].copy(), False), expected[cut:])
    decay = rng.uniform(0.5, 1, (tokens, width)).astype(np.float32)
    loop = linear_scan.formula(x, decay, state)
    near(linear_scan(x, decay, state), loop)
    np.testing.assert_allclose(associative_scan(x, decay, state), loop, atol=1e-4 * max(1, abs(loop).max()))


@pytest.fixture(scope="module")
def tokenizer(demo_file):
    return mg.load(demo_file).tokenizer


@settings(MANY, max_examples=200)
@given(data=st.data())
def test_streamed_text_is_the_text_of_all_ids(tokenizer, data):
    """Any ids, in any order: bytes that make no letter, letters cut over tokens, control tokens, unused ones."""
    bytes_and_marks = st.integers(0, 700)  # control tokens, newlines and blanks, the 256 single bytes
    ids = data.draw(st.lists(st.one_of(bytes_and_marks, st.integers(0, tokenizer.size - 1)), max_size=40))
    stream = tokenizer.stream()
    assert "".join([stream.push(i) for i in ids] + [stream.flush()]) == tokenizer.decode(ids)


@settings(MANY, max_examples=200)
@given(text=st.text(max_size=60))
def test_a_text_comes_back_however_it_is_streamed(tokenizer, text):
    text = (
        text.encode("utf-8", "replace").decode().replace("\u2581", " ")
    )  # U+2581 is how the vocabulary writes a blank
    stream = tokenizer.stream()
    assert "".join([stream.push(i) for i in tokenizer.encode(text)] + [stream.flush()]) == text
