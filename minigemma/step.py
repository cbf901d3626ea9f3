"""One token through one layer, in one call of compiled code.

Between two kernels Python takes a few microseconds. Beside a prompt that is nothing; but a token calls twenty kernels a
layer, and in 18 layers of the 270M Python would take as long as reading a third of the weights. So the layer stands
here a second time, as Numba sees it: the same kernels in the same order, called by compiled code. What a layer is, the
block of gemma.py, gemma2.py and gemma3.py says; a test holds both to the same numbers. Where a value is tapped, or a
weight is in SFP8 or has a bias, the block itself runs.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise
from typing import Any, cast

import numpy as np
from numba import get_num_threads, prange, types
from numba.extending import overload

from .arrays import F32, read_only
from .attention import EVERYTHING, SPLIT, few_part, join
from .backend import jit_inner, jit_parallel
from .cache import Cache, KeyValueRing
from .config import TextConfig
from .crew import PIECES, claim, new_board, together
from .geglu import gated_gelu_row
from .linear import (
    BLOCK,
    block_bytes,
    few_tokens_blocks_piece,
    few_tokens_piece,
    flat,
    format_of,
    round_to_16_bits,
    rounded,
)
from .rmsnorm import norm_row
from .rope import angles, turn
from .simd import LANES, bf16_bits

NORMS = ("pre_attention_norm", "post_attention_norm", "pre_ffn_norm", "post_ffn_norm")
ABSENT = read_only(np.empty(0, np.float32))  # a norm that a model does not have
NONE = np.empty((0, 0), np.float32)


def _products(x, whole, scales, weights, size, ys, board, step, worker, workers, ahead, at):
    """ys[i] = weights[i] x for TOGETHER weights of one format, as a step of the crew; `size`: bytes of 32 weights."""


@jit_inner
def _plain_products(x, whole, scales, weights, size, ys, board, step, worker, workers, ahead, at):
    pieces, done = PIECES * workers, 0
    piece = claim(board, step, worker, workers, pieces)
    while piece >= 0:
        few_tokens_piece(x, x.size, weights, piece, pieces, ys)
        done += 1
        piece = claim(board, step, worker, workers, pieces)
    together(board, step, done, workers, pieces, ahead, at)


@jit_inner
def _block_products(x, whole, scales, weights, size, ys, board, step, worker, workers, ahead, at):
    pieces, done = PIECES * workers, 0
    round_to_16_bits(x, whole, scales)
    piece = claim(board, step, worker, workers, pieces)
    while piece >= 0:
        few_tokens_blocks_piece(whole, scales, x.size // BLOCK, weights, size, piece, pieces, ys)
        done += 1
        piece = claim(board, step, worker, workers, pieces)
    together(board, step, done, workers, pieces, ahead, at)


@overload(_products)
def _choose_products(x, whole, scales, weights, size, ys, board, step, worker, workers, ahead, at):
    chosen = _block_products if weights[0].dtype == types.uint8 else _plain_products
    return lambda x, whole, scales, weights, size, ys, board, step, worker, workers, ahead, at: chosen(
        x, whole, scales, weights, size, ys, board, step, worker, workers, ahead, at
    )


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


@jit_inner
def _attend(
    q, k, v, keys, values, slot, places, position, window, scale, cap, board, worker, workers, states, totals, ahead, at
):
    """Step 1: the keys in parts, one a thread if they are many. The part with `slot` takes in k and v [K · H]."""
    S, K = keys.shape[:2]
    parts = len(states) // K
    size, done = (S + parts - 1) // parts, 0
    part = claim(board, 1, worker, workers, parts)
    while part >= 0:
        if part == slot // size:
            _keep(k, keys[slot].reshape(-1))
            _keep(v, values[slot].reshape(-1))
        few_part(q, keys, values, position, position, places, window, scale, cap, parts, part, states, totals)
        done += 1
        part = claim(board, 1, worker, workers, parts)
    together(board, 1, done, workers, parts, ahead, at)


@jit_inner
def _share(
    worker,
    workers,
    board,
    x,
    norms,
    head_norms,
    eps,
    matrices,
    following,
    sizes,
    cos,
    sin,
    scale,
    cap,
    window,
    keys,
    values,
    slot,
    places,
    position,
    whole,
    none,
    qkv,
    states,
    totals,
    y,
    opened,
    z,
    after,
):
    """What one thread does of the layer. What has no products every thread does for itself: that is sooner done than
    handed over. `after` [D] becomes the residual after attention, z [1, D] the other branch.
    """
    pre, post, pre_ffn = norms[:3]
    wq, wk, wv, wo, gate, up, down = matrices
    D, K, H, nothing, scales = x.size, keys.shape[1], keys.shape[2], wq[:0], np.empty(1, np.float32)
    h = np.empty(D, np.float32)

    norm_row(x, pre, eps, h)
    _products(h, whole, scales, (wq, wk, wv), sizes[2], qkv, board, 0, worker, workers, wo, worker * wo.size // workers)
    q, k = qkv[0].reshape(-1, H).copy(), qkv[1].reshape(-1, H).copy()
    if head_norms[0].size:
        for n in range(len(q)):
            norm_row(q[n], head_norms[0], eps, q[n])
        for n in range(K):
            norm_row(k[n], head_norms[1], eps, k[n])
    turn(q, cos, sin, q)
    turn(k, cos, sin, k)

    G = len(q) // K
    _attend(
        q.reshape(1, K, G, H),
        k.reshape(-1),
        qkv[2].reshape(-1),
        keys,
        values,
        slot,
        places,
        position,
        window,
        scale,
        cap,
        board,
        worker,
        workers,
        states,
        totals,
        wo,
        worker * wo.size // workers,
    )
    mixed = np.empty((K, G, H), np.float32)
    join(states, totals, mixed)
    at = worker * gate.size // workers
    _products(
        mixed.reshape(-1),
        whole,
        scales,
        (wo, nothing, nothing),
        sizes[3],
        (y, none, none),
        board,
        2,
        worker,
        workers,
        gate,
        at,
    )
    if post.size:
        norm_row(y[0], post, eps, h)
    else:
        h[:] = y[0]
    for d in range(D):
        after[d] = x[d] + h[d]

    norm_row(after, pre_ffn, eps, h)
    at = worker * down.size // workers
    _products(
        h,
        whole,
        scales,
        (gate, up, nothing),
        sizes[4],
        (opened[:1], opened[1:], none),
        board,
        3,
        worker,
        workers,
        down,
        at,
    )
    gated = np.empty(opened.shape[1], np.float32)
    gated_gelu_row(opened[0], opened[1], gated)
    at = worker * following.size // workers
    _products(
        gated,
        whole,
        scales,
        (down, nothing, nothing),
        sizes[5],
        (z, none, none),
        board,
        4,
        worker,
        workers,
        following,
        at,
    )


@jit_parallel
def _layer(
    x,
    norms,
    head_norms,
    eps,
    matrices,
    following,
    sizes,
    cos,
    sin,
    scale,
    cap,
    window,
    keys,
    values,
    slot,
    places,
    position,
    whole,
    none,
    workers,
):
    """x [D] becomes the residual after this layer; `slot` of keys and values [S, K, H] takes in the token's own.

    matrices: one axis each; `following`: the first of the next layer; sizes: N · H, F, then the bytes of 32 weights in
    W_q, W_o, W_gate and W_down.
    """
    D, (S, K, H) = x.size, keys.shape
    G, parts = sizes[0] // H // K, max(1, min(workers, S * K // SPLIT))
    qkv = np.empty((1, sizes[0]), np.float32), np.empty((1, K * H), np.float32), np.empty((1, K * H), np.float32)
    states, totals = np.empty((K * parts, G, 2), np.float32), np.empty((K * parts, G, H), np.float32)
    y, opened, z = np.empty((1, D), np.float32), np.empty((2, sizes[1]), np.float32), np.empty((1, D), np.float32)
    after, board = np.empty((workers, D), np.float32), new_board(5, workers)
    for worker in prange(workers):
        _share(
            np.int64(worker),
            workers,
            board,
            x,
            norms,
            head_norms,
            eps,
            matrices,
            following,
            sizes,
            cos,
            sin,
            scale,
            cap,
            window,
            keys,
            values,
            slot,
            places,
            position,
            whole[worker],
            none,
            qkv,
            states,
            totals,
            y,
            opened,
            z,
            after[worker],
        )
    if norms[3].size:
        norm_row(z[0], norms[3], eps, z[0])
    for d in range(D):
        x[d] = after[0, d] + z[0, d]


class OneToken:
    """The layers of a model, their arrays as `_layer` takes them."""

    def __init__(self, config: TextConfig, blocks: Sequence[Any]) -> None:
        self.layers = [self._arguments(config, i, *pair) for i, pair in enumerate(pairwise([*blocks, blocks[-1]]))]
        attentions = [config.attention(i) for i in range(len(blocks))]
        self.ropes = [(c.rope_base, c.rope_scale, int(config.head_dim * c.rope_fraction)) for c in attentions]
        self.longest = max(config.width, config.heads * config.head_dim, config.ffn_width)

    @staticmethod
    def _arguments(config: TextConfig, layer: int, block: Any, following: Any) -> tuple:
        c, a, f = config.attention(layer), block.attention, block.ffn
        matrices = a.q, a.k, a.v, a.o, f.gate, f.up, f.down
        sizes = [block_bytes(weight) for weight in (a.q, a.o, f.gate, f.down)]
        before = (
            tuple(getattr(block, name, ABSENT) for name in NORMS),
            (a.q_norm, a.k_norm) if a.q_norm is not None else (ABSENT, ABSENT),
            config.eps,
            tuple(flat(weight) for weight in matrices),
            flat(following.attention.q),
            (len(a.q), len(f.gate), *sizes),
        )
        return before, (
            np.float32(c.query_scale),
            np.float32(c.soft_cap or 0),
            np.float32(c.window or EVERYTHING),
        )

    def __call__(self, x: F32, cache: Cache) -> F32:
        """x [1, D], the token's embedding, → [1, D], the residual after the last layer; each ring takes it in."""
        position, workers = np.array([cache.position], np.int32), get_num_threads()
        whole = rounded(workers, self.longest).reshape(workers, -1)
        turns = {rope: [a[0] for a in angles(position, *rope)] for rope in set(self.ropes)}
        rings = cast(tuple[KeyValueRing, ...], cache.layers)
        for layer, rope, ring in zip(self.layers, self.ropes, rings, strict=True):
            before, after = layer
            _layer(x[0], *before, *turns[rope], *after, *ring.place(cache.position), position, whole, NONE, workers)
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
