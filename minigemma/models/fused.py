"""Where fused kernels replace layers: one call of compiled code for all layers and the next token of each of up to
sixteen sequences, or for each layer and up to sixteen tokens of one.

Each binding returns NotImplemented where its kernel does not apply, and the definition of the layer runs: values are
tapped, the tokens of an image see each other, the tokens would wrap a ring, caches differ in type, or weights that
share an input differ in layout. Nothing else in models/ knows of these kernels.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache
from typing import TYPE_CHECKING, Any, NamedTuple, cast
from weakref import WeakKeyDictionary

import numpy as np
from numpy.typing import NDArray

from ..arrays import F32, read_only
from ..blocks.layers import LayerWeights, attention_layer, recurrent_layer
from ..cache import Cache, KeyValueRing, Rings, States, TokenPositions
from ..config import AttentionConfig
from ..definition import require, runs_formulas
from ..formulas.rope import angles
from ..kernels.attention_decode import is_decode
from ..kernels.dispatch import few
from ..kernels.fused_attention import AttentionArrays, fused_attention_layers
from ..kernels.fused_feedforward import FeedForwardArrays
from ..kernels.fused_recurrent import RecurrentArrays, fused_recurrent_layer
from ..kernels.matvec import FEW, takes
from ..kernels.parallel import workers
from ..kernels.scores import EVERYTHING
from ..kernels.simd.cpu import LANES
from ..kernels.weights import addresses, of
from ..layouts import Adapted, Weight
from ..taps import Scope

if TYPE_CHECKING:
    from .decoder import DecoderWeights

ABSENT = read_only(np.empty(0, np.float32))  # a norm or a bias that a model does not have
PAGE = 64  # positions whose cosines and sines are computed together

Arrays = tuple[NDArray[Any], ...]  # of a NamedTuple of the kernel, in its order


class Recurrent(NamedTuple):
    """A recurrent layer as its kernel takes it."""

    branch: Arrays  # RecurrentArrays
    ffn: Arrays  # FeedForwardArrays
    width: int  # D
    hidden: int  # F


class Run(NamedTuple):
    """Layers with attention that follow one another, as their kernel takes them."""

    layers: tuple[Any, ...]  # Layers
    numbers: tuple[int | float, ...]  # AttentionNumbers
    ropes: tuple[tuple[float, float, int], ...]
    width: int  # D
    arrays: list[Arrays]  # whose addresses the tables hold


class Held(NamedTuple):
    """The rings of a cache as kernels take them, until one of them has to grow."""

    rings: tuple[Any, ...]  # Rings
    arrays: list[tuple[NDArray[Any], NDArray[Any]]]  # whose addresses the table holds
    keys: list[int]  # `id` of each layer's keys
    room: int  # tokens


_recurrent: WeakKeyDictionary[LayerWeights, Recurrent | None] = WeakKeyDictionary()
_runs: WeakKeyDictionary[Any, tuple[tuple[AttentionConfig, ...], Run | None]] = WeakKeyDictionary()
_held: WeakKeyDictionary[Cache, Held] = WeakKeyDictionary()


def _fit(*weights: Weight) -> bool:
    """Can weights be multiplied with one x together: of one layout, of whole vectors, and without an adapter?"""
    whole = all(takes(of(weight)) and of(weight).columns == weight.shape[1] for weight in weights)
    whole = whole and not any(isinstance(weight, Adapted) for weight in weights)
    return whole and len({weight.layout.name for weight in weights}) == 1


def _arrays(kind: Any, w: Any) -> Arrays:
    """The fields of the NamedTuple `kind` from a block's weights: of a weight its data, ABSENT for None."""
    return tuple(_array(name, getattr(w, name)) for name in kind._fields)


def _array(name: str, x: Any) -> NDArray[Any]:
    if isinstance(x, Weight):
        return of(x).data
    array = ABSENT if x is None else np.ascontiguousarray(x)
    return read_only((array.reshape(-1) if name.endswith("_gate") else array).view())


