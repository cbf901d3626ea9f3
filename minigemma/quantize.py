"""GGUF's block formats: what their bytes mean, and the way from each to the formats that `linear` runs.

A block of 32 or 256 weights shares its scales. All numbers are little-endian; d, m are float16.

    Q4_0   d, 16 bytes of nibbles                    w = d (q - 8)     low nibbles: weights 0 … 15, high ones: 16 … 31
    Q4_1   d, m, nibbles                             w = d q + m
    Q5_0   d, 32 fifth bits, nibbles                 w = d (q - 16)
    Q5_1   d, m, 32 fifth bits, nibbles              w = d q + m
    Q8_0   d, 32 signed bytes                        w = d q
    Q4_K   d, m, 12 bytes of scales, 128 of nibbles  w = d s q - m t      8 sub-blocks of 32, each with 6-bit s and t
    Q5_K   d, m, 12 bytes of scales, 32 of fifth bits, 128 of nibbles     as Q4_K
    Q6_K   128 bytes of nibbles, 64 of two upper bits, 16 signed scales, d    w = d s (q - 32), 16 sub-blocks of 16

(ggml's quants; see https://github.com/ggml-org/ggml/blob/master/docs/gguf.md for the file around them.)
"""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor

import numpy as np
from numba import float32, get_num_threads
from numpy.typing import NDArray

from .arrays import F32, U8, widen_bf16
from .backend import definition, jit, jit_inner, require
from .crew import share, share_out
from .errors import ModelFormatError
from .formats import widen
from .simd import (
    LANES,
    fma,
    load,
    load_half,
    load_one,
    magnitude,
    max_lanes,
    maximum,
    minimum,
    round_lanes,
    splat,
    store,
    store_half,
    store_whole,
    sum_lanes,
    where_less,
    zeros,
)
from .views import new_array

KINDS = ("Q4_0", "Q4_1", "Q5_0", "Q5_1", "Q8_0", "Q4_K", "Q5_K", "Q6_K")
BYTES = (18, 20, 22, 24, 34, 144, 176, 210)  # of a block of each
WEIGHTS = {kind: 256 if kind.endswith("K") else 32 for kind in KINDS}
OURS = ("SFP8", "INT4", "INT8-ROW", "INT4-ROW")  # what a file that `minigemma quantize` wrote may hold beside them
TRIED = 16
STEPS = 127 - 2 * np.arange(TRIED, dtype=np.float32)  # of an int8's 127, how many a block's largest weight may take
Q4_0, Q4_1, Q5_0, Q5_1, Q8_0, Q4_K, Q5_K, Q6_K = range(8)
SCALES = np.arange(9, 5, -0.25, dtype=np.float32)  # steps that the largest weight of a block may be, of int4's 8
CLIPS = (8, 9, 10, 11, 12, 13, 14, 16, 18, 20, 24)  # steps that the largest weight of a row may be, of which int4 has 8
CLIPPED_TOGETHER = 1 << 18  # weights that stay in the cache while their scale is looked for
TOO_LARGE = 65_520.0  # what is rounded to infinity in float16
SHARED = 1 << 18  # blocks of one tensor that several threads convert; smaller ones are converted side by side


def dequantise(kind: str, blocks: NDArray) -> F32:
    """The weights of a tensor of a GGUF or safetensors type, float32, in the shape that they have.

    Raises ModelFormatError for a type that is not in the table above and not F32, F16 or BF16.
    """
    if kind == "F32":
        return blocks
    if kind == "BF16":
        return widen_bf16(blocks)
    if kind == "F16":
        return blocks.astype(np.float32)
    if kind in OURS:
        return widen(blocks)
    if kind not in KINDS:
        known = "F32, F16, BF16, " + ", ".join(KINDS)
        raise ModelFormatError("tensor", f"is of type {kind}, which has no reader here", f"take a file of {known}")
    wide = dequantise_blocks(blocks.reshape(-1, blocks.shape[-1]), KINDS.index(kind))
    return wide.reshape(*blocks.shape[:-2], -1)


