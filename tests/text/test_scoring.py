"""Scores against closed forms, and against the toy's own distribution one token at a time."""

import math

import numpy as np
import pytest
from support.toy_models import ToyModel, ToyTokenizer, chaotic, talker

import minigemma as mg
from minigemma.text.scoring import TOGETHER


def uniform(size, **flags):
    return ToyModel(lambda history: np.zeros(size), **flags)


def test_a_model_that_knows_nothing_is_as_perplexed_as_it_has_tokens():
    result = mg.score(uniform(37), [1, 2, 3, 4, 5])
    np.testing.assert_allclose(result.logprobs, -math.log(37), rtol=1e-6)
    assert result.perplexity == pytest.approx(37, rel=1e-5)


def test_perplexity_is_the_inverse_of_the_geometric_mean():
    """Probabilities 1/2 and 1/8 by turns: √16 = 4."""

    def rule(history):
        likely = 0.5 if len(history) % 2 else 0.125
        return np.log([likely, (1 - likely) / 2, (1 - likely) / 2])

    assert mg.score(ToyModel(rule, context=201), [0] * 201).perplexity == pytest.approx(4, rel=1e-5)


@pytest.mark.parametrize("count", [2, 3, TOGETHER, TOGETHER + 1, TOGETHER + 2, 2 * TOGETHER + 1, 2 * TOGETHER + 2])
def test_every_token_is_scored_by_those_before_it_across_the_pieces(count):
    model = ToyModel(chaotic(61), context=1000)
    ids = np.random.default_rng(count).integers(0, 61, count).tolist()
    expected = []
    for at in range(1, count):
        logits = model.rule(ids[:at])
        expected.append(logits[ids[at]] - math.log(sum(math.exp(z) for z in logits)))
    result = mg.score(model, ids)
    assert result.ids == tuple(ids)
    assert result.logprobs.dtype == np.float32 and result.logprobs.shape == (count - 1,)
    np.testing.assert_allclose(result.logprobs, expected, atol=1e-5)
    assert max(model.fed) <= TOGETHER and sum(model.fed) == count - 1


def test_a_text_is_scored_behind_bos_and_is_what_its_ids_are():
    model = talker()
    text = mg.score(model, "Née")
    assert text.ids == (2, *model.tokenizer.encode("Née"))
    np.testing.assert_array_equal(text.logprobs, mg.score(model, np.array(text.ids)).logprobs)


@pytest.mark.parametrize("given, said", [("", "1 token to"), ([], "0 tokens to"), ([5], "1 token to")])
def test_there_must_be_something_to_score(given, said):
    with pytest.raises(ValueError, match=f"^{said} score; it takes two"):
        mg.score(talker(), given)


def test_a_text_may_fill_the_context_but_not_pass_it():
    model = uniform(7, context=10)
    assert len(mg.score(model, [1] * 10).logprobs) == 9
    with pytest.raises(ValueError, match="the text has 11 tokens and the context holds 10"):
        mg.score(model, [1] * 11)


def test_without_a_tokenizer_only_ids_can_be_scored():
    with pytest.raises(ValueError, match="give the text as token ids"):
        mg.score(uniform(7), "text")


def test_what_cannot_happen_makes_the_perplexity_infinite_and_warns_of_nothing():
    assert mg.score(ToyModel(lambda history: np.array([0.0, -1e4])), [0, 1]).perplexity == math.inf


def test_scoring_keeps_rows_that_no_token_has():
    """The model's own distribution: nothing is masked."""
    model = uniform(300, tokenizer=ToyTokenizer(), limit=200)
    np.testing.assert_allclose(mg.score(model, [4, 5]).logprobs, -math.log(300), rtol=1e-6)


