"""Caches for texts that begin alike: never one that is not what reading gives."""

import numpy as np
import pytest

from minigemma.cli.random_weights import random_model
from minigemma.text.prefixes import Prefixes, key_of
from tests.support.small_models import LOCAL_GLOBAL, RECURRENT, SEEING

IDS = np.random.default_rng(1).integers(3, 290, 60)


def read(model, ids):
    cache = model.new_cache(200)
    model.forward(ids.tolist(), cache, last_only=True)
    return cache


@pytest.mark.parametrize("config", [LOCAL_GLOBAL, RECURRENT, SEEING], ids=lambda config: config.family)
def test_what_is_found_continues_as_if_it_had_been_read(config):
    model, prefixes = random_model(config, "f32"), Prefixes(4)
    prefixes.keep(IDS[:30], read(model, IDS[:30]))
    found = prefixes.find(IDS)
    assert found.cache.position == 30 and found.fork == 0
    expected = model.forward(IDS.tolist(), last_only=True)
    np.testing.assert_allclose(model.forward(IDS[30:].tolist(), found.cache, last_only=True), expected, atol=1e-4)
    assert prefixes.find(IDS).cache.position == 30  # what was found is a copy


@pytest.mark.parametrize("config", [LOCAL_GLOBAL, RECURRENT], ids=lambda config: config.family)
def test_a_text_that_parts_after_a_ring_has_wrapped_is_read_from_its_beginning(config):
    model, prefixes = random_model(config, "f32"), Prefixes(4)
    prefixes.keep(IDS[:30], read(model, IDS[:30]))
    other = np.concatenate([IDS[:20], IDS[40:]])
    assert prefixes.find(other) == (None, 20)
    prefixes.keep(other[:20], read(model, other[:20]))
    assert prefixes.find(np.concatenate([IDS[:20], IDS[50:]])).cache.position == 20


def test_before_a_ring_wraps_a_cache_is_cut():
    model, prefixes = random_model(LOCAL_GLOBAL.__class__(**vars(LOCAL_GLOBAL) | {"window": 64}), "f32"), Prefixes(4)
    prefixes.keep(IDS[:30], read(model, IDS[:30]))
    other = np.concatenate([IDS[:20], IDS[40:]])
    found = prefixes.find(other)
    assert found.cache.position == 20 and found.fork == 0
    expected = model.forward(other.tolist(), last_only=True)
    np.testing.assert_allclose(model.forward(other[20:].tolist(), found.cache, last_only=True), expected, atol=1e-4)
    assert prefixes.find(IDS[:30]).cache.position == 29  # the last token is read, for its logits


def test_the_oldest_are_dropped_and_what_a_longer_one_can_serve():
    model, prefixes = random_model(LOCAL_GLOBAL, "f32"), Prefixes(2)
    for count in (4, 6):  # the window of 8 has not wrapped
        prefixes.keep(IDS[:count], read(model, IDS[:count]))
    assert [len(each.key) for each in prefixes.kept] == [6]
    for first in (10, 20, 30):
        prefixes.keep(IDS[first : first + 20], read(model, IDS[first : first + 20]))
    assert [int(each.key[0]) for each in prefixes.kept] == IDS[[20, 30]].tolist()
    prefixes.find(IDS[20:45])
    assert int(prefixes.kept[-1].key[0]) == IDS[20]


def test_images_are_part_of_a_key():
    ids = [2, 9, 9, 9, 4]
    assert key_of(ids, [(1, 4)], [5]).tolist() == [2, -6, -6, -6, 4]
