"""The errors of bad files: a model's, and an image's."""

from __future__ import annotations

from numbers import Integral, Real
from pathlib import Path
from typing import Any, get_type_hints

PLAIN = {int: (Integral, "an integer"), float: (Real, "a number"), str: (str, "a text")}


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


def check_type(name: str, value: Any, kind: Any, remedy: str, optional: bool = True) -> None:
    """Raises ValueError for an argument of another type, but None where it is `optional`; True is no number."""
    if value is None and optional:
        return
    kinds = kind if isinstance(kind, tuple) else (kind,)
    if not isinstance(value, kinds) or (isinstance(value, bool) and bool not in kinds):
        raise ValueError(f"{name} is of type {type(value).__name__}; give {remedy}")


def check_fields(made: Any) -> None:
    """The same for the fields of a dataclass that are numbers or texts."""
    for name, hint in get_type_hints(type(made)).items():
        for kind, told in PLAIN.items():
            if hint in (kind, kind | None):
                check_type(name, getattr(made, name), *told, optional=hint != kind)
