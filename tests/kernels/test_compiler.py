"""Kernels are compiled once, and whatever is wrong with the cache, they run."""

import os
import pickle
import subprocess
import sys
import time
from pathlib import Path
from typing import NamedTuple

import numba
import numpy as np
import pytest

from minigemma.kernels import compiler
from minigemma.kernels.compiler import Inner, by_type, compilations, jit, jit_inner, kernel_folder, running_seconds


@jit_inner
def doubled(x):
    """Twice x."""
    return 2 * x


@jit
def sum_of_doubles(x):
    total = 0.0
    for i in range(x.size):
        total += doubled(x[i])
    return total


@jit
def calls_a_kernel(x):
    return sum_of_doubles(x)


def test_a_kernel_calls_inner_functions():
    assert sum_of_doubles(np.arange(4.0)) == 12
    assert doubled.__doc__ == "Twice x." and doubled.py_func(3) == 6


def test_numba_is_told_of_an_inner_function_when_a_kernel_asks():
    alone = jit_inner(doubled.py_func)
    assert isinstance(alone, Inner) and "_numba_type_" not in vars(alone)
    assert alone._numba_type_ is alone._numba_type_ and "_numba_type_" in vars(alone)


def test_a_kernel_cannot_be_built_into_another():
    with pytest.raises(TypeError, match="sum_of_doubles is a kernel"):
        calls_a_kernel(np.arange(4.0))


class Halves(NamedTuple):
    data: np.ndarray


class Bytes(NamedTuple):
    data: np.ndarray
    scale: float


@jit_inner
def _of_halves(weight, i):
    """Element i."""
    return weight.data[i] * 0.5


@jit_inner
def _of_bytes(weight, i):
    return weight.data[i] * weight.scale


@jit_inner
def _of_floats(i, row):
    return row[i]


@jit_inner
def _of_ints(i, row):
    return row[i] + 100.0


element = by_type("element", {Halves: _of_halves, Bytes: _of_bytes})
at = by_type("at", {np.float32: _of_floats, np.int8: _of_ints}, on="row")


@jit
def elements(weight, row, several):
    return element(weight, 1), element(weight, i=0), at(1, row), element(several[0], 1)


@jit
def no_element(weight):
    return element(weight, 1)


def test_the_type_of_an_argument_chooses_the_inner_function():
    halves, scaled = Halves(np.float32([3, 5])), Bytes(np.int8([3, 5]), 10.0)
    assert elements(halves, np.float32([1, 2]), (scaled,)) == (2.5, 1.5, 2, 50)
    assert elements(scaled, np.int8([1, 2]), (halves, halves)) == (50, 30, 102, 2.5)
    assert element.__name__ == "element" and element.__doc__ == "Element i."


def test_a_type_that_no_function_takes_is_named():
    with pytest.raises(numba.TypingError, match="element takes Halves, Bytes, not"):
        no_element(np.float32([1]))


def test_joined_functions_take_the_same_arguments():
    with pytest.raises(TypeError, match="_of_floats differs from _of_halves"):
        by_type("mixed", {Halves: _of_halves, np.float32: _of_floats})


def test_a_kernel_can_be_pickled():
    assert pickle.loads(pickle.dumps(sum_of_doubles))(np.arange(4.0)) == 12


PROGRAM = f"""
import sys, numpy as np; sys.path.insert(0, {str(Path(__file__).parent)!r})
from test_compiler import sum_of_doubles
print(sum_of_doubles(np.linspace(0, 1, 70)).hex())
print(sum(sum_of_doubles.stats.cache_hits.values()))
"""


