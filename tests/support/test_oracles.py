"""Recorded answers: found by what was asked, refused when they are stale, small, and signed by their programs."""

import json
import re

import numpy as np
import pytest
from safetensors import safe_open
from support import oracles
from support.checkpoints import write
from support.oracles import DATA, Digest, agree, answered_by, asking, assert_equal, short
from support.tensors import read, save

ROWS = np.arange(6, dtype=np.float32).reshape(2, 3)


@answered_by("none", file="absent")
def doubled(values, _unkeyed=None):
    return values * 2


def test_an_answer_that_is_not_recorded_is_an_error():
    with pytest.raises(AssertionError, match=r"no answer to doubled\(float32.*python tests/record\.py"):
        doubled(ROWS)


def test_a_stale_recording_is_noticed(monkeypatch):
    with asking(live=True):
        monkeypatch.setattr(oracles, "recorded", lambda *_: ROWS * 2)
        np.testing.assert_array_equal(doubled(ROWS), ROWS * 2)
        monkeypatch.setattr(oracles, "recorded", lambda *_: ROWS * 2.001)
        with pytest.raises(AssertionError, match="is stale"):
            doubled(ROWS)


def test_what_is_recorded_is_kept_by_its_arguments(monkeypatch):
    monkeypatch.setattr(oracles.Mode, "recording", {})
    with asking(live=True):
        doubled(ROWS, "left out")
    assert list(oracles.Mode.recording["absent"]) == [f"doubled({short(ROWS)})"]


def test_a_folder_is_known_by_what_its_files_hold(tmp_path):
    first, second = write(tmp_path / "a", "gemma"), write(tmp_path / "b", "gemma")
    assert short(first) == short(second)
    tensors = read(second / "model.safetensors")
    save(tensors | {"model.norm.weight": tensors["model.norm.weight"] + 1}, second / "model.safetensors")
    assert short(first) != short(second)


@pytest.mark.parametrize(
    "now, before, equal",
    [
        (ROWS, ROWS, True),
        (ROWS, ROWS + np.float32(1e-5), True),
        (ROWS, ROWS + np.float32(1e-2), False),
        (ROWS, ROWS[:1], False),
        (ROWS, ROWS.astype(np.float64), False),
        (ROWS.astype(int), ROWS.astype(int) + 1, False),
        ([ROWS, ROWS], [ROWS, ROWS], True),
        ([ROWS, ROWS], [ROWS], False),
        ([1, "a"], [1, "a"], True),
        (3, 4, False),
        (Digest.of(ROWS), Digest.of(ROWS), True),
        (Digest.of(ROWS), Digest.of(ROWS + 1), False),
    ],
)
def test_agreement(now, before, equal):
    assert agree(now, before) == equal


def test_a_digest_tells_dtype_shape_and_every_value():
    expected = Digest.of(ROWS)
    assert_equal(ROWS, expected)
    assert_equal(-(ROWS * np.float32([[-1], [-1]])), expected)
    for other in (ROWS.astype(np.float64), ROWS.T, ROWS.reshape(3, 2), ROWS + np.float32(1e-6)):
        with pytest.raises(AssertionError):
            assert_equal(other, expected)


@pytest.mark.parametrize("path", sorted(DATA.iterdir()), ids=lambda path: path.name)
def test_a_recording_is_small_and_names_its_programs(path):
    assert path.stat().st_size < 1_200_000
    if path.suffix == ".json":
        made = json.loads(path.read_text("utf-8"))["made"]
    else:
        with safe_open(path, "numpy") as file:
            made = file.metadata()
    assert made["by"] == "python tests/record.py" and re.search(r"weights \d", made["seeds"])
    assert all(re.fullmatch(r"\w+ \d+\.\S+", program) for program in made["programs"].split(", "))


def test_all_data_of_the_tests_is_small():
    assert sum(path.stat().st_size for path in DATA.parent.rglob("*") if path.is_file()) < 5_000_000
