"""The RG-LRU, the real-gated linear recurrent unit: a diagonal linear recurrence whose decay the input chooses
(De et al. 2024, "Griffin", §2.4).

    r_t = σ(A x_t + b_a)                        recurrence gate                               eq. 1
    i_t = σ(B x_t + b_x)                        input gate                                    eq. 2
    a_t = exp(-8 · r_t · softplus(Λ))           decay, each channel its own                   eq. 3
    h_t = a_t · h_{t-1} + √(1 - a_t²) · (i_t · x_t)                                           eq. 4

A and B are block-diagonal: each block of channels sees only itself. At position 0 there is no before: a = 0, and the
input enters whole.

Departs from the paper in the sign of Λ: it writes a = σ(Λ), whose logarithm is -softplus(-Λ); the released weights hold
the Λ of softplus(Λ), as the code that trained them has it. √(1 - a²) is computed as √(-expm1(2 log a)): near a = 1,
where memory is long, 1 - a² would have lost its digits. The state h is float32 whatever the weights are.
"""

from __future__ import annotations

import numpy as np
from numba import float32, get_num_threads

from ..arrays import F32, U16, widen_bf16
from ..definition import definition, require
from ..kernels.compiler import jit, jit_inner
from ..kernels.parallel import chunk, parallel_for
from ..kernels.simd import (
    LANES,
    ROWS,
    exp,
    expm1,
    fma,
    load,
    load_one,
    prefetch,
    root,
    splat,
    store,
    tile_add_outer,
    tile_store,
    tile_zeros,
    zeros,
)
from ..kernels.views import new_array, new_zeros

DECAY = 8.0  # c in the paper
TOGETHER = 8  # rows of a gate that one token reads at a time: its sums are loaded and stored once for so many


def sigmoid(x: F32) -> F32:
    """1 / (1 + e⁻ˣ), as exp(-log(1 + e⁻ˣ)), which overflows nowhere."""
    return np.exp(-np.logaddexp(np.float32(0), -x)).astype(np.float32)


def softplus(x: F32) -> F32:
    """log(1 + eˣ), without overflow."""
    return (np.log1p(np.exp(-np.abs(x))) + np.maximum(x, 0)).astype(np.float32)


@definition
def block_diagonal(x: F32, weight: F32 | U16, bias: F32) -> F32:
    """Each block of channels times its own matrix: y[n] = x[n] W[n] + b[n]      [De et al. 2024 §2.4; App. A]

    x [T, E] float32, weight [M, I, J] float32 or bf16, bias [M, J] float32 → [T, E] float32, E = M · I = M · J
    """
    blocks = x.reshape(len(x), *weight.shape[:2])
    y = np.einsum("TMI,MIJ->TMJ", blocks, widen_bf16(weight), optimize=True) + bias
    return y.reshape(x.shape).astype(np.float32)


@definition
def linear_scan(x: F32, decay: F32, state: F32) -> F32:
    """h_t = decay_t · h_{t-1} + x_t, each channel by itself, h_{-1} = state      [De et al. 2024 eq. 4]

    x [T, E] float32, decay [T, E] float32, state [E] float32 → [T, E] float32
    """
    h = np.empty_like(x)
    for t in range(len(x)):
        state = h[t] = decay[t] * state + x[t]
    return h


def associative_scan(x: F32, decay: F32, state: F32) -> F32:
    """linear_scan as a tree: pairs (a, b) of h → a h + b compose, (a₂, b₂) after (a₁, b₁) is (a₁ a₂, a₂ b₁ + b₂).

    That is how the recurrence could run in parallel over time, in log T rounds of twice the work; the paper found the
    plain loop faster, since both wait for memory (App. D), and so do we. x, decay [T, E], state [E] → [T, E] float32
    """
    a, b = decay.copy(), x.copy()
    b[0] += a[0] * state
    reach = 1
    while reach < len(x):
        b[reach:] = a[reach:] * b[:-reach] + b[reach:]
        a[reach:] = a[reach:] * a[:-reach]
        reach *= 2
    return b


def decay_and_input(x: F32, recurrence: F32, input: F32, decay_rate: F32, start: bool) -> tuple[F32, F32]:
    """a_t and √(1 - a_t²) · i_t · x_t from the gates before their sigmoids      [De et al. 2024 eqs. 1-4]

    x, recurrence, input [T, E], decay_rate [E] = softplus(Λ); `start`: the first token has position 0 → two of [T, E]
    """
    log_a = np.float32(-DECAY) * sigmoid(recurrence) * decay_rate
    a, normaliser = np.exp(log_a), np.sqrt(-np.expm1(2 * log_a))
    if start:
        a[0], normaliser[0] = 0, 1
    return a, normaliser * sigmoid(input) * x


@definition
def rg_lru(x: F32, recurrence: F32, input: F32, decay_rate: F32, state: F32, start: bool) -> F32:
    """The recurrence, from the gates before their sigmoids to h      [De et al. 2024 eqs. 1-4]

    x [T, E] float32, recurrence [T, E] float32, input [T, E] float32, decay_rate [E] float32, state [E] float32
    → [T, E] float32; `start`: the first token has position 0, so that `state` does not enter
    """
    a, gated = decay_and_input(x, recurrence, input, decay_rate, start)
    return linear_scan(gated, a, state)


# ---- kernels: each thread takes one contiguous range of channels and walks time; lanes are channels


@jit_inner
def _scan_some(worker, workers, x, decay, state, h):
    channels = chunk(worker, workers, x.shape[1])
    first, last = channels.start, channels.stop
    for t in range(len(x)):
        row, a, out = x[t], decay[t], h[t]
        before = h[t - 1] if t else state
        whole = first + (last - first) // LANES * LANES
        for e in range(first, whole, LANES):
            store(out, e, fma(load(a, e), load(before, e), load(row, e)))
        for e in range(whole, last):
            out[e] = a[e] * before[e] + row[e]


