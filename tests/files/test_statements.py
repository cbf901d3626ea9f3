"""What a checkpoint states about tokens and turns is used, wherever it states it."""

import json

import pytest
from support.tokenizers import trained

from minigemma.errors import ModelFormatError
from minigemma.files.download import FILES
from minigemma.files.statements import AddedToken, Statements, folder_statements, gguf_statements
from minigemma.files.tokenizer import Tokenizer, stop_ids

GEMMA = "{{ bos_token }}{% for m in messages %}<start_of_turn>{{ m.role }}\n{{ m.content }}<end_of_turn>\n{% endfor %}"
CHATML = "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{{ m['content'] }}<|im_end|>\n{% endfor %}"


def write(folder, **files):
    folder.mkdir(parents=True, exist_ok=True)
    for name, content in files.items():
        text = content if isinstance(content, str) else json.dumps(content)
        (folder / (f"{name}.jinja" if isinstance(content, str) else f"{name}.json")).write_text(text)
    return folder


@pytest.mark.parametrize(
    "files, tuned, foreign",
    [
        ({}, False, ""),
        ({"chat_template": GEMMA}, True, ""),
        ({"chat_template": CHATML}, True, "<|im_start|>"),
        ({"tokenizer_config": {"chat_template": CHATML}}, True, "<|im_start|>"),
        ({"tokenizer_config": {"chat_template": [{"name": "default", "template": GEMMA}]}}, True, ""),
        ({"generation_config": {"eos_token_id": [1, 106]}}, True, ""),
        ({"generation_config": {"eos_token_id": 1}}, False, ""),
    ],
)
def test_turns(files, tuned, foreign, tmp_path):
    states = folder_statements(write(tmp_path / "m", **files), {})
    assert (states.instruction_tuned, states.foreign_turns) == (tuned, foreign)


@pytest.mark.parametrize(
    "path, config, tuned",
    [
        ("gemma-1.1-2b-it", {}, True),
        ("models--google--gemma-1.1-2b-it/snapshots/0123abc", {}, True),
        ("models--google--gemma-2b/snapshots/0123abc", {}, False),
        ("mine", {"_name_or_path": "google/gemma-2b-it"}, True),
        ("split-bit-model", {}, False),
    ],
)
def test_a_name_that_ends_in_it(path, config, tuned, tmp_path):
    assert folder_statements(write(tmp_path / path), config).instruction_tuned == tuned


def test_ends_of_a_text_are_the_union_of_all_statements(tmp_path):
    files = {"generation_config": {"eos_token_id": [1, 106]}, "tokenizer_config": {"eos_token": {"content": "<|end|>"}}}
    states = folder_statements(write(tmp_path / "m", **files), {"eos_token_id": 107})
    assert states.ends == (107, 1, 106, "<|end|>")
    tokenizer = Tokenizer(trained(), "tokenizer.model")
    tokenizer.add([AddedToken(tokenizer.size + 2, "<|end|>", True)], 10_000)
    assert set(stop_ids(tokenizer, states.ends)) >= {1, 106, 107, tokenizer.size - 1}


def test_a_gguf_states_its_ends_and_its_kind(tmp_path):
    path, key = tmp_path / "m.gguf", "tokenizer.ggml.eos_token_id"
    states = gguf_statements(path, {key: 1, "tokenizer.ggml.eot_token_id": 106})
    assert states.ends == (1, 106) and not states.instruction_tuned
    assert gguf_statements(path, {"general.finetune": "it"}).instruction_tuned
    assert gguf_statements(path, {"tokenizer.chat_template": CHATML}).foreign_turns == "<|im_start|>"
    with pytest.raises(ModelFormatError, match="eos_token_id is 'x'"):
        gguf_statements(path, {key: "x"})


def test_sampling_as_stated(tmp_path):
    stated = {"do_sample": True, "temperature": 0.6, "top_k": 0, "top_p": 0.9, "cache_implementation": "hybrid"}
    states = folder_statements(write(tmp_path / "m", generation_config=stated), {})
    assert states.sampling == {"do_sample": True, "temperature": 0.6, "top_p": 0.9}
    with pytest.warns(UserWarning, match=r"no_repeat_ngram_size 3 is not applied"):
        folder_statements(write(tmp_path / "n", generation_config={"no_repeat_ngram_size": 3}), {})


@pytest.mark.parametrize("file", ["tokenizer_config", "added_tokens", "tokenizer"])
def test_added_tokens_of_three_files(file, tmp_path):
    content = {
        "tokenizer_config": {"added_tokens_decoder": {"300": {"content": "<tool>", "special": True}}},
        "added_tokens": {"<tool>": 300},
        "tokenizer": {"added_tokens": [{"id": 300, "content": "<tool>", "special": True}]},
    }[file]
    assert folder_statements(write(tmp_path / "m", **{file: content}), {}).added == (AddedToken(300, "<tool>", True),)
    assert Statements("m").added == ()


def test_added_tokens_are_recognized_decoded_and_within_the_vocabulary():
    tokenizer = Tokenizer(trained(), "tokenizer.model")
    size, renamed = tokenizer.size, tokenizer.id_of("<mask>") or 4
    added = [AddedToken(size, "<tool>", True), AddedToken(size + 1, "<think>", False), AddedToken(renamed, "<x>", True)]
    tokenizer.add([*added, AddedToken(9999, "<no row>", True), AddedToken(2, "<bos>", True)], size + 5)
    assert tokenizer.size == size + 2 and tokenizer.id_of("<tool>") == size
    assert size not in tokenizer.encode("a<tool>b") and size in tokenizer.encode("a<tool>b", control=True)
    assert size + 1 in tokenizer.encode("a<think>b"), "a token that is not special is recognized in any text"
    assert tokenizer.decode(tokenizer.encode("a<think>b")) == "a<think>b"
    assert tokenizer.decode([size, renamed, 2]) == "<tool><x>"
    stream = tokenizer.stream()
    assert stream.push(size) + stream.flush() == "<tool>"


