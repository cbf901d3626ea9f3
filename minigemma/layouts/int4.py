"""Four bits a weight in blocks of 32, sixteen rows interleaved: uint8 [R/16, D/32, 320 or 288].

    int4             w = d · q + m          5 bits a weight: GGUF's Q4_1 and Q4_K
    int4-symmetric   w = d · (q - 8)        4.5 bits: GGUF's Q4_0, the case m = -8 d, which is not stored

A vector instruction works on 8 or 16 numbers at once. In a weight that lies row after row these are neighbors of one
row; each block of 32 has a scale, which must be widened and copied into all lanes, and each row ends with a sum across
its lanes. Here the lanes are rows instead: sixteen scales are a vector, and each lane sums up a row of its own. That
takes a third of the instructions, without which four bits a weight keep a core so busy that memory waits for it.

For each sixteen rows their blocks follow one another; in a block of 32 columns stand

    16 float16                 the scale d of each row
    16 float16                 the minimum m of each row, in int4
    [4, 16, 4] bytes           byte j of row r in word w holds the q of two columns, 8 w + j in its lower half and
                               8 w + 4 + j in its upper one

A word of four bytes is what one lane takes in: a mask brings out four columns, a shift and a mask the next four, and
one instruction multiplies four unsigned bytes with four signed ones and adds up neighbors. Kernels read both layouts
with one loop: the minima of int4-symmetric are its scales, times -8.

Q4_0 and Q4_1 keep every bit. In Q4_K scale and minimum are products of a float16 and a 6-bit integer; they are rounded
to float16, by 2⁻¹² of a weight. A matrix whose rows do not divide by sixteen runs as int8.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from ..arrays import F32, U8
from .gguf_blocks import Q4_0, Q4_1, dequantize_blocks, q4_1_blocks, quantize_blocks
from .weight import Layout

SIDE = 16  # rows that are interleaved
BLOCK = 32  # columns that share a scale
BYTES, SYMMETRIC_BYTES = SIDE * 20, SIDE * 18  # of a block of SIDE rows
WORDS = 4  # that a block has of each row
KINDS = {"Q4_0": "int4-symmetric", "Q4_1": "int4", "Q4_K": "int4"}  # the layout of each type of GGUF in four bits


def interleave(scales: U8, q: U8, bits: int) -> U8:
    """Scales, or scales and minima, and integers of rows → blocks of sixteen rows, in the order above.

    Of fewer bits than four more columns share a byte: bits i · bits … of byte j of word w hold column (8 w + i) · 4 + j
    (in four bits), or (16 w + i · 4) + j (in two).

    scales [R, B, 2 or 4], q [R, B, 128 / bits] → [R/16, B, 288 or 320], all uint8
    """
    R, B, _ = q.shape
    q = q.reshape(R // SIDE, SIDE, B, WORDS, 8 // bits, 4).transpose(0, 2, 3, 1, 4, 5)  # [R/16, B, word, row, i, j]
    packed = q[..., 0, :].copy()
    for i in range(1, 8 // bits):
        packed |= q[..., i, :] << i * bits
    size = scales.shape[-1]  # explicit, since there may be no blocks at all
    scales = scales.reshape(R // SIDE, SIDE, B, size // 2, 2).transpose(0, 2, 3, 1, 4)
    return np.concatenate(
        [scales.reshape(R // SIDE, B, SIDE * size), packed.reshape(R // SIDE, B, 4 * WORDS * SIDE)], axis=-1
    )


def separate(data: U8, bits: int) -> tuple[U8, U8]:
    """The inverse: [R/16, B, 288 or 320] → scales [R, B, 2 or 4] and q [R, B, 128 / bits]."""
    (groups, B, size), packed = data.shape, 4 * WORDS * SIDE
    numbers = (size - packed) // (2 * SIDE)  # float16 in a block: a scale, or a scale and a minimum
    scales = data[..., :-packed].reshape(groups, B, numbers, SIDE, 2).transpose(0, 3, 1, 2, 4)
    words = data[..., -packed:].reshape(groups, B, WORDS, SIDE, 4).transpose(0, 3, 1, 2, 4)  # [R/16, row, B, word, j]
    q = np.stack([words >> i * bits & (1 << bits) - 1 for i in range(8 // bits)], axis=-2)
    return scales.reshape(groups * SIDE, B, 2 * numbers), q.reshape(groups * SIDE, B, 8 // bits * 4 * WORDS)


def from_gguf(kind: str, blocks: U8) -> U8:
    """Q4_0, Q4_1 or Q4_K blocks [R, blocks, bytes], R a multiple of sixteen → the layout that KINDS names."""
    if kind == "Q4_K":
        blocks = q4_1_blocks(blocks.reshape(-1, 144)).reshape(len(blocks), -1, 20)
    q = blocks[..., -16:]
    return interleave(blocks[..., :-16], np.concatenate([q & 15, q >> 4], axis=-1), 4)


def to_gguf(data: U8) -> U8:
    """The same weights as Q4_0 or Q4_1 blocks: [R/16, D/32, 288 or 320] → [R, D/32, 18 or 20]."""
    scales, q = separate(data, 4)
    return np.concatenate([scales, q[..., : BLOCK // 2] | q[..., BLOCK // 2 :] << 4], axis=-1)


def pack(x: F32) -> U8:
    """float32 [R, D] → int4: of sixteen ranges, each with its best scale and minimum, the one with the least error."""
    return from_gguf("Q4_1", quantize_blocks(x.reshape(-1, BLOCK), Q4_1).reshape(len(x), -1, 20))


def pack_symmetric(x: F32) -> U8:
    """float32 [R, D] → int4-symmetric."""
    return from_gguf("Q4_0", quantize_q4_0(x))


def quantize_q4_0(x: F32) -> U8:
    """float32 [R, D] → Q4_0 blocks [R, D/32, 18] with the best of sixteen scales, by least squares."""
    return quantize_blocks(x.reshape(-1, BLOCK), Q4_0).reshape(len(x), -1, 18)


def unpack(data: U8) -> F32:
    """Either layout → float32 [R, D]."""
    blocks = to_gguf(data)
    wide = dequantize_blocks(blocks.reshape(-1, blocks.shape[-1]), Q4_0 if blocks.shape[-1] == 18 else Q4_1)
    return wide.reshape(len(blocks), -1)


def _layout(name: str, bits: float, size: int, pack: Callable[[F32], U8]) -> Layout:
    return Layout(name, bits, np.uint8, lambda R, D: (R // SIDE, D // BLOCK, size), pack, unpack, SIDE, BLOCK)


LAYOUT = _layout("int4", 5.0, BYTES, pack)
SYMMETRIC = _layout("int4-symmetric", 4.5, SYMMETRIC_BYTES, pack_symmetric)
