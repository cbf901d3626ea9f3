"""Vector operations against NumPy, also on NaN, infinities, zeros, subnormals, the largest numbers; forced paths."""

import os
import subprocess
import sys

import numpy as np
import pytest

from minigemma.arrays import round_bf16, widen_bf16
from minigemma.kernels.compiler import jit
from minigemma.kernels.simd.accumulators import (
    add_fours,
    add_scaled_blocks,
    eight_zeros,
    int_tile_add_scaled,
    int_tile_zeros,
    store_sums,
    tile_add_outer,
    tile_add_pairs,
    tile_load,
    tile_store,
    tile_zeros,
)
from minigemma.kernels.simd.cpu import FORCED, LANES, ROWS
from minigemma.kernels.simd.memory import (
    bf16_bits,
    from_even_odd,
    load,
    load_even_odd,
    load_half,
    load_one,
    splat_half,
    store,
    store_half,
    store_whole,
    to_even_odd,
)
from minigemma.kernels.simd.products import dot_32, unpack_32
from minigemma.kernels.simd.vectors import (
    exp,
    expm1,
    fma,
    magnitude,
    max_lanes,
    maximum,
    minimum,
    root,
    round_lanes,
    splat,
    sum_lanes,
    tanh,
    where_less,
)

TINY, LARGE = np.float32(1e-45), np.finfo(np.float32).max
ODD = np.float32([0, -0.0, 1, -1, np.nan, np.inf, -np.inf, TINY, -TINY, 1e-38, -1e-39, LARGE, -LARGE, 0.5, 1.5, 2.5])


def pairs_of_odd_numbers():
    """x, y: each of ODD with each."""
    return np.repeat(ODD, len(ODD)), np.tile(ODD, len(ODD))


def assert_same(got, wanted):
    """Equal numbers, NaN where NaN is wanted; the sign of a zero is free, as it is in kernels."""
    np.testing.assert_array_equal(got, wanted)


# ---- arithmetic


@jit
def arithmetic(x, y, out):
    n = x.size
    for i in range(0, n, LANES):
        a, b = load(x, i), load(y, i)
        store(out, i, a + b)
        store(out, n + i, a - b)
        store(out, 2 * n + i, a * b)
        store(out, 3 * n + i, a / b)
        store(out, 4 * n + i, maximum(a, b))
        store(out, 5 * n + i, minimum(a, b))
        store(out, 6 * n + i, where_less(a, b, splat(np.float32(7)), b))
        store(out, 7 * n + i, magnitude(a))
        store(out, 8 * n + i, root(a))
        store(out, 9 * n + i, round_lanes(a))


def test_arithmetic_on_odd_numbers():
    x, y = pairs_of_odd_numbers()
    out = np.empty((10, x.size), np.float32)
    arithmetic(x, y, out.reshape(-1))
    with np.errstate(all="ignore"):
        wanted = [x + y, x - y, x * y, x / y, np.where(x < y, y, x), np.where(y < x, y, x)]
        wanted += [np.where(x < y, 7, y), abs(x), np.sqrt(x), np.rint(x)]
    for got, expected in zip(out, wanted, strict=True):
        assert_same(got, expected)


@jit
def multiply_add(x, y, z, out):
    for i in range(0, x.size, LANES):
        store(out, i, fma(load(x, i), load(y, i), load(z, i)))


def test_fma_rounds_once():
    x, y, z = np.random.default_rng(0).uniform(1, 2, (3, 1 << 12)).astype(np.float32)
    out = np.empty_like(x)
    multiply_add(x, y, -z, out)
    assert (out == (x.astype(float) * y - z).astype(np.float32)).all()  # float64 holds the product and the sum exactly
    assert (out != x * y - z).any()


