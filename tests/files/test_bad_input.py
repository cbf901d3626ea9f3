"""Bad input: each ends in a sentence (the path, what is wrong, what to do), soon, with little memory, never in a hang.

What one format or one command alone refuses stands in that module's own tests.
"""

import json
import os
import resource
import shutil
import signal
import struct
import subprocess
import sys
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from PIL import Image
from support import checkpoints
from support.bad_models import (
    BAD_MODELS,
    LFS_POINTER,
    SHAPES,
    checkpoint_folder,
    lfs_pointer,
    missing_shard,
    safetensors,
    wrong_path,
)
from support.calls import failure, refused, run
from support.folders import cached, random_weights, write_folder
from support.gguf_bytes import ARRAY, F32, I32, I64, STRING, U8, U32, array, at_most, file, pair, tensor, text
from support.small_models import TINY_GEMMA3 as SMALL
from support.small_models import TINY_SIZES as SIZES
from support.synthetic import config_json
from support.tokenizers import trained, vocabulary
from support.toy_models import letters

import minigemma as mg
from minigemma.cli.chat import Talk
from minigemma.cli.main import main
from minigemma.files.config_json import config_from_json
from minigemma.files.gguf_file import open_gguf
from minigemma.files.images import open_image
from minigemma.files.resolve import resolve
from minigemma.files.tokenizer import Tokenizer
from minigemma.models.gemma2 import Gemma2Config
from minigemma.models.registry import all_names
from minigemma.text.prompt import conversation_ids

UNPRIVILEGED = 65534


@pytest.fixture
def folder(tmp_path):
    """A small model that answers, with a tokenizer: a folder that a test may damage."""
    at = write_folder(tmp_path / "model", SMALL, random_weights(SMALL))
    (at / "tokenizer.model").write_bytes(trained())
    return at


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    at = write_folder(tmp_path_factory.mktemp("good") / "model", SMALL, random_weights(SMALL))
    (at / "tokenizer.model").write_bytes(trained())
    return mg.load(at)


# ---------------------------------------------------------------------------------------------------- models and wishes


