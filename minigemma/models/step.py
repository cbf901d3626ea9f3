"""A few tokens through all layers, in one call of compiled code.

Between two kernels Python takes a few microseconds, and more after each layer, whose weights have driven Python's own
code out of the caches. Beside a long prompt that is nothing; but a token calls twenty kernels a layer, and in 18 layers
of the 270M Python would take as long as reading a third of the weights. So the layer stands in one_layer.py a second
time, as Numba sees it. What a layer is, the block of the model's own file says; a test holds both to the same numbers.
The block itself runs where a value is tapped, a weight is in SFP8, or `CompiledLayers.take` says so.

Layers that follow one another, of one kind and of the same formats, are a run: they go in one call. Most Gemmas are one
run; in RecurrentGemma recurrent layers take turns with attention, and the largest models are cut, so that what a call
makes for sixteen tokens takes some 64 MB at most.

A kernel of Numba's cannot be given a list of 18 layers' arrays at a cost that does not grow with them. It is given a
table: of each array the address and the size (`arrays_of`, `array_at`), of arrays that Python holds as long as it runs.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import groupby
from typing import Any, cast

import numpy as np
from numba import get_num_threads
from numpy.typing import NDArray

from ..arrays import F32, read_only
from ..cache import Cache, KeyValueRing, RecurrentState, Rings
from ..config import TextConfig
from ..formulas.linear import NO_ROWS, embed, few
from ..formulas.rmsnorm import rms_norm
from ..formulas.rope import angles
from ..formulas.two_pass_head import Preview
from ..kernels.attention_decode import is_decode, partitions_of
from ..kernels.compiler import is_compiled, jit, jit_inner
from ..kernels.matmul import widen_row
from ..kernels.matvec import FEW, few_tokens
from ..kernels.parallel import new_counters, parallel_for
from ..kernels.scores import EVERYTHING
from ..kernels.simd import LANES
from ..kernels.views import array_at, arrays_of, new_array, reshaped
from ..layouts.weight import Weight, block_bytes, flat, format_of, is_side_by_side, rows_columns
from .one_layer import STEPS, attention_layer, of_layer, recurrent_layer

ABSENT = read_only(np.empty(0, np.float32))  # a norm or a bias that a model does not have
POSITIONS = 64  # whose cosines and sines are made together
ROOM = 1 << 24  # float32 numbers at most that the layers of one call make, for a few tokens, until it returns
PLACES = read_only(np.empty(0, np.int32))  # the type of what says where the keys of a ring stand
# A layer's row of arrays: what every layer has, then what one with attention has, or a recurrent one.
PRE, POST, PRE_FFN, POST_FFN, OUT_BIAS, GATE_BIAS, UP_BIAS, DOWN_BIAS, OUT, GATE, UP, DOWN, NEXT, FIRST = range(14)
WQ, WK, WV, Q_NORM, K_NORM = range(FIRST, FIRST + 5)
WY, WX, Y_BIAS, X_BIAS, CONV, CONV_BIAS, R_GATE, R_BIAS, I_GATE, I_BIAS, DECAY = range(FIRST, FIRST + 11)
# The names that models give to the gains among them.
GAINS = (
    ("pre_attention_norm", "temporal_pre_norm"),
    ("post_attention_norm",),
    ("pre_ffn_norm", "channel_pre_norm"),
    ("post_ffn_norm",),
)


@jit_inner
def _common(table, i, likes):
    """What every layer has after its branch: gains, biases and matrices, and the first matrix of the next layer."""
    like_first, like_out, like_gate, like_down = likes
    post, pre_ffn = array_at(table, i, POST, ABSENT), array_at(table, i, PRE_FFN, ABSENT)
    out_bias, gate_bias = array_at(table, i, OUT_BIAS, ABSENT), array_at(table, i, GATE_BIAS, ABSENT)
    up_bias, down_bias = array_at(table, i, UP_BIAS, ABSENT), array_at(table, i, DOWN_BIAS, ABSENT)
    out, down = array_at(table, i, OUT, like_out), array_at(table, i, DOWN, like_down)
    gate, up = array_at(table, i, GATE, like_gate), array_at(table, i, UP, like_gate)
    vectors = post, pre_ffn, array_at(table, i, POST_FFN, ABSENT), out_bias, gate_bias, up_bias, down_bias
    return vectors, (out, gate, up, down, array_at(table, i, NEXT, like_first))


@jit_inner
def _room(count, T, D, F):
    """For what the threads make together in `rest` of each layer."""
    gates, ups = new_array((count, T, F), np.float32), new_array((count, T, F), np.float32)
    return new_array((count, T, D), np.float32), gates, ups, new_array((count, T, D), np.float32)


@jit_inner
def _attention_room(workers, count, x, widths):
    """And in each layer with attention: q, k and v; maxima and sums, and weighted values."""
    (T, D), (NH, KH, H, F) = x.shape, widths
    G, K = NH // KH, KH // H
    parts = T * K * partitions_of(T, EVERYTHING, K, workers)
    qs, ks = new_array((count, T, NH), np.float32), new_array((count, T, KH), np.float32)
    vs, states = new_array((count, T, KH), np.float32), new_array((count, parts, G, 2), np.float32)
    return qs, ks, vs, states, new_array((count, parts, G, H), np.float32), _room(count, T, D, F)


@jit_inner
def _recurrent_room(count, x, widths):
    """And in each recurrent layer: both branches, and h."""
    (T, D), (_, E, F) = x.shape, widths
    ys, xs = new_array((count, T, E), np.float32), new_array((count, T, E), np.float32)
    return ys, xs, new_array((count, T, E), np.float32), _room(count, T, D, F)


@jit_inner
def _hand_over(worker, residual, out):
    """The first thread's residual, which is everyone's, is the result, or its last rows, if there are fewer."""
    first = len(residual) - len(out)
    if worker == 0:
        for t in range(len(out)):
            for d in range(out.shape[1]):
                out[t, d] = residual[first + t, d]


@jit_inner
def _first(kept, places, K, H):
    """Keys or values in the first slots of a ring, [slots, K, H], as many as there are places."""
    return reshaped(kept, (kept.size // (K * H), K, H))[: len(places)]


@jit_inner
def _rows_of(array, width):
    return reshaped(array, (array.size // width, width))


@jit_inner
def _some_attention_layers(worker, workers, board, x, layers, now, room, out):
    table, likes, (_, KH, H, _), sizes, eps, limits, which = layers
    cos, sin, at, rings, slots, kept, positions = now
    qs, ks, vs, states, totals, (y, gates, ups, z) = room
    K, T, residual = KH // H, len(x), x.copy()
    for i in range(len(table)):
        wq, wk = array_at(table, i, WQ, likes[0]), array_at(table, i, WK, likes[0])
        head_norms = array_at(table, i, Q_NORM, ABSENT), array_at(table, i, K_NORM, ABSENT)
        places, keys, values = array_at(rings, i, 2, PLACES), array_at(rings, i, 0, kept), array_at(rings, i, 1, kept)
        parts = T * K * partitions_of(T, len(places), K, workers)
        common = _common(table, i, likes)
        attention_layer(
            worker,
            workers,
            of_layer(board, i, workers),
            residual,
            len(out) if i == len(table) - 1 else len(x),
            eps,
            (array_at(table, i, PRE, ABSENT), (wq, wk, array_at(table, i, WV, likes[0])), head_norms),
            common,
            sizes,
            (cos[which[i]], sin[which[i]], at),
            (limits[i, 0], limits[i, 1], limits[i, 2]),
            (_first(keys, places, K, H), _first(values, places, K, H), slots[i], (places, positions)),
            (qs[i], ks[i], vs[i], states[i, :parts], totals[i, :parts]),
            (y[i], gates[i], ups[i], z[i]),
        )
    _hand_over(worker, residual, out)


@jit
def _attention_layers(workers, x, layers, now, out):
    """out = the residual after these layers, x [T, D] before them, of as many of the last tokens as it has rows; the
    layers' rings take in keys and values.

    layers: the table of their arrays; an array of the type of W_q, of W_o, W_gate and W_down; N · H, K · H, H and F;
    the bytes of 32 weights in each of the four; ε; window, scale and cap of attention [layers, 3]; which rope.
    now: cosine and sine of each rope at some positions [ropes, positions, R/2], and which of these is the first
    token's; the table of the rings' keys, values and positions; which slot of each ring is the first token's; an array
    of the keys' type; the positions [T].
    """
    room = _attention_room(workers, len(layers[0]), x, layers[2])
    parallel_for(
        _some_attention_layers, workers, (new_counters(STEPS * len(layers[0]), workers), x, layers, now, room, out)
    )


@jit_inner
def _some_recurrent_layers(worker, workers, board, x, layers, now, room, out):
    table, (likes, like_gates), (M, E, _), sizes, eps = layers
    before, made, start = now
    ys, xs, hs, (y, gates, ups, z) = room
    residual = x.copy()
    for i in range(len(table)):
        r_gate, i_gate = array_at(table, i, R_GATE, like_gates), array_at(table, i, I_GATE, like_gates)
        r_bias, i_bias = array_at(table, i, R_BIAS, ABSENT), array_at(table, i, I_BIAS, ABSENT)
        own = (
            array_at(table, i, PRE, ABSENT),
            (array_at(table, i, WY, likes[0]), array_at(table, i, WX, likes[0])),
            (array_at(table, i, Y_BIAS, ABSENT), array_at(table, i, X_BIAS, ABSENT)),
            (_rows_of(array_at(table, i, CONV, ABSENT), E), array_at(table, i, CONV_BIAS, ABSENT)),
            (r_gate, _rows_of(r_bias, E // M), i_gate, _rows_of(i_bias, E // M)),
            array_at(table, i, DECAY, ABSENT),
        )
        tail, h = _rows_of(array_at(before, i, 0, ABSENT), E), array_at(before, i, 1, ABSENT)
        recurrent_layer(
            worker,
            workers,
            of_layer(board, i, workers),
            residual,
            len(out) if i == len(table) - 1 else len(x),
            eps,
            own,
            _common(table, i, likes),
            sizes,
            (tail, h, start, made[i]),
            (ys[i], xs[i], hs[i]),
            (y[i], gates[i], ups[i], z[i]),
        )
    _hand_over(worker, residual, out)


@jit
def _recurrent_layers(workers, x, layers, now, out):
    """out = the residual after these layers, x [T, D] before them, of as many of the last tokens as it has rows.

    layers: the table of their arrays; an array of the type of W_y, of W_out, W_gate, W_down and the gates; M, E and F;
    the bytes of 32 weights in each of the four; ε.
    now: the table of the tails and the states h before the tokens; room for those after them [layers, C, E], h last; do
    the tokens begin their sequence?
    """
    room = _recurrent_room(len(layers[0]), x, layers[2])
    parallel_for(
        _some_recurrent_layers, workers, (new_counters(STEPS * len(layers[0]), workers), x, layers, now, room, out)
    )


@jit
def _embed_rows(rows, ids, stride, size, scale, x):
    """x [T, D] = the rows `ids` of the embedding, each of `stride` elements, times `scale`."""
    for t in range(len(ids)):
        widen_row(rows, ids[t] * stride, size, 0, x.shape[1], x[t], 0)
        for d in range(x.shape[1]):
            x[t, d] *= np.float32(scale)


def _matrices(block: Any) -> tuple[tuple[Weight, ...], tuple[Weight, ...]]:
    """Those that meet the normed x together, W_q, W_k and W_v or W_y and W_x; and W_out, W_gate, W_up and W_down."""
    a, r, f = block.attention, getattr(block, "recurrent", None), block.ffn
    first, out = ((a.q, a.k, a.v), a.o) if r is None else ((r.y, r.x), r.out)
    return first, (out, f.gate, f.up, f.down)


def _vector(array: NDArray | None) -> NDArray:
    return ABSENT if array is None else np.ascontiguousarray(array).reshape(-1)


def _arrays(blocks: Sequence[Any]) -> list[list[NDArray]]:
    """The row of each layer."""
    firsts = [flat(_matrices(block)[0][0]) for block in blocks]
    rows = []
    for block, following in zip(blocks, [*firsts[1:], firsts[-1]], strict=True):  # the last layer's is its own
        a, r, f, (first, rest) = block.attention, getattr(block, "recurrent", None), block.ffn, _matrices(block)
        vectors = [next((getattr(block, name) for name in names if hasattr(block, name)), None) for names in GAINS]
        vectors += [a.o_bias if r is None else r.out_bias, f.gate_bias, f.up_bias, f.down_bias]
        if r is None:
            own = [a.q_norm, a.k_norm]
        else:
            own = [r.y_bias, r.x_bias, r.conv, r.conv_bias, r.recurrence_gate, r.recurrence_bias]
            own += [r.input_gate, r.input_bias, r.decay]
        rows.append([*map(_vector, vectors), *map(flat, rest), following, *map(flat, first), *map(_vector, own)])
    return rows


def _formats(block: Any) -> tuple[Any, ...]:
    """What layers of one run have in common: the type of a recurrent layer's gates, "" for one with attention; and of
    W_q or W_y, W_out, W_gate and W_down the names of their formats and the bytes of a block.
    """
    (first, *_), (out, gate, _, down) = _matrices(block)
    r, four = getattr(block, "recurrent", None), (first, out, gate, down)
    gates = "" if r is None else r.input_gate.dtype.name
    return gates, tuple((format_of(weight), block_bytes(weight)) for weight in four)


class CompiledLayers:
    """The layers of a model, their arrays as kernels take them: a call for each run of layers that are of one kind and
    of the same formats.
    """

    def __init__(
        self,
        config: TextConfig,
        embedding: Weight,
        embedding_scale: float,
        blocks: Sequence[Any],
        final_norm: F32,
        head: Weight,
    ) -> None:
        own, self.eps = flat(head), config.eps
        self.embedding, self.embedding_scale = embedding, embedding_scale
        whole, (R, D) = flat(embedding), rows_columns(embedding)
        self.table = whole, whole.size // R, block_bytes(embedding), D
        self.rows_apart = not is_side_by_side(embedding) and format_of(embedding) != "sfp8"
        self.head = final_norm, (own, own[:0], own[:0]), block_bytes(head), rows_columns(head)[0]
        self.recurrent = [i for i, block in enumerate(blocks) if block.attention is None]
        self.attentive = [i for i, block in enumerate(blocks) if block.attention is not None]
        attentions = [config.attention(i) for i in self.attentive]
        ropes = [(c.rope_base, c.rope_scale, int(config.head_dim * c.rope_fraction)) for c in attentions]
        limits = np.array([(c.window or EVERYTHING, c.query_scale, c.soft_cap or 0) for c in attentions], np.float32)
        self.ropes = list(dict.fromkeys(ropes))
        which = np.array([self.ropes.index(rope) for rope in ropes])
        self._turned = 0, np.empty((0, 0, 0), np.float32), np.empty((0, 0, 0), np.float32)
        self._compiled: dict[np.dtype | None, bool] = {}  # for each type of the keys, as far as is known
        H, F = config.head_dim, config.ffn_width
        self.memory = next((block.recurrent.conv.shape for block in blocks if block.attention is None), (0, 0))
        self.arrays = _arrays(blocks)  # which the tables speak of
        self.runs: list[tuple[bool, slice, tuple[Any, ...]]] = []
        made = 2 * (config.width + F + config.heads * H + config.kv_heads * H)  # by a token in a layer
        most = max(1, ROOM // (FEW * made))
        for ((gates, formats), _), numbers in groupby(range(len(blocks)), lambda i: (_formats(blocks[i]), i // most)):
            run = list(numbers)
            some, table = self.arrays[run[0]], arrays_of(self.arrays[run[0] : run[-1] + 1])
            likes, sizes = tuple(some[i][:0] for i in (FIRST, OUT, GATE, DOWN)), tuple(size for _, size in formats)
            alike = self.recurrent if gates else self.attentive
            rows = slice(alike.index(run[0]), alike.index(run[-1]) + 1)
            if gates:
                blocks_of_gates = len(blocks[run[0]].recurrent.input_gate)
                widths: tuple[int, ...] = blocks_of_gates, some[DECAY].size, F
                layers: tuple[Any, ...] = table, (likes, some[I_GATE][:0]), widths, sizes, config.eps
            else:
                widths = config.heads * H, config.kv_heads * H, H, F
                layers = table, likes, widths, sizes, config.eps, limits[rows], which[rows]
            self.runs.append((bool(gates), rows, layers))

    def embed(self, ids: np.ndarray) -> F32:
        """The embedding of a few tokens, [T] → [T, D]: as linear.embed, and compiled where a row lies in one place."""
        rows, stride, size, D = self.table
        if not self.rows_apart:
            return embed(ids, self.embedding, self.embedding_scale)
        x = np.empty((len(ids), D), np.float32)
        _embed_rows(rows, ids, stride, size, self.embedding_scale, x)
        return x

    def take(self, tokens: int, cache: Cache) -> bool:
        """May so many tokens go through here, `few` together? No more than twice as many, where two calls are sooner
        done than the blocks; where the matrix unit takes what is more than few, not even that. No ring may come to its
        end: there the last of them would take the place of keys that the first one sees.
        """
        if tokens == 1:
            return True
        most, rings = 2 * FEW if few() == FEW else few(), (cast(KeyValueRing, cache.layers[i]) for i in self.attentive)
        near = tokens <= most and is_decode(min(tokens, few()), cache.position)
        return near and all(cache.position + tokens <= ring.limit for ring in rings)

    def ready(self, ids: np.ndarray, cache: Cache) -> bool:
        """Has it been compiled? A first run of all does not compile it for its prompt, which would take seconds longer
        than what the blocks call, but for the token after that.
        """
        if len(ids) == 1:
            return True
        kept = self._kept(cache)
        if kept not in self._compiled:
            x = np.empty((len(ids), self.table[-1]), np.float32)  # only its type counts
            calls = self._work(x, cache, 1)[1]
            self._compiled[kept] = all(is_compiled(kernel, *arguments) for kernel, arguments in calls)
        return self._compiled[kept]

    def _kept(self, cache: Cache) -> np.dtype | None:
        """As what this cache keeps keys: the kernels are compiled for each."""
        return cast(KeyValueRing, cache.layers[self.attentive[0]]).keys.dtype if self.attentive else None

    def residual(self, ids: np.ndarray, cache: Cache, outputs: int) -> F32:
        """A few tokens, [T] → [outputs, D], the residual of the last of them after the last layer; each ring takes them
        in, and each state is told what it will be.
        """
        return self._run(cache, *self._work(self.embed(ids), cache, outputs))

    def next(self, ids: np.ndarray, cache: Cache, preview: Preview | None) -> F32:
        """The same of one token, and the logits [1, V] of the token after it, without a cap."""
        x, *work = self._work(self.embed(ids), cache, 1)
        likely = preview.later(x) if preview else None
        self._run(cache, x, *work)
        return likely() if likely else self.logits(x)

    def _work(self, x: F32, cache: Cache, outputs: int) -> tuple[F32, list[Any], list[Any]]:
        """All that Python has to do for the layers of x [T, D], before the weights drive its code out of the caches:
        where the last residual will be, [outputs, D]; each run's kernel and arguments; the states, and where what they
        will be is to be.
        """
        calls: list[Any] = []
        T, workers, start = len(x), get_num_threads(), cache.position == 0
        states = cast(list[RecurrentState], [cache.layers[i] for i in self.recurrent])
        before, made = arrays_of([state.read() for state in states]), np.empty((len(states), *self.memory), np.float32)
        rings, positions = self._rings(cache, T), np.arange(cache.position, cache.position + T, dtype=np.int32)
        for i, (recurrent, rows, layers) in enumerate(self.runs):
            after = np.empty((outputs if i == len(self.runs) - 1 else T, x.shape[1]), np.float32)
            if recurrent:
                calls.append((_recurrent_layers, (workers, x, layers, (before[rows], made[rows], start), after)))
            else:
                assert rings
                turns = self._turns(cache.position, T)
                now = *turns, rings.table[rows], rings.slots[rows], rings.like, positions
                calls.append((_attention_layers, (workers, x, layers, now, after)))
            x = after
        return x, calls, list(zip(states, made, strict=True))

    def _run(self, cache: Cache, x: F32, calls: list[Any], states: list[Any]) -> F32:
        for kernel, arguments in calls:
            kernel(*arguments)
        self._compiled[self._kept(cache)] = True
        for state, new in states:
            state.propose(new[:-1], new[-1])
        return x

    def _rings(self, cache: Cache, tokens: int) -> Rings | None:
        """Those of the layers with attention, with the tokens' slots; None if there are no such layers."""
        if self.attentive and not (cache.rings and cache.rings.follow(cache.position, tokens)):
            rings = cast(list[KeyValueRing], [cache.layers[i] for i in self.attentive])
            cache.rings = Rings(rings, cache.position, tokens)
            cache.rings.follow(cache.position, tokens)
        return cache.rings

    def _turns(self, position: int, tokens: int) -> tuple[F32, F32, int]:
        """Cosine and sine of each rope at some positions [ropes, positions, R/2], which are made together, and which of
        them is the first token's.
        """
        first, cos, sin = self._turned
        if not first <= position <= first + cos.shape[1] - tokens:
            first, positions = position, np.arange(position, position + POSITIONS, dtype=np.int32)
            both = [angles(positions, *rope) for rope in self.ropes]
            cos, sin = (read_only(np.stack([of_rope[i] for of_rope in both])) for i in range(2))
            self._turned = first, cos, sin
        return cos, sin, position - first

    def logits(self, x: F32) -> F32:
        """Norm and head, without a cap: x [1, D] → [1, V]. linear, without what it would find out anew each time."""
        gain, heads, size, rows = self.head
        x, ys = rms_norm(x, gain, self.eps), (np.empty((1, rows), np.float32), NO_ROWS, NO_ROWS)
        few_tokens(get_num_threads(), x, heads, size, ys)
        return ys[0]


def can_be_compiled(config: TextConfig, blocks: Sequence[Any], head: Weight) -> bool:
    """Are layers and head all of kinds that this file knows?"""
    for block in blocks:
        r, (first, rest) = getattr(block, "recurrent", None), _matrices(block)
        if r is None and config.head_dim % (2 * LANES):
            return False
        if r is not None and (r.input_gate.shape[1] % LANES or r.input_gate.dtype != r.recurrence_gate.dtype):
            return False
        kinds = [(weight.dtype, weight.ndim, weight.shape[2:]) for weight in (*rest, *first)]
        if "sfp8" in map(format_of, (*rest, *first, head)) or len({kind[:2] for kind in kinds}) > 1:
            return False
        if len(set(kinds[4:])) > 1 or len(set(kinds[1:3])) > 1:
            return False
    return True
