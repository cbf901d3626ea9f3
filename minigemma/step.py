"""One token through all layers, in one call of compiled code.

Between two kernels Python takes a few microseconds, and more after each layer, whose weights have driven Python's own
code out of the caches. Beside a prompt that is nothing; but a token calls twenty kernels a layer, and in 18 layers of
the 270M Python would take as long as reading a third of the weights. So the layer stands here a second time, as Numba
sees it: the same kernels in the same order, called by compiled code. What a layer is, the block of gemma.py, gemma2.py
and gemma3.py says; a test holds both to the same numbers. Where a value is tapped, or a weight is in SFP8 or has a
bias, the block itself runs.

A kernel of Numba's cannot be given a list of 18 layers' arrays at a cost that does not grow with them. It is given a
table: of each array the address and the size (`arrays_of`, `array_at`), of arrays that Python holds as long as it runs.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import groupby
from typing import Any, cast

import numpy as np
from llvmlite import ir
from numba import get_num_threads, types
from numba.extending import intrinsic, overload
from numba.np.arrayobj import populate_array
from numpy.typing import NDArray

from .amx import on_cache_line
from .arrays import F32, read_only
from .attention import EVERYTHING, SPLIT, few_part, join
from .backend import INNER, jit, jit_inner
from .cache import Cache, KeyValueRing
from .config import TextConfig
from .crew import PIECES, claim, new_board, share_out, together
from .few_tokens import (
    OFFSETS,
    few_tokens,
    few_tokens_blocks,
    few_tokens_blocks_piece,
    few_tokens_piece,
    in_whole_numbers,
    round_to_16_bits,
)
from .formats import BLOCK, Weight, block_bytes, flat, format_of, rows_columns
from .geglu import gated_gelu_row
from .int4 import BYTES, round_to_8_bits
from .linear import NO_ROWS
from .rmsnorm import norm_row, rms_norm
from .rope import angles, turn
from .simd import LANES, bf16_bits

PLAIN = (types.float32, types.uint16)  # weights that are numbers themselves
NORMS = ("pre_attention_norm", "post_attention_norm", "pre_ffn_norm", "post_ffn_norm")
ABSENT = read_only(np.empty(0, np.float32))  # a norm that a model does not have
PLACES = read_only(np.empty(0, np.int32))  # the type of what says where the keys of a ring stand
WQ, WK, WV, WO, GATE, UP, DOWN = range(len(NORMS) + 2, len(NORMS) + 9)  # in a layer's row, after its gains


def _products(x, weights, size, ys, board, step, worker, workers, ahead):
    """ys[i] = weights[i] x as a step of the crew: weights of one format, `size` bytes for 32. Who waits for the others
    reads of `ahead`, which comes next.
    """


@jit_inner
def _plain_products(x, weights, size, ys, board, step, worker, workers, ahead):
    pieces, done = PIECES * workers, 0
    piece = claim(board, step, worker, workers, pieces)
    while piece >= 0:
        few_tokens_piece(piece, pieces, x, x.size, weights, ys)
        done += 1
        piece = claim(board, step, worker, workers, pieces)
    together(board, step, done, workers, pieces, ahead, worker * ahead.size // workers)


def _whole(x, weight):
    """x [D] in whole numbers as rows of this weight want it, and their scales."""


@jit_inner
def _whole_for_rows(x, weight):
    size = x.size // BLOCK * (BLOCK + OFFSETS)
    whole, scales = on_cache_line(np.empty(size + 32, np.int16), size), np.empty(1, np.float32)
    round_to_16_bits(x, whole, scales)
    return whole, scales


@jit_inner
def _whole_for_rows_side_by_side(x, weight):
    whole, blocks = np.empty(x.size, np.int8), x.size // BLOCK
    scales, starts = np.empty(blocks, np.float32), np.empty(blocks, np.int32)
    round_to_8_bits(x, whole, scales, starts, 0, blocks)
    return whole, scales, starts


@overload(_whole, jit_options=INNER)
def _choose_whole(x, weight):
    return (_whole_for_rows_side_by_side if weight.dtype == types.uint32 else _whole_for_rows).py_func


@jit_inner
def _block_products(x, weights, size, ys, board, step, worker, workers, ahead):
    whole, pieces, done = _whole(x, weights[0]), PIECES * workers, 0
    piece = claim(board, step, worker, workers, pieces)
    while piece >= 0:
        few_tokens_blocks_piece(piece, pieces, whole, x.size // BLOCK, weights, size, ys)
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
def _work(worker, workers, board, x, norms, head_norms, eps, matrices, following, sizes, turns, limits, ring, out):
    """What one thread does of the layer. What has no products every thread does for itself: that is sooner done than
    handed over. It leaves in `out` what the threads have made together, and in after[worker] what each has made.
    """
    (pre, post, pre_ffn), (wq, wk, wv, wo, gate, up, down) = norms, matrices
    (cos, sin), (keys, values, slot, places, position) = turns, ring
    qs, ks, vs, states, totals, y, opened, z, after = out
    D, K, H = x.size, keys.shape[1], keys.shape[2]
    residual, h = after[worker], np.empty(D, np.float32)

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
    nothing = qs[:0]  # `_products` takes three weights each time, so that it is compiled once
    _products(mixed.reshape(-1), (wo, wo[:0], wo[:0]), sizes[1], (y, nothing, nothing), board, 2, worker, workers, gate)
    if post.size:
        norm_row(y[0], post, eps, h)
    for d in range(D):
        residual[d] = x[d] + (h[d] if post.size else y[0, d])

    norm_row(residual, pre_ffn, eps, h)
    _products(h, (gate, up, up[:0]), sizes[2], (opened[:1], opened[1:], nothing), board, 3, worker, workers, down)
    gated = np.empty(opened.shape[1], np.float32)
    gated_gelu_row(opened[0], opened[1], gated)
    _products(gated, (down, down[:0], down[:0]), sizes[3], (z, nothing, nothing), board, 4, worker, workers, following)


def arrays_of(rows: Sequence[Sequence[NDArray]]) -> NDArray[np.int64]:
    """Where each array begins and how many elements it has: [rows, arrays of a row, 2]. The arrays must stay."""
    return np.array([[(array.ctypes.data, array.size) for array in row] for row in rows], np.int64)


@intrinsic
def _array(typingctx, address, size, like):
    """`size` elements from an address on, as an array of the type of `like`: one axis, without gaps."""

    def codegen(context, builder, signature, args):
        array = context.make_array(signature.args[2])(context, builder)
        element = context.get_data_type(signature.args[2].dtype)
        itemsize = context.get_constant(types.intp, context.get_abi_sizeof(element))
        data = builder.inttoptr(args[0], ir.PointerType(element))
        populate_array(array, data, [args[1]], [itemsize], itemsize, meminfo=None)
        return array._getvalue()

    return like(types.int64, types.int64, like), codegen


@jit_inner
def array_at(table, row, i, like):
    """Array i of a row of `arrays_of`, which is of the type of `like`."""
    return _array(table[row, i, 0], table[row, i, 1], like)


@jit
def _layers(workers, x, layers, now):
    """x [D] becomes the residual after these layers; their rings take in the token's key and value.

    layers: the table of their gains and matrices; an array of the type of W_q, of W_o, W_gate and W_down; N · H, K · H,
    H and F; the bytes of 32 weights in each of the four; ε; window, scale and cap of attention [layers, 3]; which rope.
    now: cosine and sine of each rope [ropes, R/2]; the table of the rings' keys, values and positions; which slot of
    each ring is the token's; an array of the keys' type; its position [1].
    """
    table, (like_q, like_o, like_gate, like_down), (NH, KH, H, F), sizes, eps, limits, which = layers
    cos, sin, rings, slots, kept, position = now
    D, K, G, last = x.size, KH // H, NH // KH, len(table) - 1
    qs, ks, vs = np.empty((1, NH), np.float32), np.empty((1, KH), np.float32), np.empty((1, KH), np.float32)
    states, totals = np.empty((K * workers, G, 2), np.float32), np.empty((K * workers, G, H), np.float32)
    y, opened, z = np.empty((1, D), np.float32), np.empty((2, F), np.float32), np.empty((1, D), np.float32)
    after = np.empty((workers, D), np.float32)
    for i in range(len(table)):
        pre, post = array_at(table, i, 0, ABSENT), array_at(table, i, 1, ABSENT)
        pre_ffn, post_ffn = array_at(table, i, 2, ABSENT), array_at(table, i, 3, ABSENT)
        q_norm, k_norm = array_at(table, i, 4, ABSENT), array_at(table, i, 5, ABSENT)
        wq, wk, wv = array_at(table, i, WQ, like_q), array_at(table, i, WK, like_q), array_at(table, i, WV, like_q)
        wo, down = array_at(table, i, WO, like_o), array_at(table, i, DOWN, like_down)
        gate, up = array_at(table, i, GATE, like_gate), array_at(table, i, UP, like_gate)
        keys, values = array_at(rings, i, 0, kept).reshape(-1, K, H), array_at(rings, i, 1, kept).reshape(-1, K, H)
        places = array_at(rings, i, 2, PLACES)
        parts = K * max(1, min(workers, len(places) * K // SPLIT))
        arguments = (
            new_board(5, workers),
            x,
            (pre, post, pre_ffn),
            (q_norm, k_norm),
            eps,
            (wq, wk, wv, wo, gate, up, down),
            array_at(table, min(i + 1, last), WQ, like_q),
            sizes,
            (cos[which[i]], sin[which[i]]),
            (limits[i, 0], limits[i, 1], limits[i, 2]),
            (keys[: len(places)], values[: len(places)], slots[i], places, position),
            (qs, ks, vs, states[:parts], totals[:parts], y, opened, z, after),
        )
        share_out(_work, workers, arguments)
        if post_ffn.size:
            norm_row(z[0], post_ffn, eps, z[0])
        for d in range(D):
            x[d] = after[0, d] + z[0, d]


def _gains(block: Any) -> list[F32]:
    found = [getattr(block, name, None) for name in NORMS] + [block.attention.q_norm, block.attention.k_norm]
    return [ABSENT if gain is None else np.ascontiguousarray(gain) for gain in found]


def _matrices(block: Any) -> list[Weight]:
    a, f = block.attention, block.ffn
    return [flat(weight) for weight in (a.q, a.k, a.v, a.o, f.gate, f.up, f.down)]


def _formats(block: Any) -> tuple[tuple[str, int], ...]:
    """Those of W_q, W_o, W_gate and W_down, which a run of layers has in common: name, and bytes of a block."""
    a, f = block.attention, block.ffn
    return tuple((format_of(weight), block_bytes(weight)) for weight in (a.q, a.o, f.gate, f.down))


class OneToken:
    """The layers of a model, their arrays as `_layers` takes them: as many calls as formats take turns in a file."""

    def __init__(self, config: TextConfig, blocks: Sequence[Any], final_norm: F32, head: Weight) -> None:
        attentions = [config.attention(i) for i in range(len(blocks))]
        ropes = [(c.rope_base, c.rope_scale, int(config.head_dim * c.rope_fraction)) for c in attentions]
        limits = np.array([(c.window or EVERYTHING, c.query_scale, c.soft_cap or 0) for c in attentions], np.float32)
        heads, kv_heads, H = config.heads, config.kv_heads, config.head_dim
        self.ropes, self.eps = list(dict.fromkeys(ropes)), config.eps
        own = flat(head)
        self.head = final_norm, (own, own[:0], own[:0]), block_bytes(head), rows_columns(head)[0]
        which = np.array([self.ropes.index(rope) for rope in ropes])
        self.arrays = [(*_gains(block), *_matrices(block)) for block in blocks]  # which the tables speak of
        self.runs = []
        for formats, numbers in groupby(range(len(blocks)), lambda i: _formats(blocks[i])):
            run = list(numbers)
            rows = slice(run[0], run[-1] + 1)
            some, widths = self.arrays[run[0]], (heads * H, kv_heads * H, H, config.ffn_width)
            kinds = tuple(some[i][:0] for i in (WQ, WO, GATE, DOWN))
            table, sizes = arrays_of(self.arrays[rows]), tuple(size for _, size in formats)
            self.runs.append((rows, (table, kinds, widths, sizes, config.eps, limits[rows], which[rows])))

    def __call__(self, x: F32, cache: Cache) -> F32:
        """x [1, D], the token's embedding, → [1, D], the residual after the last layer; each ring takes it in."""
        position, workers = np.array([cache.position], np.int32), get_num_threads()
        cos, sin = (np.concatenate(a) for a in zip(*(angles(position, *rope) for rope in self.ropes), strict=True))
        rings = cast(tuple[KeyValueRing, ...], cache.layers)
        slots, places = zip(*(ring.place(cache.position) for ring in rings), strict=True)
        held = {id(array): (array.ctypes.data, array.size) for array in places}  # one for each length of rings
        table = np.array([(*ring.where, held[id(array)]) for ring, array in zip(rings, places, strict=True)])
        numbers, kept = np.array(slots), rings[0].keys[:0].reshape(-1)
        for rows, layers in self.runs:
            _layers(workers, x[0], layers, (cos, sin, table[rows], numbers[rows], kept, position))
        return x

    def logits(self, x: F32) -> F32:
        """Norm and head, without a cap: x [1, D] → [1, V]. linear, without what it would find out anew each time."""
        gain, heads, size, rows = self.head
        x, ys = rms_norm(x, gain, self.eps), (np.empty((1, rows), np.float32), NO_ROWS, NO_ROWS)
        if size == 0:
            few_tokens(get_num_threads(), x[0], x.size, heads, ys)
        else:
            whole = in_whole_numbers(x, size == BYTES)
            few_tokens_blocks(get_num_threads(), whole, x.size // BLOCK, heads, size, ys)
        return ys[0]


def one_token(config: TextConfig, blocks: Sequence[Any], final_norm: F32, head: Weight) -> OneToken | None:
    """Layers and head for one token at a time; None where they are not all of the kinds that this file knows."""
    for block in blocks:
        a, f = getattr(block, "attention", None), block.ffn
        if a is None or a.o_bias is not None or f.down_bias is not None or config.head_dim % (2 * LANES):
            return None
        matrices = a.q, a.k, a.v, a.o, f.gate, f.up, f.down
        kinds = [(weight.dtype, weight.ndim, weight.shape[2:]) for weight in matrices]
        if "sfp8" in map(format_of, (*matrices, head)) or len({kind[:2] for kind in kinds}) > 1:
            return None
        if len(set(kinds[:3])) > 1 or len(set(kinds[4:6])) > 1:
            return None
    return OneToken(config, blocks, final_norm, head)
