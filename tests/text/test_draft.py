"""Drafts: the text is that of the model alone, whatever is guessed; and caches are what they would be without."""

import numpy as np
import pytest
from support.toy_models import ToyModel, ToyTokenizer, letters, talker

import minigemma as mg
from minigemma.cache import Cache, KeyValueRing, RecurrentState
from minigemma.cli.random_weights import random_model
from minigemma.text import draft as drafts
from minigemma.text.draft import look_up
from minigemma.text.generation import stream_generate
from tests.support.small_models import LOCAL_GLOBAL, RECURRENT, TINY_GEMMA3

CONFIGS = [TINY_GEMMA3, LOCAL_GLOBAL, RECURRENT]
PROMPT = [5, 6, 7, 8, 9, 5, 6, 7]


def tokens(model, prompt=PROMPT, count=40, **settings):
    pieces = stream_generate(model, prompt, **{"max_new_tokens": count, "temperature": 0, **settings})
    return [piece.token for piece in pieces]


@pytest.fixture
def always(monkeypatch):
    """Guesses that do not pay are made too."""
    monkeypatch.setattr(drafts.Ahead, "_best_size", lambda ahead: drafts.SIZES[-1])


def test_the_latest_place_of_the_longest_end_is_looked_up():
    assert look_up(np.array([1, 2, 3, 9, 1, 2, 3, 8, 4, 2, 3]), 3) == [8, 4, 2]
    assert look_up(np.array([1, 2, 3, 9, 7, 2, 3, 8, 1, 2, 3]), 2) == [9, 7]  # three tokens before two
    assert look_up(np.array([4, 4, 4, 4]), 8) == [4]
    for none in ([1, 2, 3], [2, 3], [3], [1, 3, 2, 3]):
        assert look_up(np.array(none), 5) == []


@pytest.mark.parametrize("config", CONFIGS, ids=lambda config: config.family)
@pytest.mark.parametrize("kind", ["prompt", "itself", "another", "nearly"])
def test_greedy_text_and_cache_are_those_of_the_model_alone(config, kind, always):
    """40 tokens pass the windows of 7 and 8 more than three times."""
    model = random_model(config, "f32")
    others = {"itself": model, "another": random_model(config, "f32", seed=3), "prompt": "prompt"}
    changed = {"final_norm": model.weights.final_norm + np.float32(0.3) * (np.arange(config.width) % 7 == 0)}
    draft = others.get(kind) or model.with_weights(changed)
    alone, ahead = model.new_cache(80), model.new_cache(80)
    expected = tokens(model, cache=alone)
    assert tokens(model, cache=ahead, draft=draft) == expected
    np.testing.assert_array_equal(ahead.ids, alone.ids)
    again = [expected[-1], 4, 5]
    np.testing.assert_allclose(model.forward(again, ahead), model.forward(again, alone), atol=1e-4)


def passes(model, **settings):
    """How many calls of `forward` an answer takes."""
    model.fed = []
    tokens(model, **settings)
    return len(model.fed)


def test_right_guesses_save_passes_and_wrong_ones_cost_few(monkeypatch):
    loop = ToyModel(lambda history: 9.0 * (np.arange(300) == 4 + len(history) % 5), eos=())
    wild = ToyModel(lambda history: -9.0 * (np.arange(300) == 4 + len(history) % 5), eos=())
    settings = {"count": 100, "prompt": [7, 8, 4, 5, 6, 7, 8]}
    assert passes(loop, **settings) == 100
    monkeypatch.setattr(drafts, "running_seconds", lambda: len(loop.fed))  # a pass takes as long as one of a token
    assert passes(loop, draft="prompt", **settings) < 25
    monkeypatch.setattr(drafts, "running_seconds", lambda: sum(loop.fed))  # a token of a pass takes as long as alone
    assert passes(loop, draft="prompt", **settings) > 25
    monkeypatch.setattr(drafts, "running_seconds", lambda: sum(wild.fed))
    expected = tokens(wild, count=190)
    wild.fed = []
    assert tokens(wild, count=190, draft=loop) == expected
    assert 0 < sum(count > 1 for count in wild.fed[1:]) < 5


