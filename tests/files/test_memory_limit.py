"""A model that does not fit is refused with the numbers before it takes memory, and loads when one insists."""

import subprocess
import sys

import pytest
from support.folders import CONFIGS, ids, random_weights, write_folder

import minigemma as mg
from minigemma.cli.main import main
from minigemma.files import memory
from minigemma.files.load import describe


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    config = CONFIGS["gemma3"]
    return write_folder(tmp_path_factory.mktemp("hf") / "model", config, random_weights(config))


def test_a_model_that_does_not_fit(folder, monkeypatch, capsys):
    weights = describe(folder).weight_bytes
    monkeypatch.setattr("minigemma.files.memory.memory_limit", lambda: weights + memory.SCRATCH - 1)
    with pytest.raises(ValueError, match=r"model needs 0\.0 GB of weights .* = 0\.3 GB, and there are 0\.3 GB; use"):
        mg.load(folder)
    assert mg.load(folder, force=True).forward(ids).shape
    assert mg.load(folder, dtype="int8").forward(ids).shape, "smaller weights fit"
    assert main(["score", "-m", str(folder), "x"]) == 1
    out, err = capsys.readouterr()
    assert out == "" and len(err.splitlines()) == 1 and "--force" in err


def test_the_context_that_is_meant_counts(folder, monkeypatch):
    weights, config = describe(folder).weight_bytes, describe(folder).config
    monkeypatch.setattr(
        "minigemma.files.memory.memory_limit", lambda: weights + memory.SCRATCH + config.cache_bytes(20)
    )
    assert mg.load(folder, context=20)
    with pytest.raises(ValueError, match=r"of cache"):
        mg.load(folder, context=60)


@pytest.mark.parametrize("file", ["memory.max", "memory/memory.limit_in_bytes"])
def test_limits_of_a_control_group(file, tmp_path, monkeypatch):
    monkeypatch.setattr(memory, "CGROUP", tmp_path)
    whole = memory.memory_limit()
    assert whole > 1 << 28
    (tmp_path / file).parent.mkdir(exist_ok=True)
    for text, expected in (("max\n", whole), ("9223372036854771712\n", whole), ("123456789\n", 123_456_789)):
        (tmp_path / file).write_text(text)
        assert memory.memory_limit() == expected


def test_ulimit_is_heeded():
    program = "from minigemma.files.memory import memory_limit; print(memory_limit())"
    command = f"ulimit -v 3000000; exec {sys.executable} -c '{program}'"
    run = subprocess.run(["bash", "-c", command], capture_output=True, text=True, check=True)
    assert int(run.stdout) == 3_000_000 * 1024
