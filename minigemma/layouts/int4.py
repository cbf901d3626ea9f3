"""int4 in blocks of 32, sixteen rows interleaved: uint8 [R/16, D/32, 288]. 4.5 bits a weight.

A vector instruction works on 8 or 16 numbers at once. In a weight that lies row after row these are neighbors of one
row; each block of 32 has a scale, which must be widened and copied into all lanes, and each row ends with a sum across
its lanes. Here the lanes are rows instead: sixteen scales are a vector, and each lane sums up a row of its own. That
takes a third of the instructions, without which four bits a weight keep a core so busy that memory waits for it.

For each sixteen rows their blocks follow one another; in a block of 32 columns stand

    16 float16                 the scale d of each row
    [4, 16, 4] bytes           byte j of row r in word w holds the q of two columns, 8 w + j in its lower half and
                               8 w + 4 + j in its upper one;    weight = d · (q - 8)

A word of four bytes is what one lane takes in: a mask brings out four columns, a shift and a mask the next four, and
one instruction multiplies four unsigned bytes with four signed ones and adds up neighbors.

The weights are those of GGUF's Q4_0, which is reordered while loading. A matrix whose rows do not divide by sixteen
runs as int8, which holds the same weights exactly.
"""

from __future__ import annotations

import numpy as np

from ..arrays import F32, U8
from .gguf_blocks import Q4_0, dequantize_blocks, quantize_blocks
from .weight import Layout

SIDE = 16  # rows that are interleaved
BLOCK = 32  # columns that share a scale
BYTES = SIDE * 18  # of a block of SIDE rows
WORDS = 4  # that a block has of each row


def interleave(scales: U8, q: U8, bits: int) -> U8:
    """Scales and integers of rows → blocks of sixteen rows, in the order above.

    Of fewer bits than four more columns share a byte: bits i · bits … of byte j of word w hold column (8 w + i) · 4 + j
    (in four bits), or (16 w + i · 4) + j (in two).

    scales [R, B, 2], q [R, B, 128 / bits] → [R/16, B, 288], all uint8
    """
    R, B, _ = q.shape
    q = q.reshape(R // SIDE, SIDE, B, WORDS, 8 // bits, 4).transpose(0, 2, 3, 1, 4, 5)  # [R/16, B, word, row, i, j]
    packed = q[..., 0, :].copy()
    for i in range(1, 8 // bits):
        packed |= q[..., i, :] << i * bits
    scales = scales.reshape(R // SIDE, SIDE, B, 2).transpose(0, 2, 1, 3)
    return np.concatenate(
        [scales.reshape(R // SIDE, B, 2 * SIDE), packed.reshape(R // SIDE, B, 4 * WORDS * SIDE)], axis=-1
    )


def separate(data: U8, bits: int) -> tuple[U8, U8]:
    """The way back: [R/16, B, 288] → scales [R, B, 2] and q [R, B, 128 / bits]."""
    groups, B, _ = data.shape
    scales = data[..., : 2 * SIDE].reshape(groups, B, SIDE, 2).transpose(0, 2, 1, 3)
    words = data[..., 2 * SIDE :].reshape(groups, B, WORDS, SIDE, 4).transpose(0, 3, 1, 2, 4)  # [R/16, row, B, word, j]
    q = np.stack([words >> i * bits & (1 << bits) - 1 for i in range(8 // bits)], axis=-2)
    return scales.reshape(groups * SIDE, B, 2), q.reshape(groups * SIDE, B, 8 // bits * 4 * WORDS)


def from_q4_0(blocks: U8) -> U8:
    """Q4_0 [R, D/32, 18], R in whole sixteens → the same weights as int4 [R/16, D/32, 288]."""
    return interleave(blocks[..., :2], np.concatenate([blocks[..., 2:] & 15, blocks[..., 2:] >> 4], axis=-1), 4)


def to_q4_0(data: U8) -> U8:
    """int4 [R/16, D/32, 288] → the same weights as Q4_0 [R, D/32, 18]."""
    scales, q = separate(data, 4)
    return np.concatenate([scales, q[..., : BLOCK // 2] | q[..., BLOCK // 2 :] << 4], axis=-1)


def quantize_q4_0(x: F32) -> U8:
    """float32 [R, D] → Q4_0 blocks [R, D/32, 18] with the best of sixteen scales, by least squares."""
    return quantize_blocks(x.reshape(-1, BLOCK), 4).reshape(len(x), -1, 18)


def unpack(data: U8) -> F32:
    """int4 [R/16, D/32, 288] → float32 [R, D]."""
    return dequantize_blocks(to_q4_0(data).reshape(-1, 18), Q4_0).reshape(len(data) * SIDE, data.shape[1] * BLOCK)


LAYOUT = Layout(
    "int4",
    4.5,
    np.uint8,
    data_shape=lambda R, D: (R // SIDE, D // BLOCK, BYTES),
    pack=lambda x: from_q4_0(quantize_q4_0(x)),
    unpack=unpack,
    rows=SIDE,
    columns=BLOCK,
)
