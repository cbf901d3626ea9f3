"""RoPE: closed forms and properties, definition and kernel."""

import math

import numpy as np
import pytest

from minigemma.formulas.rope import rope

pytestmark = pytest.mark.usefixtures("backend")
rng = np.random.default_rng(3)


def normal(*shape):
    return rng.standard_normal(shape, np.float32)


def positions(*values):
    return np.array(values, np.int32)


def test_rope_turns_pairs_half_the_width_apart():
    """One pair is one: a unit vector along j = 0 turns by `position` radians in the plane (0, R/2)."""
    x = np.zeros((1, 1, 6), np.float32)
    x[0, 0, 0] = 1
    y = rope(x, positions(2), 1e4, 1.0, 6)[0, 0]
    np.testing.assert_allclose(y, [math.cos(2), 0, 0, math.sin(2), 0, 0], atol=1e-6)


def test_rope_angle_of_each_pair():
    for j in range(3):
        x = np.zeros((1, 1, 6), np.float32)
        x[0, 0, j] = 1
        y = rope(x, positions(5), 100.0, 2.0, 6)[0, 0]
        assert math.isclose(math.atan2(y[j + 3], y[j]), 5 / 2 * 100 ** (-2 * j / 6), rel_tol=1e-5)


def test_rope_products_depend_on_distance_alone():
    q, k = normal(1, 1, 32), normal(1, 1, 32)

    def product(a, b):
        return float((rope(q, positions(a), 1e4, 1.0, 32) * rope(k, positions(b), 1e4, 1.0, 32)).sum())

    assert math.isclose(product(7, 3), product(107, 103), rel_tol=1e-4)
    assert not math.isclose(product(7, 3), product(8, 3), rel_tol=1e-2)


def test_partial_rope_leaves_the_rest_of_the_head():
    x = normal(2, 3, 16)
    y = rope(x, positions(4, 5), 1e4, 1.0, 8)
    assert (y[..., 8:] == x[..., 8:]).all()
    np.testing.assert_allclose(y[..., :8], rope(x[..., :8].copy(), positions(4, 5), 1e4, 1.0, 8), atol=1e-6)


def test_positions_far_out_keep_their_difference():
    """In bf16 positions 100,000 and 100,001 are one; here they are a radian apart."""
    x = np.zeros((2, 1, 2), np.float32)
    x[:, 0, 0] = 1
    y = rope(x, positions(100_000, 100_001), 1e4, 1.0, 2)[:, 0]
    angle = math.atan2(y[1, 1], y[1, 0]) - math.atan2(y[0, 1], y[0, 0])
    assert math.isclose(angle % (2 * math.pi), 1, abs_tol=1e-4)
