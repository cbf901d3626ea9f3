"""Ids against other people's tokenizers, characters that come out whole, texts that stay texts, and bad files.

data/tokenizer_cases.json.gz holds hard texts with the ids that the `tokenizers` library gives them with Gemma 3's and
Gemma 2's tokenizer.json, and as much of Gemma 2's vocabulary as these texts can reach.
"""

import json
import random
import re
import time

import numpy as np
import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from support.gguf_bytes import at_most
from support.tokenizers import (
    BYTE,
    BYTES,
    CONTROL,
    DIFFERENCES,
    FIRST,
    KINDS,
    NAMES,
    NORMAL,
    SYMBOLS,
    USER_DEFINED,
    gemma2,
    gemma3,
    some_text,
    taken_apart,
    trained,
    vocabulary,
    ways_in,
)

from minigemma.arrays import Strings
from minigemma.errors import ModelFormatError
from minigemma.files.gguf_file import open_gguf
from minigemma.files.statements import folder_statements
from minigemma.files.tokenizer import Tokenizer
from minigemma.text.prompt import text_ids


@pytest.fixture(scope="session", name="gemma3")
def _gemma3(demo_file):
    return gemma3(demo_file)


# ---- the same ids as others


@pytest.mark.parametrize("kind", KINDS)
def test_gemma_3_gives_the_ids_of_its_tokenizer_json(kind, gemma3):
    wrong = {text for text, ids, _ in KINDS[kind] if ids != gemma3.encode(text, control=True)}
    assert wrong == (DIFFERENCES.keys() if kind == "control" else set())


@pytest.mark.parametrize("kind", KINDS)
def test_gemma_2_gives_the_ids_of_its_tokenizer_json(kind):
    tokenizer, real = gemma2()
    for text, _, ids in KINDS[kind]:
        assert [real[i] for i in tokenizer.encode(text, control=True)] == ids, text


def test_ids_that_every_gemma_has(gemma3):
    two = gemma2()[0]
    for tokenizer, turn in ((gemma3, 105), (two, 106)):
        assert (tokenizer.pad, tokenizer.eos, tokenizer.bos, tokenizer.unknown) == (0, 1, 2, 3)
        assert [tokenizer.piece(i) for i in range(5)] == ["<pad>", "<eos>", "<bos>", "<unk>", "<mask>"]
        assert (tokenizer.id_of("<start_of_turn>"), tokenizer.id_of("<end_of_turn>")) == (turn, turn + 1)
        assert tokenizer.start_of_turn == turn
        assert [tokenizer.id_of("\n" * n) for n in range(1, 32)] == [*range(turn + 2, turn + 33)]
        assert [tokenizer.id_of("\u2581" * n) for n in range(2, 32)] == [*range(turn + 33, turn + 63)]
    assert gemma3.size == 262144
    assert gemma3.piece(255999) == "<start_of_image>" and gemma3.id_of("<end_of_image>") == 256000
    assert gemma3.id_of("no such piece") is None and gemma3.id_of("") is None
    assert gemma3.piece(-1) == gemma3.piece(262144) == ""


# ---- the reference implementation trains a small model, of which both ways in are tested


@settings(max_examples=300, deadline=None)
@given(some_text)
def test_both_ways_in_agree_with_sentencepiece(text):
    assume(not re.search("<(pad|eos|bos|unk)>", text))  # sentencepiece never finds these in a text
    text = text.encode("utf-8", "replace").decode()
    reference, from_file, from_parts = ways_in()
    expected = reference.encode(text)
    assert from_file.encode(text, control=True) == from_parts.encode(text, control=True) == expected
    typed = from_file.encode(text)
    assert typed == from_parts.encode(text)
    control = {reference.piece_to_id(symbol) for symbol in SYMBOLS}
    assert not control & {*typed}
    if not control & {*expected}:
        assert typed == expected


def test_a_model_file_is_read(tmp_path):
    path = tmp_path / "tokenizer.model"
    path.write_bytes(trained())
    for tokenizer in (Tokenizer.from_model_file(path), Tokenizer.from_model_file(str(path))):
        assert tokenizer.size == 700
        assert tokenizer.encode("<start_of_turn>", control=True) == [tokenizer.id_of("<start_of_turn>")]
        assert len(tokenizer.encode("<start_of_turn>")) > 3
        assert tokenizer.encode("<table>") == [tokenizer.id_of("<table>")]


def test_a_piece_that_only_ends_with_a_control_name_is_none(tmp_path):
    path = tmp_path / "tokenizer.model"
    path.write_bytes(trained(user_defined_symbols="the<mask>,<mask>"))
    tokenizer = Tokenizer.from_model_file(path)
    assert tokenizer.encode("the<mask>") == [tokenizer.id_of("the<mask>")]
    assert tokenizer.decode(tokenizer.encode("the<mask>")) == "the<mask>"
    assert tokenizer.id_of("<mask>") not in tokenizer.encode("<mask>")


