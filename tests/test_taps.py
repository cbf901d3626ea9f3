"""Taps and Edits: named values of a run, by glob, kept or changed, and nothing paid when nothing is asked for."""

import importlib.util
from pathlib import Path

import numpy as np
import pytest
from support.folders import CONFIGS, ids, random_weights, write_folder
from support.small_models import EYES, LOCAL_GLOBAL, RECURRENT, SEEING

import minigemma as mg
from minigemma.cli.random_weights import random_model
from minigemma.models import fused

DOCS = Path(__file__).parents[1] / "docs"


@pytest.fixture(scope="module", params=["gemma", "gemma2", "gemma3"])
def model(request, tmp_path_factory):
    config = CONFIGS[request.param]
    return mg.load(write_folder(tmp_path_factory.mktemp("hf") / "model", config, random_weights(config)))


def test_values_come_by_name_and_pattern(model):
    taps = mg.Taps("embedding", "blocks.*.residual.out", "blocks.1.attention.?")
    model.forward(ids, taps=taps)
    expected = {"embedding", *(f"blocks.{i}.residual.out" for i in range(model.config.layers))}
    assert set(taps) == expected | {f"blocks.1.attention.{name}" for name in "qkv"}
    assert taps["blocks.1.attention.q"].shape == (40, 4, 64)
    assert taps["blocks.1.attention.k"].shape == (40, 2, 64)


def test_attention_probabilities_are_a_distribution_over_the_window(model):
    taps = mg.Taps("blocks.0.attention.probs")
    model.forward(ids, taps=taps)
    probs = taps["blocks.0.attention.probs"]  # [N, T, S]
    np.testing.assert_allclose(probs.sum(-1), 1, atol=1e-5)
    window = model.config.attention(0).window or len(ids)
    distance = np.arange(len(ids))[:, None] - np.arange(len(ids))[None]
    hidden = (distance < 0) | (distance >= window)
    assert not probs[:, hidden].any()
    assert (probs[:, ~hidden] > 0).all()


def test_logits_are_the_same_with_and_without_taps(model):
    taps = mg.Taps("*")
    tapped = model.forward(ids, taps=taps)
    np.testing.assert_allclose(model.forward(ids), tapped, atol=1e-5 * np.abs(tapped).max())
    assert (taps["logits"] == tapped).all()
    last = f"blocks.{model.config.layers - 1}.residual.out"
    assert taps[last].shape == (40, 256)


def test_a_pattern_that_nothing_is_named_by_is_refused_with_the_nearest_names(model):
    with pytest.raises(ValueError, match=r"'block\.\*\.residual\.out'; the nearest are blocks\.\d\.residual"):
        model.forward(ids, taps=mg.Taps("logits", "block.*.residual.out"))


def test_public_names_are_listed_and_objects_say_what_they_are(model):
    assert {"load", "generate", "Chat", "Taps", "score"} <= set(dir(mg))
    assert repr(model).startswith(f"<{type(model).__name__} ") and "layers, width 256" in repr(model)
    assert repr(model.weights).startswith(f"<DecoderWeights: {model.config.layers} layers, embedding ")
    assert repr(model.new_cache(8)).startswith("<Cache: 0 of 8 tokens")
    assert repr(mg.Chat(model)) == f"<Chat with {model.name or 'a model'}: 0 messages>"


def test_without_patterns_nothing_is_kept(model):
    taps = mg.Taps()
    model.forward(ids, taps=taps)
    assert taps == {}


