"""One token through one layer, in one call of compiled code.

Between two kernels Python takes a few microseconds. Beside a prompt that is nothing; but a token calls twenty kernels a
layer, and in 18 layers of the 270M Python would take as long as reading a third of the weights. So the layer stands
here a second time, as Numba sees it: the same kernels in the same order, called by compiled code. What a layer is, the
block of gemma.py, gemma2.py and gemma3.py says; a test holds both to the same numbers. Where a value is tapped, or a
weight is in SFP8 or has a bias, the block itself runs.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, cast

import numpy as np
from numba import get_num_threads, types
from numba.extending import overload

from .arrays import F32, aligned, read_only
from .attention import EVERYTHING, SPLIT, few_parts, join
from .backend import jit, jit_inner
from .cache import Cache, KeyValueRing
from .config import TextConfig
from .geglu import gated_gelu_row
from .linear import BLOCK, block_bytes, few_tokens, few_tokens_blocks, flat, format_of, round_to_16_bits
from .rmsnorm import norm_row
from .rope import frequencies, turn
from .simd import LANES, bf16_bits

NORMS = ("pre_attention_norm", "post_attention_norm", "pre_ffn_norm", "post_ffn_norm")
ABSENT = read_only(np.empty(0, np.float32))  # a norm that a model does not have
NONE = np.empty((0, 0), np.float32)


def _products(x, whole, scales, weights, size, workers, ys):
    """ys[i] = weights[i] x for TOGETHER weights of one format; `size`: bytes of 32 weights."""


@jit_inner
def _plain_products(x, whole, scales, weights, size, workers, ys):
    few_tokens(x, x.size, weights, workers, ys)


@jit_inner
def _block_products(x, whole, scales, weights, size, workers, ys):
    round_to_16_bits(x, whole, scales)
    few_tokens_blocks(whole, scales, x.size // BLOCK, weights, size, workers, ys)


@overload(_products)
def _choose_products(x, whole, scales, weights, size, workers, ys):
    chosen = _block_products if weights[0].dtype == types.uint8 else _plain_products
    return lambda x, whole, scales, weights, size, workers, ys: chosen(x, whole, scales, weights, size, workers, ys)


def _keep(x, out):
    """out = x, which is rounded where out is bf16: both of one axis."""


@overload(_keep)
def _choose_keep(x, out):
    if out.dtype == types.uint16:

        def keep(x, out):
            for i in range(x.size):
                out[i] = bf16_bits(x[i])
    else:

        def keep(x, out):
            for i in range(x.size):
                out[i] = x[i]

    return keep


@jit
def _layer(
    x,
    norms,
    head_norms,
    eps,
    matrices,
    sizes,
    frequency,
    query_scale,
    cap,
    window,
    keys,
    values,
    slot,
    places,
    position,
    whole,
    scales,
    none,
    workers,
):
    """x [D] becomes the residual after this layer; `slot` of keys and values [S, K, H] takes in the token's own.

    matrices: one axis each; sizes: N · H, F, then the bytes of 32 weights in W_q, W_o, W_gate and W_down.
    """
    pre, post, pre_ffn, post_ffn = norms
    wq, wk, wv, wo, gate, up, down = matrices
    D, (S, K, H), nothing = x.size, keys.shape, wq[:0]
    h, y = np.empty(D, np.float32), np.empty((1, D), np.float32)

    norm_row(x, pre, eps, h)
    q, k, v = np.empty((1, sizes[0]), np.float32), np.empty((1, K * H), np.float32), np.empty((1, K * H), np.float32)
    _products(h, whole, scales, (wq, wk, wv), sizes[2], workers, (q, k, v))
    q_heads, k_heads = q.reshape(-1, H), k.reshape(-1, H)
    if head_norms[0].size:
        for n in range(len(q_heads)):
            norm_row(q_heads[n], head_norms[0], eps, q_heads[n])
        for n in range(K):
            norm_row(k_heads[n], head_norms[1], eps, k_heads[n])
    turn(q_heads, position[0], frequency, q_heads)
    turn(k_heads, position[0], frequency, k_heads)
    _keep(k.reshape(-1), keys[slot].reshape(-1))
    _keep(v.reshape(-1), values[slot].reshape(-1))

    G, parts = len(q_heads) // K, max(1, min(workers, S * K // SPLIT))
    states, totals = np.empty((K * parts, G, 2), np.float32), np.empty((K * parts, G, H), np.float32)
    grouped, mixed = q.reshape(1, K, G, H), np.empty((K, G, H), np.float32)
    few_parts(grouped, keys, values, position, position, places, window, query_scale, cap, parts, states, totals)
    join(states, totals, mixed)
    _products(mixed.reshape(-1), whole, scales, (wo, nothing, nothing), sizes[3], workers, (y, none, none))
    if post.size:
        norm_row(y[0], post, eps, y[0])
    for d in range(D):
        x[d] += y[0, d]

    norm_row(x, pre_ffn, eps, h)
    opened, other = np.empty((1, sizes[1]), np.float32), np.empty((1, sizes[1]), np.float32)
    _products(h, whole, scales, (gate, up, nothing), sizes[4], workers, (opened, other, none))
    gated_gelu_row(opened[0], other[0], opened[0])
    _products(opened[0], whole, scales, (down, nothing, nothing), sizes[5], workers, (y, none, none))
    if post_ffn.size:
        norm_row(y[0], post_ffn, eps, y[0])
    for d in range(D):
        x[d] += y[0, d]


class OneToken:
    """The layers of a model, their arrays as `_layer` takes them."""

    def __init__(self, config: TextConfig, blocks: Sequence[Any]) -> None:
        self.layers = [self._arguments(config, i, block) for i, block in enumerate(blocks)]
        self.longest = max(config.width, config.heads * config.head_dim, config.ffn_width)

    @staticmethod
    def _arguments(config: TextConfig, layer: int, block: Any) -> tuple:
        c, a, f = config.attention(layer), block.attention, block.ffn
        matrices = a.q, a.k, a.v, a.o, f.gate, f.up, f.down
        sizes = [block_bytes(weight) for weight in (a.q, a.o, f.gate, f.down)]
        return (
            tuple(getattr(block, name, ABSENT) for name in NORMS),
            (a.q_norm, a.k_norm) if a.q_norm is not None else (ABSENT, ABSENT),
            config.eps,
            tuple(flat(weight) for weight in matrices),
            (len(a.q), len(f.gate), *sizes),
            frequencies(c.rope_base, c.rope_scale, int(config.head_dim * c.rope_fraction)),
            np.float32(c.query_scale),
            np.float32(c.soft_cap or 0),
            np.float32(c.window or EVERYTHING),
        )

    def __call__(self, x: F32, cache: Cache) -> F32:
        """x [1, D], the token's embedding, → [1, D], the residual after the last layer; each ring takes it in."""
        position, workers = np.array([cache.position], np.int32), get_num_threads()
        whole, scales = aligned(self.longest, np.int16), np.empty(1, np.float32)
        for arguments, ring in zip(self.layers, cast(tuple[KeyValueRing, ...], cache.layers), strict=True):
            _layer(x[0], *arguments, *ring.place(cache.position), position, whole, scales, NONE, workers)
        return x


def one_token(config: TextConfig, blocks: Sequence[Any]) -> OneToken | None:
    """The layers for one token at a time; None where they are not all of the kind that `_layer` knows."""
    for block in blocks:
        a, f = getattr(block, "attention", None), block.ffn
        if a is None or a.o_bias is not None or f.down_bias is not None or config.head_dim % (2 * LANES):
            return None
        matrices = a.q, a.k, a.v, a.o, f.gate, f.up, f.down
        kinds = [(weight.dtype, weight.ndim, weight.shape[2:]) for weight in matrices]
        if "sfp8" in map(format_of, matrices) or len({kind[:2] for kind in kinds}) > 1:
            return None
        if len(set(kinds[:3])) > 1 or len(set(kinds[4:6])) > 1:
            return None
    return OneToken(config, blocks)
