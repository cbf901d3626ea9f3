"""Attention for prompts: blocks of keys outside the window are skipped, and columns of all sizes agree."""

import numpy as np
import pytest

from minigemma.formulas.attention import Mask, attention
from minigemma.kernels.attention_prefill import BLOCK, COLUMNS

rng = np.random.default_rng(6)


def normal(*shape):
    return rng.standard_normal(shape, np.float32)


def test_blocks_that_no_query_sees_are_not_read():
    """NaN keys and values, too far back or in the future, in blocks of their own, leave no trace."""
    T, window = 20, 8
    S = 5 * BLOCK
    q, k, v = normal(T, 2, 20), normal(S, 1, 20), normal(S, 1, 20)
    first = 2 * BLOCK + window
    here, where = np.arange(first, first + T, dtype=np.int32), np.arange(S, dtype=np.int32)
    mask = Mask(here, here, where, window)
    expected = attention.formula(q, k, v, mask, 0.2, None)
    for wrong in (slice(0, 2 * BLOCK), slice(3 * BLOCK, S)):
        k[wrong] = v[wrong] = np.nan
    np.testing.assert_allclose(attention(q, k, v, mask, 0.2, None), expected, atol=1e-5)


@pytest.mark.parametrize("heads", [1, 3])
@pytest.mark.parametrize("queries", [COLUMNS - 1, COLUMNS, COLUMNS + 1])
def test_tokens_around_the_edge_of_a_chunk_of_columns(queries, heads):
    q, k, v = normal(queries, heads, 8), normal(queries, 1, 8), normal(queries, 1, 8)
    here = np.arange(queries, dtype=np.int32)
    mask = Mask(here, here, here, 50)
    found, expected = attention(q, k, v, mask, 0.3, 2.0), attention.formula(q, k, v, mask, 0.3, 2.0)
    np.testing.assert_allclose(found, expected, atol=1e-5)
