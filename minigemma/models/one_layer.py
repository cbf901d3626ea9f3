"""One layer for a few tokens, as one thread does its share of it: the blocks of gemma.py, gemma2.py, gemma3.py and
recurrentgemma.py a second time, the same kernels in the same order, called by compiled code (step.py says why).

A layer is five steps of a crew (crew.py), each shared out among the threads. What has no weights every thread does for
itself: for one token that is sooner done than handed over, and for sixteen it is little beside the products.

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

from ..kernels.attention_decode import Partials, attend_partition, merge_partitions
from ..kernels.compiler import INNER, jit_inner
from ..kernels.matvec import matvec_task, ready
from ..kernels.parallel import LINE, PIECES, barrier, chunk, next_task
from ..kernels.rows import conv_row, gated_gelu_row, norm_row, rotate
from ..kernels.scan import block_row, token_row
from ..kernels.scores import Keys, Queries, Scoring
from ..kernels.simd import LANES, bf16_bits
from ..kernels.views import new_array, reshaped

STEPS = 5  # of a layer


@jit_inner
def of_layer(board, i, workers):
    """The counters of layer i on a board of all layers."""
    return board[i * STEPS * (workers + 1) * LINE :]


@jit_inner
def _products(x, weights, size, ys, board, step, worker, workers, ahead):
    """ys[i] [T, R] = x weights[i]ᵀ as a step of the crew: x [T, D], weights of one format, `size` bytes for 32. Who
    waits for the others reads of `ahead`, which comes next.
    """
    numbers, pieces, done = ready(x, weights[0]), PIECES * workers, 0
    piece = next_task(board, step, worker, workers, pieces)
    while piece >= 0:
        matvec_task(piece, pieces, PIECES, numbers, x.shape[1], weights, size, ys)
        done += 1
        piece = next_task(board, step, worker, workers, pieces)
    barrier(board, step, done, workers, pieces, ahead, worker * ahead.size // workers)


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
def _attend(q, keys, values, seen, limits, states, totals, board, worker, workers, ahead):
    """Step 1: for each token the keys in partitions, which `merge_partitions` puts together."""
    (places, positions), (window, scale, cap) = seen, limits
    queries, given = Queries(q, positions, positions), Keys(keys, values, places)
    scoring, partials = Scoring(window, scale, cap), Partials(states, totals)
    tasks, done = len(states) // keys.shape[1], 0
    parts, task = tasks // len(q), next_task(board, 1, worker, workers, tasks)
    while task >= 0:
        attend_partition(queries, given, scoring, parts, task, partials)
        done += 1
        task = next_task(board, 1, worker, workers, tasks)
    barrier(board, 1, done, workers, tasks, ahead, worker * ahead.size // workers)


@jit_inner
def _plus(y, bias):
    """y + bias, or y where there is no bias: y [T, R]."""
    if not bias.size:
        return y
    out = new_array(y.shape, np.float32)
    for t in range(len(y)):
        for i in range(bias.size):
            out[t, i] = y[t, i] + bias[i]
    return out


@jit_inner
def _normed(x, gain, eps):
    h = new_array(x.shape, np.float32)
    for t in range(len(x)):
        norm_row(x[t], gain, eps, h[t])
    return h


@jit_inner
def _gated(gate, up):
    h = new_array(gate.shape, np.float32)
    for t in range(len(h)):
        gated_gelu_row(gate[t], up[t], h[t])
    return h


@jit_inner
def _add(x, y, bias, gain, eps):
    """x += norm(y + bias), where there are a norm and a bias."""
    h = _plus(y, bias)
    if gain.size:
        h = _normed(h, gain, eps)
    for t in range(len(x)):
        for d in range(x.shape[1]):
            x[t, d] += h[t, d]


@jit_inner
def _rest(worker, workers, board, x, mixed, asked, eps, common, sizes, out):
    """Steps 2 to 4, what follows on attention or recurrence: W_out, the residual, and the feed-forward block; of the
    last tokens, so many as are asked for.
    """
    x, mixed = x[len(x) - asked :], mixed[len(x) - asked :]
    (post, pre_ffn, post_ffn, out_bias, gate_bias, up_bias, down_bias), (w_out, gate, up, down, following) = common
    y, gates, ups, z = out[0][:asked], out[1][:asked], out[2][:asked], out[3][:asked]
    nothing = y[:0]  # `_products` takes three weights each time, so that it is compiled once
    _products(mixed, (w_out, w_out[:0], w_out[:0]), sizes[1], (y, nothing, nothing), board, 2, worker, workers, gate)
    _add(x, y, out_bias, post, eps)
    h = _normed(x, pre_ffn, eps)
    _products(h, (gate, up, up[:0]), sizes[2], (gates, ups, nothing), board, 3, worker, workers, down)
    h = _gated(_plus(gates, gate_bias), _plus(ups, up_bias))
    _products(h, (down, down[:0], down[:0]), sizes[3], (z, nothing, nothing), board, 4, worker, workers, following)
    _add(x, z, down_bias, post_ffn, eps)


@jit_inner
def attention_layer(worker, workers, board, x, asked, eps, own, common, sizes, turns, limits, ring, room, out):
    """A layer with attention: the block of gqa.py, then `_rest`. x [T, D], this thread's residual, becomes the next, in
    as many of its last rows as are asked for.

    Every thread takes the tokens' keys and values into the ring, all of them the same: it needs not wait for another.
    """
    pre, (wq, wk, wv), head_norms = own
    (cos, sin, at), (keys, values, slot, seen) = turns, ring
    qs, ks, vs, states, totals = room
    T, (K, H), wo = len(x), keys.shape[1:], common[1][0]

    h = _normed(x, pre, eps)
    _products(h, (wq, wk, wv), sizes[0], (qs, ks, vs), board, 0, worker, workers, wo)
    q, k = reshaped(qs.copy(), (T, qs.shape[1] // H, H)), reshaped(ks.copy(), (T, K, H))
    for t in range(T):
        if head_norms[0].size:
            for n in range(q.shape[1]):
                norm_row(q[t, n], head_norms[0], eps, q[t, n])
            for n in range(K):
                norm_row(k[t, n], head_norms[1], eps, k[t, n])
        rotate(q[t], cos[at + t], sin[at + t], q[t])
        rotate(k[t], cos[at + t], sin[at + t], k[t])
        _keep(reshaped(k[t], K * H), reshaped(keys[slot + t], K * H))
        _keep(vs[t], reshaped(values[slot + t], K * H))

    G = q.shape[1] // K
    grouped, mixed = reshaped(q, (T, K, G, H)), new_array((T * K, G, H), np.float32)
    _attend(grouped, keys, values, seen, limits, states, totals, board, worker, workers, wo)
    merge_partitions(Partials(states, totals), mixed)
    _rest(worker, workers, board, x, reshaped(mixed, qs.shape), asked, eps, common, sizes, out)


@jit_inner
def _remember(seen, z, gates, decay, before, start, hs, made, board, worker, workers, ahead):
    """Step 1: the recurrence, each block of the gates in parts. hs [T, E] are all h; made [C, E], the new tail and the
    last h, is written to.
    """
    r_gate, r_bias, i_gate, i_bias = gates
    (M, size), tail, T = r_bias.shape, len(made) - 1, len(z)
    recurrence, entering = new_array(z.shape[1], np.float32), new_array(z.shape[1], np.float32)
    parts = min(size // LANES, (PIECES * workers // 2 + M - 1) // M)  # few: rows of a block are best read whole
    pieces, done = M * parts, 0
    piece = next_task(board, 1, worker, workers, pieces)
    while piece >= 0:
        m, vectors = piece // parts, chunk(piece % parts, parts, size // LANES)
        begin, end = vectors.start * LANES, vectors.stop * LANES
        first, last = m * size + begin, m * size + end
        for t in range(T):
            block_row(z[t], r_gate, r_bias, m, begin, end, recurrence)
            block_row(z[t], i_gate, i_bias, m, begin, end, entering)
            earlier = hs[t - 1] if t else before
            channels = range(first, last, LANES)
            token_row(z[t], recurrence, entering, decay, earlier, start and t == 0, channels, hs[t])
        for e in range(first, last):
            for c in range(tail):
                made[c, e] = seen[T + c, e]
            made[tail, e] = hs[T - 1, e]
        done += 1
        piece = next_task(board, 1, worker, workers, pieces)
    barrier(board, 1, done, workers, pieces, ahead, worker * ahead.size // workers)


@jit_inner
def recurrent_layer(worker, workers, board, x, asked, eps, own, common, sizes, state, room, out):
    """A recurrent layer: the block of griffin.py, then `_rest`. x as above; made [C, E] is what the layer will
    remember: tail, and h.
    """
    pre, (wy, wx), (y_bias, x_bias), (conv, conv_bias), gates, decay = own
    (tail, before, start, made), (ys, xs, hs), w_out, T = state, room, common[1][0], len(x)

    h = _normed(x, pre, eps)
    _products(h, (wy, wx, wx[:0]), sizes[0], (ys, xs, xs[:0]), board, 0, worker, workers, gates[0])
    seen, newest = new_array((len(tail) + T, before.size), np.float32), _plus(xs, x_bias)
    z = new_array(newest.shape, np.float32)
    for c in range(len(seen)):
        for e in range(before.size):
            seen[c, e] = tail[c, e] if c < len(tail) else newest[c - len(tail), e]
    for t in range(T):
        conv_row(seen, t, conv, conv_bias, z[t])
    _remember(seen, z, gates, decay, before, start, hs, made, board, worker, workers, w_out)
    mixed = _gated(_plus(ys, y_bias), hs)
    _rest(worker, workers, board, x, mixed, asked, eps, common, sizes, out)
