"""Prompts and answers as ids: a document for each line of a jsonl file, of which the answers alone are to be predicted.

    {"prompt": "…", "answer": "…"}                                 or "completion" in place of "answer"
    {"messages": [{"role": "user", "content": "…"}, {"role": "assistant", …}, …]}

Messages are laid out in Gemma's turns (text/prompt.py), and so are prompts of an instruction-tuned model; a pretrained
one gets its prompt as it is, the answer right behind it, and <eos>. What counts is each token of an answer and the one
that ends it.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from ..files.tokenizer import Tokenizer
from ..text.prompt import conversation_ids
from .data import Corpus, DataError, content_of, decoded, read_corpus, shown

ANSWERS = ("answer", "completion")
WANTED = 'every line is an object {"prompt": "…", "answer": "…"} or {"messages": […]}'


Pieces = list[tuple[list[int], bool]]  # ids, and whether they count


class Layout(NamedTuple):
    """How examples become ids."""

    tokenizer: Tokenizer
    family: str
    turns: bool  # of prompts; messages always have them
    seq: int  # ids of an example at most

    def pieces(self, row: dict[str, Any]) -> Pieces:
        """The ids of an example after <bos>, in pieces that count or do not. ValueError where it is none."""
        if "messages" in row:
            return self._conversation(row["messages"])
        prompt, answer = row.get("prompt"), next((row[name] for name in ANSWERS if name in row), None)
        if not isinstance(prompt, str) or not isinstance(answer, str) or not answer.strip():
            raise ValueError(f"has no text in 'prompt' and 'answer' or 'completion', but {shown(row)}")
        if self.turns:
            turns = [{"role": "user", "content": prompt}, {"role": "model", "content": answer}]
            return self._conversation(turns)
        encode = self.tokenizer.encode
        return [(encode(prompt), False), ([*encode(answer), self.tokenizer.eos], True)]

    def _conversation(self, messages: Any) -> Pieces:
        if not isinstance(messages, list) or not messages:
            raise ValueError("has messages that are no list of turns")
        if not isinstance(messages[-1], dict) or messages[-1].get("role") not in ("assistant", "model"):
            raise ValueError("has messages that do not end with an answer")
        first = int(messages[0].get("role") == "system") if isinstance(messages[0], dict) else 0
        newline, done, pieces = len(self.tokenizer.encode("\n")), 1, []
        for i in range(first + 1, len(messages), 2):
            before = conversation_ids(self.tokenizer, self.family, messages[:i])
            after = conversation_ids(self.tokenizer, self.family, messages[: i + 1], add_generation_prompt=False)
            end = len(after) - newline
            pieces += [(after[done : len(before)], False), (after[len(before) : end], True)]
            done = end
        if not pieces:
            raise ValueError("has messages in which the user says nothing")
        return pieces


def read_examples(paths: Sequence[str | Path], layout: Layout, held_out: float) -> Corpus:
    """The documents of files of examples, or of plain text and {"text": …} as in `read_corpus`, where all ids count.

    The last lines, a share `held_out` of them, are held out. Raises DataError with the line for what is no example, for
    an example longer than a window, and for files of both kinds.
    """
    digest = hashlib.sha256()
    found: list[tuple[Pieces, int]] = []
    for path in map(Path, paths):
        content = content_of(path)
        if ".jsonl" not in path.suffixes[-2:] or _holds_text(content.lstrip().split(b"\n", 1)[0]):
            if found:
                raise DataError(path, "is text, and the file before holds examples", "give files of one kind")
            return read_corpus(paths, layout.tokenizer, held_out)
        digest.update(content)
        found += list(_examples(path, content, layout))
    if not found:
        raise DataError(paths[0], "has no example", WANTED)
    sizes = [sum(len(ids) for ids, _ in pieces) for pieces, _ in found]
    ids = np.array([i for pieces, _ in found for part, _ in pieces for i in part], np.uint32)
    counted = np.concatenate([np.full(len(part), counts, np.uint8) for pieces, _ in found for part, counts in pieces])
    documents = np.stack([np.cumsum([0, *sizes]), [*(size for _, size in found), 0]], axis=1)
    trained = len(found) - min(round(held_out * len(found)), len(found) - 1)
    return Corpus(ids, documents, trained, digest.hexdigest(), counted)


def _holds_text(line: bytes) -> bool:
    try:
        row = json.loads(line)
    except (ValueError, RecursionError):
        return False
    return isinstance(row, dict) and "text" in row


def _examples(path: Path, content: bytes, layout: Layout) -> Iterator[tuple[Pieces, int]]:
    """The pieces of each line, and the bytes of its answers."""
    for number, line in enumerate(content.splitlines(), 1):
        try:
            row = json.loads(decoded(path, line, f"line {number:,}, "))
            if not isinstance(row, dict):
                raise ValueError(f"is {shown(row)}")
            pieces = layout.pieces(row)
            length = sum(len(ids) for ids, _ in pieces)
            if length > layout.seq:
                raise ValueError(f"has {length:,} tokens, and a window {layout.seq:,}: raise seq or shorten it")
        except DataError:
            raise
        except (json.JSONDecodeError, RecursionError) as error:
            problem = f"is not JSON ({error})" if line.strip() else "is empty"
            raise DataError(path, f"line {number:,} {problem}", WANTED) from None
        except ValueError as error:
            raise DataError(path, f"line {number:,} {error}", WANTED) from None
        answers = (layout.tokenizer.decode(ids) for ids, counts in pieces if counts)
        yield pieces, sum(len(text.encode("utf-8", "replace")) for text in answers)
