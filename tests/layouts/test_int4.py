"""int4 weights, sixteen rows interleaved: where each byte lies, and their products to the last digit."""

import os
import platform
import subprocess
import sys

import numpy as np
import pytest

from minigemma.formulas.linear import embed, linear
from minigemma.layouts import LAYOUTS, Weight
from minigemma.layouts.gguf_blocks import dequantize
from minigemma.layouts.int4 import KINDS, from_gguf, interleave, separate, to_gguf

rng = np.random.default_rng(0)


SIZES = {"Q4_0": 18, "Q4_1": 20}
HALVES = {"Q4_0": 1, "Q4_1": 2}
both = pytest.mark.parametrize("kind", SIZES)


def int4(kind, blocks):
    """Blocks [R, D/32, 18 or 20] as the weight that runs."""
    return Weight(LAYOUTS[KINDS[kind]], from_gguf(kind, blocks), (len(blocks), blocks.shape[1] * 32))


def row_blocks(kind, rows, columns):
    made = rng.integers(0, 256, (rows, columns // 32, SIZES[kind]), np.uint8)
    halves = rng.standard_normal((rows, columns // 32, HALVES[kind])) * 0.1
    made[..., : 2 * HALVES[kind]] = halves.astype(np.float16).view(np.uint8)
    return made


def test_where_a_weight_lies():
    """One scale and one q that is not 8, in every place of two blocks of sixteen rows; then one minimum, too."""
    for row, column in ((0, 0), (1, 5), (15, 63), (7, 34), (16, 12), (31, 31)):
        weight = np.zeros((2, 2, 288), np.uint8)
        weight[..., 32:] = 0x88
        group, lane, block, word, half, byte = *divmod(row, 16), *divmod(column, 32), 0, 0
        block, word, half, byte = column // 32, column % 32 // 8, column % 8 // 4, column % 4
        weight[group, block, 2 * lane : 2 * lane + 2] = np.array([0.5], np.float16).view(np.uint8)
        weight[group, block, 32 + word * 64 + lane * 4 + byte] = 0x8B if half == 0 else 0xB8
        expected = np.zeros((32, 64), np.float32)
        expected[row, column] = 0.5 * (0xB - 8)
        assert np.array_equal(Weight(LAYOUTS["int4-symmetric"], weight, (32, 64)).widen(), expected)
        minima = np.zeros((2, 2, 32), np.uint8)
        minima[group, block, 2 * lane : 2 * lane + 2] = np.array([-1.5], np.float16).view(np.uint8)
        with_minima = np.concatenate([weight[..., :32], minima, weight[..., 32:]], axis=-1)
        expected[row, column // 32 * 32 : column // 32 * 32 + 32] = 0.5 * 8 - 1.5
        expected[row, column] = 0.5 * 0xB - 1.5
        assert np.array_equal(Weight(LAYOUTS["int4"], with_minima, (32, 64)).widen(), expected)


@both
@pytest.mark.parametrize("rows, columns", [(16, 32), (48, 64), (160, 640)])
def test_the_same_weights_in_another_order(rows, columns, kind):
    weight = row_blocks(kind, rows, columns)
    moved, wide, layout = int4(kind, weight), dequantize(kind, weight), LAYOUTS[KINDS[kind]]
    assert moved.nbytes == weight.nbytes == layout.nbytes(rows, columns) == layout.bits / 8 * rows * columns
    assert np.array_equal(to_gguf(moved.data), weight)
    assert np.array_equal(moved.widen(), wide)
    ids = rng.integers(0, rows, 9)
    assert np.array_equal(embed(ids, moved, 3.0), wide[ids] * 3)
    assert not layout.fits(rows + 1, columns)


def test_q4_k_keeps_its_integers_and_rounds_products_of_scales():
    """Each scale and minimum is off by 2⁻¹¹ at most; q is as it was."""
    weight = rng.integers(0, 256, (32, 3, 144), np.uint8)
    weight[..., :4] = (rng.uniform(0.001, 0.02, (32, 3, 2))).astype(np.float16).view(np.uint8)
    wide, moved = dequantize("Q4_K", weight), int4_k(weight)
    scales, q = separate(moved.data, 4)
    halves = abs(scales.view(np.float16).astype(np.float32))
    bound = (halves[..., :1] * q + halves[..., 1:]) * 2.0**-11
    assert (abs(moved.widen() - wide).reshape(bound.shape) <= bound).all()
    assert moved.widen().std() > 0.1


def int4_k(weight):
    return Weight(LAYOUTS["int4"], from_gguf("Q4_K", weight), (len(weight), weight.shape[1] * 256))


def test_int4_of_floats_misses_less_than_half_of_what_symmetric_weights_miss_off_center():
    """And no more where they are normally distributed; equal weights are kept."""
    weights = rng.standard_normal((64, 320), np.float32)
    missed = {}
    for name in ("int4", "int4-symmetric"):
        for shift in (0, 3):
            found = Weight.pack(LAYOUTS[name], weights + np.float32(shift)).widen() - np.float32(shift)
            missed[name, shift] = np.linalg.norm(found - weights) / np.linalg.norm(weights)
    assert missed["int4", 0] < 0.9 * missed["int4-symmetric", 0] and missed["int4", 0] < 0.075
    assert missed["int4", 3] < 0.5 * missed["int4-symmetric", 3] and missed["int4", 3] < 0.076
    equal = np.full((16, 64), -0.75, np.float32)
    assert np.array_equal(Weight.pack(LAYOUTS["int4"], equal).widen(), equal)


@pytest.mark.parametrize("bits, columns, halves", [(4, 32, 1), (4, 32, 2), (2, 64, 1)])
def test_interleaving_is_undone(bits, columns, halves):
    q = rng.integers(0, 1 << bits, (48, 5, columns), np.uint8)
    scales = rng.integers(0, 256, (48, 5, 2 * halves), np.uint8)
    made = interleave(scales, q, bits)
    assert made.shape == (3, 5, 256 + 32 * halves)
    for one, other in zip(separate(made, bits), (scales, q), strict=True):
        assert np.array_equal(one, other)


def in_whole_numbers(x, kind, weight):
    """Σ over blocks of both scales · Σ (q + m / d) · x in 8 bits: integers, then float64."""
    blocks = x.reshape(len(x), -1, 32)
    scale = np.abs(blocks).max(-1) / np.float32(127)
    whole = np.rint(blocks * (np.float32(127) / np.abs(blocks).max(-1, keepdims=True))).astype(int)
    wide = dequantize(kind, weight).astype(float).reshape(*weight.shape[:2], 32)
    return np.einsum("tb,tbk,rbk->tr", scale.astype(float), whole, wide, optimize=True)


@both
@pytest.mark.parametrize("rows, columns", [(16, 32), (80, 96), (112, 1056), (32, 2592)])
@pytest.mark.parametrize("tokens", [1, 2, 8, 9, 33])
def test_products_are_those_of_whole_numbers(rows, columns, tokens, kind):
    weight = row_blocks(kind, rows, columns)
    weight[0, 0, -16:] = 0xFF  # the largest sums that there are
    x = rng.standard_normal((tokens, columns), np.float32)
    x[0, :32] = 1
    expected = in_whole_numbers(x, kind, weight)
    y = linear(x, int4(kind, weight))
    assert y.dtype == np.float32 and y.shape == (tokens, rows)
    np.testing.assert_allclose(y, expected, atol=2e-6 * abs(expected).max())


@both
def test_zeros_and_huge_numbers(kind):
    weight = int4(kind, row_blocks(kind, 16, 64))
    assert not linear(np.zeros((3, 64), np.float32), weight).any()
    x = np.zeros((1, 64), np.float32)
    x[0, 3] = 1e30
    np.testing.assert_allclose(linear(x, weight)[0], weight.widen()[:, 3] * 1e30, rtol=1e-6)


@pytest.mark.parametrize("forced", ["generic", "vectors"])
def test_forced_paths_agree(forced):
    program = (
        "import numpy as np\n"
        "from minigemma.formulas.linear import linear\n"
        "from minigemma.layouts import LAYOUTS, Weight\n"
        "rng = np.random.default_rng(0)\n"
        "w = Weight.pack(LAYOUTS['int4'], rng.standard_normal((48, 96), np.float32))\n"
        "v = Weight.pack(LAYOUTS['int4-symmetric'], rng.standard_normal((48, 96), np.float32))\n"
        "for T, w in ((1, w), (20, w), (1, v), (20, v)):\n"
        "    x = rng.integers(-127, 128, (T, 96)).astype(np.float32)\n"
        "    x[:, ::32] = 127\n"  # so that rounding changes nothing
        "    exact = x.astype(float) @ w.widen().T\n"
        "    assert abs(linear(x, w) - exact).max() < 1e-6 * abs(exact).max()\n"
    )
    subprocess.run([sys.executable, "-c", program], env={**os.environ, "MINIGEMMA_CPU": forced}, check=True)


BASE = "+avx,+avx2,+fma,+f16c"
AVX512 = f"{BASE},+avx512f,+avx512bw,+avx512vl,+avx512dq"
COMPILED = """
import llvmlite.binding

features = "{features}".replace("+", "").split(",")
llvmlite.binding.get_host_cpu_features = lambda: llvmlite.binding.FeatureMap(dict.fromkeys(features, True))
import numba
from numba import types as t
from minigemma.kernels import int4
from minigemma.kernels.compiler import KERNEL
from minigemma.kernels.prepare import Bytes
from minigemma.kernels.weights import Int4Rows


def rows(whole, scales, columns, weight, y):
    int4.few_rows(Bytes(whole, scales), Int4Rows(weight, 32, columns), 0, 1, y)


x, weight = [t.Array(kind, 1, "C") for kind in (t.int8, t.float32)], t.Array(t.uint32, 1, "C")
compiled = numba.njit(**KERNEL)(rows)
compiled.compile((*x, t.intp, weight, t.Array(t.float32, 2, "C")))
print(compiled.inspect_asm(compiled.signatures[0]))
"""


@pytest.mark.skipif(platform.machine() != "x86_64", reason="the instructions are x86-64's")
@pytest.mark.parametrize(
    "name, features, instruction, count",
    [
        ("haswell", BASE, "vpmaddubsw", 32 + 64),
        ("skylake-avx512", AVX512, "vpmaddubsw", 16 + 32),
        ("icelake-server", f"{AVX512},+avx512vnni", "vpdpbusd", 16 + 32),
    ],
)
def test_products_of_bytes_are_one_instruction(name, features, instruction, count):
    """Two blocks of 8 words of each of 16 rows for one token, in one vector or two, and a block for four tokens;
    compiled for processors that need not be here.
    """
    environment = {**os.environ, "NUMBA_CPU_NAME": name, "NUMBA_CPU_FEATURES": features, "MINIGEMMA_CPU": ""}
    program = COMPILED.format(features=features)
    done = subprocess.run([sys.executable, "-c", program], env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    lines = [line.split()[:2] for line in done.stdout.splitlines() if line.startswith("\t")]
    assert sum(words[0] == instruction for words in lines) == count
    assert not any(words[0].startswith("vpmovsdw") for words in lines)
