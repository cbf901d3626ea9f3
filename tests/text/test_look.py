"""What a page shows of a run: the same values as the model's, and heads that are silent."""

import json

import numpy as np
import pytest
from support.small_models import LOCAL_GLOBAL, RECURRENT, SEEING

from minigemma.cli.random_weights import random_model
from minigemma.formulas.attention import softmax
from minigemma.formulas.sampling import Sampler
from minigemma.taps import Taps
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
            channels = json.loads(json.dumps(seen.channels(i)))
            count = len(channels.pop("channels"))
            assert {np.shape(each) for each in channels.values()} == {(20, count)} and layer["held"] is None
            assert all(0 <= np.min(channels[gate]) <= np.max(channels[gate]) <= 1 for gate in list(channels)[1:])
            with pytest.raises(ValueError, match=f"layer {i} has no attention"):
                seen.attention(i)
        else:
            probs = np.array(seen.attention(i))
            np.testing.assert_allclose(probs.sum(axis=2), 1, atol=0.02)
            assert probs.shape == (c.heads, 20, 20)
            assert layer["held"] == min(20, layer["window"] or 20)
            with pytest.raises(ValueError, match="is not recurrent"):
                seen.channels(i)


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


def test_channels_are_ordered_by_their_half_lives_and_have_the_models_decay():
    model = random_model(RECURRENT, "f32")
    layer = next(i for i in range(model.config.layers) if model.config.kind(i) == "recurrent")
    taps = Taps(f"blocks.{layer}.recurrent.decay")
    model.forward(IDS, taps=taps)
    found = look(model, IDS).channels(layer)
    half = np.log(0.5) / np.log(taps[f"blocks.{layer}.recurrent.decay"][1:, found["channels"]])  # <bos> has no state
    np.testing.assert_allclose(found["half_life"][1:], half, rtol=0.01, atol=0.01)
    assert (np.diff(np.median(found["half_life"], axis=0)) <= 0.01).all()


def test_tokens_of_images_are_shown_by_what_attends_to_them():
    model = random_model(SEEING, "f32")
    n, mark = model.config.vision.tokens, model.config.vision.image_token
    ids = [2, 5, *[mark] * n, 6, 7, *[mark] * n, 8]
    features = np.random.default_rng(0).standard_normal((2, n, model.config.width), np.float32)
    seen = look(model, ids, features=features)
    summary = seen.summary()
    assert summary["positions"] == [0, 1, 2 + n, 3 + n, 4 + 2 * n] and summary["images"] == [2, 4 + n]
    assert summary["image_tokens"] == n and len(summary["tokens"]) == 5
    taps = Taps("blocks.*.attention.probs")
    model.forward(ids, images=features, taps=taps)
    for layer in range(model.config.layers):
        probs = taps[f"blocks.{layer}.attention.probs"]
        to_images = np.array(seen.attention_to_images(layer, 4))
        np.testing.assert_allclose(to_images, [probs[:, -1, 2 : 2 + n], probs[:, -1, 4 + n : -1]], atol=1e-4)
        shown = np.array(seen.attention(layer))[:, -1].sum(axis=1) + to_images.sum(axis=(0, 2))
        np.testing.assert_allclose(shown, 1, atol=0.01)
    with pytest.raises(ValueError, match="there is no token 5"):
        seen.attention_to_images(0, 5)


def test_too_long_a_text_and_heads_that_are_not_there_are_refused(model):
    with pytest.raises(ValueError, match=f"{LONGEST + 1} tokens; {LONGEST} can be shown"):
        look(model, [2] * (LONGEST + 1))
    with pytest.raises(ValueError, match="no head 9 in layer 2"):
        look(model, IDS, [(2, 9)])