def run(folder, before="", **environment):
    """(result, kernels loaded from the cache, lines on stderr) of a process that calls one kernel."""
    done = subprocess.run(
        [sys.executable, "-c", before + PROGRAM],
        env=os.environ | {"NUMBA_CACHE_DIR": str(folder)} | environment,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    return *done.stdout.split(), done.stderr.splitlines()


def test_a_kernel_that_is_read_is_the_one_that_was_compiled(tmp_path):
    result, hits, said = run(tmp_path / "new" / "folder")
    assert (hits, said) == ("0", [])
    assert run(tmp_path / "new" / "folder") == (result, "1", [])
    assert [path.suffix for path in (tmp_path / "new" / "folder").iterdir()] == [".kernel"]


@pytest.mark.parametrize("damage", ["empty", "cut", "bit", "pipe"])
def test_a_damaged_file_is_compiled_again(tmp_path, damage):
    result, _, _ = run(tmp_path)
    (path,) = tmp_path.iterdir()
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 4
    if damage == "pipe":
        path.unlink()
        os.mkfifo(path)
    else:
        path.write_bytes({"empty": b"", "cut": data[: len(data) // 2], "bit": data}[damage])
    again, hits, said = run(tmp_path)
    assert (again, hits) == (result, "0")
    assert said == [] if damage in ("empty", "pipe") else len(said) == 1 and str(path) in said[0]
    assert run(tmp_path) == (result, "1", [])


def test_what_is_wrong_with_many_files_is_said_once(caplog, monkeypatch):
    monkeypatch.setattr(compiler, "_said", set())
    for name in "ab":
        compiler._say_once("kernels are compiled again", f"{name}: its content is damaged")
    assert caplog.messages == ["kernels are compiled again: a: its content is damaged"]


def test_another_source_of_any_kernel_is_compiled_again(tmp_path):
    result, _, _ = run(tmp_path)
    other = "import minigemma.kernels.compiler as c; c.sources_digest = lambda: b'another source  '\n"
    assert run(tmp_path, other) == (result, "0", []) and run(tmp_path, other) == (result, "1", [])
    assert len(list(tmp_path.iterdir())) == 1, "the older one is overwritten"


FULL = "import resource; resource.setrlimit(resource.RLIMIT_FSIZE, (4096, 4096))\n"


@pytest.mark.parametrize("reason", ["a file", "full disk"])
def test_kernels_are_compiled_in_memory_where_nothing_can_be_written(tmp_path, reason):
    folder = tmp_path / "kernels"
    if reason == "a file":
        folder.write_text("stands where the folder should be")
    result, hits, said = run(folder, FULL if reason == "full disk" else "")
    assert hits == "0" and float.fromhex(result) == pytest.approx(70)
    assert len(said) == 1 and f"kernels are compiled in memory: {folder} cannot be written: " in said[0]
    assert reason == "a file" or not list(folder.iterdir()), "no half of a file is left"


@pytest.mark.parametrize(
    "variables, folder",
    [
        ({}, "home/.cache/minigemma/kernels"),
        ({"XDG_CACHE_HOME": "{}/x"}, "x/minigemma/kernels"),
        ({"XDG_CACHE_HOME": "{}/x", "MINIGEMMA_CACHE": "{}/own"}, "own/kernels"),
        ({"MINIGEMMA_CACHE": "~/own"}, "home/own/kernels"),
    ],
)
def test_the_cache_is_outside_the_package(variables, folder, tmp_path, monkeypatch):
    for name in ("XDG_CACHE_HOME", "MINIGEMMA_CACHE"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(numba.config, "CACHE_DIR", "")
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    for name, value in variables.items():
        monkeypatch.setenv(name, value.format(tmp_path))
    assert kernel_folder() == tmp_path / folder
    monkeypatch.setattr(numba.config, "CACHE_DIR", str(tmp_path))
    assert kernel_folder() == tmp_path


def test_compilations_are_counted_and_the_clock_stands_still_meanwhile(tmp_path):
    @jit
    def negative(x):
        return -x

    negative._cache.cache_path = str(tmp_path)
    count, began, running = compilations.count, time.perf_counter(), running_seconds()
    negative(1.0)
    assert compilations.count > count
    assert running_seconds() - running < (time.perf_counter() - began) / 2
    count = compilations.count
    negative(2.0)
    assert compilations.count == count


@pytest.mark.oracle  # it compiles for minutes: `prange` compiles its body five times
def test_public_numba_computes_the_same(tmp_path):
    """The recorded logits of a model, with kernels compiled by `numba.njit` and shared by `prange`."""
    tests = Path(__file__).parents[1]
    case = f"{tests / 'models' / 'test_frozen_logits.py'}::test_kernels_say_what_they_said[gemma3-int8]"
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", case],
        env=os.environ | {"MINIGEMMA_COMPILER": "plain", "NUMBA_CACHE_DIR": str(tmp_path)},
        cwd=tests.parent,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0 and "1 passed" in done.stdout, done.stdout
