"""Attention: every query reads a weighted mean of the values whose keys it sees (Vaswani et al. 2017, §3.2).

    score[n, t, s] = cap( q[t, n] · k[s, n // G] · scale )          scale: query_pre_attn_scalar^-1/2; cap: softcap.py
    seen[t, s]     = position_s ≤ last_visible_t and position_t - position_s < window
    probs[n, t, :] = softmax over seen keys of score[n, t, :]
    out[t, n]      = Σ_s probs[n, t, s] · v[s, n // G]

Grouped queries (Ainslie et al. 2023): G = N / K neighboring query heads share a key/value head; G = 1 is multi-head
attention, K = 1 multi-query attention.

Text is causal: last_visible_t is position_t. The tokens of an image see all of their image: last_visible_t is the
position of its last token. In the image encoder every patch sees all patches. Local layers have a window, global layers
have none.

Keys may lie in any order: each has its absolute position, and `visible` alone decides. Keys and values are float32, or
bf16 as uint16.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

from ..arrays import F32, I32, U16, Bool, widen_bf16
from ..definition import definition, require
from ..kernels.attention_backward import WIDTH, attention_backward
from ..kernels.attention_decode import attention_decode, is_decode
from ..kernels.attention_prefill import BLOCK, attention_prefill
from ..kernels.parallel import workers
from ..kernels.scores import EVERYTHING, Keys, Queries, Scoring
from ..kernels.simd.cpu import LANES
from .softcap import soft_cap


class Mask(NamedTuple):
    """Which keys each query sees: the arguments of `visible`."""

    query_positions: I32  # [T]
    last_visible: I32  # [T], the last position that each query may see
    key_positions: I32  # [S]
    window: int | None  # keys that a query sees, its own included; None: all before it


def visible(query: I32, last_visible: I32, key: I32, window: int | None) -> Bool:
    """May the token at position `query` see the token at position `key`?

        key ≤ last_visible and query - key < window          [Gemma 2 §2 "Local sliding window", Gemma 3 §2]

    query, last_visible [T] int32, key [S] int32 → [T, S] bool. Without a window (None) every earlier key is visible. A
    key exactly `window` back is not; RecurrentGemma's code shows one key more, so its window here is its W + 1.
    """
    seen = key <= last_visible[:, None]
    return seen if window is None else seen & (query[:, None] - key[None, :] < window)


def softmax(x: F32) -> F32:
    """exp(x) / Σ exp(x) over the last axis; the maximum is subtracted first, so that nothing overflows."""
    e = np.exp(x - x.max(axis=-1, keepdims=True))
    return e / e.sum(axis=-1, keepdims=True)


def attention_scores(q: F32, k: F32 | U16, scale: float, cap: float | None) -> F32:
    """cap(q · k · scale), before the mask      [Vaswani et al. 2017 eq. 1; Gemma 2 §2]

    q [T, N, H] float32, k [S, K, H] float32 or bf16 → [N, T, S] float32
    """
    (T, N, H), (S, K, _) = q.shape, k.shape
    grouped = q.reshape(T, K, N // K, H)
    scores = np.einsum("TKGH,SKH->KGTS", grouped, widen_bf16(k), optimize=True).reshape(N, T, S) * np.float32(scale)
    return scores if cap is None else soft_cap(scores, cap)


def attention_probs(scores: F32, query: I32, last_visible: I32, key: I32, window: int | None) -> F32:
    """Softmax of the scores of the keys that each query sees: scores [N, T, S] → [N, T, S] float32."""
    seen = visible(query, last_visible, key, window)
    return softmax(np.where(seen, scores, np.float32(-np.inf)))


def weighted_values(probs: F32, v: F32 | U16) -> F32:
    """Σ_s probs[n, t, s] · v[s, n // G] for each t and n: probs [N, T, S], v [S, K, H] → [T, N, H] float32."""
    (N, T, S), (_, K, H) = probs.shape, v.shape
    grouped = probs.reshape(K, N // K, T, S)
    out = np.einsum("KGTS,SKH->TKGH", grouped, widen_bf16(v), optimize=True)
    return np.ascontiguousarray(out.reshape(T, N, H))


@definition
def attention(q: F32, k: F32 | U16, v: F32 | U16, mask: Mask, scale: float, cap: float | None) -> F32:
    """softmax(cap(q kᵀ · scale) where visible) v      [Vaswani et al. 2017 eq. 1]

    q [T, N, H] float32, k [S, K, H] and v [S, K, H] float32 or bf16, mask: query_positions [T], last_visible [T] and
    key_positions [S] int32 → [T, N, H] float32
    """
    out, G = np.empty_like(q), q.shape[1] // k.shape[1]
    for i in range(k.shape[1]):  # one key head at a time: the scores of all take 1 GB for an image of 4,096 patches
        group = slice(i * G, (i + 1) * G)
        scores = attention_scores(q[:, group], k[:, i : i + 1], scale, cap)
        out[:, group] = weighted_values(attention_probs(scores, *mask), v[:, i : i + 1])
    return out


@attention.gradient
def attention_gradient(
    dy: F32, q: F32, k: F32 | U16, v: F32 | U16, mask: Mask, scale: float, cap: float | None
) -> tuple[F32, F32, F32]:
    """dv = Pᵀ dy and, with dP = dy vᵀ, dscore = P · (dP - Σ_s P · dP) · (1 - (score / cap)²) · scale: dq = dscore k,
    dk = dscoreᵀ q, summed over the query heads of a group

    dy, q [T, N, H] float32, k, v [S, K, H] float32 or bf16 → dq [T, N, H], dk [S, K, H], dv [S, K, H] float32
    """
    dq, G = np.empty_like(q), q.shape[1] // k.shape[1]
    dk, dv = np.empty(k.shape, q.dtype), np.empty(v.shape, q.dtype)
    for i in range(k.shape[1]):
        group = slice(i * G, (i + 1) * G)
        scores = attention_scores(q[:, group], k[:, i : i + 1], scale, cap)
        probs = attention_probs(scores, *mask)
        dprobs = np.einsum("TGH,SH->GTS", dy[:, group], widen_bf16(v[:, i]), optimize=True)
        dscores = probs * (dprobs - (probs * dprobs).sum(axis=-1, keepdims=True)) * np.float32(scale)
        if cap is not None:
            dscores = dscores * (1 - (scores / np.float32(cap)) ** 2)
        dv[:, i] = np.einsum("GTS,TGH->SH", probs, dy[:, group], optimize=True)
        dq[:, group] = np.einsum("GTS,SH->TGH", dscores, widen_bf16(k[:, i]), optimize=True)
        dk[:, i] = np.einsum("GTS,TGH->SH", dscores, q[:, group], optimize=True)
    return dq, dk, dv


@attention.kernel
def _attention(q, k, v, mask, scale, cap):
    (T, N, H), K = _sizes(q, k, v, mask), k.shape[1]
    attend = attention_decode if is_decode(T, len(k) - T) and H % (2 * LANES) == 0 else attention_prefill
    out = np.empty((T, K, N // K, H), np.float32)
    attend(workers(), *_arguments(q, k, v, mask, scale, cap), out)
    return out.reshape(q.shape)


@attention_gradient.kernel
def _attention_gradient(dy, q, k, v, mask, scale, cap):
    (T, N, H), (S, K, _) = _sizes(q, k, v, mask), k.shape
    require(dy.shape == q.shape, "attention_gradient", dy, q)
    slots, lanes = -(-S // BLOCK) * BLOCK, -(-H // WIDTH) * WIDTH  # whole tiles
    grouped, count = np.ascontiguousarray(dy).reshape(T, K, N // K, H), workers()
    dq, parts = np.empty_like(grouped), np.zeros((count, 2, K, slots * lanes), np.float32)
    attention_backward(count, grouped, *_arguments(q, k, v, mask, scale, cap), dq, parts)
    dk, dv = parts.sum(axis=0).reshape(2, K, slots, lanes)[:, :, :S, :H].swapaxes(1, 2)
    return dq.reshape(q.shape), np.ascontiguousarray(dk), np.ascontiguousarray(dv)


def _sizes(q, k, v, mask):
    """T, N and H; ValueError where shapes do not fit."""
    query_positions, last_visible, key_positions, _ = mask
    fits = q.ndim == 3 and k.ndim == 3 and k.shape == v.shape and k.shape[2] == q.shape[2] and len(k) > 0
    fits = fits and q.shape[1] % k.shape[1] == 0 and key_positions.shape == k.shape[:1]
    fits = fits and query_positions.shape == last_visible.shape == q.shape[:1]
    require(fits, "attention", q, k, v, query_positions, last_visible, key_positions)
    return q.shape


def _arguments(q, k, v, mask, scale, cap):
    """The same as kernels take them."""
    (T, N, H), K = q.shape, k.shape[1]
    queries = Queries(np.ascontiguousarray(q).reshape(T, K, N // K, H), mask.query_positions, mask.last_visible)
    scoring = Scoring(np.float32(mask.window or EVERYTHING), np.float32(scale), np.float32(cap or 0))
    return queries, Keys(k, v, mask.key_positions), scoring
