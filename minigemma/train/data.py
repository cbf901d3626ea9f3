"""Texts as ids: read once, stored with the run, cut into windows, and shuffled by a seed.

A document (a line of a jsonl file, a file of plain text, or a chapter of one) becomes ids with <eos> at its end, and
these become windows of at most `seq` ids. A window w is trained on as

    inputs    <bos> w₀ w₁ … wₙ₋₂
    targets   w₀    w₁ w₂ … wₙ₋₁

so that each id is predicted once per epoch, from ids of its own document alone, and nothing is padded. A batch is
windows one after another. The windows of epoch e come in a permutation of (seed, e): a cursor, the count of windows
handed out so far, is all that a resumed run needs to know.

The held-out text is the end of the data: whole documents, or the last pages of a single long one. Randomly drawn lines
would leak: training has seen their neighbors.
"""

from __future__ import annotations

import gzip
import hashlib
import io
import json
import lzma
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ..arrays import F32, I32
from ..errors import FileError, check_type
from ..files.tokenizer import Tokenizer

CHAPTER = re.compile(r"\f|\n(?:[ \t]*\n){3,}")  # a form feed or three blank lines end a document of plain text
OPENERS: dict[str, Any] = {".gz": gzip.open, ".xz": lzma.open}
PIECE = 1 << 20  # characters that are encoded at once
Windows = NDArray[np.int64]  # [n, 2]: first id, and one past the last


class DataError(FileError):
    """A text that cannot be trained on."""


@dataclass(frozen=True)
class Corpus:
    """Documents as ids, those that are held out last."""

    ids: NDArray[Any]  # uint16, or uint32 for a larger vocabulary
    documents: NDArray[np.int64]  # [n, 2]: first id and bytes of UTF-8 of each document, and a last row: ids, 0
    trained: int  # documents to train on; the others are held out
    digest: str  # SHA-256 of the files that they were read from
    counted: NDArray[np.uint8] | None = None  # of each id: 1 where it is to be predicted, 0 in a prompt; None: all are

    @property
    def tokens(self) -> int:
        """Ids to train on."""
        return int(self.documents[self.trained, 0])

    def windows(self, seq: int, held_out: bool = False) -> Windows:
        """Cuts the documents into windows of at most `seq` ids."""
        first, last = (self.trained, len(self.documents) - 1) if held_out else (0, self.trained)
        cuts = [
            np.append(np.arange(start, end, seq), end)
            for start, end in zip(self.documents[first:last, 0], self.documents[first + 1 : last + 1, 0], strict=True)
        ]
        pairs = [np.stack([cut[:-1], cut[1:]], axis=1) for cut in cuts]
        return np.concatenate([np.empty((0, 2), np.int64), *pairs])

    def weights(self, windows: Windows) -> F32:
        """Of each target of the windows, 1 where it counts and 0 where it does not: [T] float32."""
        if self.counted is None:
            return np.ones(int((windows[:, 1] - windows[:, 0]).sum()), np.float32)
        return np.concatenate([self.counted[first:last] for first, last in windows]).astype(np.float32)

    def bytes_per_token(self) -> float:
        """Bytes of UTF-8 of the held-out documents, divided by the ids that count: nats per token → bits per byte."""
        first, last = self.documents[self.trained, 0], self.documents[-1, 0]
        ids = last - first if self.counted is None else int(self.counted[first:].sum())
        return float(self.documents[self.trained :, 1].sum() / max(ids, 1))

    def inputs(self, windows: Windows, bos: int) -> tuple[I32, I32, I32]:
        """(inputs [T], targets [T], index of each window's first token [B]) of windows one after another, int32."""
        targets = np.concatenate([self.ids[first:last] for first, last in windows]).astype(np.int32)
        starts = np.cumsum([0, *(windows[:-1, 1] - windows[:-1, 0])]).astype(np.int32)
        ids = np.empty_like(targets)
        ids[1:] = targets[:-1]
        ids[starts] = bos
        return ids, targets, starts

    def save(self, folder: Path) -> None:
        """Write ids.npy, documents.npy and counted.npy. np.save into a file would not notice that a disk is full."""
        arrays = {"ids.npy": self.ids, "documents.npy": self.documents, "counted.npy": self.counted}
        for name, array in arrays.items():
            if array is None:
                continue
            content = io.BytesIO()
            np.save(content, array)
            (folder / name).write_bytes(content.getbuffer())

    @classmethod
    def load(cls, folder: Path, trained: int, digest: str) -> Corpus:
        """The files that `save` wrote; the ids stay in the file, mapped into memory. Raises DataError."""
        try:
            ids = np.load(folder / "ids.npy", mmap_mode="r")
            documents = np.load(folder / "documents.npy")
            counted = np.load(folder / "counted.npy") if (folder / "counted.npy").exists() else None
            fits = ids.ndim == 1 and documents.ndim == 2 and len(ids) == documents[-1, 0] and trained < len(documents)
        except (OSError, ValueError, EOFError, IndexError):
            fits = False
        if not fits or (counted is not None and counted.shape != ids.shape):
            raise DataError(folder / "ids.npy", "is damaged or missing", "start a new run in another folder")
        return cls(ids, documents, trained, digest, counted)


