"""Sequences that decode together: each equals the same sequence alone, whatever the others are, past three windows."""

import numpy as np
import pytest

from minigemma.blocks.layers import attention_layer, recurrent_layer
from minigemma.cli.random_weights import random_model
from minigemma.models.gemma2 import Gemma2Config
from minigemma.models.gemma3 import Gemma3Config
from minigemma.models.recurrentgemma import RecurrentGemmaConfig
from minigemma.models.together import forward_together

SIZES = {"width": 64, "heads": 4, "kv_heads": 2, "head_dim": 32, "ffn_width": 96, "vocab": 300}
CONFIGS = {
    "gemma2": Gemma2Config(**SIZES, layers=2, window=8, attention_cap=2.0, logit_cap=3.0),
    "gemma3": Gemma3Config(**SIZES, layers=3, window=8, pattern=3, rope_scale=8.0),
    "recurrentgemma": RecurrentGemmaConfig(
        **{**SIZES, "kv_heads": 1}, layers=3, lru_width=128, gate_blocks=2, window=7
    ),
}
# Sums of several rows are added up in another order, and what is then rounded may be rounded otherwise.
OFF_BY = {"f32": 5e-6, "bf16": 5e-3, "int8": 5e-3}


def assert_each_is_alone(model, lengths, steps, off_by):
    """Prompts of these lengths, each decoded alone and together, where sequence i joins at step i and skips some."""
    random = np.random.default_rng(0)
    prompts = [random.integers(0, 300, length).tolist() for length in lengths]
    alone, together = ([model.new_cache(80) for _ in prompts] for _ in range(2))
    for prompt, one, other in zip(prompts, alone, together, strict=True):
        model.forward(prompt, one)
        model.forward(prompt, other)
    for step in range(steps):
        present = random.permutation([i for i in range(len(prompts)) if i <= step and (step + i) % 5 != 4])
        ids = random.integers(0, 300, len(present)).tolist()
        expected = np.concatenate([model.forward([token], alone[i]) for token, i in zip(ids, present, strict=True)])
        got = forward_together(model, ids, [together[i] for i in present])
        np.testing.assert_allclose(got, expected, atol=off_by * abs(expected).max())
    assert [cache.position for cache in together] == [cache.position for cache in alone]


@pytest.mark.parametrize("name", CONFIGS)
@pytest.mark.parametrize("dtype", ["f32", "int8"])
def test_together_is_alone(name, dtype):
    """Prompts within the window, as long as it and three times as long; some sequences are absent from some steps."""
    assert_each_is_alone(random_model(CONFIGS[name], dtype), (1, 3, 8, 30, 11), 30, OFF_BY[dtype])


def test_as_many_as_a_kernel_takes_and_one_more():
    model = random_model(CONFIGS["gemma3"], "f32")
    assert_each_is_alone(model, range(1, 18), 25, OFF_BY["f32"])


@pytest.mark.parametrize("name", CONFIGS)
def test_the_definitions_alone(name):
    model = random_model(CONFIGS[name], "f32")
    model.backend = "numpy"
    assert_each_is_alone(model, (1, 9, 30), 12, OFF_BY["f32"])


def test_a_long_sequence_beside_short_ones():
    """Its keys are cut into more parts than there are."""
    model = random_model(CONFIGS["gemma3"], "f32")
    caches = [model.new_cache(3000) for _ in range(4)]
    ids = np.random.default_rng(1).integers(0, 300, 2500).tolist()
    for cache, count in zip(caches, (2500, 2, 1, 3), strict=True):
        model.forward(ids[:count], cache)
    expected = np.concatenate([model.forward([7], cache.copy()) for cache in caches])
    got = forward_together(model, [7] * 4, caches)
    np.testing.assert_allclose(got, expected, atol=5e-6 * abs(expected).max())


@pytest.mark.parametrize("name", CONFIGS)
def test_all_layers_go_in_fused_kernels(name, monkeypatch):
    """Also where layers of both kinds take turns; definitions of layers are never called."""
    model = random_model(CONFIGS[name], "bf16")
    caches = [model.new_cache(40, "f32") for _ in range(3)]
    for cache, count in zip(caches, (1, 9, 30), strict=True):
        model.forward(list(range(count)), cache)
    for layer in (attention_layer, recurrent_layer):
        monkeypatch.setattr(layer, "formula", None)
    assert np.isfinite(forward_together(model, [7] * 3, caches)).all()


def test_caches_of_both_types():
    model = random_model(CONFIGS["gemma2"], "bf16")
    caches = [model.new_cache(9, dtype) for dtype in ("bf16", "f32")]
    expected = np.concatenate([model.forward([7], cache.copy()) for cache in caches])
    np.testing.assert_allclose(forward_together(model, [7, 7], caches), expected, atol=5e-3 * abs(expected).max())


@pytest.mark.parametrize(
    "ids, which, told",
    [
        ([1, 2], [0, 0], "2 ids for 2 caches"),
        ([1], [0, 1], "1 ids for 2 caches"),
        ([1, 2], [0, 2], "1 held . 1 new tokens"),
        ([1, 300], [0, 1], "outside the vocabulary"),
        ([], [], "at least one token id"),
    ],
)
def test_what_is_refused_changes_nothing(ids, which, told):
    model = random_model(CONFIGS["gemma2"], "f32", layers=1)
    caches = [model.new_cache(size) for size in (9, 9, 1)]
    model.forward([3], caches[2])
    with pytest.raises(ValueError, match=told):
        forward_together(model, ids, [caches[i] for i in which])
    assert [cache.position for cache in caches] == [0, 0, 1]
