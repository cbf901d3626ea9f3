"""Texts as ids and windows: what is kept apart, what is held out, in which order it comes, and what is refused."""

import gzip
import itertools
import json
import lzma

import numpy as np
import pytest
from support.runs import NURSERY, tokenizer

from minigemma.train.data import Corpus, DataError, Order, digest_of, micro_batches, read_corpus

TOKENS = tokenizer()


def write(folder, name, content):
    path = folder / name
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    return path


def texts(corpus):
    """The text of each document, which ends with <eos>."""
    firsts = corpus.documents[:, 0]
    parts = [corpus.ids[a:b].tolist() for a, b in itertools.pairwise(firsts)]
    assert all(part[-1] == TOKENS.eos and TOKENS.eos not in part[:-1] for part in parts)
    return [TOKENS.decode(part) for part in parts]


def test_chapters_of_plain_text_are_documents(tmp_path):
    path = write(tmp_path, "a.txt", "\ufeffOne\n\nof it\r\n\n\n\nTwo\n \n\t\n\nThree\fFour\n")
    corpus = read_corpus([path], TOKENS, 0)
    assert texts(corpus) == ["One\n\nof it", "Two", "Three", "Four"]
    assert corpus.trained == 4 and corpus.ids.dtype == np.uint16


def test_lines_of_jsonl_and_several_files_are_documents(tmp_path):
    lines = [json.dumps({"text": text, "source": 1}) for text in ("é\nb", "c\u2028d")]
    jsonl = write(tmp_path, "a.jsonl", "\r\n".join(lines))
    assert texts(read_corpus([jsonl, write(tmp_path, "b.txt", "e")], TOKENS, 0)) == ["é\nb", "c\u2028d", "e"]


@pytest.mark.parametrize("name, pack", [("a.txt.gz", gzip.compress), ("a.txt.xz", lzma.compress)])
def test_compressed_texts_are_read(tmp_path, name, pack):
    assert texts(read_corpus([write(tmp_path, name, pack(b"Humpty"))], TOKENS, 0)) == ["Humpty"]


def test_the_last_documents_are_held_out_whole(tmp_path):
    path = write(tmp_path, "a.txt", "\f".join(f"document {i} of many" for i in range(20)))
    corpus = read_corpus([path], TOKENS, 0.1)
    assert len(texts(corpus)) == 20 and corpus.trained == 18
    held_out = corpus.windows(1000, held_out=True)
    assert [corpus.ids[a:b].tolist() for a, b in held_out] == [
        [*TOKENS.encode(f"document {i} of many"), TOKENS.eos] for i in (18, 19)
    ]
    assert corpus.bytes_per_token() == pytest.approx(2 * 19 / (corpus.documents[-1, 0] - corpus.tokens))


def test_a_long_last_document_is_cut_where_a_paragraph_begins(tmp_path):
    corpus = read_corpus([write(tmp_path, "a.txt", NURSERY * 10)], TOKENS, 0.1)
    first, second = texts(corpus)
    assert corpus.trained == 1 and first.endswith(".\n\n") and second.startswith(("Humpty", "Jack"))
    assert 0.05 < len(second) / (len(first) + len(second)) < 0.2


def test_windows_cover_each_document_once_and_begin_with_bos(tmp_path):
    path = write(tmp_path, "a.txt", "\f".join("abcdefghij"[:n] for n in (10, 3, 7, 1)))
    corpus = read_corpus([path], TOKENS, 0)
    windows = corpus.windows(4)
    assert [(b - a) for a, b in windows] == [4, 4, 3, 4, 4, 4, 2]
    ids, targets, starts = corpus.inputs(windows, TOKENS.bos)
    assert ids.dtype == targets.dtype == starts.dtype == np.int32
    np.testing.assert_array_equal(targets, corpus.ids)
    assert (ids[starts] == TOKENS.bos).all()
    inside = np.setdiff1d(np.arange(len(ids)), starts)
    np.testing.assert_array_equal(ids[inside], targets[inside - 1])