@dataclass(frozen=True)
class Order:
    """The order in which windows are trained on: a permutation of each epoch's."""

    windows: Windows
    seed: int

    def take(self, cursor: int, tokens: int) -> Windows:
        """The windows from the `cursor`-th on that have at most `tokens` ids together, and at least one of them."""
        taken: list[NDArray[np.int64]] = []
        room = tokens
        for window in self._from(cursor):
            room -= int(window[1] - window[0])
            if taken and room < 0:
                break
            taken.append(window)
        return np.stack(taken)

    def _from(self, cursor: int) -> Iterator[NDArray[np.int64]]:
        while True:
            epoch, place = divmod(cursor, len(self.windows))
            order = np.random.default_rng((self.seed, epoch)).permutation(len(self.windows))
            for index in order[place:]:
                yield self.windows[index]
            cursor += len(self.windows) - place


def micro_batches(windows: Windows, tokens: int) -> Iterator[Windows]:
    """The windows in groups of at most `tokens` ids, or of a single longer window."""
    first = total = 0
    for i, size in enumerate((windows[:, 1] - windows[:, 0]).tolist()):
        if i > first and total + size > tokens:
            yield windows[first:i]
            first, total = i, 0
        total += size
    if len(windows):
        yield windows[first:]


# ---- from files

Data = str | Path | Sequence[str | Path]


def paths_of(data: Data) -> list[str | Path]:
    """The files that are meant: one, or several."""
    check_type("data", data, (str, Path, Sequence), "a file, or a list of them", optional=False)
    return [data] if isinstance(data, (str, Path)) else list(data)


def read_corpus(paths: Sequence[str | Path], tokenizer: Tokenizer, held_out: float) -> Corpus:
    """The documents of text and jsonl files, .gz and .xz ones too, a share of about `held_out` of them held out.

    Raises DataError with the place for a file that is no text, and for a line that is no {"text": …}.
    """
    digest = hashlib.sha256()
    texts = [text for path in paths for text in documents(Path(path), digest)]
    texts, trained = _held_out_last(texts, held_out)
    kind = np.uint16 if tokenizer.size <= 1 << 16 else np.uint32
    parts = [np.fromiter(encoded(tokenizer, text), kind) for text in texts]
    firsts = np.cumsum([0, *map(len, parts)])
    sizes = [*(len(text.encode("utf-8", "replace")) for text in texts), 0]
    return Corpus(np.concatenate(parts), np.stack([firsts, sizes], axis=1), trained, digest.hexdigest())


def digest_of(paths: Sequence[str | Path]) -> str:
    """The digest of a corpus that was read from these files."""
    digest = hashlib.sha256()
    for path in paths:
        digest.update(content_of(Path(path)))
    return digest.hexdigest()


