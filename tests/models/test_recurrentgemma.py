"""RecurrentGemma equals transformers and DeepMind's own torch code, and its state does not grow.

The checkpoints are small, random in every tensor, and awkward: an lru_width that is not the model's width, four heads
of gates, heads of 12 of which rope turns 6, 7 layers, so that the pattern of three is cut short, and decays from almost
1 to almost 0. The bound is 1e-4 of the largest logit, in float32 mode.

transformers' window counts the token itself, ours and DeepMind's does not: the same number in config.json means one
key more here, so transformers is asked with a window of W + 1.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from functools import cache
from operator import attrgetter
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from support import checkpoints, deepmind_answers
from support import transformers_answers as theirs
from support.checkpoints import RECURRENT, write_recurrent
from support.compare import TOLERANCE, distance, in_chunks
from support.oracles import live_only
from support.tensors import read, save

import minigemma as mg
from minigemma.cache import KeyValueRing
from minigemma.cli.main import main
from minigemma.errors import ModelFormatError
from minigemma.layouts import Weight
from minigemma.models.recurrentgemma import RecurrentGemma
from minigemma.models.registry import RELEASED, layer_tensors

W = RECURRENT["attention_window_size"]
T = 101
IDS = np.random.default_rng(11).integers(3, checkpoints.VOCAB - 1, T)
# What DeepMind's code has as constants.
DEEPMIND = {
    "rms_norm_eps": 1e-6,
    "rope_parameters": {"rope_type": "default", "rope_theta": 10_000.0, "partial_rotary_factor": 0.5},
}
BLOCKS_OF_32 = {
    "vocab_size": 160,
    "hidden_size": 64,
    "intermediate_size": 192,
    "lru_width": 96,
    "logits_soft_cap": 30.0,
}


CHANGES = {"": {}, "DEEPMIND": DEEPMIND, "BLOCKS_OF_32": BLOCKS_OF_32}


@pytest.fixture(scope="module")
def written(tmp_path_factory) -> Callable[..., Path]:
    """written(dtype, changes): a checkpoint, made once."""
    return cache(
        lambda dtype, changes="": write_recurrent(
            tmp_path_factory.mktemp(f"recurrentgemma-{dtype}"), dtype, **CHANGES[changes]
        )
    )


@pytest.fixture(scope="module")
def truth(written, answers) -> Callable[..., np.ndarray]:
    """truth(dtype, changes): transformers' logits for IDS."""
    return cache(lambda dtype, changes="": theirs.recurrent_logits(written(dtype, changes), IDS))


def assert_parity(found: np.ndarray, expected: np.ndarray, tolerance: float = TOLERANCE) -> None:
    assert found.shape == expected.shape
    apart = [distance(a, b) for a, b in zip(found, expected, strict=True)]
    far = [t for t, d in enumerate(apart) if d > tolerance]
    assert distance(found, expected) <= tolerance, f"{max(apart):.1e} of the largest logit; first at token {far[0]}"


# ---- transformers


@pytest.mark.parametrize("backend", ["numba", "numpy"])
@pytest.mark.parametrize("dtype", checkpoints.DTYPES)
def test_whole_text_in_one_call(truth, written, dtype, backend):
    assert_parity(mg.load(written(dtype), dtype="f32", backend=backend).forward(IDS), truth(dtype))


@pytest.mark.parametrize("size", [1, 3, 7, 64])
@pytest.mark.parametrize("backend", ["numba", "numpy"])
@pytest.mark.parametrize("dtype", checkpoints.DTYPES)
def test_text_in_chunks_through_a_cache(truth, written, dtype, backend, size):
    """Chunks of 1 and 3 are shorter than the convolution reaches, 7 and 64 as long as the window and longer."""
    model = mg.load(written(dtype), dtype="f32", backend=backend, threads=1 if size < 7 else None)
    assert_parity(in_chunks(model, size, IDS), truth(dtype))


def test_float32_file_as_stored_is_exact_too(truth, written):
    expected, model = truth("f32"), mg.load(written("f32"))
    assert_parity(model.forward(IDS), expected)
    assert_parity(model.forward(IDS, last_only=True), expected[-1:])


