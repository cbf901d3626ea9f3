"""Vector operations: exp and tanh against NumPy in float64, tiles against a product, forced paths."""

import os
import subprocess
import sys

import numpy as np

from minigemma.kernels.compiler import jit
from minigemma.kernels.simd import (
    LANES,
    ROWS,
    exp,
    load,
    load_half,
    store,
    store_sums,
    tanh,
    tile_add_outer,
    tile_store,
    tile_zeros,
)


@jit
def exps(x, y):
    for i in range(0, x.size, LANES):
        store(y, i, exp(load(x, i)))


@jit
def tanhs(x, y):
    for i in range(0, x.size, LANES):
        store(y, i, tanh(load(x, i)))


@jit
def halves(data, y):
    for i in range(y.size):
        y[i] = load_half(data, 2 * i)


@jit
def outer(a, b, out, depth):
    tile = tile_zeros()
    for d in range(depth):
        tile = tile_add_outer(tile, a, d, depth, b, d * 2 * LANES)
    tile_store(tile, out, 0, 2 * LANES)


@jit
def sums(rows, out):
    store_sums(
        out,
        1,
        (
            load(rows, 0),
            load(rows, LANES),
            load(rows, 2 * LANES),
            load(rows, 3 * LANES),
            load(rows, 4 * LANES),
            load(rows, 5 * LANES),
            load(rows, 6 * LANES),
            load(rows, 7 * LANES),
        ),
    )


def test_sums_of_eight_vectors():
    rows, out = np.random.default_rng(0).standard_normal((8, LANES), np.float32), np.zeros(10, np.float32)
    sums(rows.reshape(-1), out)
    np.testing.assert_allclose(out[1:9], rows.astype(np.float64).sum(axis=1), atol=1e-5)
    assert out[0] == out[9] == 0


def test_exp_relative_error():
    x = np.linspace(-87, 88, 1 << 20, dtype=np.float32)
    y = np.empty_like(x)
    exps(x, y)
    assert np.abs(y / np.exp(x.astype(np.float64)) - 1).max() < 2e-7


def test_exp_outside_its_range():
    x = np.zeros(LANES, np.float32)
    x[:5] = -np.inf, -88, np.inf, 1000, np.nan
    y = np.empty_like(x)
    exps(x, y)
    assert y[0] == y[1] == 0
    assert y[2] == y[3] > 1e38
    assert np.isnan(y[4])
    assert (y[5:] == 1).all()


def test_tanh_error():
    x = np.linspace(-20, 20, 1 << 18, dtype=np.float32)
    y = np.empty_like(x)
    tanhs(x, y)
    assert np.abs(y - np.tanh(x.astype(np.float64))).max() < 2e-7


def test_half_is_exact_for_every_finite_float16():
    bits = np.arange(1 << 16).astype(np.uint16)
    bits = bits[(bits & 0x7C00) != 0x7C00]
    y = np.empty(len(bits), np.float32)
    halves(bits.view(np.uint8), y)
    assert (y.view(np.uint32) == bits.view(np.float16).astype(np.float32).view(np.uint32)).all()


def test_tile_is_a_product():
    rng = np.random.default_rng(0)
    a, b = rng.standard_normal((ROWS, 37), np.float32), rng.standard_normal((37, 2 * LANES), np.float32)
    out = np.empty((ROWS, 2 * LANES), np.float32)
    outer(a.reshape(-1), b.reshape(-1), out.reshape(-1), 37)
    np.testing.assert_allclose(out, a @ b, atol=1e-5)


def test_generic_path_can_be_forced():
    """With MINIGEMMA_CPU=generic no AVX-512 is used, whatever the processor has, and the kernels still agree."""
    program = (
        "import numpy as np\n"
        "from minigemma.kernels.simd import LANES\n"
        "from minigemma.formulas.linear import linear\n"
        "from minigemma.definition import formulas_only\n"
        "assert LANES == 8\n"
        "x, w = np.ones((9, 40), np.float32), np.arange(200, dtype=np.float32).reshape(5, 40)\n"
        "assert (linear(x, w) == linear.formula(x, w)).all()\n"
    )
    subprocess.run([sys.executable, "-c", program], env={**os.environ, "MINIGEMMA_CPU": "generic"}, check=True)
