"""The loss of a text model and its gradient by every parameter: what training runs.

    x = E[ids] · √D → layers → h = RMSNorm(x) → logits = cap(h Eᵀ) → loss          forward; each layer's values are kept
    dh, dE ← dx ← layers, last to first ← dE[ids] += √D · dx                       backward

Forward runs the layers that generation runs (decoder.py, blocks/) over whole sequences that lie one after the other;
backward of a block stands under it. E is embedding and head, so it gets two gradients.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from ..arrays import F32, I32
from ..blocks.layers import layer_backward
from ..cache import TokenPositions
from ..formulas.cross_entropy import LossOf, Targets, chunked_loss, chunked_loss_and_gradient, loss_of_targets
from ..formulas.linear import Gradients, add, embed, embed_backward
from ..formulas.rmsnorm import rms_norm, rms_norm_gradient
from ..taps import NO_TAPS, Kept, Taps
from .decoder import Decoder
from .parameters import DECAY


class Batch(NamedTuple):
    """Sequences one after the other. Positions count from each start; nothing is seen or remembered across one."""

    ids: I32  # [T]
    starts: I32  # [B], where each sequence begins, the first at 0


def loss(model: Decoder, batch: Batch, targets: Targets) -> F32:
    """Each token's cross-entropy with its target, [T] float32; nothing is kept."""
    targets, h = _fitting(model, batch, targets), hidden(model, batch)
    losses, counted = np.zeros(len(h), np.float32), _counted(targets)
    with model.running():
        some = Targets(targets.ids[counted], targets.weights[counted])
        losses[counted] = chunked_loss(h[counted], model.weights.scores, model.config.logit_cap, some)
    return losses


def _counted(targets: Targets) -> NDArray[np.intp]:
    """The tokens that have a weight: the others need no logits."""
    return np.flatnonzero(targets.weights.any(axis=1))


def hidden(model: Decoder, batch: Batch) -> F32:
    """The hidden states after the final norm, [T, D] float32; `model.head` makes logits of them."""
    with model.running():
        x = _layers(model, batch, _positions(model, batch), NO_TAPS)
        return rms_norm(x, model.weights.final_norm, model.config.eps)


def loss_and_gradients(
    model: Decoder, batch: Batch, targets: Targets | LossOf, scale: float, gradients: Gradients
) -> F32:
    """Each token's loss, [T] float32; adds scale · ∂(Σ_t loss_t)/∂parameter to `gradients`, by our names (Λ for decay).
    A parameter that has no array there is frozen.

    `targets`: what `loss` takes, or another loss by the logits (formulas/cross_entropy.py).
    """
    c, w, kept = model.config, model.weights, Kept()
    counted: Any = slice(None)
    if isinstance(targets, Targets):
        counted = _counted(_fitting(model, batch, targets))
        targets = loss_of_targets(Targets(targets.ids[counted], targets.weights[counted]))
    head = "embedding" if w.head is None else "head"
    with model.running():
        tokens = _positions(model, batch)
        x = _layers(model, batch, tokens, kept)
        h = rms_norm(x, w.final_norm, c.eps)
        losses, dh = np.zeros(len(h), np.float32), np.zeros_like(h)
        losses[counted], dh[counted] = chunked_loss_and_gradient(
            h[counted], w.scores, c.logit_cap, targets, scale, gradients, head
        )
        dx, dnorm = rms_norm_gradient(dh, x, w.final_norm, c.eps)
        add(gradients, "final_norm", dnorm)
        for i in reversed(range(c.layers)):
            dx = _layer_backward(model, i, dx, tokens, kept, gradients)
        if "embedding" in gradients:
            embed_backward(dx, batch.ids, model.embedding_scale, gradients["embedding"])
    return losses


def _layers(model: Decoder, batch: Batch, tokens: TokenPositions, taps: Taps) -> F32:
    """The embedding and all layers, each from an empty state: [T, D] float32."""
    x = taps("embedding", embed(batch.ids, model.weights.embedding, model.embedding_scale))
    for i in range(model.config.layers):
        x = model.block(x, i, model.layer_state(i, 1, np.float32), tokens, taps.within(f"blocks.{i}"))
    return x


def _layer_backward(model: Decoder, i: int, dy: F32, tokens: TokenPositions, kept: Kept, gradients: Gradients) -> F32:
    """dx of layer i, of which nothing is kept afterwards."""
    prefix, w = f"blocks.{i}.", model.weights.blocks[i]
    own = {name.removeprefix(prefix): array for name, array in gradients.items() if name.startswith(prefix)}
    if DECAY in own:  # its gradient is by softplus(Λ), whose derivative by Λ is σ(Λ) = 1 - e^(-softplus(Λ))
        own[DECAY] = np.zeros_like(own[DECAY])
    x = kept[f"blocks.{i - 1}.residual.out" if i else "embedding"]
    dx = layer_backward(dy, x, w, model.attention[i], tokens, kept.within(prefix[:-1]), own)
    if w.recurrent is not None and DECAY in own:
        gradients[prefix + DECAY] -= own[DECAY] * np.expm1(-w.recurrent.decay)
    for name in [name for name in kept if name.startswith(prefix)]:
        del kept[name]
    return dx


def _positions(model: Decoder, batch: Batch) -> TokenPositions:
    """Positions within each sequence; ValueError for a batch that no model can take."""
    ids, starts = batch
    if model.bidirectional:
        raise ValueError(f"{type(model).__name__} writes no text, and is not trained")
    if ids.ndim != 1 or not len(ids) or ids.min() < 0 or ids.max() >= model.config.vocab:
        raise ValueError(f"ids must be [T] token ids from 0 to {model.config.vocab - 1}")
    lengths = np.diff(starts, append=len(ids))
    if starts.ndim != 1 or not len(starts) or starts[0] != 0 or lengths.min() < 1:
        raise ValueError("starts must rise from 0, each before the end of ids")
    positions = np.arange(len(ids), dtype=np.int32) - np.repeat(starts, lengths).astype(np.int32)
    return TokenPositions(positions, positions, len(ids), tuple(starts.tolist()))


def _fitting(model: Decoder, batch: Batch, targets: Targets) -> Targets:
    """The targets; ValueError where they do not fit the batch."""
    ids, weights = targets
    if ids.ndim != 2 or ids.shape != weights.shape or len(ids) != len(batch.ids):
        raise ValueError(f"targets are ids {list(ids.shape)} and weights {list(weights.shape)}; they must be [T, k]")
    if ids.size and not 0 <= ids.min() <= ids.max() < model.config.vocab:
        raise ValueError(f"ids of targets must be from 0 to {model.config.vocab - 1}")
    return targets
