"""The state of a sequence, one per layer: keys and values, or a recurrent state.

The caller holds the cache; a model has no state. `position` counts the tokens in it. A forward pass overwrites only
what no later token needs, and `position` moves once, when all layers are done: an interrupted pass leaves the cache as
it was.

Several sequences that decode together keep a cache each (`each_sequence`).

The ring of a local layer has one slot per key of its window; position p goes to slot p mod window. The ring of a global
layer is as long as the context and never wraps. Both begin small and double up to their full size.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property, lru_cache, partial
from itertools import pairwise
from pathlib import Path
from typing import Any, NamedTuple, TypeVar
from zlib import crc32

import numpy as np
from numpy.typing import NDArray

from .arrays import F32, I32, U16, own_pages, read_only, round_bf16
from .errors import check_type

FIRST_SLOTS = 256


@lru_cache(maxsize=64)  # of sixteen sequences, local and global layers
def _slot_positions(count: int, slots: int) -> I32:
    """The position that each slot holds after `count` tokens: the last one that is its number modulo `slots`."""
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
    """Positions of the tokens of one pass, in their sequence or each in a sequence of its own."""

    positions: I32  # [T], rising by 1 in one sequence
    last_visible: I32  # [T]: the last position that each may see; `positions` itself without images
    outputs: int  # the number of last tokens whose output is used: all, if another layer follows
    starts: tuple[int, ...] = ()  # where sequences begin that lie one after the other; empty: the tokens are of one

    @cached_property
    def first(self) -> int:
        """Position of the first token."""
        return int(self.positions[0])

    def last(self, x: NDArray) -> NDArray:
        """The rows of x [T, …] that belong to the last `outputs` tokens."""
        return x[len(x) - self.outputs :]

    @cached_property
    def sequences(self) -> list[tuple[slice, TokenPositions]]:
        """Each sequence: where it lies among the tokens, and its own positions. Nothing is seen across a start."""
        if not self.starts:
            return [(slice(None), self)]
        places = [slice(*each) for each in pairwise((*self.starts, len(self.positions)))]
        return [(at, TokenPositions(self.positions[at], self.last_visible[at], at.stop - at.start)) for at in places]


class KeyValueRing:
    """Keys and values of one layer, [slots, K, H] each, float32 or bf16 (as uint16)."""

    def __init__(self, limit: int, kv_heads: int, head_dim: int, dtype: type) -> None:
        self.limit = limit
        shape = min(limit, FIRST_SLOTS), kv_heads, head_dim
        self.keys, self.values = own_pages(shape, dtype), own_pages(shape, dtype)
        self._pending: tuple[NDArray, NDArray, int] | None = None  # keys, values, and the tokens once they are stored

    @property
    def nbytes(self) -> int:
        """Bytes of keys and values."""
        return self.keys.nbytes + self.values.nbytes

    def extend(self, keys: F32, values: F32, position: int) -> tuple[F32 | U16, F32 | U16, I32]:
        """Take in the keys and values [T, K, H] of the tokens from `position` on.

        Returns the keys and values [S, K, H] as stored that those tokens attend to, and their positions [S] int32.
        Before `commit` nothing is overwritten that a repeated call would need.
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
        self._pending = keys, values, count
        before = np.arange(max(0, position - self.limit + 1), position)  # visible to the first new token
        slots = before % self.limit
        together = [np.concatenate([a[slots], b]) for a, b in ((self.keys, keys), (self.values, values))]
        return together[0], together[1], np.arange(count - len(together[0]), count, dtype=np.int32)

    def reserve(self, count: int) -> None:
        """Allocate the slots of `count` tokens, for kernels that write into them."""
        self._grow(min(count, self.limit))

    def skip_to(self, position: int) -> None:
        """Fill it with meaningless keys and values, up to `position` tokens."""
        self._grow(min(position, self.limit))
        for array in (self.keys, self.values):
            # 1/128 in bf16 or float32. Zeros would not do: Linux allocates such pages only when they are written.
            array.fill(0x3C00 if array.dtype == np.uint16 else 2**-7)

    def commit(self, count: int) -> None:
        """Store the tokens that `extend` held back: those up to `count`, of which the last `limit` stay."""
        if self._pending is not None and self._pending[2] == count:  # else they are of an interrupted pass
            keys, values = (a[-self.limit :] for a in self._pending[:2])
            slots = np.arange(count - len(keys), count) % self.limit
            self.keys[slots], self.values[slots] = keys, values
        self._pending = None

    def _grow(self, slots: int) -> None:
        if slots > len(self.keys):
            self.keys, self.values = self._copies(min(self.limit, max(slots, 2 * len(self.keys))))

    def _copies(self, slots: int) -> list[NDArray]:
        """Keys and values again, with room for as many slots or more."""
        copies = []
        for old in (self.keys, self.values):
            new = own_pages((slots, *old.shape[1:]), old.dtype.type)
            new[: len(old)] = old
            copies.append(new)
        return copies

    def overwritten(self, position: int, tokens: int) -> tuple[NDArray, ...]:
        """Copies of the keys and values that the tokens from `position` on will overwrite; () while none are."""
        if position + tokens <= self.limit:
            return ()
        self._grow(self.limit)
        slots = np.arange(position, position + tokens) % self.limit
        return self.keys[slots], self.values[slots]

    def rewind(self, mark: Mark, position: int, overwritten: tuple[NDArray, ...]) -> None:
        """Restore what the tokens from `position` on have overwritten."""
        self._pending, first = None, position - mark.position
        for array, old in zip((self.keys, self.values), overwritten, strict=bool(overwritten)):
            array[np.arange(position, mark.position + len(old)) % self.limit] = old[first:]

    def stored(self, position: int) -> dict[str, NDArray]:
        """What a file keeps of it after `position` tokens: views of keys and values, [min(position, limit), K, H]."""
        count = min(position, self.limit)
        self._grow(count)
        return {"keys": self.keys[:count], "values": self.values[:count]}

    def copy(self) -> KeyValueRing:
        """An independent ring with the same contents."""
        other = object.__new__(KeyValueRing)
        other.limit, other._pending = self.limit, None
        other.keys, other.values = self._copies(len(self.keys))
        return other


