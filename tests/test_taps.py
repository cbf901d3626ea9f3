"""Taps: named values of a run, by glob, and nothing when nothing is asked for."""

import importlib.util
from pathlib import Path

import numpy as np
import pytest
from test_load import CONFIGS, ids, random_weights, write_folder

import minigemma as mg

DOCS = Path(__file__).parents[1] / "docs"


@pytest.fixture(scope="module", params=["gemma", "gemma2", "gemma3"])
def model(request, tmp_path_factory):
    config = CONFIGS[request.param]
    return mg.load(write_folder(tmp_path_factory.mktemp("hf") / "model", config, random_weights(config)))


def test_values_come_by_name_and_pattern(model):
    taps = mg.Taps("embedding", "blocks.*.residual.out", "blocks.1.attention.?")
    model.forward(ids, taps=taps)
    expected = {"embedding", *(f"blocks.{i}.residual.out" for i in range(model.config.layers))}
    assert set(taps) == expected | {f"blocks.1.attention.{name}" for name in "qkv"}
    assert taps["blocks.1.attention.q"].shape == (40, 4, 64)
    assert taps["blocks.1.attention.k"].shape == (40, 2, 64)


def test_attention_probabilities_are_a_distribution_over_the_window(model):
    taps = mg.Taps("blocks.0.attention.probs")
    model.forward(ids, taps=taps)
    probs = taps["blocks.0.attention.probs"]  # [N, T, S]
    np.testing.assert_allclose(probs.sum(-1), 1, atol=1e-5)
    window = model.config.attention(0).window or len(ids)
    distance = np.arange(len(ids))[:, None] - np.arange(len(ids))[None]
    hidden = (distance < 0) | (distance >= window)
    assert not probs[:, hidden].any()
    assert (probs[:, ~hidden] > 0).all()


def test_logits_are_the_same_with_and_without_taps(model):
    taps = mg.Taps("*")
    tapped = model.forward(ids, taps=taps)
    np.testing.assert_allclose(model.forward(ids), tapped, atol=1e-5 * np.abs(tapped).max())
    assert (taps["logits"] == tapped).all()
    last = f"blocks.{model.config.layers - 1}.residual.out"
    assert taps[last].shape == (40, 256)


def test_a_pattern_that_nothing_is_named_by_is_refused_with_the_nearest_names(model):
    with pytest.raises(ValueError, match=r"'block\.\*\.residual\.out'; the nearest are blocks\.\d\.residual"):
        model.forward(ids, taps=mg.Taps("logits", "block.*.residual.out"))


def test_public_names_are_listed_and_objects_say_what_they_are(model):
    assert {"load", "generate", "Chat", "Taps", "score"} <= set(dir(mg))
    assert repr(model).startswith(f"<{type(model).__name__} ") and "layers, width 256" in repr(model)
    assert repr(model.new_cache(8)).startswith("<Cache: 0 of 8 tokens")
    assert repr(mg.Chat(model)) == f"<Chat with {model.name or 'a model'}: 0 messages>"


def test_without_patterns_nothing_is_kept(model):
    taps = mg.Taps()
    model.forward(ids, taps=taps)
    assert taps == {}


def test_the_table_in_the_docs_is_made_from_the_code():
    spec = importlib.util.spec_from_file_location("make_taps", DOCS / "make_taps.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    assert module.table() == (DOCS / "taps.md").read_text("utf-8"), "python docs/make_taps.py > docs/taps.md"