def _half(columns: U8) -> F32:
    """float16 in two bytes → float32: [blocks, 2] → [blocks, 1]."""
    return np.ascontiguousarray(columns).view(np.float16).astype(np.float32)


def _nibbles(packed: U8) -> NDArray:
    """Low nibbles, then high ones: [..., n] → [..., 2n]."""
    return np.concatenate([packed & 15, packed >> 4], axis=-1)


def _fifth_bits(packed: U8) -> NDArray:
    """Bit j of 32 is the fifth bit of weight j: [blocks, 4] → [blocks, 32], as 0 or 16."""
    return np.unpackbits(packed, axis=-1, bitorder="little") << 4


def _sub_scales(packed: U8) -> tuple[NDArray, NDArray]:
    """The eight 6-bit scales and minima in the 12 bytes of Q4_K and Q5_K: [blocks, 12] → two of [blocks, 8, 1]."""
    a, b, c = packed[:, :4], packed[:, 4:8], packed[:, 8:]
    s = np.concatenate([a & 63, (c & 15) | (a >> 6 << 4)], axis=-1)
    t = np.concatenate([b & 63, (c >> 4) | (b >> 6 << 4)], axis=-1)
    return s[..., None], t[..., None]


@definition
def dequantise_blocks(blocks: U8, kind: int) -> F32:
    """Each block's weights      [the table above]

    blocks [B, bytes] uint8 → [B, weights] float32; `kind` is an index into KINDS
    """
    d = _half(blocks[:, :2])
    if kind == Q4_0:
        return d * (_nibbles(blocks[:, 2:]).astype(np.float32) - 8)
    if kind == Q4_1:
        return d * _nibbles(blocks[:, 4:]) + _half(blocks[:, 2:4])
    if kind == Q5_0:
        return d * ((_nibbles(blocks[:, 6:]) | _fifth_bits(blocks[:, 2:6])).astype(np.float32) - 16)
    if kind == Q5_1:
        return d * (_nibbles(blocks[:, 8:]) | _fifth_bits(blocks[:, 4:8])) + _half(blocks[:, 2:4])
    if kind == Q8_0:
        return d * blocks[:, 2:].view(np.int8)
    if kind == Q6_K:
        low, high = blocks[:, :128].reshape(-1, 2, 2, 32), blocks[:, 128:192].reshape(-1, 2, 1, 32)
        nibbles = np.concatenate([low & 15, low >> 4], axis=2)  # [B, 2, 4, 32]
        q = nibbles | (high >> np.array([0, 2, 4, 6], np.uint8)[:, None] & 3) << 4
        s = blocks[:, 192:208].view(np.int8).reshape(-1, 16, 1)
        d = _half(blocks[:, 208:])[..., None]
        return (d * s * (q.reshape(-1, 16, 16).astype(np.float32) - 32)).reshape(-1, 256)
    s, t = _sub_scales(blocks[:, 4:16])
    q = _nibbles(blocks[:, -128:].reshape(-1, 4, 32)).reshape(-1, 8, 32)
    if kind == Q5_K:
        q = q | (blocks[:, 16:48, None] >> np.arange(8, dtype=np.uint8) & 1).transpose(0, 2, 1) << 4
    return ((d[..., None] * s) * q - _half(blocks[:, 2:4])[..., None] * t).reshape(-1, 256)


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


@jit_inner
def _dequantise_some(worker, workers, blocks, kind, out):
    for b in share(worker, workers, len(blocks)):
        _block(blocks[b], kind, out[b])


@jit
def _dequantise_all(workers, blocks, kind, out):
    share_out(_dequantise_some, workers, (blocks, kind, out))


@dequantise_blocks.kernel
def _dequantise(blocks, kind):
    require(blocks.dtype == np.uint8 and blocks.shape[1:] == (BYTES[kind],), f"a block of {KINDS[kind]}", blocks)
    out = np.empty((len(blocks), WEIGHTS[KINDS[kind]]), np.float32)
    _dequantise_all(get_num_threads(), blocks, kind, out)
    return out


