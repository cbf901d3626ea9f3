"""int4 weights, sixteen rows side by side, and the products that they make fast.

A vector instruction works on 8 or 16 numbers at once. In a weight that lies row after row these are neighbours of one
row; each block of 32 has a scale, which must be widened and spread into all lanes, and each row ends with a sum across
its lanes. Here the lanes are rows instead: sixteen scales are a vector, and each lane sums up a row of its own. That
takes a third of the instructions, without which four bits a weight keep a core so busy that memory waits for it.

    uint8 [R/16, D/32, 288]     for each sixteen rows their blocks of 32 columns, one after the other; in a block
        16 float16                 the scale d of each row
        [4, 16, 4] bytes           byte j of row r in word w holds the q of two columns, 8 w + j in its lower half and
                                   8 w + 4 + j in its upper one;  weight = d · (q - 8)

A word of four bytes is what one lane takes in: a mask brings out four columns, a shift and a mask the next four, and
one instruction multiplies four unsigned bytes with four signed ones and adds up neighbours.

So x is rounded to 8 bits, with a scale for each block of 32 of each token: little beside what four bits did to the
weights (docs/accuracy.md). Sums of whole numbers are exact. Each begins at -8 Σ x, which stands for the 8 in q - 8.

The weights are those of the format int4 [R, D/32, 18], in another order: see formats.py. Matrices whose number of rows
is no multiple of sixteen stay row after row, as do the tensors of a GGUF file that runs as it is stored.
"""

from __future__ import annotations

import numpy as np

from ..arrays import U8

SIDE = 16  # rows side by side
BLOCK = 32  # columns that share a scale
BYTES = SIDE * 18  # of a block of SIDE rows


def can_lie_side_by_side(rows: int) -> bool:
    """May an int4 weight of so many rows be laid out so?"""
    return rows % SIDE == 0


def side_by_side(weight: U8) -> U8:
    """int4 [R, D/32, 18], R in whole sixteens → the same weights as [R/16, D/32, 288]."""
    R, blocks, _ = weight.shape
    scales = weight[..., :2].reshape(R // SIDE, SIDE, blocks, 2).transpose(0, 2, 1, 3)  # [R/16, D/32, 16, 2]
    q = np.concatenate([weight[..., 2:] & 15, weight[..., 2:] >> 4], axis=-1)  # [R, D/32, 32]
    q = q.reshape(R // SIDE, SIDE, blocks, 4, 2, 4).transpose(0, 2, 3, 1, 4, 5)  # [R/16, D/32, word, row, half, byte]
    shape = R // SIDE, blocks, -1
    return np.concatenate([scales.reshape(shape), (q[..., 0, :] | q[..., 1, :] << 4).reshape(shape)], axis=-1)


def row_by_row(weight: U8) -> U8:
    """The way back: [R/16, D/32, 288] → int4 [R, D/32, 18]."""
    groups, blocks, _ = weight.shape
    scales = weight[..., : 2 * SIDE].reshape(groups, blocks, SIDE, 2).transpose(0, 2, 1, 3)
    words = weight[..., 2 * SIDE :].reshape(groups, blocks, 4, SIDE, 4).transpose(0, 3, 1, 2, 4)
    q = np.stack([words & 15, words >> 4], axis=-2).reshape(groups * SIDE, blocks, BLOCK)
    packed = q[..., :16] | q[..., 16:] << 4
    return np.concatenate([scales.reshape(groups * SIDE, blocks, 2), packed], axis=-1)
