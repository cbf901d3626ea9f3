"""Attention for prompts: many queries. A lane is a query, so that both products run as tiles in registers.

 1  The definition: scores of all keys, a softmax, a weighted sum of values.
 2  Online softmax (Milakov & Gimelshein 2018): each query keeps its largest score so far, the sum of exponentials and
    the weighted sum of values. No [T, S] array is made.
 3  COLUMNS queries (token and head of a group) share a block of keys and values that is widened to float32 once.
 4  Scores = keys · queries and totals += values · probabilities in tiles of ROWS x WIDTH sums in registers.
 5  Blocks of keys that no query of the columns sees are skipped: in a window of W the work grows with T · W, not T².
 6  Threads take every workers-th chunk of columns: later queries see more keys, so contiguous ranges would be uneven.

Against PyTorch's attention in bf16, for 4 query heads of 256 on one key head: 1.2 times as fast for 2,048 tokens, 19.6
times for 8,192 in a window of 512. `python docs/make_performance.py attention` measures this.
"""

from typing import NamedTuple

import numpy as np

from ..arrays import F32
from .compiler import jit_inner
from .parallel import parallel
from .scores import LOWEST, hide_lanes, is_visible, soft_cap_lanes
from .simd.accumulators import tile_add_outer, tile_load, tile_store, tile_zeros
from .simd.cpu import LANES, ROWS
from .simd.memory import load, load_one, store
from .simd.vectors import exp, fma, maximum, splat, zeros

BLOCK = 8 * ROWS  # keys of one softmax update
WIDTH = 2 * LANES  # queries of a tile
COLUMNS = 8 * WIDTH  # queries that share a block of widened keys


class Columns(NamedTuple):
    """Queries side by side, WIDTH to a tile; of one tile the arrays have no first axis."""

    q: F32  # [tiles, H · WIDTH]
    positions: F32  # [tiles, WIDTH]
    last_visible: F32  # [tiles, WIDTH]
    states: F32  # [tiles, 2 · WIDTH], the largest scores, then the sums of exponentials
    totals: F32  # [tiles, rows · WIDTH], the weighted sums of values; rows is H rounded up to a multiple of ROWS


class KeyBlock(NamedTuple):
    """Keys and values of one head, widened, and room for the scores of a tile."""

    k: F32  # [BLOCK · rows]
    v: F32  # [BLOCK · rows]
    positions: F32  # [BLOCK]
    scores: F32  # [BLOCK · WIDTH]