# ---- and into the formats that `linear` runs


def quantise_int8(x: F32) -> U8:
    """float32 [R, D] → int8 blocks [R, D/32, 34]: d = max |w| / 127 as float16, q = round(w / d)."""
    return quantise_blocks(x.reshape(-1, 32), 8).reshape(len(x), -1, 34)


def quantise_int4(x: F32) -> U8:
    """float32 [R, D] → int4 blocks [R, D/32, 18], Q4_0 with the best of sixteen scales, by least squares.

    Of the steps -8 d … 7 d the longer half goes to the side of the weight farthest from 0, which may be k = 5.25 … 9 of
    them. Each k gives whole numbers q; the d that suits them best is Σ u w q / Σ u q², and leaves an error of
    Σ u w² - (Σ u w q)² / Σ u q². What a weight counts is u = w² + mean w²: a large one is missed more than a small one.
    """
    return quantise_blocks(x.reshape(-1, 32), 4).reshape(len(x), -1, 18)


def quantise_int8_rows(x: F32) -> NDArray[np.int8]:
    """float32 [R, D] → int8 rows [R, 4 + D]: d = max |w| / 127 as float32, q = round(w / d).

    Of 2,304 normally distributed weights it misses 0.83 % of their size, int8 blocks 0.53 %.
    """
    d = np.abs(x).max(axis=1, keepdims=True) / np.float32(127)
    return np.concatenate([d.view(np.int8), _nearest(x, d, -127, 127).astype(np.int8)], axis=1)


