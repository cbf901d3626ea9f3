"""int8 in blocks of 32: uint8 [R, D/32, 34], GGUF's Q8_0, so that such a tensor runs where its file is mapped.

A block is a float16 scale d, then 32 signed bytes q:    w = d · q    8.5 bits a weight
"""

from __future__ import annotations

import numpy as np

from ..arrays import F32, U8
from .gguf_blocks import Q8_0, dequantize_blocks, quantize_blocks
from .weight import Layout

BLOCK = 32  # columns that share a scale
BYTES = 2 + BLOCK  # of a block


def pack(x: F32) -> U8:
    """float32 [R, D] → int8 [R, D/32, 34]: d = max |w| / 127 as float16, q = round(w / d)."""
    return quantize_blocks(x.reshape(-1, BLOCK), Q8_0).reshape(len(x), -1, BYTES)


def unpack(data: U8) -> F32:
    """int8 [R, D/32, 34] → float32 [R, D]."""
    return dequantize_blocks(data.reshape(-1, BYTES), Q8_0).reshape(len(data), data.shape[1] * BLOCK)


LAYOUT = Layout(
    "int8", 8.5, np.uint8, data_shape=lambda R, D: (R, D // BLOCK, BYTES), pack=pack, unpack=unpack, columns=BLOCK
)
