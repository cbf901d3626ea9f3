"""A tensor as a file stores it → the weight that the models run: which layout it runs in, and the way there."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ..arrays import F32, LargePages, read_only, round_bf16
from ..formulas.rglru import softplus
from ..kernels import gguf_blocks as _gguf_kernels  # noqa: F401  they run in place of the definitions
from ..layouts.gguf_blocks import (
    KINDS,
    OURS,
    dequantize,
    quantize_int4,
    quantize_int4_rows,
    quantize_int8_rows,
    to_int8,
)
from ..layouts.int4 import SIDE, can_lie_side_by_side, row_by_row, side_by_side
from ..layouts.sfp8 import quantize_sfp8
from ..layouts.weight import BLOCK, BLOCK_BYTES, Weight, format_of, is_side_by_side, packed_shape, rows_columns

CONVERTED_TOGETHER = 1 << 24  # weights that are float32 for a moment on their way to another format
READABLE = ("F32", "F16", "BF16", *KINDS)
NARROW = ("int8", "int4", "sfp8", "int8-row", "int4-row")
FORMATS = ("f32", "bf16", *NARROW)
AS_STORED = {kind: kind.lower() for kind in OURS} | {"F32": "f32", "BF16": "bf16", "Q8_0": "int8", "Q4_0": "int4"}
KIND = {form: kind for kind, form in AS_STORED.items()}
QUANTIZERS: dict[str, Callable[[F32], Weight]] = {
    "bf16": round_bf16,
    "sfp8": quantize_sfp8,
    "int8-row": quantize_int8_rows,
    "int4-row": quantize_int4_rows,
}


@dataclass(frozen=True)
class Stored:
    """A tensor as its file has it: `kind` is the file's name of its type ("BF16", "Q5_0", …), `shape` [R, D] or [D]."""

    name: str
    kind: str
    shape: tuple[int, ...]
    array: NDArray


def stored_tensor(name: str, dtype: str, array: NDArray) -> Stored:
    """A tensor of a safetensors file; bytes are what `minigemma quantize` writes, and their shape says the format."""
    if dtype in ("U8", "I8"):
        with suppress(ValueError):  # in a shape that is none of ours they keep their type, which is refused
            kind = "INT4" if is_side_by_side(array) else KIND[format_of(array)]
            return Stored(name, kind, rows_columns(array), array)
    return Stored(name, dtype, array.shape, array)


def held_bytes(ours: str, tensor: Stored, dtype: str | None) -> int:
    """How much memory a tensor takes once loaded with this dtype."""
    weights, tensor = int(np.prod(tensor.shape)), _laid_out(ours, tensor)
    if not is_matrix(ours, tensor):
        as_stored = ours.endswith("_gate") and tensor.kind == "BF16" and dtype != "f32"
        return (2 if as_stored else 4) * weights
    form = format_for(tensor, dtype, ours)
    return math.prod(packed_shape(form, *tensor.shape)) if form in NARROW else weights * {"f32": 4, "bf16": 2}[form]


def converted_weight(ours: str, tensor: Stored, dtype: str | None, norm_offset: float, pages: LargePages) -> Any:
    """A tensor as the models want it: matrices in their format, gates as stored, all that is small in float32."""
    tensor = _laid_out(ours, tensor)
    if is_matrix(ours, tensor):
        return _matrix(tensor, dtype, ours, pages)
    if len(tensor.shape) == 3 and ours.endswith("_gate") and tensor.kind == "BF16" and dtype != "f32":
        return read_only(tensor.array)
    wide = np.array(dequantize(tensor.kind, tensor.array), np.float32)
    if ours.endswith("recurrent.conv"):
        wide = np.ascontiguousarray(wide[:, 0].T)
    if ours.endswith("recurrent.decay"):
        return read_only(softplus(wide))
    if ours.startswith("vision.") and ours != "vision.soft_norm":  # a LayerNorm's weight is the gain itself
        return read_only(wide)
    return read_only(wide - np.float32(norm_offset))


def _laid_out(ours: str, tensor: Stored) -> Stored:
    """A convolution of patches as the matrix that it is, and x @ P as x Wᵀ; other tensors as they are."""
    if ours == "vision.patch":
        return replace(
            tensor, shape=(len(tensor.array), tensor.array[0].size), array=tensor.array.reshape(len(tensor.array), -1)
        )
    if ours == "vision.projection":
        return replace(tensor, shape=tensor.shape[::-1], array=tensor.array.T)
    return tensor


def is_matrix(ours: str, tensor: Stored) -> bool:
    """Is this the weight of a linear map or an embedding, which has a format, and no norm, bias or gate?"""
    return len(tensor.shape) == 2 and not ours.endswith("_bias") and ours != "vision.positions"


def format_for(tensor: Stored, dtype: str | None, ours: str) -> str:
    """The format that a matrix runs in: what `dtype` asks for, or the nearest of ours to the stored one."""
    wanted = dtype or ("bf16" if tensor.kind == "F16" else AS_STORED.get(tensor.kind, "int8"))
    if ours in ("embedding", "head") and AS_STORED.get(tensor.kind) != wanted:
        wanted = wanted.replace("int4", "int8")
    if wanted in BLOCK_BYTES and tensor.shape[1] % BLOCK:
        return "f32" if tensor.kind == "F32" else "bf16"  # rows that do not divide into blocks
    return wanted


def _matrix(tensor: Stored, dtype: str | None, ours: str, pages: LargePages) -> Weight:
    """The matrix in its format: where it lies if it is stored in that one, else converted, in large pages."""
    kind, array, wanted = tensor.kind, tensor.array, format_for(tensor, dtype, ours)
    if AS_STORED.get(kind) == wanted and not (
        kind == "Q4_0" and dtype == "int4" and can_lie_side_by_side(tensor.shape[0])
    ):
        return read_only(np.ascontiguousarray(array))
    first, *others = (converted(kind, rows, wanted, tensor.shape) for rows in some_rows(tensor))
    return read_only(pages.hold(np.concatenate([first, *others]) if others else np.ascontiguousarray(first)))


def some_rows(tensor: Stored) -> Iterator[NDArray]:
    """The array of a matrix in parts of whole sixteens of rows, few enough to be float32 for a moment."""
    in_element = tensor.shape[0] // len(tensor.array)  # sixteen rows, where they lie side by side
    step = max(1, CONVERTED_TOGETHER // tensor.shape[1] // SIDE) * SIDE // in_element
    for r in range(0, len(tensor.array), step):
        yield tensor.array[r : r + step]


def converted(kind: str, rows: NDArray, wanted: str, shape: tuple[int, ...]) -> Weight:
    """Rows of a matrix of some shape, stored as `kind`, in one of the formats of formats.py."""
    if kind == "INT4":
        kind, rows = "Q4_0", row_by_row(rows)
    if wanted == "int8":
        return to_int8(kind, rows)
    if wanted == "int4":
        made = rows if kind == "Q4_0" else quantize_int4(dequantize(kind, rows))
        return side_by_side(made) if can_lie_side_by_side(shape[0]) else made
    wide = dequantize(kind, rows)
    return wide if wanted == "f32" else QUANTIZERS[wanted](wide)
