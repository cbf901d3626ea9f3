"""What is left out of Numba's ways where a kernel is compiled or read."""

import gc
import os
import pickle
import subprocess
import sys
from typing import NamedTuple

import numba
import numpy as np
import pytest
from numba.core.registry import CPUDispatcher

from minigemma.kernels.compiler import Inner, _Files, by_type, jit, jit_inner


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


@pytest.mark.parametrize("collects", (True, False))
def test_the_collector_rests_meanwhile_and_is_afterwards_as_it_was(collects, monkeypatch):
    before, meanwhile = gc.isenabled(), []
    monkeypatch.setattr(CPUDispatcher, "compile", lambda *_: meanwhile.append(gc.isenabled()))
    try:
        (gc.enable if collects else gc.disable)()
        sum_of_doubles.compile("types")
        assert meanwhile == [False] and gc.isenabled() == collects
    finally:
        (gc.enable if before else gc.disable)()


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


def test_the_index_names_only_what_is_written(tmp_path, monkeypatch):
    """A process that ends while it writes leaves an entry out, and does not name an older one's machine code."""
    files = _Files(str(tmp_path), "kernel", "new source")
    (tmp_path / "kernel.1.nbc").write_bytes(pickle.dumps("what an older source was compiled to"))
    monkeypatch.setattr(_Files, "_save_index", lambda *_: sys.exit())
    with pytest.raises(SystemExit):
        files.save("types", "new")
    assert files.load("types") is None
    monkeypatch.undo()
    files.save("types", "new")
    files.save("other types", "newer")
    files.save("types", "newest")
    assert (files.load("types"), files.load("other types")) == ("newest", "newer")
    assert len(list(tmp_path.iterdir())) == 3


def test_a_kernel_that_is_read_is_the_one_that_was_compiled(tmp_path):
    code = """
import numpy as np
from minigemma.formulas.rmsnorm import _rows, rms_norm
print(rms_norm(np.arange(70, dtype=np.float32)[None], np.linspace(0, 1, 70, dtype=np.float32), 1e-6).tobytes().hex())
print(sum(_rows.stats.cache_hits.values()))
"""
    there = os.environ | {"NUMBA_CACHE_DIR": str(tmp_path)}
    runs = [
        subprocess.run(
            [sys.executable, "-c", code], env=there, capture_output=True, text=True, check=True
        ).stdout.split()
        for _ in range(2)
    ]
    assert runs[0][0] == runs[1][0] and [hits for _, hits in runs] == ["0", "1"]
