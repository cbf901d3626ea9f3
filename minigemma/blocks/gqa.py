"""Grouped-query attention: the attention block of every Gemma (Ainslie et al. 2023; Gemma 2 §2; Gemma 3 §2).

q, k, v = W_q x, W_k x, W_v x            N query heads share K key/value heads
q, k    = RMSNorm(q), RMSNorm(k)         Gemma 3 only, each head by itself: "QK-norm" in place of soft-caps
q, k    = rope(q), rope(k)               and the turned keys are what the cache keeps
y       = W_o · attention(q, k, v)
"""

from __future__ import annotations

from dataclasses import dataclass

from ..arrays import F32
from ..cache import KeyValueRing, TokenPositions
from ..config import AttentionConfig
from ..formulas.attention import Mask, attention, attention_probs, attention_scores
from ..formulas.linear import affine, linear, linears
from ..formulas.rmsnorm import rms_norm
from ..formulas.rope import rope
from ..layouts.weight import Weight
from ..taps import Scope


@dataclass(frozen=True)
class AttentionWeights:
    """The matrices of one layer's attention."""

    q: Weight  # [N · H, D]
    k: Weight  # [K · H, D]
    v: Weight  # [K · H, D]
    o: Weight  # [D, N · H]
    q_norm: F32 | None = None  # [H]
    k_norm: F32 | None = None  # [H]
    o_bias: F32 | None = None  # [D], RecurrentGemma's


def grouped_query_attention(
    x: F32,
    w: AttentionWeights,
    config: AttentionConfig,
    head_dim: int,
    eps: float,
    ring: KeyValueRing,
    places: TokenPositions,
    taps: Scope,
) -> F32:
    """The attention of one layer: x [T, D], tokens that stand at `places`, → [T, D] float32, or fewer rows where only
    the last ones are asked for.

    `ring` is extended by their keys and values, and by nothing else changed.
    """
    positions, asking = places.positions, places.asked(places.positions)
    if len(asking) == len(x):
        q, k, v = linears(x, w.q, w.k, w.v)
    else:
        q, (k, v) = linear(places.asked(x), w.q), linears(x, w.k, w.v)
    q, k, v = (y.reshape(len(y), -1, head_dim) for y in (q, k, v))
    if w.q_norm is not None and w.k_norm is not None:
        q, k = rms_norm(q, w.q_norm, eps), rms_norm(k, w.k_norm, eps)
    rotated = int(head_dim * config.rope_fraction)
    q, k = taps("attention.q_before_rope", q), taps("attention.k_before_rope", k)
    q = taps("attention.q", rope(q, asking, config.rope_base, config.rope_scale, rotated))
    k = taps("attention.k", rope(k, positions, config.rope_base, config.rope_scale, rotated))
    v = taps("attention.v", v)
    keys, values, key_positions = ring.extend(k, v, places.first)
    mask = Mask(asking, places.asked(places.until), key_positions, config.window)
    if taps.wants("attention.scores") or taps.wants("attention.probs"):
        scores = taps("attention.scores", attention_scores(q, keys, config.query_scale, config.soft_cap))
        taps("attention.probs", attention_probs(scores, *mask))
    mixed = attention(q, keys, values, mask, config.query_scale, config.soft_cap)
    return taps("attention.out", affine(mixed.reshape(len(mixed), -1), w.o, w.o_bias))
