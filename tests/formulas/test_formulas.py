"""Closed forms and properties of the formulas, in both of their forms."""

import math

import numpy as np
import pytest

from minigemma.arrays import round_bf16, widen_bf16
from minigemma.definition import formulas_only
from minigemma.formulas.linear import embed, linear
from minigemma.formulas.softcap import soft_cap
from minigemma.layouts.weight import format_of, packed_shape, rows_columns, widen

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


def test_formats_by_dtype_and_shape():
    shapes = {
        "f32": np.zeros((3, 64), np.float32),
        "bf16": np.zeros((3, 64), np.uint16),
        "int8": np.zeros((3, 2, 34), np.uint8),
        "int4": np.zeros((3, 2, 18), np.uint8),
        "sfp8": np.zeros((3, 68), np.uint8),
        "int8-row": np.zeros((3, 68), np.int8),
        "int4-row": np.zeros((3, 1, 36), np.uint8),
    }
    for name, weight in shapes.items():
        assert format_of(weight) == name
        assert rows_columns(weight) == (3, 64)
        if weight.itemsize == 1:
            assert packed_shape(name, 3, 64) == weight.shape
    for shape, dtype in (((3, 2, 17), np.uint8), ((3, 2, 36), np.uint8), ((3, 1, 37), np.uint8), ((3, 67), np.int8)):
        with pytest.raises(ValueError, match="no weight"):
            format_of(np.zeros(shape, dtype))


def test_blocks_widen_as_ggml_says():
    int8 = np.zeros((1, 1, 34), np.uint8)
    int8[0, 0, :2] = np.array([0.5], np.float16).view(np.uint8)
    int8[0, 0, 2:] = np.arange(-16, 16).astype(np.int8).view(np.uint8)
    assert widen(int8)[0].tolist() == [q / 2 for q in range(-16, 16)]
    int4 = np.zeros((1, 1, 18), np.uint8)
    int4[0, 0, :2] = np.array([-2], np.float16).view(np.uint8)
    int4[0, 0, 2:] = [i | (15 - i) << 4 for i in range(16)]
    assert widen(int4)[0].tolist() == [-2 * (q - 8) for q in [*range(16), *range(15, -1, -1)]]


@pytest.mark.parametrize("T", [1, 40])
def test_linear_of_unit_vectors_reads_the_columns(T):
    w = round_bf16(normal(37, 96))
    x = np.zeros((T, 96), np.float32)
    x[np.arange(T), np.arange(T) * 2] = 1
    assert (linear(x, w) == widen(w).T[np.arange(T) * 2]).all()


def test_linear_passes_infinity_and_nan_on():
    w = np.ones((3, 64), np.float32)
    for T in (1, 20):
        x = np.ones((T, 64), np.float32)
        x[0, 5], x[-1, 60] = (np.nan, np.nan) if T == 1 else (np.inf, np.nan)
        y = linear(x, w)
        assert np.isnan(y[-1]).all()
        assert T == 1 or np.isposinf(y[0]).all()


def test_embedding_rows_are_scaled():
    w = round_bf16(normal(9, 32))
    assert (embed(np.array([3, 0, 3]), w, 2.0) == 2 * widen(w)[[3, 0, 3]]).all()