@pytest.mark.parametrize("command", ["generate -p hi", "inspect", "score -p hi", "chat"])
@pytest.mark.parametrize("case", BAD_MODELS.values(), ids=BAD_MODELS.keys())
def test_a_bad_model_is_one_line(case, command, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr("sys.stdin", None)  # no command may get as far as asking
    path, causes = case(tmp_path)
    err = failure(capsys, path, *command.split(), "-m", str(path))
    assert all(cause.lower() in err.lower() for cause in causes), err


@pytest.mark.parametrize("content, cause", [(None, "no tokenizer.model"), (LFS_POINTER, "tokenizer.model"), (b"", "")])
@pytest.mark.parametrize("command", ["generate -p hi", "score -p hi", "chat"])
def test_a_bad_tokenizer_is_one_line(command, content, cause, tmp_path, capsys):
    files = {"model.safetensors": safetensors(SHAPES), "tokenizer.model": content}
    path = checkpoint_folder(tmp_path / "gemma", **files)
    assert cause in failure(capsys, path, *command.split(), "-m", str(path))


@pytest.mark.parametrize("case", [wrong_path, lfs_pointer, missing_shard])
def test_a_process_says_the_same(case, tmp_path):
    path, causes = case(tmp_path)
    command = [sys.executable, "-m", "minigemma", "generate", "hi", "-m", str(path)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)
    assert (done.returncode, done.stdout) == (1, "")
    assert done.stderr.count("\n") == 1 and all(word in done.stderr for word in [str(path), *causes])


def test_a_truncated_gguf_of_the_real_model(demo_file, tmp_path, capsys):
    path = tmp_path / "gemma.gguf"
    with demo_file.open("rb") as whole:
        path.write_bytes(whole.read(20_000_000))
    assert failure(capsys, path, "generate", "hi", "-m", str(path))


@pytest.mark.parametrize("command", ["generate", "score"])
def test_a_text_longer_than_the_context_names_both_numbers(command, demo_file, capsys):
    # -q: where no kernel is compiled yet, a line says that they are being compiled
    err = failure(capsys, demo_file, command, "one two three four five six", "-q", "-c", "5", "-m", str(demo_file))
    assert "7" in err and "5" in err


def test_a_context_beyond_the_models_is_refused(demo_file, capsys):
    err = failure(capsys, demo_file, "inspect", "-c", "40000", "-m", str(demo_file))
    assert "32,768" in err and "40,000" in err


def test_an_image_for_a_text_model(demo_file, capsys, tmp_path):
    err = failure(capsys, demo_file, "generate", "hi", "--image", str(tmp_path / "cow.png"), "-m", str(demo_file))
    assert "image" in err


def test_a_missing_prompt_file_is_named(demo_file, capsys, tmp_path):
    failure(capsys, tmp_path / "no.txt", "generate", "-f", str(tmp_path / "no.txt"), "-m", str(demo_file))


def test_a_prompt_that_is_not_text_is_named(demo_file, capsys, tmp_path):
    path = tmp_path / "latin1.txt"
    path.write_bytes("né".encode("latin-1"))
    assert "UTF-8" in failure(capsys, path, "generate", "-f", str(path), "-m", str(demo_file))


def test_hub_ids_are_checked_before_the_hub_is_asked(capsys):
    assert main(["download", "not/an/id"]) == 1
    assert capsys.readouterr().err.count("\n") == 1


# --------------------------------------------------------------------------------------------------------- paths


@contextmanager
def unreadable(path):
    """Without permission to read it; root, which ignores permissions, runs as an unprivileged user meanwhile."""
    mode, root = path.stat().st_mode, os.geteuid() == 0
    path.chmod(0)
    if root:
        os.seteuid(UNPRIVILEGED)
    try:
        yield
    finally:
        if root:
            os.seteuid(0)
        path.chmod(mode)


@pytest.mark.parametrize("what", ["", "model", "model/config.json", "model/model.safetensors", "model/tokenizer.model"])
def test_what_may_not_be_read(what):
    with tempfile.TemporaryDirectory() as at:  # pytest's own folders may be closed to other users
        os.chmod(at, 0o755)
        model = write_folder(Path(at) / "model", SMALL, random_weights(SMALL))
        (model / "tokenizer.model").write_bytes(trained())
        (model / "model.safetensors").chmod(0o644)
        with unreadable(Path(at) / what):
            said = refused(mg.load, Path(at) / what if what.endswith("safetensors") else model)
            assert "permission denied" in said.lower() and str(Path(at) / what) in said


@pytest.mark.parametrize("name", ["config.json", "tokenizer.model"])
def test_a_file_that_is_no_model(folder, name):
    assert f"{name}: is neither a safetensors nor a GGUF file; name a model's folder" in refused(mg.load, folder / name)


def test_a_file_beside_the_model_is_not_the_model(folder):
    """Its folder would load, as that of a shard does, but not from this file."""
    shutil.copy(folder / "model.safetensors", folder / "adapter_model.safetensors")
    assert "adapter_model.safetensors: is not what a model's file" in refused(
        mg.load, folder / "adapter_model.safetensors"
    )
    assert mg.load(folder / "model.safetensors").forward([1]).shape == (1, 720)


@pytest.mark.parametrize(
    "name",
    [
        "config.json",
        "generation_config.json",
        "tokenizer_config.json",
        "tokenizer.model",
        "tokenizer.json",
        "model.safetensors",
        "model.safetensors.index.json",
    ],
)
@pytest.mark.parametrize("kind", ["pipe", "device", "folder", "link to nowhere", "link to itself"])
def test_a_file_of_a_folder_that_is_none(folder, name, kind):
    """A folder is downloaded with its links: /dev/zero has no end, and a pipe is waited for."""
    if name.endswith(".index.json"):
        (folder / "model.safetensors").unlink()
    (folder / name).unlink(missing_ok=True)
    make = {
        "pipe": os.mkfifo,
        "device": lambda path: path.symlink_to("/dev/zero"),
        "folder": Path.mkdir,
        "link to nowhere": lambda path: path.symlink_to("gone"),
        "link to itself": lambda path: path.symlink_to(name),
    }
    make[kind](folder / name)
    optional = name in ("generation_config.json", "tokenizer_config.json", "tokenizer.model", "tokenizer.json")
    if kind.startswith("link") and optional:
        assert mg.load(folder).forward([1]).shape, "it is ignored"
    else:
        assert name in refused(mg.load, folder)


@pytest.mark.parametrize("main_ref", ["", "..", "../../../../etc", "\0", "x" * 5000, "4d7a\n4d7b", "é" * 200])
def test_a_ref_that_is_no_commit(tmp_path, monkeypatch, main_ref):
    monkeypatch.setenv("HOME", str(tmp_path))
    for name in ("HF_HUB_CACHE", "HUGGINGFACE_HUB_CACHE", "HF_HOME", "XDG_CACHE_HOME"):
        monkeypatch.delenv(name, raising=False)
    snapshot = cached(tmp_path)
    (snapshot.parents[1] / "refs/main").write_text(main_ref)
    assert "google/gemma-3-1b-it" in refused(resolve, "google/gemma-3-1b-it")


@pytest.mark.parametrize(
    "words", ["generate hi -m google/gemma-3-1b-it --offline", "download google/gemma-3-1b-it --offline"]
)
def test_offline_and_not_there(words, tmp_path):
    done = run(*words.split(), env={**os.environ, "HF_HOME": str(tmp_path), "HF_HUB_CACHE": str(tmp_path / "hub")})
    assert (done.returncode, done.stdout, done.stderr.count("\n")) == (1, "", 1)
    assert "google/gemma-3-1b-it" in done.stderr and str(tmp_path / "hub") in done.stderr
    assert "minigemma download google/gemma-3-1b-it" in done.stderr


# ------------------------------------------------------------------------------------------------- configurations

PAINT = "\x1b[31m\n"  # turns a terminal red
KINDS = ["sliding_attention"] * 2
CONFIGS = {
    "a billion layers, of which two are listed": {"num_hidden_layers": 10**9, "layer_types": KINDS},
    "layer types beyond the layers": {"layer_types": KINDS * 100_000},
    "layer types of no list": {"layer_types": "x" * 10**6},
    "layer types of lists": {"layer_types": [[]] * 2},
    "period as text": {"sliding_window_pattern": "6"},
    "period as a list": {"sliding_window_pattern": [6]},
    "a fraction as period": {"sliding_window_pattern": 1.5},
    "a negative period": {"sliding_window_pattern": -1},
    "window 0": {"sliding_window": 0},
    "window of text": {"sliding_window": PAINT},
    "no heads": {"num_attention_heads": 0},
    "true as a size": {"hidden_size": True},
    "a size of 4,000 digits": {"hidden_size": 10**4000},
    "a float of 400 digits": {"rope_theta": 10**400},
    "an endless model type": {"model_type": PAINT * 10**5},
    "a list as model type": {"model_type": ["gemma3_text"]},
    "a list as activation": {"hidden_activation": ["gelu"]},
    "an endless activation": {"hidden_activation": PAINT * 10**5},
    "eps NaN": {"rms_norm_eps": float("nan")},
    "rope base infinite": {"rope_theta": float("inf")},
    "rope as text": {"rope_parameters": "default"},
    "rope of lists": {"rope_parameters": {"full_attention": [1]}},
    "rope factor 0": {"rope_scaling": {"rope_type": "linear", "factor": 0}},
    "rope factor NaN": {"rope_scaling": {"rope_type": "linear", "factor": float("nan")}},
    "an endless rope type": {"rope_scaling": {"rope_type": PAINT * 10**5}},
    "a soft-cap of text": {"final_logit_softcapping": PAINT},
    "another model's vocabulary": {"vocab_size": 262_208},
    "a vision tower of text": {"model_type": "gemma3", "text_config": {}, "vision_config": PAINT},
    "a text model of text": {"model_type": "gemma3", "text_config": PAINT},
    "a head of its own that is not there": {"tie_word_embeddings": False},
}


@pytest.mark.parametrize("edit", CONFIGS.values(), ids=CONFIGS)
def test_a_config_that_lies(folder, edit):
    (folder / "config.json").write_text(json.dumps(config_json(SMALL) | edit))
    with at_most(2, 200e6):
        refused(mg.load, folder)


TEXTS = {
    "a number of 5,000 digits": b'{"a":%b}' % (b"1" * 5000),
    "100,000 deep": b'{"a":' * 100_000,
    "three million lists": b'{"a":[' + b"[]," * 3_000_000 + b"[]]}",
    "11 MB": b" " * 11_000_000,
    "a field twice": b'{"model_type": "gemma3_text", "model_type": "llama"}',
    "a list": b"[]",
    "UTF-16": '{"a": 1}'.encode("utf-16"),
    "a web page": b"<!doctype html><html>",
    "a pointer": b"version https://git-lfs.github.com/spec/v1\n",
    "empty": b"",
    "zeros": bytes(1000),
}


@pytest.mark.parametrize("name", ["config.json", "generation_config.json", "tokenizer_config.json"])
@pytest.mark.parametrize("content", TEXTS.values(), ids=TEXTS)
def test_json_that_is_none(folder, name, content):
    (folder / name).write_bytes(content)
    with at_most(2, 200e6):
        assert name in refused(mg.load, folder)


def test_a_byte_order_mark_is_dropped(folder):
    """As Windows writes it."""
    for name in ("config.json", "generation_config.json", "tokenizer_config.json"):
        path = folder / name
        path.write_bytes(b"\xef\xbb\xbf" + (path.read_bytes() if path.exists() else b"{}"))
    assert mg.load(folder).forward([1]).shape


@pytest.mark.parametrize("stated", [{"layer_types": ["full_attention"] * 2}, {"sliding_window_pattern": 3}])
def test_a_gemma_2_with_other_layers_is_not_run_as_one(tmp_path, stated):
    config = Gemma2Config(**SIZES, window=7)
    (tmp_path / "config.json").write_text(json.dumps(config_json(config) | {"query_pre_attn_scalar": 16}))
    assert config_from_json(tmp_path / "config.json")[0].attention(1).window is None
    (tmp_path / "config.json").write_text(json.dumps(config_json(config) | stated))
    assert "local and global in turn" in refused(config_from_json, tmp_path / "config.json")


# ------------------------------------------------------------------------------------------------------- weights


def damaged(at, change, config=SMALL):
    """A folder whose tensors were changed."""
    weights = random_weights(config)
    change(weights)
    return write_folder(at, config, weights)


NORM = "model.norm.weight"
CHANGES = {
    "an empty tensor in place of a norm": lambda w: w.update({NORM: np.zeros(0, np.float32)}),
    "an empty tensor too many": lambda w: w.update({"extra": np.zeros((0, 4), np.float32)}),
    "whole numbers": lambda w: w.update({NORM: np.zeros(32, np.int64)}),
    "bytes that look quantized": lambda w: w.update({NORM: np.zeros((2, 34), np.uint8)}),
    "names that paint the terminal": lambda w: w.update({PAINT * 1000 + str(i): w[NORM] for i in range(9)}),
    "another size": lambda w: w.update({"model.layers.1.mlp.up_proj.weight": np.zeros((64, 33), np.float32)}),
    "one layer less": lambda w: [w.pop(name) for name in [*w] if "layers.1" in name],
    "one layer more": lambda w: w.update({n.replace("rs.1", "rs.2"): v for n, v in w.items() if "rs.1" in n}),
    "an adapter": lambda w: w.update({f"model.layers.{i}.lora_A.weight": w[NORM] for i in range(9)}),
}


@pytest.mark.parametrize("change", CHANGES.values(), ids=CHANGES)
def test_weights_of_another_model(tmp_path, change):
    at = damaged(tmp_path / "model", change)
    with pytest.raises(mg.ModelFormatError) as caught:
        mg.load(at)
    said = str(caught.value)
    assert said.isprintable() and len(said) < 800 and caught.value.remedy
    assert said.count("layers.") <= 5, "five names are enough"


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_weights_that_are_no_numbers_make_no_text(tmp_path, capsys, value):
    at = damaged(tmp_path / "model", lambda w: w[NORM].fill(value))
    (at / "tokenizer.model").write_bytes(trained())
    with np.errstate(all="ignore"):
        for command in ("generate", "score"):
            assert main([command, "hello", "-q", "-m", str(at)]) == 1
            out, err = capsys.readouterr()
            assert out == "" and err.count("\n") == 1 and str(at) in err and "weights" in err


def test_a_shard_too_many_is_left_alone(folder):
    (folder / "model.safetensors").rename(folder / "model-00001-of-00001.safetensors")
    names = dict.fromkeys(random_weights(SMALL), "model-00001-of-00001.safetensors")
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": names}))
    (folder / "model-00002-of-00002.safetensors").write_bytes(b"\x80\x02not weights")
    assert mg.load(folder).forward([1]).shape


def test_text_weights_with_the_config_of_a_vision_tower(folder):
    """As people cut them out: the text model runs, and an image is refused."""
    nested = {"model_type": "gemma3", "text_config": config_json(SMALL), "vision_config": {}}
    (folder / "config.json").write_text(json.dumps(nested))
    model = mg.load(folder)
    assert model.vision is None and mg.generate(model, "hi", max_new_tokens=2) is not None
    with pytest.raises(ValueError, match="has no vision tower"):
        mg.generate(model, "hi", images=["cow.jpg"])


# ----------------------------------------------------------------------------------------------------- tokenizers


@pytest.mark.parametrize("rows", [699, 700 + 4097])
def test_the_tokenizer_of_another_family(tmp_path, rows):
    """Gemma 2's has 256,000 pieces, Gemma 3's 262,144: in each other's place they would speak gibberish."""
    config = replace(SMALL, vocab=rows)
    at = write_folder(tmp_path / "model", config, random_weights(config))
    (at / "tokenizer.model").write_bytes(trained())
    assert f"its tokenizer has 700 pieces, its embedding {rows} rows" in refused(mg.load, at)


@pytest.mark.parametrize("score", [np.nan, np.inf, -np.inf])
def test_scores_that_are_no_numbers(score):
    pieces, scores, types = vocabulary(b"a", b"b", b"ab", b"aa")
    scores[-4:] = score
    try:
        tokenizer = Tokenizer.from_vocabulary(pieces, scores, types)
    except mg.ModelFormatError:
        return
    start = time.process_time()
    assert tokenizer.decode(tokenizer.encode("ab" * 5000)) == "ab" * 5000
    assert time.process_time() - start < 2


# ---------------------------------------------------------------------------------------------------------- GGUF

# Of llama.cpp's tests/test-gguf.cpp, those that test_gguf_file.py has not in other words.
BAD_GGUF = {
    "HEADER_BAD_VERSION_FUTURE, far": file(version=2**32 - 1),
    "HEADER_BAD_N_KV": file(pair_count=2**64 - 1),
    "HEADER_BAD_MAGIC": file(magic=b"FUGG"),
    "byte-swapped": struct.pack(">IIQQ", 0x47475546, 3, 0, 0),
    "KV_BAD_KEY_SIZE": file([struct.pack("<Q", 2**64 - 1) + b"k"]),
    "KV_BAD_TYPE": file([pair("k", 2**32 - 1, b"a")]),
    "KV_BAD_TYPE in an array": file([array("k", 2**32 - 1, 1, b"a")]),
    "KV_BAD_ALIGN": file([pair("general.alignment", U32, struct.pack("<I", 13))]),
    "KV_WRONG_TYPE_ALIGN": file([pair("general.alignment", I32, struct.pack("<I", 32))]),
    "alignment in an array": file([array("general.alignment", U32, 1, struct.pack("<I", 32))]),
    "TENSORS_BAD_NAME_SIZE": file([], [tensor("x" * 65_536)], 16),
    "TENSORS_BAD_NAME_SIZE, endless": file([], [struct.pack("<Q", 2**64 - 1)], 64),
    "TENSORS_BAD_N_DIMS": file([], [tensor(sizes=(4,) * 4, axes=5)], 1024),
    "TENSORS_BAD_SHAPE": file([], [tensor(sizes=(2**64 - 4, 2**64 - 4))], 64),
    "TENSORS_NE_TOO_BIG": file([], [tensor(sizes=(2**63 - 1, 3))], 64),
    "TENSORS_NBYTES_TOO_BIG": file([], [tensor(sizes=(2**60,), kind=27)], 64),
    "TENSORS_BAD_TYPE": file([], [tensor(kind=2**32 - 1)], 64),
    "TENSORS_BAD_OFFSET": file([], [tensor(offset=32)], 64),
    "TENSORS_DUPLICATE_NAME": file([], [tensor("x"), tensor("y", offset=32), tensor("x", offset=64)], 96),
    "TENSORS_BAD_ALIGN": file([pair("general.alignment", U32, struct.pack("<I", 13))], [tensor()], 64, alignment=13),
    "TENSORS_INCONSISTENT_ALIGN": file([], [tensor(sizes=(1,)), tensor("y", (1,), offset=4)], 64),
    "not whole blocks": file([], [tensor(sizes=(128, 2), kind=12)], 144),
    "DATA_NOT_ENOUGH_DATA": file([], [tensor(), tensor("y", offset=32)], 47),
    "DATA_MEM_SIZE_OVERFLOW": file(
        [], [tensor("a", (2**63 - 64,), 24), tensor("b", (2**63 - 64,), 24, 2**63 - 64)], 64
    ),
    "a type that GGUF has no more": file([], [tensor(sizes=(32,), kind=31)], 64),
}  # fmt: skip


@pytest.mark.parametrize("content", BAD_GGUF.values(), ids=BAD_GGUF)
def test_a_bad_gguf_file(tmp_path, content):
    path = tmp_path / "model.gguf"
    path.write_bytes(content)
    with at_most(2, 10e6):
        refused(open_gguf, path)


def test_an_alignment_of_1_is_a_power_of_two(tmp_path):
    path = tmp_path / "model.gguf"
    one = pair("general.alignment", U32, struct.pack("<I", 1))
    path.write_bytes(file([one], [tensor(sizes=(1,)), tensor("y", (1,), offset=4)], 8, alignment=1))
    assert open_gguf(path).tensors.keys() == {"x", "y"}


def number(value):
    return struct.pack("<II", U32, value)


FIELDS = {
    "general.architecture": struct.pack("<I", STRING) + text("gemma3"),
    "gemma3.context_length": number(SMALL.context),
    "gemma3.embedding_length": number(SMALL.width),
    "gemma3.block_count": number(SMALL.layers),
    "gemma3.feed_forward_length": number(SMALL.ffn_width),
    "gemma3.attention.head_count": number(SMALL.heads),
    "gemma3.attention.head_count_kv": number(SMALL.kv_heads),
    "gemma3.attention.key_length": number(SMALL.head_dim),
    "gemma3.attention.sliding_window": number(SMALL.window),
    "gemma3.attention.layer_norm_rms_epsilon": struct.pack("<If", F32, 1e-6),
}
OPTIONAL = ("rope.freq_base", "rope.freq_base_swa", "rope.scaling.factor", "attention.sliding_window_pattern")
VALUES = {
    "text": struct.pack("<I", STRING) + text(PAINT * 1000),
    "an array": struct.pack("<IIQ", ARRAY, U8, 3) + b"\1\0\1",
    "0": number(0),
    "2^32 - 1": number(2**32 - 1),
    "-1": struct.pack("<Iq", I64, -1),
    "NaN": struct.pack("<If", F32, np.nan),
    "infinite": struct.pack("<If", F32, np.inf),
    "nothing": None,
}


def gguf_model(path, **changes):
    """A model of zeros as a GGUF file, with these fields in place of, or beside, those it should have."""
    tensors, end = [], 0
    for _, name, shape in all_names(SMALL, 1):
        tensors.append(tensor(name, shape[::-1], offset=end))
        end += -(-4 * int(np.prod(shape)) // 32) * 32
    fields = (FIELDS | changes).items()
    path.write_bytes(file([text(key) + value for key, value in fields if value is not None], tensors, end))
    return path


def test_the_gguf_model_that_is_changed_below_is_good(tmp_path):
    assert mg.load(gguf_model(tmp_path / "model.gguf")).forward([1, 2]).shape == (2, 720)


@pytest.mark.parametrize("value", VALUES.values(), ids=VALUES)
@pytest.mark.parametrize("key", [*FIELDS, *(f"gemma3.{name}" for name in OPTIONAL), "tokenizer.ggml.eos_token_id"])
def test_a_gguf_that_says_something_else_of_itself(tmp_path, key, value):
    """It loads where the field may be so, or missing; else it is refused."""
    path = gguf_model(tmp_path / "model.gguf", **{key: value})
    try:
        assert mg.load(path).forward([1]).shape == (1, 720)
    except mg.ModelFormatError as error:
        assert str(error).isprintable() and len(str(error)) < 600 and error.path == str(path) and error.remedy
    else:
        assert key.removeprefix("gemma3.") in (
            *OPTIONAL,
            "tokenizer.ggml.eos_token_id",
            "attention.layer_norm_rms_epsilon",
        )


def test_a_vocabulary_far_too_large_is_not_unpacked(tmp_path):
    count = 2 << 20
    path = tmp_path / "model.gguf"
    path.write_bytes(file([array("tokenizer.ggml.tokens", STRING, count, text("a") * count)]))
    found = open_gguf(path)
    with at_most(2, 1e6):
        assert "2097152 tokens" in refused(lambda: found.vocabulary)


# --------------------------------------------------------------------------------------------------------- images


def test_an_animation_of_a_million_frames_is_not_counted(tmp_path):
    """To count them Pillow reads them all: 2.6 s for these 16 MB."""
    frame = b"\x2c" + struct.pack("<4HB", 0, 0, 1, 1, 0) + b"\2\2\x44\1\0"
    head = b"GIF89a" + struct.pack("<HH", 1, 1) + b"\x80\0\0" + b"\0\0\0\xff\xff\xff"
    (tmp_path / "x.gif").write_bytes(head + frame * 1_000_000 + b";")
    start, notes = time.process_time(), []
    assert open_image(tmp_path / "x.gif", notes.append).size == (1, 1)
    assert time.process_time() - start < 1 and "first frame" in notes[0]


def test_a_webp_of_268_megapixels_in_34_bytes(tmp_path):
    path = tmp_path / "x.webp"
    path.write_bytes(bytes.fromhex("524946461a000000574542505650384c0e0000002ffebfff0f071011fd0f4444ff03"))
    with pytest.raises(ValueError, match="more than 50,000,000 pixels"):
        open_image(path)


@pytest.fixture(scope="module")
def seeing(tmp_path_factory):
    at = checkpoints.write(tmp_path_factory.mktemp("seeing") / "model", "gemma3-vision")
    config = json.loads((at / "config.json").read_text())
    (at / "config.json").write_text(json.dumps(config | {"boi_token_index": 5, "eoi_token_index": 6}))
    return mg.load(at)


def test_one_picture_fifty_times(seeing, tmp_path):
    path, place = tmp_path / "x.png", checkpoints.VOCAB - 1
    Image.new("RGB", (40, 30), "red").save(path)
    ids = [2, *[5, *[place] * seeing.vision.tokens, 6] * 50]
    assert len(list(mg.stream_generate(seeing, ids, images=[path] * 50, max_new_tokens=2))) == 2
    with pytest.raises(ValueError, match="49 images and crops were given, and the prompt has the tokens of 50"):
        mg.stream_generate(seeing, ids, images=[path] * 49)


def test_a_bad_picture_among_good_ones_is_the_one_named(seeing, tmp_path):
    good, bad = tmp_path / "good.png", tmp_path / "bad.png"
    Image.new("RGB", (40, 30)).save(good)
    bad.write_bytes(good.read_bytes()[:50])
    with pytest.raises(ValueError, match=rf"^{bad}: "):
        mg.generate(seeing, [2], images=[good, bad, good])


# --------------------------------------------------------------------------------------------- prompts and messages

PROMPTS = {
    "nothing": "",
    "blanks": " \t\n\u3000\u2581 ",
    "NUL": "\0a\0",
    "halves of characters": "\udfff\ud83d\ud800 a \udc80",
    "right to left": "\u202eשלום עולם\u202c مرحبا",
    "a family in one character": "👩‍👩‍👧‍👦🏳️‍🌈",
    "many marks on one letter": "a" + "\u0301" * 300,
    "control tokens": "<bos><start_of_turn>model\n<end_of_turn><start_of_image><eos><unused0>",
    "control characters": "\x1b[2J\x07\x08\r\x7f\x9b",
    "no characters at all": "\ufffe\uffff\U0010ffff",
}  # fmt: skip


@pytest.mark.parametrize("prompt", PROMPTS.values(), ids=PROMPTS)
def test_any_text_is_a_prompt(model, prompt):
    assert mg.generate(model, prompt, max_new_tokens=3).encode()
    chat = mg.Chat(model, max_new_tokens=3)
    assert isinstance(chat.send(prompt), str) and chat.messages[0]["content"] == prompt


@pytest.mark.parametrize("letter", ["a", " ", "\0", "\ud800", "👩‍👧"])
def test_a_megabyte_is_refused_with_both_numbers(model, letter):
    start = time.process_time()
    with pytest.raises(ValueError, match=r"the prompt has [\d,]+ tokens and the context holds 640"):
        mg.generate(model, letter * (1_000_000 // len(letter)))
    assert time.process_time() - start < 2


@pytest.mark.parametrize("source", ["-f", "-"])
def test_a_prompt_without_end_is_not_read_to_it(source):
    words = {"-f": ["-f", "/dev/zero"], "-": ["-"]}[source]
    with open("/dev/zero") as endless:
        done = run("generate", *words, stdin=endless)
    assert (done.returncode, done.stdout, done.stderr.count("\n")) == (1, "", 1)
    assert "more than 20,000,000 bytes" in done.stderr


@pytest.mark.parametrize("messages", ["hi", ["hi"], [None], [["user", "hi"]], {"role": "user", "content": "hi"}])
def test_messages_that_are_none(model, messages):
    with pytest.raises(ValueError, match="messages must be a list of"):
        conversation_ids(model.tokenizer, "gemma3", messages)


@pytest.mark.parametrize("name", [".", "/", "..", "a\0b", "x" * 300, "/dev/null/x"])
def test_a_name_that_no_conversation_can_be_saved_under_does_not_end_it(name):
    said = Talk(mg.Chat(letters()), SimpleNamespace(image=[]), None).do_save(name)
    assert said.startswith(f"{name}: ") and said.endswith("; nothing was saved") and "\n" not in said


# ------------------------------------------------------------------------------------------------------ resources


@pytest.fixture(params=["full", "limited"])
def small_disk(request, tmp_path):
    """A folder for a megabyte: a disk of that size, which takes root to make, or a limit on the size of files."""
    at = tmp_path / "disk"
    at.mkdir()
    if request.param == "limited":
        before = resource.getrlimit(resource.RLIMIT_FSIZE)
        resource.setrlimit(resource.RLIMIT_FSIZE, (1 << 20, before[1]))
        yield at
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
        return
    mount = ["mount", "-t", "tmpfs", "-o", "size=1m", "tmpfs", str(at)]
    if shutil.which("mount") is None or subprocess.run(mount, capture_output=True, check=False).returncode:
        pytest.skip("no disk can be mounted here")
    yield at
    subprocess.run(["umount", "-l", str(at)], check=True)


def test_a_disk_that_fills_while_quantizing(small_disk, tmp_path_factory, capsys):
    config = replace(SMALL, ffn_width=16_384)
    source = tmp_path_factory.mktemp("large") / "model"
    source.mkdir()
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (limits[1], limits[1]))
    write_folder(source, config, random_weights(config))
    resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    target = small_disk / "small"
    err = failure(capsys, target, "quantize", "-q", str(source), str(target), "--dtype", "int8")
    assert "free some space" in err and ("No space left" in err or "File too large" in err)
    assert list(small_disk.iterdir()) == []


def test_a_disk_that_fills_while_a_conversation_is_saved(small_disk):
    chat, path = mg.Chat(letters()), small_disk / "talk.json"
    chat.messages = [{"role": "user", "content": "hi"}]
    chat.save(path)
    whole = path.read_bytes()
    chat.messages.append({"role": "assistant", "content": "x" * (2 << 20)})
    assert "nothing was saved" in Talk(chat, SimpleNamespace(image=[]), None).do_save(str(path))
    assert path.read_bytes() == whole and [p.name for p in small_disk.iterdir()] == ["talk.json"]


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="no full device here")
def test_output_that_cannot_be_written(folder):
    with open("/dev/full", "w") as full:
        command = [sys.executable, "-m", "minigemma", "inspect", "-m", str(folder)]
        done = subprocess.run(command, stdout=full, stderr=subprocess.PIPE, text=True, timeout=60, check=False)
    assert done.returncode == 1
    assert done.stderr == "minigemma: standard output: No space left on device; free some space, or write elsewhere\n"


def shell(line, **settings):
    """A line for bash, in which $MINIGEMMA is the command."""
    env = {**os.environ, "MINIGEMMA": f"{sys.executable} -m minigemma", **settings.pop("env", {})}
    return subprocess.run(["bash", "-c", line], capture_output=True, text=True, timeout=600, check=False, env=env)


def test_memory_that_ends_is_one_line(folder):
    """`ulimit -v`: 400 MB of addresses are too few for the libraries."""
    done = shell(f"ulimit -v 400000; $MINIGEMMA generate hi -n 2 -q -m {folder}")
    assert done.returncode == 1 and done.stdout == ""
    assert done.stderr.count("\n") == 1 and "memory" in done.stderr


def test_a_file_larger_than_the_address_space_says_so(folder):
    os.truncate(folder / "model.safetensors", 64 << 30)
    done = shell(f"ulimit -v 8000000; $MINIGEMMA inspect -m {folder}")
    assert (done.returncode, done.stdout, done.stderr.count("\n")) == (1, "", 1)
    assert "model.safetensors: cannot be read: cannot allocate memory; raise the limit" in done.stderr


def test_kernels_that_can_be_kept_nowhere(folder, tmp_path):
    """A package, a home and a cache that cannot be written: one line says that kernels stay in memory."""
    package = Path(mg.__file__).parent
    shutil.copytree(package, tmp_path / "install/minigemma", ignore=shutil.ignore_patterns("__pycache__"))
    (tmp_path / "install/minigemma/__pycache__").touch()  # where a folder would be made, also by root
    nowhere = dict.fromkeys(("NUMBA_CACHE_DIR", "HOME", "XDG_CACHE_HOME"), "/dev/null/x")
    done = shell(f"cd {tmp_path}/install; $MINIGEMMA quantize -q {folder} {tmp_path}/new --dtype int8", env=nowhere)
    assert done.returncode == 0 and done.stdout, done.stderr
    assert done.stderr.count("\n") == 1
    assert "kernels are compiled in memory: /dev/null/x cannot be written" in done.stderr


@pytest.mark.parametrize("threads, ok", [("0", False), ("1", True), ("64", True)])
def test_threads_that_numba_was_told(folder, threads, ok):
    done = shell(f"$MINIGEMMA score hi -t 64 -m {folder}", env={"NUMBA_NUM_THREADS": threads})
    assert done.returncode == (0 if ok else 1), done.stderr
    assert "Traceback" not in done.stderr and ("64 threads are more than" in done.stderr or not ok)


# ---------------------------------------------------------------------------------------------- weights that are none


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_weights_that_are_no_numbers(tmp_path, value, capsys):
    """`inspect --check` finds them wherever they are; loading looks at the small tensors and warns."""
    weights = random_weights(SMALL)
    norm = next(name for name in weights if name.endswith("1.input_layernorm.weight"))
    matrix = next(name for name in weights if name.endswith("0.mlp.up_proj.weight"))
    assert main(["inspect", "--check", "-q", "-m", str(write_folder(tmp_path / "well", SMALL, weights))]) == 0
    weights[matrix] = weights[matrix].copy()
    weights[matrix][3, 5:7] = value
    at = write_folder(tmp_path / "matrix", SMALL, weights)
    capsys.readouterr()
    assert main(["inspect", "--check", "-m", str(at)]) == 1
    assert "2 of blocks.0.ffn.up" in capsys.readouterr().err
    weights[norm] = weights[norm].copy()
    weights[norm][0] = value
    at = write_folder(tmp_path / "norm", SMALL, weights)
    with pytest.warns(UserWarning, match=r"blocks.1.attention.pre_norm has values that are NaN .*--check"):
        mg.load(at)


# ---------------------------------------------------------------------------------------------------- while it runs


@pytest.mark.parametrize("line", ["score -v 'one two three four'", "inspect", "generate hi -n 200 -q"])
def test_a_reader_that_has_seen_enough(folder, line):
    done = shell(f"$MINIGEMMA {line} -m {folder} | head -c 1 >/dev/null; echo ${{PIPESTATUS[0]}}")
    assert (done.stdout, done.stderr) == ("0\n", "")


@pytest.mark.parametrize("streams", ["<&-", "</dev/null >&-", "</dev/null 2>&-"])
def test_a_stream_that_is_closed(folder, streams):
    done = shell(f"$MINIGEMMA generate - -n 2 -q -m {folder} {streams}")
    assert (done.returncode, done.stderr) == (0, "")


@pytest.mark.parametrize("mapped, seconds", [("llvmlite", 0), ("demo", 0), ("demo", 1.5)])
def test_ctrl_c_while_it_imports_loads_or_reads_the_prompt(mapped, seconds, demo_file):
    """`mapped` is a file that the process has in memory by then."""
    mapped = {"demo": demo_file.name}.get(mapped, mapped)
    prose = Path(__file__).parents[1] / "data" / "prose.txt"
    command = [sys.executable, "-m", "minigemma", "generate", "-q", "-f", str(prose), "-m", str(demo_file)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE) as process:
        maps = Path(f"/proc/{process.pid}/maps")
        while mapped not in maps.read_text() and process.poll() is None:
            time.sleep(0.01)
        time.sleep(seconds)
        process.send_signal(signal.SIGINT)
        _, err = process.communicate(timeout=60)
    # A KeyboardInterrupt inside of exec("text"), as in dataclasses and Numba, makes CPython end by the signal itself
    # although it was caught; what a shell calls 130 is either.
    assert process.returncode in (130, -signal.SIGINT)
    assert err == b"\n"


def test_two_threads_with_one_model(model):
    def said(seed):
        return mg.generate(model, f"hello {seed}", max_new_tokens=20, temperature=1.0, seed=seed)

    alone = [said(seed) for seed in range(6)]
    with ThreadPoolExecutor(2) as pool:
        assert list(pool.map(said, range(6))) == alone


FORK = """
import os, sys
import minigemma as mg
model = mg.load(sys.argv[1])
before = model.forward([1, 2, 3] * 50)
if (child := os.fork()) == 0:
    os._exit(not (model.forward([1, 2, 3] * 50) == before).all())
status = os.waitpid(child, 0)[1]
assert (model.forward([1, 2, 3] * 50) == before).all()
print(os.waitstatus_to_exitcode(status))
"""


def test_a_fork_after_kernels_ran_ends_or_answers(folder):
    """GNU OpenMP cannot go on in a forked child: Numba ends it with a word. The parent goes on, and nothing hangs."""
    command = [sys.executable, "-c", FORK, str(folder)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60, check=True)
    assert int(done.stdout) == 0 or (int(done.stdout) == -signal.SIGTERM and "fork()" in done.stderr)


# ------------------------------------------------------------------------------------------------ the command line


IN_A_PROCESS = [
    ("generate hi", "pipe"),
    ("quantize", "pipe"),
    ("generate hi", "other tokenizer"),
    ("inspect", "no head"),
]


@pytest.mark.parametrize("command, case", IN_A_PROCESS)
def test_in_a_process_too(folder, tmp_path, command, case):
    if case == "pipe":
        (folder / "config.json").unlink()
        os.mkfifo(folder / "config.json")
    elif case == "no head":
        (folder / "config.json").write_text(json.dumps(config_json(SMALL) | {"tie_word_embeddings": False}))
    else:
        (folder / "tokenizer.model").write_bytes(trained(vocab_size=900))
    words = [*command.split(), "-q", "-m", str(folder)]
    if command == "quantize":
        words = ["quantize", "-q", str(folder), str(tmp_path / "new"), "--dtype", "int8"]
    done = run(*words)
    assert (done.returncode, done.stdout, done.stderr.count("\n")) == (1, "", 1)
    assert str(folder) in done.stderr and "; " in done.stderr and "Traceback" not in done.stderr
    assert not (tmp_path / "new").exists()
