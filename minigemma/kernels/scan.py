"""The recurrences of Griffin: the linear scan, the RG-LRU, and the block-diagonal products of its gates.

The scan, from formulas/rglru.py:
 1  The definition: gates, decay and input as arrays [T, E], then a loop over time.
 2  One pass: gates, decay, input and state of a vector of channels stay in registers, so that no array [T, E] is made
    between them. Channels do not meet, so a lane is a channel.
 3  Threads share the channels, and each walks all of time. A tree over time (`associative_scan`) does twice the work,
    and both wait for memory (De et al. 2024, App. D).
 4  The gradient: the same from the last token to the first; the gates are computed again.

The block-diagonal product:
 1  The definition: each block is widened and multiplied by its channels.
 2  One token: rows of a block are read in the order of memory, TOGETHER at a time, and each sum is loaded and stored
    once per TOGETHER rows.
 3  Several tokens: a block is widened once, and tiles of ROWS tokens x 2 · LANES outputs run over it.
"""

import numpy as np
from numba import float32

from .compiler import jit_inner
from .parallel import chunk, parallel
from .rows import vectors_of
from .simd.accumulators import tile_add_outer, tile_store, tile_zeros
from .simd.cpu import LANES, ROWS
from .simd.memory import load, load_one, prefetch, store
from .simd.vectors import exp, expm1, fma, maximum, root, splat, zeros

DECAY = 8.0  # c in the paper
STEEPEST = 1000  # the derivative of the root in the gradient of RG-LRU is at most this
TOGETHER = 8  # rows of a gate that one token reads at a time
WIDTH = 2 * LANES  # outputs of a tile


@parallel
def scan(worker, workers, x, decay, state, h):
    """h [T, E] = linear_scan of x and decay [T, E] from state [E]; E is a multiple of LANES."""
    channels = vectors_of(worker, workers, x.shape[1])
    for t in range(len(x)):
        row, a, out = x[t], decay[t], h[t]
        before = h[t - 1] if t else state
        for e in channels:
            store(out, e, fma(load(a, e), load(before, e), load(row, e)))


@jit_inner
def sigmoid_lanes(x):
    """1 / (1 + e⁻ˣ) of one vector."""
    one = splat(float32(1))
    return one / (one + exp(zeros() - x))


@jit_inner
def token_row(x, recurrence, input, decay_rate, before, start, channels, h):
    """RG-LRU of one token: all arrays [E]; `channels` is the first of each vector, range(first, end, LANES)."""
    for e in channels:
        gated = sigmoid_lanes(load(input, e)) * load(x, e)
        if start:
            store(h, e, gated)
        else:
            log_a = sigmoid_lanes(load(recurrence, e)) * load(decay_rate, e) * splat(float32(-DECAY))
            normalizer = root(zeros() - expm1(log_a + log_a))
            store(h, e, fma(exp(log_a), load(before, e), normalizer * gated))


@parallel
def rg_lru_scan(worker, workers, tokens, decay_rate, state, start, h):
    """h [T, E] = rg_lru of `tokens`, the three arrays x, recurrence and input [T, E]; E is a multiple of LANES."""
    x, recurrence, input = tokens
    channels = vectors_of(worker, workers, x.shape[1])
    for t in range(len(x)):
        before = h[t - 1] if t else state
        token_row(x[t], recurrence[t], input[t], decay_rate, before, start and t == 0, channels, h[t])


@parallel
def rg_lru_scan_back(worker, workers, dh, tokens, decay_rate, start, gradients, sums):
    """From the last token to the first; sums [2, E]: of decay_rate's gradient, and what a token passes back."""
    (x, recurrence, input, before), (dx, drecurrence, dinput) = tokens, gradients
    one, drate, carried = splat(float32(1)), sums[0], sums[1]
    for t in range(len(x) - 1, -1, -1):
        first = start and t == 0
        for e in vectors_of(worker, workers, x.shape[1]):
            r, i, rate = sigmoid_lanes(load(recurrence[t], e)), sigmoid_lanes(load(input[t], e)), load(decay_rate, e)
            log_a = r * rate * splat(float32(-DECAY))
            a, normalizer = exp(log_a), root(zeros() - expm1(log_a + log_a))
            if first:
                a, normalizer = zeros(), one
            du = load(dh[t], e) + load(carried, e)
            dgated = du * i * load(x[t], e)
            steep = maximum(normalizer, splat(float32(0.5 / STEEPEST)))
            dlog_a = a * (load(before[t], e) * du - a * dgated / steep)
            pull = dlog_a * splat(float32(-DECAY))
            store(dx[t], e, du * normalizer * i)
            store(dinput[t], e, dgated * normalizer * (one - i))
            store(drecurrence[t], e, pull * rate * r * (one - r))
            store(drate, e, fma(pull, r, load(drate, e)))
            store(carried, e, a * du)


@jit_inner
def block_row(x, weight, bias, m, first, end, y):
    """Outputs first … end - 1 of block m for one token: x and y [E], weight [M · I · I], bias [M, I]; I and both limits
    are multiples of LANES.
    """
    size = bias.shape[1]
    top, ahead = m * size, 2 * TOGETHER * size
    for j in range(first, end):
        y[top + j] = bias[m, j]
    for i in range(top, top + size, TOGETHER):
        for j in range(first, end, LANES):
            total = load(y, top + j)
            for r in range(i, i + TOGETHER):
                prefetch(weight, r * size + j + ahead)
                total = fma(splat(x[r]), load(weight, r * size + j), total)
            store(y, top + j, total)


@jit_inner
def block_tokens(x, weight, bias, m, y):
    """Block m for all tokens: x and y [T, E], weight [M, I, I], bias [M, I]."""
    size = weight.shape[1]
    padded = (size + WIDTH - 1) // WIDTH * WIDTH
    wide = np.zeros(size * padded, np.float32)
    for i in range(size):
        row = weight[m, i]
        for j in range(size):
            wide[i * padded + j] = load_one(row, j)
    some, out = np.zeros(ROWS * size, np.float32), np.empty(ROWS * WIDTH, np.float32)
    for t in range(0, len(x), ROWS):
        rows = min(ROWS, len(x) - t)
        for r in range(rows):
            for i in range(size):
                some[r * size + i] = x[t + r, m * size + i]
        for j in range(0, padded, WIDTH):
            tile = tile_zeros()
            for i in range(size):
                tile = tile_add_outer(tile, some, i, size, wide, i * padded + j)
            tile_store(tile, out, 0, WIDTH)
            for r in range(rows):
                for k in range(min(WIDTH, size - j)):
                    y[t + r, m * size + j + k] = out[r * WIDTH + k] + bias[m, j + k]


@parallel
def all_blocks(worker, workers, x, weight, bias, y):
    """y [T, E] = block_diagonal of x [T, E], weight [M, I, I] and bias [M, I]; threads share the blocks."""
    size = weight.shape[1]
    for m in chunk(worker, workers, len(weight)):
        if len(x) == 1 and size % LANES == 0:
            block_row(x[0], weight.reshape(-1), bias, m, 0, size, y[0])
        else:
            block_tokens(x, weight, bias, m, y)
