"""GGUF's block formats: what their bytes mean, and the way from each to the layouts that run.

A block of 32 or 256 weights shares its scales. All numbers are little-endian; d, m are float16.

    Q4_0   d, 16 bytes of nibbles                    w = d (q - 8)     low nibbles: weights 0 … 15, high ones: 16 … 31
    Q4_1   d, m, nibbles                             w = d q + m
    Q5_0   d, 32 fifth bits, nibbles                 w = d (q - 16)
    Q5_1   d, m, 32 fifth bits, nibbles              w = d q + m
    Q8_0   d, 32 signed bytes                        w = d q
    Q4_K   d, m, 12 bytes of scales, 128 of nibbles  w = d s q - m t      8 sub-blocks of 32, each with 6-bit s and t
    Q5_K   d, m, 12 bytes of scales, 32 of fifth bits, 128 of nibbles     as Q4_K
    Q6_K   128 bytes of nibbles, 64 of two upper bits, 16 signed scales, d    w = d s (q - 32), 16 sub-blocks of 16
    Q2_K   16 bytes, s low and t high nibbles, 64 of crumbs, d, m    w = d s q - m t      16 sub-blocks of 16
    Q3_K   32 bytes of third bits, 64 of crumbs, 12 of scales, d     w = d (s - 32) (q - 4)     16 sub-blocks of 16
    TQ1_0  48 bytes of five trits, 4 of four, d      w = d (q - 1)     trit n of byte b is ⌊3 (3ⁿ b mod 256) / 256⌋
    TQ2_0  64 bytes of crumbs, d                     w = d (q - 1)
    IQ4_NL d, nibbles                                w = d c(q)        c: the sixteen values of CURVE
    IQ4_XS d, 16 upper bits and 4 bytes of low nibbles of scales, 128 of nibbles     w = d (s - 32) c(q), 8 × 32

Crumbs are two bits: in each 32 bytes, all lowest pairs stand for 32 weights, then all second pairs, and so on.
Q8_0 is the layout int8 and runs where the file is mapped. Q4_0, Q4_1 and Q4_K become int4, every other type int8.

(ggml's quants; see https://github.com/ggml-org/ggml/blob/master/docs/gguf.md for the file around them.)
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from ..arrays import F32, U8, widen_bf16
from ..definition import definition
from ..errors import ModelFormatError

KERNELS = ("Q4_0", "Q4_1", "Q5_0", "Q5_1", "Q8_0", "Q4_K", "Q5_K", "Q6_K")  # the kinds that have kernels
KINDS = (*KERNELS, "Q2_K", "Q3_K", "TQ1_0", "TQ2_0", "IQ4_NL", "IQ4_XS")
BYTES = (18, 20, 22, 24, 34, 144, 176, 210, 84, 110, 54, 66, 18, 136)  # of a block of each
WEIGHTS = {kind: 32 if size < 40 else 256 for kind, size in zip(KINDS, BYTES, strict=True)}
CURVE = np.array([-127, -104, -83, -65, -49, -35, -22, -10, 1, 13, 25, 38, 53, 69, 89, 113], np.int8)
TRIED = 16
STEPS = 127 - 2 * np.arange(TRIED, dtype=np.float32)  # of an int8's 127, how many a block's largest weight may take
Q4_0, Q4_1, Q5_0, Q5_1, Q8_0, Q4_K, Q5_K, Q6_K, Q2_K, Q3_K, TQ1_0, TQ2_0, IQ4_NL, IQ4_XS = range(14)
ONE_SCALE = (Q4_0, Q5_0, TQ1_0, TQ2_0, IQ4_NL)  # and no minimum, and integers that fit into int8
SCALES = np.arange(9, 5, -0.25, dtype=np.float32)  # steps that the largest weight of a block may take, of Q4_0's 8
RANGES = np.arange(16, 10.4, -0.35, dtype=np.float32)  # steps from the smallest to the largest weight, of Q4_1's 15
REFITS = 4  # of Q4_1's line: normal weights lose 0.49 % of their square instead of 0.52 %
TOO_LARGE = 65_520.0  # what is rounded to infinity in float16
SHARED = 1 << 18  # blocks of one tensor that several threads convert; smaller ones are converted side by side


def dequantize(kind: str, blocks: NDArray) -> F32:
    """The weights of a tensor of a GGUF or safetensors type, float32, in the shape that they have.

    Raises ModelFormatError for a type that is not in the table above and not F32, F16 or BF16.
    """
    if kind == "F32":
        return blocks
    if kind == "BF16":
        return widen_bf16(blocks)
    if kind == "F16":
        return blocks.astype(np.float32)
    if kind not in KINDS:
        known = "F32, F16, BF16, " + ", ".join(KINDS)
        raise ModelFormatError("tensor", f"is of type {kind}, which has no reader here", f"take a file of {known}")
    wide = dequantize_blocks(blocks.reshape(-1, blocks.shape[-1]), KINDS.index(kind))
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


def _shifted(packed: U8, *shifts: int) -> NDArray:
    """Each byte shifted right by each of the shifts: [B, n, 32] → [B, n, shifts, 32]."""
    return packed[..., None, :] >> np.array(shifts, np.uint8)[:, None]


def _crumbs(packed: U8) -> NDArray:
    """Two-bit numbers, four of a byte: [B, 64] → [B, 16, 16]."""
    return (_shifted(packed.reshape(-1, 2, 32), 0, 2, 4, 6) & 3).reshape(-1, 16, 16)


def _trits(packed: U8, count: int) -> NDArray:
    """Numbers to the base of three, `count` of a byte, the highest first: [B, n] → [B, count · n], from 0 to 2."""
    powers = (packed[:, None] * np.array([1, 3, 9, 27, 81], np.uint8)[:count, None]).reshape(len(packed), -1)
    return (powers.astype(np.uint16) * 3 >> 8).astype(np.uint8)


def _sub_scales(packed: U8) -> tuple[NDArray, NDArray]:
    """The eight 6-bit scales and minima in the 12 bytes of Q4_K and Q5_K: [blocks, 12] → two of [blocks, 8, 1]."""
    a, b, c = packed[:, :4], packed[:, 4:8], packed[:, 8:]
    s = np.concatenate([a & 63, (c & 15) | (a >> 6 << 4)], axis=-1)
    t = np.concatenate([b & 63, (c >> 4) | (b >> 6 << 4)], axis=-1)
    return s[..., None], t[..., None]


@definition
def dequantize_blocks(blocks: U8, kind: int) -> F32:
    """Each block's weights      [the table above]

    blocks [B, bytes] uint8 → [B, weights] float32; `kind` is an index into KINDS
    """
    if kind in ONE_SCALE:
        return _half(blocks[:, _scale_of(kind)]) * _integers(blocks, kind)
    if kind >= len(KERNELS):
        return _without_kernel(blocks, kind)
    d = _half(blocks[:, :2])
    if kind == Q4_1:
        return d * _nibbles(blocks[:, 4:]) + _half(blocks[:, 2:4])
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


def _without_kernel(blocks: U8, kind: int) -> F32:
    """The weights of Q2_K, Q3_K and IQ4_XS, whose definition also runs while loading: 1.4 to 1.9 s of 270 million."""
    if kind == Q2_K:
        d, m = _half(blocks[:, 80:82]) * (blocks[:, :16] & 15), _half(blocks[:, 82:]) * (blocks[:, :16] >> 4)
        return (d[..., None] * _crumbs(blocks[:, 16:80]) - m[..., None]).reshape(-1, 256)
    if kind == Q3_K:
        third = (_shifted(blocks[:, None, :32], *range(8)) & 1).reshape(-1, 16, 16)
        q = (_crumbs(blocks[:, 32:96]) | third << 2).astype(np.float32) - 4
        s = _nibbles(blocks[:, 96:104]) | (_shifted(blocks[:, 104:108], 0, 2, 4, 6) & 3).reshape(-1, 16) << 4
        return ((_half(blocks[:, 108:]) * (s.astype(np.float32) - 32))[..., None] * q).reshape(-1, 256)
    d = _half(blocks[:, :2])
    low = np.stack([blocks[:, 4:8] & 15, blocks[:, 4:8] >> 4], axis=-1).reshape(-1, 8)
    s = low | (_shifted(blocks[:, 2:4].reshape(-1, 2, 1), 0, 2, 4, 6) & 3).reshape(-1, 8) << 4
    q = CURVE[_nibbles(blocks[:, 8:].reshape(-1, 8, 16))]
    return ((d * (s.astype(np.float32) - 32))[..., None] * q).reshape(-1, 256)


def _scale_of(kind: int) -> slice:
    """Where the scale of a block of ONE_SCALE stands: before the numbers, or in TQ behind them."""
    return slice(-2, None) if kind in (TQ1_0, TQ2_0) else slice(0, 2)


def _integers(blocks: U8, kind: int) -> NDArray[np.int8]:
    """The numbers that the scale of a block of ONE_SCALE multiplies: [B, bytes] → [B, weights]."""
    if kind == IQ4_NL:
        return CURVE[_nibbles(blocks[:, 2:])]
    if kind in (Q4_0, Q5_0):
        q = _nibbles(blocks[:, -16:])
        return (q - np.uint8(8) if kind == Q4_0 else (q | _fifth_bits(blocks[:, 2:6])) - np.uint8(16)).view(np.int8)
    trits = (_trits(blocks[:, :32], 5), _trits(blocks[:, 32:48], 5), _trits(blocks[:, 48:52], 4))
    q = np.concatenate(trits, axis=-1) if kind == TQ1_0 else _crumbs(blocks[:, :64]).reshape(-1, 256)
    return (q - np.uint8(1)).view(np.int8)


# ---- and into the layouts that run


def to_int8(kind: str, blocks: NDArray) -> U8:
    """A tensor of a GGUF or safetensors type → int8 blocks [R, D/32, 34].

    The types of ONE_SCALE keep their scales and integers, so that nothing is lost. The others have minima, or scales of
    more digits or for fewer weights: of the scales that int8 could have, each block gets the one that comes closest.
    """
    if kind not in KINDS:
        wide = dequantize(kind, blocks)
        return quantize_blocks(wide.reshape(-1, 32), Q8_0).reshape(len(wide), -1, 34)
    return int8_blocks(blocks.reshape(-1, blocks.shape[-1]), KINDS.index(kind)).reshape(*blocks.shape[:-2], -1, 34)


def _with_scale(d: F32, q: NDArray) -> U8:
    """A float16 scale and bytes side by side: [B, 1] float32 and [B, n] bytes → [B, 2 + n]."""
    return np.concatenate([d.astype(np.float16).view(np.uint8), q.view(np.uint8)], axis=-1)


def nearest(x: F32, d: F32, low: int, high: int) -> F32:
    """Integers q from low to high with d q nearest to x: x [R, D], d [R, 1] → [R, D]; 0 where d is 0."""
    q = np.rint(np.divide(x, d, out=np.zeros_like(x), where=d != 0))
    return np.clip(q, low, high)


def _with_scale_of(x: F32, d: F32) -> U8:
    """int8 blocks of x [B, 32] with the scales d [B, 1]."""
    stored = d.astype(np.float16).astype(np.float32)
    return _with_scale(d, nearest(x, stored, -127, 127).astype(np.int8))


@definition
def quantize_blocks(x: F32, kind: int) -> U8:
    """Blocks of 32 weights each      [Q8_0, Q4_0 or Q4_1]

    Q8_0: d = max |w| / 127 as float16, q = round(w / d). Q4_0: the best of sixteen scales, by least squares. Of the
    steps -8 d … 7 d the longer half goes to the side of the weight farthest from 0, which may be k = 5.25 … 9 of them.
    Each k gives integers q; the best d for them is Σ u w q / Σ u q², which leaves an error of
    Σ u w² - (Σ u w q)² / Σ u q². A weight counts u = w² + mean w²: an error in a large one matters more.

    Q4_1: the best of sixteen ranges, by least squares: from the smallest to the largest weight there are k = 10.75 … 16
    steps. Each k gives integers p, centered: q - 7.5. The line d p + c through the weights has d = cov(w, p) / var p
    and leaves an error of 32 (var w - cov(w, p)² / var p). Starting with the best one, the weights are rounded to the
    line and the line is fitted to the integers again, REFITS times: neither step can raise the error.

    x [B, 32] float32 → [B, bytes] uint8, 34, 18 or 20 bytes
    """
    if kind == Q8_0:
        return _with_scale_of(x, np.abs(x).max(axis=-1, keepdims=True) / np.float32(127))
    if kind == Q4_1:
        return _with_minimum(x)
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


def _line(r: F32, mean: F32, q: F32) -> tuple[F32, F32, F32]:
    """The slope and center of the line through r at the integers q, and what it takes off the squared error."""
    p = np.clip(q, 0, 15) - np.float32(7.5)
    average = p.mean(axis=-1, keepdims=True)
    along, square = ((each * (p - average)).sum(axis=-1, keepdims=True) for each in (r, p))
    slope = np.divide(along, square, out=np.zeros_like(mean), where=square > 0)
    return slope, mean - slope * average, along * slope


def _with_minimum(x: F32) -> U8:
    """Q4_1 of `quantize_blocks`."""
    low, high = x.min(axis=-1, keepdims=True), x.max(axis=-1, keepdims=True)
    middle, half = (low + high) / 2, (high - low) / 2
    r = np.divide(x - middle, half, out=np.zeros_like(x), where=half > 0)  # from -1 to 1
    mean, d, most = r.mean(axis=-1, keepdims=True), np.zeros_like(half), np.zeros_like(half)
    center = mean
    for k in RANGES:
        slope, at, gain = _line(r, mean, np.rint(r * (k / 2) + np.float32(7.5)))
        better = gain > most
        d, center, most = np.where(better, slope, d), np.where(better, at, center), np.where(better, gain, most)
    for _ in range(REFITS):
        q = np.rint(np.divide(r - center, d, out=np.zeros_like(r), where=d > 0) + np.float32(7.5))
        d, center, _ = _line(r, mean, q)
    d, m = half * d, half * (center - np.float32(7.5) * d) + middle
    scale, lowest = (each.astype(np.float16) for each in (d, m))
    stored, above = scale.astype(np.float32), x - lowest.astype(np.float32)
    q = np.divide(above, stored, out=np.zeros_like(x), where=stored != 0) + np.float32(0.5)
    q = np.clip(q, 0, 15).astype(np.uint8)
    return np.concatenate([scale.view(np.uint8), lowest.view(np.uint8), q[:, :16] | q[:, 16:] << 4], axis=-1)


def q4_1_blocks(blocks: U8) -> U8:
    """Q4_K blocks as Q4_1: [B, 144] → [8 B, 20]. Scales and minima are rounded to float16, integers stay."""
    s, t = _sub_scales(blocks[:, 4:16])
    d, m = _half(blocks[:, :2])[..., None] * s, _half(blocks[:, 2:4])[..., None] * -t.astype(np.float32)
    q = _nibbles(blocks[:, -128:].reshape(-1, 4, 32)).reshape(-1, 8, 32)
    halves = [each.astype(np.float16).view(np.uint8) for each in (d, m)]
    return np.concatenate([*halves, q[..., :16] | q[..., 16:] << 4], axis=-1).reshape(-1, 20)


@definition
def int8_blocks(blocks: U8, kind: int) -> U8:
    """Blocks of any kind as int8 blocks, without loss where they have one scale and no minimum and fit.

    blocks [B, bytes] uint8 → [C, 34] uint8, C = B · weights / 32; `kind` is an index into KINDS
    """
    if kind == Q8_0:
        return blocks
    if kind in ONE_SCALE:
        d = np.repeat(blocks[:, _scale_of(kind)], WEIGHTS[KINDS[kind]] // 32, axis=0)
        return np.concatenate([d, _integers(blocks, kind).reshape(-1, 32).view(np.uint8)], axis=-1)
    x = dequantize_blocks(blocks, kind).reshape(-1, 32)
    largest = np.abs(x).max(axis=-1, keepdims=True)
    best, fewest = np.full_like(largest, 127), np.full_like(largest, np.inf)
    for k in STEPS:
        scaled = np.divide(x, largest, out=np.zeros_like(x), where=largest > 0) * k
        missed = ((scaled - np.rint(scaled)) ** 2).sum(axis=-1, keepdims=True) / (k * k)
        best, fewest = np.where(missed < fewest, k, best), np.minimum(missed, fewest)
    return _with_scale_of(x, (largest / best).astype(np.float32))