def test_the_choice_among_answers_is_the_softmax_of_their_logits():
    model = talker()
    yes, no = (model.tokenizer.encode(answer)[0] for answer in "yn")
    ids = [2, *model.tokenizer.encode("Is it so?")]
    logits = np.array([model.rule(ids)[token] for token in (yes, no)], np.float64)
    found = mg.choose(model, "Is it so?", ["y", "n"])
    assert found.dtype == np.float32
    np.testing.assert_allclose(found, np.exp(logits) / np.exp(logits).sum(), rtol=1e-5)
    np.testing.assert_array_equal(found, mg.choose(model, ids, ["y", "n"]))


def test_choices_are_scored_as_what_follows_the_text():
    model, choices = talker(), ["y", "yes", "né"]
    ids = [2, *model.tokenizer.encode("Is it so?")]
    found = mg.score_choices(model, "Is it so?", choices)
    for choice, logprob in zip(choices, found, strict=True):
        tokens = model.tokenizer.encode(choice)
        assert logprob == pytest.approx(mg.score(model, ids + tokens).logprobs[-len(tokens) :].sum(), abs=1e-4)
    np.testing.assert_allclose(mg.choose(model, ids, choices), np.exp(found) / np.exp(found).sum(), rtol=1e-5)


@pytest.mark.parametrize(
    "model, choices, told",
    [
        (uniform(37), ["y"], "has no tokenizer"),
        (talker(), "yes", "answers is one text"),
        (talker(), [], "answers is empty"),
        (talker(), ["y", ""], "an answer is empty"),
        (talker(context=3), ["y", "yes"], "have 4 tokens and the context holds 3"),
    ],
)
def test_choices_that_cannot_be_scored_are_refused(model, choices, told):
    with pytest.raises(ValueError, match=told):
        mg.score_choices(model, [2, 5], choices)


@pytest.mark.parametrize("bos", [True, False])
@pytest.mark.parametrize("stride, count", [(1, 30), (4, 30), (8, 29), (8, 16), (8, 17)])
def test_a_stride_scores_each_token_after_as_many_as_the_context_holds(stride, count, bos):
    model = ToyModel(chaotic(61), context=16)
    ids = [2 if bos else 7, *np.random.default_rng(count).integers(3, 61, count - 1).tolist()]
    calls = []
    found = mg.score(model, ids, stride=stride, progress=lambda *done: calls.append(done))
    assert calls[-1] == (count, count)
    assert found.ids == tuple(ids) and len(found.logprobs) == count - 1
    for at in range(1, count):
        end = 16 if at < 16 else min(16 + (at - 16) // stride * stride + stride, count)
        first = 0 if at < 16 else end - (15 if bos else 16)
        before = ids[:at] if at < 16 else ids[:1] * bos + ids[first:at]
        logits = model.rule(before)
        expected = logits[ids[at]] - math.log(sum(math.exp(z) for z in logits))
        assert found.logprobs[at - 1] == pytest.approx(expected, abs=1e-5)


@pytest.mark.parametrize("stride", [0, 9, 2.0, "4"])
def test_a_stride_is_at_most_half_the_context(stride):
    with pytest.raises(ValueError, match="it must be an integer from 1 to half the context, 8"):
        mg.score(ToyModel(chaotic(61), context=16), [2] * 30, stride=stride)
    with pytest.raises(ValueError, match="30 tokens and the context holds 16; shorten it, or score it with a stride"):
        mg.score(ToyModel(chaotic(61), context=16), [2] * 30)


@pytest.mark.parametrize("text", [b"hi", bytearray(b"hi"), memoryview(b"hi")])
def test_bytes_are_no_ids(text):
    with pytest.raises(ValueError, match="the text is bytes; decode it first"):
        mg.score(ToyModel(chaotic(300)), text)


@pytest.mark.parametrize("ids", [[2.0, 3.0], np.array([[2, 3]]), ["a", "b"], 5])
def test_what_is_neither_text_nor_ids_is_refused(ids):
    with pytest.raises(ValueError, match=r"the text (has entries that|is)"):
        mg.score(talker(), ids)
