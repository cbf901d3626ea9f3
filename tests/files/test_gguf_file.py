"""GGUF: equal to the gguf package on what it writes, and an error of one line on everything broken."""

from __future__ import annotations

import os
import struct
import time

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from support import gguf_files
from support.gguf_bytes import ARRAY, F32, F64, I32, STRING, U8, U16, U32, U64, array, at_most, file, pair, tensor, text
from support.oracles import answered_by

from minigemma.errors import ModelFormatError
from minigemma.files.gguf_file import TYPES, open_gguf


@pytest.fixture
def path(tmp_path):
    return tmp_path / "model.gguf"


def opened(path, content):
    path.write_bytes(content)
    return open_gguf(path)


# ------------------------------------------------------------------------------------------------- what is right


VALUES = {"u8": ("uint8", 200), "i8": ("int8", -100), "u16": ("uint16", 60_000), "i16": ("int16", -30_000)}
VALUES |= {"u32": ("uint32", 4_000_000_000), "i32": ("int32", -2_000_000_000), "u64": ("uint64", 2**64 - 1)}
VALUES |= {"i64": ("int64", -(2**63)), "f32": ("float32", 0.15625), "f64": ("float64", 1 / 3), "bool": ("bool", True)}
VALUES |= {"string": ("string", "grüße\n▁")}
ARRAYS = {"numbers": [3, -1, 4], "words": ["a", "", "日本"]}


def tensors_of_many_types():
    """(type, values) by name."""
    rng = np.random.default_rng(1)
    matrix = rng.standard_normal((5, 256)).astype(np.float32)
    kinds = ("F32", "F16", "BF16", "Q8_0", "Q4_0", "Q5_1")
    tensors = {f"blk.{kind}": (kind, gguf_files.quantize(matrix, kind)) for kind in kinds}
    tensors["deep"] = ("F32", rng.standard_normal((2, 3, 5, 7)).astype(np.float32))
    tensors["k"] = ("Q6_K", rng.integers(0, 256, (3, 2 * 210), np.uint8))
    return tensors


def write_everything(path, alignment):
    """A file with a value of every type, and tensors of many."""
    fields = {key: gguf_files.Typed(value) for key, value in VALUES.items()} | ARRAYS
    return gguf_files.write(path, "gemma3", fields, tensors_of_many_types(), alignment)


@pytest.mark.parametrize("alignment", [None, 8, 64])
def test_values_and_tensors_are_those_that_were_written(path, alignment):
    found = open_gguf(write_everything(path, alignment))
    assert found.metadata["general.architecture"] == "gemma3"
    assert {key: found.metadata[key] for key in VALUES} == {key: value for key, (_, value) in VALUES.items()}
    assert found.metadata["bool"] is True
    np.testing.assert_array_equal(found.numbers("numbers", I32), [3, -1, 4])
    assert [*found.strings("words")] == [b"a", b"", "日本".encode()]

    tensors = tensors_of_many_types()
    assert list(found.tensors) == list(tensors)
    for name, ours in found.tensors.items():
        kind, values = tensors[name]
        assert ours.name == name
        assert ours.type == kind
        assert ours.blocks.tobytes() == values.tobytes()
    assert found.tensors["deep"].shape == found.tensors["deep"].blocks.shape == (2, 3, 5, 7)
    assert all(found.tensors[name].shape == (5, 256) for name in tensors if name.startswith("blk"))
    assert found.tensors["k"].shape == (3, 512)
    assert found.tensors["blk.F32"].blocks.dtype == np.float32
    assert found.tensors["blk.F16"].blocks.dtype == np.float16
    assert found.tensors["blk.BF16"].blocks.dtype == np.uint16
    assert found.tensors["blk.Q5_1"].blocks.shape == (5, 8, 24)
    assert found.tensors["k"].blocks.shape == (3, 2, 210)


def write_with_package(path, alignment):
    """The same by the gguf package."""
    gguf = pytest.importorskip("gguf")
    writer = gguf.GGUFWriter(path, "gemma3")
    if alignment:
        writer.add_custom_alignment(alignment)
    for key, (kind, value) in VALUES.items():
        getattr(writer, f"add_{kind}")(key, value)
    for key, values in ARRAYS.items():
        writer.add_array(key, values)
    for name, (kind, values) in tensors_of_many_types().items():
        writer.add_tensor(name, values, raw_dtype=gguf.GGMLQuantizationType[kind])
    writer.write_header_to_file(), writer.write_kv_data_to_file(), writer.write_tensors_to_file(), writer.close()
    return path


