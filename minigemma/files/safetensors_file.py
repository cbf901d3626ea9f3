"""Reads safetensors: maps the file and makes one read-only view per tensor. Nothing is copied.

    8 bytes   n, little-endian
    n bytes   a JSON object: {"name": {"dtype": "BF16", "shape": [R, D], "data_offsets": [begin, end]}, …}
    the rest  the tensors' bytes, row by row; begin and end count from here

The file is not trusted: every number of the header is checked against the size of the file before anything is read
through a view. The rules are the format's own (tensors cover the data without holes or overlaps) and two more: no name
twice, and at most about 100,000 tensors, which bounds the cost of a hostile header. The format holds no code.

The mapping lives as long as any view. Truncating the file meanwhile ends the program (SIGBUS): replace a model file by
renaming a new one over it, as every downloader does.
"""

from __future__ import annotations

import errno
import json
import math
import mmap
import os
import re
import stat
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
from numpy.typing import NDArray

from ..errors import ModelFormatError
from .foreign import DAMAGED, FOREIGN, GET_SAFETENSORS, kind_of, what_it_holds

MAX_HEADER = 100_000_000
MAX_JSON = 10_000_000
MAX_MARKS = 1_000_000  # of , [ { in a header: eight for a tensor. Each value of a JSON text follows one of them
MAX_AXES = 8

# BF16 as the upper 16 bits of a float32 (see arrays.py).
DTYPES: dict[str, np.dtype[Any]] = {
    **{f"F{bits}": np.dtype(f"<f{bits // 8}") for bits in (64, 32, 16)},
    **{f"{kind}{bits}": np.dtype(f"<{kind.lower()}{bits // 8}") for kind in "IU" for bits in (64, 32, 16, 8)},
    "BF16": np.dtype("<u2"),
    "BOOL": np.dtype("?"),
}


@dataclass(frozen=True, slots=True)
class Tensor:
    """One tensor of a file: its name, its dtype as the file spells it ("BF16", "F32", …), and its values.

    The array is read-only and lies in the mapped file, at whatever alignment it has there; BF16 comes as uint16.
    """

    name: str
    dtype: str
    array: NDArray[Any]


def what_is(path: str | Path) -> str:
    """Identifies a file by its first bytes: "safetensors", a key of FOREIGN, or "" if unknown.

    OSError if it cannot be read; ModelFormatError for anything but a regular file (a folder, a pipe).
    """
    with open_regular(Path(path)) as file:
        return kind_of(file.read(512), Path(path).suffix.lower())


def open_regular(path: Path) -> BinaryIO:
    """Opens a regular file. ModelFormatError for anything else: opening a pipe would block."""
    if not stat.S_ISREG(os.stat(path).st_mode):
        raise ModelFormatError(path, "is a folder or device, not a file", "name a file")
    return open(path, "rb")


def open_safetensors(path: str | Path) -> dict[str, Tensor]:
    """Every tensor of a .safetensors file by its name, in the order of the data.

    ModelFormatError if the file cannot be read, is something else, or breaks the format in any way.
    """
    path = Path(path)
    try:
        with open_regular(path) as file:
            kind = kind_of(file.read(512), path.suffix.lower())
            if kind in FOREIGN:
                raise ModelFormatError(path, *FOREIGN[kind])
            data = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
    except OSError as error:
        raise unreadable(path, error) from error
    if len(data) < 8:
        raise ModelFormatError(path, f"has {len(data)} bytes, a safetensors file at least 8", DAMAGED)
    length = int.from_bytes(data[:8], "little")
    if length > MAX_HEADER:
        raise ModelFormatError(path, "is not a safetensors file (its header would be over 100 MB)", GET_SAFETENSORS)
    if length > len(data) - 8:
        raise ModelFormatError(path, f"has {len(data):,} bytes, its header alone {length:,}", DAMAGED)
    try:
        return _views(_parse(data[8 : 8 + length]), data, 8 + length)
    except _Broken as problem:
        raise ModelFormatError(path, *problem.args) from None


class _Broken(Exception):
    """(problem, remedy), on its way to the function that knows the path."""


def _parse(header: bytes) -> dict[str, Any]:
    """The header as a JSON object, without its __metadata__."""
    if header[:1] != b"{":
        raise _Broken("is not a safetensors file (its header does not begin with a brace)", GET_SAFETENSORS)
    if _marks(header) > MAX_MARKS:
        raise _Broken("describes over 100,000 tensors; the largest Gemma has about 1,300", GET_SAFETENSORS)
    tensors = _json_object(header, "header")
    metadata = tensors.pop("__metadata__", {})
    if not isinstance(metadata, dict) or not all(isinstance(value, str) for value in metadata.values()):
        raise _Broken("has a __metadata__ that is not a table of texts", DAMAGED)
    return tensors


