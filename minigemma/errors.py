"""The errors of bad files: a model's, and an image's."""

from __future__ import annotations

from pathlib import Path
from typing import Any


class FileError(ValueError):
    """A file that cannot be used: which one, what is wrong with it, and what to do.

    `str()` of it is the one line that the command line prints:  path: problem; remedy
    """

    def __init__(self, path: str | Path, problem: str, remedy: str = "") -> None:
        self.path, self.problem, self.remedy = str(path), problem, remedy
        super().__init__(f"{self.path}: {problem}" + (f"; {remedy}" if remedy else ""))


class ModelFormatError(FileError):
    """A model file that cannot be used."""


class ImageError(FileError):
    """An image file that cannot be shown to a model."""


def no_vision(name: str, images: int) -> ValueError:
    """The error for `images` images given to the model `name`, which sees none; the caller raises it.

    >>> no_vision("gemma-3-1b", 2)
    ValueError('gemma-3-1b has no vision tower, but 2 images were given; use gemma-3-4b or larger')
    """
    given = "1 image was given" if images == 1 else f"{images} images were given"
    return ValueError(f"{name or 'this model'} has no vision tower, but {given}; use gemma-3-4b or larger")


def check_type(name: str, value: Any, kind: type | tuple[type, ...], remedy: str) -> None:
    """Raises ValueError if an argument that is given (not None) is of another type."""
    if value is not None and not isinstance(value, kind):
        raise ValueError(f"{name} is of type {type(value).__name__}; give {remedy}")
