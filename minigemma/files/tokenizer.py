"""Text to token ids and back, by the sentencepiece library, from a tokenizer.model or the vocabulary of another file.

Two rules of our own. A typed `<start_of_turn>` is encoded as its letters, never as the token that begins a turn, unless
`control=True`. Decoding joins bytes before it decodes UTF-8, so a character split over several tokens comes out whole,
streamed or not.
"""

from __future__ import annotations

import codecs
import re
import struct
from collections.abc import Iterable, Iterator, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import sentencepiece

from ..arrays import F32, I32, Strings, letters
from ..errors import ModelFormatError, check_type
from ..models.vocabulary import Vocabulary
from .foreign import FOREIGN, kind_of
from .statements import AddedToken

SPACE = "\u2581"  # stands for a blank in a piece
NORMAL, UNKNOWN, CONTROL, USER_DEFINED, UNUSED, BYTE = range(1, 7)

# Control tokens of any Gemma's vocabulary. Some files mark them as user-defined pieces, so that typed text would become
# the token: here they are control tokens whatever the file says. (Tags such as <table>, runs of newlines and runs of
# blanks are meant to be found in text, and stay.)
CONTROL_NAME = (
    r"<(?:pad|eos|bos|unk|mask|2mass|unused[0-9]+|start_of_turn|end_of_turn|start_of_image|end_of_image"
    r"|image_soft_token)>|\[(?:@BOS@|multimodal|toxicity=0)\]"
)
LARGEST = 100_000_000  # bytes; a Gemma's tokenizer.model has 4 to 5 million
LONGEST = 2**14 - 11  # bytes of a piece: the length of its entry is written in 14 bits; a Gemma's have 93 or fewer
REMEDY = "take the tokenizer.model that was released with these weights"
DAMAGED = "the file is damaged: fetch it again"


