"""The formats of weights, as their files hold them: each weight is one array, and its dtype and shape say which.

    f32       float32 [R, D]
    bf16      uint16  [R, D]             the upper 16 bits of each float32
    int8      uint8   [R, D/32, 34]      blocks of 32: a float16 scale d, then 32 signed bytes q;      w = d · q
    int4      uint8   [R, D/32, 18]      blocks of 32: a float16 scale d, then 16 bytes of two nibbles; w = d · (q - 8)
                                         (low nibbles are weights 0 … 15, high ones 16 … 31)
              uint8   [R/16, D/32, 288]  the same, sixteen rows side by side: see int4.py
    sfp8      uint8   [R, 4 + D]         a float32 scale for the row, then a code of 8 bits for each weight: see sfp8.py
    int8-row  int8    [R, 4 + D]         per channel: a float32 scale d for the row, then D signed bytes;  w = d · q
    int4-row  uint8   [R, 1, 4 + D/2]    per channel: the same, then nibbles, 16 bytes as in int4 for each 32 weights

int8 and int4 row by row are GGUF's Q8_0 and Q4_0, so that such tensors run from the mapped file. 8.5 and 4.5 bits a
weight. The formats with a scale a row take 8 and 4, as Gemma 3's "per channel" int4 does (Gemma 3 §2.3); D is a
multiple of 32.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from ..arrays import F32, read_only, widen_bf16
from . import int4
from .sfp8 import SCALE_BYTES, dequantize_sfp8

BLOCK = 32  # weights that share a scale, or that are packed together
# Bytes of 32 weights: with the float16 scale of a block; without the float32 scale in front of a row.
BLOCK_BYTES = {"int8": 2 + BLOCK, "int4": 2 + BLOCK // 2, "int8-row": BLOCK, "int4-row": BLOCK // 2}

Weight = NDArray[Any]  # one of the formats above


def format_of(weight: Weight) -> str:
    """The name of a weight's format: "f32", "bf16", "int8", "int4", "sfp8", "int8-row" or "int4-row"."""
    if weight.ndim == 2 and weight.dtype in (np.float32, np.uint16):
        return "f32" if weight.dtype == np.float32 else "bf16"
    if weight.ndim == 2 and weight.dtype == np.uint8:
        return "sfp8"
    if weight.ndim == 2 and weight.dtype == np.int8 and weight.shape[1] % BLOCK == SCALE_BYTES:
        return "int8-row"
    if weight.ndim == 3 and weight.dtype == np.uint8:
        for name in ("int8", "int4"):
            if weight.shape[2] == BLOCK_BYTES[name]:
                return name
        if weight.shape[2] == int4.BYTES:
            return "int4"
        if weight.shape[1] == 1 and weight.shape[2] % BLOCK_BYTES["int4-row"] == SCALE_BYTES:
            return "int4-row"
    raise ValueError(f"{weight.dtype} {list(weight.shape)} is no weight: see the formats at the top of formats.py")


def is_side_by_side(weight: Weight) -> bool:
    """Is this an int4 weight with sixteen rows side by side?"""
    return weight.ndim == 3 and weight.dtype == np.uint8 and weight.shape[2] == int4.BYTES


def rows_columns(weight: Weight) -> tuple[int, int]:
    """(R, D) of a weight, whatever its format."""
    name, size = format_of(weight), weight.shape[-1]
    if is_side_by_side(weight):
        return weight.shape[0] * int4.SIDE, weight.shape[1] * BLOCK
    if name in ("int8", "int4"):
        return weight.shape[0], weight.shape[1] * BLOCK
    if name == "int4-row":
        return weight.shape[0], (size - SCALE_BYTES) * 2
    return weight.shape[0], size if name in ("f32", "bf16") else size - SCALE_BYTES


def packed_shape(name: str, rows: int, columns: int) -> tuple[int, ...]:
    """The shape of the array of bytes that a weight [R, D] is in one of the formats of bytes; int4 if it can be with
    sixteen rows side by side.
    """
    if name == "int4" and int4.can_lie_side_by_side(rows):
        return rows // int4.SIDE, columns // BLOCK, int4.BYTES
    if name in ("int8", "int4"):
        return rows, columns // BLOCK, BLOCK_BYTES[name]
    return (rows, 1, SCALE_BYTES + columns // 2) if name == "int4-row" else (rows, SCALE_BYTES + columns)


def widen(weight: Weight) -> F32:
    """The weight as float32 [R, D], exact for every format."""
    name = format_of(weight)
    if name == "f32":
        return weight
    if name == "bf16":
        return widen_bf16(weight)
    if name == "sfp8":
        return dequantize_sfp8(weight)
    if is_side_by_side(weight):
        weight = int4.row_by_row(weight)
    size, kind = (2, np.float16) if name in ("int8", "int4") else (SCALE_BYTES, np.float32)
    scale = np.ascontiguousarray(weight[..., :size]).view(kind).astype(np.float32)  # [R, D/32, 1]; a row's: [R, (1,) 1]
    q = weight[..., size:]
    if name in ("int8", "int8-row"):
        q = q.view(np.int8).astype(np.float32)
    else:
        q = q.reshape(len(q), q.shape[1] * q.shape[2] // (BLOCK // 2), BLOCK // 2)
        q = np.concatenate([q & 15, q >> 4], axis=-1).astype(np.float32) - 8  # [R, D/32, 32]
    return (scale * q).reshape(rows_columns(weight))


def flat(weight: Weight) -> Weight:
    """A weight as one axis, read-only: int8 where whole numbers take a byte, uint8 where they are nibbles or codes,
    uint32 where sixteen rows lie side by side; kernels are compiled for each.
    """
    if is_side_by_side(weight):
        return read_only(weight.reshape(-1).view(np.uint32))
    return read_only((weight.view(np.int8) if block_bytes(weight) >= 32 else weight).reshape(-1))


def block_bytes(weight: Weight) -> int:
    """What kernels call `size`: the bytes of 32 weights, or of a block of sixteen rows side by side; 0 in a format that
    has no whole numbers.
    """
    if is_side_by_side(weight):
        return int4.BYTES
    return BLOCK_BYTES.get(format_of(weight), 0)
