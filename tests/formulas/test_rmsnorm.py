"""RMSNorm: closed forms and properties, definition and kernel."""

import math

import numpy as np
import pytest

from minigemma.formulas.rmsnorm import rms_norm

pytestmark = pytest.mark.usefixtures("backend")
rng = np.random.default_rng(3)


def normal(*shape):
    return rng.standard_normal(shape, np.float32)


def test_norm_gives_unit_mean_square_and_ignores_scale():
    x = normal(3, 50)
    y = rms_norm(x, np.zeros(50, np.float32), 0.0)
    np.testing.assert_allclose((y * y).mean(-1), 1, rtol=1e-5)
    np.testing.assert_allclose(rms_norm(x * 1000, np.zeros(50, np.float32), 0.0), y, rtol=1e-5, atol=1e-6)


def test_norm_weight_is_the_gain_less_one():
    x = normal(2, 6)
    assert not rms_norm(x, np.full(6, -1, np.float32), 1e-6).any()
    np.testing.assert_allclose(
        rms_norm(x, np.full(6, 2, np.float32), 1e-6), 3 * rms_norm(x, np.zeros(6, np.float32), 1e-6), rtol=1e-6
    )


def test_eps_stands_inside_the_root():
    x = np.full((1, 4), 1e-3, np.float32)  # mean square 1e-6 = eps
    np.testing.assert_allclose(rms_norm(x, np.zeros(4, np.float32), 1e-6), 1 / math.sqrt(2), rtol=1e-5)
