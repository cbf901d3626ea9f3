"""The one error of every bad model file."""

from __future__ import annotations

from pathlib import Path


class ModelFormatError(ValueError):
    """A model file that cannot be used: which one, what is wrong with it, and what to do.

    `str()` of it is the one line that the command line prints:  path: problem; remedy
    """

    def __init__(self, path: str | Path, problem: str, remedy: str = "") -> None:
        self.path, self.problem, self.remedy = str(path), problem, remedy
        super().__init__(f"{self.path}: {problem}" + (f"; {remedy}" if remedy else ""))
