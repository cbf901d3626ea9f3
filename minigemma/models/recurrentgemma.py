"""RecurrentGemma (Botev et al. 2024, "RecurrentGemma: Moving Past Transformers for Efficient Open Language Models").

    h = x + temporal(norm(x))                two recurrent blocks, then local attention, and so on
    y = h + feed_forward(norm(h))

Attention is local only, over the last 2,048 tokens and the current one, with one key/value head, rope on the first
half of each head, and a bias on its output; so the whole state is of one size from there on. Every linear map of the
recurrent and feed-forward blocks has a bias too. Logits are soft-capped at 30. √D is always rounded to bf16.

Departs from transformers in the window: DeepMind's code lets a token see 2,048 earlier ones and itself, transformers
one fewer.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from ..arrays import F32
from ..blocks.feedforward import FeedForwardWeights, feed_forward
from ..blocks.gqa import AttentionWeights, grouped_query_attention
from ..blocks.griffin import RecurrentWeights, recurrent_block
from ..cache import LayerState, RecurrentState, TokenPositions
from ..config import RecurrentGemmaConfig
from ..formulas.rmsnorm import rms_norm
from ..taps import Scope
from .decoder import Decoder


@dataclass(frozen=True, kw_only=True)
class RecurrentGemmaBlock:
    """The weights of one layer, which has either attention or a recurrent block."""

    temporal_pre_norm: F32  # [D]
    attention: AttentionWeights | None = None
    recurrent: RecurrentWeights | None = None
    channel_pre_norm: F32  # [D]
    ffn: FeedForwardWeights


class RecurrentGemma(Decoder):
    """RecurrentGemma, and Griffin of any size."""

    config: RecurrentGemmaConfig

    def layer_state(self, layer: int, max_tokens: int, dtype: type) -> LayerState:
        """A ring for attention; for a recurrent block its h and the tail of its convolution."""
        if self.config.is_attention(layer):
            return super().layer_state(layer, max_tokens, dtype)
        return RecurrentState(self.config.conv_width, self.config.lru_width)

    def block(self, x: F32, layer: int, state: Any, places: TokenPositions, taps: Scope) -> F32:
        """x [T, D] → [T, D]      Each branch is normed on its way in (Botev et al. 2024 §2)."""
        w: RecurrentGemmaBlock = self.weights.blocks[layer]
        c = self.config
        h = rms_norm(x, w.temporal_pre_norm, c.eps)
        if w.attention:
            h = grouped_query_attention(h, w.attention, c.attention(layer), c.head_dim, c.eps, state, places, taps)
        elif w.recurrent:
            h = recurrent_block(h, w.recurrent, state, places, taps)
        x = taps("residual.middle", places.asked(x) + h)
        h = feed_forward(rms_norm(x, w.channel_pre_norm, c.eps), w.ffn, taps)
        return taps("residual.out", x + h)
