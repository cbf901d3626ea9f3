"""One layer for one token, as one thread does its share of it: the blocks of gemma.py, gemma2.py, gemma3.py and
recurrentgemma.py a second time, the same kernels in the same order, called by compiled code (step.py says why).

A layer is five steps of a crew (crew.py), each shared out among the threads. What has no weights every thread does for
itself: that is sooner done than handed over.

    0  W_q, W_k and W_v; or W_y and W_x
    1  attention, the keys in parts; or the recurrence, the blocks of its gates in parts
    2  W_out
    3  W_gate and W_up
    4  W_down
"""

from __future__ import annotations

import numpy as np
from numba import types
from numba.extending import overload

from .amx import on_cache_line
from .attention import few_part, join
from .backend import INNER, jit_inner
from .conv1d import conv_row
from .crew import LINE, PIECES, claim, share, together
from .few_tokens import OFFSETS, few_tokens_blocks_piece, few_tokens_piece, round_to_16_bits
from .formats import BLOCK
from .geglu import gated_gelu_row
from .int4 import round_blocks
from .rglru import block_row, token_row
from .rmsnorm import norm_row
from .rope import turn
from .simd import LANES, bf16_bits

PLAIN = (types.float32, types.uint16)  # weights that are numbers themselves
STEPS = 5  # of a layer


@jit_inner
def of_layer(board, i, workers):
    """The counters of layer i on a board of all layers."""
    return board[i * STEPS * (workers + 1) * LINE :]


def _products(x, weights, size, ys, board, step, worker, workers, ahead):
    """ys[i] = weights[i] x as a step of the crew: weights of one format, `size` bytes for 32. Who waits for the others
    reads of `ahead`, which comes next.
    """