@pytest.mark.parametrize("size", [1, 7, T])
def test_bf16_mode_stays_near_the_exact_one(truth, written, size):
    """Keys and values are rounded to 8 bits, which gives 0.14 % of the logits' root mean square and 0.34 % of the
    largest logit for the worst single one: three times that is allowed, in chunks of any size.
    """
    expected = truth("bf16")
    found = in_chunks(mg.load(written("bf16"), threads=1 if size < 7 else None), size, IDS)
    assert np.sqrt(np.mean((found - expected) ** 2) / np.mean(expected**2)) < 0.0042
    assert distance(found, expected) < 0.01


def released_2b(config: dict[str, Any]) -> None:
    """`_block_types`; rope in two fields of its own; no context length."""
    config["_block_types"] = config.pop("block_types")
    rope = config.pop("rope_parameters")
    config |= {"rope_theta": rope["rope_theta"], "partial_rotary_factor": rope["partial_rotary_factor"]}
    config["torch_dtype"] = config.pop("dtype")
    config["embeddings_scale_by_sqrt_dim"] = True


def released_9b(config: dict[str, Any]) -> None:
    """As 2B's, but `block_types`."""
    released_2b(config)
    config["block_types"] = config.pop("_block_types")


def no_pattern(config: dict[str, Any]) -> None:
    del config["block_types"]


def no_rotary_factor(config: dict[str, Any]) -> None:
    """Half of each head is what a config means that does not say."""
    del config["rope_parameters"]["partial_rotary_factor"]


def edited(original: Path, folder: Path, edit: Callable[[dict[str, Any]], None]) -> Path:
    """A copy of a checkpoint with another config.json."""
    shutil.copytree(original, folder)
    config = json.loads((folder / "config.json").read_text())
    edit(config)
    (folder / "config.json").write_text(json.dumps(config))
    return folder


@pytest.mark.parametrize("edit", [released_2b, released_9b, no_pattern, no_rotary_factor])
def test_config_of_another_spelling_is_the_same_model(truth, written, tmp_path, edit):
    """Read by transformers too, so that our rewriting is known to mean the same there."""
    original, expected = written("bf16"), truth("bf16")
    folder = edited(original, tmp_path / "rewritten", edit)
    assert theirs.says_the_same(folder, original, IDS), "the rewritten folder is another model"
    model = mg.load(folder, dtype="f32")
    assert model.config == mg.load(original).config
    assert_parity(model.forward(IDS), expected)


def test_width_of_the_recurrence_left_out_is_the_models(answers, tmp_path):
    folder = write_recurrent(tmp_path / "whole", "bf16", lru_width=48)
    folder = edited(folder, tmp_path / "rewritten", lambda config: config.pop("lru_width"))
    assert_parity(mg.load(folder, dtype="f32").forward(IDS), theirs.recurrent_logits(folder, IDS))


def test_a_copy_of_the_tied_head(truth, written, tmp_path):
    """As 9B's file has it."""
    folder = tmp_path / "with head"
    shutil.copytree(written("bf16"), folder)
    checkpoints.store_head(folder)
    assert_parity(mg.load(folder, dtype="f32").forward(IDS), truth("bf16"))


VARIANTS: dict[str, dict[str, Any]] = {
    "window past the text": {"attention_window_size": 200},
    "window of 1": {"attention_window_size": 1},
    "one layer": {"num_hidden_layers": 1},
    "two layers": {"num_hidden_layers": 2},
    "one head of gates": {"num_attention_heads": 1},
    "eight heads": {"num_attention_heads": 8, "hidden_size": 96},
    "a narrower recurrence": {"lru_width": 20},
    "attention first": {"block_types": ["attention", "recurrent"]},
    "grouped queries": {"num_key_value_heads": 2},
    "a convolution over two": {"conv1d_width": 2},
}


@pytest.mark.parametrize("variant", VARIANTS)
def test_variant(answers, tmp_path, variant):
    folder = write_recurrent(tmp_path, "bf16", **VARIANTS[variant])
    model = mg.load(folder, dtype="f32")
    ids = IDS[:40]
    expected = theirs.recurrent_logits(folder, ids)
    assert_parity(model.forward(ids), expected)
    assert_parity(in_chunks(model, 5, ids), expected)


@live_only
@pytest.mark.parametrize("variant", [None, *VARIANTS])
def test_our_checkpoints_are_what_transformers_writes(answers, tmp_path, variant):
    """config.json field by field, and every tensor's name and shape."""
    ours = write_recurrent(tmp_path / "ours", "bf16", **VARIANTS.get(variant, {}))
    theirs.saved_again(ours, tmp_path / "theirs")
    assert checkpoints.described(ours) == checkpoints.described(tmp_path / "theirs")