def test_an_epoch_is_a_permutation_that_seed_and_cursor_decide(tmp_path):
    corpus = read_corpus([write(tmp_path, "a.txt", NURSERY)], TOKENS, 0)
    order, windows = Order(corpus.windows(16), 3), corpus.windows(16)
    cursor, taken = 0, []
    while cursor < 2 * len(windows):
        some = order.take(cursor, 50)
        assert 1 <= (some[:, 1] - some[:, 0]).sum() <= 50
        taken += some.tolist()
        cursor += len(some)
    first, second = taken[: len(windows)], taken[len(windows) : 2 * len(windows)]
    assert sorted(first) == sorted(second) == windows.tolist() and first != second
    assert Order(windows, 3).take(5, 50).tolist() == taken[5 : 5 + len(order.take(5, 50))]
    assert Order(windows, 4).take(0, 500).tolist() != order.take(0, 500).tolist()
    assert order.take(0, 3).shape == (1, 2)  # a window longer than a batch is a batch


def test_micro_batches_are_the_windows_in_order():
    windows = np.array([[0, 4], [4, 8], [8, 11], [11, 20], [20, 21]])
    parts = list(micro_batches(windows, 8))
    assert [part.tolist() for part in parts] == [[[0, 4], [4, 8]], [[8, 11]], [[11, 20]], [[20, 21]]]
    assert len(list(micro_batches(windows, 100))) == 1


def test_a_corpus_is_kept_and_mapped(tmp_path):
    corpus = read_corpus([path := write(tmp_path, "a.txt", NURSERY)], TOKENS, 0.1)
    corpus.save(tmp_path)
    again = Corpus.load(tmp_path, corpus.trained, corpus.digest)
    assert isinstance(again.ids, np.memmap) and again.digest == digest_of([path])
    np.testing.assert_array_equal(again.windows(9, held_out=True), corpus.windows(9, held_out=True))
    (tmp_path / "ids.npy").write_bytes((tmp_path / "ids.npy").read_bytes()[:-4])
    with pytest.raises(DataError, match="is damaged or missing"):
        Corpus.load(tmp_path, corpus.trained, corpus.digest)


def test_a_document_longer_than_a_piece_has_the_same_ids(tmp_path, monkeypatch):
    monkeypatch.setattr("minigemma.train.data.PIECE", 50)
    corpus = read_corpus([write(tmp_path, "a.txt", NURSERY * 3)], TOKENS, 0)
    assert corpus.ids.tolist() == [*TOKENS.encode((NURSERY * 3).strip("\n")), TOKENS.eos]


@pytest.mark.parametrize(
    "name, content, said",
    [
        ("a.txt", "", "a.txt: has no text"),
        ("a.txt", " \n\n\f \n", "a.txt: has no text"),
        ("a.txt", b"abc\xff\xfe", r"a.txt: is not UTF-8 \(near byte 3\)"),
        ("a.txt.gz", b"no gzip", "a.txt.gz: cannot be decompressed"),
        ("a.txt.xz", b"no xz", "a.txt.xz: cannot be decompressed"),
        ("a.jsonl", "", "a.jsonl: has no text"),
        ("a.jsonl", '{"text": "a"}\n\n{"text": "b"}', "a.jsonl: line 2 is empty; every line is an object"),
        ("a.jsonl", '{"text": "a"}\n{"text": "b"', "a.jsonl: line 2 is not JSON"),
        ("a.jsonl", '{"text": "a"}\n{"prompt": "b"}', 'line 2 has no text in \'text\', but {"prompt": "b"}; every'),
        ("a.jsonl", '{"text": "a"}\n{"text": 3}', "line 2 has no text in 'text', but {\"text\": 3}; every"),
        ("a.jsonl", '["a"]', r"line 1 has no text in 'text', but \[\"a\"\]; every"),
        ("a.jsonl", '{"text": " "}', "line 1 has an empty text"),
        ("a.jsonl", b'{"text": "a"}\n{"text": "\xff"}', r"is not UTF-8 \(line 2, near byte 10\)"),
        ("a.jsonl", "[" * 100_000, "line 1 is not JSON"),
    ],
)
def test_what_is_no_text_is_refused_with_its_place(tmp_path, name, content, said):
    with pytest.raises(DataError, match=said) as error:
        read_corpus([write(tmp_path, name, content)], TOKENS, 0.1)
    assert "\n" not in str(error.value)


def test_a_missing_file_and_a_folder_are_refused(tmp_path):
    with pytest.raises(DataError, match="does not exist"):
        read_corpus([tmp_path / "a.txt"], TOKENS, 0.1)
    with pytest.raises(DataError, match="is a folder or a device"):
        read_corpus([tmp_path], TOKENS, 0.1)
