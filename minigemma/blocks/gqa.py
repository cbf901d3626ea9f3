"""Grouped-query attention: the attention block of every Gemma (Ainslie et al. 2023; Gemma 2 §2; Gemma 3 §2).

h       = RMSNorm(x)
q, k, v = W_q h, W_k h, W_v h            N query heads share K key/value heads
q, k    = RMSNorm(q), RMSNorm(k)         Gemma 3 only, each head by itself: "QK-norm" in place of soft-caps
q, k    = rope(q), rope(k)               the cache keeps rotated keys
y       = x + RMSNorm(W_o · attention(q, k, v))      the norm behind W_o ("post-norm"): Gemma 2 and 3
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from ..arrays import F32, I32, joined
from ..cache import KeyValueRing, Rings, TokenPositions, each_sequence
from ..config import AttentionConfig
from ..formulas.attention import Mask, attention, attention_gradient, attention_probs, attention_scores, weighted_values
from ..formulas.linear import Gradients, add, affine, linear, linear_backward, linears
from ..formulas.rmsnorm import rms_norm, rms_norm_gradient
from ..formulas.rope import rope, rope_gradient
from ..layouts.weight import Weight
from ..taps import Scope


@dataclass(frozen=True, eq=False, kw_only=True)
class AttentionWeights:
    """The weights of one attention block."""

    pre_norm: F32  # [D]
    q: Weight  # [N · H, D]
    k: Weight  # [K · H, D]
    v: Weight  # [K · H, D]
    o: Weight  # [D, N · H]
    q_norm: F32 | None = None  # [H], Gemma 3's
    k_norm: F32 | None = None  # [H]
    o_bias: F32 | None = None  # [D], RecurrentGemma's
    post_norm: F32 | None = None  # [D], Gemma 2's and 3's


def attention_block(
    x: F32, w: AttentionWeights, config: AttentionConfig, ring: Rings, tokens: TokenPositions, taps: Scope
) -> F32:
    """y = x + norm(W_o attention(q, k, v)), with q, k and v made of norm(x)      [Gemma 1 §2; Gemma 2 §2; Gemma 3 §2]

    x [T, D] float32, the residual of `tokens` → [T, D] float32, or the last `tokens.outputs` rows of it

    `ring` takes in their keys and values; nothing else is changed. With a tuple of rings, token t is the next one of
    the sequence of ring t.
    """
    h = rms_norm(x, w.pre_norm, config.eps)
    if tokens.outputs == len(x):
        q, k, v = linears(h, w.q, w.k, w.v)
    else:  # the last layer of a prompt: keys and values of all tokens, queries of the last
        q, (k, v) = linear(tokens.last(h), w.q), linears(h, w.k, w.v)
    q, k, v = (y.reshape(len(y), -1, config.head_dim) for y in (q, k, v))
    q, k, v = taps("attention.q_projected", q), taps("attention.k_projected", k), taps("attention.v", v)
    if w.q_norm is not None and w.k_norm is not None:
        q, k = rms_norm(q, w.q_norm, config.eps), rms_norm(k, w.k_norm, config.eps)
    q, k = taps("attention.q_before_rope", q), taps("attention.k_before_rope", k)
    positions, rotation = tokens.last(tokens.positions), (config.rope_base, config.rope_scale, config.rotated)
    q, k = taps("attention.q", rope(q, positions, *rotation)), taps("attention.k", rope(k, tokens.positions, *rotation))
    each = each_sequence(ring, tokens)
    heads = joined([attend(q[at], k[at], v[at], config, own, its, taps) for at, own, its in each])
    heads = taps("attention.heads", heads)
    y = taps("attention.out", affine(heads.reshape(len(heads), -1), w.o, w.o_bias))
    y = y if w.post_norm is None else rms_norm(y, w.post_norm, config.eps)
    return taps("residual.middle", tokens.last(x) + y)


def attend(
    q: F32, k: F32, v: F32, config: AttentionConfig, ring: KeyValueRing, tokens: TokenPositions, taps: Scope
) -> F32:
    """Attention of one sequence to the ring's keys and values and its own: q [T, N, H], k, v [T, K, H] → [T, N, H]."""
    keys, values, key_positions = ring.extend(k, v, tokens.first)
    mask = mask_of(tokens, key_positions, config)
    if taps.wants("attention.scores") or taps.wants("attention.probs"):  # values that the kernel never forms
        scores = taps("attention.scores", attention_scores(q, keys, config.query_scale, config.soft_cap))
        return weighted_values(taps("attention.probs", attention_probs(scores, *mask)), values)
    return attention(q, keys, values, mask, config.query_scale, config.soft_cap)


def mask_of(tokens: TokenPositions, keys: I32, config: AttentionConfig) -> Mask:
    """What the last `tokens.outputs` tokens see of keys at these positions."""
    return Mask(tokens.last(tokens.positions), tokens.last(tokens.last_visible), keys, config.window)


def attention_backward(
    dy: F32,
    x: F32,
    w: AttentionWeights,
    config: AttentionConfig,
    tokens: TokenPositions,
    kept: Scope,
    gradients: Gradients,
) -> F32:
    """dx from dy = ∂L/∂y, line by line back through `attention_block`: dy, x [T, D] float32 → [T, D] float32

    `kept` has what the block named for whole sequences; gradients of the weights are added to `gradients`.
    """
    d, eps = dy, config.eps
    if w.post_norm is not None:
        d, dnorm = rms_norm_gradient(d, kept["attention.out"], w.post_norm, eps)
        add(gradients, "attention.post_norm", dnorm)
    if w.o_bias is not None:
        add(gradients, "attention.o_bias", d.sum(axis=0))
    q, k, v, heads = (kept[f"attention.{name}"] for name in ("q", "k", "v", "heads"))
    d = linear_backward(d, heads.reshape(len(d), -1), w.o, gradients, "attention.o").reshape(heads.shape)
    parts = [
        attention_gradient(
            d[at], q[at], k[at], v[at], mask_of(each, each.positions, config), config.query_scale, config.soft_cap
        )
        for at, each in tokens.sequences
    ]
    dq, dk, dv = (joined(each) for each in zip(*parts, strict=True))
    rotation = tokens.positions, config.rope_base, config.rope_scale, config.rotated
    dq, dk = rope_gradient(dq, q, *rotation), rope_gradient(dk, k, *rotation)
    if w.q_norm is not None and w.k_norm is not None:
        dq, dq_norm = rms_norm_gradient(dq, kept["attention.q_projected"], w.q_norm, eps)
        dk, dk_norm = rms_norm_gradient(dk, kept["attention.k_projected"], w.k_norm, eps)
        add(gradients, "attention.q_norm", dq_norm)
        add(gradients, "attention.k_norm", dk_norm)
    h, dh = rms_norm(x, w.pre_norm, eps), np.zeros_like(x)
    for name, weight, d in (("q", w.q, dq), ("k", w.k, dk), ("v", w.v, dv)):
        dh += linear_backward(d.reshape(len(d), -1), h, weight, gradients, f"attention.{name}")
    dx, dnorm = rms_norm_gradient(dh, x, w.pre_norm, eps)
    add(gradients, "attention.pre_norm", dnorm)
    return dy + dx
