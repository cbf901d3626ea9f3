"""Texts that are written together: each is the text of its prompt alone."""

import numpy as np
import pytest

import minigemma as mg
from minigemma.cli.random_weights import random_model
from minigemma.text.batch import started, together
from tests.support.small_models import EYES, LOCAL_GLOBAL, RECURRENT, SEEING

PROMPTS = [np.random.default_rng(i).integers(3, 300, 1 + 5 * i).tolist() for i in range(5)]


def tokens_of(pieces):
    found = [[] for _ in PROMPTS]
    for piece in pieces:
        found[piece.index].append(piece.token)
    return found


@pytest.mark.parametrize("config", [LOCAL_GLOBAL, RECURRENT], ids=lambda config: config.family)
@pytest.mark.parametrize("together", [1, 3, 16])
@pytest.mark.parametrize("sampling", [{"temperature": 0}, {"temperature": 1.0, "top_k": 20, "seed": 7}])
def test_each_text_is_that_of_its_prompt_alone(config, together, sampling):
    """30 tokens pass the window of 8 three times; texts that end early let the next prompt join."""
    model = random_model(config, "f32")
    found = tokens_of(mg.generate_batch(model, PROMPTS, max_together=together, max_new_tokens=30, **sampling))
    for i, prompt in enumerate(PROMPTS):
        alone = sampling | ({"seed": 7 + i} if "seed" in sampling else {})
        pieces = mg.stream_generate(model, prompt, max_new_tokens=30, **alone)
        assert found[i] == [piece.token for piece in pieces]


def test_penalties_see_each_text_alone():
    model, settings = (
        random_model(LOCAL_GLOBAL, "f32"),
        {"max_new_tokens": 20, "temperature": 0, "repetition_penalty": 5.0},
    )
    found = tokens_of(mg.generate_batch(model, PROMPTS, frequency_penalty=1.0, **settings))
    for prompt, tokens in zip(PROMPTS, found, strict=True):
        alone = mg.stream_generate(model, prompt, frequency_penalty=1.0, **settings)
        assert tokens == [piece.token for piece in alone]


def test_prompts_with_images_beside_others():
    """None, one and two images; 40 tokens pass the window of 8 three times."""
    model, random = random_model(SEEING, "f32"), np.random.default_rng(0)
    images = [random.uniform(-1, 1, (n, 3, EYES.side, EYES.side)).astype(np.float32) for n in (0, 1, 2)]
    image = [EYES.start_token, *[EYES.image_token] * EYES.tokens, EYES.end_token]
    prompts = [[2, 5, *image * len(some), 6] for some in images]
    sampling = {"max_new_tokens": 40, "temperature": 0}
    found = tokens_of(mg.generate_batch(model, prompts, images, **sampling))
    for prompt, some, got in zip(prompts, images, found, strict=False):
        assert got == [piece.token for piece in mg.stream_generate(model, prompt, some, **sampling)]


def failing(ids, logits):
    """A processor that works for three tokens of prompt 2, the one with 11 ids."""
    if len(ids) == 14:
        raise ValueError("a processor failed")
    return logits


def test_an_answer_that_fails_leaves_the_others_as_they_are():
    model, settings = random_model(LOCAL_GLOBAL, "f32"), {"max_new_tokens": 6, "temperature": 0}
    told, steered = [], settings | {"logits_processors": [failing]}
    pieces = together(model, lambda i: started(model, PROMPTS[i], **steered), 3, 3, lambda *what: told.append(what))
    found = tokens_of(pieces)
    whole = [[piece.token for piece in mg.stream_generate(model, prompt, **settings)] for prompt in PROMPTS[:3]]
    assert found[:2] == whole[:2] and found[2] == whole[2][:3]
    assert [(i, str(error)) for i, error in told] == [(2, "a processor failed")]
    with pytest.raises(ValueError, match="a processor failed"):
        list(mg.generate_batch(model, PROMPTS[:3], **steered))


def test_the_last_piece_of_each_says_why_it_ended():
    pieces = list(mg.generate_batch(random_model(LOCAL_GLOBAL, "f32"), PROMPTS, max_new_tokens=4, temperature=0))
    for i in range(len(PROMPTS)):
        reasons = [piece.finish_reason for piece in pieces if piece.index == i]
        assert reasons[-1] in ("stop", "length") and not any(reasons[:-1])


def test_prompts_may_be_an_array():
    model, prompts = random_model(LOCAL_GLOBAL, "f32"), np.array([[5, 6], [7, 8]])
    pieces = mg.generate_batch(model, prompts, max_new_tokens=2, temperature=0)
    assert sorted(piece.index for piece in pieces) == [0, 0, 1, 1]


def test_no_prompts_no_pieces():
    assert list(mg.generate_batch(random_model(LOCAL_GLOBAL, "f32"), [])) == []


@pytest.mark.parametrize(
    "wrong, told",
    [
        ({"prompts": "one text"}, "give a list"),
        ({"seed": [1, 2]}, "seeds for 2 prompts"),
        ({"images": [()]}, "images for 1 prompts"),
        ({"max_together": 0}, "max_together is 0"),
        ({"max_together": "all"}, "max_together is of type str; give an integer"),
        ({"prompts": 3}, "prompts is 3; give a list of texts"),
        ({"cache": None}, "cache is for one text alone"),
    ],
)
def test_wrong_arguments_are_refused_at_once(wrong, told):
    with pytest.raises(ValueError, match=told):
        mg.generate_batch(random_model(LOCAL_GLOBAL, "f32"), **({"prompts": PROMPTS} | wrong))
