"""The models on this machine: in the weights folders, in Hugging Face's cache, and the demo."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

from ..environment import cache_folder
from ..errors import ModelFormatError
from . import demo
from .load import Description, describe
from .resolve import cached, hub_cache, weights_folders


class Local(NamedTuple):
    """A model: its name for `load`, its file or folder, and its size on disk in bytes."""

    name: str
    path: Path
    size: int


def local_models() -> Iterator[Local]:
    """Yields every model; files that are not models are skipped."""
    for folder in dict.fromkeys(path.resolve() for path in weights_folders()):
        for path in sorted(folder.iterdir()) if folder.is_dir() else ():
            if path.suffix == ".gguf" or (path.is_dir() and any(_weights_in(path))):
                yield Local(path.name, path, _size(path))
    for name, path in cached():
        if any(_weights_in(path)):
            yield Local(name, path, _size(path))
    if (path := cache_folder() / demo.FILE).is_file():
        yield Local(demo.NAME, path, path.stat().st_size)


def what_it_is(model: Local) -> Description | str:
    """Its description, or why it cannot be used."""
    try:
        return describe(model.path if model.path.parent != hub_cache() else model.name)
    except ModelFormatError as error:
        return error.problem


def remove(model: Local) -> None:
    """Delete its files; of a link, the link alone. Raises OSError."""
    if model.path.is_dir() and not model.path.is_symlink():
        shutil.rmtree(model.path)
    else:
        model.path.unlink()


def _weights_in(folder: Path) -> Iterator[Path]:
    return (path for kind in ("safetensors", "gguf") for path in folder.rglob(f"*.{kind}"))


def _size(path: Path) -> int:
    """Bytes of a file or of all files in a folder; links within it point at files that are counted themselves."""
    if path.is_file():
        return path.stat().st_size
    names = (Path(at, name) for at, _, names in os.walk(path) for name in names)
    return sum(name.lstat().st_size for name in names)
