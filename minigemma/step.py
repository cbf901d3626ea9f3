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
from numba import get_num_threads, types
from numba.extending import overload

from .arrays import F32, read_only
from .attention import EVERYTHING, SPLIT, few_part, join
from .backend import INNER, jit, jit_inner
from .cache import Cache, KeyValueRing
from .config import TextConfig
from .crew import PIECES, claim, new_board, share_out, together
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


def _products(x, weights, size, ys, room, board, step, worker, workers, ahead):
    """ys[i] = weights[i] x as a step of the crew: weights of one format, `size` bytes for 32. Who waits for the others
    reads of `ahead`, which comes next. `room` is this thread's own, for x in whole numbers and its scale.
    """


@jit_inner
def _plain_products(x, weights, size, ys, room, board, step, worker, workers, ahead):
    pieces, done = PIECES * workers, 0
    piece = claim(board, step, worker, workers, pieces)
    while piece >= 0:
        few_tokens_piece(piece, pieces, x, x.size, weights, ys)
        done += 1
        piece = claim(board, step, worker, workers, pieces)
    together(board, step, done, workers, pieces, ahead, worker * ahead.size // workers)


@jit_inner
def _block_products(x, weights, size, ys, room, board, step, worker, workers, ahead):
    (whole, scales), pieces, done = room, PIECES * workers, 0
    round_to_16_bits(x, whole, scales)
    piece = claim(board, step, worker, workers, pieces)
    while piece >= 0:
        few_tokens_blocks_piece(piece, pieces, whole, scales, x.size // BLOCK, weights, size, ys)
        done += 1
        piece = claim(board, step, worker, workers, pieces)
    together(board, step, done, workers, pieces, ahead, worker * ahead.size // workers)


@overload(_products, jit_options=INNER)
def _choose_products(x, weights, size, ys, room, board, step, worker, workers, ahead):
    return (_plain_products if weights[0].dtype in (types.float32, types.uint16) else _block_products).py_func


def _keep(x, out):
    """out = x, which is rounded where out is bf16: both of one axis."""


@overload(_keep, jit_options=INNER)
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
def _attend(q, k, v, keys, values, slot, places, position, limits, states, totals, board, worker, workers, ahead):
    """Step 1: the keys in parts, one a thread if they are many. The part with `slot` takes in k and v [K · H]."""
    (S, K), (window, scale, cap) = keys.shape[:2], limits
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
    together(board, 1, done, workers, parts, ahead, worker * ahead.size // workers)


@jit_inner
def _work(
    worker, workers, board, x, norms, head_norms, eps, matrices, following, sizes, turns, limits, ring, rooms, out
):
    """What one thread does of the layer. What has no products every thread does for itself: that is sooner done than
    handed over. It leaves in `out` what the threads have made together, and in after[worker] what each has made.
    """
    (pre, post, pre_ffn, _), (wq, wk, wv, wo, gate, up, down) = norms, matrices
    (cos, sin), (keys, values, slot, places, position) = turns, ring
    mine, (qs, ks, vs, states, totals, y, opened, z, after) = (rooms[0][worker], rooms[1][worker]), out
    D, K, H = x.size, keys.shape[1], keys.shape[2]
    residual, h = after[worker], np.empty(D, np.float32)

    norm_row(x, pre, eps, h)
    _products(h, (wq, wk, wv), sizes[2], (qs, ks, vs), mine, board, 0, worker, workers, wo)
    q, k = qs.reshape(-1, H).copy(), ks.reshape(-1, H).copy()
    if head_norms[0].size:
        for n in range(len(q)):
            norm_row(q[n], head_norms[0], eps, q[n])
        for n in range(K):
            norm_row(k[n], head_norms[1], eps, k[n])
    turn(q, cos, sin, q)
    turn(k, cos, sin, k)

    grouped, mixed = q.reshape(1, K, len(q) // K, H), np.empty((K, len(q) // K, H), np.float32)
    v, flat_k = vs.reshape(-1), k.reshape(-1)
    _attend(
        grouped, flat_k, v, keys, values, slot, places, position, limits, states, totals, board, worker, workers, wo
    )
    join(states, totals, mixed)
    _products(mixed.reshape(-1), (wo,), sizes[3], (y,), mine, board, 2, worker, workers, gate)
    if post.size:
        norm_row(y[0], post, eps, h)
    for d in range(D):
        residual[d] = x[d] + (h[d] if post.size else y[0, d])

    norm_row(residual, pre_ffn, eps, h)
    _products(h, (gate, up), sizes[4], (opened[:1], opened[1:]), mine, board, 3, worker, workers, down)
    gated = np.empty(opened.shape[1], np.float32)
    gated_gelu_row(opened[0], opened[1], gated)
    _products(gated, (down,), sizes[5], (z,), mine, board, 4, worker, workers, following)


@jit
def _layer(workers, x, norms, head_norms, eps, matrices, following, sizes, turns, limits, ring, rooms):
    """x [D] becomes the residual after this layer; the ring takes in the token's key and value.

    matrices: one axis each; `following`: the first of the next layer; sizes: N · H, F, then the bytes of 32 weights in
    W_q, W_o, W_gate and W_down; turns: cosine and sine of rope; limits: window, scale and cap of attention; ring: keys
    and values [S, K, H], the token's slot, all positions, its own; rooms: for each thread, what `_products` needs.
    """
    D, (S, K, H) = x.size, ring[0].shape
    G, parts = sizes[0] // H // K, max(1, min(workers, S * K // SPLIT))
    qs, ks, vs = np.empty((1, sizes[0]), np.float32), np.empty((1, K * H), np.float32), np.empty((1, K * H), np.float32)
    states, totals = np.empty((K * parts, G, 2), np.float32), np.empty((K * parts, G, H), np.float32)
    y, opened, z = np.empty((1, D), np.float32), np.empty((2, sizes[1]), np.float32), np.empty((1, D), np.float32)
    board, after = new_board(5, workers), np.empty((workers, D), np.float32)
    out = qs, ks, vs, states, totals, y, opened, z, after
    share_out(
        _work, workers, (board, x, norms, head_norms, eps, matrices, following, sizes, turns, limits, ring, rooms, out)
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
        return before, (np.float32(c.window or EVERYTHING), np.float32(c.query_scale), np.float32(c.soft_cap or 0))

    def __call__(self, x: F32, cache: Cache) -> F32:
        """x [1, D], the token's embedding, → [1, D], the residual after the last layer; each ring takes it in."""
        position, workers = np.array([cache.position], np.int32), get_num_threads()
        rooms = rounded(workers, self.longest).reshape(workers, -1), np.empty((workers, 1), np.float32)
        turns = {rope: tuple(a[0] for a in angles(position, *rope)) for rope in set(self.ropes)}
        rings = cast(tuple[KeyValueRing, ...], cache.layers)
        for layer, rope, ring in zip(self.layers, self.ropes, rings, strict=True):
            before, limits = layer
            _layer(workers, x[0], *before, turns[rope], limits, (*ring.place(cache.position), position), rooms)
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
