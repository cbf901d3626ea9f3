"""Reading GGUF, llama.cpp's one-file format: a map of the file, metadata, and one read-only view per tensor.

    "GGUF", version u32, tensor count u64, pair count u64                            all little-endian
    pairs     key string, type u32, value      string: length u64, bytes; array: element type u32, count u64, elements
    tensors   name string, axes u32, sizes u64 …, type u32, offset u64       sizes run from the innermost axis out
    padding to a multiple of `general.alignment` (32), then the tensors' data, each padded likewise

Every number in there may be wrong on purpose. Nothing is allocated, and no loop begun, for a count that the rest of the
file could not hold; each tensor must begin exactly where the one before it ends. All that stands before the tensors'
data may take 100 MB, so that a file of any size is opened, or refused, within seconds. Arrays (a vocabulary has 262,144
strings) are stepped over, and decoded when someone asks for them.
"""

from __future__ import annotations

import math
import mmap
import re
import struct
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ..arrays import F32, I32, Strings, letters
from ..errors import ModelFormatError
from ..kernels.compiler import jit
from .safetensors_file import DAMAGED, open_regular, short, unreadable

MAX_HEADER = 100_000_000  # bytes before the tensors' data; Gemma 3 270M has 6 million
MAX_ENTRIES = 100_000  # tensors, and pairs: the largest Gemma has about 1,300 tensors, and 270M 33 pairs
MAX_KEY = 65_535
MAX_AXES = 4
MAX_PARTS = 1000
MAX_PIECES = 1 << 20  # of a vocabulary, of which Gemma 3 has a quarter
MAX_ELEMENTS = 1 << 40

# Metadata types by number; strings are 8, arrays 9.
SCALARS = {0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "?", 10: "Q", 11: "q", 12: "d"}
STRING, ARRAY = 8, 9
U32 = 4

# Tensor types by number: name, weights in a block, bytes of a block.
TYPES = {
    0: ("F32", 1, 4),
    1: ("F16", 1, 2),
    2: ("Q4_0", 32, 18),
    3: ("Q4_1", 32, 20),
    6: ("Q5_0", 32, 22),
    7: ("Q5_1", 32, 24),
    8: ("Q8_0", 32, 34),
    10: ("Q2_K", 256, 84),
    11: ("Q3_K", 256, 110),
    12: ("Q4_K", 256, 144),
    13: ("Q5_K", 256, 176),
    14: ("Q6_K", 256, 210),
    16: ("IQ2_XXS", 256, 66),
    17: ("IQ2_XS", 256, 74),
    18: ("IQ3_XXS", 256, 98),
    19: ("IQ1_S", 256, 50),
    20: ("IQ4_NL", 32, 18),
    21: ("IQ3_S", 256, 110),
    22: ("IQ2_S", 256, 82),
    23: ("IQ4_XS", 256, 136),
    24: ("I8", 1, 1),
    25: ("I16", 1, 2),
    26: ("I32", 1, 4),
    27: ("I64", 1, 8),
    28: ("F64", 1, 8),
    29: ("IQ1_M", 256, 56),
    30: ("BF16", 1, 2),
    34: ("TQ1_0", 256, 54),
    35: ("TQ2_0", 256, 66),
    39: ("MXFP4", 32, 17),
}
PLAIN = {"F32": np.float32, "F16": np.float16, "BF16": np.uint16}


@dataclass(frozen=True)
class GGUFTensor:
    """One tensor: its shape as NumPy has it ([R, D]), and its values in the mapped file, read-only.

    `blocks` is float32, float16 or uint16 (bf16) of that shape for F32, F16 and BF16, else uint8 [R, blocks, bytes].
    """

    name: str
    type: str
    shape: tuple[int, ...]
    blocks: NDArray


@dataclass(frozen=True)
class LazyArray:
    """An array of the metadata that has been stepped over: `count` elements of `type` from byte `start` to `end`."""

    type: int
    count: int
    start: int
    end: int


