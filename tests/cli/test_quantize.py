"""`minigemma quantize`: the folder it writes is the model that `load` makes with the same dtype, bit for bit."""

import json
import mmap
import shutil

import numpy as np
import pytest
import safetensors
from support.folders import CONFIGS, ids, random_weights
from support.synthetic import config_json

import minigemma as mg
from minigemma.arrays import round_bf16
from minigemma.cli.main import main
from minigemma.cli.quantize import quantize
from minigemma.files.convert import EIGHT_BITS, NARROW, RUNS_AS
from minigemma.files.load import describe
from minigemma.files.safetensors_file import write_safetensors


@pytest.fixture(scope="module", params=["gemma", "gemma2", "gemma3"])
def folder(request, tmp_path_factory):
    """In bf16, as released."""
    config, at = CONFIGS[request.param], tmp_path_factory.mktemp("hf") / "model"
    weights = {name: round_bf16(values) for name, values in random_weights(config).items()}
    at.mkdir()
    (at / "config.json").write_text(json.dumps(config_json(config)))
    entries = [(name, "BF16", values.shape) for name, values in weights.items()]
    write_safetensors(at / "model.safetensors", entries, ([values] for values in weights.values()))
    (at / "generation_config.json").write_text(json.dumps({"eos_token_id": [1, 106]}))
    return at


def mapped(array):
    """Does it lie in a mapped file?"""
    while isinstance(array, np.ndarray):
        array = array.base
    return isinstance(array, mmap.mmap)


@pytest.mark.parametrize("dtype", NARROW)
def test_it_loads_as_it_was_written(folder, tmp_path, dtype):
    seen = []
    report = quantize(folder, tmp_path / "small", dtype, lambda done, total: seen.append((done, total)))
    small, wanted = mg.load(tmp_path / "small"), mg.load(folder, dtype=dtype)
    np.testing.assert_array_equal(small.forward(ids), wanted.forward(ids))
    assert small.eos == wanted.eos == (1, 106)
    down, runs = small.weights.blocks[0].ffn.down, RUNS_AS.get(dtype, dtype)
    assert down.layout.name == runs
    assert small.weights.embedding.layout.name == EIGHT_BITS.get(runs, runs)
    assert mapped(down.data) == (runs == dtype), "mapped, not copied, if it runs as it is stored"
    assert describe(tmp_path / "small").weight_bytes == describe(folder, dtype).weight_bytes
    stored = sum(size for *_, size in describe(tmp_path / "small").tensors.values())
    assert report.bytes_after == stored < report.bytes_before * 0.54
    assert seen[-1] == (report.bytes_before, report.bytes_before)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["small"]


@pytest.mark.parametrize(
    "dtype, low, high",
    [
        ("int8", 0.002, 0.01),
        ("int4", 0.03, 0.1),
        ("int4-symmetric", 0.04, 0.12),
        ("sfp8", 0.01, 0.04),
        ("int8-row", 0.004, 0.012),
        ("int4-row", 0.08, 0.13),
    ],
)
def test_reported_errors_are_those_of_the_format(folder, tmp_path, dtype, low, high):
    report = quantize(folder, tmp_path / "small", dtype)
    assert {"embedding", "blocks.attention.q", "blocks.ffn.down"} <= set(report.errors)
    for role, error in report.errors.items():
        in_eight = role == "embedding" or (dtype == "int4" and role not in ("blocks.attention.o", "blocks.ffn.down"))
        if "int4" not in dtype or not in_eight:
            assert low < error < high, role


def test_it_can_be_read_by_the_safetensors_library(folder, tmp_path):
    quantize(folder, tmp_path / "small", "int4")
    tensors = dict(safetensors.deserialize((tmp_path / "small" / "model.safetensors").read_bytes()))
    assert tensors["model.layers.0.mlp.down_proj.weight"]["shape"][-1] == 320  # sixteen rows side by side


@pytest.mark.oracle
def test_it_can_be_read_by_torch(folder, tmp_path):
    from safetensors.torch import load_file

    quantize(folder, tmp_path / "small", "int4")
    tensors = load_file(tmp_path / "small" / "model.safetensors")
    assert tensors["model.layers.0.mlp.down_proj.weight"].shape[-1] == 320


