"""Stored forms with one scale for each row, as Gemma 3's "per channel" int4 has (Gemma 3 §2.3).

    int8-row   int8  [R, 4 + D]         a float32 scale d, then D signed bytes q                         w = d · q
    int4-row   uint8 [R, 1, 4 + D/2]    a float32 scale d, then 16 bytes of nibbles for each 32 weights  w = d · (q - 8)

D is a multiple of 32. In a file they take 8 and 4 bits a weight. While loading they become int8 and int4 in blocks of
32, in each of which the row's scale stands, rounded to float16 (2⁻¹¹ of a weight at most): 8.5 and 4.5 bits in memory.
A matrix with a scale that is no normal float16 becomes bf16 instead, 16 bits.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from ..arrays import F32, U8
from .gguf_blocks import nearest
from .weight import Layout

SCALE_BYTES = 4
BLOCK = 32
CLIPS = (8, 9, 10, 11, 12, 13, 14, 16, 18, 20, 24)  # steps that the largest weight of a row may take; int4 has 8
CLIPPED_TOGETHER = 1 << 18  # weights that stay in the cache while their scale is looked for


def quantize_int8_rows(x: F32) -> NDArray[np.int8]:
    """float32 [R, D] → int8 rows [R, 4 + D]: d = max |w| / 127 as float32, q = round(w / d).

    Of 2,304 normally distributed weights it misses 0.83 % of their size, int8 blocks 0.53 %.
    """
    d = np.abs(x).max(axis=1, keepdims=True) / np.float32(127)
    return np.concatenate([d.view(np.int8), nearest(x, d, -127, 127).astype(np.int8)], axis=1)


def quantize_int4_rows(x: F32) -> U8:
    """float32 [R, D] → int4 rows [R, 1, 4 + D/2]: the best of a few scales for each row, by least squares.

    Of 2,304 normally distributed weights it misses 10.8 % of their size, int4 blocks 8.3 %; max |w| / 7, 15 %.
    """
    step = max(1, CLIPPED_TOGETHER // x.shape[1])
    return np.concatenate([_int4_rows(x[r : r + step]) for r in range(0, len(x), step)])


def _int4_rows(x: F32) -> U8:
    """The longer a row, the farther its largest weight lies from the others, so that it is worth clipping.

    Each of CLIPS gives integers q. The best scale for them is d = Σ w q / Σ q²; what it misses,
    Σ (w - d q)², is Σ w² - (Σ w q)² / Σ q².
    """
    farthest = np.take_along_axis(x, np.abs(x).argmax(axis=1)[:, None], axis=1)
    x = np.divide(x, farthest, out=np.zeros_like(x), where=farthest != 0)  # so that no square of a small one vanishes
    d, q, most = np.zeros_like(farthest), np.zeros_like(x), np.zeros_like(farthest)
    for k in CLIPS:
        tried = nearest(x, np.full_like(d, -1 / k), -8, 7)
        along, square = (np.einsum("rd,rd->r", tried, other)[:, None] for other in (x, tried))
        scale = np.divide(along, square, out=np.zeros_like(d), where=square > 0)
        better = along * scale > most
        d, q, most = np.where(better, scale, d), np.where(better, tried, q), np.where(better, along * scale, most)
    nibbles = (q + 8).astype(np.uint8).reshape(len(x), -1, 2, 16)
    packed = (nibbles[:, :, 0] | nibbles[:, :, 1] << 4).reshape(len(x), -1)
    return np.concatenate([(d * farthest).view(np.uint8), packed], axis=1)[:, None]


def _scales(data: NDArray) -> F32:
    """Each row's d: [R, 1]."""
    return np.ascontiguousarray(data.reshape(len(data), -1)[:, :SCALE_BYTES]).view(np.float32)


def _unpack_int8(data: NDArray) -> F32:
    return _scales(data) * data[:, SCALE_BYTES:].astype(np.float32)


def _unpack_int4(data: U8) -> F32:
    packed = data[:, 0, SCALE_BYTES:].reshape(len(data), -1, BLOCK // 2)
    q = np.concatenate([packed & 15, packed >> 4], axis=-1).astype(np.float32) - 8  # [R, D/32, 32]
    return _scales(data) * q.reshape(len(data), -1)


def in_blocks(data: NDArray) -> U8 | None:
    """The same integers in blocks of 32 with the row's scale as float16 in each: int8 rows → Q8_0 [R, D/32, 34],
    int4 rows → Q4_0 [R, D/32, 18]. None where a scale is no normal float16.
    """
    wide, bytes_of_block = _scales(data), BLOCK if data.ndim == 2 else BLOCK // 2
    with np.errstate(over="ignore"):
        scales = wide.astype(np.float16)
    normal = (abs(scales) >= np.finfo(np.float16).tiny) & np.isfinite(scales)
    if not (normal | (wide == 0)).all():
        return None
    q = data.reshape(len(data), -1)[:, SCALE_BYTES:].view(np.uint8).reshape(len(data), -1, bytes_of_block)
    spread = np.broadcast_to(scales.view(np.uint8)[:, None], (*q.shape[:2], 2))
    return np.concatenate([spread, q], axis=-1)


INT8 = Layout(
    "int8-row", 8, np.int8, lambda R, D: (R, SCALE_BYTES + D), quantize_int8_rows, _unpack_int8, columns=BLOCK
)
INT4 = Layout(
    "int4-row", 4, np.uint8, lambda R, D: (R, 1, SCALE_BYTES + D // 2), quantize_int4_rows, _unpack_int4, columns=BLOCK
)