@dataclass(frozen=True)
class GGUF:
    """An open file."""

    path: Path
    metadata: dict[str, Any]
    tensors: dict[str, GGUFTensor]
    data: mmap.mmap

    def strings(self, key: str) -> Strings:
        """An array of strings."""
        array = self._array(key, STRING)
        size, ends = array.end - array.start, np.empty(array.count, np.int64)
        data = np.frombuffer(self.data, np.uint8, size, array.start)
        _walk(data, 0, array.count, size, ends)
        lengths = np.diff(ends, prepend=0) - 8  # which 8 bytes before each string say
        return Strings(data[letters(lengths, 8)], lengths)

    def numbers(self, key: str, kind: int) -> NDArray:
        """An array of numbers of the metadata type `kind`."""
        array = self._array(key, kind)
        return np.frombuffer(self.data, "<" + SCALARS[kind], array.count, array.start)

    def _array(self, key: str, kind: int) -> LazyArray:
        array = self.metadata.get(key)
        if not isinstance(array, LazyArray) or array.type != kind:
            raise ModelFormatError(self.path, f"{key} is missing or not the array it should be", DAMAGED)
        return array

    @property
    def vocabulary(self) -> tuple[Strings, F32, I32]:
        """The pieces, their scores and types: 1 normal, 2 unknown, 3 control, 4 user-defined, 5 unused, 6 byte."""
        if (count := self._array("tokenizer.ggml.tokens", STRING).count) > MAX_PIECES:
            raise ModelFormatError(self.path, f"its vocabulary has {count} tokens; a Gemma's has 262144", DAMAGED)
        pieces = self.strings("tokenizer.ggml.tokens")
        scores = self.numbers("tokenizer.ggml.scores", 6)
        types = self.numbers("tokenizer.ggml.token_type", 5)
        if not len(pieces) == len(scores) == len(types):
            lengths = f"{len(pieces)} tokens, {len(scores)} scores and {len(types)} types"
            raise ModelFormatError(self.path, f"its vocabulary has {lengths}", DAMAGED)
        return pieces, scores, types


@jit
def _walk(data, at, count, last, ends):
    """Step over `count` strings, each its length in 8 bytes and its letters; where they end goes into `ends`, if that
    has room. Returns how many lie before `last`, and where the last of them ends.
    """
    for i in range(count):
        length = np.uint64(0)
        for j in range(8 if at + 8 <= last else 0):
            length |= np.uint64(data[at + j]) << np.uint64(8 * j)
        if at + 8 > last or length > np.uint64(last - at - 8):
            return i, at
        at += 8 + np.int64(length)
        if i < ends.size:
            ends[i] = at
    return count, at


