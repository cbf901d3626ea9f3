"""One token of each of several sequences at once: products read each weight once for all of them.

Rows of x are sequences. Norms, products and the gates of a recurrent block take all rows together; attention and the
recurrence go to each sequence's own ring or state (blocks/gqa.py, griffin.py; fused by models/fused.py).
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from ..arrays import F32
from ..cache import Cache, TokenPositions
from ..formulas.linear import embed
from ..formulas.rmsnorm import rms_norm
from .decoder import Decoder, check_room


def forward_together(model: Decoder, ids: Sequence[int], caches: Sequence[Cache]) -> F32:
    """The logits [B, V] float32 of what `hidden_together` computes.

    A row is what `forward` makes of its token and cache, up to the order of sums.
    """
    with model.running():
        return model.head(hidden_together(model, ids, caches))


def hidden_together(model: Decoder, ids: Sequence[int], caches: Sequence[Cache]) -> F32:
    """The next token of several sequences, ids [B], each of which has a cache of its own: hidden states [B, D] float32
    after the final norm. Sequences may join or leave between any two calls.

    Raises ValueError for ids outside the vocabulary, image tokens, and caches that are full or given twice.
    """
    tokens = model.checked_ids(ids)
    if model.vision and (tokens == model.vision.image_token).any():
        raise ValueError("the tokens of an image come in one call of forward")
    if not len({id(cache) for cache in caches}) == len(caches) == len(tokens):
        raise ValueError(f"{len(tokens)} ids for {len(caches)} caches; each sequence has one of its own")
    for cache in caches:
        cache.settle()
        check_room(cache, 1)
    positions = np.array([cache.position for cache in caches], np.int32)
    places = TokenPositions(positions, positions, len(tokens), starts=tuple(range(len(tokens))))
    with model.running():
        x = model.layers(embed(tokens, model.weights.embedding, model.embedding_scale), places, caches)
        for token, cache in zip(ids, caches, strict=True):
            cache.advance([token])
        return rms_norm(x, model.weights.final_norm, model.config.eps)
