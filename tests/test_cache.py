"""Rings: exactly the window's keys, whatever the pieces; an interrupted pass leaves the cache whole."""

import copy
import pickle
from mmap import mmap

import numpy as np
import pytest

from minigemma.arrays import own_pages
from minigemma.cache import Cache, KeyValueRing
from minigemma.cli.random_weights import random_model
from tests.support.small_models import LOCAL_GLOBAL, RECURRENT


def token(position):
    """Keys and values that tell their position: [1, 2, 3]."""
    return np.full((1, 2, 3), position, np.float32)


def tokens(first, count):
    return np.concatenate([token(p) for p in range(first, first + count)])


@pytest.mark.parametrize("window", [1, 2, 5, 300])
@pytest.mark.parametrize("piece", [1, 2, 3, 7, 64])
def test_what_is_offered_holds_every_visible_key_at_its_position(window, piece):
    ring = KeyValueRing(window, 2, 3, np.float32)
    for first in range(0, 700 if window == 300 else 60, piece):
        keys, values, positions = ring.extend(tokens(first, piece), -tokens(first, piece), first)
        assert (keys[:, 0, 0] == positions).all()
        assert (values == -keys).all()
        offered = set(positions.tolist())
        assert len(offered) == len(positions)
        assert offered >= set(range(max(0, first - window + 1), first + piece)) - set(range(first + piece, first))
        ring.commit(first + piece)
    assert len(ring.keys) == window
    assert ring.nbytes == 2 * window * 2 * 3 * 4


def test_a_global_ring_grows_and_never_wraps():
    ring = KeyValueRing(2000, 2, 3, np.uint16)
    small = ring.nbytes
    for first in range(0, 2000, 100):
        _, _, positions = ring.extend(tokens(first, 100), tokens(first, 100), first)
        ring.commit(first + 100)
        assert (positions == np.arange(first + 100)).all()
    assert small < ring.nbytes == 2 * 2000 * 2 * 3 * 2


@pytest.mark.parametrize("piece", [1, 3, 9])
def test_an_interrupted_piece_can_be_repeated(piece):
    """Nothing that the repetition needs is gone, even if the first attempt was for a longer piece."""
    whole, broken = KeyValueRing(5, 2, 3, np.float32), KeyValueRing(5, 2, 3, np.float32)
    for ring in (whole, broken):
        ring.extend(tokens(0, 11), tokens(0, 11), 0)
        ring.commit(11)
    broken.extend(tokens(11, piece) + 1000, tokens(11, piece), 11)  # never committed
    for first in (11, 12, 13):
        expected, found = (ring.extend(tokens(first, 1), tokens(first, 1), first) for ring in (whole, broken))
        for a, b in zip(expected, found, strict=True):
            assert (a == b).all()
        whole.commit(first + 1), broken.commit(first + 1)


def make_cache():
    return Cache((KeyValueRing(4, 2, 3, np.float32), KeyValueRing(50, 2, 3, np.float32)), 50)


def test_position_moves_when_all_layers_are_done_and_copies_are_independent():
    cache = make_cache()
    for ring in cache.layers:
        ring.extend(tokens(0, 6), tokens(0, 6), 0)
    assert cache.position == 0
    cache.advance(range(6))
    assert cache.position == 6
    other = cache.copy()
    for ring in other.layers:
        ring.extend(tokens(6, 1) + 100, tokens(6, 1), 6)
    other.advance([6])
    assert (cache.ids.tolist(), other.ids.tolist()) == ([*range(6)], [*range(7)])
    assert (cache.position, other.position) == (6, 7)
    assert cache.layers[0].keys.max() == 5
    assert other.layers[0].keys.max() == 106


def test_an_interrupted_advance_is_finished_later():
    cache = make_cache()
    for ring in cache.layers:
        ring.extend(tokens(0, 6), tokens(0, 6), 0)
    commit, cache.layers[1].commit = cache.layers[1].commit, lambda count: 1 / 0
    with pytest.raises(ZeroDivisionError):
        cache.advance(range(6))
    assert cache.position == 0
    cache.layers[1].commit = commit
    cache.settle()
    assert cache.position == 6