def rope(base: float, fraction: float) -> dict[str, Any]:
    return {"rope_parameters": {"rope_type": "default", "rope_theta": base, "partial_rotary_factor": fraction}}


MISTAKES: list[dict[str, Any]] = [
    {"attention_window_size": W},  # one key fewer than DeepMind's code
    {"attention_window_size": W + 2},
    {"logits_soft_cap": 6.0},
    {"rms_norm_eps": 0.01},
    rope(10_000.0, 0.5),
    rope(2000.0, 1.0),
]


@live_only
@pytest.mark.parametrize("change", MISTAKES, ids=str)
def test_the_checkpoints_would_show_this_mistake(truth, written, change):
    """The comparison is only worth what it can see: a model that is wrong in one number is ten bounds away."""
    wrong = theirs.model_of(written("f32"), **change)
    assert distance(theirs.run(wrong, IDS), truth("f32")) > 10 * TOLERANCE


@live_only
def test_the_checkpoints_would_show_the_other_embedding_scale(truth, written):
    torch, _ = theirs.libraries()
    model = theirs.model_of(written("f32"))
    model.model.normalizer = torch.tensor(48.0**0.5)
    assert distance(theirs.run(model, IDS), truth("f32")) > 5 * TOLERANCE


@live_only
def test_the_checkpoints_would_show_any_tensor_out_of_place(answers, written):
    def one_layer_of_each_kind(name: str) -> bool:
        return "layers." not in name or ".3." in name or ".5." in name

    seen = theirs.tensors_seen(theirs.model_of(written("f32")), one_layer_of_each_kind, IDS[:14])
    assert not [name for name, far in seen.items() if far < 10 * TOLERANCE]


# ---- DeepMind's own torch code


@pytest.fixture(scope="module")
def griffin(written, answers) -> Path:
    """A checkpoint with the constants that DeepMind's code has; the window on both sides is that of its config.json."""
    deepmind_answers.require()
    return written("f32", "DEEPMIND")


def test_equals_deepminds_code(griffin):
    """The same window on both sides: a query sees W earlier keys and its own."""
    expected = deepmind_answers.logits(griffin, IDS)
    model = mg.load(griffin, dtype="f32")
    for backend in ("numba", "numpy"):
        assert_parity(mg.load(griffin, dtype="f32", backend=backend).forward(IDS), expected)
    for size in (1, 7, 64):
        assert_parity(in_chunks(model, size, IDS), expected)


def test_equals_deepminds_code_with_its_own_cache(griffin):
    """It takes a prompt in one piece and then one token at a time; so do we here, past three windows."""
    model = mg.load(griffin, dtype="f32")
    first, last = 11, 50
    held = model.new_cache(last)
    expected = deepmind_answers.logits_step_by_step(griffin, IDS[:last], first)
    assert_parity(model.forward(IDS[:first], held), expected[:first])
    assert_parity(np.concatenate([model.forward(IDS[t : t + 1], held) for t in range(first, last)]), expected[first:])


@pytest.mark.parametrize("window", [W - 1, W + 1])
def test_deepminds_code_would_show_another_window(griffin, tmp_path, window):
    expected = deepmind_answers.logits(griffin, IDS)
    other = edited(griffin, tmp_path / "other", lambda config: config.update(attention_window_size=window))
    found = mg.load(other, dtype="f32").forward(IDS)
    alike = min(window, W) + 1  # the last of these is the first to see as many as the narrower window holds
    assert_parity(found[:alike], expected[:alike])
    assert distance(found, expected) > 10 * TOLERANCE


# ---- state


def test_bytes_are_constant_from_the_first_token_past_the_window(written, tmp_path):
    """And they are what the config says, for any length that a cache is made for."""
    original = written("bf16")
    model = mg.load(edited(original, tmp_path / "wide", lambda config: config.update(attention_window_size=300)))
    ids = np.arange(700) % checkpoints.VOCAB
    held, seen = model.new_cache(1 << 24), {}
    for first in range(0, 700, 20):
        model.forward(ids[first : first + 20], held, last_only=True)
        seen[held.position] = held.nbytes
    past = {count for position, count in seen.items() if position > 300}
    assert past == {model.config.cache_bytes(301)} == {model.config.cache_bytes(1 << 24)}
    # 2 attention layers of 301 keys and values of 12 in bf16; 5 recurrent ones of h and 3 earlier inputs in float32
    assert past == {2 * 301 * 2 * 12 * 2 + 5 * 4 * 72 * 4}
    assert seen[20] < min(past)


