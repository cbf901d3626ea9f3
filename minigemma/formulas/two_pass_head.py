"""The logits of next tokens in two passes: a coarse product for all, then the likely ones in full (Shim et al. 2017,
"SVD-Softmax: Fast Softmax Approximation on Large Vocabulary Neural Networks", §3).

    coarse  = Ê x                       Ê: the head in few bits
    logit_v = E_v x        where coarse_v > mean coarse + 2 standard deviations
              coarse_v     elsewhere

Gemma's vocabulary is large: two thirds of the 270M's weights are the 262,144 rows of its head. Every token reads them
all, and almost all only show that their token is unlikely. The coarse copy takes a third of the memory of an int8 head,
a sixth of a bf16 head; the one row in fifty that it finds likely is then read in full. The paper's coarse product takes
the leading columns of a singular value decomposition; this one takes all columns in fewer bits. The paper refines a
fixed number of rows; this one refines rows above a threshold, which needs no sorting.

The gain of the final norm decides how many bits a column gets: it sets the size of x_d, and gains differ by factors of
hundreds in the 270M. The fifth of the columns with the largest gain has four bits, the others two. The coarse error is
then 0.3 standard deviations of the logits, while likely logits lie four to eight above the mean; with two bits for all
columns it would be 0.5.

Logits of likely tokens are exact, and so is their order; docs/accuracy.md shows what the errors of the others cost.
Only sampling uses it (text/generation.py): `forward` returns exact logits.

Ê is uint8 [R/16, blocks, 288], sixteen rows interleaved as in layouts/int4.py: first blocks of int4-symmetric (32
columns), then blocks in two bits (64 columns), with a float16 scale d for each row and weight = d · (2 q - 3).
"""

from __future__ import annotations

import numpy as np

from ..arrays import F32, I32, U8, read_only
from ..definition import definition, require
from ..kernels import two_pass_head as kernels
from ..kernels.parallel import workers
from ..kernels.two_pass_head import COARSE, DEVIATIONS, STEP
from ..kernels.weights import of
from ..layouts import Weight
from ..layouts.int4 import BLOCK, SIDE, SYMMETRIC_BYTES, interleave, separate, unpack
from .linear import linear

FROM = ("f32", "bf16", "int8")  # layouts of a head that can have a coarse copy
LARGE = 1 << 24  # weights from which a coarse copy pays


