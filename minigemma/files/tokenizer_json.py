"""Reads and writes tokenizer.json, the `tokenizers` library's format, as the SentencePiece model that it was made from.

A Gemma's holds the pieces with their ids, the merges of byte-pair encoding in the order in which they are tried, and
the added tokens. SentencePiece keeps no merges: it joins any two neighbors that make a piece, the highest score first.
Both give the same ids if every split of a piece into two pieces is among the merges and the merges into one piece are
consecutive; the score is then minus the index of the first. A file that fails either check is refused.
"""

from __future__ import annotations

import gc
import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np

from ..arrays import Strings
from ..errors import ModelFormatError
from .safetensors_file import DAMAGED, read_json, short
from .statements import EDGES
from .tokenizer import BYTE, CONTROL, LARGEST, NORMAL, REMEDY, SPACE, USER_DEFINED, Tokenizer

MOST_VALUES = 4_000_000  # of the JSON text; Gemma 3's has 1.9 million
MOST_LETTERS = 1 << 23  # of all pieces together, since each is split everywhere; Gemma 3's have 1.8 million
LONGEST_SPLIT = 256  # characters of a piece; a Gemma's have 48 or fewer
RELEASED = {(256_000, 580_604), (262_144, 514_906)}  # pieces and merges of Gemma 1 and 2, and of 3: complete

BYTE_PIECES = {f"<0x{value:02X}>" for value in range(256)}
BLANK = {"String": " "}
SPACES = {"type": "Replace", "pattern": {"String": SPACE}, "content": " "}
KIND: dict[str, tuple[Any, ...]] = {  # each with the values at which it is a Gemma's
    "normalizer": ({"type": "Replace", "pattern": BLANK, "content": SPACE},),
    "pre_tokenizer": (
        None,
        {"type": "Split", "pattern": BLANK, "behavior": "MergedWithPrevious", "invert": False},  # of blanks: none left
    ),
    "decoder": ({"type": "Sequence", "decoders": [SPACES, {"type": "ByteFallback"}, {"type": "Fuse"}]},),
    "type": ("BPE",),
    "byte_fallback": (True,),
    "dropout": (None, 0),
    "continuing_subword_prefix": (None, ""),
    "end_of_word_suffix": (None, ""),
    "ignore_merges": (None, False),
}


def read_tokenizer_json(path: Path) -> Tokenizer:
    """The tokenizer of a tokenizer.json; ModelFormatError for a broken file and for another kind than a Gemma's."""
    collecting = gc.isenabled()
    gc.disable()  # collection over half a million merges: 1.5 s instead of 0.5
    try:
        return _tokenizer(path, read_json(path, limit=LARGEST, values=MOST_VALUES))
    finally:
        if collecting:
            gc.enable()


def tokenizer_json(tokenizer: Tokenizer) -> dict[str, Any]:
    """The fields of a tokenizer.json that gives the ids of this tokenizer, after a BOS."""
    pieces, scores, kinds = tokenizer.vocabulary
    vocab = {piece: i for i, piece in enumerate(pieces)}
    apart = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False}
    added = [
        {"id": i, "content": piece, "special": kinds[i] != USER_DEFINED} | apart
        for i, piece in enumerate(pieces)
        if kinds[i] not in (NORMAL, BYTE)
    ]
    added += [{"id": t.id, "content": t.text, "special": t.special} | apart for t in tokenizer.added]
    joined = [i for i in range(len(pieces)) if kinds[i] in (NORMAL, USER_DEFINED)]
    joined.sort(key=lambda i: (kinds[i] == NORMAL, -scores[i], i))  # runs of blanks are merged before anything else
    cuts = ((pieces[i], cut) for i in joined for cut in range(1, len(pieces[i])))
    merges = [[p[:cut], p[cut:]] for p, cut in cuts if p[:cut] in vocab and p[cut:] in vocab]
    settings = {"type": "BPE", "dropout": None, "unk_token": "<unk>", "fuse_unk": True, "byte_fallback": True}
    first = {"SpecialToken": {"id": "<bos>", "type_id": 0}}
    rest = [{"Sequence": {"id": name, "type_id": number}} for number, name in enumerate("AB")]
    bos = {"id": "<bos>", "ids": [tokenizer.bos], "tokens": ["<bos>"]}
    template = {"single": [first, rest[0]], "pair": [first, *rest], "special_tokens": {"<bos>": bos}}
    return {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": added,
        "normalizer": KIND["normalizer"][0],
        "pre_tokenizer": KIND["pre_tokenizer"][1],
        "post_processor": {"type": "TemplateProcessing"} | template,
        "decoder": KIND["decoder"][0],
        "model": settings | {"vocab": vocab, "merges": merges},
    }