@pytest.mark.oracle
@pytest.mark.parametrize("alignment", [None, 8, 64])
def test_our_files_are_those_of_the_package(path, tmp_path, alignment):
    """To the last byte; and what the package reads in them is what we read."""
    gguf = pytest.importorskip("gguf")
    theirs = write_with_package(tmp_path / "theirs.gguf", alignment)
    assert write_everything(path, alignment).read_bytes() == theirs.read_bytes()
    found = open_gguf(theirs)
    tensors = {made.name: made for made in gguf.GGUFReader(theirs).tensors}
    assert list(found.tensors) == list(tensors)
    for name, ours in found.tensors.items():
        assert ours.type == tensors[name].tensor_type.name
        assert list(ours.shape) == tensors[name].shape[::-1].tolist()
        assert ours.blocks.tobytes() == tensors[name].data.tobytes()


@pytest.mark.oracle
@pytest.mark.parametrize("kind", ["F32", "F16", "BF16", "Q8_0", "Q4_0", "Q4_1", "Q5_0", "Q5_1"])
def test_our_blocks_are_those_that_the_package_quantizes(kind):
    gguf = pytest.importorskip("gguf")
    rng = np.random.default_rng(0)
    weights = (rng.standard_normal((11, 256)) * np.logspace(-3, 1, 11)[:, None]).astype(np.float32)
    weights[3] = 0
    theirs = gguf.quantize(weights, gguf.GGMLQuantizationType[kind])
    np.testing.assert_array_equal(gguf_files.quantize(weights, kind), theirs, strict=True)


@answered_by("gguf")
def block_sizes(numbers):
    """[name, weights, bytes] of a block of each type by its number."""
    import gguf

    kinds = [gguf.GGMLQuantizationType(number) for number in numbers]
    return [[kind.name, *gguf.GGML_QUANT_SIZES[kind]] for kind in kinds]


def test_block_sizes_are_the_packages(answers):
    """A wrong one would move every tensor that follows."""
    assert list(map(tuple, block_sizes(list(TYPES)))) == list(TYPES.values())


def test_version_2_is_laid_out_like_version_3(path):
    content = file([pair("k", U32, b"\7\0\0\0")], [tensor(sizes=(3, 2))], 24, version=2)
    found = opened(path, content)
    assert found.metadata == {"k": 7}
    assert found.tensors["x"].shape == (2, 3)


def test_views_lie_in_the_map_read_only_and_outlive_the_name(path):
    found = opened(path, file([], [tensor(sizes=(1000,))], 4000))
    view = found.tensors["x"].blocks
    del found
    path.unlink()
    assert view.sum() == 0
    assert not view.flags.owndata
    with pytest.raises(ValueError, match="read-only"):
        view[0] = 1
    with pytest.raises(ValueError, match="WRITEABLE"):
        view.setflags(write=True)


def test_a_type_without_a_reader_is_listed(path):
    """Whether it can be computed with is asked when someone needs its values."""
    found = opened(path, file([], [tensor(sizes=(512, 3), kind=23)], 816)).tensors["x"]
    assert (found.type, found.shape, found.blocks.shape) == ("IQ4_XS", (3, 512), (3, 2, 136))


def test_the_last_tensor_needs_no_padding_and_the_others_do(path):
    infos = [tensor("a", (1,)), tensor("b", (1,), offset=32)]
    assert len(opened(path, file([], infos, 36)).tensors) == 2
    with pytest.raises(ModelFormatError, match="'b' should have 4 bytes"):
        opened(path, file([], infos, 35))


def test_opening_reads_the_header_alone(path):
    """Eight gigabytes with a hole in place of the weights open at once and stay out of memory."""
    rows = 1 << 21
    content = file([], [tensor(sizes=(2048, rows), kind=1)])
    path.write_bytes(content)
    os.truncate(path, len(content) + 4096 * rows)
    with at_most(seconds=1, size=1_000_000):
        found = open_gguf(path)
    assert found.tensors["x"].blocks[-1, -1] == 0


# ------------------------------------------------------------------------------------------------- the vocabulary


def vocabulary(pieces, scores=None, types=None):
    scores = np.arange(len(pieces), dtype="<f4") if scores is None else np.array(scores, "<f4")
    types = np.ones(len(pieces), "<i4") if types is None else np.array(types, "<i4")
    return [
        array("tokenizer.ggml.tokens", STRING, len(pieces), b"".join(map(text, pieces))),
        array("tokenizer.ggml.scores", F32, len(scores), scores.tobytes()),
        array("tokenizer.ggml.token_type", I32, len(types), types.tobytes()),
    ]


