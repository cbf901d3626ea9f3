"""`minigemma vocab` and `minigemma export`: what they write, what they print, and what they refuse."""

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from support.tokenizers import ways_in

import minigemma as mg
from minigemma.cli import main
from minigemma.files.save import save_model
from minigemma.train.initial import initial_parameters
from minigemma.train.sizes import TINY, config_named

PROSE = Path(__file__).parents[1] / "data" / "prose.txt"


@pytest.fixture
def folder(tmp_path):
    config = replace(TINY["tiny-gemma-3"], vocab=ways_in()[1].size)
    save_model(tmp_path / "model", config, initial_parameters(config, 0), ways_in()[1], "f32")
    return tmp_path / "model"


def test_a_vocabulary_is_trained_or_cut_and_a_config_takes_it(folder, tmp_path, capsys):
    for source in ([], ["--from", str(folder)]):
        out = str(tmp_path / f"vocabulary{len(source)}")
        assert main(["vocab", "--data", str(PROSE), "--out", out, "--size", "600", "--json", *source]) == 0
        told = json.loads(capsys.readouterr().out)
        assert told["pieces"] == 600 and told["bytes"] > told["tokens"] > 1000
        config, tokenizer = config_named("tiny-gemma-2", out)
        assert config.vocab == 600 and tokenizer.decode(tokenizer.encode("In the beginning\n")) == "In the beginning\n"


def test_an_exported_model_is_the_same_model(folder, tmp_path, capsys):
    ids = np.arange(40)
    expected = mg.load(folder).forward(ids)
    for name, flags, tolerance in (("hf", [], 0), ("a.gguf", [], 1e-5), ("b.gguf", ["--dtype", "int8"], 5e-2)):
        assert main(["export", str(folder), str(tmp_path / name), *flags]) == 0
        assert str(tmp_path / name) in capsys.readouterr().out
        assert abs(mg.load(tmp_path / name).forward(ids) - expected).max() <= tolerance * abs(expected).max()


@pytest.mark.parametrize("template", ["{{ '<start_of_turn>user' }}", ""])
def test_an_exported_model_still_knows_turns_ends_and_sampling(folder, tmp_path, template):
    generation = {"eos_token_id": [1, 106], "temperature": 0.7, "top_k": 9, "do_sample": True}
    (folder / "generation_config.json").write_text(json.dumps(generation))
    if template:
        (folder / "chat_template.jinja").write_text(template)
    before = mg.load(folder)
    assert before.instruction_tuned and 106 in before.eos
    for name in ("hf", "a.gguf"):
        assert main(["export", str(folder), str(tmp_path / name), "-q"]) == 0
        after = mg.load(tmp_path / name)
        assert after.instruction_tuned and not after.foreign_turns
        assert name == "a.gguf" or (after.eos == before.eos and dict(after.sampling) == dict(before.sampling))
    assert not template or (tmp_path / "hf" / "chat_template.jinja").read_text() == template


@pytest.mark.parametrize(
    "out, flags, told",
    [
        ("model", [], "exists already"),
        ("no/where", [], "does not exist"),
        ("out", ["--dtype", "int8"], "hold f32 or bf16, not int8"),
    ],
)
def test_what_cannot_be_written_is_one_sentence(folder, tmp_path, capsys, out, flags, told):
    assert main(["export", str(folder), str(tmp_path / out), *flags]) == 1
    error = capsys.readouterr().err
    assert told in error and error.count("\n") == 1 and "Traceback" not in error
    assert [path.name for path in tmp_path.iterdir()] == ["model"]
