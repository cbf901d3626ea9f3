"""Products of 1 … 16 tokens: read from one place or two, shared among any number of tasks, several weights at once."""

import numba
import numpy as np
import pytest

from minigemma.cli.random_weights import random_matrix
from minigemma.formulas.linear import linear
from minigemma.kernels import matvec, pairs, weights
from minigemma.kernels.compiler import KERNEL, jit_inner
from minigemma.kernels.prepare import prepare
from minigemma.layouts import LAYOUTS, Weight


@pytest.mark.parametrize("streams", [1, 2])
@pytest.mark.parametrize("dtype", ["f32", "bf16", "int8"])
def test_several_tokens_read_rows_from_one_place_or_two(streams, dtype, monkeypatch):
    monkeypatch.setattr(pairs, "STREAMS", streams)
    monkeypatch.setattr(pairs, "pairs_of", jit_inner(pairs.pairs_of.py_func))  # compiled now, for this many streams
    several, of_task = (jit_inner(f.py_func) for f in (matvec._several_tokens, pairs.pairs_of_task))

    @numba.njit(**KERNEL)
    def product(x, weight, tasks, y):
        for task in range(tasks):
            several(prepare(x, weight), weight, of_task(task, tasks, 2, weight.rows, False), y)

    rng = np.random.default_rng(0)
    for rows, columns, tokens in ((1, 32, 2), (7, 64, 5), (131, 1088, 13)):
        weight = random_matrix(rng, rows, columns, dtype)
        x, y = rng.standard_normal((tokens, columns), np.float32), np.full((tokens, rows), np.nan, np.float32)
        product(x, weights.of(weight), 4, y)
        np.testing.assert_allclose(y, linear.formula(x, weight), atol=1e-4 * np.abs(y).max())


@pytest.mark.parametrize("columns", [1, 16, 31, 33, 48, 4304])
@pytest.mark.parametrize("name", ["f32", "bf16"])
def test_rows_that_are_no_whole_vectors(name, columns):
    """What a vector leaves over is zeros, or the kernels of many tokens take the weight."""
    rng = np.random.default_rng(0)
    weight = Weight.pack(LAYOUTS[name], rng.standard_normal((5, columns), np.float32))
    for tokens in (1, 3, 17):
        x = rng.standard_normal((tokens, columns), np.float32)
        expected = linear.formula(x, weight)
        np.testing.assert_allclose(linear(x, weight), expected, atol=1e-5 * np.abs(expected).max())


def test_a_kernel_weight_is_made_once_and_without_a_copy():
    for name, layout in LAYOUTS.items():
        weight = Weight.pack(layout, np.ones((32, 64), np.float32))
        made = weights.of(weight)
        assert made is weights.of(weight) and type(made) is weights.TYPES[name][0]
        assert (made.rows, made.columns) == weight.shape and np.shares_memory(made.data, weight.data)
        assert made.data.ndim == 1 and not made.data.flags.writeable
    wide = weights.of(Weight.pack(LAYOUTS["f32"], np.ones((3, 33), np.float32)))
    assert wide.columns == 64 and wide.data.reshape(3, 64)[:, 33:].sum() == 0
