"""Where the fused kernels stand for a layer: one call of compiled code per layer, for one to sixteen tokens.

Each binding returns NotImplemented where its kernel does not apply, and the definition of the layer runs: values are
tapped, the tokens of an image see each other, the tokens would wrap a ring, or weights that share an input differ in
layout. Nothing else in models/ knows of these kernels.
"""

from __future__ import annotations

from functools import lru_cache
from typing import Any, NamedTuple
from weakref import WeakKeyDictionary

import numpy as np
from numpy.typing import NDArray

from ..arrays import F32, read_only
from ..blocks.layers import LayerWeights, attention_layer, recurrent_layer
from ..cache import KeyValueRing, RecurrentState, TokenPositions
from ..config import AttentionConfig
from ..definition import require
from ..formulas.rope import angles
from ..kernels.attention_decode import is_decode
from ..kernels.dispatch import few
from ..kernels.fused_attention import AttentionArrays, AttentionNumbers, fused_attention_layer
from ..kernels.fused_feedforward import FeedForwardArrays
from ..kernels.fused_recurrent import RecurrentArrays, fused_recurrent_layer
from ..kernels.matvec import FEW, takes
from ..kernels.parallel import workers
from ..kernels.scores import EVERYTHING
from ..kernels.simd import LANES
from ..kernels.weights import of
from ..layouts import Weight
from ..taps import Scope

ABSENT = read_only(np.empty(0, np.float32))  # a norm or a bias that a model does not have
PAGE = 64  # positions whose cosines and sines are computed together

Arrays = tuple[NDArray[Any], ...]  # of a NamedTuple of the kernel, in its order


class Layer(NamedTuple):
    """The weights of a layer as its kernel takes them."""

    branch: Arrays  # AttentionArrays or RecurrentArrays
    ffn: Arrays  # FeedForwardArrays
    width: int  # D
    hidden: int  # F


_layers: WeakKeyDictionary[LayerWeights, Layer | None] = WeakKeyDictionary()


def _layer(w: LayerWeights) -> Layer | None:
    """The layer for its kernel, made once; None where the kernels cannot take its weights."""
    try:
        return _layers[w]
    except KeyError:
        _layers[w] = _made(w)
        return _layers[w]


def _made(w: LayerWeights) -> Layer | None:
    a, r, f = w.attention, w.recurrent, w.ffn
    fits = _fit(f.gate, f.up) and _fit(f.down)
    if a is not None:
        fits, branch = fits and _fit(a.q, a.k, a.v) and _fit(a.o), _arrays(AttentionArrays, a)
    if r is not None:
        gates_fit = r.recurrence_gate.dtype == r.input_gate.dtype and r.input_gate.shape[1] % LANES == 0
        fits, branch = fits and _fit(r.y, r.x) and _fit(r.out) and gates_fit, _arrays(RecurrentArrays, r)
    return Layer(branch, _arrays(FeedForwardArrays, f), f.down.shape[0], f.gate.shape[0]) if fits else None


def _fit(*weights: Weight) -> bool:
    """Can weights be multiplied with one x together: are they of one layout, and are their rows whole vectors?"""
    whole = all(takes(of(weight)) and of(weight).columns == weight.shape[1] for weight in weights)
    return whole and len({weight.layout.name for weight in weights}) == 1


def _arrays(kind: Any, w: Any) -> Arrays:
    """The fields of the NamedTuple `kind` from a block's weights: of a weight its data, ABSENT for None."""
    return tuple(_array(name, getattr(w, name)) for name in kind._fields)


def _array(name: str, x: Any) -> NDArray[Any]:
    if isinstance(x, Weight):
        return of(x).data
    array = ABSENT if x is None else np.ascontiguousarray(x)
    return read_only((array.reshape(-1) if name.endswith("_gate") else array).view())


@lru_cache(maxsize=16)
def _numbers(config: AttentionConfig, hidden: int, page: int) -> tuple[tuple[int | float, ...], F32, F32]:
    """AttentionNumbers; cosines and sines of a page of positions and of FEW more."""
    scoring = config.window or EVERYTHING, config.query_scale, config.soft_cap or 0
    cos, sin = _page(page, config.rope_base, config.rope_scale, config.rotated)
    return tuple(AttentionNumbers(config.heads, hidden, config.eps, *map(float, scoring))), cos, sin


@lru_cache(maxsize=8)
def _page(first: int, base: float, scale: float, rotated: int) -> tuple[F32, F32]:
    """Cosines and sines, which layers with the same rope share."""
    cos, sin = angles(np.arange(first, first + PAGE + FEW, dtype=np.int32), base, scale, rotated)
    return cos, sin


def _applies(x: F32, width: int, tokens: TokenPositions, taps: Scope) -> bool:
    """Is x [T, width] for a fused kernel, is it of one sequence, and is nothing tapped?"""
    few_rows = x.ndim == 2 and x.shape[1] == width and (len(x) == 1 or 0 < len(x) <= few())
    return few_rows and x.dtype == np.float32 and x.flags.carray and not taps.taps.patterns and not tokens.starts


@attention_layer.kernel
def _attention_layer(
    x: F32, w: LayerWeights, config: AttentionConfig, ring: KeyValueRing, tokens: TokenPositions, taps: Scope
) -> F32:
    layer, T, position = _layer(w), len(x), tokens.first
    require(len(tokens.positions) == T, "attention_layer", x, tokens.positions)
    fits = layer is not None and _applies(x, layer.width, tokens, taps) and tokens.last_visible is tokens.positions
    fits = fits and is_decode(T, position) and config.head_dim % (2 * LANES) == 0
    if layer is None or not fits or (T > 1 and position + T > ring.limit):
        return NotImplemented
    page = position // PAGE * PAGE
    numbers, cos, sin = _numbers(config, layer.hidden, page)
    slot, positions = ring.place(position, T)
    places = (ring.keys, ring.values, positions, slot), (tokens.positions, cos, sin, position - page)  # Ring, Tokens
    out = np.empty((tokens.outputs, x.shape[1]), np.float32)
    fused_attention_layer(workers(), x, layer.branch, layer.ffn, numbers, *places, out)
    return out


@recurrent_layer.kernel
def _recurrent_layer(
    x: F32, w: LayerWeights, eps: float, state: RecurrentState, tokens: TokenPositions, taps: Scope
) -> F32:
    layer = _layer(w)
    require(len(x) == len(tokens.positions), "recurrent_layer", x, tokens.positions)
    if layer is None or not _applies(x, layer.width, tokens, taps):
        return NotImplemented
    tail, h = state.read()
    after, out = np.empty((len(tail) + 1, h.size), np.float32), np.empty((tokens.outputs, x.shape[1]), np.float32)
    now = tail, h, tokens.first == 0, after  # State
    fused_recurrent_layer(workers(), x, layer.branch, layer.ffn, (layer.hidden, eps), now, out)
    state.propose(after[:-1], after[-1])
    return out
