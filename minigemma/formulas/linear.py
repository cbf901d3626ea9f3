"""The linear map y = x Wᵀ over weights in any layout (layouts/). No Gemma text projection has a bias.

Nothing is unpacked ahead: one token reads every weight once and widens it in a register (kernels/matvec.py; that read
is the cost of a token); many tokens share a panel of rows that is unpacked once and stays in the cache
(kernels/matmul.py). Sums are float32.
"""

from __future__ import annotations

import numpy as np

from ..arrays import F32
from ..definition import definition, require, runs_formulas
from ..kernels import dispatch, weights
from ..kernels.matmul import matmul
from ..kernels.matvec import TOGETHER, matvec
from ..kernels.parallel import workers
from ..kernels.product import multiply
from ..layouts import Adapted, Weight
from .lora import low_rank, low_rank_gradient

Gradients = dict[str, F32]  # of the weights of a model or a block, by their names; gradients are added to them
WIDENED = 16384  # rows of a large weight that the definition widens at once


@definition
def embed(ids: np.ndarray, weight: Weight, scale: float) -> F32:
    """Rows `ids` of the embedding, times `scale`      [Gemma 1 §2]

    ids [T], weight [V, D] → [T, D] float32
    """
    return weight.rows(ids) * np.float32(scale)


@embed.gradient
def embed_gradient(dy: F32, ids: np.ndarray, weight: Weight, scale: float) -> F32:
    """dE[v] = scale · Σ dy_t over the tokens t with id v

    dy [T, D] float32, ids [T], weight [V, D] → [V, D] float32
    """
    return embed_backward(dy, ids, scale, np.zeros(weight.shape, dy.dtype))


def embed_backward(dy: F32, ids: np.ndarray, scale: float, dweight: F32) -> F32:
    """The same added to `dweight` [V, D], which is returned; equal ids add up: 6 ms of a step for 2,048 x 256."""
    np.add.at(dweight, ids, dy * np.float32(scale))
    return dweight


@definition
def linear(x: F32, weight: Weight) -> F32:
    """y = x Wᵀ

    x [T, D] float32, weight [R, D] → [T, R] float32
    """
    R = weight.shape[0]
    parts = [x @ weight.part(r, min(r + WIDENED, R)).widen().T for r in range(0, R, WIDENED)]
    return np.concatenate(parts, axis=-1) if parts[1:] else parts[0]


@linear.gradient
def linear_gradient(dy: F32, x: F32, weight: Weight) -> tuple[F32, F32]:
    """dx = dy W and dW = dyᵀ x: dy [T, R] float32, x [T, D] float32, weight [R, D] → dx [T, D], dweight [R, D]"""
    return dy @ weight.widen(), dy.T @ x


def linear_backward(dy: F32, x: F32, weight: Weight, gradients: Gradients, name: str) -> F32:
    """dx of `linear`: dy [T, R], x [T, D], weight [R, D] → [T, D] float32.

    dW is added to the gradient of this name, dA and dB to those of name.lora_a and name.lora_b, where there are any.
    """
    if runs_formulas():
        dx, dweight = linear_gradient(dy, x, weight)
        add(gradients, name, dweight)
    else:
        dx = _linear_backward(dy, x, weight.base, gradients.get(name))
    if isinstance(weight, Adapted):
        beside, da, db = low_rank_gradient(dy, x, weight.a, weight.b, weight.scale)
        dx = dx if runs_formulas() else dx + beside
        add(gradients, f"{name}.lora_a", da)
        add(gradients, f"{name}.lora_b", db)
    return dx


def _linear_backward(dy: F32, x: F32, weight: Weight, dweight: F32 | None) -> F32:
    """dx by kernels; dW is added to `dweight`, if that is given."""
    fits = x.ndim == 2 and dy.shape == (len(x), weight.shape[0]) and x.shape[1] == weight.shape[1]
    fits = fits and (dweight is None or (dweight.shape == weight.shape and dweight.flags.c_contiguous))
    require(fits, "linear_backward", dy, x, weight)
    if dweight is not None:
        multiply(dy.T, x, dweight, adds=True)
    return multiply(dy, weight.widen(), np.empty(x.shape, np.float32))


def add(gradients: Gradients, name: str, value: F32) -> None:
    """Add to the gradient of this name; without one it is not wanted: the parameter is frozen."""
    if name in gradients:
        gradients[name] += value


@linear_gradient.kernel
def _linear_gradient(dy, x, weight):
    dweight = np.zeros(weight.shape, np.float32)
    beside = low_rank(dy, weight.b.T, weight.a.T, weight.scale) if isinstance(weight, Adapted) else np.float32(0)
    return _linear_backward(dy, x, weight.base, dweight) + beside, dweight


def affine(x: F32, weight: Weight, bias: F32 | None) -> F32:
    """y = x Wᵀ + b, or without b where there is none: x [T, D], weight [R, D], bias [R] → [T, R] float32."""
    return plus(linear(x, weight), bias)


def plus(y: F32, bias: F32 | None) -> F32:
    """y + b, or y where there is no b: y [T, R], bias [R] → [T, R] float32."""
    return y if bias is None else y + bias


def _products(x, matrices):
    """x Wᵀ for up to TOGETHER weights of one layout."""
    rows = [weights.of(weight) for weight in matrices]
    ys = [np.empty((len(x), weight.rows), np.float32) for weight in rows]
    missing = TOGETHER - len(rows)  # a kernel is compiled for one number of weights
    padded = *rows, *[weights.no_rows(rows[0])] * missing
    outs = *ys, *[ys[0][:0]] * missing
    if x.shape[1] < rows[0].columns:
        x = np.pad(x, ((0, 0), (0, rows[0].columns - x.shape[1])))
    path = dispatch.path_for(matrices[0].layout.name, rows[0], len(x))
    if path.pack is None:
        matvec(workers(), x, padded, outs)
    else:
        matmul(workers(), path.pack(x), padded, outs)
    for weight, y in zip(matrices, ys, strict=True):
        if isinstance(weight, Adapted):
            y += low_rank(x[:, : weight.shape[1]], weight.a, weight.b, weight.scale)
    return ys


@linear.kernel
def _linear(x, weight):
    require(x.ndim == 2 and weight.shape[1] == x.shape[1], "linear", x, weight)
    return _products(x, [weight])[0]


def linears(x: F32, *matrices: Weight) -> list[F32]:
    """[linear(x, weight) for each weight of `matrices`], at most TOGETHER of them. Those of one layout go through one
    parallel region: its start takes as long as a small product.
    """
    if runs_formulas():
        return [linear(x, weight) for weight in matrices]
    for weight in matrices:
        require(x.ndim == 2 and weight.shape[1] == x.shape[1], "linears", x, weight)
    alike = len({weight.layout.name for weight in matrices}) == 1
    return _products(x, matrices) if alike else [linear(x, weight) for weight in matrices]
