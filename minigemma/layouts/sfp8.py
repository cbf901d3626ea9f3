"""SFP8, switched floating point in 8 bits: the third format of Gemma 3's quantization-aware training (Gemma 3 §2.3).

    bit  7 6 5 4 3 2 1 0
         s 1 e e e m m m      |w| = (1 + m/8) · 2^(e - 7)       from 2⁻⁷ to 1.875: three bits of fraction
         s 0 e e e e m m      |w| = (1 + m/4) · 2^(e - 23)      below 2⁻⁷: two bits of fraction, twice as many octaves
         s 0 0 0 0 0 0 0      0

Bit 6 switches: where weights are large it buys precision, where they are small, range. The smallest number above 0 is
1.25 · 2⁻²³. Seven bits without the sign rise with the number that they mean, so that nearest is a search in a table.

A row of weights has a float32 scale, its largest weight over 1.875, in the four bytes before its D codes: [R, 4 + D].
It is a stored form: 8 bits a weight in a file, rounded to bf16 while loading, 16 bits a weight in memory. (A code has
three bits of fraction, a bf16 seven, so that the product with the scale loses a thirtieth of what the code has lost.)
Known from gemma.cpp's code; that the report's SFP8 is the same to the bit is likely, but not said in it.
"""

from __future__ import annotations

import numpy as np

from ..arrays import F32, U8
from .weight import Layout

SCALE_BYTES = 4
LARGEST = 1.875


def _magnitudes() -> F32:
    """What the codes 0 … 127 mean."""
    small, large = np.arange(64), np.arange(64)
    low = (1 + small % 4 / 4) * 2.0 ** (small // 4 - 23)
    high = (1 + large % 8 / 8) * 2.0 ** (large // 8 - 7)
    return np.concatenate([[0], low[1:], high]).astype(np.float32)


MAGNITUDES = _magnitudes()
VALUES = np.concatenate([MAGNITUDES, -MAGNITUDES])  # of all 256 codes
_HALFWAY = (MAGNITUDES[1:] + MAGNITUDES[:-1]) / 2


def quantize_sfp8(x: F32) -> U8:
    """The nearest codes and each row's scale: x [R, D] float32 → [R, 4 + D] uint8; a tie goes to the smaller one.

    >>> quantize_sfp8(np.array([[15.0, -8.0, 0.0]], np.float32))[0, 4:]
    array([127, 248,   0], dtype=uint8)
    """
    scale = np.abs(x).max(axis=1, keepdims=True) / np.float32(LARGEST)
    scaled = x / np.where(scale > 0, scale, 1)
    codes = np.searchsorted(_HALFWAY, np.abs(scaled)).astype(np.uint8)
    codes |= (scaled < 0).astype(np.uint8) << 7
    return np.concatenate([np.ascontiguousarray(scale, np.float32).view(np.uint8), codes], axis=1)


def dequantize_sfp8(rows: U8) -> F32:
    """What the rows mean: [R, 4 + D] uint8 → [R, D] float32."""
    scale = np.ascontiguousarray(rows[:, :SCALE_BYTES]).view(np.float32)
    return VALUES[rows[:, SCALE_BYTES:]] * scale


LAYOUT = Layout(
    "sfp8", 8, np.uint8, data_shape=lambda R, D: (R, SCALE_BYTES + D), pack=quantize_sfp8, unpack=dequantize_sfp8
)
