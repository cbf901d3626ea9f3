"""The letters and dtypes that every file of minigemma uses, said once.

A sequence is [T, D]; there is no batch axis.

    T  tokens (queries)         S  keys                    D  model width        V  vocabulary
    N  query heads              K  key/value heads         G  N / K              H  head dim
    F  feed-forward width       W  window                  E  recurrent width    P  patches
    R  rows of a weight (its outputs; a weight is [R, D])

Names follow Google's own code: T S N K G H D V as in the einsums of its Gemma, E as in its RecurrentGemma.

NumPy and Numba have no bfloat16: a bf16 array is kept as uint16, the upper half of the float32 of the same value, so
that widening is a shift and every bit pattern of the file stays where it is.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from threading import Lock

import numpy as np
from numpy.typing import NDArray

F32 = NDArray[np.float32]
U8 = NDArray[np.uint8]
U16 = NDArray[np.uint16]
I32 = NDArray[np.int32]
Bool = NDArray[np.bool_]


def widen_bf16(x: U16 | F32) -> F32:
    """bf16 → float32, exact: the 16 bits become the upper half of 32. float32 comes back as it is."""
    if x.dtype == np.float32:
        return x  # type: ignore[return-value]
    return (x.astype(np.uint32) << 16).view(np.float32)


def round_bf16(x: F32) -> U16:
    """float32 → bf16, to nearest, ties to even; NaN stays NaN."""
    bits = np.ascontiguousarray(x, np.float32).view(np.uint32)
    rounded = bits >> 16
    rounded &= 1  # in place: as many temporary arrays would take longer than what is done with them
    rounded += 0x7FFF
    rounded += bits
    rounded >>= 16
    nan = np.isnan(x)
    if nan.any():
        rounded[nan] = 0x7FC0
    return rounded.astype(np.uint16)


def aligned(size: int, dtype: type) -> NDArray:
    """An empty array [size] that begins on a cache line, so that no vector in it lies on two."""
    room = np.empty(size * np.dtype(dtype).itemsize + 64, np.uint8)
    first = -room.ctypes.data % 64
    return room[first : first + room.size - 64].view(dtype)


@dataclass(frozen=True, eq=False)
class Strings:
    """Byte strings, joined: a list of a quarter of a million would take longer to make than its use."""

    joined: U8
    lengths: NDArray[np.int64]

    @classmethod
    def of(cls, strings: Sequence[bytes]) -> Strings:
        """These strings."""
        return cls(np.frombuffer(b"".join(strings), np.uint8), np.fromiter(map(len, strings), np.int64, len(strings)))

    def __len__(self) -> int:
        return len(self.lengths)

    @cached_property
    def starts(self) -> NDArray[np.int64]:
        """Where each begins."""
        return np.cumsum(self.lengths) - self.lengths

    def __getitem__(self, i: int) -> bytes:
        start = self.starts[i]  # an IndexError beyond the last, which ends a loop
        return self.joined[start : start + self.lengths[i]].tobytes()


def letters(lengths: NDArray[np.int64], head: int) -> Bool:
    """Which bytes are of strings of these lengths, that lie one after the other, each with `head` bytes before it."""
    runs = np.full((len(lengths), 2), head)
    runs[:, 1] = lengths
    return np.repeat(np.tile([False, True], len(lengths)), runs.ravel())


class LargePages:
    """Room for small arrays in few large allocations, from which on NumPy has Linux use pages of 2 MB.

    A core looks up where each page lies. Of 4 KB a layer's weights have hundreds, more than it can remember from one
    token to the next.
    """

    ALLOCATION = 1 << 25  # bytes
    LARGE = 1 << 22  # bytes: NumPy asks for large pages from here on

    def __init__(self) -> None:
        self._room, self._lock = np.empty(0, np.uint8), Lock()

    def hold(self, x: NDArray) -> NDArray:
        """A copy of x there; x itself if it is large or empty. Threads may call at once."""
        size = -(-x.nbytes // 64) * 64
        if not 0 < size < self.LARGE:
            return x
        with self._lock:
            if size > len(self._room):
                self._room = aligned(self.ALLOCATION, np.uint8)
            place, self._room = self._room[: x.nbytes], self._room[size:]
        held = place.view(x.dtype).reshape(x.shape)
        held[...] = x
        return held


def read_only(x: NDArray) -> NDArray:
    """The same array, locked: nobody can damage a model, and Numba compiles a kernel for one kind of array, not two."""
    x.setflags(write=False)
    return x
