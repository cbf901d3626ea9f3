"""The gradient of attention by recomputation: no array [T, S] is kept from the forward pass, and none is made.

 1  The definition: scores, probabilities and their gradients as arrays [G, T, S].
 2  COLUMNS queries (token and head of a group) at a time: their scores and dP = dy vᵀ fill [S, COLUMNS], which grows
    with S alone. A lane is a query, so that a softmax and its gradient need no sum across lanes.
 3  All five products (scores, dP, dv, dq, dk) run as tiles of ROWS x WIDTH sums in registers.
 4  Blocks of keys that no query of the columns sees are skipped, as in the forward pass.
 5  Threads share the columns; each adds to a dk and dv of its own, which are added up at the end, so that no two add to
    one row.

`python -m benchmarks.training` compares a training step with PyTorch's.
"""

from typing import NamedTuple

import numpy as np

from ..arrays import F32
from .attention_prefill import BLOCK, WIDTH, widen_keys
from .compiler import jit_inner
from .parallel import parallel
from .scores import LOWEST, hide_lanes, is_visible, soft_cap_lanes
from .simd.accumulators import tile_add_outer, tile_load, tile_store, tile_zeros
from .simd.cpu import LANES, ROWS
from .simd.memory import load, store
from .simd.vectors import exp, fma, maximum, splat, zeros

TILES = 4
COLUMNS = TILES * WIDTH  # queries that go through all keys together


class Room(NamedTuple):
    """What a thread works with; S and H rounded up to whole blocks, H twice: to rows and to lanes of a tile."""

    k: F32  # [S · rows], widened
    v: F32  # [S · rows]
    positions: F32  # [S]
    scores: F32  # [S · COLUMNS], then probabilities
    dscores: F32  # [S · COLUMNS]
    q: F32  # [TILES, H · WIDTH], a lane a query, and [COLUMNS · lanes], a row a query
    dy: F32
    q_rows: F32
    dy_rows: F32
    query_positions: F32  # [COLUMNS]
    last_visible: F32  # [COLUMNS]


@jit_inner
def whole(count, part):
    """`count` rounded up to a multiple of `part`."""
    return (count + part - 1) // part * part


@jit_inner
def open_room(S, H):
    """Room for S keys of H numbers."""
    slots, rows, lanes = whole(S, BLOCK), whole(H, ROWS), whole(H, WIDTH)
    keys, scores = np.empty((2, slots * rows), np.float32), np.empty((2, slots * COLUMNS), np.float32)
    tiles, by_row = np.zeros((2, TILES, H * WIDTH), np.float32), np.zeros((2, COLUMNS * lanes), np.float32)
    slot_positions, seen = np.empty(slots, np.float32), np.empty((2, COLUMNS), np.float32)
    (k, v), (q, dy), (q_rows, dy_rows) = (keys[0], keys[1]), (tiles[0], tiles[1]), (by_row[0], by_row[1])
    return Room(k, v, slot_positions, scores[0], scores[1], q, dy, q_rows, dy_rows, seen[0], seen[1])


@jit_inner
def pack_queries(room, queries, dy, head, first, end):
    """Columns first … end - 1 of one key head, with zeros behind them, which see nothing."""
    G, H = queries.q.shape[2:]
    lanes = whole(H, WIDTH)
    for c in range(COLUMNS):
        tile, lane, t, g = c // WIDTH, c % WIDTH, (first + c) // G, (first + c) % G
        inside = first + c < end
        room.query_positions[c] = queries.positions[t] if inside else LOWEST
        room.last_visible[c] = queries.last_visible[t] if inside else LOWEST
        for h in range(H):
            q, d = (queries.q[t, head, g, h], dy[t, head, g, h]) if inside else (np.float32(0), np.float32(0))
            room.q[tile, h * WIDTH + lane] = room.q_rows[c * lanes + h] = q
            room.dy[tile, h * WIDTH + lane] = room.dy_rows[c * lanes + h] = d


@jit_inner
def products_of_keys(keys, start, padded, columns, out, tile, H):
    """out [BLOCK, COLUMNS], one tile of it, = rows start … of keys times the columns."""
    for s in range(start, start + BLOCK, ROWS):
        sums = tile_zeros()
        for h in range(H):
            sums = tile_add_outer(sums, keys, s * padded + h, padded, columns, h * WIDTH)
        tile_store(sums, out, s * COLUMNS + tile * WIDTH, COLUMNS)


