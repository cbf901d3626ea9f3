"""The linear map y = x Wᵀ over weights as their files hold them (formats.py). No Gemma text projection has a bias.

Nothing is unpacked ahead: one token reads every weight once and widens it in a register (few_tokens.py; that read is
the cost of a token); many tokens share a panel of rows that is widened once and stays in the cache (many_tokens.py).
Sums are float32. int4 weights with sixteen rows side by side have kernels of their own (int4.py).
"""

from __future__ import annotations

import numpy as np
from numba import get_num_threads

from ..arrays import F32
from ..definition import definition, require, runs_formulas
from ..kernels import amx, int4
from ..kernels.matmul import many_tokens_in_pairs, many_tokens_on_tiles, many_tokens_widened
from ..kernels.matvec import FEW, few_tokens, one_token_sfp8
from ..layouts.int4 import SIDE
from ..layouts.weight import Weight, block_bytes, flat, is_side_by_side, rows_columns, widen

NO_ROWS = np.empty((0, 0), np.float32)
FEWER = 8  # where the matrix unit takes all others
TOGETHER = 3  # weights that one x is multiplied by in one go: q, k and v


def embed(ids: np.ndarray, weight: Weight, scale: float) -> F32:
    """Rows `ids` of the embedding, times `scale`: ids [T], weight [V, D] → [T, D] float32      [Gemma 1 §2]"""
    if is_side_by_side(weight):
        sixteen = widen(weight[ids // SIDE]).reshape(len(ids), SIDE, -1)
        return sixteen[np.arange(len(ids)), ids % SIDE] * np.float32(scale)
    return widen(weight[ids]) * np.float32(scale)


@definition
def linear(x: F32, weight: Weight) -> F32:
    """y = x Wᵀ

    x [T, D] float32, weight [R, D] → [T, R] float32
    """
    if weight.size < 1 << 24:
        return x @ widen(weight).T
    # An embedding goes in pieces: all of it in float32 at once would be gigabytes.
    return np.concatenate([x @ widen(weight[r : r + 16384]).T for r in range(0, len(weight), 16384)], axis=-1)


def affine(x: F32, weight: Weight, bias: F32 | None) -> F32:
    """y = x Wᵀ + b, or without b where there is none: x [T, D], weight [R, D], bias [R] → [T, R] float32."""
    return plus(linear(x, weight), bias)


def plus(y: F32, bias: F32 | None) -> F32:
    """y + b, or y where there is no b: y [T, R], bias [R] → [T, R] float32."""
    return y if bias is None else y + bias


def few() -> int:
    """For up to so many tokens a row of weights is used as it is read, and not as part of a panel."""
    return FEW if amx.choice()[0] == "vectors" else FEWER


def _products(x, weights):
    """x Wᵀ for up to TOGETHER weights of one format."""
    (T, D), rows, size = x.shape, [flat(weight) for weight in weights], block_bytes(weights[0])
    ys, workers = [np.empty((T, rows_columns(w)[0]), np.float32) for w in weights], get_num_threads()
    missing = TOGETHER - len(weights)  # a kernel is compiled for one number of weights
    padded, outs = tuple(rows + [rows[0][:0]] * missing), tuple(ys + [NO_ROWS] * missing)
    on_unit, side_by_side = amx.choice()[0] != "vectors", rows[0].dtype == np.uint32
    sfp8 = size == 0 and rows[0].dtype == np.uint8
    if T == 1 and sfp8:
        one_token_sfp8(workers, x[0], D, padded, outs)
    elif not sfp8 and len(x) <= few():
        few_tokens(workers, x, padded, size, outs)
    elif side_by_side and on_unit:
        int4.many_tokens_on_tiles(workers, int4.tokens_in_tiles(x), amx.new_tiles(), padded, D, outs)
    elif side_by_side:
        int4.many_tokens_side_by_side(workers, int4.in_8_bits(x), padded, D, outs)
    elif rows[0].dtype != np.float32 and on_unit:
        many_tokens_on_tiles(workers, x, padded, size, outs)
    elif size:
        many_tokens_in_pairs(workers, x, padded, size, outs)
    else:
        many_tokens_widened(workers, x, padded, size, outs)
    return ys


@linear.kernel
def _linear(x, weight):
    require(x.ndim == 2 and rows_columns(weight)[1] == x.shape[1], "linear", x, weight)
    return _products(x, [weight])[0]


def linears(x: F32, *weights: Weight) -> list[F32]:
    """[linear(x, weight) for each weight], at most TOGETHER of them. If they are of one format, they go through one
    parallel region: its start takes as long as a small product.
    """
    if runs_formulas():
        return [linear(x, weight) for weight in weights]
    for weight in weights:
        require(x.ndim == 2 and rows_columns(weight)[1] == x.shape[1], "linears", x, weight)
    alike = len({(weight.dtype, weight.ndim, weight.shape[2:]) for weight in weights}) == 1
    return _products(x, weights) if alike else [linear(x, weight) for weight in weights]