def test_a_copy_is_a_branch(written):
    model = mg.load(written("f32"))
    prompt, endings = IDS[:25], (IDS[25:50], IDS[60:85])
    held = model.new_cache(60)
    model.forward(prompt, held)
    branches = [held.copy(), held.copy()]
    found = [np.concatenate([model.forward([i], b) for i in e]) for e, b in zip(endings, branches, strict=True)]
    for logits, ending in zip(found, endings, strict=True):
        assert_parity(logits, model.forward(np.concatenate([prompt, ending]))[25:], 1e-5)
    assert held.position == 25, "the original moved with its copies"
    assert_parity(model.forward(endings[1], held), found[1], 1e-5)


class Interruption(mg.Taps):
    """Raises in the middle of a pass."""

    def __call__(self, name, value):
        if name == "blocks.4.residual.middle":
            raise KeyboardInterrupt
        return value


def test_an_interrupted_pass_can_be_repeated(truth, written):
    expected, model = truth("f32"), mg.load(written("f32"))
    held = model.new_cache(T)
    model.forward(IDS[:40], held)
    for lost in (IDS[70:71], IDS[50:90]):
        with pytest.raises(KeyboardInterrupt):
            model.forward(lost, held, taps=Interruption("*"))
        assert held.position == 40
    assert_parity(model.forward(IDS[40:], held), expected[40:])


TOKENS = (1, 2_048, 8_192, 131_072)
COMPARED = ("recurrentgemma-2b", "gemma-2b", "gemma-2-2b", "recurrentgemma-9b", "gemma-7b", "gemma-2-9b")


def closed_form(name: str, tokens: int) -> int:
    """Bytes of state by hand: keys and values in bf16, the recurrence and the tail of its convolution in float32.

    The Griffin paper's book-keeping (App. F) is 2 · keys · H for an attention layer, E and 3 E for a recurrent one.
    DeepMind's ring has 2,048 slots, to which the current token comes; ours has it in the ring, so 2,049. DeepMind
    keeps the tail in bf16, we in float32, as all that the recurrence is made of.
    """
    if name == "recurrentgemma-2b":
        return 8 * min(tokens, 2049) * 2 * 256 * 2 + 18 * (2560 + 3 * 2560) * 4
    if name == "recurrentgemma-9b":
        return 12 * min(tokens, 2049) * 2 * 256 * 2 + 26 * (4096 + 3 * 4096) * 4
    if name == "gemma-2b":
        return 18_432 * tokens
    if name == "gemma-7b":
        return 458_752 * tokens
    layers, per_layer = {"gemma-2-2b": (26, 4_096), "gemma-2-9b": (42, 8_192)}[name]
    return per_layer * layers // 2 * (tokens + min(tokens, 4096))


def test_state_beside_the_caches_of_gemma_1_and_2():
    """The table of docs/recurrentgemma.md is this one, row by row."""
    rows = {name: [RELEASED[name].cache_bytes(tokens) for tokens in TOKENS] for name in COMPARED}
    printed = (Path(__file__).parents[2] / "docs" / "recurrentgemma.md").read_text("utf-8")
    for name, counts in rows.items():
        assert f"| {name} | " + " | ".join(f"{count:,}" for count in counts) + " |" in printed, (name, counts)
    for name, counts in rows.items():
        assert counts == [closed_form(name, tokens) for tokens in TOKENS], name
    # DeepMind's state in bf16 with 2,048 slots, 17.24 and 26.23 MB; the difference is the slot and the tail's dtype
    for name, deepminds, layers, tail in (
        ("recurrentgemma-2b", 16_777_216 + 184_320 + 276_480, 8, 276_480),
        ("recurrentgemma-9b", 25_165_824 + 425_984 + 638_976, 12, 638_976),
    ):
        assert rows[name][2] == rows[name][3] == deepminds + layers * 1024 + tail
    assert rows["gemma-2b"][3] > 100 * rows["recurrentgemma-2b"][3]