# ---- text is text


def is_control(tokenizer, token):
    return tokenizer.decode([token]) == ""


def test_no_typed_name_becomes_a_control_token(gemma3):
    for tokenizer in (gemma3, gemma2()[0]):
        for text, *_ in KINDS["control"]:
            assert not any(is_control(tokenizer, i) for i in tokenizer.encode(text)), text
            assert tokenizer.decode(tokenizer.encode(text)) == text


def test_asked_for_the_names_are_the_tokens(gemma3):
    for tokenizer in (gemma3, gemma2()[0]):
        known = [name for name in NAMES if tokenizer.id_of(name) is not None]
        assert len(known) >= 14
        for name in known:
            token = tokenizer.id_of(name)
            assert tokenizer.encode(name, control=True) == [token] and is_control(tokenizer, token)


@pytest.mark.parametrize("kind", [NORMAL, USER_DEFINED, CONTROL])
def test_control_tokens_are_known_by_name_whatever_the_file_says(kind):
    pieces, scores, types = taken_apart(trained())
    types = np.where([piece.decode() in SYMBOLS for piece in pieces], kind, types)
    tokenizer = Tokenizer.from_vocabulary(pieces, scores, types)
    for symbol in SYMBOLS:
        assert is_control(tokenizer, tokenizer.id_of(symbol))
        assert tokenizer.decode(tokenizer.encode(symbol)) == symbol


def test_a_name_that_the_vocabulary_lacks_does_not_even_cut_the_text(gemma3):
    # The piece "▁<" reaches over the place where <2mass> would be cut out; Gemma 3 has no <2mass>.
    assert gemma3.id_of("<2mass>") is None
    assert gemma3.piece(gemma3.encode(" <2mass>", control=True)[0]) == "\u2581<"


# ---- and back


@pytest.mark.parametrize("kind", KINDS)
def test_hard_texts_come_back(kind, gemma3):
    for text, *_ in KINDS[kind]:
        assert gemma3.decode(gemma3.encode(text)) == text.replace("\u2581", " ")  # which is how pieces spell a blank


@settings(max_examples=200, deadline=None)
@given(st.text(st.characters(exclude_categories=["Cs"], exclude_characters="\u2581")))
def test_any_text_comes_back(text):
    tokenizer = ways_in()[1]
    assert tokenizer.decode(tokenizer.encode(text)) == text


@settings(max_examples=200, deadline=None)
@given(st.text(st.characters(exclude_characters="\u2581")))
def test_what_is_no_character_is_replaced(text):
    tokenizer = ways_in()[1]
    replaced = text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")
    assert tokenizer.decode(tokenizer.encode(text)) == replaced


def test_surrogates():
    tokenizer = ways_in()[1]
    texts = ["\ud83d\ude42", "x\ud800y", "\udc00\ud800", "\ufeffa"]
    assert [tokenizer.decode(tokenizer.encode(t)) for t in texts] == ["🙂", "x\ufffdy", "\ufffd\ufffd", "\ufeffa"]


def test_control_tokens_and_ids_outside_have_no_text(gemma3):
    hi = gemma3.encode("Hi")
    assert gemma3.decode([2, 105, *hi, 106, 0, 1, 3, 255999, 6, 262144, 10**9, -1]) == "Hi"
    assert gemma3.decode([]) == "" and gemma3.encode("") == [] == gemma3.encode("", control=True)
    assert gemma3.decode(np.array(hi)) == "Hi"