@jit
def _scan(workers, x, decay, state, h):
    parallel_for(_scan_some, workers, (x, decay, state, h))


@linear_scan.kernel
def _linear_scan(x, decay, state):
    fits = x.ndim == 2 and x.shape == decay.shape and state.shape == x.shape[1:]
    require(fits, "linear_scan", x, decay, state)
    h = np.empty_like(x)
    _scan(get_num_threads(), x, decay, state, h)
    return h


@jit_inner
def _gate(x):
    one = splat(float32(1))
    return one / (one + exp(zeros() - x))


@jit_inner
def token_row(x, recurrence, input, decay_rate, before, start, first, last, h):
    """One token of channels first … last - 1, a whole number of vectors."""
    for e in range(first, last, LANES):
        gated = _gate(load(input, e)) * load(x, e)
        if start:
            store(h, e, gated)
        else:
            log_a = _gate(load(recurrence, e)) * load(decay_rate, e) * splat(float32(-DECAY))
            normaliser = root(zeros() - expm1(log_a + log_a))
            store(h, e, fma(exp(log_a), load(before, e), normaliser * gated))


@jit_inner
def _rg_lru_some(worker, workers, x, recurrence, input, decay_rate, state, start, h):
    vectors = chunk(worker, workers, x.shape[1] // LANES)
    first, last = vectors.start * LANES, vectors.stop * LANES
    for t in range(len(x)):
        before = h[t - 1] if t else state
        token_row(x[t], recurrence[t], input[t], decay_rate, before, start and t == 0, first, last, h[t])


@jit
def _rg_lru_channels(workers, x, recurrence, input, decay_rate, state, start, h):
    parallel_for(_rg_lru_some, workers, (x, recurrence, input, decay_rate, state, start, h))


@rg_lru.kernel
def _rg_lru(x: F32, recurrence: F32, input: F32, decay_rate: F32, state: F32, start: bool) -> F32:
    fits = x.ndim == 2 and x.shape == recurrence.shape == input.shape
    fits = fits and decay_rate.shape == state.shape == x.shape[1:]
    require(fits, "rg_lru", x, recurrence, input, decay_rate, state)
    missing = -x.shape[1] % LANES
    if missing:  # no released width; a whole number of vectors is made of it
        rows, row = ((0, 0), (0, missing)), (0, missing)
        wide = np.pad(x, rows), np.pad(recurrence, rows), np.pad(input, rows)
        return _rg_lru(*wide, np.pad(decay_rate, row), np.pad(state, row), start)[:, : x.shape[1]].copy()
    h = np.empty_like(x)
    _rg_lru_channels(get_num_threads(), x, recurrence, input, decay_rate, state, start, h)
    return h


@jit_inner
def block_row(x, weight, bias, m, first, last, y):
    """Outputs first … last - 1 of block m for one token, x and y [E], weight [M · I · I]: whole vectors, and I is too.
    Rows are read in memory's order, TOGETHER at a time.
    """
    size = bias.shape[1]
    top, ahead = m * size, 2 * TOGETHER * size
    for j in range(first, last):
        y[top + j] = bias[m, j]
    for i in range(top, top + size, TOGETHER):
        for j in range(first, last, LANES):
            total = load(y, top + j)
            for r in range(i, i + TOGETHER):
                prefetch(weight, r * size + j + ahead)
                total = fma(splat(x[r]), load(weight, r * size + j), total)
            store(y, top + j, total)


@jit_inner
def _one_block(x, weight, bias, m, padded, y):
    """Block m for all tokens: its matrix is widened once, and tiles of ROWS tokens x 2 · LANES outputs go over it."""
    size = weight.shape[1]
    wide, lanes = new_zeros(size * padded, np.float32), 2 * LANES
    for i in range(size):
        row = weight[m, i]
        for j in range(size):
            wide[i * padded + j] = load_one(row, j)
    some, out = new_zeros(ROWS * size, np.float32), new_array(ROWS * lanes, np.float32)
    for t in range(0, len(x), ROWS):
        rows = min(ROWS, len(x) - t)
        for r in range(rows):
            for i in range(size):
                some[r * size + i] = x[t + r, m * size + i]
        for j in range(0, padded, lanes):
            tile = tile_zeros()
            for i in range(size):
                tile = tile_add_outer(tile, some, i, size, wide, i * padded + j)
            tile_store(tile, out, 0, lanes)
            for r in range(rows):
                for k in range(min(lanes, size - j)):
                    y[t + r, m * size + j + k] = out[r * lanes + k] + bias[m, j + k]


@jit_inner
def _some_blocks(worker, workers, x, weight, bias, padded, y):
    size = weight.shape[1]
    for m in chunk(worker, workers, len(weight)):
        if len(x) == 1 and size % LANES == 0:
            block_row(x[0], weight.reshape(-1), bias, m, 0, size, y[0])
        else:
            _one_block(x, weight, bias, m, padded, y)


@jit
def _blocks(workers, x, weight, bias, padded, y):
    parallel_for(_some_blocks, workers, (x, weight, bias, padded, y))


@block_diagonal.kernel
def _block_diagonal(x, weight, bias):
    fits = x.ndim == 2 and weight.ndim == 3 and weight.shape[1] == weight.shape[2] and bias.shape == weight.shape[:2]
    require(fits and len(weight) * weight.shape[1] == x.shape[1], "block_diagonal", x, weight, bias)
    y = np.empty_like(x)
    lanes = 2 * LANES
    _blocks(get_num_threads(), x, weight, bias, -(-weight.shape[2] // lanes) * lanes, y)
    return y