def test_a_quantized_folder_can_be_loaded_in_another_dtype(folder, tmp_path):
    quantize(folder, tmp_path / "small", "sfp8")
    wide = mg.load(tmp_path / "small", dtype="f32")
    assert wide.weights.embedding.layout.name == "f32"
    found, expected = wide.forward(ids), mg.load(tmp_path / "small").forward(ids)
    assert np.abs(found - expected).max() < 0.03 * np.abs(expected).max()


def test_int4_files_keep_their_weights_in_other_formats(folder, tmp_path):
    """Sixteen rows side by side are the same numbers: float32 loses nothing, int8 little, int4 is the file."""
    quantize(folder, tmp_path / "small", "int4")
    there = mg.load(tmp_path / "small").weights.blocks[1].ffn.down
    wide = there.widen()
    for dtype in ("int8", "f32"):
        same = mg.load(tmp_path / "small", dtype=dtype).weights.blocks[1].ffn.down
        assert same.layout.name == dtype
        assert np.abs(same.widen() - wide).max() <= (np.abs(wide).max() / 127 if dtype == "int8" else 0)
    again = mg.load(tmp_path / "small", dtype="int4").weights.blocks[1].ffn.down
    assert np.array_equal(again.data, there.data) and mapped(again.data)


def test_what_cannot_be_done_leaves_nothing_behind(folder, tmp_path, monkeypatch):
    (tmp_path / "there").mkdir()
    with pytest.raises(mg.ModelFormatError, match="there: exists already; give a new path in an existing folder"):
        quantize(folder, tmp_path / "there", "int8")
    with pytest.raises(mg.ModelFormatError, match="cannot be made"):
        quantize(folder, tmp_path / "no" / "where", "int8")
    with pytest.raises(ValueError, match="dtype is 'int2'"):
        quantize(folder, tmp_path / "new", "int2")
    monkeypatch.setattr(
        "minigemma.cli.quantize.write_safetensors", lambda *_: (_ for _ in ()).throw(OSError(28, "No space"))
    )
    with pytest.raises(OSError, match="No space"):
        quantize(folder, tmp_path / "new", "int8")
    assert [p.name for p in tmp_path.iterdir()] == ["there"]


def test_what_another_conversion_writes_stays(folder, tmp_path):
    (tmp_path / "small.partial").mkdir()
    (tmp_path / "small.partial" / "model.safetensors").write_bytes(b"half")
    with pytest.raises(mg.ModelFormatError, match="another conversion"):
        quantize(folder, tmp_path / "small", "int8")
    assert (tmp_path / "small.partial" / "model.safetensors").read_bytes() == b"half"


def test_command_line(folder, tmp_path, capsys):
    assert main(["quantize", str(folder), str(tmp_path / "small"), "--dtype", "int8"]) == 0
    out = capsys.readouterr().out
    assert "small: " in out and " → " in out and "%  blocks.ffn.down" in out
    assert main(["quantize", str(folder), str(tmp_path / "small"), "--dtype", "int8"]) == 1
    assert "exists already" in capsys.readouterr().err


@pytest.mark.parametrize("what", ["cut", "other model"])
def test_damaged_quantized_files_are_refused(folder, tmp_path, what):
    quantize(folder, tmp_path / "small", "int8")
    file = tmp_path / "small" / "model.safetensors"
    if what == "cut":
        file.write_bytes(file.read_bytes()[:-100])
    else:
        config = json.loads((tmp_path / "small" / "config.json").read_text())
        (tmp_path / "small" / "config.json").write_text(json.dumps(config | {"intermediate_size": 32}))
    with pytest.raises(mg.ModelFormatError):
        mg.load(tmp_path / "small")
    shutil.rmtree(tmp_path / "small")


def test_a_source_that_is_quantized_already_is_refused(folder, tmp_path):
    quantize(folder, tmp_path / "eight", "int8")
    with pytest.raises(mg.ModelFormatError, match=r"is quantized already \(Q8_0\), and int4 of it would round twice"):
        quantize(tmp_path / "eight", tmp_path / "four", "int4")
    assert sorted(p.name for p in tmp_path.iterdir()) == ["eight"]
