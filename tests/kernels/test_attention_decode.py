"""Attention for decoding: partitions of the keys, read from one place or two, merged into the definition's result."""

import numba
import numpy as np
import pytest

from minigemma.formulas.attention import Mask, attention
from minigemma.kernels import attention_decode, pairs
from minigemma.kernels.attention_decode import DECODE_QUERIES, FAR, Partials, is_decode, merge_partitions, partitions_of
from minigemma.kernels.compiler import KERNEL, jit_inner
from minigemma.kernels.scores import EVERYTHING, Keys, Queries, Scoring

rng = np.random.default_rng(5)
SCORING = Scoring(np.float32(EVERYTHING), np.float32(0.1), np.float32(0))


def case(T, S, N, K, H):
    q, k, v = (rng.standard_normal(shape, np.float32) for shape in ((T, N, H), (S, K, H), (S, K, H)))
    here = np.arange(S - T, S, dtype=np.int32)
    return q, k, v, Mask(here, here, rng.permutation(S).astype(np.int32), None)


def room(rows, G, H):
    return Partials(np.empty((rows, G, 2), np.float32), np.empty((rows, G, H), np.float32))


@pytest.mark.parametrize("streams", [1, 2])
def test_keys_are_read_from_one_place_or_two(streams, monkeypatch):
    monkeypatch.setattr(pairs, "STREAMS", streams)
    monkeypatch.setattr(attention_decode, "pairs_of", jit_inner(pairs.pairs_of.py_func))
    attend_partition = jit_inner(attention_decode.attend_partition.py_func)  # compiled now, for this many streams

    @numba.njit(**KERNEL)
    def one_query(queries, keys, scoring, partials):
        attend_partition(queries, keys, scoring, 1, 0, partials)

    for S in (1, 2, 63, 64, 65, 131):
        q, k, v, mask = case(1, S, 4, 1, 32)
        partials = room(1, 4, 32)
        one_query(Queries(q[:, None], *mask[:2]), Keys(k, v, mask.key_positions), SCORING, partials)
        expected = attention.formula(q, k, v, mask, 0.1, None)
        np.testing.assert_allclose(partials.totals / partials.states[:, :, 1:], expected, atol=1e-5)


@numba.njit(**KERNEL)
def in_partitions(queries, keys, scoring, partitions, partials, out):
    for task in range(len(queries.q) * partitions):
        attention_decode.attend_partition(queries, keys, scoring, partitions, task, partials)
    merge_partitions(partials, out)


@pytest.mark.parametrize("partitions", [1, 2, 5, 40])
def test_any_number_of_partitions_gives_the_definition(partitions):
    """With 40 of 70 keys some partitions are empty, and some keys no query sees."""
    T, S, N, K, H = 3, 70, 6, 2, 32
    q, k, v, mask = case(T, S, N, K, H)
    partials, out = room(T * K * partitions, N // K, H), np.empty((T * K, N // K, H), np.float32)
    queries = Queries(q.reshape(T, K, N // K, H), *mask[:2])
    in_partitions(queries, Keys(k, v, mask.key_positions), SCORING, partitions, partials, out)
    np.testing.assert_allclose(out.reshape(T, N, H), attention.formula(q, k, v, mask, 0.1, None), atol=1e-5)


@pytest.mark.parametrize(
    "queries, keys, heads, workers, expected",
    [(1, 10, 1, 8, 1), (1, 4096, 1, 2, 2), (1, 64, 1, 8, 2), (1, 64, 4, 8, 8), (4, 4096, 1, 2, 1), (3, 4096, 1, 8, 3)],
)
def test_partitions_give_every_thread_work_and_no_less_than_32_keys(queries, keys, heads, workers, expected):
    assert partitions_of.py_func(queries, keys, heads, workers) == expected


def test_far_into_a_context_fewer_queries_count_as_decoding():
    assert is_decode(DECODE_QUERIES, FAR + 1) and not is_decode(DECODE_QUERIES + 1, FAR + 1)
    assert is_decode(2 * DECODE_QUERIES, FAR) and not is_decode(2 * DECODE_QUERIES + 1, 0)