def _made_recurrent(w: LayerWeights) -> Recurrent | None:
    """The layer, or None where the kernel cannot take its weights."""
    r, f = w.recurrent, w.ffn
    assert r is not None
    fits = _fit(f.gate, f.up) and _fit(f.down) and _fit(r.y, r.x) and _fit(r.out)
    fits = fits and r.recurrence_gate.dtype == r.input_gate.dtype and r.input_gate.shape[1] % LANES == 0
    arrays = _arrays(RecurrentArrays, r), _arrays(FeedForwardArrays, f)
    return Recurrent(*arrays, f.down.shape[0], f.gate.shape[0]) if fits else None


def _run(owner: Any, blocks: Sequence[LayerWeights], configs: tuple[AttentionConfig, ...]) -> Run | None:
    """The run of these layers, made once; `owner` holds them."""
    found = _runs.get(owner)
    if found is None or found[0] != configs:
        found = _runs[owner] = configs, _made_run(blocks, configs)
    return found[1]


def _made_run(blocks: Sequence[LayerWeights], configs: Sequence[AttentionConfig]) -> Run | None:
    """The layers, or None where one call of the kernel cannot take their weights."""
    rows: list[tuple[Arrays, Arrays]] = []
    kinds: set[Any] = set()
    for w, c in zip(blocks, configs, strict=True):
        a, f = w.attention, w.ffn
        if a is None or not (_fit(a.q, a.k, a.v) and _fit(a.o) and _fit(f.gate, f.up) and _fit(f.down)):
            return None
        rows.append((_arrays(AttentionArrays, a), _arrays(FeedForwardArrays, f)))
        sizes = c.heads, a.k.shape[0] // c.head_dim, c.head_dim, f.gate.shape[0], c.eps
        kinds.add((sizes, f.down.shape[0], c.rotated, *(array.dtype for row in rows[-1] for array in row)))
    (numbers, width, *_), *others = kinds
    if others or numbers[2] % (2 * LANES):
        return None
    ropes = [(c.rope_base, c.rope_scale, c.rotated) for c in configs]
    distinct = tuple(dict.fromkeys(ropes))
    scoring = [(c.window or EVERYTHING, c.query_scale, c.soft_cap or 0) for c in configs]
    tables = (addresses(row[i] for row in rows) for i in range(2))
    differences = np.array(scoring, np.float32), np.array([distinct.index(rope) for rope in ropes])
    return Run((*rows[0], *tables, *differences), numbers, distinct, width, [a + f for a, f in rows])


@lru_cache(maxsize=8)
def _page(first: int, ropes: tuple[tuple[float, float, int], ...]) -> tuple[F32, F32]:
    """Cosines and sines of a page of positions and of FEW more, [ropes, PAGE + FEW, R/2]."""
    positions = np.arange(first, first + PAGE + FEW, dtype=np.int32)
    cos, sin = zip(*(angles(positions, *rope) for rope in ropes), strict=True)
    return np.stack(cos), np.stack(sin)


def _made_held(rings: Sequence[KeyValueRing], position: int, tokens: int) -> Held:
    """The rings of one sequence once they have room for the tokens."""
    for ring in rings:
        ring.reserve(position + tokens)
    arrays = [(ring.keys, ring.values) for ring in rings]
    table = addresses((keys.reshape(-1), values.reshape(-1)) for keys, values in arrays)
    kinds, limits = tuple(array.reshape(-1)[:0] for array in arrays[0]), np.array([ring.limit for ring in rings])
    room = min((len(ring.keys) for ring in rings if len(ring.keys) < ring.limit), default=EVERYTHING)
    return Held((kinds, table, limits), arrays, [id(keys) for keys, _ in arrays], room)


def _held_of(cache: Cache, position: int) -> Held:
    """The rings of a cache once they have room for a token at `position`; all its layers have attention."""
    held, rings = _held.get(cache), cast(tuple[KeyValueRing, ...], cache.layers)
    if held is None or position >= held.room or [id(ring.keys) for ring in rings] != held.keys:
        held = _held[cache] = _made_held(rings, position, 1)
    return held


