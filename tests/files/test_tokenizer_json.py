"""A tokenizer.json gives the ids of the tokenizer.model that it was made from; another kind is refused by name.

The files are made as transformers makes them: of a piece, every split into two pieces is a merge.
"""

import gc
import json
import tempfile
import time
from functools import cache
from pathlib import Path

import pytest
from hypothesis import assume, given, settings
from support.folders import random_weights, write_folder
from support.oracles import live_only
from support.small_models import TINY_GEMMA3
from support.tokenizers import (
    BYTE,
    CASES,
    CONTROL,
    DIFFERENCES,
    KINDS,
    NORMAL,
    USER_DEFINED,
    gemma2,
    some_text,
    trained,
    ways_in,
)

import minigemma as mg
from minigemma.errors import ModelFormatError
from minigemma.files.gguf_file import open_gguf
from minigemma.files.statements import folder_statements
from minigemma.files.tokenizer import SPACE
from minigemma.files.tokenizer_json import BLANK, SPACES, read_tokenizer_json

NOT = dict.fromkeys(("single_word", "lstrip", "rstrip"), False)


def described(pieces, kinds, lists=True):
    """The fields of a tokenizer.json; `lists`: merges as tokenizers ≥ 0.20 writes them, else as texts with a blank."""
    vocab = {piece: i for i, piece in enumerate(pieces)}
    splits = (
        (p[:i], p[i:]) for p in sorted(pieces, key=lambda p: (kinds[vocab[p]] == NORMAL, vocab[p]))
        if kinds[vocab[p]] in (NORMAL, USER_DEFINED) for i in range(1, len(p)) if p[:i] in vocab and p[i:] in vocab
    )  # fmt: skip
    added = [
        {"id": i, "content": piece, "special": kind != USER_DEFINED, "normalized": False} | NOT
        for i, (piece, kind) in enumerate(zip(pieces, kinds, strict=True)) if kind not in (NORMAL, BYTE)
    ]  # fmt: skip
    model = {"type": "BPE", "dropout": None, "unk_token": "<unk>", "fuse_unk": True, "byte_fallback": True}
    return {
        "version": "1.0",
        "added_tokens": added,
        "normalizer": {"type": "Replace", "pattern": BLANK, "content": SPACE},
        "decoder": {"type": "Sequence", "decoders": [SPACES, {"type": "ByteFallback"}, {"type": "Fuse"}]},
        "model": model | {"vocab": vocab, "merges": [list(s) if lists else " ".join(s) for s in splits]},
    }


def written(folder, fields):
    path = folder / "tokenizer.json"
    path.write_text(json.dumps(fields, ensure_ascii=False), "utf-8")
    return path


def parts(tokenizer):
    """A tokenizer's pieces and their kinds."""
    ids, model = [*range(tokenizer.size)], tokenizer._model
    kinds = zip(model.is_byte(ids), model.is_control(ids), strict=True)
    return [tokenizer.piece(i) for i in ids], [BYTE if b else CONTROL if c else NORMAL for b, c in kinds]


@pytest.fixture(scope="module")
def gemma3_json(demo_file, tmp_path_factory):
    pieces, _, kinds = open_gguf(demo_file).vocabulary
    spelled = [piece.decode().replace(" ", SPACE) for piece in pieces]
    return written(tmp_path_factory.mktemp("gemma3"), described(spelled, kinds.tolist()))


@cache
def small():
    """The fields for the small model that sentencepiece trained."""
    pieces, kinds = parts(ways_in()[1])
    found = {piece for piece in pieces if ways_in()[1].encode(piece.replace(SPACE, " ")) == [pieces.index(piece)]}
    several = {piece for piece in found if not piece.strip("\n\t" + SPACE) or piece in ("<table>", "</b>")}
    several.discard(SPACE)
    return described(pieces, [USER_DEFINED if p in several else k for p, k in zip(pieces, kinds, strict=True)])


# ---- the same ids


def test_gemma_3_gives_the_ids_of_its_tokenizer_json_and_is_soon_read(gemma3_json):
    began = time.process_time()
    tokenizer = read_tokenizer_json(gemma3_json)
    assert time.process_time() - began < 2.5, "1.0 to 1.3 s of processor time on two busy cores"
    wrong = {text for rows in KINDS.values() for text, ids, _ in rows if ids != tokenizer.encode(text, control=True)}
    assert wrong == DIFFERENCES.keys() and gc.isenabled()


@pytest.mark.parametrize("lists", [True, False])
def test_gemma_2_gives_the_ids_of_its_tokenizer_json(lists, tmp_path):
    """Its <0x09> is a tab there."""
    tokenizer, real = gemma2()
    pieces, kinds = parts(tokenizer)
    added = {i for i, _ in CASES["gemma2"]["added"]}
    kinds = [USER_DEFINED if i in added and k == NORMAL else k for i, k in zip(real, kinds, strict=True)]
    pieces[pieces.index("<0x09>")] = "\t"
    read = read_tokenizer_json(written(tmp_path, described(pieces, kinds, lists)))
    assert read.piece(226) == "<0x09>" and read.decode([226]) == "\t"
    for rows in KINDS.values():
        for text, _, ids in rows:
            assert [real[i] for i in read.encode(text, control=True)] == ids, text