def quantise_int4_rows(x: F32) -> U8:
    """float32 [R, D] → int4 rows [R, 1, 4 + D/2]: the best of a few scales for each row, by least squares.

    Of 2,304 normally distributed weights it misses 10.8 % of their size, int4 blocks 8.3 %; max |w| / 7, 15 %.
    """
    step = max(1, CLIPPED_TOGETHER // x.shape[1])
    return np.concatenate([_int4_rows(x[r : r + step]) for r in range(0, len(x), step)])


def _int4_rows(x: F32) -> U8:
    """The longer a row, the farther its largest weight lies from the others, so that it is worth clipping.

    Each of CLIPS gives whole numbers q. The scale that suits them best is d = Σ w q / Σ q²; what it misses,
    Σ (w - d q)², is Σ w² - (Σ w q)² / Σ q².
    """
    farthest = np.take_along_axis(x, np.abs(x).argmax(axis=1)[:, None], axis=1)
    x = np.divide(x, farthest, out=np.zeros_like(x), where=farthest != 0)  # so that no square of a small one vanishes
    d, q, most = np.zeros_like(farthest), np.zeros_like(x), np.zeros_like(farthest)
    for k in CLIPS:
        tried = _nearest(x, np.full_like(d, -1 / k), -8, 7)
        along, square = (np.einsum("rd,rd->r", tried, other)[:, None] for other in (x, tried))
        scale = np.divide(along, square, out=np.zeros_like(d), where=square > 0)
        better = along * scale > most
        d, q, most = np.where(better, scale, d), np.where(better, tried, q), np.where(better, along * scale, most)
    nibbles = (q + 8).astype(np.uint8).reshape(len(x), -1, 2, 16)
    packed = (nibbles[:, :, 0] | nibbles[:, :, 1] << 4).reshape(len(x), -1)
    return np.concatenate([(d * farthest).view(np.uint8), packed], axis=1)[:, None]


def to_int8(kind: str, blocks: NDArray) -> U8:
    """A tensor of a GGUF or safetensors type → int8 blocks [R, D/32, 34].

    Q4_0 and Q5_0 keep their scales and whole numbers, so that nothing is lost. The others have minima, or scales for
    fewer weights than 32: of the scales that int8 could have, each block gets the one that comes closest.
    """
    if kind not in KINDS:
        return quantise_int8(dequantise(kind, blocks))
    return int8_blocks(blocks.reshape(-1, blocks.shape[-1]), KINDS.index(kind)).reshape(*blocks.shape[:-2], -1, 34)


def _with_scale(d: F32, q: NDArray) -> U8:
    """A float16 scale and bytes side by side: [B, 1] float32 and [B, n] bytes → [B, 2 + n]."""
    return np.concatenate([d.astype(np.float16).view(np.uint8), q.view(np.uint8)], axis=-1)


def _nearest(x: F32, d: F32, low: int, high: int) -> F32:
    """Whole numbers q from low to high with d q nearest to x: x [R, D], d [R, 1] → [R, D]; 0 where d is 0."""
    q = np.rint(np.divide(x, d, out=np.zeros_like(x), where=d != 0))
    return np.clip(q, low, high)


def _with_scale_of(x: F32, d: F32) -> U8:
    """int8 blocks of x [B, 32] with the scales d [B, 1]."""
    stored = d.astype(np.float16).astype(np.float32)
    return _with_scale(d, _nearest(x, stored, -127, 127).astype(np.int8))


@definition
def quantise_blocks(x: F32, bits: int) -> U8:
    """int8 (bits = 8) or int4 blocks of 32 weights each      [Q8_0 and Q4_0]

    x [B, 32] float32 → [B, bytes] uint8, 34 or 18 bytes
    """
    if bits == 8:
        return _with_scale_of(x, np.abs(x).max(axis=-1, keepdims=True) / np.float32(127))
    farthest = np.take_along_axis(x, np.abs(x).argmax(axis=-1)[:, None], axis=-1)
    r = np.divide(x, farthest, out=np.zeros_like(x), where=farthest != 0)
    u, best, most = r * r + np.mean(r * r, axis=-1, keepdims=True), np.zeros_like(farthest), np.zeros_like(farthest)
    for k in SCALES:
        q = np.clip(np.rint(r * -k), -8, 7)
        along, square = ((u * q * other).sum(axis=-1, keepdims=True) for other in (r, q))
        scale = np.divide(along, square, out=np.zeros_like(best), where=square > 0)
        best, most = np.where(along * scale > most, scale, best), np.maximum(along * scale, most)
    d = best * farthest
    stored = d.astype(np.float16).astype(np.float32)
    q = np.divide(x, stored, out=np.zeros_like(x), where=stored != 0) + np.float32(8.5)
    nibbles = np.clip(q, 0, 15).astype(np.uint8)
    return _with_scale(d, nibbles[:, :16] | nibbles[:, 16:] << 4)


@definition
def int8_blocks(blocks: U8, kind: int) -> U8:
    """Blocks of any kind as int8 blocks, without loss where they have one scale and no minimum and fit.

    blocks [B, bytes] uint8 → [C, 34] uint8, C = B · weights / 32; `kind` is an index into KINDS
    """
    if kind == Q8_0:
        return blocks
    if kind in (Q4_0, Q5_0):
        q = _nibbles(blocks[:, -16:])
        q = q - np.uint8(8) if kind == Q4_0 else (q | _fifth_bits(blocks[:, 2:6])) - np.uint8(16)
        return np.concatenate([blocks[:, :2], q], axis=-1)
    x = dequantise_blocks(blocks, kind).reshape(-1, 32)
    largest = np.abs(x).max(axis=-1, keepdims=True)
    best, fewest = np.full_like(largest, 127), np.full_like(largest, np.inf)
    for k in STEPS:
        scaled = np.divide(x, largest, out=np.zeros_like(x), where=largest > 0) * k
        missed = ((scaled - np.rint(scaled)) ** 2).sum(axis=-1, keepdims=True) / (k * k)
        best, fewest = np.where(missed < fewest, k, best), np.minimum(missed, fewest)
    return _with_scale_of(x, (largest / best).astype(np.float32))


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
    """How many steps of the scale the largest weight should be, so that all lie closest to whole ones.

    x [32]: weights divided by the largest; steps [TRIED]: the numbers to try, the lanes of this search. Of two that
    come equally close the first counts, which is the larger.
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
    """The weights x[at : at + 32] as an int8 block of scale d in out[to : to + 34]; `whole` is `out`, as int8. NaN for
    a scale that is none, or too large for a float16: what runs with it shall not look as if all were well.
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
    """d of the whole numbers that come closest to r [32], weights divided by the one farthest from 0.

    `scales` are the numbers of steps to try and the lanes of this search, `room` [2 · 16] is for what each comes to.
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
    for j in range(16):
        low = x[j] / d + float32(8.5) if d != 0 else float32(8.5)
        high = x[j + 16] / d + float32(8.5) if d != 0 else float32(8.5)
        low, high = min(max(low, float32(0)), float32(15)), min(max(high, float32(0)), float32(15))
        out[2 + j] = np.uint8(low) | np.uint8(high) << 4


@jit_inner
def _quantise_some(worker, workers, x, bits, scales, out, whole):
    r, room = new_array(32, np.float32), new_array(2 * scales.size, np.float32)
    for b in share(worker, workers, x.size // 32):
        if bits == 8:
            _int8_block(x, 32 * b, _largest(x, 32 * b) / float32(127), out, whole, 34 * b)
        else:
            _int4_block(x[32 * b : 32 * b + 32], scales, r, room, out[18 * b : 18 * b + 18])


@jit
def _quantise_all(workers, x, bits, scales, out, whole):
    share_out(_quantise_some, workers, (x, bits, scales, out, whole))


@quantise_blocks.kernel
def _quantise(x, bits):
    require(x.ndim == 2 and x.shape[1] == 32, "quantise_blocks", x)
    out = np.empty((len(x), 34 if bits == 8 else 18), np.uint8)
    flat = out.reshape(-1)
    _quantise_all(get_num_threads(), np.ascontiguousarray(x).reshape(-1), bits, SCALES, flat, flat.view(np.int8))
    return out


@jit
def _int8_moved(blocks, five, out):
    """Q4_0 or Q5_0 blocks, [B · 18 or 22]: the same scales, and whole numbers that are only written otherwise."""
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
    room, divided = new_array(32, np.float32), new_array(32, np.float32)
    for b in range(len(blocks)):
        _block_of_32(blocks[b], kind, room)
        _search(room, steps, divided, out, whole, b * 34)


@jit
def _int8_of_256(blocks, kind, steps, out, whole):
    """The same of 256 weights, → [B · 8 · 34]."""  # apart, so that only what a file has is compiled
    room, divided = new_array(256, np.float32), new_array(32, np.float32)
    for b in range(len(blocks)):
        _block_of_256(blocks[b], kind, room)
        _search(room, steps, divided, out, whole, b * 8 * 34)


@int8_blocks.kernel
def _int8(blocks, kind):
    require(blocks.dtype == np.uint8 and blocks.shape[1:] == (BYTES[kind],), f"a block of {KINDS[kind]}", blocks)
    if kind == Q8_0:
        return blocks
    out = np.empty((len(blocks), WEIGHTS[KINDS[kind]] // 32, 34), np.uint8)

    def convert(first: int, last: int) -> None:
        if kind in (Q4_0, Q5_0):
            _int8_moved(blocks[first:last].reshape(-1), kind == Q5_0, out[first:last].reshape(-1))
        else:
            made, search = out[first:last].reshape(-1), _int8_of_32 if kind <= Q8_0 else _int8_of_256
            search(blocks[first:last], kind, STEPS, made, made.view(np.int8))

    # Threads of Python's own: a parallel kernel takes twice as long to compile, and this one stands at the start.
    workers = get_num_threads() if len(blocks) >= SHARED else 1
    edges = [len(blocks) * i // workers for i in range(workers + 1)]
    if workers == 1:
        convert(*edges)
    else:
        with ThreadPoolExecutor(workers) as pool:
            list(pool.map(convert, edges[:-1], edges[1:]))
    return out.reshape(-1, 34)