def test_vocabulary_is_given_as_it_stands(path):
    pieces = ["<pad>", "▁the", "", "\0", "\u2581" * 20]
    found = opened(path, file(vocabulary(pieces, [0, -1, -2.5, -1000, 7], [3, 1, 4, 6, 1])))
    names, scores, types = found.vocabulary
    assert [name.decode() for name in names] == pieces
    assert (scores.dtype, types.dtype) == (np.float32, np.int32)
    assert (scores.tolist(), types.tolist()) == ([0, -1, -2.5, -1000, 7], [3, 1, 4, 6, 1])


def test_a_vocabulary_of_three_lengths_is_refused(path):
    found = opened(path, file(vocabulary(["a", "b", "c"], [0, 1], [1, 1, 1, 1])))
    with pytest.raises(ModelFormatError, match="its vocabulary has 3 tokens, 2 scores and 4 types"):
        _ = found.vocabulary


@pytest.mark.parametrize("missing", range(3))
def test_a_vocabulary_with_a_part_missing_or_of_another_type_is_refused(missing, path):
    parts = vocabulary(["a", "b"])
    key = ("tokens", "scores", "token_type")[missing]
    for wrong in ([], [array(f"tokenizer.ggml.{key}", U8, 2, b"ab")], [pair(f"tokenizer.ggml.{key}", U8, b"a")]):
        found = opened(path, file(parts[:missing] + wrong + parts[missing + 1 :]))
        with pytest.raises(ModelFormatError, match=f"tokenizer.ggml.{key} is missing or not the array it should be"):
            _ = found.vocabulary


# ------------------------------------------------------------------------------------------------- what is wrong