@jit_inner
def _plain_products(x, weights, size, ys, board, step, worker, workers, ahead):
    pieces, done = PIECES * workers, 0
    piece = claim(board, step, worker, workers, pieces)
    while piece >= 0:
        few_tokens_piece(piece, pieces, PIECES, x, x.size, weights, ys)
        done += 1
        piece = claim(board, step, worker, workers, pieces)
    together(board, step, done, workers, pieces, ahead, worker * ahead.size // workers)


def _whole(x, weight):
    """x [D] in whole numbers as rows of this weight want it, and their scales."""


@jit_inner
def in_whole(x, weight):
    """x [D] in whole numbers of 16 bits, and their scale."""
    size = x.size // BLOCK * (BLOCK + OFFSETS)
    whole, scales = on_cache_line(np.empty(size + 32, np.int16), size), np.empty(1, np.float32)
    round_to_16_bits(x, whole, scales)
    return whole, scales


@jit_inner
def _whole_for_rows_side_by_side(x, weight):
    whole, blocks = np.empty(x.size, np.int8), x.size // BLOCK
    scales, starts = np.empty(blocks, np.float32), np.empty(blocks, np.int32)
    round_blocks(x, whole, scales, starts, 0, blocks)
    return whole, scales, starts


@overload(_whole, jit_options=INNER)
def _choose_whole(x, weight):
    return (_whole_for_rows_side_by_side if weight.dtype == types.uint32 else in_whole).py_func


@jit_inner
def _block_products(x, weights, size, ys, board, step, worker, workers, ahead):
    whole, pieces, done = _whole(x, weights[0]), PIECES * workers, 0
    piece = claim(board, step, worker, workers, pieces)
    while piece >= 0:
        few_tokens_blocks_piece(piece, pieces, PIECES, whole, x.size // BLOCK, weights, size, ys)
        done += 1
        piece = claim(board, step, worker, workers, pieces)
    together(board, step, done, workers, pieces, ahead, worker * ahead.size // workers)


@overload(_products, jit_options=INNER)
def _choose_products(x, weights, size, ys, board, step, worker, workers, ahead):
    return (_plain_products if weights[0].dtype in PLAIN else _block_products).py_func


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
def _plus(y, bias):
    """y + bias, or y where there is no bias."""
    if not bias.size:
        return y
    out = np.empty(y.size, np.float32)
    for i in range(y.size):
        out[i] = y[i] + bias[i]
    return out


@jit_inner
def _add(x, y, bias, gain, eps):
    """x += norm(y + bias), where there are a norm and a bias."""
    h = _plus(y, bias)
    if gain.size:
        normed = np.empty(x.size, np.float32)
        norm_row(h, gain, eps, normed)
        h = normed
    for d in range(x.size):
        x[d] += h[d]


@jit_inner
def _rest(worker, workers, board, x, mixed, eps, common, sizes, out):
    """Steps 2 to 4, what follows on attention or recurrence: W_out, the residual, and the feed-forward block."""
    (post, pre_ffn, post_ffn, out_bias, gate_bias, up_bias, down_bias), (w_out, gate, up, down, following) = common
    (y, opened, z), h = out, np.empty(x.size, np.float32)
    nothing = y[:0]  # `_products` takes three weights each time, so that it is compiled once
    _products(mixed, (w_out, w_out[:0], w_out[:0]), sizes[1], (y, nothing, nothing), board, 2, worker, workers, gate)
    _add(x, y[0], out_bias, post, eps)
    norm_row(x, pre_ffn, eps, h)
    _products(h, (gate, up, up[:0]), sizes[2], (opened[:1], opened[1:], nothing), board, 3, worker, workers, down)
    gated = np.empty(opened.shape[1], np.float32)
    gated_gelu_row(_plus(opened[0], gate_bias), _plus(opened[1], up_bias), gated)
    _products(gated, (down, down[:0], down[:0]), sizes[3], (z, nothing, nothing), board, 4, worker, workers, following)
    _add(x, z[0], down_bias, post_ffn, eps)


@jit_inner
def attention_layer(worker, workers, board, x, eps, own, common, sizes, turns, limits, ring, room, out):
    """A layer with attention: the block of gqa.py, then `_rest`. x [D], this thread's residual, becomes the next."""
    pre, (wq, wk, wv), head_norms = own
    (cos, sin), (keys, values, slot, places, position) = turns, ring
    qs, ks, vs, states, totals = room
    K, H, wo, h = keys.shape[1], keys.shape[2], common[1][0], np.empty(x.size, np.float32)

    norm_row(x, pre, eps, h)
    _products(h, (wq, wk, wv), sizes[0], (qs, ks, vs), board, 0, worker, workers, wo)
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
    _rest(worker, workers, board, x, mixed.reshape(-1), eps, common, sizes, out)


@jit_inner
def _remember(seen, z, gates, decay, before, start, made, board, worker, workers, ahead):
    """Step 1: the recurrence, each block of the gates in parts. made [C, E], the new tail and h, is written to."""
    r_gate, r_bias, i_gate, i_bias = gates
    (M, size), tail = r_bias.shape, len(made) - 1
    recurrence, entering = np.empty(z.size, np.float32), np.empty(z.size, np.float32)
    parts = min(size // LANES, (PIECES * workers // 2 + M - 1) // M)  # few: rows of a block are best read whole
    pieces, done = M * parts, 0
    piece = claim(board, 1, worker, workers, pieces)
    while piece >= 0:
        m, vectors = piece // parts, share(piece % parts, parts, size // LANES)
        first, last = vectors.start * LANES, vectors.stop * LANES
        block_row(z, r_gate, r_bias, m, first, last, recurrence)
        block_row(z, i_gate, i_bias, m, first, last, entering)
        first, last = m * size + first, m * size + last
        token_row(z, recurrence, entering, decay, before, start, first, last, made[tail])
        for c in range(tail):
            for e in range(first, last):
                made[c, e] = seen[c + 1, e]
        done += 1
        piece = claim(board, 1, worker, workers, pieces)
    together(board, 1, done, workers, pieces, ahead, worker * ahead.size // workers)


@jit_inner
def recurrent_layer(worker, workers, board, x, eps, own, common, sizes, state, room, out):
    """A recurrent layer: the block of griffin.py, then `_rest`. x [D], this thread's residual, becomes the next one;
    made [C, E] is what the layer will remember: tail, and h.
    """
    pre, (wy, wx), (y_bias, x_bias), (conv, conv_bias), gates, decay = own
    (tail, before, start, made), (ys, xs), w_out = state, room, common[1][0]
    h, z, mixed = np.empty(x.size, np.float32), np.empty(before.size, np.float32), np.empty(before.size, np.float32)

    norm_row(x, pre, eps, h)
    _products(h, (wy, wx, wx[:0]), sizes[0], (ys, xs, xs[:0]), board, 0, worker, workers, gates[0])
    seen, newest = np.empty(conv.shape, np.float32), _plus(xs[0], x_bias)
    for e in range(newest.size):
        for c in range(len(tail)):
            seen[c, e] = tail[c, e]
        seen[len(tail), e] = newest[e]
    conv_row(seen, 0, conv, conv_bias, z)
    _remember(seen, z, gates, decay, before, start, made, board, worker, workers, w_out)
    gated_gelu_row(_plus(ys[0], y_bias), made[-1], mixed)
    _rest(worker, workers, board, x, mixed, eps, common, sizes, out)
