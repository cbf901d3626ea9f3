"""One run of a model for `minigemma explore`: tokens, each layer's prediction, attention, gates, caches, images.

seen = look(model, ids, silenced=[(11, 2)])     # the run without head 2 of layer 11
seen.lens()                                     # the likeliest next tokens after each layer
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ..arrays import F32
from ..formulas.attention import softmax
from ..formulas.rglru import sigmoid
from ..formulas.rmsnorm import rms_norm
from ..formulas.sampling import Sampler
from ..models.decoder import Decoder
from ..taps import Edits

LONGEST = 128  # tokens of a run, without those of images: attention maps grow with the square
CHANNELS = 128  # of a recurrent layer that are shown
LENS_TOKENS = 12  # of the end of a text, whose predictions are shown layer by layer
RECURRENT = ("decay", "recurrence_gate", "input_gate")  # what is kept of a recurrent layer
SHOWN = 5  # likeliest tokens of each


@dataclass(frozen=True, eq=False)
class Look:
    """The recorded values of a run; every method returns lists and numbers for JSON."""

    model: Decoder
    ids: tuple[int, ...]
    values: Edits
    probs: dict[int, F32]  # of each layer with attention: what the tokens that are shown attend to, [N, shown, T]

    def text(self, token: int) -> str:
        """A token as text; its id where the checkpoint has no tokenizer."""
        tokenizer = self.model.tokenizer
        return tokenizer.piece(int(token)).replace("▁", " ") if tokenizer else str(token)

    @cached_property
    def images(self) -> list[tuple[int, int]]:
        """(first, last + 1) of the tokens of each image and crop."""
        return self.model.image_runs(self.ids)

    @cached_property
    def shown(self) -> NDArray:
        """The positions of the tokens that are shown one by one: all but those of images."""
        of_images = [np.arange(*run) for run in self.images]
        return np.setdiff1d(np.arange(len(self.ids)), np.concatenate(of_images) if of_images else [])

    def summary(self) -> dict[str, Any]:
        """Tokens, their positions, images; of each layer kind, window, heads, and how many tokens its cache holds."""
        c, T, layers = self.model.config, len(self.ids), []
        for i in range(c.layers):
            recurrent = c.kind(i) == "recurrent"
            window = None if recurrent else c.attention(i).window
            held = None if recurrent else min(T, window or T)
            layers.append({"kind": c.kind(i), "window": window, "heads": 0 if recurrent else c.heads, "held": held})
        tokens = [self.text(self.ids[at]) for at in self.shown]
        return {"model": c.name, "tokens": tokens, "positions": self.shown.tolist(), "layers": layers} | {
            "images": [first for first, _ in self.images],
            "image_tokens": c.vision and c.vision.tokens,
            "patches": c.vision and c.vision.grid,  # of a side of a picture; None: the model sees none
        }

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
        """[head][query][key] probabilities between the tokens shown; ValueError for a layer without attention."""
        return self._probs(layer)[:, :, self.shown].round(3).tolist()

    def attention_to_images(self, layer: int, query: int) -> list[list[list[float]]]:
        """[image][head][token of the image] probabilities, from one of the tokens shown."""
        probs = self._probs(layer)
        if not 0 <= query < len(self.shown):
            raise ValueError(f"there is no token {query}")
        return [probs[:, query, first:last].round(4).tolist() for first, last in self.images]

    def _probs(self, layer: int) -> F32:
        if layer not in self.probs:
            raise ValueError(f"layer {layer} has no attention")
        return self.probs[layer]

    def channels(self, layer: int) -> dict[str, Any]:
        """Half-lives in tokens, recurrence and input gates (0 … 1) of a recurrent layer, each [token][channel], of at
        most CHANNELS channels, taken evenly from the slowest to the fastest. After a half-life half of a state is left.
        """
        values = {kind: self.values.get(f"blocks.{layer}.recurrent.{kind}") for kind in RECURRENT}
        decay, *gates = values.values()
        if decay is None:
            raise ValueError(f"layer {layer} is not recurrent")
        half = np.log(0.5) / np.log(np.clip(decay, 1e-6, 1 - 1e-7))
        order = np.argsort(-np.median(half, axis=0), kind="stable")
        some = order[np.unique(np.linspace(0, len(order) - 1, min(CHANNELS, len(order))).round().astype(int))]
        r, i = (sigmoid(gate[:, some]) for gate in gates if gate is not None)
        shown = {"half_life": half[:, some].round(2), "recurrence_gate": r.round(3), "input_gate": i.round(3)}
        return {"channels": some.tolist()} | {name: value[self.shown].tolist() for name, value in shown.items()}

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


def look(
    model: Decoder, ids: Sequence[int], silenced: Sequence[tuple[int, int]] = (), features: F32 | None = None
) -> Look:
    """Run `ids` once, with the heads (layer, head) of `silenced` at zero, and keep what a page shows.

    features [n, tokens, D]: of the images in ids.

    Raises ValueError for more than LONGEST ids besides those of images, and for a head that the model does not have.
    """
    seen = Look(model, tuple(map(int, ids)), Edits({}), {})
    if len(seen.shown) > LONGEST:
        raise ValueError(f"the text has {len(seen.shown)} tokens; {LONGEST} can be shown, so shorten it")
    for layer, head in silenced:
        c = model.config
        if not (0 <= layer < c.layers and 0 <= head < c.heads and c.kind(layer) != "recurrent"):
            raise ValueError(f"there is no head {head} in layer {layer}")

    def silence(heads: F32, name: str) -> F32:
        heads[:, [head for layer, head in silenced if f"blocks.{layer}.attention.heads" == name]] = 0
        return heads

    def keep(probs: F32, name: str) -> F32:
        seen.probs[int(name.split(".")[1])] = probs[:, seen.shown]
        return probs

    kept = ["blocks.*.residual.out", "logits"]
    if any(model.config.kind(i) == "recurrent" for i in range(model.config.layers)):
        kept += [f"blocks.*.recurrent.{kind}" for kind in RECURRENT]
    functions: dict[str, Callable[[NDArray, str], NDArray]] = {"blocks.*.attention.probs": keep}
    if silenced:
        functions["blocks.*.attention.heads"] = silence
    values = Edits(functions, *kept)
    model.forward(seen.ids, images=features, taps=values)
    return replace(seen, values=values)
