"""AVX-512's dot products in matmul: exact to what they round, emulated here; compiled, one instruction each."""

import os
import platform
import subprocess
import sys

import pytest

# bf16 against float64 products of x rounded to bf16; int8, int4 against those of x rounded to 8 bits in blocks of 32.
PROGRAM = """
import numpy as np
from minigemma.arrays import round_bf16, widen_bf16
from minigemma.formulas.linear import linear
from minigemma.kernels.dispatch import path
from minigemma.layouts import LAYOUTS, Weight

assert path("bf16", "many").multiplies == "bf16" and path("f32", "many").multiplies == "float32"
rng = np.random.default_rng(0)
for R, D in ((16, 32), (40, 96), (48, 1056)):
    dense = rng.standard_normal((R, D), np.float32)
    for T in (17, 40):
        x = rng.standard_normal((T, D), np.float32)
        blocks = x.reshape(T, -1, 32)
        scale = np.abs(blocks).max(-1, keepdims=True) / np.float32(127)
        eight = (np.rint(blocks / scale) * scale).reshape(T, D).astype(float)
        for name in ("bf16", "int8", "int4", "int4-symmetric"):
            if LAYOUTS[name].fits(R, D):
                weight = Weight.pack(LAYOUTS[name], dense)
                kept = widen_bf16(round_bf16(x)).astype(float) if name == "bf16" else eight
                kept = x.astype(float) if path(name, "many").form.startswith("16") else kept
                expected = kept @ weight.widen().T
                assert np.abs(linear(x, weight) - expected).max() < 3e-5 * D**0.5, (name, R, D, T)
print("right")
"""

COMPILED = """
import llvmlite.binding

features = "{features}".replace("+", "").split(",")
llvmlite.binding.get_host_cpu_features = lambda: llvmlite.binding.FeatureMap(dict.fromkeys(features, True))
import numba
from numba import types as t
from minigemma.kernels.compiler import KERNEL
from minigemma.kernels.simd.accumulators import tile_add_bf16_pairs, tile_load, tile_store
from minigemma.kernels.simd.cpu import ROWS


def products(panel, tokens, sums, width):
    tile = tile_load(sums, 0, 32)
    for d in range(0, width, 2):
        tile = tile_add_bf16_pairs(tile, panel, d, 640, tokens, d * 32)
    tile_store(tile, sums, 0, 32)


compiled = numba.njit(**KERNEL)(products)
arrays = [t.Array(kind, 1, "C") for kind in (t.uint16, t.uint16, t.float32)]
compiled.compile((*arrays, t.intp))
print(compiled.inspect_asm(compiled.signatures[0]))
"""
FEATURES = "+avx,+avx2,+fma,+f16c,+avx512f,+avx512bw,+avx512vl,+avx512dq,+avx512vnni,+avx512bf16"


def run(program, **environment):
    done = subprocess.run(
        [sys.executable, "-c", program], env={**os.environ, **environment}, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_products_are_those_of_rounded_numbers():
    assert run(PROGRAM, MINIGEMMA_CPU="dots") == "right\n"


@pytest.mark.skipif(platform.machine() != "x86_64", reason="the instructions are x86-64's")
@pytest.mark.parametrize("name", ["znver4", "sapphirerapids"])
def test_24_products_of_a_tile_stay_in_registers(name):
    """12 x 2 instructions for each pair of columns, and none that saves a register to the stack between them."""
    made = run(
        COMPILED.format(features=FEATURES), NUMBA_CPU_NAME=name, NUMBA_CPU_FEATURES=FEATURES, MINIGEMMA_CPU="dots"
    )
    lines = [line.split("\t")[1:] for line in made.splitlines() if line.startswith("\t")]
    places = [i for i, words in enumerate(lines) if words[0] == "vdpbf16ps"]
    assert len(places) and len(places) % 24 == 0
    inner = lines[places[0] : places[-1]]
    assert not any("zmm" in words[-1] and "rsp" in words[-1] for words in inner)


@pytest.mark.skipif(platform.machine() != "x86_64", reason="the instructions are x86-64's")
@pytest.mark.parametrize(
    "forced, multiplies",
    [("", ["bf16", "8-bit integers", "float32"]), ("vectors", ["float32", "16-bit integers", "float32"])],
)
def test_a_processor_that_has_them_uses_them(forced, multiplies):
    program = COMPILED[: COMPILED.index("import numba")] + (
        "from minigemma.kernels.dispatch import path\n"
        "print([path(name, 'many').multiplies for name in ('bf16', 'int8', 'f32')])"
    )
    assert run(program.format(features=FEATURES), MINIGEMMA_CPU=forced) == f"{multiplies}\n"
