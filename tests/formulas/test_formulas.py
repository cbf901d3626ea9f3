"""Closed forms and properties of the formulas, in both of their forms."""

import math

import numpy as np
import pytest

from minigemma.arrays import round_bf16, widen_bf16
from minigemma.definition import formulas_only
from minigemma.formulas.attention import Mask, attention, visible
from minigemma.formulas.geglu import gated_gelu
from minigemma.formulas.linear import embed, linear
from minigemma.formulas.rmsnorm import rms_norm
from minigemma.formulas.rope import rope
from minigemma.formulas.softcap import soft_cap
from minigemma.layouts.weight import format_of, packed_shape, rows_columns, widen

rng = np.random.default_rng(3)


@pytest.fixture(params=["numpy", "numba"], autouse=True)
def backend(request):
    with formulas_only(request.param == "numpy"):
        yield request.param


def normal(*shape):
    return rng.standard_normal(shape, np.float32)


def positions(*values):
    return np.array(values, np.int32)


# ---- bf16


def test_bf16_rounds_to_nearest_even():
    x = np.array([1.0, 1 + 2**-8, 1 + 3 * 2**-8, -1 - 2**-9, np.inf, -0.0], np.float32)
    assert widen_bf16(round_bf16(x)).tolist() == [1.0, 1.0, 1 + 2**-6, -1.0, np.inf, -0.0]
    assert np.isnan(widen_bf16(round_bf16(np.array([np.nan], np.float32))))[0]


# ---- RMSNorm


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


# ---- RoPE


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


# ---- soft-cap and GeGLU


def test_soft_cap_is_odd_bounded_and_flat_only_far_out():
    x = np.array([[-1e9, -1.0, 0.0, 1.0, 1e9, -np.inf]], np.float32)
    y = soft_cap(x, 30.0)[0]
    np.testing.assert_allclose(y, [-30, -30 * math.tanh(1 / 30), 0, 30 * math.tanh(1 / 30), 30, -30], atol=1e-5)


def test_gelu_at_known_points():
    z = np.array([[0.0, 1.0, -1.0, 3.0, 50.0, -50.0]], np.float32)
    y = gated_gelu(z, np.full_like(z, 2))[0]
    np.testing.assert_allclose(y, [0, 2 * 0.841192, 2 * -0.158808, 2 * 2.996363, 100, 0], atol=2e-6)


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


# ---- attention


@pytest.mark.parametrize("distance, seen", [(0, True), (6, True), (7, False), (-1, False)])
def test_window_edge(distance, seen):
    assert visible(positions(20), positions(20), positions(20 - distance), 7)[0, 0] == seen


@pytest.mark.parametrize("distance, seen", [(-4, True), (-5, False), (6, True), (7, False)])
def test_inside_an_image_the_later_tokens_are_seen_too(distance, seen):
    """Its last token stands at 24; the window still hides what is 7 back."""
    assert visible(positions(20), positions(24), positions(20 - distance), 7)[0, 0] == seen


@pytest.mark.parametrize("T", [1, 30])
def test_equal_scores_average_the_visible_values(T):
    v = normal(50, 1, 32)
    q = np.zeros((T, 2, 32), np.float32)
    where = positions(*range(50))
    y = attention(q, normal(50, 1, 32), v, Mask(where[-T:], where[-T:], where, 5), 1.0, None)
    for t in range(T):
        last = 50 - T + t
        np.testing.assert_allclose(y[t, 1], v[last - 4 : last + 1, 0].mean(0), atol=1e-6)


def by_hand(q, k, v, query, until, keys, window, scale, cap):
    """One query head, one key at a time, in Python's own floats."""
    weights = []
    for s in range(len(k)):
        score = sum(float(a) * float(b) for a, b in zip(q, k[s], strict=True)) * scale
        score = cap * math.tanh(score / cap) if cap else score
        inside = keys[s] <= until and (window is None or query - keys[s] < window)
        weights.append(math.exp(score) if inside else 0.0)
    return sum(w * v[s].astype(float) for s, w in enumerate(weights)) / sum(weights)


@pytest.mark.parametrize("window", [None, 2])
@pytest.mark.parametrize("cap", [None, 0.7])
@pytest.mark.parametrize("H", [6, 32])
@pytest.mark.parametrize("until", [(10, 11, 12, 13), (12, 12, 12, 13)])
def test_attention_by_hand_on_few_tokens(window, cap, H, until):
    """In the second case the first three tokens are an image."""
    T, N, K = 4, 6, 3
    q, k, v = normal(T, N, H), normal(T, K, H), normal(T, K, H)
    where = positions(*range(10, 10 + T))
    y = attention(q, k, v, Mask(where, positions(*until), where, window), 0.3, cap)
    for t in range(T):
        for n in range(N):  # consecutive query heads share a key head
            expected = by_hand(q[t, n], k[:, n // 2], v[:, n // 2], where[t], until[t], where, window, 0.3, cap)
            np.testing.assert_allclose(y[t, n], expected, atol=1e-5)


@pytest.mark.parametrize("T", [1, 25])
def test_order_of_keys_does_not_matter(T):
    S = 600
    q, k, v, where = normal(T, 4, 32), normal(S, 2, 32), normal(S, 2, 32), positions(*range(S))
    mixed = rng.permutation(S)
    straight = attention(q, k, v, Mask(where[-T:], where[-T:], where, 300), 0.2, None)
    shuffled = attention(q, k[mixed], v[mixed], Mask(where[-T:], where[-T:], where[mixed], 300), 0.2, None)
    np.testing.assert_allclose(shuffled, straight, atol=2e-6)


@pytest.mark.parametrize("T", [1, 25])
def test_huge_scores_do_not_overflow(T):
    q, k, v = normal(T, 1, 32) * 1e4, normal(100, 1, 32) * 1e4, normal(100, 1, 32)
    where = positions(*range(100))
    y = attention(q, k, v, Mask(where[-T:], where[-T:], where, None), 1.0, None)
    for t in range(T):  # the largest score takes all
        scores = k[: 100 - T + t + 1, 0].astype(float) @ q[t, 0].astype(float)
        np.testing.assert_allclose(y[t, 0], v[scores.argmax(), 0], atol=1e-5)
