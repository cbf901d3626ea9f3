"""One run of a model for `minigemma explore`: tokens, each layer's prediction, attention, gates, caches.

seen = look(model, ids, silenced=[(11, 2)])     # the run without head 2 of layer 11
seen.lens()                                     # the likeliest next tokens after each layer
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ..arrays import F32
from ..formulas.attention import softmax
from ..formulas.rmsnorm import rms_norm
from ..formulas.sampling import Sampler
from ..models.decoder import Decoder
from ..taps import Edits

LONGEST = 128  # tokens of a run: attention maps grow with the square
LENS_TOKENS = 12  # of the end of a text, whose predictions are shown layer by layer
SHOWN = 5  # likeliest tokens of each


@dataclass(frozen=True, eq=False)
class Look:
    """The recorded values of a run; every method returns lists and numbers for JSON."""

    model: Decoder
    ids: tuple[int, ...]
    values: Edits

    def text(self, token: int) -> str:
        """A token as text; its id where the checkpoint has no tokenizer."""
        tokenizer = self.model.tokenizer
        return tokenizer.piece(int(token)).replace("▁", " ") if tokenizer else str(token)

    def summary(self) -> dict[str, Any]:
        """Tokens and layers: kind, window, heads, and how many tokens a layer's cache holds after this text."""
        c, T, layers = self.model.config, len(self.ids), []
        for i in range(c.layers):
            recurrent = c.kind(i) == "recurrent"
            window = None if recurrent else c.attention(i).window
            held = None if recurrent else min(T, window or T)
            layers.append({"kind": c.kind(i), "window": window, "heads": 0 if recurrent else c.heads, "held": held})
        return {"model": c.name, "tokens": [self.text(i) for i in self.ids], "layers": layers}

    def lens(self) -> list[list[list[tuple[str, float]]]]:
        """[layer][token][rank] (token, probability) for the last LENS_TOKENS tokens: what the final norm and the head
        make of the stream after each layer (the logit lens).
        """
        found, w, eps = [], self.model.weights.final_norm, self.model.config.eps
        for i in range(self.model.config.layers):
            x = rms_norm(self.values[f"blocks.{i}.residual.out"][-LENS_TOKENS:], w, eps)
            found.append([self.likeliest(p) for p in softmax(self.model.head(x))])
        return found

    def attention(self, layer: int) -> list[list[list[float]]]:
        """[head][query][key] probabilities of one layer; ValueError for a layer without attention."""
        name = f"blocks.{layer}.attention.probs"
        if name not in self.values:
            raise ValueError(f"layer {layer} has no attention")
        return self.values[name].round(3).tolist()

    def half_lives(self, layer: int) -> list[list[float]]:
        """[token][quantile] tokens after which half of a channel's state is left: 10, 50 and 90 % of the channels."""
        name = f"blocks.{layer}.recurrent.decay"
        if name not in self.values:
            raise ValueError(f"layer {layer} is not recurrent")
        decay = np.clip(self.values[name], 1e-6, 1 - 1e-7)
        return np.quantile(np.log(0.5) / np.log(decay), (0.1, 0.5, 0.9), axis=1).T.round(2).tolist()

    @cached_property
    def logits(self) -> F32:
        """Logits of the next token, [V], without ids that are never sampled."""
        z = self.values["logits"][-1].copy()
        z[self.model.vocab_limit :] = -np.inf
        z[[i for i in self.model.banned if i < len(z)]] = -np.inf
        return z

    def next(self, sampler: Sampler, count: int = 20) -> list[tuple[str, float]]:
        """The likeliest next tokens that the sampler keeps, with their probabilities."""
        if not sampler.temperature:
            return [(self.text(int(self.logits.argmax())), 1.0)]
        tokens, probs = sampler.candidates(self.logits)
        best = np.argsort(-probs)[:count]
        return [(self.text(tokens[i]), float(probs[i])) for i in best]

    def likeliest(self, probs: NDArray) -> list[tuple[str, float]]:
        """The SHOWN likeliest tokens of one distribution."""
        best = np.argpartition(-probs, SHOWN)[:SHOWN]
        return [(self.text(i), round(float(probs[i]), 4)) for i in best[np.argsort(-probs[best])]]


def look(model: Decoder, ids: Sequence[int], silenced: Sequence[tuple[int, int]] = ()) -> Look:
    """Run `ids` once, with the heads (layer, head) of `silenced` at zero, and keep what a page shows.

    Raises ValueError for more than LONGEST ids, and for a head that the model does not have.
    """
    if len(ids) > LONGEST:
        raise ValueError(f"the text has {len(ids)} tokens; {LONGEST} can be shown, so shorten it")
    for layer, head in silenced:
        c = model.config
        if not (0 <= layer < c.layers and 0 <= head < c.heads and c.kind(layer) != "recurrent"):
            raise ValueError(f"there is no head {head} in layer {layer}")

    def silence(heads: F32, name: str) -> F32:
        heads[:, [head for layer, head in silenced if f"blocks.{layer}.attention.heads" == name]] = 0
        return heads

    kept = ["blocks.*.residual.out", "blocks.*.attention.probs", "logits"]
    if any(model.config.kind(i) == "recurrent" for i in range(model.config.layers)):
        kept.append("blocks.*.recurrent.decay")
    values = Edits({"blocks.*.attention.heads": silence} if silenced else {}, *kept)
    model.forward(ids, last_only=False, taps=values)
    return Look(model, tuple(ids), values)