def _applies(x: F32, width: int, state: Any, tokens: TokenPositions, taps: Scope) -> bool:
    """Does x [T, width] fit a fused kernel: few rows, of one sequence or one of each, and nothing tapped?"""
    few_rows = x.ndim == 2 and x.shape[1] == width and (len(x) == 1 or 0 < len(x) <= few())
    whole = not tokens.starts or (isinstance(state, tuple) and len(state) == len(x))
    return few_rows and x.dtype == np.float32 and x.flags.carray and not taps.taps.patterns and whole


def _call(x: F32, run: Run, held: Sequence[Held], tokens: TokenPositions) -> F32 | None:
    """The residual after the layers of the run, with the rings of one sequence or each; None if their types differ."""
    kinds, table, limits = held[0].rings
    out = np.empty((tokens.outputs, x.shape[1]), np.float32)
    if tokens.starts:
        if len({each.rings[0][0].dtype for each in held}) > 1:
            return None
        table, limits = (np.stack([each.rings[i] for each in held], axis=1) for i in (1, 2))
        cos, sin = zip(*(angles(tokens.positions, *rope) for rope in run.ropes), strict=True)
        places = tokens.positions, np.stack(cos), np.stack(sin), 0
    else:
        page = tokens.first // PAGE * PAGE
        places = tokens.positions, *_page(page, run.ropes), tokens.first - page  # Tokens
    rings = kinds, table.reshape(-1, 2, 2), limits.reshape(-1)
    fused_attention_layers(workers(), x, run.layers, run.numbers, rings, places, out)
    return out


def decode(
    x: F32,
    weights: DecoderWeights,
    attention: tuple[AttentionConfig, ...],
    caches: Sequence[Cache],
    tokens: TokenPositions,
) -> F32 | None:
    """All layers for the next token of each sequence, x [B, D] → [B, D], in one call; None where not all have attention
    and one layout.
    """
    if runs_formulas() or tokens.last_visible is not tokens.positions or not (len(x) == 1 or 0 < len(x) <= few()):
        return None
    run = _run(weights, weights.blocks, attention)
    if run is None:
        return None
    held = [_held_of(cache, cache.position) for cache in caches]
    return _call(x, run, held, tokens)


@attention_layer.kernel
def _attention_layer(
    x: F32, w: LayerWeights, config: AttentionConfig, ring: Rings, tokens: TokenPositions, taps: Scope
) -> F32:
    T, position = len(x), tokens.first
    require(len(tokens.positions) == T, "attention_layer", x, tokens.positions)
    run = _run(w, (w,), (config,))
    fits = run is not None and _applies(x, run.width, ring, tokens, taps) and tokens.last_visible is tokens.positions
    if run is None or not fits:
        return NotImplemented
    if isinstance(ring, tuple):
        held = [_made_held([own], int(at), 1) for own, at in zip(ring, tokens.positions, strict=True)]
    elif is_decode(T, position) and (T == 1 or position + T <= ring.limit):
        held = [_made_held([ring], position, T)]
    else:
        return NotImplemented
    done = _call(x, run, held, tokens)
    return NotImplemented if done is None else done


@recurrent_layer.kernel
def _recurrent_layer(x: F32, w: LayerWeights, eps: float, state: States, tokens: TokenPositions, taps: Scope) -> F32:
    require(len(x) == len(tokens.positions), "recurrent_layer", x, tokens.positions)
    if w not in _recurrent:
        _recurrent[w] = _made_recurrent(w)
    layer = _recurrent[w]
    if layer is None or not _applies(x, layer.width, state, tokens, taps):
        return NotImplemented
    states = state if isinstance(state, tuple) else (state,)
    tail, h = (np.stack(each) for each in zip(*(own.read() for own in states), strict=True))
    after = np.empty((len(h), tail.shape[1] + 1, h.shape[1]), np.float32)
    now = tail, h, tokens.positions[:: len(x) // len(h)] == 0, after  # State
    out = np.empty((tokens.outputs, x.shape[1]), np.float32)
    fused_recurrent_layer(workers(), x, layer.branch, layer.ffn, (layer.hidden, eps), now, out)
    for own, its in zip(states, after, strict=True):
        own.propose(its[:-1], its[-1])
    return out
