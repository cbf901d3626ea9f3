"""What a page shows of a run: the same values as the model's, and heads that are silent."""

import json

import numpy as np
import pytest
from support.small_models import LOCAL_GLOBAL, RECURRENT

from minigemma.cli.random_weights import random_model
from minigemma.formulas.attention import softmax
from minigemma.formulas.sampling import Sampler
from minigemma.text.look import LENS_TOKENS, LONGEST, look

IDS = list(range(2, 22))


@pytest.fixture(scope="module", params=[LOCAL_GLOBAL, RECURRENT], ids=lambda config: config.family)
def model(request):
    return random_model(request.param, "f32")


def test_all_of_it_is_json_and_has_the_shapes_of_the_model(model):
    seen = look(model, IDS)
    c, summary = model.config, json.loads(json.dumps(seen.summary()))
    assert len(summary["tokens"]) == 20 and [layer["kind"] for layer in summary["layers"]] == [
        c.kind(i) for i in range(c.layers)
    ]
    for i, layer in enumerate(summary["layers"]):
        if layer["kind"] == "recurrent":
            assert np.shape(seen.half_lives(i)) == (20, 3) and layer["held"] is None
            with pytest.raises(ValueError, match=f"layer {i} has no attention"):
                seen.attention(i)
        else:
            probs = np.array(seen.attention(i))
            np.testing.assert_allclose(probs.sum(axis=2), 1, atol=0.02)
            assert probs.shape == (c.heads, 20, 20)
            assert layer["held"] == min(20, layer["window"] or 20)
            with pytest.raises(ValueError, match="is not recurrent"):
                seen.half_lives(i)


def test_after_the_last_layer_the_lens_is_the_models_own_prediction(model):
    lens = look(model, IDS).lens()
    probs = softmax(model.forward(IDS))[-LENS_TOKENS:]
    for ranks, p in zip(lens[-1], probs, strict=True):
        assert [int(token) for token, _ in ranks] == np.argsort(-p, kind="stable")[: len(ranks)].tolist()
        assert ranks[0][1] == pytest.approx(p.max(), abs=1e-3)


def test_a_silent_head_changes_the_next_token_and_no_earlier_layer(model):
    layer = next(i for i in range(model.config.layers) if model.config.kind(i) != "recurrent")
    plain, without = look(model, IDS), look(model, IDS, [(layer, 1)])
    assert (plain.logits != without.logits).any()
    assert plain.attention(layer) == without.attention(layer)  # the scores come before the head's output
    same = look(model, IDS, [])
    assert (plain.logits == same.logits).all()


def test_the_next_tokens_are_those_of_the_sampler(model):
    seen = look(model, IDS)
    tokens, probs = Sampler(temperature=0.7, top_k=5).candidates(seen.logits)
    assert dict(seen.next(Sampler(temperature=0.7, top_k=5))) == {
        str(t): float(p) for t, p in zip(tokens, probs, strict=True)
    }
    assert seen.next(Sampler(temperature=0)) == [(str(seen.logits.argmax()), 1.0)]


def test_too_long_a_text_and_heads_that_are_not_there_are_refused(model):
    with pytest.raises(ValueError, match=f"{LONGEST + 1} tokens; {LONGEST} can be shown"):
        look(model, [2] * (LONGEST + 1))
    with pytest.raises(ValueError, match="no head 9 in layer 2"):
        look(model, IDS, [(2, 9)])
