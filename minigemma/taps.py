"""Named values of a forward pass, kept for inspection or changed.

    taps = Taps("blocks.*.attention.probs", "logits")
    model.forward(ids, taps=taps)
    taps["blocks.5.attention.probs"]              # [N, T, S] float32

    def silence(heads, name):                     # heads 2 and 3 write nothing
        heads[:, 2:4] = 0
        return heads
    model.forward(ids, taps=Edits({"blocks.5.attention.heads": silence}))

A model names a value on the line that computes it, and continues with what the call returns:

    x = taps("residual.out", x + h)

Taps return the value itself, Edits may return another. Without patterns that line costs one attribute lookup.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from difflib import get_close_matches
from fnmatch import fnmatchcase

import numpy as np
from numpy.typing import NDArray


class Taps(dict[str, NDArray]):
    """Values by name, filled by `model.forward(…, taps=…)`: those whose names match one of the glob patterns."""

    def __init__(self, *patterns: str) -> None:
        super().__init__()
        for pattern in patterns:
            if not isinstance(pattern, str):
                raise ValueError(f"a pattern of values is {pattern!r}; it must be a text, as 'blocks.*.residual.out'")
        self.patterns = patterns
        self._offered: set[str] = set()  # all names that a run has come across

    def wants(self, name: str) -> bool:
        """Does a pattern match `name`? Models ask before they compute a value only for a tap."""
        self._offered.add(name)
        return any(fnmatchcase(name, pattern) for pattern in self.patterns)

    def check(self, *later: str) -> None:
        """Raise ValueError for a pattern that no value so far and no name `later` matches, with the nearest names."""
        names = self._offered.union(later)
        for pattern in self.patterns:
            if not any(fnmatchcase(name, pattern) for name in names):
                near = get_close_matches(pattern, names, n=3, cutoff=0)
                raise ValueError(f"no value of this run is named {pattern!r}; the nearest are {', '.join(near)}")

    def within(self, prefix: str) -> Scope:
        """The same taps for a part of the model, whose names begin with `prefix` and a dot."""
        return Scope(self, prefix)

    def __call__(self, name: str, value: NDArray) -> NDArray:
        """Keeps a copy of `value` if a pattern matches `name`; returns it unchanged."""
        if self.patterns and self.wants(name):
            self[name] = np.array(value)
        return value


class Edits(Taps):
    """Functions that change values of a run: `f(value, name)` returns what the model continues with.

    functions   by the name of a value or a glob pattern; where several match they apply in order. Each gets a copy of
                the value, float32 with one row per token of the call, and returns an array of the same shape
    kept        patterns of values to keep as Taps do, after the change
    """

    def __init__(self, functions: Mapping[str, Callable[[NDArray, str], NDArray]], *kept: str) -> None:
        if not isinstance(functions, Mapping) or not all(map(callable, functions.values())):
            raise ValueError("edits are a table of functions by name, as {'blocks.0.residual.out': function}")
        super().__init__(*functions, *kept)
        self.functions, self.kept = dict(functions), Taps(*kept)

    def __call__(self, name: str, value: NDArray) -> NDArray:
        """The value after each function whose pattern matches `name`; ValueError if one returns another shape."""
        if not self.wants(name):
            return value
        for pattern, function in self.functions.items():
            if fnmatchcase(name, pattern):
                changed = function(np.array(value), name)
                array = isinstance(changed, np.ndarray)
                if not array or changed.shape != value.shape or changed.dtype.kind != "f":
                    what = f"{changed.dtype} {list(changed.shape)}" if array else "no array"
                    raise ValueError(f"the edit of {name} returned {what}; it must return float32 {list(value.shape)}")
                value = np.ascontiguousarray(changed, value.dtype)
        if self.kept.patterns and self.kept.wants(name):
            self[name] = np.array(value)
        return value


class Kept(Taps):
    """What a training pass keeps for its gradient: every named value, as the array itself, no copy."""

    def __init__(self) -> None:
        super().__init__("*")

    def wants(self, name: str) -> bool:
        """No: nothing is computed only to be kept."""
        return False

    def __call__(self, name: str, value: NDArray) -> NDArray:
        """Keeps `value` and returns it."""
        self[name] = value
        return value


class Scope:
    """Taps for one part of a model: its names get a prefix."""

    def __init__(self, taps: Taps, prefix: str) -> None:
        self.taps, self.prefix = taps, prefix

    def within(self, prefix: str) -> Scope:
        """The same taps for a smaller part."""
        return Scope(self.taps, f"{self.prefix}.{prefix}")

    def wants(self, name: str) -> bool:
        """Does a pattern match `name` with its prefix?"""
        return bool(self.taps.patterns) and self.taps.wants(f"{self.prefix}.{name}")

    def __call__(self, name: str, value: NDArray) -> NDArray:
        """What the taps return for `name` with its prefix."""
        return self.taps(f"{self.prefix}.{name}", value) if self.taps.patterns else value

    def __getitem__(self, name: str) -> NDArray:
        """The value kept by this name."""
        return self.taps[f"{self.prefix}.{name}"]


NO_TAPS = Taps()
