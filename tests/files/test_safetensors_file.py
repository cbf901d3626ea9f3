"""safetensors: equal to the safetensors library on what it writes, and an error of one line on everything broken."""

from __future__ import annotations

import json
import os
import resource
import struct
import time
import tracemalloc

import numpy as np
import pytest
import safetensors
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.numpy import save_file
from support.calls import refused
from support.oracles import answered_by
from support.tensors import encoded, save, to_bf16

from minigemma.arrays import widen_bf16
from minigemma.errors import ModelFormatError
from minigemma.files.safetensors_file import FOREIGN, open_checkpoint_files, open_safetensors, what_is


def write(path, header, data=b""):
    """A safetensors file by hand: the header as a table or as bytes, whatever it says."""
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    path.write_bytes(struct.pack("<Q", len(text)) + text + data)
    return path


def entry(dtype="F32", shape=(2,), offsets=(0, 8)):
    return {"dtype": dtype, "shape": list(shape), "data_offsets": list(offsets)}


@pytest.fixture
def path(tmp_path):
    return tmp_path / "model.safetensors"


# ------------------------------------------------------------------------------------------------- what is right


def test_values_of_every_dtype_are_those_that_the_library_wrote(path):
    """But for bf16, which it takes from torch alone: it reads what we write of it."""
    values = (np.random.default_rng(1).standard_normal((3, 5)) * 50).astype(np.float32)
    kinds = {"F64": np.float64, "F32": np.float32, "F16": np.float16, "I64": np.int64, "I32": np.int32, "I16": np.int16}
    kinds |= {"I8": np.int8, "U8": np.uint8, "U16": np.uint16, "U32": np.uint32, "U64": np.uint64, "BOOL": bool}
    written = {name: np.abs(values).astype(kind) for name, kind in kinds.items()}
    save_file(written, path)
    tensors = open_safetensors(path)
    assert tensors.keys() == written.keys()
    for name, tensor in tensors.items():
        assert (tensor.name, tensor.dtype) == (name, name)
        np.testing.assert_array_equal(tensor.array, written[name], strict=True)
    save({"x": to_bf16(values)}, path)
    [(_, theirs)] = safetensors.deserialize(path.read_bytes())
    tensor = open_safetensors(path)["x"]
    assert (theirs["dtype"], tensor.dtype, tensor.array.dtype) == ("BF16", "BF16", np.uint16)
    assert bytes(theirs["data"]) == tensor.array.tobytes()
    np.testing.assert_allclose(widen_bf16(tensor.array), values, rtol=2.0**-8)


@pytest.mark.oracle
def test_bf16_is_what_torch_writes(path):
    torch = pytest.importorskip("torch")
    from safetensors.torch import save_file

    values = torch.randn(3, 5, generator=torch.Generator().manual_seed(1)).abs() * 50
    save_file({"BF16": values.to(torch.bfloat16)}, path, metadata={"format": "pt"})
    tensor = open_safetensors(path)["BF16"]
    np.testing.assert_array_equal(widen_bf16(tensor.array), values.to(torch.bfloat16).float().numpy())
    np.testing.assert_array_equal(tensor.array, to_bf16(values.numpy()))
    assert (tensor.dtype, tensor.array.dtype) == ("BF16", np.uint16)


def test_views_lie_in_the_map_read_only_at_odd_places(path):
    bf16 = np.array([[0x3F80, 0xC000], [0x7F80, 0x0001]], np.uint16)  # 1, -2, inf, the smallest subnormal
    write(path, {"b": entry("BF16", (2, 2), (3, 11)), "a": entry("U8", (3,), (0, 3))}, b"abc" + bf16.tobytes())
    tensors = open_safetensors(path)
    view = tensors["b"].array
    np.testing.assert_array_equal(view, bf16)
    assert list(tensors) == ["a", "b"]  # in the order of the data
    assert type(view) is np.ndarray and not view.flags.owndata and not view.flags.writeable
    assert view.__array_interface__["data"][0] % 2 == 1, "the case this test is about"
    with pytest.raises(ValueError, match="read-only"):
        view[0] = 0
    with pytest.raises(ValueError, match="WRITEABLE"):
        view.setflags(write=True)


def test_views_outlive_the_table_and_the_name(path):
    save_file({"x": np.arange(1000)}, path)
    view = open_safetensors(path)["x"].array
    path.unlink()
    assert view.sum() == 499500