def _tokenizer(path: Path, stated: dict[str, Any]) -> Tokenizer:
    model = stated.get("model")
    if not isinstance(model, dict):
        raise ModelFormatError(path, "has no model", REMEDY)
    for name, values in KIND.items():
        if (value := (stated | model).get(name)) not in values:
            problem = f"its {name} is {short(json.dumps(value))}, which is not a Gemma tokenizer's"
            raise ModelFormatError(path, problem, REMEDY)
    vocab, merges = model.get("vocab"), model.get("merges")
    if not (isinstance(vocab, dict) and isinstance(merges, list)):
        raise ModelFormatError(path, "lacks its vocab or merges", DAMAGED)
    if {*map(type, vocab.values())} != {int} or sorted(vocab.values()) != [*range(len(vocab))]:
        problem = f"does not number its {len(vocab)} pieces from 0 to {len(vocab) - 1}, each id once"
        raise ModelFormatError(path, problem, DAMAGED)
    kinds = np.full(len(vocab), NORMAL, np.int32)
    pieces = sorted(vocab, key=vocab.__getitem__)
    if "\t" in vocab and "<0x09>" not in vocab:  # in transformers' conversion of Gemma 1 and 2
        pieces[vocab["\t"]] = "<0x09>"
    kinds[[i for i, piece in enumerate(pieces) if piece in BYTE_PIECES]] = BYTE
    for token in _added(path, stated.get("added_tokens") or []):
        if vocab.get(token["content"]) == token["id"]:
            kinds[token["id"]] = CONTROL if token.get("special") else USER_DEFINED
    scores = _scores(path, vocab, merges, kinds)
    strings = Strings.of([piece.encode("utf-8", "surrogatepass") for piece in pieces])
    return Tokenizer.from_vocabulary(strings, scores, kinds, path)


def _added(path: Path, entries: Any) -> Iterable[dict[str, Any]]:
    """The added tokens; those beyond the vocabulary are taken up by Tokenizer.add."""
    named: dict[int, str] = {}
    for token in entries if isinstance(entries, list) else [entries]:
        if not (isinstance(token, dict) and type(token.get("id")) is int and isinstance(token.get("content"), str)):
            raise ModelFormatError(path, f"has the added token {short(token)}, without id or content", DAMAGED)
        if named.setdefault(token["id"], token["content"]) != token["content"]:
            raise ModelFormatError(path, f"has two added tokens of id {token['id']}", DAMAGED)
        for name in EDGES:
            if token.get(name):
                problem = f"its added token {short(token['content'])} is {name}, which minigemma does not apply"
                raise ModelFormatError(path, problem, REMEDY)
        yield token


def _scores(path: Path, vocab: dict[str, int], merges: list[Any], kinds: np.ndarray) -> np.ndarray:
    """Minus the index of the first merge into each piece, float32 [pieces]; pieces without merges come last."""
    try:
        pairs = [pair.split(" ") if isinstance(pair, str) else pair for pair in merges]
        made = np.fromiter((vocab[a + b] for a, b in pairs), np.int64, len(pairs))
    except (KeyError, TypeError, ValueError):
        raise ModelFormatError(path, "has a merge that is not two texts that make a piece", DAMAGED) from None
    runs = made[np.diff(made, prepend=-1) != 0]
    runs = runs[kinds[runs] == NORMAL]  # added tokens are found before anything is merged
    apart = np.bincount(runs).max(initial=0) > 1
    if apart or ((len(vocab), len(pairs)) not in RELEASED and not _complete(path, vocab, pairs, kinds)):
        problem = "its merges are not those of a SentencePiece model, as every Gemma's are"
        raise ModelFormatError(path, problem, REMEDY)
    scores = np.full(len(vocab), -len(pairs), np.float32)
    scores[made[::-1]] = -np.arange(len(made))[::-1]  # of several values for one piece the last stays
    return scores


def _complete(path: Path, vocab: dict[str, int], pairs: list[list[str]], kinds: np.ndarray) -> bool:
    """Whether the merges are all splits of a piece into two pieces."""
    free = [piece for piece, number in vocab.items() if kinds[number] == NORMAL]
    if sum(map(len, free)) > MOST_LETTERS or max(map(len, free), default=0) > LONGEST_SPLIT:
        raise ModelFormatError(path, "has pieces far longer than a Gemma's", REMEDY)
    splits = {(p[:i], p[i:]) for p in free for i in range(1, len(p)) if p[:i] in vocab and p[i:] in vocab}
    return splits == {(a, b) for a, b in pairs if kinds[vocab[a + b]] == NORMAL}
