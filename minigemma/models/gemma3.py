"""Gemma 3, its text model (Gemma Team 2025, "Gemma 3 Technical Report", §2).

    h = x + norm(attention(norm(x)))         five local layers (512 or 1,024 tokens), then a global one
    y = h + norm(feed_forward(norm(h)))

New since Gemma 2: 5 local layers to 1 global, norms on queries and keys in place of the soft-caps, a rope base of
1,000,000 on global layers, whose positions are divided by 8 in 4B and larger, and so a context of 128K with a small
cache. All of that is numbers (`Gemma3Config.attention`) and two more norms in `AttentionWeights`: the block itself is
Gemma 2's.
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
class Gemma3Block:
    """The weights of one layer; its attention has q_norm and k_norm."""

    pre_attention_norm: F32  # [D]
    attention: AttentionWeights
    post_attention_norm: F32  # [D]
    pre_ffn_norm: F32  # [D]
    ffn: FeedForwardWeights
    post_ffn_norm: F32  # [D]


class Gemma3(Decoder):
    """Gemma 3, text."""

    def block(self, x: F32, layer: int, state: KeyValueRing, places: TokenPositions, taps: Scope) -> F32:
        """x [T, D] → [T, D]      Each branch is normed on its way in and on its way out (Gemma 3 §2)."""
        w: Gemma3Block = self.weights.blocks[layer]
        c = self.config
        h = rms_norm(x, w.pre_attention_norm, c.eps)
        h = grouped_query_attention(h, w.attention, c.attention(layer), c.head_dim, c.eps, state, places, taps)
        x = taps("residual.middle", places.asked(x) + rms_norm(h, w.post_attention_norm, c.eps))
        h = feed_forward(rms_norm(x, w.pre_ffn_norm, c.eps), w.ffn, taps)
        return taps("residual.out", x + rms_norm(h, w.post_ffn_norm, c.eps))
