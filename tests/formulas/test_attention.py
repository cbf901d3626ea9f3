"""Attention: the mask's edges, and results by hand, definition and kernels."""

import math

import numpy as np
import pytest

from minigemma.formulas.attention import Mask, attention, visible

pytestmark = pytest.mark.usefixtures("backend")
rng = np.random.default_rng(3)


def normal(*shape):
    return rng.standard_normal(shape, np.float32)


def positions(*values):
    return np.array(values, np.int32)


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
