"""A layer of every Gemma: attention or a recurrent block, then the feed-forward block (Gemma 1 §2; Griffin §2.1).

x → x + attention(x), or x + recurrence(x)      blocks/gqa.py, blocks/griffin.py
x → x + feed_forward(x)                         blocks/feedforward.py

Each of the two has one fused kernel for 1 to 16 tokens, of one sequence or each of its own (models/fused.py).
"""

from __future__ import annotations

from dataclasses import dataclass

from ..arrays import F32
from ..cache import Rings, States, TokenPositions
from ..config import AttentionConfig
from ..definition import definition
from ..formulas.linear import Gradients
from ..taps import Scope
from .feedforward import FeedForwardWeights, feed_forward_backward, feed_forward_block
from .gqa import AttentionWeights, attention_backward, attention_block
from .griffin import RecurrentWeights, recurrent_backward, recurrent_block


@dataclass(frozen=True, eq=False, kw_only=True)
class LayerWeights:
    """The weights of one layer, which has either attention or a recurrent block."""

    attention: AttentionWeights | None = None
    recurrent: RecurrentWeights | None = None
    ffn: FeedForwardWeights


@definition
def attention_layer(
    x: F32, w: LayerWeights, config: AttentionConfig, ring: Rings, tokens: TokenPositions, taps: Scope
) -> F32:
    """A layer with attention      [Gemma 1 §2; Gemma 2 §2; Gemma 3 §2]

    x [T, D] float32, the residual of `tokens` → [T, D] float32, or the last `tokens.outputs` rows of it

    `ring` takes in their keys and values; nothing else is changed.
    """
    assert w.attention is not None
    x = attention_block(x, w.attention, config, ring, tokens, taps)
    return feed_forward_block(x, w.ffn, config.eps, taps)


@definition
def recurrent_layer(x: F32, w: LayerWeights, eps: float, state: States, tokens: TokenPositions, taps: Scope) -> F32:
    """A layer with a recurrent block      [Griffin §2.3, Figure 2; Botev et al. 2024 §2]

    x [T, D] float32, the residual of `tokens` → [T, D] float32, or the last `tokens.outputs` rows of it

    `state` proposes what follows the tokens; nothing else is changed.
    """
    assert w.recurrent is not None
    x = recurrent_block(x, w.recurrent, eps, state, tokens, taps)
    return feed_forward_block(x, w.ffn, eps, taps)


def layer_backward(
    dy: F32, x: F32, w: LayerWeights, config: AttentionConfig, tokens: TokenPositions, kept: Scope, gradients: Gradients
) -> F32:
    """dx from dy = ∂L/∂y of a layer of either kind that was given whole sequences: dy, x [T, D] → [T, D] float32

    `kept` has what the layer named; gradients of its weights are added to `gradients`.
    """
    dy = feed_forward_backward(dy, kept["residual.middle"], w.ffn, config.eps, kept, gradients)
    if w.attention is not None:
        return attention_backward(dy, x, w.attention, config, tokens, kept, gradients)
    assert w.recurrent is not None
    return recurrent_backward(dy, x, w.recurrent, config.eps, tokens, kept, gradients)
