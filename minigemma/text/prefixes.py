"""Texts that begin alike: what one has left in its cache is reused by the next.

A cache can always go on after its last token. It can be cut back only while no ring has wrapped, and never with a
recurrent state. So where two texts part beyond that, the second one leaves a copy of its cache at that place, and the
third goes on from there. Nothing is reused that is not what reading would give.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from ..cache import Cache

WORTH = 16  # tokens from which on reading them takes longer than a copy of a cache


class Kept(NamedTuple):
    """A cache, and what stands in it: token ids, and negative numbers that name an image instead of its tokens."""

    key: NDArray[np.int64]
    cache: Cache


class Found(NamedTuple):
    """A cache that holds the beginning of a text, or None; and how many tokens of it to keep a copy after, or 0."""

    cache: Cache | None
    fork: int


class Prefixes:
    """The latest caches of texts, `most` of them."""

    def __init__(self, most: int) -> None:
        self.most = most
        self.kept: list[Kept] = []  # in the order of their last use

    @property
    def nbytes(self) -> int:
        """Bytes of all caches."""
        return sum(each.cache.nbytes for each in self.kept)

    def keep(self, key: NDArray[np.int64], cache: Cache) -> None:
        """Keep a cache that nothing else will use, in place of those whose texts it can serve too."""
        cache.settle()
        new = Kept(key[: cache.position], cache)
        whole = [shared(old.key, new.key) == len(old.key) and cache.can_copy(len(old.key)) for old in self.kept]
        self.kept = [old for old, served in zip(self.kept, whole, strict=True) if not served]
        self.kept = [*self.kept, new][-self.most :] if self.most else []

    def find(self, key: NDArray[np.int64], running: Iterable[Kept] = ()) -> Found:
        """A copy of the cache that holds most of a text's beginning, of those kept and those of texts in the making.

        Its last token is never taken: reading it gives the first logits.
        """
        candidates = [*running, *self.kept]
        common = [min(shared(each.key, key), len(key) - 1) for each in candidates]
        usable = [n if n >= WORTH and each.cache.can_copy(n) else 0 for each, n in zip(candidates, common, strict=True)]
        most = max(usable, default=0)
        part = max(common, default=0)
        fork = part if part - most >= WORTH else 0
        if not most:
            return Found(None, fork)
        best = candidates[usable.index(most)]
        self.kept = [each for each in self.kept if each is not best] + [each for each in self.kept if each is best]
        return Found(best.cache.copy(most), fork)


def shared(a: NDArray[np.int64], b: NDArray[np.int64]) -> int:
    """How many numbers two keys have in common from the first on.

    >>> shared(np.array([2, 5, 7]), np.array([2, 5, 8, 9]))
    2
    """
    length = min(len(a), len(b))
    different = np.flatnonzero(a[:length] != b[:length])
    return int(different[0]) if len(different) else length


def key_of(ids: Sequence[int], runs: Sequence[tuple[int, int]], digests: Sequence[int]) -> NDArray[np.int64]:
    """The key of a text: its ids; in the place of each image's tokens, first … last - 1, its digest as a negative."""
    key = np.array(ids, np.int64)
    for (first, last), digest in zip(runs, digests, strict=True):
        key[first:last] = -1 - digest
    return key
