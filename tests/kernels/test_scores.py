"""The one compiled rule of which keys are seen is the page's rule, as numbers and as vectors."""

import numba
import numpy as np
import pytest

from minigemma.formulas.attention import visible
from minigemma.kernels.compiler import KERNEL
from minigemma.kernels.scores import EVERYTHING, hide_lanes, is_visible
from minigemma.kernels.simd.cpu import LANES
from minigemma.kernels.simd.memory import load, store
from minigemma.kernels.simd.vectors import splat

POSITIONS = np.arange(2 * LANES, dtype=np.int32)


@numba.njit(**KERNEL)
def as_numbers(query, last_visible, keys, window, out):
    for t in range(len(query)):
        for s in range(len(keys)):
            out[t, s] = is_visible(query[t], last_visible[t], keys[s], window)


@numba.njit(**KERNEL)
def as_vectors(query, last_visible, keys, window, out):
    for t in range(0, len(query), LANES):
        for s in range(len(keys)):
            score = hide_lanes(
                load(query, t), load(last_visible, t), splat(keys[s]), splat(window), splat(np.float32(7))
            )
            store(out[s], t, score)


@pytest.mark.parametrize("image", [False, True])
@pytest.mark.parametrize("window", [None, 1, 5])
def test_compiled_rule_is_the_page_s(window, image):
    last_visible = POSITIONS.copy()
    if image:
        last_visible[3:9] = 8
    expected = visible(POSITIONS, last_visible, POSITIONS, window)
    limit, found = np.float32(window or EVERYTHING), np.empty_like(expected)
    as_numbers(POSITIONS, last_visible, POSITIONS, limit, found)
    np.testing.assert_array_equal(found, expected)
    scores, (query, last) = np.empty(expected.T.shape, np.float32), np.float32([POSITIONS, last_visible])
    as_vectors(query, last, POSITIONS.astype(np.float32), limit, scores)
    np.testing.assert_array_equal(scores.T, np.where(expected, np.float32(7), np.float32(-np.inf)))
