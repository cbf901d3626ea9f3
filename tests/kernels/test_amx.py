"""AMX kernels: on AMX where this processor has it, else emulated."""

import os
import platform
import re
import subprocess
import sys

import pytest

# Every format against float64 products of what AMX is given: x and the weights rounded to bf16. What is left is
# the order of float32 sums.
PROGRAM = """
import numpy as np
from minigemma.kernels import amx
from minigemma.arrays import round_bf16, widen_bf16
from minigemma.layouts import LAYOUTS, Weight
from minigemma.formulas.linear import linear

assert amx.choice()[0] == {wanted!r}, amx.choice()
rng = np.random.default_rng(0)
for R, D in ((32, 32), (40, 96), (7, 64), (96, 2336), (50, 588)):
    dense = rng.standard_normal((R, D), np.float32)
    layouts = [layout for layout in LAYOUTS.values() if layout.fits(R, D) and layout.name != "f32"]
    weights = {{layout.name: Weight.pack(layout, dense) for layout in layouts}}
    assert {{"bf16"}} <= set(weights) and ("int4" in weights) == (R % 16 == D % 32 == 0)
    for T in (9, 16, 32, 33, 70):
        x = rng.standard_normal((T, D), np.float32)
        for name, weight in weights.items():
            a, b = (widen_bf16(round_bf16(m)).astype(float) for m in (x, weight.widen()))
            assert np.abs(linear(x, weight) - a @ b.T).max() < 3e-6 * D**0.5 * 4, (name, R, D, T)
            exact = x.astype(float) @ weight.widen().T
            assert np.abs(linear(x, weight) - exact).max() < 2**-6 * D**0.5 * 2, (name, R, D, T)
    exact = Weight(LAYOUTS["f32"], dense, dense.shape)
    assert linear(x, exact).dtype == np.float32
    np.testing.assert_allclose(linear(x, exact), x @ dense.T, atol=1e-3)  # float32 weights are exact: not on AMX
print("right")
"""


@pytest.fixture(scope="module")
def path():
    program = "from minigemma.kernels.amx import choice; print(choice()[0])"
    environment = {name: value for name, value in os.environ.items() if name != "MINIGEMMA_CPU"}
    return subprocess.run(
        [sys.executable, "-c", program], env=environment, capture_output=True, text=True
    ).stdout.strip()


def run(program, forced):
    environment = {name: value for name, value in os.environ.items() if name != "MINIGEMMA_CPU"} | forced
    done = subprocess.run([sys.executable, "-c", program], env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.mark.parametrize("where", ["AMX", "emulated"])
def test_products_of_every_layout(where, path):
    if where == "AMX" and path != "AMX":
        pytest.skip("this processor has no AMX-BF16")
    forced = {"MINIGEMMA_CPU": "emulated"} if where == "emulated" else {}
    assert run(PROGRAM.format(wanted=where), forced).strip() == "right"


PEAK = """
from dataclasses import replace
from minigemma.cli.bench import table
from minigemma.cli.measure import Plan, bench
from minigemma.models.registry import RELEASED
from minigemma.cli.random_weights import random_model
from minigemma.kernels import peaks

peaks.READ_BYTES, small = 1 << 24, replace(RELEASED["gemma-3-270m"], vocab=1024)
for dtype, multiplies in (("int8", "bf16 on AMX"), ("f32", "float32")):
    model = random_model(small, dtype, layers=1)
    report = bench(model, Plan(9, 1, repeat=1)) | {"weights": "random"}
    assert report["flops_per_second"] > 1e6 and f"GFLOP/s in {multiplies};" in table(report), table(report)
print("right")
"""


@pytest.mark.parametrize("where", ["AMX", "emulated"])
def test_bench_measures_the_peak_of_what_multiplies(where, path):
    if where == "AMX" and path != "AMX":
        pytest.skip("this processor has no AMX-BF16")
    assert run(PEAK, {"MINIGEMMA_CPU": "emulated"} if where == "emulated" else {}).strip() == "right"


PROMPT = """
import os
import numpy as np
import minigemma as mg

model = mg.load("gemma-3-270m")
ids = model.tokenizer.encode(open("tests/data/prose.txt").read()[:400])[:32]
there = model.forward(ids).astype(float)
os.environ["MINIGEMMA_CPU"] = "vectors"
here = model.forward(ids).astype(float)
p, q = (x - x.max(1, keepdims=True) for x in (here, there))
p, q = (x - np.log(np.exp(x).sum(1, keepdims=True)) for x in (p, q))
print((np.exp(p) * (p - q)).sum(1).mean(), (p.argmax(1) == q.argmax(1)).mean())
"""


def test_a_prompt_of_the_real_270m(path):
    """Rounding what enters the products to bf16 moves the next token's distribution by next to nothing."""
    divergence, equal = map(float, run(PROMPT, {} if path == "AMX" else {"MINIGEMMA_CPU": "emulated"}).split())
    assert 0 < divergence < 2e-3 and equal >= 0.95


# Compiled, not run: the same kernel for a processor with AMX, on any machine of its family.
COMPILED = """
import ctypes, os
import llvmlite.binding

features = os.environ["NUMBA_CPU_FEATURES"].replace("+", "").split(",")
llvmlite.binding.get_host_cpu_features = lambda: dict.fromkeys(features, True)
import minigemma.kernels.parallel

opened, ctypes.CDLL = ctypes.CDLL, lambda *_: type("Linux", (), {"syscall": lambda *_: 0})
from minigemma.kernels import amx

ctypes.CDLL = opened
import numba
from numba import types as t
from minigemma.kernels.compiler import FASTMATH


def product(tiles, panel, packed, steps, first, depth, sums):
    amx.begin(tiles)
    amx.multiply_panel(tiles, panel, packed, steps, first, depth, first > 0, sums)
    amx.end(tiles)


assert amx.PRESENT
words, floats = t.Array(t.uint16, 1, "C"), t.Array(t.float32, 1, "C")
compiled = numba.njit(error_model="numpy", fastmath=FASTMATH)(product)
compiled.compile((words, words, words, t.intp, t.intp, t.intp, floats))
print(compiled.inspect_asm(compiled.signatures[0]))
"""


@pytest.mark.skipif(platform.machine() != "x86_64" or sys.platform != "linux", reason="AMX is x86-64's")
def test_the_instructions_of_a_processor_with_amx():
    features = "+avx,+avx2,+fma,+f16c,+avx512f,+avx512bw,+avx512vl,+amx-tile,+amx-bf16"
    assembly = run(COMPILED, {"NUMBA_CPU_NAME": "sapphirerapids", "NUMBA_CPU_FEATURES": features})
    instructions = re.findall(r"^\t(\w+)", assembly, re.M)
    assert instructions.count("ldtilecfg") == instructions.count("tilerelease") == 1
    # A step is four loads, then four products, with no more than addresses between them.
    step = r"(?:\ttileloadd.*\n(?:\t(?!tdp|call|tile).*\n)*){4}(?:\ttdpbf16ps.*\n){4}"
    steps = re.findall(step, assembly)
    assert len(steps) >= 2 and instructions.count("tdpbf16ps") % 4 == 0