HUGE = 2**60
NEVER = struct.pack("<Q", 2**64 - 32)
F4 = struct.pack("<f", 1)
HOSTILE = {
    # how it begins
    "empty": (b"", "is empty"),
    "three bytes": (b"GGU", "is not a GGUF file: it does not begin with those four letters"),
    "another format": (file(magic=b"GGML"), "is not a GGUF file: it does not begin with those four letters"),
    "magic alone": (b"GGUF", "the version would need 4 bytes at byte 4, but 0 are left"),
    "no counts": (b"GGUF\3\0\0\0", "the tensor count would need 8 bytes at byte 8, but 0 are left"),
    "version 1": (file(version=1), "is GGUF version 1; this reads 2 and 3"),
    "version 4": (file(version=4), "is GGUF version 4; this reads 2 and 3"),
    "version 0": (file(version=0), "is GGUF version 0; this reads 2 and 3"),
    "big-endian": (file(version=3 << 24), "is a big-endian GGUF"),
    "tensor count -1": (
        file(tensor_count=2**64 - 1),
        "claims 18446744073709551615 tensors and 0 pairs in 32 bytes",
    ),
    "2^60 pairs": (file(pair_count=HUGE), "claims 0 tensors and 1152921504606846976 pairs in 32 bytes"),
    "counts that wrap": (file(tensor_count=2**59), "claims 576460752303423488 tensors and 0 pairs in 32 bytes"),
    "more tensors than a model has": (
        file(tensor_count=100_001, data=4_000_000),
        "claims 100001 tensors and 0 pairs; 100000 of each are possible",
    ),
    "one pair too few": (
        file([pair("k", U32, b"\0\0\0\0" * 4)], pair_count=2),
        "the key of pair 1, '', is empty or there twice",
    ),
    # metadata
    "empty key": (file([pair("", U8, b"a")]), "the key of pair 0, '', is empty or there twice"),
    "a key twice": (file([pair("k", U8, b"a")] * 2), "the key of pair 1, 'k', is empty or there twice"),
    "long key": (file([pair("k" * 65_536, U8, b"a")]), "the key of pair 0 is 65536 bytes long; 65535 are possible"),
    "key of 2^64 - 32 bytes": (
        file([NEVER + bytes(16)]),
        "the key of pair 0 would need 18446744073709551584 bytes at byte 32, but 32 are left",
    ),
    "key not UTF-8": (file([pair(b"\xff\xfe", U8, b"a")]), "the key of pair 0 is not UTF-8"),
    "unknown metadata type": (file([pair("k", 13, b"a")]), "'k' is of the unknown type 13"),
    "a key of two lines": (file([pair("k\nfine", 13, b"a")]), "'k\\nfine' is of the unknown type 13"),
    "string past the end": (
        file([pair("k", STRING, struct.pack("<Q", 1000))]),
        "'k' would need 1000 bytes at byte 45, but 19 are left",
    ),
    "array of 2^60 numbers": (
        file([array("k", F64, HUGE)]),
        "'k' would need 9223372036854775808 bytes at byte 49, but 15 are left",
    ),
    "array of 2^64 / 8 numbers": (
        file([array("k", F64, 2**61)]),
        "'k' would need 18446744073709551616 bytes at byte 49, but 15 are left",
    ),
    "array of 2^60 strings": (
        file([array("k", STRING, HUGE)]),
        "'k' would need 9223372036854775808 bytes at byte 49, but 15 are left",
    ),
    "string in an array past the end": (
        file([array("k", STRING, 1, struct.pack("<Q", 2**63))]),
        "'k' would need 9223372036854775816 bytes at byte 49, but 15 are left",
    ),
    "string in an array that wraps": (
        file([array("k", STRING, 1, NEVER)]),
        "'k' would need 18446744073709551592 bytes at byte 49, but 15 are left",
    ),
    "array cut within its second length": (
        file([array("k", STRING, 2, text("abcd") + b"1234567")])[:68],
        "'k' would need 20 bytes at byte 49, but 19 are left",
    ),
    "nested arrays": (
        file([array("k", ARRAY, 1, struct.pack("<IQ", ARRAY, 1) * 20_000)]),
        "'k' is an array of type 9; only numbers and strings may be in one",
    ),
    "array of an unknown type": (
        file([array("k", 77, 1)]),
        "'k' is an array of type 77; only numbers and strings may be in one",
    ),
    "alignment 0": (
        file([pair("general.alignment", U32, bytes(4))]),
        "general.alignment is 0; it must be a power of two",
    ),
    "alignment 24": (
        file([pair("general.alignment", U32, b"\x18\0\0\0")]),
        "general.alignment is 24; it must be a power of two",
    ),
    "alignment as u64": (
        file([pair("general.alignment", U64, b"\x20" + bytes(7))]),
        "general.alignment is of type 10; it must be a u32, type 4",
    ),
    "alignment as text": (
        file([pair("general.alignment", STRING, text("32"))]),
        "general.alignment is of type 8; it must be a u32, type 4",
    ),
    "one of three parts": (file([pair("split.count", U16, b"\3\0")]), "is one of 3 parts of a model"),
    "parts as text": (
        file([pair("split.count", STRING, text("3\n" * 500))]),
        f"is one of '{'3' + chr(92) + 'n'}{('3' + chr(92) + 'n') * 32}… parts of a model",
    ),
    # tensors
    "no axes": (file([], [tensor(sizes=())]), "tensor 'x' has 0 axes; 1 to 4 are possible"),
    "five axes": (file([], [tensor(sizes=(1,) * 5)], 4), "tensor 'x' has 5 axes; 1 to 4 are possible"),
    "2^32 - 1 axes": (file([], [tensor(axes=2**32 - 1)]), "tensor 'x' has 4294967295 axes; 1 to 4 are possible"),
    "no rows": (file([], [tensor(sizes=(4, 0))]), "tensor 'x' has the impossible shape [0, 4]"),
    "a negative axis": (
        file([], [tensor(sizes=(4, 2**64 - 1))]),
        "tensor 'x' has the impossible shape [18446744073709551615, 4]",
    ),
    "a product that wraps to 0": (
        file([], [tensor(sizes=(2**32, 2**32))]),
        "tensor 'x' has the impossible shape [4294967296, 4294967296]",
    ),
    "a product that wraps to 4": (
        file([], [tensor(sizes=(2**62 + 1, 4))], 16),
        "tensor 'x' has the impossible shape [4, 4611686018427387905]",
    ),
    "far more than the file": (
        file([], [tensor(sizes=(2**30,))], 64),
        "tensor 'x' should have 4294967296 bytes from byte 64 on, but 64 are left",
    ),
    "unknown type": (file([], [tensor(kind=255)], 16), "tensor 'x' is of the unknown type 255"),
    "a type that was taken back": (file([], [tensor(kind=4)], 16), "tensor 'x' is of the unknown type 4"),
    "half a block": (
        file([], [tensor(sizes=(48, 2), kind=8)], 102),
        "tensor 'x' has rows of 48 weights, Q8_0 has blocks of 32",
    ),
    "a tensor twice": (file([], [tensor(), tensor(offset=32)], 64), "tensor 'x' is there twice"),
    "a name of two lines": (file([], [tensor("a\nb", kind=255)]), "tensor 'a\\nb' is of the unknown type 255"),
    "a tensor's name not UTF-8": (file([], [tensor(b"\x80")], 16), "the name of tensor 0 is not UTF-8"),
    "an overlap": (
        file([], [tensor("a"), tensor("b")], 64),
        "tensor 'b' begins at 0; after the one before it that must be 32",
    ),
    "a hole": (
        file([], [tensor("a"), tensor("b", offset=64)], 96),
        "tensor 'b' begins at 64; after the one before it that must be 32",
    ),
    "an offset that is not aligned": (
        file([], [tensor("a"), tensor("b", offset=16)], 64),
        "tensor 'b' begins at 16; after the one before it that must be 32",
    ),
    "an offset that wraps into the header": (
        file([], [tensor(offset=2**64 - 32)], 16),
        "tensor 'x' begins at 18446744073709551584; after the one before it that must be 0",
    ),
    "data cut short": (
        file([], [tensor()], 15),
        "tensor 'x' should have 16 bytes from byte 64 on, but 15 are left",
    ),
    "no data": (file([], [tensor()])[:60], "tensor 'x' should have 16 bytes from byte 64 on, but 0 are left"),
    "data that only a large alignment leaves out": (
        file([pair("general.alignment", U32, struct.pack("<I", 1 << 31))], [tensor()], 16),
        "tensor 'x' should have 16 bytes from byte 2147483648 on, but 0 are left",
    ),
}


