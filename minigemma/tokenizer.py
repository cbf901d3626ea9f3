"""Text to token ids and back, by the sentencepiece library, from a tokenizer.model or from a GGUF's vocabulary.

Two rules of our own. Text is text: a `<start_of_turn>` that somebody types is encoded as its letters, never as the
token that
begins a turn, unless `control=True` asks for it. And bytes are bytes: pieces are turned back into bytes first and into
characters last, so that a character which several tokens share comes out whole, streamed or not.
"""

from __future__ import annotations

import codecs
import re
from collections.abc import Sequence
from functools import cached_property
from pathlib import Path

import numpy as np
import sentencepiece

from .arrays import F32, I32
from .errors import ModelFormatError

SPACE = "\u2581"  # what a piece has for a blank
NORMAL, UNKNOWN, CONTROL, USER_DEFINED, UNUSED, BYTE = range(1, 7)

# Tokens that stand for something other than their letters, in any Gemma's vocabulary. Some files mark them as ordinary
# pieces to be found in text, which is how a typed one would become the token: here they are control tokens whatever the file
# says.
CONTROLS = (
    *("<pad>", "<eos>", "<bos>", "<unk>", "<mask>", "<2mass>", "[@BOS@]", "[multimodal]"),
    *("<start_of_turn>", "<end_of_turn>", "<start_of_image>", "<end_of_image>", "<image_soft_token>"),
)
REMEDY = "take the tokenizer.model that was released with these weights"


class Tokenizer:
    """A vocabulary. `bos`, `eos` and `pad` are the same in every Gemma."""

    pad, eos, bos, unknown = 0, 1, 2, 3

    def __init__(self, model: bytes, path: str | Path) -> None:
        try:
            self._model = sentencepiece.SentencePieceProcessor(model_proto=_controls_marked(model))
        except RuntimeError:
            raise ModelFormatError(path, "is not a SentencePiece model", REMEDY) from None
        self.size: int = self._model.get_piece_size()
        if self.size < 5 or [self.piece(i) for i in range(3)] != ["<pad>", "<eos>", "<bos>"]:
            raise ModelFormatError(path, "is a SentencePiece model, but not a Gemma's", REMEDY)

    @classmethod
    def from_model_file(cls, path: str | Path) -> Tokenizer:
        """From a tokenizer.model; raises ModelFormatError for anything else."""
        try:
            content = Path(path).read_bytes()
        except OSError as error:
            raise ModelFormatError(path, f"cannot be read ({error.strerror})", REMEDY) from None
        if not content:
            raise ModelFormatError(path, "is empty", REMEDY)
        return cls(content, path)

    @classmethod
    def from_vocabulary(
        cls, pieces: list[bytes], scores: F32, types: I32, path: str | Path = "vocabulary"
    ) -> Tokenizer:
        """From the pieces, scores and types of a GGUF file, which has the SentencePiece model taken apart."""
        if len(pieces) < 5:
            raise ModelFormatError(path, f"has a vocabulary of {len(pieces)} pieces", "take a file that was released")
        return cls(_model_of(pieces, scores, types), path)

    def encode(self, text: str, control: bool = False) -> list[int]:
        """Ids of a text, without BOS. With `control`, the names of control tokens in it become these tokens.

        Halves of surrogate pairs, which are no characters, become U+FFFD.
        """
        text = text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")
        if not control:
            return self._model.encode(text)
        ids: list[int] = []
        for part in re.split(f"({'|'.join(map(re.escape, CONTROLS))})", text):
            token = self.id_of(part) if part in CONTROLS else None
            ids += self._model.encode(part) if token is None else [token]
        return ids

    def decode(self, ids: Sequence[int]) -> str:
        """The text of ids; control tokens have none, and bytes that are no UTF-8 become U+FFFD."""
        return b"".join(map(self.bytes_of, ids)).decode("utf-8", "replace")

    def stream(self) -> StreamDecoder:
        """A decoder for ids that come one at a time."""
        return StreamDecoder(self)

    def piece(self, token: int) -> str:
        """The vocabulary's entry for an id, as it stands there."""
        return self._model.id_to_piece(int(token)) if 0 <= token < self.size else ""

    def bytes_of(self, token: int) -> bytes:
        """What an id adds to a text, in UTF-8: nothing for control tokens and ids outside the vocabulary."""
        token = int(token)
        if not 0 <= token < self.size or self._model.is_control(token) or self._model.is_unknown(token):
            return b""
        piece = self._model.id_to_piece(token)
        if self._model.is_byte(token):
            return bytes([int(piece[1:-1], 16)])
        return piece.replace(SPACE, " ").encode()

    def id_of(self, piece: str) -> int | None:
        """The id of a piece, or None if the vocabulary has no such."""
        token = self._model.piece_to_id(piece)
        return token if self.piece(token) == piece else None

    @cached_property
    def start_of_turn(self) -> int | None:
        """The token that begins a turn, of which its end is the next: 106 in Gemma 1 and 2, 105 in Gemma 3."""
        return self.id_of("<start_of_turn>")