class _Reader:
    """A position in the file; whatever would run past its end is a ModelFormatError."""

    def __init__(self, path: Path, data: mmap.mmap) -> None:
        self.path, self.data, self.at = path, data, 0

    def broken(self, what: str, remedy: str = DAMAGED) -> ModelFormatError:
        return ModelFormatError(self.path, what, remedy)

    def need(self, size: int, what: str) -> None:
        left = len(self.data) - self.at
        if size > left:
            raise self.broken(f"{what} would need {size} bytes at byte {self.at}, but {left} are left")
        if self.at + size > MAX_HEADER:
            raise self.broken(f"{what} ends beyond 100 MB, where no model's header does")

    def scalar(self, code: str, what: str) -> Any:
        self.need(struct.calcsize("<" + code), what)
        (value,) = struct.unpack_from("<" + code, self.data, self.at)
        self.at += struct.calcsize("<" + code)
        return value

    def string(self, what: str, limit: int = MAX_HEADER) -> bytes:
        size = self.scalar("Q", what)
        self.need(size, what)
        if size > limit:
            raise self.broken(f"{what} is {size} bytes long; {limit} are possible")
        self.at += size
        return self.data[self.at - size : self.at]

    def text(self, what: str) -> str:
        try:
            return self.string(what, MAX_KEY).decode()
        except UnicodeDecodeError:
            raise self.broken(f"{what} is not UTF-8") from None

    def value(self, kind: int, key: str) -> Any:
        """A value of a metadata type; `key` is what errors call it."""
        if kind == STRING:
            return self.string(key).decode(errors="replace")
        if kind != ARRAY:
            if kind not in SCALARS:
                raise self.broken(f"{key} is of the unknown type {kind}")
            return self.scalar(SCALARS[kind], key)
        kind, count = self.scalar("I", key), self.scalar("Q", key)
        start = self.at
        if kind == STRING:
            self.skip_strings(count, key)
        elif kind in SCALARS:
            self.need(count * struct.calcsize("<" + SCALARS[kind]), key)
            self.at += count * struct.calcsize("<" + SCALARS[kind])
        else:
            raise self.broken(f"{key} is an array of type {kind}; only numbers and strings may be in one")
        return LazyArray(kind, count, start, self.at)

    def skip_strings(self, count: int, key: str) -> None:
        self.need(8 * count, key)
        file = np.frombuffer(self.data, np.uint8)
        done, at = _walk(file, self.at, count, min(len(file), MAX_HEADER), np.empty(0, np.int64))
        if done < count:  # `need` says what is wrong with the next one
            at += 8 + (struct.unpack_from("<Q", self.data, at)[0] if at + 8 <= len(file) else 0)
        self.need(at - self.at, key)
        self.at = at


PART = re.compile(r"-(\d{5})-of-(\d{5})\.gguf$")


def open_gguf(path: str | Path) -> GGUF:
    """Map a GGUF file, or all parts of one that was split; `path` is any of them.

    Raises ModelFormatError for anything that is no GGUF file, whole and in order, and for a part that is missing.
    """
    path = Path(path)
    number = PART.search(path.name)
    count = int(number[2]) if number else 1
    names = [f"{path.name[: number.start()]}-{i + 1:05}-of-{count:05}.gguf" for i in range(count)] if number else []
    first = _open_part(path.with_name(names[0]) if names and count < MAX_PARTS else path)
    parts = first.metadata.get("split.count", 1)
    if parts in (0, 1):
        return first
    if parts != count:
        remedy = "name it as it was, …-00001-of-0000N.gguf, or join them with llama.cpp's llama-gguf-split --merge"
        raise ModelFormatError(path, f"is one of {short(parts)} parts of a model", remedy)
    tensors = dict(first.tensors)
    for name in names[1:]:
        part = _open_part(path.with_name(name))
        if twice := tensors.keys() & part.tensors.keys():
            raise ModelFormatError(part.path, f"tensor {short(min(twice))} is in two parts", DAMAGED)
        tensors |= part.tensors
    return replace(first, tensors=tensors)


def _open_part(path: Path) -> GGUF:
    """Map one file."""
    try:
        with open_regular(path) as file:
            data = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
    except FileNotFoundError:
        raise ModelFormatError(path, "does not exist", "check the path") from None
    except ModelFormatError:  # which is a ValueError, too
        raise
    except ValueError:
        raise ModelFormatError(path, "is empty", DAMAGED) from None
    except OSError as error:
        raise unreadable(path, error) from None
    reader = _Reader(path, data)
    tensor_count, pair_count = _counts(reader)
    metadata = dict(_pairs(reader, pair_count))
    return GGUF(path, metadata, _tensors(reader, tensor_count, _alignment(reader, metadata)), data)