@pytest.mark.parametrize("name", HOSTILE)
def test_a_hostile_file_is_refused_in_one_line_that_says_why(name, path):
    content, problem = HOSTILE[name]
    path.write_bytes(content)
    start = time.process_time()
    with pytest.raises(ModelFormatError) as caught:
        open_gguf(path)
    assert time.process_time() - start < 1
    assert (caught.value.path, caught.value.problem) == (str(path), problem)
    assert caught.value.remedy
    assert "\n" not in str(caught.value)


def test_big_endian(path):
    with pytest.raises(ModelFormatError, match="is a big-endian GGUF"):
        open_gguf(gguf_files.write(path, "gemma3", {}, {}, order=">"))


@pytest.mark.oracle
def test_big_endian_is_as_the_package_writes_it(path, tmp_path):
    gguf = pytest.importorskip("gguf")
    writer = gguf.GGUFWriter(tmp_path / "theirs.gguf", "gemma3", endianess=gguf.GGUFEndian.BIG)
    writer.write_header_to_file(), writer.write_kv_data_to_file(), writer.close()
    ours = gguf_files.write(path, "gemma3", {}, {}, order=">").read_bytes()
    assert ours.rstrip(b"\0") == (tmp_path / "theirs.gguf").read_bytes().rstrip(b"\0")


LARGE = {
    "a key of 3 GB": (file([struct.pack("<Q", 3 << 30)]), "the key of pair 0 ends beyond 100 MB"),
    "a text of 3 GB": (file([pair("k", STRING, struct.pack("<Q", 3 << 30))]), "'k' ends beyond 100 MB"),
    "400 million empty strings": (file([array("k", STRING, 400_000_000)]), "'k' ends beyond 100 MB"),
    "100,000 empty names": (file(tensor_count=100_000), "tensor '' has 0 axes"),
    "100,000 empty keys": (file(pair_count=100_000), "the key of pair 0, '', is empty"),
}


@pytest.mark.parametrize("name", LARGE)
def test_a_count_that_a_large_file_could_hold_is_no_reason_to_begin(name, path):
    """4 GB, nearly all of it a hole."""
    content, problem = LARGE[name]
    path.write_bytes(content)
    os.truncate(path, 4 << 30)
    with at_most(seconds=1, size=1_000_000), pytest.raises(ModelFormatError, match=problem):
        open_gguf(path)


def test_the_longest_array_of_strings_costs_seconds(path):
    """Twelve million empty strings: as many as fit the limit. (1.5 s.)"""
    count = 12_000_000
    with path.open("wb") as out:
        out.write(file([array("k", STRING, count)], pair_count=2)[:49])
        out.seek(8 * count, os.SEEK_CUR)
        out.write(pair("last", STRING, struct.pack("<Q", 3 << 30)))
    os.truncate(path, 4 << 30)
    start = time.process_time()
    with pytest.raises(ModelFormatError, match="'last' ends beyond 100 MB"):
        open_gguf(path)
    assert time.process_time() - start < 30