def test_the_cache_holds_no_guess_after_a_stop_a_close_or_an_interrupt():
    model = letters(eos=())
    for draft in ("prompt", letters(eos=())):
        for end in (3, 7, 11):
            cache = model.new_cache(100)
            pieces = stream_generate(model, "abcabc", max_new_tokens=30, temperature=0, cache=cache, draft=draft)
            said = [next(pieces).token for _ in range(end)]
            pieces.close()
            assert cache.ids.tolist() == [2, *model.tokenizer.encode("abcabc"), *said[:-1]]
        model.fed, model.interrupt_at = [], 3
        cache = model.new_cache(100)
        with pytest.raises(KeyboardInterrupt):
            list(stream_generate(model, "abcabc", max_new_tokens=30, temperature=0, cache=cache, draft=draft))
        model.interrupt_at = None
        begun = cache.ids[7:].tolist()
        assert begun == tokens(model, "abcabc")[: len(begun)]


@pytest.mark.parametrize("draft", ["prompt", "model"])
def test_a_seed_gives_the_text_that_it_gives_without(draft):
    model, other = talker(eos=()), talker(eos=())
    settings = {"temperature": 0.4, "top_k": 9, "seed": 3, "repetition_penalty": 1.2}
    drawn = tokens(model, "ababab", draft=other if draft == "model" else draft, **settings)
    assert drawn == tokens(model, "ababab", **settings)


def test_tokens_are_drawn_from_the_models_own_distribution(always):
    """χ² of each token by the one before it, 20 degrees of freedom: above 45.3 once in a thousand."""
    rows = [[0.1, 0.2, 0.3, 0.25, 0.15], [0.5, 0.1, 0.1, 0.1, 0.2], [0.2] * 5, [0.05, 0.35, 0.2, 0.2, 0.2]]
    p = np.array([*rows, [0.6, 0.1, 0.1, 0.1, 0.1]])
    model, guesser = (ToyModel(lambda h, k=k: np.log(p)[h[-1]] * k, limit=5, eos=(), context=2000) for k in (1, 2))
    model.config.vocab = guesser.config.vocab = 5
    for draft in ("prompt", guesser):
        model.fed = []
        drawn = tokens(model, [0, 4], count=600, temperature=1.0, top_k=5, top_p=1.0, draft=draft)
        assert sum(count > 1 for count in model.fed) > 100  # passes with guesses
        seen = np.zeros((5, 5))
        np.add.at(seen, (drawn[:-1], drawn[1:]), 1)
        expected = p * seen.sum(axis=1, keepdims=True)
        assert ((seen - expected) ** 2 / expected).sum() < 45.3


def test_a_ring_and_a_state_go_back():
    rng = np.random.default_rng(0)
    ring, state = KeyValueRing(6, 1, 2, np.float32), RecurrentState(3, 4)
    cache = Cache((ring,), 50)

    def put(count):
        rows = rng.standard_normal((count, 1, 2)).astype(np.float32)
        ring.extend(rows, rows, cache.position)
        cache.advance(range(count))

    for before in (3, 9):
        put(before)
        mark, whole = cache.mark(5), cache.copy()
        put(5)
        cache.rewind(mark, mark.position)
        np.testing.assert_array_equal(ring.keys[:before], whole.layers[0].keys[:before])
        assert cache.position == whole.position
    cache, (tail, h) = Cache((state,), 50), state.read()
    mark = cache.mark(4)
    state.propose(tail + 1, h + 1)
    cache.advance(range(4))
    cache.rewind(mark, 2)
    assert cache.position == 0 and state.read() == (tail, h)


@pytest.mark.parametrize(
    "settings, message",
    [
        ({"draft": "promt"}, "draft is 'promt'; it must be 'prompt' or a loaded model"),
        ({"draft": 4}, "draft is 4"),
        ({"draft": "prompt", "taps": mg.Taps("*")}, "goes without taps"),
        ({"draft": talker(), "taps": mg.Taps("*")}, "without taps and images"),
        ({"draft": ToyModel(lambda history: np.zeros(262))}, "has another tokenizer than toy"),
        ({"draft": ToyModel(lambda history: np.zeros(262), ToyTokenizer(["a"]))}, "has another tokenizer than toy"),
    ],
)
def test_wrong_drafts_are_refused_at_once(settings, message):
    with pytest.raises(ValueError, match=message):
        stream_generate(talker(), "Hello", **settings)
    with pytest.raises(ValueError, match="draft is for one text alone"):
        mg.generate_batch(talker(), ["Hello"], draft="prompt")


def test_a_chat_goes_on_with_a_draft():
    settings = {"max_new_tokens": 30, "temperature": 0}
    plain, ahead = mg.Chat(letters(context=900), **settings), mg.Chat(letters(context=900), draft="prompt", **settings)
    for text in ("hello", "hello hello", "and again"):
        assert ahead.send(text) == plain.send(text)
