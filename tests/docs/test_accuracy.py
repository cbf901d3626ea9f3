"""What narrow formats cost on real text: docs/make_accuracy.py measures it right, and int8 stays below its limit."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path

import numpy as np
import pytest

import minigemma as mg

TOKENS = 264  # of the real text, of which the first 128 only stand before the others
PATH = Path(__file__).parents[2] / "docs" / "make_accuracy.py"


@pytest.fixture(scope="module")
def measuring():
    spec = importlib.util.spec_from_file_location(PATH.stem, PATH)
    module = sys.modules[PATH.stem] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    yield module
    del sys.modules[PATH.stem]


def test_the_measure_is_its_formula(measuring):
    """KL = Σ p (ln p - ln q) and ln q of the token that came, for distributions that are written down."""
    p, q = np.array([[0.5, 0.25, 0.25], [0.1, 0.2, 0.7]]), np.array([[0.25, 0.5, 0.25], [0.1, 0.2, 0.7]])
    found = measuring.Found()
    found.add(np.log(p).astype(np.float32) + 3, np.log(q).astype(np.float32) - 7, np.array([1, 2]))
    assert found.kl == pytest.approx([0.25 * np.log(2), 0], abs=1e-6)
    assert found.same == [False, True]
    assert found.logprob == pytest.approx(np.log([0.5, 0.7]))
    assert found.perplexity == pytest.approx((0.5 * 0.7) ** -0.5)


def test_what_int8_and_int4_cost_the_real_model(measuring, demo_file):
    exact = mg.load(demo_file, dtype="f32")
    others = {"exact": exact} | {dtype: mg.load(demo_file, dtype=dtype) for dtype in ("int8", "int4")}
    chunks, prose = measuring.texts(exact, 1)
    assert prose == 1
    contenders = [measuring.contender(name, model) for name, model in others.items()]
    found = measuring.compare(measuring.contender("reference", exact), contenders, [chunks[0][:TOKENS]])
    kl, _, same, perplexity = found["int8"].numbers
    assert len(found["int8"].kl) == TOKENS - 1 - measuring.WARM
    assert found["exact"].numbers[:3] == (0, 0, 1)
    assert 1e-6 < kl < 0.002 and same > 0.97
    assert perplexity == pytest.approx(found["reference"].perplexity, rel=0.01)
    four, _, _, costs = found["int4"].numbers
    assert 0.005 < four < 0.06, "four bits cost so small a model something: the docs say so"
    assert costs < 1.045 * found["reference"].perplexity