def test_opening_reads_the_header_alone(path):
    """A gigabyte with a hole in place of its data opens at once and stays out of memory."""
    gigabyte = 1 << 30
    write(path, {"x": entry("BF16", (gigabyte // 2,), (0, gigabyte))})
    os.truncate(path, path.stat().st_size + gigabyte)
    before, start = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss, time.process_time()
    array = open_safetensors(path)["x"].array
    assert array.size == gigabyte // 2 and array[-1] == 0
    assert time.process_time() - start < 0.5
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 50_000


def test_nothing_is_a_tensor_too(path):
    assert open_safetensors(write(path, {})) == {}
    tensors = open_safetensors(
        write(path, {"none": entry("F32", (0, 7), (4, 4)), "one": entry("F32", (), (0, 4))}, bytes(4))
    )
    assert tensors["none"].array.shape == (0, 7) and tensors["one"].array.shape == ()


# -------------------------------------------------------------------------------------------------- what is wrong

GOOD = entry()
BAD_FILES = {
    "7 bytes": (b"\x02\0\0\0\0\0\0", "has 7 bytes"),
    "8 bytes, no header": (struct.pack("<Q", 0), "does not begin with a brace"),
    "length 2^62": (struct.pack("<Q", 2**62) + b"{}", "over 100 MB"),
    "length 100 MB + 1": (struct.pack("<Q", 100_000_001) + b"{}", "over 100 MB"),
    "length past the end": (struct.pack("<Q", 3) + b"{}", "its header alone 3"),
    "all zero": (bytes(1000), "does not begin with a brace"),
}
BAD_HEADERS = {
    "not UTF-8": (b'{"\xff":1}', b"", "not UTF-8"),
    "UTF-16": ('{"a":1}'.encode("utf-16"), b"", "brace"),
    "not JSON": (b"{nothing}", b"", "not JSON"),
    "two objects": (b"{}{}", b"", "not JSON"),
    "a list": (b"[1]", b"", "brace"),
    "200,000 deep": (b'{"a":' * 200_000 + b"1" + b"}" * 200_000, b"", "not JSON"),
    "a number of 10,000 digits": (b'{"a":' + b"1" * 10_000 + b"}", b"", "not JSON"),
    "a name twice": (b'{"a":%b,"a":%b}' % ((json.dumps(GOOD).encode(),) * 2), bytes(8), "twice"),
    "a field twice": (b'{"a":{"dtype":"F32","dtype":"F32","shape":[2],"data_offsets":[0,8]}}', bytes(8), "twice"),
    "overlap": ({"a": GOOD, "b": entry(offsets=(4, 12))}, bytes(12), "'b' overlaps"),
    "the same bytes twice": ({"a": GOOD, "b": GOOD}, bytes(8), "'b' overlaps"),
    "hole": ({"a": GOOD, "b": entry(offsets=(9, 17))}, bytes(17), "'b' leaves a hole"),
    "hole at the start": ({"a": entry(offsets=(4, 12))}, bytes(12), "'a' leaves a hole"),
    "trailing bytes": ({"a": GOOD}, bytes(9), "its tensors end at"),
    "data without tensors": ({}, bytes(1), "its tensors end at"),
    "truncated data": ({"a": GOOD}, bytes(7), "'a' would end at"),
    "shape and bytes differ": ({"a": entry(shape=(3,))}, bytes(8), "'a' is F32 [3], not 8 bytes"),
    "dtype and bytes differ": ({"a": entry("BF16")}, bytes(8), "'a' is BF16 [2], not 8 bytes"),
    "backwards": ({"a": entry(shape=(0,), offsets=(8, 0))}, b"", "not -8 bytes"),
    "three offsets": ({"a": entry(offsets=(0, 8, 8))}, bytes(8), "3 offsets"),
    "negative axis": ({"a": entry(shape=(-2, -1))}, bytes(8), "integers"),
    "negative offset": ({"a": entry(offsets=(-8, 0))}, bytes(8), "integers"),
    "a fraction": ({"a": entry(shape=(2.0,))}, bytes(8), "integers"),
    "true as a number": ({"a": entry(shape=(True, 2))}, bytes(8), "integers"),
    "a shape that wraps": ({"a": entry(shape=(2**62, 4))}, bytes(8), "not 8 bytes"),
    "an axis of 2^64": ({"a": entry(shape=(2**64,))}, bytes(8), "integers"),
    "an offset of 2^64 - 8": ({"a": entry(offsets=(2**64 - 8, 2**64))}, bytes(8), "integers"),
    "an endless empty shape": ({"a": entry(shape=(0, 2**62), offsets=(0, 0))}, b"", "impossible shape"),
    "70 axes": ({"a": entry(shape=(1,) * 70, offsets=(0, 4))}, bytes(4), "70 axes"),
    "a shape of no list": ({"a": GOOD | {"shape": 2}}, bytes(8), "integers"),
    "unknown dtype": ({"a": entry("F4", offsets=(0, 1))}, bytes(1), "holds 'a' as 'F4'"),
    "a dtype of no text": ({"a": GOOD | {"dtype": ["F32"]}}, bytes(8), "holds 'a' as ['F32']"),
    "no shape": ({"a": {"dtype": "F32", "data_offsets": [0, 8]}}, bytes(8), "by dtype, shape"),
    "one field more": ({"a": GOOD | {"scale": 2}}, bytes(8), "by dtype, shape"),
    "a tensor of no object": ({"a": [0, 8]}, bytes(8), "by dtype, shape"),
    "metadata of numbers": ({"__metadata__": {"a": 1}}, b"", "__metadata__"),
    "metadata of no object": ({"__metadata__": "a"}, b"", "__metadata__"),
    "a name that paints the terminal": ({"\x1b[31m\n" * 500: entry("F4")}, b"", "\\x1b[31m"),
}


@pytest.mark.parametrize("content, says", BAD_FILES.values(), ids=BAD_FILES)
def test_a_file_that_is_no_safetensors_file(path, content, says):
    path.write_bytes(content)
    assert says in refused(open_safetensors, path)


@pytest.mark.parametrize("header, data, says", BAD_HEADERS.values(), ids=BAD_HEADERS)
def test_a_header_that_lies(path, header, data, says):
    assert says in refused(open_safetensors, write(path, header, data))


@pytest.mark.parametrize(
    "header",
    [
        lambda: b'{"a":[' + b"[]," * 30_000_000 + b"[]]}",
        lambda: b'{"a":{' + b'"":0,' * 18_000_000 + b'"":0}}',
        lambda: (
            b"{"
            + b",".join(b'"t%d":{"dtype":"U8","shape":[0],"data_offsets":[0,0]}' % i for i in range(1_000_000))
            + b"}"
        ),
    ],
    ids=["30 million lists", "18 million fields", "a million tensors"],
)
def test_a_huge_header_costs_little(path, header):
    write(path, header())
    tracemalloc.start()
    assert "100,000 tensors" in refused(open_safetensors, path)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 200e6


@pytest.mark.parametrize("name", [name for name, (_, _, says) in BAD_HEADERS.items() if says != "impossible shape"])
def test_we_are_stricter_than_the_library_only_where_we_mean_to_be(path, name):
    """The list above is not our invention: the library refuses these files too, but for the few named here."""
    header, data, _ = BAD_HEADERS[name]
    ours_alone = {"a name twice", "70 axes", "one field more", "unknown dtype"}  # it knows F4
    content = write(path, header, data).read_bytes()
    if name in ours_alone:
        safetensors.deserialize(content)
    else:
        with pytest.raises(safetensors.SafetensorError):
            safetensors.deserialize(content)


ONES = np.ones(4, np.float32)
VALID = encoded({"a": to_bf16(np.arange(6, dtype=np.float32).reshape(2, 3)), "b": ONES, "c": ONES[:2]})


@settings(
    max_examples=400, deadline=None, derandomize=True, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(st.data())
def test_a_damaged_file_is_refused_or_reads_as_the_library_reads_it(path, data):
    content = bytearray(VALID)
    for _ in range(data.draw(st.integers(1, 3))):
        at = data.draw(st.integers(0, len(content) - 1))
        content[at] = data.draw(st.one_of(st.integers(0, 255), st.sampled_from(b'{}[]",:0123456789')))
    cut = data.draw(st.one_of(st.just(len(content)), st.integers(0, len(content))))
    path.write_bytes(content[:cut])
    try:
        tensors = open_safetensors(path)
    except ModelFormatError:
        return
    theirs = dict(safetensors.deserialize(bytes(content[:cut])))
    assert {name: (t.dtype, list(t.array.shape), t.array.tobytes()) for name, t in tensors.items()} == {
        name: (t["dtype"], t["shape"], bytes(t["data"])) for name, t in theirs.items()
    }


# ------------------------------------------------------------------------------------------ what is something else

FOREIGN_FILES = {
    "empty": ("model.safetensors", b""),
    "lfs": ("model.safetensors", b"version https://git-lfs.github.com/spec/v1\noid sha256:4d7a\nsize 134\n"),
    "html": ("model.safetensors", b"\n<!DOCTYPE html>\n<html><body>Access to this model is restricted</body></html>"),
    "gguf": ("model.safetensors", b"GGUF\x03\0\0\0" + bytes(100)),
    "zip": ("pytorch_model.bin", None),
    "pickle": ("model.ckpt", None),
    "packed": ("model.safetensors.gz", b"\x1f\x8b\x08" + bytes(100)),
    "onnx": ("model.onnx", b"\x08\x07\x12\x07pytorch"),
    "npy": ("embedding.npy", b"\x93NUMPY\x01\0" + bytes(100)),
    "ggml": ("ggml-model.bin", b"lmgg" + bytes(100)),
    "hdf5": ("model.weights.h5", b"\x89HDF\r\n\x1a\n" + bytes(100)),
    "task": ("gemma3-1b-it-int4.task", b"PK\x03\x04" + bytes(100)),
    "sbs": ("2b-it-sfp.sbs", b"\x0a\0\0\0SBS" + bytes(100)),
}


def test_every_foreign_kind_has_an_example():
    assert FOREIGN_FILES.keys() == FOREIGN.keys()


@answered_by("torch", file="torch_files")
def torch_file(zipped):
    """What torch.save writes, in its newer form; or the beginning of the one before, which later holds addresses."""
    import io

    import torch

    out = io.BytesIO()
    torch.save({"a": torch.ones(3)}, out, _use_new_zipfile_serialization=zipped)
    return np.frombuffer(out.getvalue() if zipped else out.getvalue()[:64], np.uint8)


@pytest.mark.parametrize("kind", FOREIGN_FILES)
def test_what_is_mistaken_for_weights_is_named(answers, tmp_path, kind):
    name, content = FOREIGN_FILES[kind]
    if content is None:
        content = torch_file(kind == "zip").tobytes()
    (tmp_path / name).write_bytes(content)
    assert what_is(tmp_path / name) == kind
    message = refused(open_safetensors, tmp_path / name)
    assert FOREIGN[kind][0] in message and FOREIGN[kind][1] in message and name in message


def test_a_header_as_long_as_a_pickle_begins_is_no_pickle(path):
    header = json.dumps({"a": GOOD}).encode().ljust(0x0280)  # the length's bytes are 80 02 00 …: a pickle of protocol 2
    assert what_is(write(path, header, bytes(8))) == "safetensors"
    assert open_safetensors(path)["a"].array.tolist() == [0, 0]


def test_what_cannot_be_read(tmp_path):
    assert "no such file" in refused(open_safetensors, tmp_path / "absent.safetensors")
    assert "is a folder" in refused(open_safetensors, tmp_path)
    os.mkfifo(tmp_path / "pipe")
    assert "is a folder or device" in refused(open_safetensors, tmp_path / "pipe")
    (tmp_path / "link.safetensors").symlink_to("../blobs/gone")
    assert "incomplete download" in refused(open_safetensors, tmp_path / "link.safetensors")


# ------------------------------------------------------------------------------------------------------- folders


def shards(folder, **index):
    """Two shards of two tensors each, and their index but for what `index` says differently."""
    names = ("model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors")
    for number, name in enumerate(names):
        values = {f"{letter}{number}": np.full((2, 3), 2.0 * number + i, np.float32) for i, letter in enumerate("ab")}
        save_file(values, folder / name)
    table = {"a0": names[0], "b0": names[0], "a1": names[1], "b1": names[1]}
    (folder / "model.safetensors.index.json").write_text(
        json.dumps({"metadata": {"total_size": 96}, "weight_map": table} | index)
    )
    return table


def test_shards_are_one_checkpoint(tmp_path):
    table = shards(tmp_path)
    tensors = open_checkpoint_files(tmp_path)
    assert {name: tensor.array.mean() for name, tensor in tensors.items()} == {"a0": 0, "b0": 1, "a1": 2, "b1": 3}
    written = {
        name for shard in table.values() for name in dict(safetensors.deserialize((tmp_path / shard).read_bytes()))
    }
    assert tensors.keys() == written


def test_the_index_decides_what_belongs_to_the_model(tmp_path):
    table = shards(tmp_path)
    shards(tmp_path, weight_map={"a1": table["a1"]})
    assert open_checkpoint_files(tmp_path).keys() == {"a1"}


def test_links_of_a_cache_are_followed(tmp_path):
    (tmp_path / "blobs").mkdir()
    (tmp_path / "snapshots").mkdir()
    save_file({"a": np.ones(3, np.float32)}, tmp_path / "blobs" / "4d7a")
    (tmp_path / "snapshots" / "model.safetensors").symlink_to("../blobs/4d7a")
    assert open_checkpoint_files(tmp_path / "snapshots")["a"].array.tolist() == [1, 1, 1]
    (tmp_path / "blobs" / "4d7a").unlink()
    assert "incomplete download" in refused(open_checkpoint_files, tmp_path / "snapshots")


BAD_SHARDS = [
    "../x.safetensors",
    "/etc/passwd",
    "C:\\x.safetensors",
    "a/b.safetensors",
    "x.bin",
    "",
    ".safetensors",
    7,
    None,
]


@pytest.mark.parametrize("shard", [*BAD_SHARDS, "x.safetensors\n", "x\0.safetensors", "..", ["x.safetensors"]])
def test_a_shard_is_a_plain_name(tmp_path, shard):
    shards(tmp_path, weight_map={"a": shard})
    (tmp_path.parent / "x.safetensors").write_bytes(VALID)
    assert "no plain name" in refused(open_checkpoint_files, tmp_path)


def test_missing_pieces_are_named(tmp_path):
    table = shards(tmp_path)
    (tmp_path / table["a1"]).unlink()
    message = refused(open_checkpoint_files, tmp_path)
    assert f"{table['a1']}: is missing; download" in message
    (tmp_path / table["a0"]).unlink()
    assert "2 of 2 shards are missing" in refused(open_checkpoint_files, tmp_path)
    shards(tmp_path, weight_map=table | {"c9": table["a0"]})
    assert "lacks 'c9'" in refused(open_checkpoint_files, tmp_path)


@pytest.mark.parametrize(
    "text, says",
    [
        (b"", "is empty"),
        (b"<html>", "web page"),
        (b"version https://git-lfs.github.com/spec/v1", "Git-LFS"),
        (b"[]", "a list, not an object"),
        (b"{", "not JSON"),
        (b"{}", "no weight_map"),
        (b'{"weight_map": {}}', "no weight_map"),
        (b'{"weight_map": ["a"]}', "no weight_map"),
        (b'{"weight_map": {"a": "x.safetensors", "a": "y.safetensors"}}', "twice"),
        (b'{"weight_map": {"\xff": "x.safetensors"}}', "not UTF-8"),
        (b'{"a":' * 100_000, "not JSON"),
        (b" " * 10_000_001, "larger than 10 MB"),
    ],
)
def test_an_index_that_is_none(tmp_path, text, says):
    (tmp_path / "model.safetensors.index.json").write_bytes(text)
    assert says in refused(open_checkpoint_files, tmp_path)


@pytest.mark.parametrize(
    "files, says",
    [
        ([], "is an empty folder"),
        (["config.json"], "holds neither"),
        (["config.json", "pytorch_model.bin"], "holds pytorch_model.bin"),
        (["config.json", "model.weights.h5"], "holds model.weights.h5"),
        (["_METADATA", "d"], "Orbax"),
        (["model-00001-of-00002.safetensors"], "no model.safetensors.index.json"),
    ],
)
def test_a_folder_without_safetensors_says_what_it_holds(tmp_path, files, says):
    folder = tmp_path / "model"
    folder.mkdir()
    for name in files:
        (folder / name).touch()
    assert says in refused(open_checkpoint_files, folder)


def test_a_folder_that_is_none(tmp_path):
    assert "no such file" in refused(open_checkpoint_files, tmp_path / "absent")
    (tmp_path / "file").touch()
    assert "not a directory" in refused(open_checkpoint_files, tmp_path / "file")
