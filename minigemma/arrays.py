"""The letters and dtypes that every file of minigemma uses.

A sequence is [T, D]; there is no batch axis.

    T  tokens (queries)         S  keys                    D  model width        V  vocabulary
    N  query heads              K  key/value heads         G  N / K              H  head dim
    F  feed-forward width       W  window                  E  recurrent width    P  patches
    R  rows of a weight (its outputs; a weight is [R, D])

Names follow Google's own code: T S N K G H D V as in the einsums of its Gemma, E as in its RecurrentGemma.

NumPy and Numba have no bfloat16: a bf16 array is kept as uint16, the upper half of the float32 of the same value.
Widening is a shift, and the bits of a file are used as they are.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from math import prod
from mmap import MAP_ANONYMOUS, MAP_PRIVATE, mmap
from threading import Lock

import numpy as np
from numpy.typing import NDArray

F32 = NDArray[np.float32]
U8 = NDArray[np.uint8]
U16 = NDArray[np.uint16]
I32 = NDArray[np.int32]
Bool = NDArray[np.bool_]


def widen_bf16(x: U16 | F32) -> F32:
    """bf16 → float32, exact: the 16 bits become the upper half of 32. float32 and float64 come back as they are."""
    if x.dtype in (np.float32, np.float64):
        return x  # type: ignore[return-value]
    return (x.astype(np.uint32) << 16).view(np.float32)


def round_bf16(x: F32) -> U16:
    """float32 → bf16, to nearest, ties to even; NaN stays NaN."""
    bits = np.ascontiguousarray(x, np.float32).view(np.uint32)
    rounded = bits >> 16
    rounded &= 1  # in place: temporary arrays would take longer than the arithmetic
    rounded += 0x7FFF
    rounded += bits
    rounded >>= 16
    nan = np.isnan(x)
    if nan.any():
        rounded[nan] = 0x7FC0
    return rounded.astype(np.uint16)


def joined(parts: Sequence[NDArray]) -> NDArray:
    """The parts one after the other; a single part as it is."""
    return parts[0] if len(parts) == 1 else np.concatenate(parts)


def aligned(size: int, dtype: type) -> NDArray:
    """An uninitialized array [size] that begins on a cache line, so that no vector in it crosses one."""
    room = np.empty(size * np.dtype(dtype).itemsize + 64, np.uint8)
    first = -room.ctypes.data % 64
    return room[first : first + room.size - 64].view(dtype)


def own_pages(shape: tuple[int, ...], dtype: type) -> NDArray:
    """Zeros in pages of their own if they are large, which go back to the system with the array.

    What lives long among what does not leaves holes: a server's memory would grow for hours. Raises MemoryError.
    """
    size = prod(shape) * np.dtype(dtype).itemsize
    if size < 1 << 16:
        return np.zeros(shape, dtype)
    try:
        return np.frombuffer(mmap(-1, size, MAP_PRIVATE | MAP_ANONYMOUS), dtype).reshape(shape)
    except OSError:
        raise MemoryError(f"{size:,} bytes of keys and values cannot be had") from None


@dataclass(frozen=True, eq=False)
class Strings:
    """Byte strings in one array: a list of a vocabulary's 262,144 takes longer to make than its use takes."""

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
        """Where each string begins."""
        return np.cumsum(self.lengths) - self.lengths

    def __getitem__(self, i: int) -> bytes:
        start = self.starts[i]  # raises IndexError past the last one, which ends a loop
        return self.joined[start : start + self.lengths[i]].tobytes()


def letters(lengths: NDArray[np.int64], head: int) -> Bool:
    """Which bytes belong to strings of these lengths, stored one after the other, each after `head` other bytes."""
    runs = np.full((len(lengths), 2), head)
    runs[:, 1] = lengths
    return np.repeat(np.tile([False, True], len(lengths)), runs.ravel())


class LargePages:
    """Stores small arrays in few large allocations, for which NumPy has Linux use pages of 2 MB.

    A layer's weights cover hundreds of pages of 4 KB, more than a core's TLB holds from one token to the next.
    """

    ALLOCATION = 1 << 25  # bytes
    LARGE = 1 << 22  # bytes: NumPy asks for large pages from this size on

    def __init__(self) -> None:
        self._room, self._lock = np.empty(0, np.uint8), Lock()

    def hold(self, x: NDArray) -> NDArray:
        """A copy of x in such an allocation; x itself if it is large or empty. Thread-safe."""
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
    """Makes the array read-only: a model cannot be damaged, and Numba compiles a kernel for one array type, not two."""
    x.setflags(write=False)
    return x
