"""The header of a GGUF file to a config, and that no statement of it is passed over."""

from pathlib import Path

import pytest

from minigemma.errors import ModelFormatError
from minigemma.files.config_gguf import config_from_gguf
from minigemma.files.gguf_file import GGUF

SIZES = {
    "context_length": 4096,
    "embedding_length": 256,
    "block_count": 7,
    "feed_forward_length": 256,
    "attention.head_count": 8,
    "attention.head_count_kv": 2,
    "attention.key_length": 32,
    "attention.value_length": 32,
    "attention.layer_norm_rms_epsilon": 1e-6,
}
CAPS = {"attn_logit_softcapping": 50.0, "final_logit_softcapping": 30.0}
OWN = {"gemma": {}, "gemma2": CAPS | {"attention.sliding_window": 8}, "gemma3": {"attention.sliding_window": 8}}


def read(architecture, **general):
    keys = general.pop("keys", {})
    fields = {f"{architecture}.{name}": value for name, value in (SIZES | OWN[architecture] | keys).items()}
    return config_from_gguf(GGUF(Path("a.gguf"), {"general.architecture": architecture} | fields | general, {}, None))


LOCAL = [True, True, False, True, True, False, True]
REFUSED = {
    "yarn": ("gemma3", {"rope.scaling.type": "yarn", "rope.scaling.factor": 8.0}, "rope.scaling.type is 'yarn'"),
    "longrope": ("gemma", {"rope.scaling.type": "longrope"}, "rope.scaling.type"),
    "yarn's factor": ("gemma3", {"rope.scaling.attn_factor": 1.3}, "rope.scaling.attn_factor"),
    "both directions": ("gemma3", {"attention.causal": False}, "attention.causal"),
    "a part of each head": ("gemma3", {"rope.dimension_count": 16}, "rope.dimension_count"),
    "a part of local heads": ("gemma3", {"rope.dimension_count_swa": 16}, "rope.dimension_count_swa"),
    "other values": ("gemma", {"attention.value_length": 16}, "attention.value_length"),
    "a scaled Gemma 2": ("gemma2", {"rope.scaling.type": "linear", "rope.scaling.factor": 8.0}, "scaled"),
    "a scaled Gemma 1": ("gemma", {"rope.scale_linear": 8.0}, "scaled"),
    "a pattern in Gemma 2": (
        "gemma2",
        {"attention.sliding_window_pattern": LOCAL},
        "local and global in turn",
    ),
    "a pattern without a period": ("gemma3", {"attention.sliding_window_pattern": [False] + [True] * 6}, "repeat"),
    "a pattern of other layers": ("gemma3", {"attention.sliding_window_pattern": [True] * 3}, "3 values for 7 layers"),
    "a window in Gemma 1": ("gemma", {"attention.sliding_window": 8}, "gemma.attention.sliding_window"),
    "a cap in Gemma 1": ("gemma", {"final_logit_softcapping": 30.0}, "gemma.final_logit_softcapping"),
    "a cap on Gemma 3's scores": ("gemma3", {"attn_logit_softcapping": 50.0}, "gemma3.attn_logit_softcapping"),
    "heads per layer": ("gemma3", {"attention.head_count_kv": [2] * 6 + [4]}, "a value per layer"),
    "widths per layer": ("gemma2", {"feed_forward_length": [256] * 6 + [128]}, "a value per layer"),
    "experts": ("gemma3", {"expert_count": 4}, "gemma3.expert_count"),
    "a scale of its own": ("gemma3", {"attention.scale": 0.5}, "gemma3.attention.scale"),
    "pooling": ("gemma3", {"pooling_type": 1}, "gemma3.pooling_type"),
    "an unknown field": ("gemma2", {"residual_scale": 0.5}, "gemma2.residual_scale"),
}


@pytest.mark.parametrize("architecture, keys, says", REFUSED.values(), ids=REFUSED)
def test_statements_that_change_the_results_are_refused_by_name(architecture, keys, says):
    with pytest.raises(ModelFormatError) as refused:
        read(architecture, keys=keys)
    assert says in refused.value.problem


USED = {
    "a cap on the logits": ({"final_logit_softcapping": 2.0}, "logit_cap", 2.0),
    "a cap of 0": ({"final_logit_softcapping": 0.0}, "logit_cap", None),
    "linear rope": ({"rope.scaling.type": "linear", "rope.scaling.factor": 8.0}, "rope_scale", 8.0),
    "linear rope in the older spelling": ({"rope.scale_linear": 8.0}, "rope_scale", 8.0),
    "a factor alone": ({"rope.scaling.factor": 4.0}, "rope_scale", 4.0),
    "a factor without scaling": ({"rope.scaling.type": "none", "rope.scaling.factor": 8.0}, "rope_scale", 1.0),
    "a local base": ({"rope.freq_base_swa": 300.0}, "rope_base_local", 300.0),
    "a local base as Ollama names it": ({"rope.local.freq_base": 300.0}, "rope_base_local", 300.0),
    "a period": ({"attention.sliding_window_pattern": 3}, "pattern", 3),
    "a period as a list": ({"attention.sliding_window_pattern": LOCAL}, "pattern", 3),
    "one value for all layers": ({"attention.head_count_kv": [4] * 7}, "kv_heads", 4),
}


@pytest.mark.parametrize("keys, field, value", USED.values(), ids=USED)
def test_statements_are_used(keys, field, value):
    assert getattr(read("gemma3", keys=keys), field) == value
    assert getattr(read("gemma3"), field) != value or value in (None, 1.0)


def test_other_programs_may_add_fields_under_their_own_names():
    plain = read("gemma3")
    noted = {"general.name": "x", "quantize.imatrix.file": "y", "someone.quantized_by": "z"}
    assert read("gemma3", keys={"vocab_size": 5, "mm.tokens_per_image": 256}, **noted) == plain


@pytest.mark.parametrize("kind", ["adapter", "imatrix", "vocab"])
def test_files_of_other_kinds_are_named(kind):
    with pytest.raises(ModelFormatError, match=f"is an? (LoRA )?{kind}"):
        read("gemma3", **{"general.type": kind})


OTHER_VOCABULARIES = [
    *(("model", "gpt2"), ("add_space_prefix", True), ("remove_extra_whitespaces", True), ("escape_whitespaces", False)),
    *(("bos_token_id", 5), ("unknown_token_id", 5), ("add_sep_token", True)),
]


@pytest.mark.parametrize("name, value", OTHER_VOCABULARIES)
def test_a_vocabulary_of_another_kind_is_refused(name, value):
    with pytest.raises(ModelFormatError, match=rf"tokenizer\.ggml\.{name} is {value!r}; minigemma runs"):
        read("gemma3", **{f"tokenizer.ggml.{name}": value})


@pytest.mark.parametrize("name", ["precompiled_charsmap", "normalizer.lowercase", "suppress_tokens"])
def test_a_statement_about_the_vocabulary_that_is_not_known_is_refused(name):
    with pytest.raises(ModelFormatError, match=rf"'tokenizer\.ggml\.{name}' is True, which minigemma does not know"):
        read("gemma3", **{f"tokenizer.ggml.{name}": True})


def test_what_converters_and_ollama_write_about_the_vocabulary_is_known():
    ids = {f"{name}_token_id": 0 for name in ("padding", "mask", "eot", "fim_pre", "prefix")} | {"bos_token_id": 2}
    flags = {f"add_{name}_token": True for name in ("bos", "padding", "unknown", "mask")} | {"pre": "default"}
    read("gemma3", **{f"tokenizer.ggml.{name}": value for name, value in (ids | flags).items()})
