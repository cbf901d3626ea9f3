"""Where the fused kernels stand for the blocks: one call of compiled code per block, for one to sixteen tokens.

Each binding returns NotImplemented where its kernel does not apply, and the definition of the block runs: values are
tapped, the tokens of an image see each other, the tokens would wrap a ring, or weights that share an input differ in
layout.
Nothing else in models/ knows of these kernels.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import lru_cache
from typing import Any, TypeVar
from weakref import WeakKeyDictionary

import numpy as np
from numba import get_num_threads
from numpy.typing import NDArray

from ..arrays import F32, read_only
from ..blocks.feedforward import FeedForwardWeights, feed_forward_block
from ..blocks.gqa import AttentionWeights, attention_block
from ..blocks.griffin import RecurrentWeights, recurrent_block
from ..cache import KeyValueRing, RecurrentState, TokenPositions
from ..config import AttentionConfig
from ..definition import require
from ..formulas.rope import angles
from ..kernels.attention_decode import is_decode
from ..kernels.dispatch import few
from ..kernels.fused_attention import AttentionArrays, AttentionNumbers, Ring, Tokens, fused_attention
from ..kernels.fused_feedforward import FeedForwardArrays, fused_feed_forward
from ..kernels.fused_recurrent import RecurrentArrays, State, fused_recurrent
from ..kernels.matvec import FEW, takes
from ..kernels.scores import EVERYTHING
from ..kernels.simd import LANES
from ..kernels.weights import of
from ..layouts import Weight
from ..taps import Scope

ABSENT = read_only(np.empty(0, np.float32))  # a norm or a bias that a model does not have
PAGE = 64  # positions whose cosines and sines are computed together

Made = TypeVar("Made")


def _once(make: Callable[[Any], Made]) -> Callable[[Any], Made]:
    """`make` of a block's weights, computed once for each of them and kept as long as they live."""
    kept: WeakKeyDictionary[Any, Made] = WeakKeyDictionary()

    def made(w: Any) -> Made:
        try:
            return kept[w]
        except KeyError:
            kept[w] = make(w)
            return kept[w]

    return made


def _vector(array: NDArray | None) -> NDArray:
    """An array as kernels take it: read-only, without gaps; ABSENT for None."""
    return ABSENT if array is None else read_only(np.ascontiguousarray(array).view())


def _fit(*weights: Weight) -> bool:
    """Can weights be multiplied with one x together: are they of one layout, and are their rows whole vectors?"""
    whole = all(takes(of(weight)) and of(weight).columns == weight.shape[1] for weight in weights)
    return whole and len({weight.layout.name for weight in weights}) == 1


def _arrays(kind: Any, w: Any) -> Any:
    """The weights of a block as the NamedTuple of its kernel, which has the same names."""
    fields = {name: getattr(w, name) for name in kind._fields}
    return kind(**{name: of(x) if isinstance(x, Weight) else _vector(x) for name, x in fields.items()})


@_once
def _attention_arrays(w: AttentionWeights) -> AttentionArrays | None:
    if not (_fit(w.q, w.k, w.v) and _fit(w.o)):
        return None
    return _arrays(AttentionArrays, w)


@_once
def _feed_forward_arrays(w: FeedForwardWeights) -> FeedForwardArrays | None:
    if not (_fit(w.gate, w.up) and _fit(w.down)):
        return None
    return _arrays(FeedForwardArrays, w)


@_once
def _recurrent_arrays(w: RecurrentWeights) -> RecurrentArrays | None:
    gates_fit = w.recurrence_gate.dtype == w.input_gate.dtype and w.input_gate.shape[1] % LANES == 0
    if not (_fit(w.y, w.x) and _fit(w.out) and gates_fit):
        return None
    made = _arrays(RecurrentArrays, w)
    flat = made.recurrence_gate.reshape(-1), made.input_gate.reshape(-1)
    return made._replace(recurrence_gate=flat[0], input_gate=flat[1])


@lru_cache(maxsize=256)
def _numbers(config: AttentionConfig, heads: int) -> AttentionNumbers:
    scoring = config.window or EVERYTHING, config.query_scale, config.soft_cap or 0
    return AttentionNumbers(heads, config.eps, *map(float, scoring))


@lru_cache(maxsize=8)
def _page(first: int, base: float, scale: float, rotated: int) -> tuple[F32, F32]:
    """Cosines and sines of the positions from `first` on, enough for FEW tokens that begin on this page."""
    cos, sin = angles(np.arange(first, first + PAGE + FEW, dtype=np.int32), base, scale, rotated)
    return cos, sin


def _applies(x: F32, width: int, taps: Scope) -> bool:
    """Is x [T, width] for a fused kernel, and is nothing tapped?"""
    few_rows = x.ndim == 2 and x.shape[1] == width and (len(x) == 1 or 0 < len(x) <= few())
    return few_rows and x.dtype == np.float32 and x.flags.carray and not taps.taps.patterns


@attention_block.kernel
def _attention_block(
    x: F32, w: AttentionWeights, config: AttentionConfig, ring: KeyValueRing, tokens: TokenPositions, taps: Scope
) -> F32:
    require(len(x) == len(tokens.positions), "attention_block", x, tokens.positions)
    arrays, T, position = _attention_arrays(w), len(x), tokens.first
    fits = arrays is not None and _applies(x, w.pre_norm.size, taps) and tokens.last_visible is tokens.positions
    fits = fits and is_decode(T, position) and config.head_dim % (2 * LANES) == 0
    if not fits or (T > 1 and position + T > ring.limit):
        return NotImplemented
    page = position // PAGE * PAGE
    cos, sin = _page(page, config.rope_base, config.rope_scale, config.rotated)
    slot, positions = ring.place(position, T)
    here, numbers = Ring(ring.keys, ring.values, positions, slot), _numbers(config, config.heads)
    out = np.empty((tokens.outputs, x.shape[1]), np.float32)
    placed = Tokens(tokens.positions, cos, sin, position - page)
    fused_attention(get_num_threads(), x, arrays, numbers, here, placed, out)
    return out


@feed_forward_block.kernel
def _feed_forward_block(x: F32, w: FeedForwardWeights, eps: float, taps: Scope) -> F32:
    arrays = _feed_forward_arrays(w)
    if arrays is None or not _applies(x, w.pre_norm.size, taps):
        return NotImplemented
    out = np.empty_like(x)
    fused_feed_forward(get_num_threads(), x, arrays, w.gate.shape[0], eps, out)
    return out


@recurrent_block.kernel
def _recurrent_block(
    x: F32, w: RecurrentWeights, eps: float, state: RecurrentState, tokens: TokenPositions, taps: Scope
) -> F32:
    require(len(x) == len(tokens.positions), "recurrent_block", x, tokens.positions)
    arrays = _recurrent_arrays(w)
    if arrays is None or not _applies(x, w.pre_norm.size, taps):
        return NotImplemented
    tail, h = state.read()
    now = State(tail, h, tokens.first == 0, np.empty((len(tail) + 1, h.size), np.float32))
    out = np.empty((tokens.outputs, x.shape[1]), np.float32)
    fused_recurrent(get_num_threads(), x, arrays, eps, now, out)
    state.propose(now.after[:-1], now.after[-1])
    return out
