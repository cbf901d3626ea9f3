"""What a model remembers of the tokens before, each layer by itself: keys and values, or a recurrent state.

The caller holds the cache; a model has no state. `position` tokens are in it. A forward pass writes where no later
token needs what is overwritten, and moves `position` on once, when all layers are done: a pass that is interrupted
leaves the cache as it was.

A local layer's ring has exactly as many slots as its window shows keys, position p in slot p mod window. A global
layer's ring is as long as the context and so never wraps. Both begin small and double until they are full size.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import numpy as np
from numpy.typing import NDArray

from .arrays import F32, I32, U16, read_only, round_bf16

FIRST_SLOTS = 256


@lru_cache(maxsize=16)
def _slot_positions(count: int, slots: int) -> I32:
    """Which of the positions 0 … count - 1 each slot holds: the last one that is its number modulo `slots`."""
    if count <= slots:
        return _up_to(1 << count.bit_length())[:count]
    first = count - count % slots  # in slot 0
    return read_only(
        np.concatenate([np.arange(*each, dtype=np.int32) for each in ((first, count), (count - slots, first))])
    )


@lru_cache(maxsize=2)
def _up_to(count: int) -> I32:
    return read_only(np.arange(count, dtype=np.int32))


@dataclass(frozen=True)
class TokenPositions:
    """Where the tokens of one pass stand in their sequence."""

    positions: I32  # [T], rising by 1
    until: I32  # [T]: the last position that each may see, its own or that of its image's last token
    outputs: int  # so many of the last tokens' outputs are asked for: all, if another layer follows

    @property
    def first(self) -> int:
        """Position of the first of them."""
        return int(self.positions[0])

    def asked(self, x: NDArray) -> NDArray:
        """The rows of x [T, …] that belong to tokens whose outputs are asked for."""
        return x[len(x) - self.outputs :]


class KeyValueRing:
    """Keys and values of one layer, [slots, K, H] each, float32 or bf16 (as uint16)."""

    def __init__(self, limit: int, kv_heads: int, head_dim: int, dtype: type) -> None:
        self.limit = limit
        shape = min(limit, FIRST_SLOTS), kv_heads, head_dim
        self.keys: NDArray
        self.values: NDArray
        self._hold(np.zeros(shape, dtype), np.zeros(shape, dtype))
        self._pending: tuple[NDArray, NDArray] | None = None

    def __setstate__(self, state: dict[str, Any]) -> None:
        """A copy, or what was pickled, lies elsewhere."""
        self.__dict__.update(state)
        self._hold(self.keys, self.values)

    def _hold(self, keys: NDArray, values: NDArray) -> None:
        self.keys, self.values = keys, values
        # where both begin and how many numbers they are: asking an array takes longer than many a kernel does
        self.where = (keys.ctypes.data, keys.size), (values.ctypes.data, values.size)

    @property
    def nbytes(self) -> int:
        """Bytes of keys and values."""
        return self.keys.nbytes + self.values.nbytes

    def extend(self, keys: F32, values: F32, position: int) -> tuple[F32 | U16, F32 | U16, I32]:
        """Take in the keys and values [T, K, H] of the tokens from `position` on.

        Returns what those tokens attend to: keys, values [S, K, H] as stored, and their positions [S] int32. Nothing
        that a repeated call would need is overwritten before `commit`.
        """
        if self.keys.dtype == np.uint16:
            return self._extend(round_bf16(keys), round_bf16(values), position)
        return self._extend(keys, values, position)

    def _extend(self, keys: NDArray, values: NDArray, position: int) -> tuple[NDArray, NDArray, I32]:
        count, self._pending = position + len(keys), None
        self._grow(min(count, self.limit))
        if len(keys) == 1 or count <= self.limit:
            first = position % self.limit
            self.keys[first : first + len(keys)] = keys
            self.values[first : first + len(values)] = values
            filled = min(count, self.limit)
            return self.keys[:filled], self.values[:filled], _slot_positions(count, self.limit)
        self._pending = keys, values
        before = np.arange(max(0, position - self.limit + 1), position)  # what the first new token may still see
        slots = before % self.limit
        together = [np.concatenate([a[slots], b]) for a, b in ((self.keys, keys), (self.values, values))]
        return together[0], together[1], np.arange(count - len(together[0]), count, dtype=np.int32)

    def place(self, position: int, tokens: int) -> tuple[int, I32]:
        """For one token, or several after which the ring is not yet full: which slot is to be the first one's, and the
        positions [S] that the first S slots then hold.
        """
        self._pending = None
        self._grow(min(position + tokens, self.limit))
        return position % self.limit, _slot_positions(position + tokens, self.limit)

    @property
    def settled(self) -> bool:
        """Is nothing held back?"""
        return self._pending is None

    def skip_to(self, position: int) -> None:
        """Be as full as after `position` tokens, of keys and values that mean nothing."""
        self._grow(min(position, self.limit))
        for array in (self.keys, self.values):
            # 1/128, in bf16 or float32; not zeros, whose pages the system makes only when they are written to
            array.fill(0x3C00 if array.dtype == np.uint16 else 2**-7)

    def commit(self, count: int) -> None:
        """Put away what `extend` held back: the tokens up to `count`, of which the last `limit` stay."""
        if self._pending is None:
            return
        keys, values = (a[-self.limit :] for a in self._pending)
        slots = np.arange(count - len(keys), count) % self.limit
        self.keys[slots], self.values[slots] = keys, values
        self._pending = None

    def _grow(self, slots: int) -> None:
        if slots > len(self.keys):
            size = min(self.limit, max(slots, 2 * len(self.keys)))
            larger = [np.zeros((size, *old.shape[1:]), old.dtype) for old in (self.keys, self.values)]
            for new, old in zip(larger, (self.keys, self.values), strict=True):
                new[: len(old)] = old
            self._hold(*larger)

    def copy(self) -> KeyValueRing:
        """A ring of its own with the same contents."""
        other = object.__new__(KeyValueRing)
        other.limit, other._pending = self.limit, None
        other._hold(self.keys.copy(), self.values.copy())
        return other


class RecurrentState:
    """What one recurrent layer remembers, float32: h [E], and the last inputs of its convolution, [C - 1, E]."""

    def __init__(self, conv_width: int, lru_width: int) -> None:
        self.tail: F32 = np.zeros((conv_width - 1, lru_width), np.float32)
        self.h: F32 = np.zeros(lru_width, np.float32)
        self._pending: tuple[F32, F32] | None = None

    @property
    def nbytes(self) -> int:
        """Bytes of both; it never grows."""
        return self.tail.nbytes + self.h.nbytes

    def read(self) -> tuple[F32, F32]:
        """(tail, h) as they were left by the token before."""
        return self.tail, self.h

    def propose(self, tail: F32, h: F32) -> None:
        """What both will be once all layers are done."""
        self._pending = tail.copy(), h.copy()

    def skip_to(self, position: int) -> None:
        """A state is of one size at every position."""

    def commit(self, count: int) -> None:
        """All layers are done: what was proposed holds."""
        if self._pending is not None:
            self.tail, self.h = self._pending
            self._pending = None

    def copy(self) -> RecurrentState:
        """A state of its own with the same contents."""
        other = RecurrentState(len(self.tail) + 1, len(self.h))
        other.tail, other.h = self.tail.copy(), self.h.copy()
        return other


LayerState = KeyValueRing | RecurrentState


class Rings:
    """Rings as compiled code takes them, for a few tokens after the other: what does not change from one call to the
    next is not found out anew. Whoever holds one asks `follow`, and makes another where that is not so.
    """

    def __init__(self, rings: Sequence[KeyValueRing], position: int, tokens: int) -> None:
        placed = [ring.place(position, tokens) for ring in rings]  # here they grow
        self.table = np.empty((len(rings), 3, 2), np.int64)  # of keys, values and positions: address, numbers
        self.slots = np.empty(len(rings), np.int64)  # that of the first token in each
        self.like = rings[0].keys[:0].reshape(-1)  # an array of the keys' type
        self._held = [(ring, ring.where) for ring in rings]
        self._next, self._until = position, min(len(r.keys) if len(r.keys) < r.limit else 1 << 62 for r in rings)
        self._alike: list[tuple[int, list[int], I32]] = []  # rings of one length: limit, which, positions of all slots
        for limit, size in dict.fromkeys((ring.limit, len(ring.keys)) for ring in rings):
            which = [i for i, ring in enumerate(rings) if (ring.limit, len(ring.keys)) == (limit, size)]
            positions = np.arange(size, dtype=np.int32)
            positions[: len(placed[which[0]][1])] = placed[which[0]][1]
            self._alike.append((limit, which, positions))
            self.table[which, 2, 0] = positions.ctypes.data
        self.table[:, :2] = [ring.where for ring in rings]

    def follow(self, position: int, tokens: int) -> bool:
        """Is `position` the next, and is everything where it was? Then the table and the slots are made to be those of
        the tokens from there on.
        """
        if position != self._next or position + tokens > self._until:
            return False
        for ring, where in self._held:
            if ring.where is not where or not ring.settled:
                return False
        for limit, which, positions in self._alike:
            slot = position % limit
            positions[slot : slot + tokens] = range(position, position + tokens)
            self.slots[which], self.table[which, 2, 1] = slot, min(position + tokens, limit)
        self._next += tokens
        return True


class Cache:
    """The state of one sequence: that of each layer, and how many tokens they have seen."""

    def __init__(self, layers: tuple[LayerState, ...], max_tokens: int) -> None:
        self.layers = layers
        self.max_tokens = max_tokens
        self.position = 0
        self.rings: Rings | None = None  # what the last few tokens left for the next
        self._moving_to: int | None = None

    def __getstate__(self) -> dict[str, Any]:
        """For copies and pickles: all but addresses."""
        return self.__dict__ | {"rings": None}

    @property
    def nbytes(self) -> int:
        """Bytes of all layers' state."""
        return sum(layer.nbytes for layer in self.layers)

    def advance(self, tokens: int) -> None:
        """All layers are done with `tokens` more: put them away. Interrupted, it is finished by `settle`."""
        self._moving_to = self.position + tokens
        self.settle()

    def skip_to(self, position: int) -> None:
        """Stand at `position` without having read anything: for measuring what a token costs there."""
        if not self.position <= position <= self.max_tokens:
            raise ValueError(f"position {position} is not within {self.position} … {self.max_tokens}")
        for layer in self.layers:
            layer.skip_to(position)
        self.position = position

    def settle(self) -> None:
        """Finish an `advance` that was interrupted half-way; else nothing."""
        if self._moving_to is not None:
            for layer in self.layers:
                layer.commit(self._moving_to)
            self.position = self._moving_to
            self._moving_to = None

    def copy(self) -> Cache:
        """An independent cache with the same contents, so that one prompt can have several continuations."""
        self.settle()
        other = Cache(tuple(layer.copy() for layer in self.layers), self.max_tokens)
        other.position = self.position
        return other