def test_what_is_no_file(tmp_path):
    os.mkfifo(tmp_path / "pipe.gguf")
    (tmp_path / "folder.gguf").mkdir()
    for name in ("pipe.gguf", "folder.gguf"):
        with pytest.raises(ModelFormatError, match="is a folder or device, not a file; name a file"):
            open_gguf(tmp_path / name)
    with pytest.raises(ModelFormatError, match="does not exist; check the path"):
        open_gguf(tmp_path / "none.gguf")


WHOLE = file(
    [*vocabulary(["<pad>", "a", "b"]), pair("n", U64, bytes(8)), pair("s", STRING, text("text"))],
    [tensor("a", (32, 2), 8), tensor("b", (3,), offset=96)],
    96 + 12,
)


def test_every_cut_of_a_whole_file_is_refused(path):
    assert len(opened(path, WHOLE).tensors) == 2
    for size in range(len(WHOLE)):
        with pytest.raises(ModelFormatError):
            opened(path, WHOLE[:size])


@settings(deadline=None, max_examples=600, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    at=st.integers(0, len(WHOLE) - 8),
    damage=st.one_of(
        st.binary(min_size=1, max_size=8),
        st.sampled_from([0, 1, 31, 2**31, 2**32 - 1, 2**63, 2**64 - 1, 2**64 - 32]).map(
            lambda n: n.to_bytes(8, "little")
        ),
    ),
)
def test_a_damaged_file_opens_whole_or_is_refused(at, damage, path):
    """And what opens can be read to its end: no view reaches out of the file, no list is longer than it can be."""
    content = WHOLE[:at] + damage + WHOLE[at + len(damage) :]
    try:
        found = opened(path, content)
        for one in found.tensors.values():
            assert one.blocks.nbytes <= len(content)
            one.blocks.tobytes()
        assert len(found.vocabulary[0]) <= len(content) // 8
    except ModelFormatError as error:
        assert "\n" not in str(error) and len(str(error)) < 400


# ------------------------------------------------------------------------------------------------- the real file


def test_the_real_file(demo_file):
    """Facts of Gemma 3 270M's Q4_K_M file; and it opens in a moment (0.05 s, its vocabulary 0.09 s)."""
    start = time.process_time()
    found = open_gguf(demo_file)
    middle = time.process_time()
    pieces, scores, types = found.vocabulary
    end = time.process_time()
    assert found.metadata["general.architecture"] == "gemma3"
    assert (found.metadata["gemma3.block_count"], found.metadata["gemma3.embedding_length"]) == (18, 640)
    kinds = [made.type for made in found.tensors.values()]
    assert {kind: kinds.count(kind) for kind in kinds} == {"F32": 109, "Q5_0": 81, "Q4_K": 27, "Q8_0": 10, "Q6_K": 9}
    assert found.tensors["token_embd.weight"].blocks.shape == (262_144, 20, 34)
    assert pieces[2] == b"<bos>" and scores[236_743] == -236_280
    assert np.bincount(types).tolist() == [0, 255_474, 0, 6_249, 165, 0, 256]
    assert len(scores) == 262_144
    assert middle - start < 1 and end - middle < 1


def test_a_file_in_parts_is_read_whole(tmp_path):
    split = pair("split.count", U16, b"\2\0")
    for number, name in ((1, "a"), (2, "b")):
        content = file([split], [tensor(name)], data=32)
        (tmp_path / f"m-0000{number}-of-00002.gguf").write_bytes(content)
    for number in (1, 2):
        whole = open_gguf(tmp_path / f"m-0000{number}-of-00002.gguf")
        assert sorted(whole.tensors) == ["a", "b"]
    (tmp_path / "m-00002-of-00002.gguf").write_bytes(file([split], [tensor("a")], data=32))
    with pytest.raises(ModelFormatError, match="tensor 'a' is in two parts"):
        open_gguf(tmp_path / "m-00001-of-00002.gguf")
    (tmp_path / "m-00002-of-00002.gguf").unlink()
    with pytest.raises(ModelFormatError, match=r"m-00002-of-00002\.gguf: does not exist"):
        open_gguf(tmp_path / "m-00001-of-00002.gguf")
