"""Small vocabularies: pieces of a Gemma's own, closed under their merges, or SentencePiece pieces of the text itself.

`cut_vocabulary` keeps the pieces that a text uses most, each with every piece that byte-pair encoding makes on the way
to it. A text whose pieces are all kept is then encoded into the same pieces as before: each of its merges is still
there, and among fewer candidates still the best one. Other words fall apart into kept pieces, at worst into bytes. Each
id stands for a piece of the large vocabulary, so a student's ids are also its teacher's.

`train_vocabulary` trains byte-pair encoding on the text alone, with the settings of Gemma's: byte fallback, single
digits, no normalization. It makes fewer tokens of that text, and no other model knows its pieces.
"""

from __future__ import annotations

import io
import os
from collections.abc import Iterable, Sequence
from itertools import pairwise
from typing import Any

import numpy as np
import sentencepiece

from ..arrays import Strings
from ..files.tokenizer import BYTE, NORMAL, SPACE, USER_DEFINED, Tokenizer
from .data import encoded

SPECIAL = ["<pad>", "<eos>", "<bos>", "<unk>"]  # ids 0 to 3
TURNS = ["<start_of_turn>", "<end_of_turn>"]
NEWLINES = ["\n", "\n\n", "\n\n\n"]
SMALLEST = 512  # 256 bytes, the special pieces, and the letters of a script
LONGEST_LINE = 1 << 20  # bytes; the trainer leaves out longer ones
COVERED = 0.99999  # share of the characters that are pieces; the others become bytes


def train_vocabulary(texts: Iterable[str], size: int) -> Tokenizer:
    """A tokenizer of `size` pieces, trained on the lines of texts; the same for the same texts and size.

    Raises ValueError for a size below 512, and for one that these texts cannot fill or that cannot hold their letters.
    """
    _check(size)
    lines = (line for text in texts for line in text.splitlines() if line.strip())
    special = {f"{name[1:-1]}_{kind}": value for i, name in enumerate(SPECIAL) for kind, value in _both(i, name)}
    gemmas = {"model_type": "bpe", "byte_fallback": True, "split_digits": True, "normalization_rule_name": "identity"}
    blanks = {"add_dummy_prefix": False, "remove_extra_whitespaces": False}
    found = {"control_symbols": TURNS, "user_defined_symbols": NEWLINES, "character_coverage": COVERED}
    limits = {"max_sentence_length": LONGEST_LINE, "num_threads": os.cpu_count() or 1, "minloglevel": 2}
    options: dict[str, Any] = special | gemmas | blanks | found | limits
    model = io.BytesIO()
    try:
        sentencepiece.SentencePieceTrainer.train(
            sentence_iterator=lines,
            model_writer=model,
            vocab_size=size,
            **options,
        )
    except RuntimeError as error:
        reason = " ".join(str(error).split()).rpartition("] ")[2]
        raise ValueError(f"no vocabulary of {size} pieces can be made of this text: {reason}") from None
    return _rebuilt(*Tokenizer(model.getvalue(), "vocabulary").vocabulary)


def _both(i: int, name: str) -> list[tuple[str, int | str]]:
    return [("id", i), ("piece", name)]


def cut_vocabulary(full: Tokenizer, texts: Iterable[str], size: int) -> Tokenizer:
    """A tokenizer of at most `size` pieces of `full`, those that the texts use most, in their old order.

    Raises ValueError for a size below 512.
    """
    _check(size)
    pieces, scores, kinds = full.vocabulary
    ids = {piece: i for i, piece in enumerate(pieces) if kinds[i] in (NORMAL, USER_DEFINED)}
    kept = {i for i, piece in enumerate(pieces) if piece in SPECIAL + TURNS or kinds[i] == BYTE}
    kept |= {i for piece, i in ids.items() if kinds[i] == USER_DEFINED and not piece.strip(SPACE)}  # runs of blanks
    counts = np.zeros(len(pieces), np.int64)
    for text in texts:
        counts += np.bincount([*encoded(full, text)], minlength=len(pieces))[: len(pieces)]
    for i in np.argsort(-counts, kind="stable")[: np.count_nonzero(counts)].tolist():
        needed = {i} if kinds[i] != NORMAL else _derivation(pieces[i], ids, scores)
        if len(kept | needed) <= size:
            kept |= needed
    order = sorted(kept)
    return _rebuilt([pieces[i] for i in order], [scores[i] for i in order], [kinds[i] for i in order])


def _derivation(piece: str, ids: dict[str, int], scores: Sequence[float]) -> set[int]:
    """The ids of a piece and of all pieces that appear while byte-pair encoding merges its letters."""
    parts = list(piece)
    found = {ids[part] for part in parts if part in ids}
    while len(parts) > 1:
        joined = [ids.get(a + b) for a, b in pairwise(parts)]
        best = -max((scores[merged], -i) for i, merged in enumerate(joined) if merged is not None)[1]
        parts[best : best + 2] = [parts[best] + parts[best + 1]]
        found.add(ids[parts[best]])
    return found


def _rebuilt(pieces: Sequence[str], scores: Sequence[float], kinds: Sequence[int]) -> Tokenizer:
    """A tokenizer of exactly these pieces, without a trainer's other entries."""
    strings = Strings.of([piece.encode() for piece in pieces])
    return Tokenizer.from_vocabulary(strings, np.array(scores, np.float32), np.array(kinds, np.int32))


def _check(size: int) -> None:
    if size < SMALLEST:
        raise ValueError(f"a vocabulary of {size} pieces is too small; 256 bytes and the letters take {SMALLEST}")
