"""The fused kernels, against the definitions of the blocks."""

from dataclasses import replace

import numpy as np
import pytest

import minigemma as mg
from minigemma.blocks.layers import attention_layer
from minigemma.cache import RecurrentState, TokenPositions
from minigemma.cli.random_weights import random_model
from minigemma.kernels.dispatch import few
from minigemma.kernels.fused_attention import Layers, fused_attention_layers
from minigemma.kernels.parallel import most_threads
from minigemma.models import fused
from minigemma.models.gemma import GemmaConfig
from minigemma.models.gemma2 import Gemma2Config
from minigemma.models.gemma3 import Gemma3Config
from minigemma.models.recurrentgemma import RecurrentGemmaConfig

SIZES = {"layers": 3, "width": 64, "heads": 4, "kv_heads": 2, "head_dim": 32, "ffn_width": 96, "vocab": 300}
CONFIGS = {
    "gemma": GemmaConfig(**SIZES),
    "gemma2": Gemma2Config(**SIZES, window=8, attention_cap=2.0, logit_cap=3.0),
    "gemma3": Gemma3Config(**SIZES, window=8, pattern=3, rope_scale=8.0),
    "one key head": Gemma3Config(**{**SIZES, "heads": 3, "kv_heads": 1}, window=8, pattern=2),
}
GRIFFIN = {**SIZES, "layers": 5, "kv_heads": 1, "lru_width": 128, "gate_blocks": 2, "window": 7}
CONFIGS["recurrentgemma"] = RecurrentGemmaConfig(**GRIFFIN)
OFF = mg.Taps("final_norm")  # with taps the definitions run
OFF_BY = {"int8": 5e-4, "int8-row": 5e-4, "int4-row": 2e-2, "int4": 2e-2, "int4-symmetric": 2e-2}


@pytest.fixture
def calls(monkeypatch):
    """The tokens of each layer that a fused kernel ran, by the kernel's name."""
    made = {"fused_attention_layers": [], "fused_recurrent_layer": []}

    def counted(found, kernel):
        def call(workers, x, layers, *rest):
            attention = kernel is fused_attention_layers
            found.extend([len(x)] * (len(Layers(*layers).ropes) if attention else 1))
            kernel(workers, x, layers, *rest)

        return call

    for name, found in made.items():
        monkeypatch.setattr(fused, name, counted(found, getattr(fused, name)))
    return made


def layers(model):
    """How many layers have attention, and how many are recurrent."""
    attention = sum(block.attention is not None for block in model.weights.blocks)
    return attention, len(model.weights.blocks) - attention


@pytest.mark.parametrize("name", CONFIGS)
@pytest.mark.parametrize("dtype", ["f32", "bf16", "int8", "int4", "int8-row", "int4-row"])
@pytest.mark.parametrize("threads", [1, 2])
def test_it_is_the_block(name, dtype, threads, calls):
    model = random_model(CONFIGS[name], dtype)
    model.threads = threads
    fast, slow = model.new_cache(40), model.new_cache(40)
    ids = np.random.default_rng(0).integers(0, 300, 30).tolist()
    for cache in (fast, slow):
        model.forward(ids[:5], cache, taps=OFF)
    for i in ids[5:]:  # through the window of 8 three times
        got, expected = model.forward([i], fast), model.forward([i], slow, taps=OFF)
        np.testing.assert_allclose(got, expected, atol=2e-6 * abs(expected).max())
    assert_same_state(fast, slow)
    attention, recurrent = layers(model)
    assert (
        calls["fused_attention_layers"] == [1] * 25 * attention
        and calls["fused_recurrent_layer"] == [1] * 25 * recurrent
    )


@pytest.mark.parametrize("name", CONFIGS)
@pytest.mark.parametrize("dtype", ["f32", "bf16", "int8", "int4", "int8-row", "int4-row"])
@pytest.mark.parametrize("kept", ["f32", "bf16"])
def test_several_tokens_are_the_block(name, dtype, kept, calls):
    """Up to `few` tokens, in each layer as long as they do not wrap its ring, where the definition runs."""
    model = random_model(replace(CONFIGS[name], **({} if name == "gemma" else {"window": 40})), dtype)
    model.threads = 1 if kept == "bf16" else most_threads()
    fast, slow = model.new_cache(80, kept), model.new_cache(80, kept)
    limits, at, expected_calls = [ring.limit for ring in fast.layers if hasattr(ring, "limit")], 0, []
    ids, counts = np.random.default_rng(0).integers(0, 300, 80).tolist(), (3, 2, 1, few(), 4, 5, 8, 2, 7, 1, few() + 1)
    for count in counts:
        some, ids = ids[:count], ids[count:]
        last_only = count % 2 == 0
        got = model.forward(some, fast, last_only=last_only)
        expected = model.forward(some, slow, taps=OFF, last_only=last_only)
        # where x is rounded, to 16 bits or 8, and keys, what differs in its last digit may be rounded otherwise
        off_by = OFF_BY.get(dtype, 2e-5) + (0 if kept == "f32" else 5e-3)
        np.testing.assert_allclose(got, expected, atol=off_by * abs(expected).max())
        if count <= few():
            expected_calls += [count for limit in limits if count == 1 or at + count <= limit]
        at += count
    assert calls["fused_attention_layers"] == expected_calls
    together = [count for count in counts if count <= few()]
    assert len(calls["fused_recurrent_layer"]) == len(together) * layers(model)[1]


