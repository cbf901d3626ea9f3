"""Processors of logits in generation: what they see, in which order they run, and what is refused."""

import numpy as np
import pytest
from support.toy_models import BYTES, ToyModel, ToyTokenizer, letters, talker

import minigemma as mg
from minigemma.formulas.penalties import frequency_penalty, presence_penalty, repetition_penalty
from minigemma.formulas.sampling import log_softmax
from minigemma.text.generation import stream_generate

GREEDY = {"max_new_tokens": 12, "temperature": 0}


def tokens(model, prompt="Hello", **settings):
    return [piece.token for piece in stream_generate(model, prompt, **{**GREEDY, **settings})]


def by_hand(model, change, count=12):
    """Greedy tokens after "Hello" with change(ids, start, logits) before each."""
    ids = [2, *model.tokenizer.encode("Hello")]
    start = len(ids)
    for _ in range(count):
        ids.append(int(change(np.array(ids), start, model.rule(ids).astype(np.float32)).argmax()))
    return ids[start:]


@pytest.mark.parametrize(
    "settings, change",
    [
        ({"repetition_penalty": 1.7}, lambda ids, start, z: repetition_penalty(z, ids, 1.7)),
        ({"frequency_penalty": 4}, lambda ids, start, z: frequency_penalty(z, ids[start:], 4)),
        ({"presence_penalty": 4}, lambda ids, start, z: presence_penalty(z, ids[start:], 4)),
        ({"presence_penalty": -30}, lambda ids, start, z: presence_penalty(z, ids[start:], -30)),
    ],
)
def test_penalties_see_the_text_so_far(settings, change):
    model = letters(eos=())
    assert tokens(model, **settings) == by_hand(model, change)


def test_a_processor_sees_prompt_answer_and_what_the_cache_held_and_may_return_nothing():
    model, seen = talker(eos=()), []

    def note(ids, logits):
        seen.append(ids.tolist())
        assert not ids.flags.writeable and logits.dtype == np.float32
        logits[:] = 0
        logits[BYTES + len(seen)] = 1

    cache = model.new_cache(50)
    model.forward([2, 7], cache)
    made = tokens(model, [8, 9], cache=cache, logits_processors=[note], max_new_tokens=3)
    assert made == [BYTES + 1, BYTES + 2, BYTES + 3]
    assert seen == [[2, 7, 8, 9, *made[:i]] for i in range(3)]


def test_processors_run_one_after_the_other_after_the_bias():
    def double(ids, logits):
        assert logits[9] == 100 and logits[10] == -np.inf
        return logits * 2

    def check(ids, logits):
        assert logits[9] == 200

    model = ToyModel(lambda history: np.zeros(300), eos=())
    bias = {9: 100, 10: -np.inf}
    assert tokens(model, [2], logits_processors=[double, check], logit_bias=bias) == [9] * 12


def test_banned_ids_stay_so_whatever_a_processor_says():
    model = ToyModel(lambda history: np.zeros(300), eos=(), banned=(50,), limit=200)
    assert set(tokens(model, [2], logit_bias={50: 100, 250: 100, 60: 1})) == {60}


def test_logprobs_stay_those_of_the_model():
    model = letters(eos=())
    ids = [2, *model.tokenizer.encode("Hello")]
    for piece in stream_generate(model, "Hello", **GREEDY, repetition_penalty=3.0, top_logprobs=5):
        own = log_softmax(model.rule(ids)[None].astype(np.float32))[0]
        ids.append(piece.token)
        assert piece.logprob == pytest.approx(own[piece.token], abs=1e-5)
        best = np.argsort(-own, kind="stable")[:5]
        assert [token for token, _ in piece.top_logprobs] == best.tolist()
        np.testing.assert_allclose([logprob for _, logprob in piece.top_logprobs], own[best], atol=1e-5)


def test_without_top_logprobs_there_are_none():
    assert all(piece.top_logprobs == () for piece in stream_generate(talker(), "x", **GREEDY))


def test_the_checkpoints_repetition_penalty_holds_unless_another_is_given():
    model = letters(eos=())
    plain, changed = tokens(model), tokens(model, repetition_penalty=1.7)
    model.sampling = {"repetition_penalty": 1.7, "temperature": 0.7}
    assert plain != changed == tokens(model)
    assert tokens(model, repetition_penalty=1) == plain
    mg.generate(model, "x", max_new_tokens=2)  # the sampler has no such setting


def test_a_chat_takes_them_and_refuses_other_names():
    model = letters(context=500, eos=())
    one = mg.Chat(model, **GREEDY, frequency_penalty=5.0)
    assert one.send("hi") != mg.Chat(model, **GREEDY).send("hi")
    with pytest.raises(TypeError, match="frequency_penalties"):
        mg.Chat(model, frequency_penalties=5.0)
    with pytest.raises(TypeError, match="frequency_penalties"):
        mg.generate(model, "hi", frequency_penalties=5.0)


@pytest.mark.parametrize(
    "settings, message",
    [
        ({"repetition_penalty": 0}, "repetition_penalty is 0.0; it must be above 0"),
        ({"repetition_penalty": "1.2"}, "repetition_penalty is '1.2'; it must be a finite number"),
        ({"frequency_penalty": float("nan")}, "frequency_penalty is nan; it must be a finite number"),
        ({"presence_penalty": True}, "presence_penalty is True"),
        ({"logit_bias": [1]}, "logit_bias is no mapping"),
        ({"logit_bias": {300: 1}}, "names the token 300; an id is an integer from 0 to 261"),
        ({"logit_bias": {"5": 1}}, "names the token '5'"),
        ({"logit_bias": {5: float("inf")}}, "logit_bias of token 5 is inf"),
        ({"logits_processors": print}, "must be a list of functions"),
        ({"logits_processors": [3]}, "must be a list of functions"),
        ({"top_logprobs": -1}, "top_logprobs is -1; it must be from 0 to 262"),
        ({"regex": "a", "choices": ["b"]}, "one constraint at most, not regex and choices"),
    ],
)
def test_wrong_values_are_refused_at_once(settings, message):
    with pytest.raises(ValueError, match=message):
        stream_generate(talker(), "Hello", **settings)


@pytest.mark.parametrize("wrong", [lambda ids, z: 3, lambda ids, z: z[:5], lambda ids, z: "x"])
def test_a_processor_that_returns_something_else_is_refused(wrong):
    with pytest.raises(ValueError, match=r"a logits processor returned .*; it must be the logits, of shape"):
        mg.generate(talker(), "Hello", logits_processors=[wrong])


def test_a_processor_that_forbids_everything_is_told():
    with pytest.raises(ValueError, match="leave no token"):
        mg.generate(talker(), "Hello", logits_processors=[lambda ids, z: z - np.inf])


def test_a_toy_tokenizer_is_no_condition():
    assert tokens(ToyModel(lambda history: np.arange(300.0), ToyTokenizer(), limit=20), presence_penalty=1.0)
