"""`minigemma vocab` and `minigemma export`: what they write, what they print, and what they refuse."""

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from support.tokenizers import ways_in
from support.transformers_answers import libraries, model_of, run

import minigemma as mg
from minigemma.cli import main
from minigemma.files.save import save_model
from minigemma.train.initial import initial_parameters
from minigemma.train.sizes import TINY, config_named

PROSE = Path(__file__).parents[1] / "data" / "prose.txt"
WEIGHTS = Path(__file__).parents[2] / "weights"
TEXT = "And it came to pass in those days, that there went out a decree.\n\n" * 4  # past a window of 64
HARD = [TEXT, "", " ", "a  b", "   x\n\n\ny", "né 🙂 \t tab", "12345 67,890", "ﷺ ½ \u200b"]


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


@pytest.mark.oracle
@pytest.mark.parametrize("name", TINY)
def test_transformers_and_tokenizers_take_an_exported_folder(name, tmp_path):
    assert main(["export", str(WEIGHTS / name), str(tmp_path / name), "-q"]) == 0
    own = mg.load(tmp_path / name, dtype="f32")
    fast = libraries()[1].AutoTokenizer.from_pretrained(tmp_path / name)
    described = pytest.importorskip("tokenizers").Tokenizer.from_file(str(tmp_path / name / "tokenizer.json"))
    for text in HARD:
        ids = [2, *own.tokenizer.encode(text)]
        assert fast(text)["input_ids"] == ids == described.encode(text).ids, text
    ids = np.array([2, *own.tokenizer.encode(TEXT)])
    expected = run(model_of(tmp_path / name), ids)
    assert abs(own.forward(ids) - expected).max() < 1e-4 * abs(expected).max()


@pytest.mark.oracle
@pytest.mark.parametrize("dtype, tolerance", [("f32", 1e-4), ("bf16", 5e-3), ("int8", 1e-2), ("int4", 1e-2)])
@pytest.mark.parametrize("name", ["tiny-gemma-2", "tiny-gemma-3"])
def test_llama_cpp_takes_an_exported_gguf(name, dtype, tolerance, tmp_path):
    """It rounds what it multiplies with bf16 to bf16, and with quantized weights to eight bits."""
    library = pytest.importorskip("llama_cpp", reason="pip install llama-cpp-python (it builds for some minutes)")
    path = tmp_path / "model.gguf"
    assert main(["export", str(WEIGHTS / name), str(path), "--dtype", dtype, "-q"]) == 0
    own, plain = mg.load(path), {"type_k": 0, "type_v": 0, "verbose": False}  # a cache in float32
    theirs = library.Llama(str(path), n_ctx=512, n_threads=1, n_threads_batch=1, logits_all=True, **plain)
    for text in HARD[1:]:
        assert theirs.tokenize(text.encode(), add_bos=False) == own.tokenizer.encode(text), text
    ids = [2, *own.tokenizer.encode(TEXT)]
    assert theirs.tokenize(TEXT.encode()) == ids
    theirs.eval(ids)
    expected = np.array(theirs.scores[: len(ids)])
    assert abs(own.forward(ids) - expected).max() < tolerance * abs(expected).max()
    theirs.close()
