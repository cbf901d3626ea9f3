"""What other programs answer: recorded for the inner ring of tests, asked again in the outer one.

    @answered_by("transformers", "torch")
    def logits(folder, ids): ...                # imports them inside

By default such a function looks its answer up in tests/data/recorded/, by its name and its arguments: numbers and
strings as they are, arrays and the files of a folder by a hash, so that no drift of a case goes unnoticed. Under
`pytest -m oracle` it runs, the tests compare with what it says now, and the recording must say the same.
`python tests/record.py` writes the recording.
"""

from __future__ import annotations

import functools
import hashlib
import inspect
import json
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest
from PIL import Image
from safetensors import safe_open

DATA = Path(__file__).parents[1] / "data" / "recorded"
PROGRAMS_OF: dict[str, str] = {}  # file → the programs that its answers come from


# A test that asks a program something of which no answer can be kept: it belongs to the outer ring alone.
live_only = pytest.mark.parametrize(
    "answers", [pytest.param("live", marks=pytest.mark.oracle)], indirect=True, scope="session"
)


class Digest(NamedTuple):
    """An array too large to keep: its dtype, its shape and the SHA-256 of its bytes, with -0 counted as 0."""

    dtype: str
    shape: tuple[int, ...]
    sha256: str

    @classmethod
    def of(cls, values: np.ndarray) -> Digest:
        unsigned = values + values.dtype.type(0) if values.dtype.kind == "f" else values
        return cls(str(values.dtype), values.shape, sha256(np.ascontiguousarray(unsigned).tobytes()))


class Mode:
    """Whether programs run, and where their answers go then."""

    live = False
    recording: dict[str, dict[str, Any]] | None = None  # file → key → answer


@contextmanager
def asking(live: bool) -> Iterator[None]:
    """Programs run inside if `live`; else their recorded answers are read."""
    before, Mode.live = Mode.live, live
    try:
        yield
    finally:
        Mode.live = before


def answered_by(*programs: str, file: str | None = None, digest: bool = False) -> Callable:
    """Make a function's answers recordable: an array, a list of arrays, or what json can say.

    An argument whose name begins with _ is no part of the key: a case whose last digits depend on the processor.
    `file` is where answers are kept, by default the first program's name. With `digest` an array's Digest is kept in
    its place, for arrays that ours must equal to the last bit.
    """
    stem = file or programs[0]
    PROGRAMS_OF[stem] = ", ".join(programs)

    def wrap(ask: Callable) -> Callable:
        @functools.wraps(ask)
        def answer(*args: Any, **named: Any) -> Any:
            bound = inspect.signature(ask).bind(*args, **named)
            bound.apply_defaults()
            parts = [short(value) for name, value in bound.arguments.items() if name[0] != "_"]
            key = f"{ask.__name__}({', '.join(parts)})"
            if not Mode.live:
                return recorded(stem, key, digest)
            found = ask(*args, **named)
            kept = Digest.of(found) if digest else found
            if Mode.recording is not None:
                Mode.recording.setdefault(stem, {})[key] = kept
            else:
                assert agree(kept, recorded(stem, key, digest)), f"the recording of {key} is stale: tests/record.py"
            return found

        return answer

    return wrap


def sha256(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()


def short(value: Any) -> str:
    """An argument as a key has it."""
    if isinstance(value, Path):
        files = [value] if value.is_file() else sorted(path for path in value.iterdir() if path.is_file())
        return "files " + sha256(b"".join(sha256(file.read_bytes()).encode() for file in files))[:12]
    if isinstance(value, np.ndarray):
        return f"{value.dtype}{list(value.shape)} {Digest.of(value).sha256[:12]}"
    if isinstance(value, Image.Image):
        return f"{value.mode} {value.size} {sha256(value.tobytes())[:12]}"
    text = json.dumps(value, sort_keys=True)
    return text if len(text) < 60 else f"json {sha256(text.encode())[:12]}"


@functools.cache
def opened(stem: str) -> tuple[Any, dict[str, Any]]:
    arrays, values = DATA / f"{stem}.safetensors", DATA / f"{stem}.json"
    return (
        safe_open(arrays, "numpy") if arrays.exists() else None,
        json.loads(values.read_text("utf-8"))["answers"] if values.exists() else {},
    )


def recorded(stem: str, key: str, digest: bool = False) -> Any:
    """The recorded answer; an error that says what to do where there is none."""
    arrays, values = opened(stem)
    if key in values:
        return Digest(values[key][0], tuple(values[key][1]), values[key][2]) if digest else values[key]
    names = set(arrays.keys()) if arrays else set()
    if key in names:
        return arrays.get_tensor(key)
    parts = sorted(name for name in names if name.startswith(key + "#"))
    assert parts, (
        f"tests/data/recorded/{stem} has no answer to {key}. Either the case is new (pip install -e '.[oracles]'; "
        "python tests/record.py), or what makes its arguments has changed"
    )
    return [arrays.get_tensor(name) for name in parts]


def agree(now: Any, before: Any) -> bool:
    """Equal, or for floats equal but for another processor's rounding."""
    if isinstance(now, np.ndarray):
        if now.shape != before.shape or now.dtype != before.dtype:
            return False
        if now.dtype.kind != "f":
            return np.array_equal(now, before)
        return bool(np.abs(now - before).max(initial=0) <= 5e-5 * np.abs(before).max(initial=0))
    if isinstance(now, (list, tuple)) and now and isinstance(now[0], np.ndarray):
        return len(now) == len(before) and all(map(agree, now, before))
    return now == (before if isinstance(now, Digest) else json.loads(json.dumps(before)))


def assert_equal(found: np.ndarray, expected: np.ndarray | Digest) -> None:
    """To the last bit; the outer ring shows where two arrays differ."""
    if isinstance(expected, Digest):
        assert Digest.of(found) == expected, "not equal; `pytest -m oracle` shows where"
    else:
        np.testing.assert_array_equal(found, expected, strict=True)
