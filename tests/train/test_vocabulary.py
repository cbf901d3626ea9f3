"""Small vocabularies encode any text and give it back; a cut one makes the pieces of the large one wherever it can."""

from pathlib import Path

import pytest
from support.tokenizers import FOUND, ways_in
from support.transformers_answers import libraries

from minigemma.files.tokenizer import CONTROL, SPACE, USER_DEFINED
from minigemma.train.sizes import TINY, config_named
from minigemma.train.vocabulary import cut_vocabulary, train_vocabulary

PROSE = (Path(__file__).parents[1] / "data" / "prose.txt").read_text("utf-8")
WEIGHTS = Path(__file__).parents[2] / "weights"
HARD = ["", " ", "\n", "\n\n\n\n", "a  b", "   x\n\n\ny", "né 🙂 \t tab", "1234,5", "ﷺ ½", " " * 40 + "end", "日本語"]


def test_a_trained_vocabulary_is_a_gemmas_and_the_same_again():
    tokenizer, again = (train_vocabulary(PROSE.split("\n\n"), 600) for _ in range(2))
    assert tokenizer.size == 600 and tokenizer.model_bytes == again.model_bytes
    assert tokenizer.vocabulary[0][:7] == ["<pad>", "<eos>", "<bos>", "<unk>", "<start_of_turn>", "<end_of_turn>", "\n"]
    assert tokenizer.encode("<end_of_turn>", control=True) == [5] and 5 not in tokenizer.encode("<end_of_turn>")
    for text in [*HARD, *PROSE.splitlines()]:
        assert tokenizer.decode(tokenizer.encode(text)) == text
    assert not any(piece[-2:].isdigit() for piece in tokenizer.vocabulary[0])


def test_a_cut_vocabulary_gives_the_same_pieces_where_all_are_kept():
    full = ways_in()[1]
    small = cut_vocabulary(full, PROSE.split("\n\n"), 560)
    kept, lines = set(small.vocabulary[0]), PROSE.splitlines(keepends=True)
    assert small.size == 560 and kept < set(full.vocabulary[0])
    covered = 0
    for text in [*HARD, *lines, *PROSE.split()]:
        assert small.decode(small.encode(text)) == text
        pieces = [full.piece(i) for i in full.encode(text)]
        if kept.issuperset(pieces):
            assert [small.piece(i) for i in small.encode(text)] == pieces
            covered += 1
    assert covered > 100
    assert cut_vocabulary(full, [PROSE], 10_000).vocabulary[0] != full.vocabulary[0]  # what the text lacks is left out


def test_a_cut_vocabulary_keeps_runs_of_blanks_and_the_kinds_of_pieces():
    full = ways_in()[1]
    pieces, _, kinds = cut_vocabulary(full, ["a\n\nb"], 560).vocabulary
    found = [p for p, kind in zip(pieces, kinds, strict=True) if kind == USER_DEFINED]
    assert found == [p for p in FOUND if p == "\n\n" or not p.strip(SPACE)]
    control = [p for p, kind in zip(pieces, kinds, strict=True) if kind == CONTROL]
    assert control == ["<pad>", "<eos>", "<bos>", "<start_of_turn>", "<end_of_turn>"]


@pytest.mark.parametrize("size, told", [(511, "511 pieces is too small"), (90_000, "90000 pieces can be made of")])
def test_sizes_that_cannot_be_are_refused(size, told):
    with pytest.raises(ValueError, match=told):
        train_vocabulary([PROSE], size)


@pytest.mark.parametrize("name", TINY)
def test_a_tiny_models_vocabulary_comes_with_the_repository(name):
    config, tokenizer = config_named(name)
    assert config.vocab == tokenizer.size == 2048
    assert [tokenizer.piece(i) for i in tokenizer.encode("In the beginning")] == ["In", "▁the", "▁begin", "ning"]


@pytest.mark.oracle
def test_transformers_gives_the_same_ids():
    _, transformers = libraries()
    theirs = transformers.AutoTokenizer.from_pretrained(WEIGHTS / "tiny-vocabulary")
    _, ours = config_named("tiny-gemma-3")
    for text in [*HARD, *PROSE.splitlines()]:
        assert theirs(text)["input_ids"] == [ours.bos, *ours.encode(text)]
