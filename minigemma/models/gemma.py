"""Gemma 1 (Gemma Team 2024a, "Gemma: Open Models Based on Gemini Research and Technology", §2): the baseline.

    h = x + attention(norm(x))               every layer sees every earlier token
    y = h + feed_forward(norm(h))

2B has one key/value head for all eight query heads (multi-query attention), 7B one for each (multi-head attention).
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
class GemmaBlock:
    """The weights of one layer."""

    pre_attention_norm: F32  # [D]
    attention: AttentionWeights
    pre_ffn_norm: F32  # [D]
    ffn: FeedForwardWeights


class Gemma(Decoder):
    """Gemma 1."""

    def block(self, x: F32, layer: int, state: KeyValueRing, places: TokenPositions, taps: Scope) -> F32:
        """x [T, D] → [T, D]      Each branch is normed on its way in (Gemma 1 §2)."""
        w: GemmaBlock = self.weights.blocks[layer]
        c = self.config
        h = rms_norm(x, w.pre_attention_norm, c.eps)
        h = grouped_query_attention(h, w.attention, c.attention(layer), c.head_dim, c.eps, state, places, taps)
        x = taps("residual.middle", places.asked(x) + h)
        h = feed_forward(rms_norm(x, w.pre_ffn_norm, c.eps), w.ffn, taps)
        return taps("residual.out", x + h)