def test_reserved_slots_are_those_that_extend_fills():
    """Token by token and several at once, across growing and wrapping."""
    for limit in (5, 2000, 700):
        ours, others = (KeyValueRing(limit, 2, 3, np.uint16) for _ in range(2))
        position = 0
        while position < 1500:
            count = 3 if position % 400 == 399 and position + 3 <= limit else 1
            ours.reserve(position + count)
            keys, _, positions = others.extend(tokens(position, count), tokens(position, count), position)
            slot = position % limit
            assert len(ours.keys) == len(others.keys)
            np.testing.assert_array_equal(positions[slot : slot + count], range(position, position + count))
            position += count
            others.commit(position)
        assert len(keys) == min(limit, position)


def test_what_an_interrupted_pass_held_back_is_dropped():
    ring = KeyValueRing(5, 2, 3, np.float32)
    ring.extend(tokens(0, 9), tokens(0, 9), 0)  # never committed
    ring.commit(1)
    assert not ring.keys.any()


@pytest.mark.parametrize("again", [copy.deepcopy, lambda cache: pickle.loads(pickle.dumps(cache)), Cache.copy])
def test_copies_of_a_cache_lie_elsewhere(again):
    cache = Cache((KeyValueRing(5, 2, 3, np.float32),), 9)
    other = again(cache)
    assert other.max_tokens == 9
    (ring,) = other.layers
    ring.extend(tokens(3, 1), tokens(3, 1), 3)
    assert ring.keys.any() and not cache.layers[0].keys.any()


def test_a_models_cache_goes_to_another_process_and_without_the_model(tmp_path):
    model = random_model(LOCAL_GLOBAL, "f32")
    cache = model.new_cache(40)
    model.forward([3, 4, 5], cache)
    content = pickle.dumps(cache)
    assert len(content) < 2 * cache.nbytes + 10_000
    np.testing.assert_array_equal(model.forward([6], pickle.loads(content)), model.forward([6], cache.copy()))
    assert pickle.loads(pickle.dumps(pickle.loads(content))).fingerprint() == cache.fingerprint() != ""


def test_a_cache_is_cut_only_while_it_has_all_that_a_shorter_one_had():
    ids, model = list(range(3, 23)), random_model(LOCAL_GLOBAL, "f32")
    for count in (6, 12):  # the window is 8
        cache = model.new_cache(40)
        model.forward(ids[:count], cache)
        assert cache.can_copy(count) and cache.can_copy(5) == (count == 6)
        assert not cache.can_copy(count + 1) and not cache.can_copy(0)
    with pytest.raises(ValueError, match="position 12 cannot be cut to its first 5"):
        cache.copy(5)
    cache = model.new_cache(40)
    model.forward(ids[:8], cache)
    expected = model.forward(ids[:5] + ids[9:])
    np.testing.assert_allclose(model.forward(ids[9:], cache.copy(5))[-1], expected[-1], atol=1e-4)
    recurrent = random_model(RECURRENT, "f32")
    cache = recurrent.new_cache(40)
    recurrent.forward(ids[:6], cache)
    assert cache.can_copy(6) and not cache.can_copy(5)


def test_large_rings_have_pages_of_their_own_and_what_cannot_be_had_is_a_memory_error():
    ring = KeyValueRing(1000, 2, 256, np.float32)
    other, kept = ring.copy(), isinstance(ring.keys.base.base.obj, mmap)
    ring.keys[:] = 1
    assert kept and isinstance(other.values.base.base.obj, mmap) and not other.keys.any() and not ring.values.any()
    with pytest.raises(MemoryError, match="bytes of keys and values cannot be had"):
        own_pages((1 << 62,), np.uint8)