@jit_inner
def widen_keys(rows, head, first, end, padded, out):
    """out [end - first, padded] float32 = rows[first : end, head] of [S, K, H] float32 or bf16, zeros elsewhere."""
    H = rows.shape[2]
    out[:] = 0
    for s in range(first, end):
        row, start = rows[s, head], (s - first) * padded
        for h in range(0, H // LANES * LANES, LANES):
            store(out, start + h, load(row, h))
        for h in range(H // LANES * LANES, H):
            out[start + h] = load_one(row, h)


@jit_inner
def pack_columns(queries, head, first, end, padded):
    """Columns first … end - 1 of one key head: column c is query c // G, head c % G of the group."""
    G, H = queries.q.shape[2:]
    tiles = (end - first + WIDTH - 1) // WIDTH
    q, totals = np.zeros((tiles, H * WIDTH), np.float32), np.zeros((tiles, padded * WIDTH), np.float32)
    states = np.zeros((tiles, 2 * WIDTH), np.float32)
    positions, last_visible = np.empty((tiles, WIDTH), np.float32), np.empty((tiles, WIDTH), np.float32)
    for tile in range(tiles):
        for lane in range(WIDTH):
            positions[tile, lane] = last_visible[tile, lane] = LOWEST  # a column of padding sees nothing
    for c in range(first, end):
        tile, lane = (c - first) // WIDTH, (c - first) % WIDTH
        positions[tile, lane], last_visible[tile, lane] = queries.positions[c // G], queries.last_visible[c // G]
        states[tile, lane] = LOWEST
        for h in range(H):
            q[tile, h * WIDTH + lane] = queries.q[c // G, head, c % G, h]
    return Columns(q, positions, last_visible, states, totals)


@jit_inner
def online_softmax_update(tile, block, count, scoring, half, H):
    """Turns products [count, WIDTH] into exponentials, LANES queries from `half` on, and rescales their sums."""
    scores, states, totals, positions, cap = block.scores, tile.states, tile.totals, block.positions, scoring.cap
    window, scale = splat(scoring.window), splat(scoring.scale)
    query, last_visible, before = load(tile.positions, half), load(tile.last_visible, half), load(states, half)
    top = before
    for s in range(count):
        x = load(scores, s * WIDTH + half) * scale
        if cap > 0:
            x = soft_cap_lanes(x, cap)
        x = hide_lanes(query, last_visible, splat(positions[s]), window, x)
        top = maximum(top, x)
        store(scores, s * WIDTH + half, x)
    summed = zeros()
    for s in range(count):
        p = exp(load(scores, s * WIDTH + half) - top)
        summed = summed + p
        store(scores, s * WIDTH + half, p)
    shrink = exp(before - top)
    store(states, half, top)
    store(states, WIDTH + half, fma(load(states, WIDTH + half), shrink, summed))
    for h in range(H):
        store(totals, h * WIDTH + half, load(totals, h * WIDTH + half) * shrink)


@jit_inner
def attend_tile(tile, block, count, scoring, H, padded):
    """One tile of queries and `count` keys: scores = keys · q, online softmax, totals += valuesᵀ · probabilities."""
    k, v, q, scores, totals = block.k, block.v, tile.q, block.scores, tile.totals
    for s in range(0, count, ROWS):
        sums = tile_zeros()
        for h in range(H):
            sums = tile_add_outer(sums, k, s * padded + h, padded, q, h * WIDTH)
        tile_store(sums, scores, s * WIDTH, WIDTH)
    for half in range(0, WIDTH, LANES):
        online_softmax_update(tile, block, count, scoring, half, H)
    for h in range(0, H, ROWS):
        sums = tile_load(totals, h * WIDTH, WIDTH)
        for s in range(count):
            sums = tile_add_outer(sums, v, s * padded + h, 1, scores, s * WIDTH)
        tile_store(sums, totals, h * WIDTH, WIDTH)


@jit_inner
def attend_columns(queries, keys, scoring, head, first, end, out):
    """Columns first … end - 1 of one key head; out [T, K, G, H]."""
    G, H = queries.q.shape[2:]
    padded = (H + ROWS - 1) // ROWS * ROWS
    columns = pack_columns(queries, head, first, end, padded)
    k, v = np.empty(BLOCK * padded, np.float32), np.empty(BLOCK * padded, np.float32)
    block = KeyBlock(k, v, np.empty(BLOCK, np.float32), np.empty(BLOCK * WIDTH, np.float32))
    oldest, newest = queries.positions[first // G], queries.last_visible[(end - 1) // G]
    for start in range(0, len(keys.k), BLOCK):
        stop, seen = min(start + BLOCK, len(keys.k)), False
        for s in range(start, stop):  # positions rise from query to query: what these two limits hide, all hide
            position = keys.positions[s]
            block.positions[s - start] = position
            seen |= is_visible(oldest, newest, position, scoring.window)
        if not seen:
            continue
        widen_keys(keys.k, head, start, stop, padded, k)
        widen_keys(keys.v, head, start, stop, padded, v)
        for i in range(len(columns.q)):
            tile = Columns(
                columns.q[i], columns.positions[i], columns.last_visible[i], columns.states[i], columns.totals[i]
            )
            attend_tile(tile, block, stop - start, scoring, H, padded)
    for c in range(first, end):
        i, lane = (c - first) // WIDTH, (c - first) % WIDTH
        summed = columns.states[i, WIDTH + lane]
        for h in range(H):
            out[c // G, head, c % G, h] = columns.totals[i, h * WIDTH + lane] / summed


@parallel
def attention_prefill(worker, workers, queries, keys, scoring, out):
    """out [T, K, G, H] = attention of `queries` to `keys`. Query positions rise, and `last_visible` does not fall."""
    K, columns = queries.q.shape[1], queries.q.shape[0] * queries.q.shape[2]
    chunks = (columns + COLUMNS - 1) // COLUMNS
    for task in range(worker, K * chunks, workers):
        first = task // K * COLUMNS
        attend_columns(queries, keys, scoring, task % K, first, min(first + COLUMNS, columns), out)