def test_the_table_in_the_docs_is_made_from_the_code():
    spec = importlib.util.spec_from_file_location("make_taps", DOCS / "make_taps.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    assert module.table() == (DOCS / "taps.md").read_text("utf-8"), "python docs/make_taps.py > docs/taps.md"


EVERY_FAMILY = {
    "Gemma 2": LOCAL_GLOBAL,
    "Gemma 3 with images": SEEING,
    "RecurrentGemma": RECURRENT,
}
TOKENS = list(range(2, 22))


@pytest.fixture(scope="module", params=EVERY_FAMILY)
def run(request):
    """A small model and a function that runs it on 20 tokens, four of them an image's where it sees."""
    model, images, tokens = random_model(EVERY_FAMILY[request.param], "f32"), None, list(TOKENS)
    if model.vision:
        tokens[4:8] = [EYES.image_token] * EYES.tokens
        images = np.random.default_rng(1).uniform(-1, 1, (1, 3, EYES.side, EYES.side)).astype(np.float32)
    return model, lambda taps=None, **options: model.forward(tokens, images=images, taps=taps, **options)


def test_every_value_that_is_edited_is_what_the_model_continues_with(run):
    _, forward = run
    taps = mg.Taps("*")
    plain = forward(taps)
    scale = np.abs(plain).max()
    same = forward(mg.Edits({"*": lambda value, name: value}))
    np.testing.assert_allclose(same, plain, atol=1e-6 * scale)
    noise = np.random.default_rng(0)
    for name in taps:
        edits = mg.Edits({name: lambda value, _: value * noise.uniform(0, 1, value.shape).astype(np.float32)}, name)
        changed = forward(edits)
        assert np.abs(changed - plain).max() > 1e-4 * scale, name
        assert set(edits) == {name} and edits[name].shape == taps[name].shape


def test_ablating_a_head_equals_zero_columns_of_its_output_matrix(run):
    model, _ = run
    layer, H = next(i for i, w in enumerate(model.weights.blocks) if w.attention), model.config.head_dim

    def silence(heads, name):
        heads[:, 1] = 0
        return heads

    columns = model.weights.blocks[layer].attention.o.widen().copy()
    columns[:, H : 2 * H] = 0
    without = model.with_weights({f"blocks.{layer}.attention.o": columns})
    ids = list(TOKENS)
    edits = mg.Edits({f"blocks.{layer}.attention.heads": silence})
    ablated = model.forward(ids, taps=edits)
    assert (ablated == without.forward(ids)).all()
    assert (ablated != model.forward(ids)).any()


def test_a_residual_patched_from_another_run_gives_the_logits_of_that_run(run):
    model, _ = run
    other = mg.Taps("blocks.1.residual.out", "logits")
    model.forward(TOKENS[::-1], taps=other)
    edits = mg.Edits({"blocks.1.residual.out": lambda value, name: other[name]})
    assert (model.forward(TOKENS, taps=edits) == other["logits"]).all()


def test_edits_apply_in_order_and_by_pattern(run):
    model, forward = run
    seen = []

    def note(value, name):
        seen.append(name)
        return value

    forward(mg.Edits({"blocks.*.ffn.out": note, "blocks.0.*.out": note}))
    layers = model.config.layers
    assert [name for name in seen if "ffn" in name].count("blocks.0.ffn.out") == 2
    assert len([name for name in seen if "ffn" in name]) == layers + 1


def test_a_function_that_returns_no_array_of_the_same_shape_is_refused(run):
    _, forward = run
    for wrong, what in (
        (None, "no array"),
        ([1, [2]], "no array"),
        (np.zeros(3), r"float64 \[3\]"),
        (np.zeros((20, 64), int), "int64"),
    ):
        with pytest.raises(ValueError, match=rf"the edit of embedding returned {what}.*must return float32 \[20, 64\]"):
            forward(mg.Edits({"embedding": lambda value, name, wrong=wrong: wrong}))
    with pytest.raises(ValueError, match=r"'blocks\.0\.atention\.heads'; the nearest are blocks\.\d\.attention\.heads"):
        forward(mg.Edits({"blocks.0.atention.heads": lambda value, name: value}))


def test_a_misspelt_pattern_leaves_the_cache_as_it_was(run):
    model, _ = run
    cache = model.new_cache(8)
    for taps in (mg.Taps("logitz"), mg.Edits({"blocks.9.ffn.out": lambda value, name: value}), mg.Taps("")):
        with pytest.raises(ValueError, match=r"the nearest are \S+, \S+, "):
            model.forward(TOKENS[:4], cache, taps=taps)
    assert cache.position == 0
    assert (model.forward(TOKENS[:4], cache) == model.forward(TOKENS[:4])).all()


def test_shapes_are_those_of_the_docs_also_where_only_the_last_logits_are_wanted(run):
    model, forward = run
    taps, last = mg.Taps("*"), mg.Taps("*")
    logits, last_logits = forward(taps), forward(last, last_only=True)
    assert {name: value.shape for name, value in taps.items()} == {name: value.shape for name, value in last.items()}
    assert last_logits.shape == (1, model.config.vocab) and (last_logits[0] == logits[-1]).all()
    assert forward(mg.Taps("embedding"), last_only=True).shape == last_logits.shape


def test_without_edits_the_fused_kernels_run_and_with_edits_the_definition_of_a_layer(run, monkeypatch):
    model, _ = run
    calls = []
    for name in ("fused_attention_layers", "fused_recurrent_layer"):
        kernel = getattr(fused, name)
        monkeypatch.setattr(fused, name, lambda *args, kernel=kernel: (calls.append(1), kernel(*args))[1])
    for taps in (None, mg.Edits({})):
        model.forward(TOKENS[:4], taps=taps)
    assert len(calls) == 2 * model.config.layers
    model.forward(TOKENS[:4], taps=mg.Edits({"blocks.0.ffn.out": lambda value, name: value}))
    assert len(calls) == 2 * model.config.layers


def test_generated_and_scored_text_comes_from_the_edited_model():
    model = random_model(LOCAL_GLOBAL, "f32")

    def only_seven(logits, name):
        return np.where(np.arange(logits.shape[-1]) == 7, logits + 1e4, logits)

    edits = mg.Edits({"logits": only_seven})
    tokens = mg.stream_generate(model, TOKENS, max_new_tokens=5, temperature=0, taps=edits)
    assert [token.token for token in tokens] == [7] * 5
    assert mg.score(model, [2, 7, 7], taps=edits).perplexity == pytest.approx(1)
