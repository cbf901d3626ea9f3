"""Texts to embeddings: what stands around a text, prompts, and what is refused. models/ compares the numbers."""

import numpy as np
import pytest
from support import checkpoints
from support.toy_models import ToyModel

import minigemma as mg


class Letters:
    """A tokenizer with an id per letter."""

    bos, eos, size, start_of_turn = 2, 1, checkpoints.VOCAB, None

    def encode(self, text):
        return [4 + ord(letter) % 100 for letter in text]


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    found = mg.load(checkpoints.write_embedding(tmp_path_factory.mktemp("embedding") / "model"))
    found.tokenizer = Letters()
    return found


def test_a_row_per_text_between_bos_and_eos(model):
    rows = mg.embed(model, ["a cow", "two cows", "a cow"])
    assert rows.dtype == np.float32 and rows.shape == (3, 24)
    np.testing.assert_allclose(np.linalg.norm(rows, axis=1), 1, rtol=1e-6)
    np.testing.assert_array_equal(rows[0], model.embed([2, *Letters().encode("a cow"), 1]))
    np.testing.assert_array_equal(rows[0], rows[2])
    assert rows[0] @ rows[1] < 0.999


def test_one_text_and_none(model):
    np.testing.assert_array_equal(mg.embed(model, "a cow"), mg.embed(model, ["a cow"]))
    assert mg.embed(model, []).shape == (0, 24)


def test_a_prompt_stands_in_front_of_the_text(model):
    for name, prompt in checkpoints.PROMPTS.items():
        np.testing.assert_array_equal(mg.embed(model, ["cow"], name), mg.embed(model, [f"{prompt}cow"]))


def test_blanks_around_prompt_and_text_are_dropped(model):
    """As sentence-transformers does."""
    np.testing.assert_array_equal(mg.embed(model, [" a cow\n"]), mg.embed(model, ["a cow"]))


def test_the_default_prompt_is_the_one_the_checkpoint_names(tmp_path):
    path = checkpoints.write_embedding(tmp_path / "model") / "config_sentence_transformers.json"
    path.write_text(path.read_text().replace("null", '"query"'))
    model = mg.load(tmp_path / "model")
    model.tokenizer = Letters()
    np.testing.assert_array_equal(mg.embed(model, ["cow"]), mg.embed(model, ["cow"], "query"))


def test_what_cannot_be_embedded_is_refused(model, monkeypatch):
    with pytest.raises(ValueError, match="prompt_name is 'title'; this checkpoint has document, query"):
        mg.embed(model, ["cow"], "title")
    with pytest.raises(ValueError, match="a text has 65 tokens and the context holds 64; shorten it: 'cccc"):
        mg.embed(model, ["c" * 63])
    with pytest.raises(ValueError, match="is no encoder; take EmbeddingGemma"):
        mg.embed(ToyModel(lambda history: np.zeros(9)), ["cow"])
    monkeypatch.setattr(model, "tokenizer", None)
    with pytest.raises(ValueError, match=r"has no tokenizer\.model"):
        mg.embed(model, ["cow"])