def assert_same_state(fast, slow):
    assert fast.position == slow.position and fast.nbytes == slow.nbytes
    for one, other in zip(fast.layers, slow.layers, strict=True):
        if isinstance(one, RecurrentState):
            pairs = (one.tail, other.tail), (one.h, other.h)
        else:
            pairs = (one.keys, other.keys), (one.values, other.values)
        for a, b in pairs:
            assert a.dtype == b.dtype and a.shape == b.shape
            # a sum that comes out otherwise in its last digit may round to the next bf16
            near = 1e-5 if a.dtype == np.float32 else 2**-7
            np.testing.assert_allclose(widen(a), widen(b), rtol=near, atol=1e-5)


def widen(x):
    return (x.astype(np.uint32) << 16).view(np.float32) if x.dtype == np.uint16 else x


def test_many_keys_are_shared_out_among_threads():
    model = random_model(CONFIGS["gemma3"], "bf16")
    fast, slow = model.new_cache(3000), model.new_cache(3000)
    ids = np.random.default_rng(1).integers(0, 300, 2500).tolist()
    for cache in (fast, slow):
        model.forward(ids, cache, last_only=True)
    got, expected = model.forward([7], fast), model.forward([7], slow, taps=OFF)
    np.testing.assert_allclose(got, expected, atol=2e-6 * abs(expected).max())


def test_rounding_to_bf16_in_a_kernel():
    from numba import njit

    from minigemma.arrays import round_bf16
    from minigemma.kernels.simd.memory import bf16_bits

    @njit
    def rounded(x, y):
        for i in range(x.size):
            y[i] = bf16_bits(x[i])

    x = np.random.default_rng(0).integers(0, 2**32, 100_000, np.uint64).astype(np.uint32).view(np.float32)
    x[:6] = np.nan, np.inf, -np.inf, 0, -0.0, 3.4e38
    y = np.empty(x.shape, np.uint16)
    rounded(x, y)
    expected, numbers = round_bf16(x), ~np.isnan(x)
    assert np.array_equal(y[numbers], expected[numbers])
    assert np.isnan(widen(y[~numbers])).all()


@pytest.mark.parametrize("pattern", [("recurrent",), ("attention",), ("attention", "recurrent", "attention")])
@pytest.mark.parametrize("dtype", ["f32", "bf16", "int8", "int4", "int8-row", "int4-row"])
@pytest.mark.parametrize("threads", [1, 2])
def test_recurrent_layers_from_the_first_token_on(pattern, dtype, threads):
    """Also without any attention, and without any recurrence. A sequence of one token is the first token too."""
    config = RecurrentGemmaConfig(**{**GRIFFIN, "layers": 4}, pattern=pattern)
    model = random_model(config, dtype, threads=threads)
    fast, slow = model.new_cache(20), model.new_cache(20)
    for i in np.random.default_rng(3).integers(0, 300, 20).tolist():
        got, expected = model.forward([i], fast), model.forward([i], slow, taps=OFF)
        np.testing.assert_allclose(got, expected, atol=2e-6 * abs(expected).max())
    assert_same_state(fast, slow)


@pytest.mark.parametrize("position", [0, 4])
@pytest.mark.parametrize("tokens", [1, 3])
def test_an_interrupted_call_leaves_the_state_as_it_was(monkeypatch, position, tokens):
    """Not even half of the layers' states move on: tokens can be repeated, and others come in their place."""
    model = random_model(CONFIGS["recurrentgemma"], "bf16")
    fast, slow = model.new_cache(20), model.new_cache(20)
    for i in range(position):
        model.forward([i], fast)
        model.forward([i], slow, taps=OFF)
    before = fast.copy()

    def interrupted(*_):
        raise KeyboardInterrupt

    for where in ("minigemma.models.fused.fused_attention_layers", "minigemma.cache.Cache.advance"):
        with monkeypatch.context() as patch:
            patch.setattr(where, interrupted)
            with pytest.raises(KeyboardInterrupt):
                model.forward([9, 8, 7][:tokens], fast)
        assert fast.position == position
        for one, other in zip(fast.layers, before.layers, strict=True):
            if isinstance(one, RecurrentState):
                assert np.array_equal(one.tail, other.tail) and np.array_equal(one.h, other.h)
    for i in range(10, 20 - position):
        got, expected = model.forward([i], fast), model.forward([i], slow, taps=OFF)
        np.testing.assert_allclose(got, expected, atol=2e-6 * abs(expected).max())
    assert_same_state(fast, slow)


def test_models_of_another_kind_keep_their_blocks(calls):
    narrow = RecurrentGemmaConfig(**{**GRIFFIN, "gate_blocks": 32})  # blocks of four channels
    assert np.isfinite(random_model(narrow, "bf16").forward([1])).all()
    assert not calls["fused_recurrent_layer"] and calls["fused_attention_layers"]


