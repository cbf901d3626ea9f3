"""The folder of a run, and the checkpoint from which it resumes exactly.

    config.json, model.safetensors, tokenizer.*   the model of the last checkpoint, in float32: `load(folder)` reads it
    best/                                         the same of the checkpoint that predicted the held-out text best
    log.jsonl                                     a row per step
    run/settings.json                             the settings of the run
    run/ids.npy, run/documents.npy                the data as ids
    run/lock                                      held by the process that trains
    run/state.safetensors                         parameters, both moments and all counters, with a checksum

Every file is written under a temporary name and renamed: a full disk or a power cut leaves the last checkpoint intact.
"""

from __future__ import annotations

import errno
import json
import math
import os
import shutil
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from weakref import WeakValueDictionary

import numpy as np

from ..errors import FileError, ModelFormatError
from ..files.safetensors_file import open_safetensors, read_json, write_safetensors
from .optimizer import AdamW

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None  # type: ignore[assignment]

STATE, SETTINGS, LOG = "run/state.safetensors", "run/settings.json", "log.jsonl"
ARRAYS = ("weights", "means", "squares")


class RunError(FileError):
    """A folder that a run cannot be written to or resumed from."""


@dataclass
class Counters:
    """How far a run has come."""

    step: int = 0
    tokens: int = 0  # predicted so far
    cursor: int = 0  # windows handed out so far
    updates: int = 0  # steps that changed the parameters
    skipped: int = 0  # the last steps in a row that did not
    best: float = math.inf  # the lowest loss on the held-out text


def refuse_occupied(folder: Path) -> None:
    """Raise RunError if the folder of a new run is not empty."""
    if (folder / SETTINGS).exists():
        raise RunError(folder, "holds another run", "resume it with --resume, or name a folder that is not there yet")
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise RunError(folder, "exists already and is no run", "name a folder that is not there yet")


class Lock:
    """The lock of a run's folder: held while a run of this process has it, or until the process ends."""

    def __init__(self, file: int) -> None:
        self.file = file

    def __del__(self) -> None:
        """The system drops a process's locks of a file when the process closes it."""
        os.close(self.file)


_HELD: WeakValueDictionary[Path, Lock] = WeakValueDictionary()


def hold(folder: Path) -> Lock | None:
    """Keep other processes from training in this folder. RunError where one does; None where there are no locks."""
    path = (folder / "run/lock").resolve()
    if path in _HELD or fcntl is None:
        return _HELD.get(path)
    lock = Lock(os.open(path, os.O_RDWR | os.O_CREAT, 0o666))
    try:
        fcntl.lockf(lock.file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        if error.errno not in (errno.EACCES, errno.EAGAIN):
            return None  # a file system without locks
        raise RunError(folder, "is being trained in by another process", "wait for its end, or stop it") from None
    _HELD[path] = lock
    return lock


@contextmanager
def beginning(folder: Path) -> Iterator[Lock | None]:
    """Make the folder of a new run; if the run cannot start, remove its content again."""
    existed = folder.exists()
    folder.mkdir(parents=True, exist_ok=True)
    try:
        (folder / "run").mkdir()
    except FileExistsError:  # another run began here a moment ago
        refuse_occupied(folder)
    try:
        yield hold(folder)
    except BaseException:
        for path in list(folder.iterdir()) if existed else []:
            shutil.rmtree(path) if path.is_dir() else path.unlink()
        if not existed:
            shutil.rmtree(folder, ignore_errors=True)
        raise


def write_json(path: Path, content: dict[str, Any]) -> None:
    """Write a JSON file in one step."""
    with replacing(path) as new:
        new.write_text(json.dumps(content, indent=2) + "\n", "utf-8")


def read_settings(folder: Path) -> dict[str, Any]:
    """The settings of a run. RunError if the folder holds no run."""
    if not (folder / SETTINGS).exists():
        raise RunError(folder, "holds no run that could be resumed", "begin one without --resume")
    return read_json(folder / SETTINGS)


def damaged(folder: Path, error: Exception) -> RunError:
    """The error of settings that no run has written."""
    return RunError(folder / SETTINGS, f"is damaged ({error})", "start a new run")


def save_state(folder: Path, adam: AdamW, counters: Counters) -> None:
    """Write the checkpoint. After an OSError the previous one is still there."""
    parts = _parts(adam, counters)
    parts["checksum"] = np.array([_checksum(parts)], np.int64)
    kinds = {np.dtype(np.float32): "F32", np.dtype(np.float64): "F64", np.dtype(np.int64): "I64"}
    entries = [(name, kinds[part.dtype], part.shape) for name, part in parts.items()]
    with replacing(folder / STATE) as new:
        write_safetensors(new, entries, ([part] for part in parts.values()))


def load_state(folder: Path, adam: AdamW) -> Counters:
    """Read the checkpoint into `adam`. RunError if it is missing, damaged or of another model."""
    path, again = folder / STATE, "its run cannot go on; the model of its last checkpoint may still load"
    try:
        tensors = {name: tensor.array for name, tensor in open_safetensors(path).items()}
    except ModelFormatError as error:
        raise RunError(path, error.problem, again) from None
    wanted = {name: part.shape for name, part in _parts(adam, Counters()).items()} | {"checksum": (1,)}
    if {name: array.shape for name, array in tensors.items()} != wanted:
        raise RunError(path, "is the checkpoint of another model", again)
    if int(tensors.pop("checksum")[0]) != _checksum(tensors):
        raise RunError(path, "is damaged: its checksum is another", again)
    for name in ARRAYS:
        getattr(adam, name)[...] = tensors[name]
    step, tokens, cursor, adam.updates, skipped = tensors["counters"].tolist()
    return Counters(step, tokens, cursor, adam.updates, skipped, float(tensors["best"][0]))


def keep_log(folder: Path, step: int) -> None:
    """Drop the rows of the log that came after the checkpoint of `step`: they are run again."""
    path = folder / LOG
    rows = path.read_text("utf-8", "replace").splitlines() if path.exists() else []
    with replacing(path) as new:
        new.write_text("".join(f"{row}\n" for row in rows if _step_of(row) <= step), "utf-8")


def _step_of(row: str) -> float:
    try:
        return json.loads(row)["step"]
    except (ValueError, KeyError, TypeError):  # cut off by what ended the run
        return math.inf


def _parts(adam: AdamW, counters: Counters) -> dict[str, np.ndarray]:
    parts: dict[str, np.ndarray] = {name: getattr(adam, name) for name in ARRAYS}
    c = counters
    parts["counters"] = np.array([c.step, c.tokens, c.cursor, c.updates, c.skipped], np.int64)
    parts["best"] = np.array([c.best], np.float64)
    return parts


def _checksum(parts: dict[str, np.ndarray]) -> int:
    total = 0
    for name in (*ARRAYS, "counters", "best"):
        total = zlib.crc32(np.ascontiguousarray(parts[name]).data, total)
    return total


@contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """Yields a temporary path to write to; it is renamed to `path` at the end, or removed after an error."""
    new = path.with_name(f"{path.name}.partial")
    try:
        with naming(path):
            yield new
            os.replace(new, path)
    finally:
        new.unlink(missing_ok=True)


@contextmanager
def naming(path: Path) -> Iterator[None]:
    """Adds the file's name to an OSError, which a failed write lacks."""
    try:
        yield
    except OSError as error:
        error.filename = error.filename or str(path)
        raise