class Tokenizer:
    """A vocabulary. `bos`, `eos` and `pad` are the same in every Gemma."""

    pad, eos, bos, unknown = 0, 1, 2, 3

    def __init__(self, model: bytes, path: str | Path, remedy: str = REMEDY) -> None:
        try:
            self._model = sentencepiece.SentencePieceProcessor(model_proto=model)
        except Exception as error:  # a RuntimeError mostly, an error of Unicode where a piece that it quotes is no text
            reason = " ".join(str(error).removeprefix("INTERNAL: ").split()).rstrip(".")[:100]
            problem = _what_it_is(model) if "ParseFromArray" in reason else f"has a vocabulary that is broken: {reason}"
            raise ModelFormatError(path, problem, remedy) from None
        self.size: int = self._model.get_piece_size()
        self._added: dict[int, bytes] = {}  # what an added token writes
        self._names: dict[str, int] = {}  # its id by its name
        self._patterns: dict[bool, re.Pattern[str]] = {}  # of the names found in a text, with and without control
        self.added: tuple[AddedToken, ...] = ()  # those that are no piece's name
        self._in_text: tuple[str, ...] = ()  # added tokens that any text may hold; the others need control=True
        if [self.piece(i) for i in range(4)] != ["<pad>", "<eos>", "<bos>", "<unk>"]:
            raise ModelFormatError(path, "has the vocabulary of another model, not a Gemma's", remedy)

    def __repr__(self) -> str:
        """How many tokens it has."""
        return f"<{type(self).__name__}: {self.size:,} tokens>"

    @classmethod
    def from_model_file(cls, path: str | Path) -> Tokenizer:
        """From a tokenizer.model; raises ModelFormatError for anything else."""
        path = Path(path)
        try:
            if path.exists() and not path.is_file():  # reading a pipe or device might never end
                raise ModelFormatError(path, "is a directory or device, not a file", REMEDY)
            if (size := path.stat().st_size) > LARGEST:
                raise ModelFormatError(path, f"has {size / 1e6:.0f} MB, far more than a tokenizer.model", REMEDY)
            model = path.read_bytes()
        except OSError as error:
            raise ModelFormatError(path, f"cannot be read ({error.strerror})", REMEDY) from None
        if not model:
            raise ModelFormatError(path, "is empty", REMEDY)
        return cls(_with_controls_marked(model), path)

    @classmethod
    def from_vocabulary(cls, pieces: Strings, scores: F32, types: I32, path: str | Path = "vocabulary") -> Tokenizer:
        """From the pieces, scores and types of a GGUF file, which stores the SentencePiece model in parts."""
        if not len(pieces) == len(scores) == len(types):
            raise ValueError(f"{len(pieces)} pieces, but {len(scores)} scores and {len(types)} types")
        pieces = _with_blanks_written(pieces, types)
        for i in np.flatnonzero((pieces.lengths < 1) | (pieces.lengths > LONGEST)):
            problem = f"has a piece of {pieces.lengths[i]} bytes in its vocabulary (id {i})"
            raise ModelFormatError(path, problem, DAMAGED)
        return cls(_model_of(pieces, scores, types), path, DAMAGED)

    def add(self, tokens: Iterable[AddedToken], rows: int) -> None:
        """Add a checkpoint's added tokens, except ids from `rows` on, for which the embedding has no row.

        Entries that repeat the vocabulary's own name of an id, as Gemma's files do, change nothing.
        """
        in_text, kept = [], []
        for token in tokens:
            same = token.text.replace(" ", SPACE) == self.piece(token.id).replace(" ", SPACE)
            if same or token.id >= rows or re.fullmatch(CONTROL_NAME, token.text):
                continue
            self._added[token.id] = token.text.encode("utf-8", "replace")
            self._names.setdefault(token.text, token.id)  # of one name the first, as in the tokenizers library
            in_text += [] if token.special else [token.text]
            kept.append(token)
        self._in_text, self.added = tuple(in_text), tuple(kept)
        self._patterns.clear()
        self.size = max([self.size, *(number + 1 for number in self._added)])

    @property
    def _control_names(self) -> list[str]:
        """Names of all control tokens of this vocabulary, and of the added tokens."""
        ids = range(self._model.get_piece_size())
        names = (
            self.piece(i) for i, is_control in zip(ids, self._model.is_control(list(ids)), strict=True) if is_control
        )
        return [*filter(None, names), *self._names]

    def _found(self, text: str, control: bool) -> Iterator[re.Match[str]]:
        """Finds names of added and control tokens in a text, longest first."""
        if control not in self._patterns:
            names = sorted(self._control_names if control else self._in_text, key=len, reverse=True)
            pattern = "|".join([*map(re.escape, names), *([CONTROL_NAME] if control else [])])
            self._patterns[control] = re.compile(pattern or "(?!)")  # (?!) is nowhere
        return self._patterns[control].finditer(text)

    def encode(self, text: str, control: bool = False) -> list[int]:
        """Ids of a text, without BOS. With `control`, the names of control tokens in it become these tokens.

        Halves of surrogate pairs, which are no characters, become U+FFFD; a typed U+2581 cannot be told from a blank.
        """
        if not isinstance(text, str):
            raise ValueError(f"the text is of type {type(text).__name__}; the tokenizer takes one text")
        text = text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")
        ids, done = [], 0
        for name in self._found(text, control):
            token = self.id_of(name[0])
            if token is not None:  # else the name is of another Gemma's vocabulary, and text in this one
                ids += [*self._model.encode(text[done : name.start()]), token]
                done = name.end()
        return ids + self._model.encode(text[done:])

    def decode(self, ids: int | Sequence[int]) -> str:
        """The text of ids, or of one; control tokens have none, and bytes that are no UTF-8 become U+FFFD."""
        each = [ids] if isinstance(ids, (int, np.integer)) else ids
        check_type("ids", each, (Sequence, np.ndarray), "a list of token ids", optional=False)
        return b"".join(map(self.bytes_of, each)).decode("utf-8", "replace")

    @property
    def model_bytes(self) -> bytes:
        """The content of a tokenizer.model."""
        return self._model.serialized_model_proto()

    @property
    def vocabulary(self) -> tuple[list[str], list[float], list[int]]:
        """The pieces, their scores and their types, in the order of their ids; added tokens are not among them."""
        entries = [dict(_fields_of(entry)) for number, entry in _fields_of(self.model_bytes) if number == 1]
        texts = [entry[1].decode("utf-8", "replace") for entry in entries]
        scores = [struct.unpack("<f", entry.get(2, bytes(4)))[0] for entry in entries]
        return texts, scores, [entry.get(3, NORMAL) for entry in entries]

    def stream(self) -> StreamDecoder:
        """A decoder for ids that come one at a time."""
        return StreamDecoder(self)

    def piece(self, token: int) -> str:
        """The vocabulary's entry for an id, unchanged; empty for an id outside it."""
        try:
            return self._model.id_to_piece(int(token)) if 0 <= token < self._model.get_piece_size() else ""
        except UnicodeDecodeError:  # in a malicious file
            return "\ufffd"

    def bytes_of(self, token: int) -> bytes:
        """The UTF-8 bytes of an id; empty for control tokens and ids outside the vocabulary."""
        token = int(token)
        if token in self._added:
            return self._added[token]
        inside = 0 <= token < self._model.get_piece_size()
        if not inside or self._model.is_control(token) or self._model.is_unknown(token):
            return b""
        if self._model.is_byte(token):
            return bytes([int(self.piece(token)[1:-1], 16)])
        return self.piece(token).replace(SPACE, " ").encode()

    def id_of(self, piece: str) -> int | None:
        """The id of a piece or an added token, or None if the vocabulary has no such."""
        if piece in self._names:
            return self._names[piece]
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


def _what_it_is(content: bytes) -> str:
    """Names a file mistaken for a tokenizer.model, by its first bytes."""
    kind = kind_of(content[:512], "")
    if kind == "html":
        return "is a web page, not a tokenizer.model (often the page that asks to accept the terms)"
    if kind == "lfs":
        return FOREIGN[kind][0]
    what = "JSON (a tokenizer.json?), not" if content.lstrip(b"\xef\xbb\xbf \t\r\n").startswith(b"{") else "not"
    return f"is {what} a SentencePiece model"


# ---- the file format: protocol buffers, of which three messages are needed (sentencepiece_model.proto)