@cache
def small_read():
    with tempfile.TemporaryDirectory() as folder:
        return read_tokenizer_json(written(Path(folder), small()))


@settings(max_examples=200, deadline=None)
@given(some_text)
def test_a_small_one_gives_the_ids_of_its_tokenizer_model(text):
    text = text.encode("utf-8", "replace").decode()
    read = small_read()
    assert read.encode(text) == ways_in()[1].encode(text)
    assert read.encode(text, control=True) == ways_in()[1].encode(text, control=True)


@live_only
@settings(max_examples=200, deadline=None)
@given(text=some_text)
def test_the_library_itself_agrees(answers, text):
    """Runs of blanks apart: the library merges them, which comes to the same where every length is a piece."""
    import tokenizers

    text = text.replace(SPACE, " ")
    assume(not any(name in text for name in ("<pad>", "<eos>", "<bos>", "<unk>", "  ")))
    library = tokenizers.Tokenizer.from_str(json.dumps(small()))
    text = text.encode("utf-8", "replace").decode()
    expected = library.encode(text, add_special_tokens=False).ids
    assert small_read().encode(text, control=True) == expected


# ---- what is refused


def changed(*names, to):
    """A change of the field that is reached by these names."""

    def change(fields):
        for name in names[:-1]:
            fields = fields[name]
        fields[names[-1]] = to

    return change


def more_pieces(*pieces):
    def change(fields):
        fields["model"]["vocab"] |= {piece: len(fields["model"]["vocab"]) + i for i, piece in enumerate(pieces)}

    return change


def added(**fields):
    return changed("added_tokens", 0, to={"id": 0, "content": "<pad>", "special": True} | fields)


REFUSED = {
    "WordPiece": (changed("model", "type", to="WordPiece"), 'its type is \'"WordPiece"\''),
    "Unigram": (changed("model", "type", to="Unigram"), "its type is"),
    "no fallback": (changed("model", "byte_fallback", to=False), "its byte_fallback is 'false'"),
    "dropout": (changed("model", "dropout", to=0.1), "its dropout is '0.1'"),
    "ignore_merges": (changed("model", "ignore_merges", to=True), "its ignore_merges is 'true'"),
    "prefix": (changed("model", "continuing_subword_prefix", to="##"), "its continuing_subword_prefix"),
    "normalizer": (changed("normalizer", to={"type": "NFC"}), "its normalizer is"),
    "no normalizer": (changed("normalizer", to=None), "its normalizer is 'null'"),
    "pre_tokenizer": (changed("pre_tokenizer", to={"type": "ByteLevel"}), "its pre_tokenizer is"),
    "decoder": (changed("decoder", to={"type": "ByteLevel"}), "its decoder is"),
    "no added list": (changed("added_tokens", to=3), "has the added token 3"),
    "no model": (changed("model", to=None), "has no model"),
    "no vocab": (changed("model", "vocab", to=[]), "lacks its vocab or merges"),
    "no merges": (changed("model", "merges", to={}), "lacks its vocab or merges"),
    "an id twice": (changed("model", "vocab", "<mask>", to=5), "does not number its 700 pieces from 0 to 699"),
    "a negative id": (changed("model", "vocab", "<mask>", to=-5), "does not number"),
    "an id far off": (changed("model", "vocab", "<mask>", to=10**30), "does not number"),
    "an id that is none": (changed("model", "vocab", "<mask>", to="4"), "does not number"),
    "a merge of three": (changed("model", "merges", 3, to=["a", "b", "c"]), "has a merge that is not two texts"),
    "a merge of numbers": (changed("model", "merges", 3, to=[1, 2]), "has a merge that"),
    "a merge to nothing": (changed("model", "merges", 3, to=["e", "<table>"]), "has a merge that"),
    "a merge less": (lambda fields: fields["model"]["merges"].pop(), "its merges are not those of a SentencePiece"),
    "a merge later": (
        lambda fields: fields["model"]["merges"].append(fields["model"]["merges"][-9]),
        "its merges are not those of a SentencePiece",
    ),
    "a piece that needs a merge": (more_pieces("ethat"), "its merges are not those"),
    "a long piece": (more_pieces("a" * 20_000), "pieces far longer"),
    "no piece": (more_pieces(""), "a piece of 0 bytes"),
    "lstrip": (added(lstrip=True), "its added token '<pad>' is lstrip"),
    "an added id twice": (added(id=1), "has two added tokens of id 1"),
    "an added token without id": (added(id=None), "has the added token"),
    "another model's": (lambda fields: fields["model"]["vocab"].update({"<pad>": 3, "<unk>": 0}), "not a Gemma's"),
}  # fmt: skip