class StreamDecoder:
    """Ids to text one by one: a character appears with its last byte. Pushes and `flush` joined are `decode`."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._tokenizer = tokenizer
        self._decoder = codecs.getincrementaldecoder("utf-8")("replace")

    def push(self, token: int) -> str:
        """The characters that are complete with this token."""
        return self._decoder.decode(self._tokenizer.bytes_of(token))

    def flush(self) -> str:
        """What is left of an unfinished character: U+FFFD, or nothing."""
        return self._decoder.decode(b"", final=True)


# ---- the file format: protocol buffers, of which three messages are needed (sentencepiece_model.proto)


def _varint(value: int) -> bytes:
    out = bytearray()
    while value > 127:
        out.append(value & 127 | 128)
        value >>= 7
    return bytes([*out, value])


def _field(number: int, value: int | bytes) -> bytes:
    if isinstance(value, bytes):
        return _varint(number << 3 | 2) + _varint(len(value)) + value
    return _varint(number << 3) + _varint(value)


def _model_of(pieces: list[bytes], scores: F32, types: I32) -> bytes:
    """A ModelProto: pieces (1: text 1, score 2, type 3), trainer settings (2), normaliser settings (3).

    A normal piece needs no type and so is three strings; a quarter of a million of those join in no time.
    """
    special = {i: kind for i, kind in enumerate(types.tolist()) if kind != NORMAL} | {Tokenizer.unknown: UNKNOWN}
    fives = np.empty((len(pieces), 5), np.uint8)
    fives[:, 0], fives[:, 1:] = 0x15, np.ascontiguousarray(scores, "<f4").view(np.uint8).reshape(-1, 4)
    raw = fives.tobytes()
    head = [b"\x0a" + _varint(len(_field(1, bytes(n))) + 5) + b"\x0a" + _varint(n) for n in range(_longest(pieces) + 1)]
    parts = [b""] * (3 * len(pieces))
    parts[0::3] = [head[n] for n in map(len, pieces)]
    parts[1::3] = pieces
    parts[2::3] = [raw[i : i + 5] for i in range(0, len(raw), 5)]
    for i, kind in special.items():
        text = pieces[i].replace(b" ", SPACE.encode()) if kind == USER_DEFINED else pieces[i]
        parts[3 * i : 3 * i + 3] = b"", b"", _field(1, _field(1, text) + parts[3 * i + 2] + _field(3, kind))
    bpe, names = 2, {45: b"<unk>", 46: b"<bos>", 47: b"<eos>", 48: b"<pad>"}
    ids = {40: Tokenizer.unknown, 41: Tokenizer.bos, 42: Tokenizer.eos, 43: Tokenizer.pad}
    # 25: digits are split; 26: pieces of blanks alone are allowed; 35: what no piece covers falls back to bytes
    trainer: dict[int, int | bytes] = {3: bpe, 4: len(pieces), 24: 0, 25: 1, 26: 1, 35: 1, **ids, **names}
    normaliser: dict[int, int | bytes] = {1: b"identity", 3: 0, 4: 0, 5: 1}  # no blank put in front, none taken away
    parts += [_field(n, b"".join(_field(*f) for f in fields.items())) for n, fields in ((2, trainer), (3, normaliser))]
    return b"".join(parts)


def _longest(pieces: list[bytes]) -> int:
    return max(map(len, pieces), default=0)


def _controls_marked(model: bytes) -> bytes:
    """The model with every token of CONTROLS typed as control: a piece's type is the byte behind its score."""
    changed = bytearray(model)
    for name in CONTROLS:
        text = name.encode()
        at = model.find(_field(1, text) + b"\x15") + 2 + len(text) + 5
        if at > 6 + len(text) and name != "<unk>" and model[at : at + 1] == b"\x18":
            changed[at + 1] = CONTROL
    return bytes(changed)
