"""Caches on disk: a saved text continues exactly where it stopped, and a cache of another model is refused."""

import dataclasses
import json

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

import minigemma as mg
from minigemma.cache import checksum
from minigemma.cli.random_weights import random_model
from tests.support.small_models import LOCAL_GLOBAL, RECURRENT, TINY_GEMMA3

CONFIGS = [TINY_GEMMA3, LOCAL_GLOBAL, RECURRENT]
IDS = np.random.default_rng(0).integers(3, 300, 40).tolist()


@pytest.fixture(params=CONFIGS, ids=lambda config: config.family)
def model(request):
    return random_model(request.param, "bf16")


@pytest.fixture
def written(tmp_path):
    """A model, and a file of its cache that holds a text which has passed the window."""
    model = random_model(LOCAL_GLOBAL, "bf16")
    cache = model.new_cache(100)
    model.forward(IDS, cache)
    cache.save(tmp_path / "x.cache")
    return model, tmp_path / "x.cache"


@pytest.mark.parametrize("dtype", [None, "f32"])
@pytest.mark.parametrize("count", [0, 5, 8, 37])
def test_a_text_goes_on_from_its_file(model, count, dtype, tmp_path):
    cache = model.new_cache(60, dtype)
    if count:
        model.forward(IDS[:count], cache)
    cache.notes = "né"
    cache.save(tmp_path / "x.cache")
    again = mg.load_cache(model, tmp_path / "x.cache")
    assert again.ids.tolist() == IDS[:count] and again.notes == "né"
    assert again.max_tokens == model.config.context and [*tmp_path.iterdir()] == [tmp_path / "x.cache"]
    for token in IDS[count:]:
        np.testing.assert_array_equal(model.forward([token], again), model.forward([token], cache))


@pytest.mark.parametrize("room", [40, 41, 80])
def test_the_room_is_what_is_asked_for(written, room):
    model, path = written
    assert mg.load_cache(model, path, room).max_tokens == room
    with pytest.raises(mg.ModelFormatError, match="holds 40 tokens, and there is room for 39"):
        mg.load_cache(model, path, 39)


def test_the_context_and_the_vision_tower_do_not_make_another_model(written):
    model, path = written
    model.config = dataclasses.replace(model.config, context=50, name="other")
    assert mg.load_cache(model, path).max_tokens == 50


def test_the_cache_of_another_model_is_refused(written):
    model, path = written
    others = [random_model(LOCAL_GLOBAL, "f32"), random_model(LOCAL_GLOBAL, "bf16", seed=5), random_model(RECURRENT)]
    others.append(model.with_weights({"blocks.1.attention.o": np.zeros((64, 64), np.float32)}))
    for other in others:
        with pytest.raises(mg.ModelFormatError, match=r"x\.cache: is the cache of another model, or of other weights"):
            mg.load_cache(other, path)


def test_a_damaged_file_is_refused(written):
    model, path = written
    whole = bytearray(path.read_bytes())
    for at in (*range(0, 600, 37), *range(600, len(whole), 997), len(whole) - 1):
        path.write_bytes(whole[:at] + bytes([whole[at] ^ 16]) + whole[at + 1 :])
        with pytest.raises(mg.ModelFormatError):
            mg.load_cache(model, path)
    for size in (0, 7, 100, len(whole) - 1):
        path.write_bytes(whole[:size])
        with pytest.raises(mg.ModelFormatError):
            mg.load_cache(model, path)


def test_other_files_and_versions_are_refused(written, tmp_path):
    model, path = written
    with pytest.raises(mg.ModelFormatError, match="cannot be read"):
        mg.load_cache(model, tmp_path / "none")
    tensors = load_file(path)
    about = json.loads(tensors.pop("about").tobytes())

    def refused(told, tensors, **changed):
        text = json.dumps(about | {"checksum": checksum(tensors)} | changed).encode()
        save_file(tensors | {"about": np.frombuffer(text, np.uint8)}, path)
        with pytest.raises(mg.ModelFormatError, match=told):
            mg.load_cache(model, path)

    refused("is a cache of version 2, not 1", tensors, version=2)
    refused("other bytes than were written", tensors, checksum=1)
    refused("no values of layer 2", {name: x for name, x in tensors.items() if name != "layers.2.values"})
    refused("no keys of layer 0", tensors | {"layers.0.keys": tensors["layers.0.keys"][:4]})
    refused("other bytes", tensors | {"ids": tensors["ids"].astype(np.int64)})
    save_file(tensors, path)
    with pytest.raises(mg.ModelFormatError, match="is no cache of minigemma"):
        mg.load_cache(model, path)


def test_a_disk_that_is_full_leaves_the_file_that_was_there(written, monkeypatch):
    model, path = written
    before = path.read_bytes()

    def full(self, data):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(type(path), "write_bytes", full)
    with pytest.raises(OSError):
        model.new_cache(5).save(path)
    assert path.read_bytes() == before and [*path.parent.iterdir()] == [path]
