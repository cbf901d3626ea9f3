"""The tiny models are as small as they say, and a training's sizes come by name or from a config.json."""

import json
from dataclasses import replace

import pytest
from support.tokenizers import ways_in

from minigemma.files.save import save_model
from minigemma.train.initial import initial_parameters
from minigemma.train.sizes import TINY, config_named


@pytest.mark.parametrize("config", TINY.values(), ids=lambda config: config.name)
def test_a_tiny_model_fits_a_repository(config):
    assert 1e6 < config.non_embedding_parameters < 2e6
    assert 2 * (config.non_embedding_parameters + config.embedding_parameters) < 4.9e6
    assert {config.kind(layer) for layer in range(config.layers)} > {"local"}


@pytest.fixture
def folder(tmp_path):
    config = replace(TINY["tiny-gemma-2"], vocab=ways_in()[1].size)
    save_model(tmp_path / "model", config, initial_parameters(config, 0), ways_in()[1])
    return tmp_path / "model"


def test_sizes_come_from_a_config_and_from_a_folder(folder):
    for name in (folder, folder / "config.json", str(folder / "config.json")):
        config, tokenizer = config_named(name)
        stated = {"query_pre_attn_scalar": 32.0, "vocab": 700}
        assert config == replace(TINY["tiny-gemma-2"], name="", **stated) and tokenizer.size == 700


def test_a_tiny_model_takes_another_vocabulary(folder):
    config, tokenizer = config_named("tiny-gemma-3", vocabulary=folder)
    assert config == replace(TINY["tiny-gemma-3"], vocab=700) and tokenizer.size == 700


def test_a_config_without_a_tokenizer_or_with_too_few_rows_is_refused(folder):
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text("utf-8")) | {"vocab_size": 699}), "utf-8")
    with pytest.raises(ValueError, match="vocab_size is 699, and the tokenizer has 700 pieces"):
        config_named(path)
    for name in ("tokenizer.model", "tokenizer.json"):
        (folder / name).unlink()
    with pytest.raises(ValueError, match=r"has neither tokenizer\.model nor tokenizer\.json"):
        config_named(path)