@pytest.mark.parametrize("case", REFUSED)
def test_what_is_no_gemma_tokenizer_is_refused_in_a_sentence(case, tmp_path):
    change, problem = REFUSED[case]
    fields = json.loads(json.dumps(small()))
    change(fields)
    with pytest.raises(ModelFormatError) as error:
        read_tokenizer_json(written(tmp_path, fields))
    said = str(error.value)
    assert said.startswith(f"{tmp_path / 'tokenizer.json'}: ") and problem in said and "\n" not in said
    assert said.endswith(("released with these weights", "fetch it again"))
    assert gc.isenabled()


@pytest.mark.parametrize(
    "content, problem",
    [
        (b"", "is empty"),
        (b"{", "is not JSON"),
        (b"[" * 1_000_000, "is not JSON"),
        (b'{"model": {"vocab": {"a": 0, "a": 1}}}', "names something twice"),
        (b"[" + b"0," * 4_000_000 + b"0]", "or has over 4,000,000 values"),
        (b'{"a": "\xff"}', "is not UTF-8"),
        (b"version https://git-lfs.github.com/spec/v1\n", "is a Git-LFS pointer"),
    ],
)
def test_a_file_that_is_none(content, problem, tmp_path):
    path = tmp_path / "tokenizer.json"
    path.write_bytes(content)
    with pytest.raises(ModelFormatError, match=problem):
        read_tokenizer_json(path)


def test_a_file_far_too_large_is_not_read(tmp_path):
    with (tmp_path / "tokenizer.json").open("wb") as file:
        file.truncate(5_000_000_000)
    with pytest.raises(ModelFormatError, match="is larger than 100 MB"):
        read_tokenizer_json(tmp_path / "tokenizer.json")


# ---- in a folder


@pytest.fixture
def folder(tmp_path):
    return write_folder(tmp_path / "model", TINY_GEMMA3, random_weights(TINY_GEMMA3))


def with_added(*tokens):
    more = [{"id": number, "content": text, "special": False} for number, text in tokens]
    return small() | {"added_tokens": [*small()["added_tokens"], *more]}


def test_a_folder_without_tokenizer_model_loads(folder):
    written(folder, with_added((700, "<tool>"), (719, "</tool>"), (720, "<no row>")))
    tokenizer = mg.load(folder).tokenizer
    assert tokenizer.encode("a<tool>b</tool>") == [*tokenizer.encode("a"), 700, *tokenizer.encode("b"), 719]
    assert tokenizer.id_of("<no row>") is None and tokenizer.decode([700]) == "<tool>"


def test_of_two_added_tokens_of_one_name_the_first_is_found(folder):
    """As the tokenizers library finds them."""
    written(folder, with_added((700, "<tool>"), (701, "<tool>")))
    tokenizer = mg.load(folder).tokenizer
    assert tokenizer.encode("<tool>") == [700] and tokenizer.decode([701]) == "<tool>"


def test_tokenizer_model_wins_and_the_added_tokens_of_tokenizer_json_count(folder):
    """Only they are read: the rest, 33 MB in Gemma 3, may be anything."""
    (folder / "tokenizer.model").write_bytes(trained())
    whole = json.dumps(with_added((700, "<tool>")))
    (folder / "tokenizer.json").write_text(whole[: whole.index('"model"')] + '"model": ' + "[" * 9_000_000)
    (folder / "tokenizer_config.json").write_text('{"added_tokens_decoder": {"701": {"content": "<other>"}}}')
    tokenizer = mg.load(folder).tokenizer
    assert 700 in tokenizer.encode("a<tool>b") and tokenizer.id_of("<other>") == 701
    assert tokenizer.encode("The whale") == ways_in()[1].encode("The whale")


@pytest.mark.parametrize("entries", ['[{"id": 7', "[" * 100_000, '["<tool>", 3, {"id": "\u00b2"}]'])
def test_a_list_of_added_tokens_that_is_broken(entries, tmp_path):
    (tmp_path / "tokenizer.json").write_text('{"added_tokens": ' + entries, "utf-8")
    if entries.endswith("]"):
        assert folder_statements(tmp_path, {}).added == ()
    else:
        with pytest.raises(ModelFormatError, match="list of added tokens that is not JSON"):
            folder_statements(tmp_path, {})


def test_more_pieces_than_the_embedding_has_rows(folder):
    fields = json.loads(json.dumps(small()))
    more_pieces(*(f"<x{i}>" for i in range(21)))(fields)
    written(folder, fields)
    with pytest.raises(ModelFormatError, match="its tokenizer has 721 pieces, its embedding 720 rows"):
        mg.load(folder)
