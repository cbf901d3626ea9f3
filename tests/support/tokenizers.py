"""Tokenizers for tests: the recorded cases, and small ones that are trained here."""

import gzip
import io
import json
import tempfile
from functools import cache
from pathlib import Path

import numpy as np
import sentencepiece
from hypothesis import strategies as st

from minigemma.arrays import Strings
from minigemma.files.gguf_file import open_gguf
from minigemma.files.tokenizer import Tokenizer

CASES = json.loads(gzip.decompress((Path(__file__).parents[1] / "data" / "tokenizer_cases.json.gz").read_bytes()))
KINDS = CASES["texts"]  # kind of text → [text, Gemma 3's ids, Gemma 2's ids], …
NAMES = [text for text, *_ in KINDS["control"][:21]]  # of the control tokens of any Gemma
SOFT = "<image_soft_token>"
NORMAL, UNKNOWN, CONTROL, USER_DEFINED, BYTE = 1, 2, 3, 4, 6
BYTES = [b"<0x%02X>" % i for i in range(256)]
FIRST = [b"<pad>", b"<eos>", b"<bos>", b"<unk>"]


@cache
def gemma3(path):
    return Tokenizer.from_vocabulary(*open_gguf(path).vocabulary, path=path)


@cache
def gemma2():
    """The part of Gemma 2's vocabulary, and the ids that its pieces have in the whole. Up to 472 they are the same.

    The types are those of the released tokenizer.model. The ids of ordinary pieces are in the order of their merges.
    """
    added, ordinary = CASES["gemma2"]["added"], CASES["gemma2"]["ordinary"]
    kinds = dict.fromkeys([i for i, _ in added], USER_DEFINED) | dict.fromkeys(range(217, 473), BYTE)
    kinds |= {0: CONTROL, 1: CONTROL, 2: CONTROL, 3: UNKNOWN}
    rows = {i: piece.encode() for i, piece in added + ordinary} | dict(enumerate(BYTES, 217))
    ids = sorted(rows)
    types = np.array([kinds.get(i, NORMAL) for i in ids], np.int32)
    return Tokenizer.from_vocabulary(Strings.of([rows[i] for i in ids]), -np.array(ids, np.float32), types), ids


# Where Gemma 3's ids are not those of its tokenizer.json, and why. No other of the 3,432 texts differs.
BEYOND = "262144, an image's place in a text, is no piece of the SentencePiece vocabulary, which ends with 262143"
DIFFERENCES = {
    SOFT: BEYOND,
    f"a{SOFT}b": BEYOND,
    f" {SOFT} ": BEYOND,
    f"{SOFT}{SOFT}": BEYOND,
    f"\n{SOFT}\n\n{SOFT}": BEYOND,
}
SYMBOLS = ["<mask>", "[@BOS@]", "<unused0>", "<unused98>", "<start_of_turn>", "<end_of_turn>", "<start_of_image>"]
FOUND = ["\n", "\n\n", "\n\n\n", "\u2581\u2581", "\u2581\u2581\u2581", "\t\t", "<table>", "</b>"]


@cache
def trained(**options):
    """A model as sentencepiece itself writes it, with Gemma's settings; control symbols typed as the released are."""
    out = io.BytesIO()
    text = (Path(__file__).parents[1] / "data" / "prose.txt").read_text("utf-8").splitlines()
    ids = {"pad_id": 0, "eos_id": 1, "bos_id": 2, "unk_id": 3}
    pieces = {"pad_piece": "<pad>", "eos_piece": "<eos>", "bos_piece": "<bos>", "unk_piece": "<unk>"}
    switches = {"byte_fallback": True, "split_digits": True, "allow_whitespace_only_pieces": True}
    normaliser = {"add_dummy_prefix": False, "remove_extra_whitespaces": False, "normalization_rule_name": "identity"}
    whole = {"model_type": "bpe", "vocab_size": 700, "user_defined_symbols": [*SYMBOLS, *FOUND], "minloglevel": 2}
    whole |= ids | pieces | switches | normaliser | options
    sentencepiece.SentencePieceTrainer.train(sentence_iterator=iter(text), model_writer=out, **whole)
    return out.getvalue()


def taken_apart(model):
    """Pieces, scores and types of a model, as a GGUF file has them."""
    reference = sentencepiece.SentencePieceProcessor(model_proto=model)
    pieces = [reference.id_to_piece(i) for i in range(reference.get_piece_size())]
    types = [
        UNKNOWN if reference.is_unknown(i) else CONTROL if reference.is_control(i) else BYTE if reference.is_byte(i)
        else USER_DEFINED if piece in SYMBOLS + FOUND else NORMAL
        for i, piece in enumerate(pieces)
    ]  # fmt: skip
    spelled = [p.replace("\u2581", " ") if t == USER_DEFINED else p for p, t in zip(pieces, types, strict=True)]
    scores = [reference.get_score(i) for i in range(len(pieces))]
    return Strings.of([p.encode() for p in spelled]), np.array(scores, np.float32), np.array(types, np.int32)


@cache
def ways_in():
    """sentencepiece's own processor, and our tokenizer by either way in."""
    reference = sentencepiece.SentencePieceProcessor(model_proto=trained())
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "tokenizer.model"
        path.write_bytes(trained())
        return reference, Tokenizer.from_model_file(path), Tokenizer.from_vocabulary(*taken_apart(trained()))


MORE = ["the ", " and", "  ", " ", "\n", "12", "<", ">", "é", "🙂"]
some_text = st.lists(st.sampled_from([*SYMBOLS, *FOUND, *MORE]) | st.text(max_size=5)).map("".join)


def vocabulary(*more, kinds=None, first=FIRST, byte_pieces=BYTES):
    pieces = [*first, *byte_pieces, *more]
    types = [CONTROL] * 3 + [UNKNOWN] + [BYTE] * len(byte_pieces) + list(kinds or [NORMAL] * len(more))
    return Strings.of(pieces), np.zeros(len(pieces), np.float32), np.array(types, np.int32)