def fine_columns(columns: int) -> int:
    """The number of columns in four bits: a fifth, rounded up to blocks of 64."""
    return -(-columns // (5 * COARSE)) * COARSE


def by_gain(weight: F32) -> I32:
    """The columns of a head in falling order of |1 + w|, the gain of the norm before it: w [D] → [D]."""
    return np.argsort(-abs(1 + weight), kind="stable").astype(np.int32)


@definition
def in_few_bits(weight: Weight, order: I32) -> U8:
    """The coarse copy: the first fifth of the columns of `order` in four bits, the others in two

    Four bits: -8 d … 7 d, where -8 d is the weight of 32 farthest from 0 and d may be negative. Two bits: see above.

    weight [R, D] in any layout, R a multiple of 16, D of 64; order [D] → [R/16, blocks, 288] uint8
    """
    w, fine = weight.widen()[:, order], fine_columns(len(order))
    R = len(w)
    blocks = w[:, :fine].reshape(R, -1, BLOCK)
    high, low = blocks.max(axis=-1, keepdims=True), blocks.min(axis=-1, keepdims=True)
    d = (np.where(high > -low, high, low) / np.float32(-8)).astype(np.float16)
    up = np.divide(1, d, out=np.zeros_like(high), where=d != 0, dtype=np.float32)
    q = np.floor(blocks * up + np.float32(8.5)).clip(0, 15).astype(np.uint8)
    four = interleave(d.view(np.uint8), q, 4)

    blocks = w[:, fine:].reshape(R, -1, COARSE)
    d = (np.float32(STEP) * abs(blocks).mean(axis=-1, keepdims=True)).astype(np.float16)
    up = np.divide(0.5, d, out=np.zeros_like(blocks[..., :1]), where=d != 0, dtype=np.float32)
    q = np.floor(blocks * up + np.float32(2)).clip(0, 3).astype(np.uint8)
    return np.concatenate([four, interleave(d.view(np.uint8), q, 2)], axis=1)


def widened(packed: U8, order: I32) -> F32:
    """The inverse of `in_few_bits`: float32 [R, D], columns in their own order."""
    fine = fine_columns(len(order))
    scales, q = separate(packed[:, fine // BLOCK :], 2)
    w = ((2 * q.astype(np.float32) - 3) * scales.view(np.float16)).reshape(len(q), len(order) - fine)
    out = np.empty((len(w), len(order)), np.float32)
    out[:, order] = np.concatenate([unpack(packed[:, : fine // BLOCK]), w], axis=1)
    return out


@definition
def likely_logits(x: F32, packed: U8, order: I32, weight: Weight) -> F32:
    """E_v x where the coarse Ê_v x is DEVIATIONS above the mean of all, else Ê_v x      [Shim et al. 2017 §3]

    x [T, D] float32, packed and order as `in_few_bits` has them, weight [V, D] → [T, V] float32
    """
    y = x @ widened(packed, order).T
    likely = y > y.mean(axis=-1, keepdims=True) + np.float32(DEVIATIONS) * y.std(axis=-1, keepdims=True)
    return np.where(likely, x @ weight.widen().T, y)


@in_few_bits.kernel
def _in_few_bits(weight, order):
    R, D = weight.shape
    fits = R > 0 and R % SIDE == 0 and D % COARSE == 0 and weight.layout.name in FROM
    fits = fits and order.dtype == np.int32 and np.array_equal(np.sort(order), np.arange(D))
    require(fits, "in_few_bits", weight, order)
    out = np.empty((R // SIDE, coarse_bytes(SIDE, D) // SYMMETRIC_BYTES, SYMMETRIC_BYTES), np.uint8)
    kernels.pack(workers(), of(weight), np.ascontiguousarray(order), fine_columns(D), out)
    return out


@likely_logits.kernel
def _likely_logits(x, packed, order, weight):
    (V, D), made = weight.shape, packed.dtype == np.uint8 and packed.ndim == 3
    fits = len(x) > 0 and x.shape[1:] == (D,) and x.dtype == np.float32 and order.dtype == np.int32
    fits = fits and np.array_equal(np.sort(order), np.arange(D)) and weight.layout.name in FROM
    fits = fits and D % COARSE == 0 and V % SIDE == 0
    fits = fits and made and packed.shape == (V // SIDE, coarse_bytes(SIDE, D) // SYMMETRIC_BYTES, SYMMETRIC_BYTES)
    require(fits, "likely_logits", x, packed, order, weight)
    coarse = kernels.Coarse(read_only(np.ascontiguousarray(packed).reshape(-1).view(np.uint32)), fine_columns(D))
    y, order = np.empty((len(x), V), np.float32), read_only(np.array(order))
    done = kernels.likely_logits(workers(), np.ascontiguousarray(x), order, coarse, of(weight), y)
    return y if done else linear(x, weight)


class CoarseHead:
    """A head with its coarse copy; final_norm is the w of the norm before it."""

    def __init__(self, head: Weight, final_norm: F32) -> None:
        self.head, self.order = head, read_only(by_gain(final_norm))
        packed = read_only(in_few_bits(head, self.order))
        self.nbytes = packed.nbytes  # each token reads these instead of the head
        self._coarse = kernels.Coarse(read_only(packed.reshape(-1).view(np.uint32)), fine_columns(len(final_norm)))

    def logits(self, x: F32) -> F32:
        """Logits [T, V] of hidden states, x [T, D] after the final norm; exact for likely tokens only."""
        y = np.empty((len(x), self.head.shape[0]), np.float32)
        done = kernels.likely_logits(workers(), x, self.order, self._coarse, of(self.head), y)
        return y if done else linear(x, self.head)


def coarse_bytes(rows: int, columns: int) -> int:
    """Bytes of the coarse copy of a head [R, D]: 18 for 32 columns in four bits, or for 64 in two."""
    fine = fine_columns(columns)
    return rows * (fine // BLOCK + (columns - fine) // COARSE) * (SYMMETRIC_BYTES // SIDE)


def coarse_head_of(head: Weight, final_norm: F32) -> CoarseHead | None:
    """The coarse copy of a large head in bf16 or int8; None for other heads."""
    (R, D), name = head.shape, head.layout.name
    fits = name in FROM and name != "f32" and R % SIDE == 0 and D % COARSE == 0
    return CoarseHead(head, final_norm) if fits and R * D >= LARGE else None