class RecurrentState:
    """The state of one recurrent layer, float32: h [E], and the last inputs of its convolution, [C - 1, E]."""

    def __init__(self, conv_width: int, lru_width: int) -> None:
        self.tail: F32 = np.zeros((conv_width - 1, lru_width), np.float32)
        self.h: F32 = np.zeros(lru_width, np.float32)
        self._pending: tuple[F32, F32] | None = None

    @property
    def nbytes(self) -> int:
        """Bytes of both; it never grows."""
        return self.tail.nbytes + self.h.nbytes

    def read(self) -> tuple[F32, F32]:
        """(tail, h) after the token before."""
        return self.tail, self.h

    def propose(self, tail: F32, h: F32) -> None:
        """Set what both become once all layers are done."""
        self._pending = tail.copy(), h.copy()

    def skip_to(self, position: int) -> None:
        """Nothing: a state has the same size at every position."""

    def commit(self, count: int) -> None:
        """Take over what was proposed; all layers are done."""
        if self._pending is not None:
            self.tail, self.h = self._pending
            self._pending = None

    def overwritten(self, position: int, tokens: int) -> tuple[NDArray, ...]:
        """Both arrays: what comes after them has arrays of its own."""
        return self.tail, self.h

    def rewind(self, mark: Mark, position: int, overwritten: tuple[NDArray, ...]) -> None:
        """Restore the state at the mark, to which `Cache.rewind` then goes back."""
        self._pending, (self.tail, self.h) = None, overwritten

    def stored(self, position: int) -> dict[str, NDArray]:
        """What a file keeps of it: both arrays themselves."""
        return {"tail": self.tail, "h": self.h}

    def copy(self) -> RecurrentState:
        """An independent state with the same contents."""
        other = RecurrentState(len(self.tail) + 1, len(self.h))
        other.tail, other.h = self.tail.copy(), self.h.copy()
        return other


class Mark(NamedTuple):
    """What `Cache.rewind` needs in order to go back: a position, and what the tokens from there on overwrite."""

    position: int
    layers: tuple[tuple[NDArray, ...], ...]


LayerState = KeyValueRing | RecurrentState
Rings = KeyValueRing | tuple[KeyValueRing, ...]  # of one sequence, or of each that decodes together with others
States = RecurrentState | tuple[RecurrentState, ...]
AnyState = TypeVar("AnyState", KeyValueRing, RecurrentState)


def each_sequence(
    state: AnyState | tuple[AnyState, ...], tokens: TokenPositions
) -> list[tuple[slice, AnyState, TokenPositions]]:
    """(its rows of x, its state, its tokens) of each sequence of a pass; a state that is no tuple serves them all."""
    states = state if isinstance(state, tuple) else (state,) * len(tokens.sequences)
    return [(at, own, its) for own, (at, its) in zip(states, tokens.sequences, strict=True)]


def checksum(tensors: Mapping[str, NDArray]) -> int:
    """CRC-32 of arrays one after the other, in the order of their names."""
    crc = 0
    for name in sorted(tensors):
        crc = crc32(np.ascontiguousarray(tensors[name]).reshape(-1).view(np.uint8).data, crc)
    return crc


