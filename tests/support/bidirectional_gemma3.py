"""A variant as one page: Gemma 3 without the causal mask and with mean pooling, like EmbeddingGemma (Vera et al. 2025).

    global layers: every token sees every token; local layers: W / 2 tokens on either side
    embedding of a text = the mean over its tokens of norm(h), h the last layer's output

Different from models/gemma3.py: the last position that a token sees, one chunk per text, how config.json is read.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from minigemma.arrays import F32
from minigemma.cache import TokenPositions
from minigemma.models import gemma3
from minigemma.models.fields import Fields
from minigemma.models.gemma3 import Gemma3, Gemma3Config
from minigemma.taps import Scope


@dataclass(frozen=True, kw_only=True)
class BidirectionalConfig(Gemma3Config):
    """Gemma 3's sizes; `window` counts the token itself and those on one side."""

    family = "gemma3_bidirectional"


class BidirectionalGemma3(Gemma3):
    """Gemma 3 as an encoder."""

    bidirectional = True

    def block(self, x: F32, layer: int, state: Any, tokens: TokenPositions, taps: Scope) -> F32:
        """x [T, D] → [T, D]      Gemma 3's block, in which a token also sees the tokens after it."""
        if tokens.first:
            raise ValueError("tokens see later ones; give the whole text in one call")
        last = tokens.positions[-1]
        window = self.config.attention(layer).window
        seen = np.full_like(tokens.positions, last)
        if window is not None:
            seen = np.minimum(tokens.positions + np.int32(window - 1), last)
        return super().block(x, layer, state, replace(tokens, last_visible=seen), taps)

    def embed(self, ids: Sequence[int]) -> F32:
        """The embedding of a text: [D] float32, the mean of the normed last hidden states."""
        return self.hidden_states(ids).mean(0)


def from_json(f: Fields) -> BidirectionalConfig:
    """The config of a config.json whose sliding_window counts the tokens of both sides."""
    f.expect("use_bidirectional_attention", True)
    fields = gemma3.text_fields(f)
    return BidirectionalConfig(**fields | {"window": fields["window"] // 2 + 1})


FAMILY = replace(
    gemma3.FAMILY,
    name="gemma3_bidirectional",
    title="Gemma 3 without the causal mask",
    model=BidirectionalGemma3,
    released=(),
    hub_ids="",
    model_types=("gemma3_bidirectional",),
    from_json=from_json,
    architecture="",
    from_gguf=None,
)
