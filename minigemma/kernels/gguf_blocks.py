"""Kernels of layouts/gguf_blocks.py: blocks of GGUF's types to float32, and to the layouts that run."""

from concurrent.futures import ThreadPoolExecutor

import numpy as np
from numba import float32

from ..definition import require
from ..layouts.gguf_blocks import (
    BYTES,
    KERNELS,
    KINDS,
    ONE_SCALE,
    Q4_0,
    Q4_1,
    Q5_0,
    Q5_1,
    Q5_K,
    Q6_K,
    Q8_0,
    RANGES,
    REFITS,
    SCALES,
    SHARED,
    STEPS,
    TOO_LARGE,
    TRIED,
    WEIGHTS,
    dequantize_blocks,
    int8_blocks,
    quantize_blocks,
)
from .compiler import jit, jit_inner
from .parallel import chunk, parallel, workers
from .simd.cpu import LANES
from .simd.memory import load, load_half, load_one, store, store_half, store_whole
from .simd.vectors import fma, magnitude, max_lanes, maximum, minimum, round_lanes, splat, sum_lanes, where_less, zeros

TOGETHER = 2048  # blocks of 256 that the definition dequantizes at a time: 2 MB of float32 stay in the cache


@jit_inner
def _block_of_32(block, kind, out):
    """The 32 weights of a Q4_0, Q4_1, Q5_0, Q5_1 or Q8_0 block."""
    d = load_half(block, 0)
    if kind == Q8_0:
        for j in range(32):
            out[j] = d * float32(np.int8(block[2 + j]))
        return
    with_minimum, five = kind in (Q4_1, Q5_1), kind in (Q5_0, Q5_1)
    m = load_half(block, 2) if with_minimum else float32(0)
    zero = float32(0) if with_minimum else (float32(16) if five else float32(8))
    at = 4 if with_minimum else 2
    bits = np.uint32(0)
    if five:
        for i in range(4):
            bits |= np.uint32(block[at + i]) << np.uint32(8 * i)
        at += 4
    for j in range(32):
        q = np.uint32(block[at + j % 16]) >> np.uint32(j // 16 * 4) & np.uint32(15)
        q |= (bits >> np.uint32(j) & np.uint32(1)) << np.uint32(4)
        out[j] = d * (float32(q) - zero) + m  # rounded once without a minimum, as in the definition


@jit_inner
def _k_block(block, five, out):
    """The 256 weights of a Q4_K or Q5_K block."""
    d, m = load_half(block, 0), load_half(block, 2)
    nibbles = 48 if five else 16
    for i in range(8):
        if i < 4:
            s, t = np.int64(block[4 + i]) & 63, np.int64(block[8 + i]) & 63
        else:
            s = (np.int64(block[8 + i]) & 15) | (np.int64(block[i]) >> 6 << 4)
            t = (np.int64(block[8 + i]) >> 4) | (np.int64(block[4 + i]) >> 6 << 4)
        scale, minimum = d * float32(s), m * float32(t)
        for j in range(32):
            low, high = np.int64(block[nibbles + i // 2 * 32 + j]), np.int64(block[16 + j])
            q = (low >> 4 if i % 2 else low & 15) | ((high >> i & 1) << 4 if five else 0)
            out[i * 32 + j] = scale * float32(q) - minimum


@jit_inner
def _q6_k_block(block, out):
    """The 256 weights of a Q6_K block."""
    d = load_half(block, 208)
    for i in range(8):
        half, quarter = i // 4, i % 4
        for j in range(32):
            low, high = np.int64(block[half * 64 + quarter % 2 * 32 + j]), np.int64(block[128 + half * 32 + j])
            q = (low >> 4 if quarter > 1 else low & 15) | (high >> (2 * quarter) & 3) << 4
            scale = d * float32(np.int8(block[192 + i * 2 + j // 16]))
            out[i * 32 + j] = scale * (float32(q) - float32(32))


@jit_inner
def _block_of_256(block, kind, out):
    if kind == Q6_K:
        _q6_k_block(block, out)
    else:
        _k_block(block, kind == Q5_K, out)


@jit_inner
def _block(block, kind, out):
    if kind <= Q8_0:
        _block_of_32(block, kind, out)
    else:
        _block_of_256(block, kind, out)


@parallel
def _dequantize_some(worker, workers, blocks, kind, out):
    for b in chunk(worker, workers, len(blocks)):
        _block(blocks[b], kind, out[b])


@dequantize_blocks.kernel
def _dequantize(blocks, kind):
    require(blocks.dtype == np.uint8 and blocks.shape[1:] == (BYTES[kind],), f"a block of {KINDS[kind]}", blocks)
    if kind >= len(KERNELS):
        return NotImplemented
    out = np.empty((len(blocks), WEIGHTS[KINDS[kind]]), np.float32)
    _dequantize_some(workers() if len(blocks) >= SHARED else 1, blocks, kind, out)
    return out


@jit_inner
def _largest(x, at):
    """max |w| of the 32 weights from x[at] on; NaN if one of them is, or is infinite."""
    highest, wrong = zeros(), zeros()
    for j in range(at, at + 32, LANES):
        w = load(x, j)
        highest, wrong = maximum(highest, magnitude(w)), fma(w, zeros(), wrong)
    return max_lanes(highest) + sum_lanes(wrong)


@jit_inner
def _closest_steps(x, steps):
    """How many steps of the scale the largest weight should take, so that all weights lie closest to integers.

    x [32]: weights divided by the largest; steps [TRIED]: the numbers to try, the lanes of this search. On a tie
    the first, which is the larger, wins.
    """
    k, m = load(steps, 0), load(steps, TRIED - LANES)  # with 16 lanes twice the same
    a, b, c, d = zeros(), zeros(), zeros(), zeros()  # two sums of each: in one, each product would wait for the last
    for j in range(0, 32, 2):
        one, two = splat(load_one(x, j)), splat(load_one(x, j + 1))
        u, v, w, z = one * k, two * k, one * m, two * m
        u, v, w, z = u - round_lanes(u), v - round_lanes(v), w - round_lanes(w), z - round_lanes(z)
        a, b, c, d = fma(u, u, a), fma(v, v, b), fma(w, w, c), fma(z, z, d)
    missed, other = (a + b) / (k * k), (c + d) / (m * m)
    fewest, best = minimum(missed, other), where_less(other, missed, m, k)
    lowest = -max_lanes(zeros() - fewest)
    return max_lanes(where_less(splat(lowest), fewest, zeros(), best))


@jit_inner
def _int8_block(x, at, d, out, whole, to):
    """x[at : at + 32] as an int8 block of scale d in out[to : to + 34]; `whole` is `out`, as int8.

    The block becomes NaN where the scale is NaN or too large for a float16, so that the fault stays visible.
    """
    if d < TOO_LARGE:
        store_half(out, to, d)
        d = load_half(out, to)
    else:
        out[to], out[to + 1], d = 0x00, 0x7E, float32(0)
    for j in range(0, 32, LANES):
        q = load(x, at + j) / splat(d) if d > 0 else zeros()
        store_whole(whole, to + 2 + j, maximum(minimum(q, splat(float32(127))), splat(float32(-127))))


@jit_inner
def _best_scale(r, scales, room):
    """The scale whose integers come closest to r [32], weights divided by the one farthest from 0.

    `scales` are the numbers of steps to try and the lanes of this search, `room` [2 · 16] holds the sums of each.
    """
    mean = float32(0)
    for j in range(32):
        mean += r[j] * r[j] / float32(32)
    for i in range(0, scales.size, LANES):
        k, along, square = load(scales, i), zeros(), zeros()
        for j in range(32):
            w, u = splat(load_one(r, j)), splat(r[j] * r[j] + mean)
            q = minimum(maximum(round_lanes(zeros() - w * k), splat(float32(-8))), splat(float32(7)))
            along, square = fma(u * q, w, along), fma(u * q, q, square)
        store(room, i, along)
        store(room, scales.size + i, square)
    best, most = float32(0), float32(0)
    for i in range(scales.size):
        along, square = room[i], room[scales.size + i]
        if square > 0 and along * along / square > most:
            best, most = along / square, along * along / square
    return best


@jit_inner
def _int4_block(x, scales, r, room, out):
    farthest = float32(0)
    for j in range(32):
        farthest = x[j] if abs(x[j]) > abs(farthest) else farthest
    for j in range(32):
        r[j] = x[j] / farthest if farthest != 0 else float32(0)
    store_half(out, 0, _best_scale(r, scales, room) * farthest)
    d = load_half(out, 0)
    _store_nibbles(x, d, float32(8.5), out, 2)


@jit_inner
def _store_nibbles(x, d, zero, out, to):
    """q = ⌊x / d + zero⌋ of 32 weights, clipped to 0 … 15, in out[to : to + 16]."""
    for j in range(16):
        low = x[j] / d + zero if d != 0 else zero
        high = x[j + 16] / d + zero if d != 0 else zero
        low, high = min(max(low, float32(0)), float32(15)), min(max(high, float32(0)), float32(15))
        out[to + j] = np.uint8(low) | np.uint8(high) << 4


@jit_inner
def _best_line(r, ranges, room):
    """The slope and center of the line through r [32], weights from -1 to 1, that leaves the least error: one for each
    of `ranges`, the lanes of this search, then REFITS more. `room` [3 · 16] is for the sums of each.
    """
    count, mean = ranges.size, float32(0)
    for j in range(32):
        mean += r[j] / float32(32)
    for i in range(0, count, LANES):
        up, total, along, square = load(ranges, i) * splat(float32(0.5)), zeros(), zeros(), zeros()
        for j in range(32):
            w = splat(load_one(r, j))
            q = round_lanes(w * up + splat(float32(7.5)))
            p = minimum(maximum(q, zeros()), splat(float32(15))) - splat(float32(7.5))
            total, along, square = total + p, fma(w, p, along), fma(p, p, square)
        store(room, i, total)
        store(room, count + i, along)
        store(room, 2 * count + i, square)
    slope, center, most = float32(0), mean, float32(0)
    for i in range(count):
        average = room[i] / float32(32)
        along, square = room[count + i] - mean * room[i], room[2 * count + i] - average * room[i]
        if square > 0 and along * along / square > most:
            slope, most = along / square, along * along / square
            center = mean - slope * average
    for _ in range(REFITS if slope > 0 else 0):
        sums, products, squares = zeros(), zeros(), zeros()
        for j in range(0, 32, LANES):
            w = load(r, j)
            q = round_lanes((w - splat(center)) / splat(slope) + splat(float32(7.5)))
            p = minimum(maximum(q, zeros()), splat(float32(15))) - splat(float32(7.5))
            sums, products, squares = sums + p, fma(w, p, products), fma(p, p, squares)
        height = sum_lanes(sums)
        rise, run = sum_lanes(products) - mean * height, sum_lanes(squares) - height * height / float32(32)
        slope = rise / run if run > 0 else slope
        center = mean - slope * height / float32(32)
    return slope, center


@jit_inner
def _block_with_minimum(x, ranges, r, room, out):
    """32 weights as a block of Q4_1."""
    low, high = x[0], x[0]
    for j in range(32):
        low, high = min(low, x[j]), max(high, x[j])
    middle, half = (low + high) / float32(2), (high - low) / float32(2)
    for j in range(32):
        r[j] = (x[j] - middle) / half if half > 0 else float32(0)
    slope, center = _best_line(r, ranges, room)
    store_half(out, 0, half * slope)
    store_half(out, 2, half * (center - float32(7.5) * slope) + middle)
    lowest = load_half(out, 2)
    for j in range(32):
        r[j] = x[j] - lowest
    _store_nibbles(r, load_half(out, 0), float32(0.5), out, 4)


@parallel
def _quantize_some(worker, workers, x, kind, tried, out, whole):
    r, room = np.empty(32, np.float32), np.empty(3 * tried.size, np.float32)
    for b in chunk(worker, workers, x.size // 32):
        w = x[32 * b : 32 * b + 32]
        if kind == Q8_0:
            _int8_block(x, 32 * b, _largest(x, 32 * b) / float32(127), out, whole, 34 * b)
        elif kind == Q4_0:
            _int4_block(w, tried, r, room, out[18 * b : 18 * b + 18])
        else:
            _block_with_minimum(w, tried, r, room, out[20 * b : 20 * b + 20])


@quantize_blocks.kernel
def _quantize(x, kind):
    require(x.ndim == 2 and x.shape[1] == 32, "quantize_blocks", x)
    out, tried = np.empty((len(x), BYTES[kind]), np.uint8), RANGES if kind == Q4_1 else SCALES
    flat = out.reshape(-1)
    _quantize_some(workers(), np.ascontiguousarray(x).reshape(-1), kind, tried, flat, flat.view(np.int8))
    return out


@jit
def _int8_moved(blocks, five, out):
    """Q4_0 or Q5_0 blocks, [B · 18 or 22]: the same scales and integers, stored in another form."""
    size, zero = (22, 16) if five else (18, 8)
    for b in range(blocks.size // size):
        at, to, bits = b * size, b * 34, 0
        out[to], out[to + 1] = blocks[at], blocks[at + 1]
        for i in range(4 if five else 0):
            bits |= blocks[at + 2 + i] << 8 * i
        for j in range(16):
            both = blocks[at + size - 16 + j]
            out[to + 2 + j] = (both & 15 | (bits >> j & 1) << 4) - zero
            out[to + 18 + j] = (both >> 4 | (bits >> j + 16 & 1) << 4) - zero


@jit_inner
def _search(room, steps, divided, out, whole, to):
    """A block's weights, room [32 or 256], as int8 blocks from out[to] on, each with the scale that comes closest.
    `divided` [32] is for weights divided by the largest; `whole` is `out`, as int8.
    """
    for at in range(0, room.size, 32):
        largest, best = _largest(room, at), float32(127)
        if largest > 0:
            for j in range(0, 32, LANES):
                store(divided, j, load(room, at + j) / splat(largest))
            best = _closest_steps(divided, steps)
        _int8_block(room, at, largest / best, out, whole, to + at // 32 * 34)


@jit
def _int8_of_32(blocks, kind, steps, out, whole):
    """Blocks of 32 weights, [B, bytes], → [B · 34]; `whole` is `out`, as int8."""
    room, divided = np.empty(32, np.float32), np.empty(32, np.float32)
    for b in range(len(blocks)):
        _block_of_32(blocks[b], kind, room)
        _search(room, steps, divided, out, whole, b * 34)


@jit
def _int8_of_256(blocks, kind, steps, out, whole):
    """The same of 256 weights, → [B · 8 · 34]."""  # apart, so that only what a file has is compiled
    room, divided = np.empty(256, np.float32), np.empty(32, np.float32)
    for b in range(len(blocks)):
        _block_of_256(blocks[b], kind, room)
        _search(room, steps, divided, out, whole, b * 8 * 34)


@jit
def _int8_of_floats(x, steps, out, whole):
    """Weights that the definition has dequantized, [B · 32], → [B · 34]."""
    _search(x, steps, np.empty(32, np.float32), out, whole, 0)


@int8_blocks.kernel
def _int8(blocks, kind):
    require(blocks.dtype == np.uint8 and blocks.shape[1:] == (BYTES[kind],), f"a block of {KINDS[kind]}", blocks)
    if kind == Q8_0:
        return blocks
    if kind >= len(KERNELS) and kind in ONE_SCALE:
        return NotImplemented
    out = np.empty((len(blocks), WEIGHTS[KINDS[kind]] // 32, 34), np.uint8)

    def convert(first: int, last: int) -> None:
        if kind in (Q4_0, Q5_0):
            _int8_moved(blocks[first:last].reshape(-1), kind == Q5_0, out[first:last].reshape(-1))
        elif kind >= len(KERNELS):
            for at in range(first, last, TOGETHER):
                x = dequantize_blocks(blocks[at : min(at + TOGETHER, last)], kind)
                made = out[at : at + len(x)].reshape(-1)
                _int8_of_floats(x.reshape(-1), STEPS, made, made.view(np.int8))
        else:
            made, search = out[first:last].reshape(-1), _int8_of_32 if kind <= Q8_0 else _int8_of_256
            search(blocks[first:last], kind, STEPS, made, made.view(np.int8))

    # Threads of Python's own: a parallel kernel takes twice as long to compile, and this one stands at the start.
    count = workers() if len(blocks) >= SHARED else 1
    edges = [len(blocks) * i // count for i in range(count + 1)]
    if count == 1:
        convert(*edges)
    else:
        with ThreadPoolExecutor(count) as pool:
            list(pool.map(convert, edges[:-1], edges[1:]))
    return out.reshape(-1, 34)