def encoded(tokenizer: Tokenizer, text: str) -> Iterator[int]:
    """The ids of a document and <eos>, encoded in pieces that begin at a line: a long string takes much memory."""
    first = 0
    while first < len(text):
        end = text.find("\n", first + PIECE)
        while end > 0 and text[end : end + 1] == "\n":  # a run of newlines is one token
            end += 1
        end = end if end > 0 else len(text)
        yield from tokenizer.encode(text[first:end])
        first = end
    yield tokenizer.eos


def documents(path: Path, digest: Any = None) -> list[str]:
    """The documents of one file; its bytes are added to `digest` (hashlib). Raises DataError."""
    content = content_of(path)
    if digest is not None:
        digest.update(content)
    if ".jsonl" in path.suffixes[-2:]:
        texts = [_text_of(path, number, line) for number, line in enumerate(content.splitlines(), 1)]
    else:
        text = decoded(path, content).replace("\r\n", "\n")
        texts = [part for chapter in CHAPTER.split(text) if (part := chapter.strip("\n")).strip()]
    if not texts:
        raise DataError(path, "has no text", "give a file of plain text, or jsonl with a text in each line")
    return texts


def content_of(path: Path) -> bytes:
    """The bytes of a file, without compression."""
    try:
        if path.exists() and not path.is_file():
            raise DataError(path, "is a folder or a device, not a file", "name the text itself")
        with OPENERS.get(path.suffix, open)(path, "rb") as file:
            return file.read()
    except FileNotFoundError:
        raise DataError(path, "does not exist", "check the path") from None
    except (lzma.LZMAError, EOFError, gzip.BadGzipFile) as error:
        raise DataError(path, f"cannot be decompressed ({error})", "fetch it again") from None


def decoded(path: Path, content: bytes, where: str = "") -> str:
    """The text of bytes; DataError with the place where they are not UTF-8."""
    try:
        return content.decode().removeprefix("\ufeff")
    except UnicodeDecodeError as error:
        place = f"{where}near byte {error.start:,}"
        raise DataError(path, f"is not UTF-8 ({place})", "convert it first, as with iconv") from None


def _text_of(path: Path, number: int, line: bytes) -> str:
    """The text of one line of a jsonl file."""
    wanted = 'every line is an object {"text": "…"}'
    try:
        row = json.loads(decoded(path, line, f"line {number:,}, "))
    except (ValueError, RecursionError) as error:
        if isinstance(error, DataError):
            raise
        problem = f"is not JSON ({error})" if line.strip() else "is empty"
        raise DataError(path, f"line {number:,} {problem}", wanted) from None
    text = row.get("text") if isinstance(row, dict) else None
    if not isinstance(text, str) or not text.strip():
        problem = "has an empty text" if isinstance(text, str) else f"has no text in 'text', but {shown(row)}"
        raise DataError(path, f"line {number:,} {problem}", wanted)
    return text


def shown(row: Any, length: int = 100) -> str:
    """The beginning of a line of jsonl, as a message shows it."""
    text = json.dumps(row, ensure_ascii=False)
    return text if len(text) <= length else f"{text[:length]}…"


def _held_out_last(texts: list[str], share: float) -> tuple[list[str], int]:
    """The texts, and how many of them to train on: the last ones, with about `share` of all letters, are held out.

    A last text of more than twice that is cut where a paragraph begins, or else a line or a word.
    """
    wanted = int(share * sum(map(len, texts)))
    if wanted < 1:
        return texts, len(texts)
    last = texts[-1]
    if len(texts) == 1 or len(last) > 2 * wanted:
        cut = len(last) - wanted
        for end in ("\n\n", "\n", " "):
            at = last.rfind(end, max(cut - wanted, 0), cut)
            if at > 0:
                cut = at + len(end)
                break
        return [*texts[:-1], last[:cut], last[cut:]], len(texts)
    kept, held = len(texts) - 1, len(last)
    while kept > 1 and held + len(texts[kept - 1]) / 2 <= wanted:
        kept -= 1
        held += len(texts[kept])
    return texts, kept
