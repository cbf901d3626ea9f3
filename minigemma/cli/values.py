"""Values of flags: argparse types, and the text that a command reads."""

import argparse
import os
import re
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from ..errors import FileError, ModelFormatError

LONGEST_TEXT = 20_000_000  # bytes, more than any context holds


def number(kind: type, low: float, high: float = float("inf"), *, above: bool = False) -> Callable[[str], Any]:
    """An argparse type: a number from `low` (exclusive, if `above`) to `high`."""

    def parse(text: str) -> int | float:
        value = kind(text)
        if not (low <= value <= high) or (above and value == low):
            bounds = f"{'above' if above else 'at least'} {low:g} and at most {high:g}"
            raise argparse.ArgumentTypeError(f"{text} is not {bounds.removesuffix(' and at most inf')}")
        return value

    parse.__name__ = kind.__name__  # argparse says "invalid int value"
    return parse


# What `/set` of a chat may change: the type of its value, and its default.
SETTINGS: dict[str, tuple[Callable[[str], Any], Any]] = {
    "temperature": (number(float, 0), None),
    "top_k": (number(int, 1), None),
    "top_p": (number(float, 0, 1, above=True), None),
    "min_p": (number(float, 0, 1), None),
    "repetition_penalty": (number(float, 0, 1e6, above=True), None),
    "frequency_penalty": (number(float, -1e6, 1e6), None),
    "presence_penalty": (number(float, -1e6, 1e6), None),
    "seed": (number(int, 0, 2**64 - 1), None),
    "max_new_tokens": (number(int, 1), 256),
}


def bias(text: str) -> tuple[int, float]:
    """An argparse type: a token's id and what is added to its logit, as 1234-2.5, 1234+1 or 1234-inf."""
    found = re.fullmatch(r"(\d+)([+-].+)", text)
    if not found:
        raise argparse.ArgumentTypeError(f"{text} is no id with what is added to its logit, such as 1234-2.5")
    return int(found[1]), float(found[2])


def amount(text: str) -> int:
    """An argparse type: an integer, which may end with k, M or G: 10M."""
    sizes = {"k": 10**3, "M": 10**6, "G": 10**9}
    return round(float(text[:-1]) * sizes[text[-1]]) if text[-1:] in sizes else int(text)


def share(text: str) -> float:
    """An argparse type: a share, as 0.05 or 5%."""
    return float(text.removesuffix("%")) / (100 if text.endswith("%") else 1)


def positions(text: str) -> list[int]:
    """An argparse type: integers from 0, separated by commas."""
    return [number(int, 0)(part) for part in text.split(",")]


def counts(text: str) -> list[int]:
    """An argparse type: integers from 1, separated by commas."""
    return [number(int, 1)(part) for part in text.split(",")]


def names(text: str) -> tuple[str, ...]:
    """An argparse type: names, separated by commas."""
    return tuple(text.split(","))


def check_new(path: Path) -> None:
    """Raise ModelFormatError for a path to write that exists, or whose folder does not."""
    if path.exists() or not path.absolute().parent.is_dir():
        problem = "exists already" if path.exists() else f"cannot be made: {path.parent} does not exist"
        raise ModelFormatError(path, problem, "give a new path in an existing folder")


def unicode(text: str) -> str:
    """An argparse type: a text; bytes that the locale cannot decode (LC_ALL=C) are read as UTF-8."""
    try:
        text.encode()
    except UnicodeEncodeError:
        try:
            return os.fsencode(text).decode()
        except UnicodeDecodeError as error:
            raise argparse.ArgumentTypeError(f"not UTF-8 (near byte {error.start:,})") from None
    return text


def nonempty(text: str) -> str:
    """An argparse type: any text but the empty one."""
    if not text:
        raise argparse.ArgumentTypeError("the text is empty")
    return unicode(text)


def read_text(args: argparse.Namespace) -> str:
    """The text of the command line, a file or standard input, which must be UTF-8; a byte order mark is dropped."""
    given = args.text if args.prompt is None else args.prompt
    piped = given in ("-", None) and str(args.file or "-") == "-"
    name = "standard input" if piped else str(args.file or "the text")
    if piped:
        content = sys.stdin.buffer.read(LONGEST_TEXT + 1)
        if not content and given is None:
            raise FileError(name, "is empty", "give the text itself, -f FILE, or a pipe that holds it")
    elif args.file:
        with args.file.open("rb") as file:
            content = file.read(LONGEST_TEXT + 1)
    else:
        try:
            content = given.encode()
        except UnicodeEncodeError:
            content = os.fsencode(given)  # the bytes as the shell gave them: in a C locale they are UTF-8 too
    if len(content) > LONGEST_TEXT:
        raise FileError(name, f"has more than {LONGEST_TEXT:,} bytes, and so more than any context", "shorten it")
    try:
        return content.decode().removeprefix("\ufeff")
    except UnicodeDecodeError as error:
        raise FileError(name, f"is not UTF-8 (near byte {error.start:,})", "convert it first") from None
