"""Closed forms and properties of the formulas, in both of their forms."""

import math

import numpy as np
import pytest

from minigemma.arrays import round_bf16, widen_bf16
from minigemma.definition import formulas_only
from minigemma.formulas.linear import embed, linear
from minigemma.formulas.softcap import soft_cap
from minigemma.layouts import LAYOUTS, Weight

rng = np.random.default_rng(3)


@pytest.fixture(params=["numpy", "numba"], autouse=True)
def backend(request):
    with formulas_only(request.param == "numpy"):
        yield request.param


def normal(*shape):
    return rng.standard_normal(shape, np.float32)


# ---- bf16


def test_bf16_rounds_to_nearest_even():
    x = np.array([1.0, 1 + 2**-8, 1 + 3 * 2**-8, -1 - 2**-9, np.inf, -0.0], np.float32)
    assert widen_bf16(round_bf16(x)).tolist() == [1.0, 1.0, 1 + 2**-6, -1.0, np.inf, -0.0]
    assert np.isnan(widen_bf16(round_bf16(np.array([np.nan], np.float32))))[0]


# ---- soft-cap


def test_soft_cap_is_odd_bounded_and_flat_only_far_out():
    x = np.array([[-1e9, -1.0, 0.0, 1.0, 1e9, -np.inf]], np.float32)
    y = soft_cap(x, 30.0)[0]
    np.testing.assert_allclose(y, [-30, -30 * math.tanh(1 / 30), 0, 30 * math.tanh(1 / 30), 30, -30], atol=1e-5)


# ---- linear


@pytest.mark.parametrize("T", [1, 40])
def test_linear_of_unit_vectors_reads_the_columns(T):
    w = Weight.pack(LAYOUTS["bf16"], normal(37, 96))
    x = np.zeros((T, 96), np.float32)
    x[np.arange(T), np.arange(T) * 2] = 1
    assert (linear(x, w) == w.widen().T[np.arange(T) * 2]).all()


def test_linear_passes_infinity_and_nan_on():
    w = Weight.pack(LAYOUTS["f32"], np.ones((3, 64), np.float32))
    for T in (1, 20):
        x = np.ones((T, 64), np.float32)
        x[0, 5], x[-1, 60] = (np.nan, np.nan) if T == 1 else (np.inf, np.nan)
        y = linear(x, w)
        assert np.isnan(y[-1]).all()
        assert T == 1 or np.isposinf(y[0]).all()


def test_embedding_rows_are_scaled():
    w = Weight.pack(LAYOUTS["bf16"], normal(9, 32))
    assert (embed(np.array([3, 0, 3]), w, 2.0) == 2 * w.widen()[[3, 0, 3]]).all()
