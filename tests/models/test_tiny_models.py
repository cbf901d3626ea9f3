"""The trained tiny models that come with the repository: they predict their text, and transformers agrees."""

import lzma
from pathlib import Path

import numpy as np
import pytest
from support.transformers_answers import model_of, run

import minigemma as mg
from minigemma.train.sizes import TINY, config_named

WEIGHTS = Path(__file__).parents[2] / "weights"


def held_out():
    """The beginning of the book of Ecclesiastes, on which none of them was trained."""
    books = lzma.decompress((WEIGHTS / "texts" / "bible.txt.xz").read_bytes()).decode().split("\f")
    return next(book for book in books if book.startswith("Ecclesiastes 1"))[:2000]


@pytest.mark.parametrize("name", TINY)
def test_a_tiny_model_has_the_sizes_of_its_name_and_predicts_text_that_it_never_saw(name):
    model = mg.load(WEIGHTS / name)
    config, tokenizer = config_named(name)
    assert (model.config.family, model.config.axes) == (config.family, config.axes)
    assert model.tokenizer.model_bytes == tokenizer.model_bytes
    assert (WEIGHTS / name / "model.safetensors").stat().st_size < 5e6
    logprobs = mg.score(model, held_out()).logprobs
    assert -np.nanmean(logprobs) < 5.0  # a uniform guess has 7.6
    text = mg.generate(model, "In the beginning", max_new_tokens=20, temperature=0)
    assert text.strip() and text == mg.generate(model, "In the beginning", max_new_tokens=20, temperature=0)


@pytest.mark.oracle
@pytest.mark.parametrize("name", TINY)
def test_transformers_gives_the_same_logits_past_three_windows(name):
    ids = np.array([2, *config_named(name)[1].encode(held_out())][:250])
    expected = run(model_of(WEIGHTS / name), ids)
    found = mg.load(WEIGHTS / name, dtype="f32").forward(ids)
    assert abs(found - expected).max() < 1e-4 * abs(expected).max()