def _counts(reader: _Reader) -> tuple[int, int]:
    if reader.data[:4] != b"GGUF":
        raise reader.broken(
            "is not a GGUF file: it does not begin with those four letters", "check what was downloaded"
        )
    reader.at = 4
    version = reader.scalar("I", "the version")
    if version not in (2, 3):
        big = version in (2 << 24, 3 << 24)
        raise reader.broken(
            "is a big-endian GGUF" if big else f"is GGUF version {version}; this reads 2 and 3",
            "convert the model again with a current llama.cpp",
        )
    tensors, pairs = reader.scalar("Q", "the tensor count"), reader.scalar("Q", "the pair count")
    if tensors * 32 + pairs * 13 > len(reader.data):  # the fewest bytes that each could take
        raise reader.broken(f"claims {tensors} tensors and {pairs} pairs in {len(reader.data)} bytes")
    if max(tensors, pairs) > MAX_ENTRIES:
        raise reader.broken(f"claims {tensors} tensors and {pairs} pairs; {MAX_ENTRIES} of each are possible")
    return tensors, pairs


def _pairs(reader: _Reader, count: int) -> Iterator[tuple[str, Any]]:
    seen: set[str] = set()
    for i in range(count):
        key = reader.text(f"the key of pair {i}")
        if not key or key in seen:
            raise reader.broken(f"the key of pair {i}, {short(key)}, is empty or there twice")
        seen.add(key)
        kind = reader.scalar("I", short(key))
        if key == "general.alignment" and kind != U32:
            raise reader.broken(f"general.alignment is of type {kind}; it must be a u32, type {U32}")
        yield key, reader.value(kind, short(key))


def _alignment(reader: _Reader, metadata: dict[str, Any]) -> int:
    alignment = metadata.get("general.alignment", 32)
    if alignment < 1 or alignment & (alignment - 1):
        raise reader.broken(f"general.alignment is {alignment}; it must be a power of two")
    return alignment


def _tensors(reader: _Reader, count: int, alignment: int) -> dict[str, GGUFTensor]:
    infos: dict[str, tuple[tuple[int, ...], str, int, int, int]] = {}
    running = 0
    for i in range(count):
        name = reader.text(f"the name of tensor {i}")
        if name in infos:
            raise reader.broken(f"tensor {short(name)} is there twice")
        infos[name] = _info(reader, f"tensor {short(name)}", running)
        running += -(-infos[name][4] // alignment) * alignment
    start = -(-reader.at // alignment) * alignment
    tensors = {}
    for name, (shape, kind, _, size, total) in infos.items():
        if start + total > len(reader.data):
            have = len(reader.data) - start
            raise reader.broken(
                f"tensor {short(name)} should have {total} bytes from byte {start} on, but {max(have, 0)} are left"
            )
        values = np.frombuffer(reader.data, np.uint8, total, start)
        blocks = values.view(PLAIN[kind]).reshape(shape) if kind in PLAIN else values.reshape(*shape[:-1], -1, size)
        tensors[name] = GGUFTensor(name, kind, shape, blocks)
        start += -(-total // alignment) * alignment
    return tensors


def _info(reader: _Reader, name: str, expected: int) -> tuple[tuple[int, ...], str, int, int, int]:
    """One tensor's shape, type, weights and bytes of a block, and bytes in all."""
    axes = reader.scalar("I", name)
    if not 1 <= axes <= MAX_AXES:
        raise reader.broken(f"{name} has {axes} axes; 1 to {MAX_AXES} are possible")
    shape = tuple(reader.scalar("Q", name) for _ in range(axes))[::-1]
    elements = math.prod(shape)
    if not 0 < elements < MAX_ELEMENTS:
        raise reader.broken(f"{name} has the impossible shape {list(shape)}")
    number, offset = reader.scalar("I", name), reader.scalar("Q", name)
    if number not in TYPES:
        raise reader.broken(f"{name} is of the unknown type {number}", "this file may be newer than minigemma")
    kind, block, size = TYPES[number]
    if shape[-1] % block:
        raise reader.broken(f"{name} has rows of {shape[-1]} weights, {kind} has blocks of {block}")
    if offset != expected:
        raise reader.broken(f"{name} begins at {offset}; after the one before it that must be {expected}")
    return shape, kind, block, size, elements // block * size