@pytest.mark.parametrize("letter", ["a", "\0", "\n", " ", "\ud800", "🙂<b>", "<start_of_turn>"])
def test_a_megabyte(letter, gemma3):
    text = letter * (1_000_000 // len(letter))
    began = time.process_time()
    ids = gemma3.encode(text)
    assert time.process_time() - began < 10  # not quadratic in the length
    assert gemma3.decode(ids[:1000]) in text.replace("\ud800", "\ufffd")


# ---- one id at a time


def bytes_ids(tokenizer, values):
    return [tokenizer.id_of(f"<0x{value:02X}>") for value in values]


some_ids = st.lists(st.integers(0, 699) | st.integers(-2, 1000) | st.integers(19, 19 + 255), max_size=40)


@settings(max_examples=500, deadline=None)
@given(some_ids)
def test_streamed_is_decoded(ids):
    tokenizer = ways_in()[1]
    stream = tokenizer.stream()
    assert "".join(map(stream.push, ids)) + stream.flush() == tokenizer.decode(ids)


@settings(max_examples=500, deadline=None)
@given(st.lists(st.integers(0, 255) | st.sampled_from("é🙂の".encode()), max_size=30))
def test_streamed_bytes_are_decoded(values):
    tokenizer = ways_in()[1]
    stream, ids = tokenizer.stream(), bytes_ids(tokenizer, values)
    assert "".join(map(stream.push, ids)) + stream.flush() == bytes(values).decode("utf-8", "replace")


@settings(max_examples=200, deadline=None)
@given(st.text(st.characters(exclude_categories=["Cs"], exclude_characters="\u2581"), max_size=12))
def test_a_character_appears_with_its_last_byte(text):
    tokenizer = ways_in()[1]
    stream = tokenizer.stream()
    for at, value in enumerate(data := text.encode()):
        whole = data[: at + 1].decode("utf-8", "ignore")
        before = data[:at].decode("utf-8", "ignore")
        assert stream.push(*bytes_ids(tokenizer, [value])) == whole.removeprefix(before)
    assert stream.flush() == ""


def test_an_unfinished_character_shows_when_flushed():
    tokenizer = ways_in()[1]
    stream = tokenizer.stream()
    cut = bytes_ids(tokenizer, "🙂".encode()[:3])
    assert [stream.push(i) for i in cut] == ["", "", ""] and stream.flush() == "\ufffd"
    assert stream.flush() == ""
    assert [stream.push(i) for i in cut[:2]] + [stream.push(tokenizer.id_of("e"))] == ["", "", "\ufffde"]
    assert [stream.push(i) for i in (cut[0], tokenizer.bos, cut[1])] == ["", "", ""]  # control tokens end nothing


# ---- files that are none

RANDOM = random.Random(3).randbytes(5000)
BAD = {
    "empty": (lambda: b"", "is empty"),
    "random": (lambda: RANDOM, "is not a SentencePiece model"),
    "web page": (lambda: b"\n<!DOCTYPE html><html></html>", "is a web page"),
    "pointer": (lambda: b"version https://git-lfs.github.com/spec/v1\n", "is a Git-LFS pointer"),
    "json": (lambda: b'{"version": "1.0", "model": {}}', "is JSON"),
    "cut short": (lambda: trained()[:5000], "is not a SentencePiece model"),
    "cut between pieces": (lambda: FIRST_ENTRY, "unk is not defined"),
    "no pieces": (lambda: b"\x12\x00", "unk is not defined"),
    "another model's": (lambda: trained(pad_id=-1, bos_id=1, eos_id=2, unk_id=0), "not a Gemma's"),
}
FIRST_ENTRY = b"\n\x0e\n\x05<pad>\x15\x00\x00\x00\x00\x18\x03"


@pytest.mark.parametrize("case", BAD)
def test_a_bad_model_file(case, tmp_path):
    content, problem = BAD[case]
    path = tmp_path / "tokenizer.model"
    path.write_bytes(content())
    with pytest.raises(ModelFormatError) as error:
        Tokenizer.from_model_file(path)
    said = str(error.value)
    assert said.startswith(f"{path}: ") and problem in said and said.endswith("released with these weights")
    assert "\n" not in said


def test_a_path_that_cannot_be_read(tmp_path):
    for path, cause in ((tmp_path, "directory"), (tmp_path / "none", "No such file")):
        with pytest.raises(ModelFormatError, match=cause):
            Tokenizer.from_model_file(path)


def test_a_file_far_too_large_is_not_read(tmp_path):
    path = tmp_path / "tokenizer.model"
    with path.open("wb") as file:
        file.truncate(5_000_000_000)
    with pytest.raises(ModelFormatError, match="5000 MB"):
        Tokenizer.from_model_file(path)


@settings(max_examples=100, deadline=None)
@given(st.integers(0, 2**31), st.integers(0, 255), st.integers(0, 2000))
def test_a_damaged_model_file_is_refused_or_works(place, value, cut):
    model = bytearray(trained())
    model[place % len(model)] = value
    try:
        tokenizer = Tokenizer(bytes(model[: len(model) - cut // 20]), "tokenizer.model")
    except ModelFormatError:
        return
    ids = tokenizer.encode("The whale, 12 <b>\n🙂")
    assert isinstance(tokenizer.decode([*ids, *range(tokenizer.size)]), str)


@pytest.mark.parametrize(
    "parts, problem",
    [
        (vocabulary(b"a", b""), r"a piece of 0 bytes in its vocabulary \(id 261\)"),
        (vocabulary(b"a" * 16374), "a piece of 16374 bytes"),
        (vocabulary(b"a", b"a"), "a is already defined"),
        (vocabulary(b"\n", b"\n"), "is already defined"),
        (vocabulary(b"\xff", b"\xff"), "can't decode byte 0xff"),
        (vocabulary(b"a\0b"), "null character"),
        (vocabulary(byte_pieces=BYTES[:50]), "not 256 byte pieces"),
        (vocabulary(b"a", kinds=[BYTE]), "byte"),
        (vocabulary(first=[b"<s>", b"</s>", b"<x>", b"<unk>"]), "not a Gemma's"),
        ((Strings.of([]), np.zeros(0, np.float32), np.zeros(0, np.int32)), "vocabulary"),
        ((Strings.of(FIRST[:3]), np.zeros(3, np.float32), np.zeros(3, np.int32)), "vocabulary"),
    ],
)
def test_a_bad_vocabulary(parts, problem):
    with pytest.raises(ModelFormatError, match=problem) as error:
        Tokenizer.from_vocabulary(*parts, path="gemma.gguf")
    said = str(error.value)
    assert said.startswith("gemma.gguf: ") and said.endswith("fetch it again") and "\n" not in said


def test_lists_of_unequal_length():
    pieces, scores, types = vocabulary(b"a")
    with pytest.raises(ValueError, match="261 pieces, but 260 scores and 261 types"):
        Tokenizer.from_vocabulary(pieces, scores[1:], types)


def test_odd_vocabularies_work():
    long = b"a" * 4000
    tokenizer = Tokenizer.from_vocabulary(*vocabulary(b"\xff\xfe", long))
    assert tokenizer.piece(260) == tokenizer.decode([260]) == "\ufffd"
    assert tokenizer.piece(261) == long.decode()
    blank_only = Tokenizer.from_vocabulary(*vocabulary("\u2581".encode()))
    assert blank_only.decode(blank_only.encode("né 🙂")) == "né 🙂"


def test_a_piece_of_millions_of_blanks_is_refused_soon():
    parts = vocabulary(b" " * 4_000_000, kinds=[USER_DEFINED])
    with at_most(2, 100e6), pytest.raises(ModelFormatError, match="a piece of 12000000 bytes"):
        Tokenizer.from_vocabulary(*parts)


def test_from_vocabulary_leaves_what_it_is_given_alone():
    parts = vocabulary(b"  ", b"<start_of_turn>", kinds=[USER_DEFINED, USER_DEFINED])
    pieces, types = [*parts[0]], parts[2].copy()
    for array in (parts[0].joined, parts[0].lengths, *parts[1:]):
        array.setflags(write=False)
    Tokenizer.from_vocabulary(*parts)
    assert [*parts[0]] == pieces and (parts[2] == types).all()


def test_a_quarter_of_a_million_pieces_load_in_half_a_second(demo_file):
    parts = open_gguf(demo_file).vocabulary
    times = []
    for _ in range(3):
        began = time.process_time()
        Tokenizer.from_vocabulary(*parts)
        times.append(time.process_time() - began)
    assert min(times) < 0.5, f"{min(times):.2f} s"


def test_control_pieces_of_any_vocabulary_are_reached_by_name():
    """CodeGemma's fill-in-the-middle marks, which a GGUF file types as control tokens."""
    pieces = vocabulary(b"<|fim_prefix|>", b"a", b"b", kinds=[CONTROL, NORMAL, NORMAL])
    tokenizer = Tokenizer.from_vocabulary(*pieces)
    mark = tokenizer.id_of("<|fim_prefix|>")
    assert tokenizer.encode("a<|fim_prefix|>b", control=True) == [mark + 1, mark, mark + 2]
    assert mark not in tokenizer.encode("a<|fim_prefix|>b")
    assert text_ids(tokenizer, "<|fim_prefix|>b", control=True) == [2, mark, mark + 2]


def test_codegemma_s_marks_have_their_names_from_tokenizer_config(demo_file, tmp_path):
    """Its tokenizer.model is Gemma's, where they are unused ids: a gap is filled from what stands on both sides."""
    tokenizer = Tokenizer.from_vocabulary(*open_gguf(demo_file).vocabulary)
    names = {67: "<|fim_prefix|>", 68: "<|fim_middle|>", 69: "<|fim_suffix|>", 70: "<|file_separator|>"}
    assert all(tokenizer.piece(token).startswith("<unused") for token in names)
    stated = {str(token): {"content": name, "special": True} for token, name in names.items()}
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({"added_tokens_decoder": stated}))
    tokenizer.add(folder_statements(tmp_path, {}).added, tokenizer.size)
    gap = "<|fim_prefix|>def f(<|fim_suffix|>): return x<|fim_middle|>"
    before, after = tokenizer.encode("def f("), tokenizer.encode("): return x")
    assert text_ids(tokenizer, gap, control=True) == [2, 67, *before, 69, *after, 68]
    assert not set(names) & set(text_ids(tokenizer, gap))
    assert tokenizer.decode([70]) == "<|file_separator|>"  # which `--stop` ends at