@jit
def across(x, out):
    for i in range(0, x.size, LANES):
        out[i // LANES, 0], out[i // LANES, 1] = sum_lanes(load(x, i)), max_lanes(load(x, i))


def test_sums_and_maxima_across_lanes():
    x = np.random.default_rng(0).integers(-99, 99, (4, LANES)).astype(np.float32)
    x[1, 3], x[2, 0], x[3, [0, 1]] = np.inf, -np.inf, (LARGE, -LARGE)
    out = np.empty((4, 2), np.float32)
    across(x.reshape(-1), out)
    assert_same(out[:3], np.stack([x.sum(1), x.max(1)], 1)[:3])
    assert out[3, 1] == LARGE


@jit
def sums(rows, out):
    r, n = rows, LANES
    store_sums(
        out,
        1,
        (
            load(r, 0),
            load(r, n),
            load(r, 2 * n),
            load(r, 3 * n),
            load(r, 4 * n),
            load(r, 5 * n),
            load(r, 6 * n),
            load(r, 7 * n),
        ),
    )


def test_sums_of_eight_vectors():
    rows, out = np.random.default_rng(0).standard_normal((8, LANES), np.float32), np.zeros(10, np.float32)
    sums(rows.reshape(-1), out)
    np.testing.assert_allclose(out[1:9], rows.astype(np.float64).sum(axis=1), atol=1e-5)
    assert out[0] == out[9] == 0


# ---- functions


@jit
def exps(x, y):
    for i in range(0, x.size, LANES):
        store(y, i, exp(load(x, i)))


@jit
def expm1s(x, y):
    for i in range(0, x.size, LANES):
        store(y, i, expm1(load(x, i)))


@jit
def tanhs(x, y):
    for i in range(0, x.size, LANES):
        store(y, i, tanh(load(x, i)))


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


def test_exp_of_the_smallest_numbers_is_one():
    x = np.resize(np.float32([0, -0.0, TINY, -TINY, 1e-39, -1e-39]), 48)
    y = np.empty_like(x)
    exps(x, y)
    assert (y == 1).all()


def test_expm1_relative_error():
    x = np.concatenate([s * np.logspace(-30, np.log10(80), 1 << 14) for s in (-1, 1)]).astype(np.float32)
    y = np.empty_like(x)
    expm1s(x, y)
    assert np.abs(y / np.expm1(x.astype(np.float64)) - 1).max() < 5e-7


def test_tanh_error():
    x = np.linspace(-20, 20, 1 << 18, dtype=np.float32)
    y = np.empty_like(x)
    tanhs(x, y)
    assert np.abs(y - np.tanh(x.astype(np.float64))).max() < 2e-7
    x[:] = np.resize(np.float32([np.inf, -np.inf, np.nan, LARGE, -LARGE, 0, TINY]), x.size)
    tanhs(x, y)
    np.testing.assert_allclose(y, np.tanh(x), rtol=0, atol=2e-7)


# ---- stored forms


@jit
def widen(x, y):
    for i in range(0, y.size, LANES):
        store(y, i, load(x, i))


@jit
def widen_in_pairs(x, y, back):
    for i in range(0, y.size, 2 * LANES):
        a, b = load_even_odd(x, i)
        store(y, i, a)
        store(y, i + LANES, b)
        a, b = from_even_odd(x, a, b)
        a, b = from_even_odd(x, *to_even_odd(x, a, b))
        store(back, i, a)
        store(back, i + LANES, b)


@jit
def widen_singly(x, y):
    for i in range(y.size):
        y[i] = load_one(x, i)


NUMBERS = {
    "float32": np.resize(ODD, 64),
    "bf16": np.arange(1 << 16).astype(np.uint16),
    "int8": np.arange(-128, 128).astype(np.int8),
    "uint8": np.arange(256).astype(np.uint8),
}


@pytest.mark.parametrize("kind", NUMBERS)
def test_loads_widen_every_number(kind):
    x = NUMBERS[kind]
    y, wanted = np.empty(x.size, np.float32), widen_bf16(x) if kind == "bf16" else x.astype(np.float32)
    widen(x, y)
    assert_same(y, wanted)
    if kind in ("float32", "bf16"):
        back, single = np.empty_like(y), np.empty_like(y)
        widen_in_pairs(x, y, back)
        widen_singly(x, single)
        assert_same(back, wanted)
        assert_same(single, wanted)
        pairs = wanted.reshape(-1, LANES, 2).transpose(0, 2, 1) if kind == "bf16" else wanted
        assert_same(y, pairs.reshape(-1))


@jit
def halves(data, y, splatted):
    for i in range(y.size):
        y[i] = load_half(data, 2 * i)
        store(splatted, i * LANES, splat_half(data, 2 * i))


def test_half_is_exact_for_every_finite_float16():
    bits = np.arange(1 << 16).astype(np.uint16)
    bits = bits[(bits & 0x7C00) != 0x7C00]
    y, splatted = np.empty(len(bits), np.float32), np.empty((len(bits), LANES), np.float32)
    halves(bits.view(np.uint8), y, splatted.reshape(-1))
    assert (y.view(np.uint32) == bits.view(np.float16).astype(np.float32).view(np.uint32)).all()
    assert (splatted == y[:, None]).all()


@jit
def narrow(data, words, half):
    for i in range(words.size):
        x = data[i]
        words[i] = bf16_bits(x)
        if abs(x) < 65520:
            store_half(half, 2 * i, x)


def test_bf16_and_float16_round_to_nearest_even():
    rng = np.random.default_rng(0)
    some = rng.integers(0, 1 << 32, 1 << 14, dtype=np.uint32).view(np.float32)
    edges = np.arange(0x3F800000, 0x3F800000 + (1 << 17), 1 << 12, dtype=np.uint32).view(np.float32)  # ties
    halfway = np.arange(0x7BFF, dtype=np.uint16).view(np.float16).astype(np.float32)
    halfway = (halfway[1:] + halfway[:-1]) / 2
    subnormal = rng.uniform(-1e-4, 1e-4, 1 << 14).astype(np.float32)
    beyond = [np.nextafter(halfway[:1024], to) for to in (np.float32(0), np.float32(1))]  # of ties between subnormals
    x = np.concatenate([ODD, some, edges, halfway, -halfway, subnormal, *beyond])
    words, half = np.zeros(x.size, np.uint16), np.zeros(x.size, np.float16)
    narrow(x, words, half.view(np.uint8))
    assert_same(widen_bf16(words), widen_bf16(round_bf16(x)))
    fits = abs(x) < 65520
    assert (half[fits].view(np.uint16) == x[fits].astype(np.float16).view(np.uint16)).all()


def test_bf16_of_nan_is_nan():
    x = np.uint32([0x7F800001, 0x7FFFFFFF, 0xFF800001, 0x7FC00000]).view(np.float32)
    words, half = np.zeros(4, np.uint16), np.zeros(4, np.float16)
    narrow(x, words, half.view(np.uint8))
    assert np.isnan(widen_bf16(words)).all()


@jit
def integers(x, out):
    for i in range(0, x.size, LANES):
        store_whole(out, i, load(x, i))


@pytest.mark.parametrize("kind", [np.int8, np.int16])
def test_integers_round_to_nearest_even(kind):
    most = np.iinfo(kind).max
    x = np.float32([0, -0.0, 0.5, 1.5, 2.5, -0.5, -1.5, TINY, -TINY, 0.49999997, most, -most, most - 0.5, 1, -1, 77.7])
    out = np.zeros(x.size, kind)
    integers(x, out)
    assert (out == np.rint(x)).all()


# ---- products


@jit
def outer(a, b, out, depth):
    tile = tile_zeros()
    for d in range(depth):
        tile = tile_add_outer(tile, a, d, depth, b, d * 2 * LANES)
    tile_store(tile, out, 0, 2 * LANES)
    tile_store(tile_load(out, 0, 2 * LANES), out, ROWS * 2 * LANES, 2 * LANES)


def test_tile_is_a_product():
    rng = np.random.default_rng(0)
    a, b = rng.standard_normal((ROWS, 37), np.float32), rng.standard_normal((37, 2 * LANES), np.float32)
    out = np.empty((2 * ROWS, 2 * LANES), np.float32)
    outer(a.reshape(-1), b.reshape(-1), out.reshape(-1), 37)
    np.testing.assert_allclose(out[:ROWS], a @ b, atol=1e-5)
    assert (out[ROWS:] == out[:ROWS]).all()


@jit
def outer_of_pairs(a, b, scales, out, depth):
    tile = int_tile_zeros()
    for d in range(0, depth, 2):
        tile = tile_add_pairs(tile, a, d, depth, b, d * 2 * LANES)
    int_tile_add_scaled(tile, scales, 0, 1, out, 0, 2 * LANES)


@pytest.mark.parametrize("extreme", [False, True])
def test_tile_of_integers_is_exact(extreme):
    rng = np.random.default_rng(0)
    a, b = rng.integers(-128, 128, (ROWS, 32)), rng.integers(-999, 1000, (2 * LANES, 32))
    if extreme:  # the largest sum there is: 32 · 128 · 32,767 < 2³¹
        a[:], b[:] = -128, 32767
        b[1::2] = -32767
    pairs = b.astype(np.int16).reshape(-1, 16, 2).transpose(1, 0, 2)
    scales, out = rng.uniform(1, 2, ROWS).astype(np.float32), np.ones((ROWS, 2 * LANES), np.float32)
    outer_of_pairs(a.astype(np.int16).reshape(-1), pairs.reshape(-1), scales, out.reshape(-1), 32)
    np.testing.assert_allclose(out, 1 + (a @ b.T) * scales[:, None].astype(float), rtol=1e-6, atol=1e-3)


@jit
def dots(row, x, out, unpacked):
    store(out, 0, dot_32(row, 0, x, 0))
    unpack_32(row, 0, unpacked, 0)


@pytest.mark.parametrize("q, x", [(-128, -32767), (127, 32767), (-128, 32767), (1, 1)])
def test_dot_product_of_32_integers_is_exact(q, x):
    row, numbers = np.full(32, q, np.int8), np.full(32, x, np.int16)
    out, unpacked = np.zeros(LANES, np.float32), np.zeros(32, np.int16)
    dots(row, numbers, out, unpacked)
    assert out.astype(float).sum() == 32 * q * x or abs(out.astype(float).sum() / (32.0 * q * x) - 1) < 1e-7
    assert (unpacked == row).all()


@jit
def two_rows_and_four_tokens(weight, x, out, count):
    sums, k = eight_zeros(), 0
    for j in range(0, count, 2 * LANES):
        sums = add_fours(sums, weight, j, count + j, x, k)
        k += 8 * LANES
    store_sums(out, 0, sums)


@pytest.mark.parametrize("kind", ["float32", "bf16"])
def test_two_rows_meet_four_tokens(kind):
    rng = np.random.default_rng(0)
    weight, x = rng.standard_normal((2, 64), np.float32), rng.standard_normal((4, 64), np.float32)
    stored = round_bf16(weight) if kind == "bf16" else weight
    ordered = x.reshape(4, -1, LANES, 2).transpose(0, 1, 3, 2) if kind == "bf16" else x
    ordered = ordered.reshape(4, -1, 2 * LANES).transpose(1, 0, 2)
    out = np.zeros(8, np.float32)
    two_rows_and_four_tokens(stored.reshape(-1), np.ascontiguousarray(ordered).reshape(-1), out, 64)
    widened = widen_bf16(stored) if kind == "bf16" else weight
    np.testing.assert_allclose(out.reshape(2, 4), widened @ x.T, atol=1e-5)


@jit
def two_blocks_and_four_tokens(weight, x, out):
    store_sums(out, 0, add_scaled_blocks(eight_zeros(), weight, 0, 34, x, 0))


def test_two_blocks_meet_four_tokens():
    rng = np.random.default_rng(0)
    scales, q = np.float16([[0.5], [-0.125]]), rng.integers(-128, 128, (2, 32)).astype(np.int8)
    blocks = np.concatenate([scales.view(np.int8), q], axis=1)
    x, out = rng.integers(-999, 1000, (4, 32)).astype(np.int16), np.zeros(8, np.float32)
    two_blocks_and_four_tokens(blocks.reshape(-1), x.reshape(-1), out)
    assert (out.reshape(2, 4) == scales * (q.astype(float) @ x.T)).all()


def test_an_array_of_two_axes_is_refused():
    with pytest.raises(Exception, match="one axis without gaps"):
        widen(np.zeros((2, 64), np.float32), np.zeros(64, np.float32))


# ---- forced paths


def test_generic_path_can_be_forced():
    """With MINIGEMMA_CPU=generic no AVX-512 is used, whatever the processor has, and the kernels still agree."""
    program = (
        "import numpy as np\n"
        "from minigemma.kernels.simd.cpu import LANES\n"
        "from minigemma.formulas.linear import linear\n"
        "from minigemma.layouts import LAYOUTS, Weight\n"
        "assert LANES == 8\n"
        "x, w = np.ones((9, 40), np.float32), np.arange(200, dtype=np.float32).reshape(5, 40)\n"
        "w = Weight.pack(LAYOUTS['f32'], w)\n"
        "assert (linear(x, w) == linear.formula(x, w)).all()\n"
    )
    subprocess.run([sys.executable, "-c", program], env={**os.environ, "MINIGEMMA_CPU": "generic"}, check=True)


@pytest.mark.skipif(FORCED == "generic", reason="this is that run")
def test_operations_of_the_generic_path():
    """All of the above once more, where neither AVX-512 nor F16C is used."""
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", __file__, "-k", "not generic"]
    environment = {**os.environ, "MINIGEMMA_CPU": "generic"}
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout[-3000:]