def test_weights_of_several_formats(calls):
    """A file may hold its layers' matrices in different blocks, as llama.cpp's mixed formats do."""
    few, many = (random_model(CONFIGS["gemma3"], dtype) for dtype in ("int4-symmetric", "int8"))
    blocks = tuple(
        replace(a, attention=replace(a.attention, v=b.attention.v), ffn=replace(a.ffn, down=b.ffn.down))
        for a, b in zip(few.weights.blocks, many.weights.blocks, strict=True)
    )
    few.weights = replace(few.weights, blocks=blocks)
    expected = formulas(few, [3, 4, 5])
    np.testing.assert_allclose(few.forward([3, 4, 5]), expected, atol=2e-2 * abs(expected).max())  # x is of 8 bits
    assert not calls["fused_attention_layers"]  # q and v differ
    blocks = tuple(
        replace(a, ffn=replace(a.ffn, down=b.ffn.down))
        for a, b in zip(random_model(CONFIGS["gemma3"], "int4").weights.blocks, many.weights.blocks, strict=True)
    )
    mixed = random_model(CONFIGS["gemma3"], "int4")
    mixed.weights = replace(mixed.weights, blocks=blocks)
    cache, slow = mixed.new_cache(9), mixed.new_cache(9)
    for i in (3, 4, 5):
        got, expected = mixed.forward([i], cache), mixed.forward([i], slow, taps=OFF)
    np.testing.assert_allclose(got, expected, atol=2e-6 * abs(expected).max())
    assert len(calls["fused_attention_layers"]) == 9


def test_layers_that_take_turns_in_their_formats(calls):
    """Each layer runs on the kernel of its own layouts."""
    order = ("bf16", "bf16", "f32", "int8", "int4", "int4", "bf16")
    config = Gemma3Config(**{**SIZES, "layers": len(order)}, window=8, pattern=3, rope_scale=8.0)
    model = random_model(config, "bf16")
    blocks = tuple(random_model(config, dtype).weights.blocks[i] for i, dtype in enumerate(order))
    model.weights = replace(model.weights, blocks=blocks)
    cache, slow = model.new_cache(20), model.new_cache(20)
    for i in range(12):
        got, expected = model.forward([i], cache), model.forward([i], slow, taps=OFF)
    np.testing.assert_allclose(got, expected, atol=2e-6 * abs(expected).max())
    assert len(calls["fused_attention_layers"]) == 12 * len(order)


def test_tokens_of_an_image_and_a_far_cache_keep_the_block(calls):
    """Tokens that see past themselves; and more queries than decoding's kernel is made for, before many keys."""
    model = random_model(CONFIGS["gemma"], "bf16")
    w, config, taps = model.weights.blocks[0], model.attention[0], mg.Taps().within("blocks.0")
    x, here = np.random.default_rng(0).standard_normal((3, 64), np.float32), np.arange(3, dtype=np.int32)
    for last_visible, expected in ((here, [3]), (here.copy(), [3]), (np.full_like(here, 2), [3])):
        ring = model.layer_state(0, 9, np.float32)
        attention_layer(x, w, config, ring, TokenPositions(here, last_visible, 3), taps)
        assert calls["fused_attention_layers"] == expected
    far, cache = list(range(9)), model.new_cache(2000)
    cache.skip_to(1500)
    model.forward(far, cache)
    assert calls["fused_attention_layers"] == [3]


def formulas(model, ids):
    model.backend = "numpy"
    try:
        return model.forward(ids)
    finally:
        model.backend = "numba"


@pytest.mark.parametrize("dtype", ["bf16", "int8"])
def test_keys_and_values_in_float32_on_request(dtype):
    """What bf16 costs is the rounding of keys and values, 2⁻⁹ of each; in float32 a cached run is the uncached one."""
    model = random_model(CONFIGS["gemma2"], dtype)
    ids = np.random.default_rng(2).integers(0, 300, 40).tolist()
    wide, narrow = model.new_cache(40, "f32"), model.new_cache(40, "bf16")
    assert narrow.layers[0].keys.dtype == model.new_cache(40).layers[0].keys.dtype == np.uint16
    assert wide.nbytes == 2 * narrow.nbytes
    exact = formulas_in_float32(model, ids)
    off = {}
    for name, cache in (("wide", wide), ("narrow", narrow)):
        model.forward(ids[:20], cache)
        for i in ids[20:]:
            logits = model.forward([i], cache)
        off[name] = abs(logits - exact).max() / abs(exact).max()
    assert off["wide"] < 1e-4 < off["narrow"] < 2e-2
    with pytest.raises(ValueError, match=r"'int8'.*'bf16' or 'f32'"):
        model.new_cache(9, "int8")


def formulas_in_float32(model, ids):
    model.backend = "numpy"
    try:
        return model.forward(ids, model.new_cache(len(ids), "f32"))[-1]
    finally:
        model.backend = "numba"
