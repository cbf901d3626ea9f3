"""Gemma 2 (Gemma Team 2024b, "Gemma 2: Improving Open Language Models at a Practical Size", §2).

    h = x + norm(attention(norm(x)))         local (the last 4,096 tokens) and global in turn, scores capped at 50
    y = h + norm(feed_forward(norm(h)))

New since Gemma 1: a norm after each branch as well as before it, local layers, soft-caps on scores and logits, and
two query heads to a key/value head in every size. The numbers of a layer's attention come from
`Gemma2Config.attention`.
"""

from __future__ import annotations

from dataclasses import dataclass

from ..arrays import F32
from ..blocks.feedforward import FeedForwardWeights, feed_forward
from ..blocks.gqa import AttentionWeights, grouped_query_attention
from ..cache import KeyValueRing, TokenPositions
from ..formulas.rmsnorm import rms_norm
from ..taps import Scope
from .decoder import Decoder


@dataclass(frozen=True)
class Gemma2Block:
    """The weights of one layer."""

    pre_attention_norm: F32  # [D]
    attention: AttentionWeights
    post_attention_norm: F32  # [D]
    pre_ffn_norm: F32  # [D]
    ffn: FeedForwardWeights
    post_ffn_norm: F32  # [D]


class Gemma2(Decoder):
    """Gemma 2."""

    def block(self, x: F32, layer: int, state: KeyValueRing, places: TokenPositions, taps: Scope) -> F32:
        """x [T, D] → [T, D]      Each branch is normed on its way in and out (Gemma 2 §2, "post-norm and pre-norm")."""
        w: Gemma2Block = self.weights.blocks[layer]
        c = self.config
        h = rms_norm(x, w.pre_attention_norm, c.eps)
        h = grouped_query_attention(h, w.attention, c.attention(layer), c.head_dim, c.eps, state, places, taps)
        x = taps("residual.middle", places.asked(x) + rms_norm(h, w.post_attention_norm, c.eps))
        h = feed_forward(rms_norm(x, w.pre_ffn_norm, c.eps), w.ffn, taps)
        return taps("residual.out", x + rms_norm(h, w.post_ffn_norm, c.eps))
