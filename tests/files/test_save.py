"""A saved folder is the model that was saved: for minigemma bit for bit, for transformers within float32's rounding."""

import json
from dataclasses import replace

import numpy as np
import pytest
from support.checkpoints import FAMILIES, write, write_embedding, write_recurrent
from support.tokenizers import ways_in
from support.transformers_answers import libraries, model_of, run

import minigemma as mg
from minigemma.files.save import config_json, read_parameters, save_model
from minigemma.files.tokenizer_json import read_tokenizer_json
from minigemma.train.initial import initial_parameters
from minigemma.train.sizes import TINY

HARD = ["", " ", "\n", "a  b", "   x\n\n\ny", "né 🙂 \t tab", "12345 67,890", "<table> </b>", "ﷺ ½ \u200b"]
NOT_OURS = {"attention_dropout", "initializer_range", "use_cache", "w_init_variance_scale", "architectures"}
NOT_OURS |= {"final_w_init_variance_scale", "_sliding_window_pattern", "transformers_version", "hidden_act"}
OURS_ALONE = {"hidden_activation", "max_position_embeddings", "head_dim"}  # which some families' classes lack


def source(folder, family, dtype="f32"):
    return write_recurrent(folder, dtype) if family == "recurrent" else write(folder, family, dtype)


def tiny(name, tokenizer):
    return replace(TINY[name], vocab=tokenizer.size)


@pytest.mark.parametrize("dtype", ["f32", "bf16"])
@pytest.mark.parametrize("family", [*FAMILIES[:-1], "recurrent"])
def test_what_is_read_and_saved_again_is_the_same_model_and_config(family, dtype, tmp_path):
    folder = source(tmp_path / "one", family, dtype)
    config, parameters, _ = read_parameters(folder)
    save_model(tmp_path / "two", config, parameters, None, dtype)
    stated, again = (json.loads((f / "config.json").read_text("utf-8")) for f in (folder, tmp_path / "two"))
    for name in (stated.keys() | again.keys()) - NOT_OURS:
        if name in stated or name not in OURS_ALONE:
            assert (stated.get(name) or None) == (again.get(name) or None), name
    assert type(again.get("query_pre_attn_scalar")) is type(stated.get("query_pre_attn_scalar"))
    ids = np.arange(25) % config.vocab
    assert (mg.load(folder).forward(ids) == mg.load(tmp_path / "two").forward(ids)).all()


def test_a_head_of_its_own_is_kept(tmp_path):
    folder = write(tmp_path / "one", "gemma2", tied=False)
    config, parameters, _ = read_parameters(folder)
    save_model(tmp_path / "two", config, parameters, None, "f32")
    assert (mg.load(folder).forward([2, 5, 7]) == mg.load(tmp_path / "two").forward([2, 5, 7])).all()


@pytest.mark.parametrize("name", TINY)
def test_initial_parameters_and_the_vocabulary_come_back(name, tmp_path):
    tokenizer = ways_in()[1]
    parameters = initial_parameters(tiny(name, tokenizer), seed=1)
    save_model(tmp_path / name, tiny(name, tokenizer), parameters, tokenizer, "f32")
    config, found, same = read_parameters(tmp_path / name)
    assert config_json(config, "f32") == config_json(tiny(name, tokenizer), "f32")
    assert found.keys() == parameters.keys()
    assert all((found[key] == parameters[key]).all() for key in parameters)
    described = read_tokenizer_json(tmp_path / name / "tokenizer.json")
    for text in HARD:
        assert same.encode(text) == tokenizer.encode(text) == described.encode(text)


def test_a_config_that_no_file_states_is_refused(tmp_path):
    config = replace(TINY["tiny-recurrentgemma"], gate_blocks=8)
    with pytest.raises(ValueError, match=r"gate_blocks is 8, .* it would be 4"):
        config_json(config, "f32")
    embedding, _, _ = read_parameters(write_embedding(tmp_path / "embedding"))
    with pytest.raises(ValueError, match="EmbeddingGemma cannot be written"):
        config_json(embedding, "f32")


def test_a_failed_save_leaves_the_last_one(tmp_path, monkeypatch):
    config = TINY["tiny-gemma-3"]
    save_model(tmp_path, config, initial_parameters(config, 0), None)
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    parameters = initial_parameters(config, 1)
    parameters["final_norm"] = parameters["final_norm"][1:]  # as where the disk is full: an error in the midst of it
    with pytest.raises(ValueError, match=r"norm\.weight"):
        save_model(tmp_path, config, parameters, None)
    assert before == {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    with pytest.raises(ValueError, match=r"norm\.weight"):
        save_model(tmp_path / "new", config, parameters, None)
    assert not (tmp_path / "new").exists(), "or the next try would find a folder that is there already"


@pytest.mark.oracle
@pytest.mark.parametrize("name", TINY)
def test_transformers_gives_the_same_logits_and_ids(name, tmp_path):
    _, transformers = libraries()
    tokenizer = ways_in()[1]
    config = tiny(name, tokenizer)
    save_model(tmp_path / name, config, initial_parameters(config, seed=1), tokenizer, "f32")
    ids = tokenizer.encode("And it came to pass in those days, that there went out a decree. " * 8)
    expected = run(model_of(tmp_path / name), np.array(ids))
    assert abs(mg.load(tmp_path / name).forward(ids) - expected).max() < 1e-4 * abs(expected).max()
    theirs = transformers.AutoTokenizer.from_pretrained(tmp_path / name)
    for text in HARD:
        assert theirs(text)["input_ids"] == [2, *tokenizer.encode(text)], text
        assert theirs.decode(tokenizer.encode(text)) == text