def _marks(text: bytes) -> int:
    """An upper bound on the values in a JSON text, which as Python objects take far more memory than as text."""
    return sum(text.count(mark) for mark in (b",", b"[", b"{"))


def _json_object(text: bytes, what: str, kinds: tuple[type, ...] = (dict,)) -> Any:
    """A JSON object, or a value of another of `kinds`, that names nothing twice."""

    def once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        table = dict(pairs)
        if len(table) < len(pairs):
            raise _Broken(f"names something twice in its {what}", DAMAGED)
        return table

    try:
        value = json.loads(text.decode(), object_pairs_hook=once)
    except UnicodeDecodeError:
        raise _Broken(f"has a {what} that is not UTF-8", DAMAGED) from None
    except (ValueError, RecursionError) as error:
        raise _Broken(f"has a {what} that is not JSON ({error})", DAMAGED) from None
    if not isinstance(value, kinds):
        raise _Broken(f"has a {what} that is a {type(value).__name__}, not an object", DAMAGED)
    return value


def _views(tensors: dict[str, Any], data: mmap.mmap, start: int) -> dict[str, Tensor]:
    """A view for each entry of the header, whose data must follow one another from `start` to the end of the file."""
    for name, entry in tensors.items():
        _check(name, entry)
    at, views = start, {}
    for name, entry in sorted(tensors.items(), key=lambda item: item[1]["data_offsets"]):
        begin, end = (start + offset for offset in entry["data_offsets"])
        if begin != at:
            raise _Broken(
                f"{short(name)} {'overlaps the tensor' if begin < at else 'leaves a hole'} before it", DAMAGED
            )
        if end > len(data):
            raise _Broken(f"has {len(data):,} bytes, {short(name)} would end at {end:,}", DAMAGED)
        try:
            array = np.ndarray(entry["shape"], DTYPES[entry["dtype"]], buffer=data, offset=begin)
        except ValueError:  # no bytes, but 2⁶² by 0 of them
            raise _Broken(f"{short(name)} has the impossible shape {entry['shape']}", DAMAGED) from None
        views[name] = Tensor(name, entry["dtype"], array)
        at = end
    if at != len(data):
        raise _Broken(f"has {len(data):,} bytes, its tensors end at {at:,}", DAMAGED)
    return views


def _check(name: str, entry: Any) -> None:
    """One entry of the header by itself: its fields, its dtype, and shape × item size = bytes."""
    if not isinstance(entry, dict) or entry.keys() != {"dtype", "shape", "data_offsets"}:
        raise _Broken(f"does not describe {short(name)} by dtype, shape and data_offsets", DAMAGED)
    dtype, shape, offsets = entry["dtype"], entry["shape"], entry["data_offsets"]
    if not isinstance(dtype, str) or dtype not in DTYPES:
        raise _Broken(f"holds {short(name)} as {short(dtype)}", "get the bfloat16 weights of the model")
    for numbers in (shape, offsets):
        if not isinstance(numbers, list) or not all(type(number) is int and 0 <= number < 2**63 for number in numbers):
            raise _Broken(f"{short(name)} has a shape or offsets that are not integers from 0 to 2⁶³", DAMAGED)
    if len(offsets) != 2 or len(shape) > MAX_AXES:
        raise _Broken(f"{short(name)} has {len(shape)} axes (at most {MAX_AXES}), {len(offsets)} offsets (2)", DAMAGED)
    wanted, given = math.prod(shape) * DTYPES[dtype].itemsize, offsets[1] - offsets[0]
    if wanted != given:
        raise _Broken(f"{short(name)} is {dtype} {shape}, not {given:,} bytes", DAMAGED)


def short(name: object) -> str:
    """Text from a file, safe to print: quoted, escaped and shortened."""
    text = ascii(name)
    return text if len(text) <= 100 else text[:100] + "…"


def open_checkpoint_files(folder: str | Path) -> dict[str, Tensor]:
    """Every tensor of a Hugging Face folder: of model.safetensors, or of the shards that its index names.

    The index decides which tensors make up the model and which shard holds each; other tensors of a shard are ignored.
    Shards must be plain file names, so nothing outside the folder is read; they may be symbolic links, as in Hugging
    Face's cache. ModelFormatError names the missing or broken file.
    """
    folder = Path(folder)
    if os.path.lexists(folder / "model.safetensors"):
        return open_safetensors(folder / "model.safetensors")
    path = folder / "model.safetensors.index.json"
    if not os.path.lexists(path):
        raise ModelFormatError(folder, *what_it_holds(folder))
    shard_of = _shards(path)
    shards = sorted(set(shard_of.values()))
    missing = [shard for shard in shards if not (folder / shard).exists()]
    if missing:
        more = f" ({len(missing)} of {len(shards)} shards are missing)" if len(missing) > 1 else ""
        raise ModelFormatError(
            folder / missing[0], f"is missing{more}", "download the model again: what is there is kept"
        )
    opened = {shard: open_safetensors(folder / shard) for shard in shards}
    for name, shard in shard_of.items():
        if name not in opened[shard]:
            raise ModelFormatError(folder / shard, f"lacks {short(name)}, which {path.name} promises", DAMAGED)
    return {name: opened[shard][name] for name, shard in shard_of.items()}


