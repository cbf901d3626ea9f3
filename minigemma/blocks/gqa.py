"""Grouped-query attention: the attention block of every Gemma (Ainslie et al. 2023; Gemma 2 §2; Gemma 3 §2).

h       = RMSNorm(x)
q, k, v = W_q h, W_k h, W_v h            N query heads share K key/value heads
q, k    = RMSNorm(q), RMSNorm(k)         Gemma 3 only, each head by itself: "QK-norm" in place of soft-caps
q, k    = rope(q), rope(k)               the cache keeps rotated keys
y       = x + RMSNorm(W_o · attention(q, k, v))      the norm behind W_o ("post-norm"): Gemma 2 and 3
"""

from __future__ import annotations

from dataclasses import dataclass

from ..arrays import F32
from ..cache import KeyValueRing, TokenPositions
from ..config import AttentionConfig
from ..formulas.attention import Mask, attention, attention_probs, attention_scores, weighted_values
from ..formulas.linear import affine, linear, linears
from ..formulas.rmsnorm import rms_norm
from ..formulas.rope import rope
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
    x: F32, w: AttentionWeights, config: AttentionConfig, ring: KeyValueRing, tokens: TokenPositions, taps: Scope
) -> F32:
    """y = x + norm(W_o attention(q, k, v)), with q, k and v made of norm(x)      [Gemma 1 §2; Gemma 2 §2; Gemma 3 §2]

    x [T, D] float32, the residual of `tokens` → [T, D] float32, or the last `tokens.outputs` rows of it

    `ring` takes in their keys and values; nothing else is changed.
    """
    h = rms_norm(x, w.pre_norm, config.eps)
    if tokens.outputs == len(x):
        q, k, v = linears(h, w.q, w.k, w.v)
    else:  # the last layer of a prompt: keys and values of all tokens, queries of the last
        q, (k, v) = linear(tokens.last(h), w.q), linears(h, w.k, w.v)
    q, k, v = (y.reshape(len(y), -1, config.head_dim) for y in (q, k, v))
    if w.q_norm is not None and w.k_norm is not None:
        q, k = rms_norm(q, w.q_norm, config.eps), rms_norm(k, w.k_norm, config.eps)
    q, k = taps("attention.q_before_rope", q), taps("attention.k_before_rope", k)
    positions, rotation = tokens.last(tokens.positions), (config.rope_base, config.rope_scale, config.rotated)
    q, k = taps("attention.q", rope(q, positions, *rotation)), taps("attention.k", rope(k, tokens.positions, *rotation))
    v = taps("attention.v", v)
    keys, values, key_positions = ring.extend(k, v, tokens.first)
    mask = Mask(positions, tokens.last(tokens.last_visible), key_positions, config.window)
    if taps.wants("attention.scores") or taps.wants("attention.probs"):  # values that the kernel never forms
        scores = taps("attention.scores", attention_scores(q, keys, config.query_scale, config.soft_cap))
        heads = weighted_values(taps("attention.probs", attention_probs(scores, *mask)), values)
    else:
        heads = attention(q, keys, values, mask, config.query_scale, config.soft_cap)
    heads = taps("attention.heads", heads)
    y = taps("attention.out", affine(heads.reshape(len(heads), -1), w.o, w.o_bias))
    y = y if w.post_norm is None else rms_norm(y, w.post_norm, config.eps)
    return taps("residual.middle", tokens.last(x) + y)