@jit_inner
def softmax_and_gradient(room, seen, scoring, at):
    """Scores to probabilities, and dP to dscores, of LANES queries from column `at` on; `seen`: where blocks begin."""
    window, scale, cap = splat(scoring.window), splat(scoring.scale), scoring.cap
    query, last_visible = load(room.query_positions, at), load(room.last_visible, at)
    top, total, pull = splat(LOWEST), zeros(), zeros()
    for start in seen:
        for s in range(start, start + BLOCK):
            x = load(room.scores, s * COLUMNS + at) * scale
            if cap > 0:
                x = soft_cap_lanes(x, cap)
            x = hide_lanes(query, last_visible, splat(room.positions[s]), window, x)
            top = maximum(top, x)
            store(room.scores, s * COLUMNS + at, x)
    for start in seen:
        for s in range(start, start + BLOCK):
            p = exp(load(room.scores, s * COLUMNS + at) - top)
            total, pull = total + p, fma(p, load(room.dscores, s * COLUMNS + at), pull)
    one = splat(np.float32(1))
    inverse = one / maximum(total, splat(np.float32(1e-30)))
    pull = pull * inverse
    for start in seen:
        for s in range(start, start + BLOCK):
            x = load(room.scores, s * COLUMNS + at)
            p = exp(x - top) * inverse
            d = p * (load(room.dscores, s * COLUMNS + at) - pull) * scale
            if cap > 0:  # a hidden score is -inf, its probability 0
                part = maximum(x, splat(-cap)) * splat(np.float32(1) / cap)
                d = d * (one - part * part)
            store(room.scores, s * COLUMNS + at, p)
            store(room.dscores, s * COLUMNS + at, d)


@jit_inner
def add_to_keys(left, rows, start, lanes, count, out):
    """out [BLOCK, lanes] from row `start` on += left [BLOCK, COLUMNS] · rows [COLUMNS, lanes], `count` columns."""
    for s in range(start, start + BLOCK, ROWS):
        for h in range(0, lanes, WIDTH):
            sums = tile_load(out, s * lanes + h, lanes)
            for c in range(count):
                sums = tile_add_outer(sums, left, s * COLUMNS + c, COLUMNS, rows, c * lanes + h)
            tile_store(sums, out, s * lanes + h, lanes)


@jit_inner
def store_queries(room, seen, padded, some, head, first, end, dq):
    """dq of the columns = dscores · keys; `some` is room for H rows of a tile."""
    G, H = dq.shape[2:]
    for tile in range(TILES):
        for h in range(0, padded, ROWS):
            sums = tile_zeros()
            for start in seen:
                for s in range(start, start + BLOCK):
                    at = s * COLUMNS + tile * WIDTH
                    sums = tile_add_outer(sums, room.k, s * padded + h, 1, room.dscores, at)
            tile_store(sums, some, h * WIDTH, WIDTH)
        for c in range(first + tile * WIDTH, min(end, first + (tile + 1) * WIDTH)):
            for h in range(H):
                dq[c // G, head, c % G, h] = some[h * WIDTH + c - first - tile * WIDTH]


@parallel
def attention_backward(worker, workers, dy, queries, keys, scoring, dq, parts):
    """dq [T, K, G, H] of attention, and each worker's share of dk and dv: parts [workers, 2, K, whole(S) · whole(H)].

    dy [T, K, G, H]. Query positions rise, and `last_visible` does not fall.
    """
    (T, K, G, H), S = queries.q.shape, len(keys.k)
    padded, lanes, room = whole(H, ROWS), whole(H, WIDTH), open_room(S, H)
    some, seen = np.empty(padded * WIDTH, np.float32), np.empty(whole(S, BLOCK) // BLOCK, np.int64)
    groups = (T * G + COLUMNS - 1) // COLUMNS
    for task in range(worker, K * groups, workers):
        head, first = task % K, task // K * COLUMNS
        end, blocks = min(first + COLUMNS, T * G), 0
        pack_queries(room, queries, dy, head, first, end)
        oldest, newest = queries.positions[first // G], queries.last_visible[(end - 1) // G]
        for start in range(0, S, BLOCK):
            stop, any_seen = min(start + BLOCK, S), False
            for s in range(start, start + BLOCK):
                position = keys.positions[s] if s < stop else 1 << 30
                room.positions[s] = position
                any_seen |= is_visible(oldest, newest, position, scoring.window)
            if any_seen:
                seen[blocks], blocks = start, blocks + 1
                place = slice(start * padded, (start + BLOCK) * padded)
                widen_keys(keys.k, head, start, stop, padded, room.k[place])
                widen_keys(keys.v, head, start, stop, padded, room.v[place])
                for tile in range(TILES):
                    products_of_keys(room.k, start, padded, room.q[tile], room.scores, tile, H)
                    products_of_keys(room.v, start, padded, room.dy[tile], room.dscores, tile, H)
        for at in range(0, COLUMNS, LANES):
            softmax_and_gradient(room, seen[:blocks], scoring, at)
        for start in seen[:blocks]:
            add_to_keys(room.dscores, room.q_rows, start, lanes, end - first, parts[worker, 0, head])
            add_to_keys(room.scores, room.dy_rows, start, lanes, end - first, parts[worker, 1, head])
        store_queries(room, seen[:blocks], padded, some, head, first, end, dq)