def test_the_download_brings_what_states_them():
    assert {"tokenizer_config.json", "chat_template.jinja", "generation_config.json"} <= set(FILES)


@pytest.mark.parametrize(
    "stated",
    [
        {"forced_eos_token_id": 5},
        {"bad_words_ids": [[5]]},
        {"suppress_tokens": [5]},
        {"num_beams": 4},
        {"stop_strings": ["\n"]},
        {"min_new_tokens": 5},
        {"guidance_scale": 1.5},
        {"a_later_setting": 1},
    ],
)
def test_a_setting_of_generation_that_is_not_done_is_named(stated, tmp_path):
    with pytest.warns(UserWarning, match=rf"{next(iter(stated))} .*is not applied"):
        folder_statements(write(tmp_path / "m", generation_config=stated), {})


def test_what_every_generation_config_has_is_not_named(tmp_path, recwarn):
    usual = {"_from_model_config": True, "bos_token_id": 2, "eos_token_id": 1, "pad_token_id": 0, "max_length": 20}
    usual |= {"transformers_version": "5.0.0", "repetition_penalty": 1.0, "num_beams": 1, "typical_p": None}
    folder_statements(write(tmp_path / "m", generation_config=usual), {})
    assert not recwarn.list


def test_a_gguf_states_its_sampling_under_llama_cpps_names(tmp_path):
    stated = {"general.sampling.temp": 0.5, "general.sampling.top_k": 5, "general.sampling.penalty_repeat": 1.0}
    assert gguf_statements(tmp_path / "m.gguf", stated).sampling == {"temperature": 0.5, "top_k": 5}
    with pytest.warns(UserWarning, match="mirostat 2 is not applied"):
        gguf_statements(tmp_path / "m.gguf", {"general.sampling.mirostat": 2})


@pytest.mark.parametrize(
    "stated, told",
    [
        ({}, ""),
        ({"add_bos_token": True, "add_eos_token": False, "bos_token": "<bos>"}, ""),
        ({"add_bos_token": False}, "add_bos_token False"),
        ({"add_eos_token": True}, "add_eos_token True"),
        ({"bos_token": {"content": "<s>"}}, "bos_token '<s>'"),
    ],
)
def test_other_tokens_around_a_text_are_named(stated, told, tmp_path):
    assert folder_statements(write(tmp_path / "m", tokenizer_config=stated), {}).not_done == told
    flags = {f"tokenizer.ggml.{name}": value for name, value in stated.items() if name.startswith("add")}
    assert gguf_statements(tmp_path / "m.gguf", flags).not_done == (told if flags else "")


BOS, TEXT, EOS = {"SpecialToken": {"id": "<bos>"}}, {"Sequence": {"id": "A"}}, {"SpecialToken": {"id": "<eos>"}}


@pytest.mark.parametrize(
    "single, told",
    [
        ([BOS, TEXT], ""),
        ([TEXT], "a post_processor without <bos>"),
        ([BOS, TEXT, EOS], "a post_processor with <eos>"),
        (None, "a post_processor without <bos>"),
    ],
)
def test_tokens_around_a_text_that_tokenizer_json_alone_states(single, told, tmp_path):
    """As transformers 5 writes them; where tokenizer_config.json says it, that counts, as in transformers."""
    processor = single and {"type": "Sequence", "processors": [{"type": "TemplateProcessing", "single": single}]}
    fields = {"added_tokens": [], "post_processor": processor, "model": {}}
    assert folder_statements(write(tmp_path / "m", tokenizer=fields), {}).not_done == told
    flags = {"add_bos_token": True, "add_eos_token": False}
    assert folder_statements(write(tmp_path / "m", tokenizer_config=flags), {}).not_done == ""


@pytest.mark.parametrize("content", ['{"post_processor": {"single": [', '{"post_processor": ' + '{"a": ' * 100_000])
def test_a_broken_post_processor_is_refused(content, tmp_path):
    (tmp_path / "tokenizer.json").write_text(content)
    with pytest.raises(ModelFormatError, match="has a post_processor that is not JSON"):
        folder_statements(tmp_path, {})


@pytest.mark.parametrize("edge", ["single_word", "lstrip", "rstrip"])
def test_what_an_added_token_requires_around_it_is_named(edge, tmp_path):
    folder = write(tmp_path / "m", tokenizer_config={"added_tokens_decoder": {"7": {"content": "<t>", edge: True}}})
    (folder / "tokenizer.model").touch()
    with pytest.warns(UserWarning, match=f"{edge} of '<t>' is not applied"):
        folder_statements(folder, {})


def test_more_places_that_state_ends_and_turns(tmp_path):
    path, ends = tmp_path / "m.gguf", {"tokenizer.ggml.eos_token_ids": [1, 106]}
    assert gguf_statements(path, ends).ends == (1, 106)
    assert gguf_statements(path, {"tokenizer.chat_template.tool_use": GEMMA}).instruction_tuned
    assert gguf_statements(path, {"general.name": "Gemma 3 1b It"}).instruction_tuned
    assert (
        folder_statements(write(tmp_path / "m", special_tokens_map={"eos_token": "<|end|>"}), {}).ends[-1] == "<|end|>"
    )
    with pytest.raises(ModelFormatError, match="eos_token_id has '106'"):
        folder_statements(write(tmp_path / "n", generation_config={"eos_token_id": [1, "106"]}), {})