@pytest.mark.parametrize("name", ["recurrentgemma-2b", "recurrentgemma-9b"])
def test_a_cache_of_the_released_size_takes_that_many_bytes(name):
    """Made and filled without weights."""
    config = RELEASED[name]
    held = RecurrentGemma(config, None).new_cache(131_072)  # type: ignore[arg-type]
    small = held.nbytes
    for position in (0, 2_000, 2_048, 2_100, 131_000):
        for state in held.layers:
            if isinstance(state, KeyValueRing):
                new = np.zeros((48, 1, 256), np.float32)
                state.extend(new, new, position)
                state.commit(position + 48)
        expected = config.cache_bytes(position + 48)
        assert held.nbytes == (expected if position >= 2_000 else small), position
    assert small == closed_form(name, 256), "rings begin with 256 slots"


# ---- sizes

# Botev et al. 2024, Table 1, prints 2.68B / 0.65B / 2.03B and 8.58B / 1.05B / 7.53B; these are the exact counts.
COUNTS = {
    "recurrentgemma-2b": (655_360_000, 2_027_502_080, "2.68B / 0.66B / 2.03B"),
    "recurrentgemma-9b": (1_048_576_000, 7_531_401_216, "8.58B / 1.05B / 7.53B"),
}


@pytest.mark.parametrize("name", COUNTS)
def test_parameters_of_the_released_sizes(name):
    config = RELEASED[name]
    embedding, rest = config.embedding_parameters, config.non_embedding_parameters
    assert (embedding, rest) == COUNTS[name][:2]
    assert f"{(embedding + rest) / 1e9:.2f}B / {embedding / 1e9:.2f}B / {rest / 1e9:.2f}B" == COUNTS[name][2]


def test_parameters_are_what_transformers_counts(written, answers):
    """Of the small checkpoint, whose sizes all differ, and of the pattern cut short."""
    config, counted = mg.load(written("f32")).config, theirs.parameters(written("f32"))
    assert config.embedding_parameters + config.non_embedding_parameters == counted


def test_released_layers():
    for name, layers in (("recurrentgemma-2b", range(2, 24, 3)), ("recurrentgemma-9b", range(2, 36, 3))):
        config = RELEASED[name]
        assert [i for i in range(config.layers) if config.is_attention(i)] == list(layers)
        assert (config.attention(2).window, config.attention(2).rope_fraction) == (2049, 0.5)
        assert config.attention(2).query_scale == 1 / 16


# ---- bad files


def refused(folder: Path, capsys: Any) -> str:
    """The one line that `load` and the command say about a folder."""
    with pytest.raises(ModelFormatError) as error:
        mg.load(folder)
    assert main(["inspect", "-m", str(folder)]) == 1
    err = capsys.readouterr().err
    assert err.count("\n") == 1
    assert err.strip() == f"minigemma: {error.value}"
    return str(error.value)


BAD_CONFIGS: dict[str, tuple[dict[str, Any], list[str]]] = {
    "heads that do not divide the recurrence": ({"num_attention_heads": 5}, ["lru_width 72", "5 blocks"]),
    "more heads": ({"num_attention_heads": 6, "head_dim": 12}, ["gate_weight", "[4, 18, 18]", "[6, 12, 12]"]),
    "more key heads": ({"num_key_value_heads": 2}, ["k_proj.weight", "[12, 48]", "[24, 48]"]),
    "a wider recurrence": ({"lru_width": 96}, ["layers.0", "[72, 48]", "[96, 48]"]),
    "one feed-forward branch counted": ({"intermediate_size": 74}, ["mlp_block", "[74, 48]", "[37, 48]"]),
    "an odd feed-forward width": ({"intermediate_size": 149}, ["intermediate_size", "149"]),
    "a longer convolution": ({"conv1d_width": 5}, ["conv_1d.weight", "[72, 1, 4]", "[72, 1, 5]"]),
    "attention first": ({"block_types": ["attention", "recurrent", "recurrent"]}, ["lacks", "layers.0"]),
    "a layer more": ({"num_hidden_layers": 8}, ["lacks", "layers.7"]),
    "an unknown block": ({"block_types": ["recurrent", "mamba"]}, ["mamba"]),
    "an unscaled embedding": ({"embeddings_scale_by_sqrt_dim": False}, ["embeddings_scale_by_sqrt_dim"]),
    "no window": ({"attention_window_size": 0}, ["window", "0"]),
}


@pytest.mark.parametrize("case", BAD_CONFIGS)
def test_a_config_of_another_model_is_refused_in_one_line(written, tmp_path, capsys, case):
    changes, causes = BAD_CONFIGS[case]
    folder = edited(written("bf16"), tmp_path / "other", lambda config: config.update(changes))
    message = refused(folder, capsys)
    assert all(cause in message for cause in [str(folder), *causes]), message


