"""Named values of a forward pass, kept for inspection.

    taps = Taps("blocks.*.attention.probs", "logits")
    model.forward(ids, taps=taps)
    taps["blocks.5.attention.probs"]              # [N, T, S] float32

A model names a value on the line that computes it; the call returns it unchanged:

    x = taps("residual.out", x + h)

Without patterns that line costs one attribute lookup and keeps nothing.
"""

from __future__ import annotations

from difflib import get_close_matches
from fnmatch import fnmatchcase

import numpy as np
from numpy.typing import NDArray


class Taps(dict[str, NDArray]):
    """Values by name, filled by `model.forward(…, taps=…)`: those whose names match one of the glob patterns."""

    def __init__(self, *patterns: str) -> None:
        super().__init__()
        self.patterns = patterns
        self._offered: set[str] = set()  # all names that a run has come across

    def wants(self, name: str) -> bool:
        """Does a pattern match `name`? Models ask before they compute a value only for a tap."""
        self._offered.add(name)
        return any(fnmatchcase(name, pattern) for pattern in self.patterns)

    def check(self) -> None:
        """Raise ValueError for a pattern that no value of the run matched, with the nearest names."""
        for pattern in self.patterns:
            if not any(fnmatchcase(name, pattern) for name in self._offered):
                near = get_close_matches(pattern, self._offered, n=3, cutoff=0.3)
                raise ValueError(f"no value of this run is named {pattern!r}; the nearest are {', '.join(near)}")

    def within(self, prefix: str) -> Scope:
        """The same taps for a part of the model, whose names begin with `prefix` and a dot."""
        return Scope(self, prefix)

    def __call__(self, name: str, value: NDArray) -> NDArray:
        """Keeps a copy of `value` if a pattern matches `name`; returns it unchanged."""
        if self.patterns and self.wants(name):
            self[name] = np.array(value)
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
        """Keeps a copy of `value` if a pattern matches `name`; returns it unchanged."""
        return self.taps(f"{self.prefix}.{name}", value) if self.taps.patterns else value


NO_TAPS = Taps()