class Cache:
    """The state of one sequence: that of each layer, and the number of tokens in them."""

    notes: str = ""  # a text of the caller's, which a file keeps too

    def __init__(self, layers: tuple[LayerState, ...], max_tokens: int, fingerprint: Callable[[], str] = str) -> None:
        self.layers = layers
        self.max_tokens = max_tokens
        self.fingerprint = fingerprint  # of the model that it belongs to
        self.position = 0
        self._ids: I32 = np.zeros(0, np.int32)
        self._moving_to: int | None = None

    def __repr__(self) -> str:
        """How full it is."""
        return f"<Cache: {self.position:,} of {self.max_tokens:,} tokens, {self.nbytes:,} bytes>"

    def __getstate__(self) -> dict[str, Any]:
        """For pickle and copy: the model's fingerprint takes the place of the model."""
        return {**self.__dict__, "fingerprint": partial(str, self.fingerprint())}

    @property
    def nbytes(self) -> int:
        """Bytes of all layers' state."""
        return sum(layer.nbytes for layer in self.layers)

    @property
    def ids(self) -> I32:
        """The tokens in it, [position], read-only; those of an image are its placeholders."""
        return read_only(self._ids[: self.position])

    def advance(self, ids: Sequence[int] | NDArray) -> None:
        """Store more tokens, which all layers are done with. If interrupted, `settle` finishes it."""
        self._grow(self.position + len(ids))
        self._ids[self.position : self.position + len(ids)] = ids
        self._moving_to = self.position + len(ids)
        self.settle()

    def _grow(self, tokens: int) -> None:
        if tokens > len(self._ids):
            larger = np.zeros(max(tokens, 2 * len(self._ids)), np.int32)
            larger[: len(self._ids)] = self._ids
            self._ids = larger

    def mark(self, tokens: int) -> Mark:
        """What to keep in order to take back any of the next `tokens` tokens, of which a ring must hold all."""
        self.settle()
        return Mark(self.position, tuple(layer.overwritten(self.position, tokens) for layer in self.layers))

    def rewind(self, mark: Mark, position: int) -> None:
        """Go back to `position`, after the mark; with a recurrent state, which has no earlier ones, to the mark itself.

        The tokens between are then to be read again.
        """
        self.settle()
        if any(isinstance(layer, RecurrentState) for layer in self.layers):
            position = mark.position
        for layer, overwritten in zip(self.layers, mark.layers, strict=True):
            layer.rewind(mark, position, overwritten)
        self.position = position

    @property
    def stored(self) -> dict[str, NDArray]:
        """What a file keeps of it, by name: views of the layers' arrays, and the tokens."""
        layers = {f"layers.{i}": layer.stored(self.position) for i, layer in enumerate(self.layers)}
        named = {f"{layer}.{name}": array for layer, found in layers.items() for name, array in found.items()}
        return {"ids": self.ids, **named}

    def save(self, path: str | Path) -> None:
        """Write it as a safetensors file for `load_cache`, whole or not at all; raises OSError.

        Tensors: "ids" [T] int32; of each layer "keys" and "values" [S, K, H], bf16 as uint16, or "tail" and "h"; and
        "about", JSON with the model's fingerprint, the caller's notes, and a checksum of the other tensors.
        """
        from safetensors.numpy import save

        check_type("path", path, (str, Path), "the path of a file", optional=False)
        self.settle()
        path, tensors = Path(path), {name: np.ascontiguousarray(array) for name, array in self.stored.items()}
        about = {"version": 1, "model": self.fingerprint(), "checksum": checksum(tensors), "notes": self.notes}
        tensors["about"] = np.frombuffer(json.dumps(about).encode(), np.uint8)
        new = path.with_name(f"{path.name}.partial")
        try:
            new.write_bytes(save(tensors))
            new.replace(path)
        except OSError:
            new.unlink(missing_ok=True)
            raise

    def skip_to(self, position: int) -> None:
        """Move to `position` without reading any tokens, to measure what a token costs there."""
        if not self.position <= position <= self.max_tokens:
            raise ValueError(f"position {position} is not within {self.position} … {self.max_tokens}")
        for layer in self.layers:
            layer.skip_to(position)
        self._grow(position)
        self.position = position

    def settle(self) -> None:
        """Finish an `advance` that was interrupted half-way; else nothing."""
        if self._moving_to is not None:
            for layer in self.layers:
                layer.commit(self._moving_to)
            self.position = self._moving_to
            self._moving_to = None

    def can_copy(self, tokens: int) -> bool:
        """Can `copy` keep the first `tokens` alone? Not with a recurrent state, nor once a ring has wrapped."""
        self.settle()
        whole = all(isinstance(each, KeyValueRing) and self.position <= each.limit for each in self.layers)
        return tokens == self.position or (whole and 0 < tokens < self.position)

    def copy(self, tokens: int | None = None) -> Cache:
        """An independent cache with the same contents, so that one prompt can have several continuations.

        tokens: how many it keeps, from the first; None: all. Raises ValueError where `can_copy` says no.
        """
        check_type("tokens", tokens, (int, np.integer), "an integer")
        if tokens is not None and not self.can_copy(tokens):
            raise ValueError(f"the cache at position {self.position} cannot be cut to its first {tokens} tokens")
        self.settle()
        other = Cache(tuple(layer.copy() for layer in self.layers), self.max_tokens, self.fingerprint)
        other.position = self.position if tokens is None else tokens
        other.notes, other._ids = self.notes, self._ids[: other.position].copy()
        return other