@pytest.mark.parametrize(
    "missing", ["input_gate_weight", "recurrent_gate_weight", "recurrent_gate_bias", "recurrent_param"]
)
def test_a_missing_tensor_of_the_recurrence_is_named(written, tmp_path, capsys, missing):
    folder = tmp_path / "incomplete"
    shutil.copytree(written("bf16"), folder)
    name = f"model.layers.3.temporal_block.rg_lru.{missing}"
    tensors = read(folder / "model.safetensors")
    del tensors[name]
    save(tensors, folder / "model.safetensors")
    message = refused(folder, capsys)
    assert "lacks 1 tensor" in message
    assert name in message


# ---- quantized


def is_blocks(weight: Weight, size: int) -> bool:
    return weight.data.dtype == np.uint8 and weight.data.ndim == 3 and weight.data.shape[2] == size


# Bytes of a block, of int4 with sixteen rows side by side; then the largest difference from the weights as they were,
# of the largest logit, and its root mean square, of that of the logits. 0.027 and 0.020 were measured, 0.62 (at one
# token) and 0.28 for int4: it has 8 % of error in each of these random weights, which no model was trained to bear.
# Then how far the logits may be from those of the weights that are left: x has 16 bits beside int8, 8 beside int4.
QUANTISED = {"int8": (34, 0.04, 0.03, 0.01), "int4-symmetric": (288, 0.75, 0.33, 0.1)}


@pytest.mark.parametrize("dtype", QUANTISED)
def test_linear_maps_are_quantized_and_the_recurrence_is_not(truth, written, dtype):
    """Rows are multiples of 32 here."""
    size, worst, mean, _ = QUANTISED[dtype]
    folder, expected = written("bf16", "BLOCKS_OF_32"), truth("bf16", "BLOCKS_OF_32")
    model, exact = mg.load(folder, dtype=dtype), mg.load(folder, dtype="f32")
    found = model.forward(IDS)
    assert_parity(exact.forward(IDS), expected)
    for block, plain in zip(model.weights.blocks, exact.weights.blocks, strict=True):
        matrices = [block.ffn.gate, block.ffn.up, block.ffn.down]
        if block.attention:
            matrices += [block.attention.q, block.attention.k, block.attention.v, block.attention.o]
            assert block.attention.o_bias.dtype == np.float32
        else:
            matrices += [block.recurrent.x, block.recurrent.y, block.recurrent.out]
            for name in ("conv", "conv_bias", "decay", "recurrence_bias", "input_bias", "x_bias", "y_bias", "out_bias"):
                assert np.array_equal(getattr(block.recurrent, name), getattr(plain.recurrent, name)), name
            for gate in (block.recurrent.recurrence_gate, block.recurrent.input_gate):
                assert gate.dtype == np.uint16, "gates stay as they were stored"
        assert all(is_blocks(matrix, size) for matrix in matrices)
    assert is_blocks(model.weights.embedding, 34)
    assert distance(found, expected) < worst
    assert np.sqrt(np.mean((found - expected) ** 2) / np.mean(expected**2)) < mean


@pytest.mark.parametrize("dtype", QUANTISED)
def test_quantized_logits_are_those_of_the_weights_that_are_left(truth, written, dtype):
    """transformers with the same weights, dequantized, gives the same logits but for keys and values in bf16, and x."""
    folder, before = written("bf16", "BLOCKS_OF_32"), truth("bf16", "BLOCKS_OF_32")
    model = mg.load(folder, dtype=dtype)
    stored = {"model.embed_tokens.weight": model.weights.embedding}
    for i, block in enumerate(model.weights.blocks):
        for ours, (name, _, _) in layer_tensors(model.config, i).items():
            stored[f"model.layers.{i}.{name}"] = attrgetter(ours)(block)
    left = {name: w.widen() for name, w in stored.items() if isinstance(w, Weight) and w.layout.name.startswith("int")}
    expected = theirs.logits_of_other_weights(folder, IDS, dtype.removesuffix("-symmetric"), left)
    assert distance(before, expected) > 0.02, "nothing was quantized"
    for found in (model.forward(IDS), in_chunks(model, 1, IDS)):
        assert_parity(found, expected, QUANTISED[dtype][3])
        assert np.sqrt(np.mean((found - expected) ** 2) / np.mean(expected**2)) < QUANTISED[dtype][3] / 4