# An entry of the vocabulary: field 1 of the model; in it 2, the score, 3, the type, and 1, the text, which follows.
# Lengths are written as two bytes of 7 bits each, also where one would do, so that this part is as long in all entries.
ENTRY = np.dtype(
    [
        *(("piece", "u1"), ("size", "<u2"), ("score", "u1"), ("value", "<f4")),
        *(("type", "u1"), ("kind", "u1"), ("text", "u1"), ("length", "<u2")),
    ]
)


def _with_blanks_written(pieces: Strings, types: I32) -> Strings:
    """With U+2581 for a blank also in user-defined pieces, runs of blanks, which GGUF files store as such."""
    joined, lengths, done, parts = pieces.joined.tobytes(), pieces.lengths.copy(), 0, []
    for i in np.flatnonzero(types == USER_DEFINED).tolist():
        written = pieces[i].replace(b" ", SPACE.encode())
        parts += [joined[done : pieces.starts[i]], written]
        done, lengths[i] = pieces.starts[i] + pieces.lengths[i], len(written)
    return Strings(np.frombuffer(b"".join([*parts, joined[done:]]), np.uint8), lengths)


def _model_of(pieces: Strings, scores: F32, types: I32) -> bytes:
    """A ModelProto: entries (1), trainer settings (2), normaliser settings (3)."""
    kinds = np.clip(types, NORMAL, BYTE)
    # A few thousand of a quarter of a million pieces begin like a control token's name.
    begins, is_name = pieces.joined[pieces.starts], re.compile(CONTROL_NAME.encode()).fullmatch
    perhaps = np.flatnonzero((begins == ord("<")) | (begins == ord("[")))
    joined, ends = pieces.joined.tobytes(), pieces.starts + pieces.lengths
    kinds[[i for i in perhaps if is_name(joined, pieces.starts[i], ends[i])]] = CONTROL
    kinds[Tokenizer.unknown : Tokenizer.unknown + 1] = UNKNOWN
    # Byte-pair encoding; what no piece covers becomes bytes. (Digits stay single because no piece has two.)
    trainer: dict[int, int | bytes] = {3: 2, 35: 1}
    # Characters stay as they are; no blank is put in front, none taken away, and each is written as U+2581.
    normaliser: dict[int, int | bytes] = {1: b"identity", 3: 0, 4: 0, 5: 1}
    return _entries(pieces, scores, kinds) + _message(2, trainer) + _message(3, normaliser)


def _entries(pieces: Strings, scores: F32, kinds: I32) -> bytes:
    """The vocabulary's entries, concatenated: one array operation writes all headers, one all texts."""
    heads, lengths = np.zeros(len(pieces), ENTRY), pieces.lengths
    for name, tag in (("piece", 0x0A), ("score", 0x15), ("type", 0x18), ("text", 0x0A)):
        heads[name] = tag
    heads["value"], heads["kind"] = scores, kinds
    for name, size in (("size", lengths + 10), ("length", lengths)):
        heads[name] = size & 127 | 128 | size >> 7 << 8
    is_text = letters(lengths, ENTRY.itemsize)
    out = np.empty(len(is_text), np.uint8)
    out[~is_text], out[is_text] = heads.view(np.uint8), pieces.joined
    return out.tobytes()


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


def _fields_of(message: bytes) -> Iterator[tuple[int, Any]]:
    """(number, value) of each field of a message: an integer, or the bytes of anything else."""
    at = 0

    def varint() -> int:
        nonlocal at
        value = shift = 0
        while True:
            byte, at = message[at], at + 1
            value |= (byte & 127) << shift
            if byte < 128:
                return value
            shift += 7

    while at < len(message):
        number, kind = divmod(varint(), 8)
        if kind == 0:
            yield number, varint()
            continue
        size = {1: 8, 5: 4}.get(kind) or varint()
        yield number, message[at : at + size]
        at += size


def _message(number: int, fields: dict[int, int | bytes]) -> bytes:
    return _field(number, b"".join(_field(*field) for field in fields.items()))


def _with_controls_marked(model: bytes) -> bytes:
    """The model with every control token typed as one; a released tokenizer.model has most as USER_DEFINED.

    An entry is, in its file: text (0x0A, length, name), score (0x15, four bytes), type (0x18, one byte).
    """
    marked = bytearray(model)
    for entry in re.finditer(rb"(%b)\x15.{4}\x18\x04" % CONTROL_NAME.encode(), model, re.DOTALL):
        if model.endswith(bytes([0x0A, len(entry[1])]), 0, entry.start()):
            marked[entry.end() - 1] = CONTROL
    return bytes(marked)


def stop_ids(tokenizer: Vocabulary, stated: Iterable[int | str], turns: bool = True) -> tuple[int, ...]:
    """Ids that end an answer: <eos>, those that the checkpoint states, and <end_of_turn> if it was taught `turns`."""
    ends = [*stated, *(["<end_of_turn>"] if turns else [])]
    ids = {tokenizer.id_of(end) if isinstance(end, str) else end for end in ends}
    return tuple(sorted({tokenizer.eos} | {i for i in ids if i is not None}))