def read_json(path: Path, kinds: tuple[type, ...] = (dict,), limit: int = MAX_JSON, values: int = MAX_MARKS) -> Any:
    """Reads a JSON object from a file. ModelFormatError for anything else and for more than `limit` bytes.

    kinds: the values that the file may hold, objects alone by default.
    """
    text = read_start(path, limit + 1)
    if len(text) > limit or _marks(text) > values:
        problem = f"is larger than {limit // 10**6} MB, or has over {values:,} values, as no model's has"
        raise ModelFormatError(path, problem, DAMAGED)
    try:
        return _json_object(text.removeprefix(b"\xef\xbb\xbf"), "text", kinds)  # a BOM, as Windows writes it
    except _Broken as broken:
        raise ModelFormatError(path, *broken.args) from None


def read_start(path: Path, size: int) -> bytes:
    """The first bytes of a text file. ModelFormatError for an LFS pointer, a web page and the like."""
    try:
        with open_regular(path) as file:
            text = file.read(size)
    except OSError as error:
        raise unreadable(path, error) from error
    kind = kind_of(text[:512], path.suffix)
    if kind in FOREIGN:
        raise ModelFormatError(path, *FOREIGN[kind])
    return text


def _shards(path: Path) -> dict[str, str]:
    """The index's table: tensor name → shard."""
    table = read_json(path).get("weight_map")
    if not isinstance(table, dict) or not table:
        raise ModelFormatError(path, "has no weight_map of tensors and their files", DAMAGED)
    for name, shard in table.items():
        if not isinstance(shard, str) or not re.fullmatch(r"\w[\w.-]*\.safetensors", shard, re.ASCII):
            claim = f"puts {short(name)} into {short(shard)}, which is no plain name of a .safetensors file"
            raise ModelFormatError(path, claim, "do not trust this download")
    return table


def unreadable(path: Path, error: OSError) -> ModelFormatError:
    """An error of the operating system as ModelFormatError."""
    if os.path.islink(path) and not os.path.exists(path):
        return ModelFormatError(path, "is a link to a file that is not there (an incomplete download)", DAMAGED)
    remedies = {
        errno.ENOENT: "check the path, or fetch the folder again",
        errno.ENOMEM: "raise the limit of this process (`ulimit -v`)",
    }
    remedy = remedies.get(error.errno or 0, "check who may read it")
    return ModelFormatError(path, f"cannot be read: {(error.strerror or str(error)).lower()}", remedy)


def write_safetensors(
    path: Path, entries: Sequence[tuple[str, str, tuple[int, ...]]], parts: Iterable[Iterable[NDArray[Any]]]
) -> None:
    """Writes a file of tensors (name, dtype as the file spells it, shape) from an iterator of contiguous `parts`.

    Only the part being written is in memory. Raises OSError, with the file's name even if the disk is full, and
    ValueError if parts and shape differ in bytes.
    """
    header: dict[str, dict[str, Any]] = {"__metadata__": {"format": "pt"}}  # without which older transformers refuse it
    end = 0
    for name, dtype, shape in entries:
        size = int(np.prod(shape, dtype=np.int64)) * DTYPES[dtype].itemsize
        header[name] = {"dtype": dtype, "shape": list(shape), "data_offsets": [end, end + size]}
        end += size
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-(len(text) + 8) % 64)  # so that data begins where a cache line does
    with written(path) as file:
        file.write(len(text).to_bytes(8, "little") + text)
        for (name, *_), rows in zip(entries, parts, strict=True):
            for part in rows:
                file.write(np.ascontiguousarray(part).data)
            if file.tell() != 8 + len(text) + header[name]["data_offsets"][1]:
                raise ValueError(f"{name} was given other bytes than its shape has")


@contextmanager
def written(path: Path) -> Iterator[BinaryIO]:
    """A file to write to, which is on the disk when the block ends. Any OSError names the file, even a full disk's."""
    try:
        with path.open("wb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
    except OSError as error:
        error.filename = error.filename or str(path).removesuffix(".partial")
        raise
