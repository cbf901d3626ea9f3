"""The frame that all Gemmas share: embed, run the blocks over a cache, norm, and score every token of the vocabulary.

    x      = E[ids] · √D
    x      = block_i(x)                      i = 0 … layers - 1: what a paper's own file defines
    logits = E · RMSNorm(x)                  the head is the embedding, unscaled; soft-capped in Gemma 2

With images, x of an image's tokens is what the vision tower made of it, unscaled (Gemma 3 §2.1; siglip.py).

√D: all of DeepMind's bf16 runs round it to bf16 (25.25 for 270M, where √640 = 25.298), so it is rounded here wherever
the embedding is stored in bf16 or quantized, and not where it is stored in float32.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np

from ..arrays import F32, round_bf16, widen_bf16
from ..blocks.siglip import VisionWeights, soft_tokens, vision_tower
from ..cache import Cache, KeyValueRing, LayerState, TokenPositions
from ..config import TextConfig, VisionConfig
from ..definition import formulas_only, runs_formulas
from ..errors import no_vision
from ..formulas.linear import embed, few, linear
from ..formulas.rmsnorm import rms_norm
from ..formulas.softcap import soft_cap
from ..formulas.two_pass_head import Preview, preview_of
from ..kernels.parallel import default_threads, threads
from ..layouts.weight import Weight
from ..taps import NO_TAPS, Scope, Taps
from .step import CompiledLayers, can_be_compiled

PREFILL_CHUNK = 256  # tokens that go through the layers together: what bounds the memory of a long prompt


@dataclass(frozen=True)
class DecoderWeights:
    """All weights of a text model."""

    embedding: Weight  # [V, D]
    blocks: tuple[Any, ...]  # one for each layer, of the dataclass that the model's file defines
    final_norm: F32  # [D]
    head: Weight | None = None  # [V, D], where a file holds one that is not the embedding
    vision: VisionWeights | None = None

    @property
    def scores(self) -> Weight:
        """What the logits are made with, [V, D]: the head, or the embedding where there is none."""
        return self.embedding if self.head is None else self.head


@dataclass(frozen=True)
class ImageSpan:
    """The tokens first … last - 1 of a call are an image, and these [last - first, D] take their embeddings' place."""

    first: int
    last: int
    features: F32


class Decoder(ABC):
    """A text model: config, weights and tokenizer; no state."""

    def __init__(
        self,
        config: TextConfig,
        weights: DecoderWeights,
        *,
        tokenizer: Any = None,
        exact: bool = False,
        round_scale: bool = True,
        backend: str = "numba",
        threads: int | None = None,
        previews: bool = True,
        eos: tuple[int, ...] = (1,),
        instruction_tuned: bool = False,
        path: Path | None = None,
    ) -> None:
        self.config, self.weights, self.tokenizer = config, weights, tokenizer
        self.name = config.name
        self.exact = exact  # keys and values in float32, not bf16
        self.backend, self.threads = backend, threads or default_threads()
        self.previews = previews  # there is room for `preview`
        self.eos, self.instruction_tuned = eos, instruction_tuned
        self.path = path  # of the file or folder that it came from
        scale = np.sqrt(np.float32(config.width))
        self.embedding_scale = float(widen_bf16(round_bf16(np.array([scale])))[0] if round_scale else scale)

    @property
    def vocab_limit(self) -> int:
        """Ids from here on are rows of the embedding that no token has; they are never sampled."""
        return min(self.config.vocab, self.tokenizer.size) if self.tokenizer else self.config.vocab

    @property
    def banned(self) -> tuple[int, ...]:
        """Ids that are never sampled: the marks around images, which a text cannot continue with."""
        if self.vision:
            return self.vision.start_token, self.vision.end_token, self.vision.image_token
        marks = ("<start_of_image>", "<end_of_image>")
        ids = (self.tokenizer.id_of(mark) for mark in marks) if self.tokenizer else ()
        return tuple(i for i in ids if i is not None)

    @property
    def vision(self) -> VisionConfig | None:
        """The config of the vision tower; None if the model has none."""
        return self.config.vision

    def new_cache(self, max_tokens: int, dtype: str | None = None) -> Cache:
        """An empty cache for a sequence of at most `max_tokens`, its keys and values in "bf16" or "f32".

        Without a dtype they are bf16, and float32 in the exact mode. What that costs: docs/accuracy.md.
        """
        if dtype not in (None, "bf16", "f32"):
            raise ValueError(f"keys and values cannot be {dtype!r}; they are kept as 'bf16' or 'f32'")
        kept = np.float32 if dtype == "f32" or (dtype is None and self.exact) else np.uint16
        if max_tokens < 1:
            raise ValueError(f"a cache for {max_tokens} tokens; it needs room for 1 at least")
        return Cache(tuple(self.layer_state(i, max_tokens, kept) for i in range(self.config.layers)), max_tokens)

    def layer_state(self, layer: int, max_tokens: int, dtype: type) -> LayerState:
        """What one layer begins with: an empty ring, as long as its window or the whole sequence."""
        c = self.config
        limit = min(c.attention(layer).window or max_tokens, max_tokens)
        return KeyValueRing(limit, c.kv_heads, c.head_dim, dtype)

    def forward(
        self,
        ids: Sequence[int],
        cache: Cache | None = None,
        images: Any = None,
        last_only: bool = False,
        taps: Taps | None = None,
        likely_only: bool = False,
    ) -> F32:
        """Logits of the token that follows each of `ids`: float32 [T, V], or [1, V] of the last one with `last_only`.

        Without a cache, ids are the whole sequence; with one they follow what it holds, in pieces of any length, and it
        holds them afterwards. `images` are float32 [n, 3, side, side] in [-1, 1], one for each run of image tokens in
        ids, or what `image_features` made of them, [n, tokens, D]; an image's tokens come in one call. `taps` is filled
        with the values that it names; then all of ids go through in one piece. With `likely_only` logits of tokens that
        are not likely to come next may be approximate (preview.py), which saves a third of a small model's time; it is
        for one id, and for whoever samples from them.

        Raises ValueError for ids outside the vocabulary, no ids, more of them than the cache has room for, and images
        that do not fit them.
        """
        pictures = 0 if images is None else len(images)
        if pictures:
            self._tower(pictures)
        tokens = self._checked(ids)
        alone = cache and len(tokens) == 1 and not pictures and taps is None
        if cache and alone and (compiled := self._compiled_for(tokens, cache)):
            return self._next(compiled, tokens, cache, likely_only)
        runs = self.image_runs(tokens)
        images = self._checked_images(images, len(runs))
        cache = cache or self.new_cache(len(tokens))
        _settled(cache, len(tokens))
        taps = NO_TAPS if taps is None else taps
        features = images if images.ndim == 3 else self.image_features(images, taps)
        spans = [ImageSpan(*run, feature) for run, feature in zip(runs, features, strict=True)]
        with formulas_only(self.backend == "numpy"), threads(self.threads):
            outputs = []
            together = len(tokens) if taps.patterns else few() if self._compiled_for(tokens, cache) else PREFILL_CHUNK
            for first, last in pieces(len(tokens), runs, together):
                here = tokens[first:last]  # the end of a long prompt may be few, too
                compiled = None if taps.patterns else self._compiled_for(here, cache)
                if compiled and compiled.ready(here, cache):
                    x = compiled.residual(here, cache, 1 if last_only else len(here))
                    cache.advance(len(here))
                else:
                    x = self._layers(tokens, first, last, spans, cache, taps, last_only)
                if not last_only:
                    outputs.append(self._head(x, taps))
            if last_only:
                return self._head(x[-1:], taps)
            return np.concatenate(outputs) if outputs[1:] else outputs[0]

    @abstractmethod
    def block(self, x: F32, layer: int, state: Any, places: TokenPositions, taps: Scope) -> F32:
        """One layer: x [T, D], tokens that stand at `places`, → as many rows of [T, D] as they ask for."""

    def image_features(self, images: Any, taps: Taps | None = None) -> F32:
        """What the text model sees of images: float32 [n, 3, side, side] in [-1, 1] → float32 [n, tokens, D].

        Taps of image i are named "images.i.…". Raises ValueError for other shapes and a model without a vision tower.
        """
        vision, weights = self._tower(len(images))
        images, taps = self._checked_images(images, None), NO_TAPS if taps is None else taps
        features = np.empty((len(images), vision.tokens, self.config.width), np.float32)
        with formulas_only(self.backend == "numpy"), threads(self.threads):
            for i, pixels in enumerate(images):
                scope = taps.within(f"images.{i}")
                features[i] = soft_tokens(vision_tower(pixels, weights, vision, scope), weights, vision, scope)
        return features

    def vision_tower(self, pixels: Any) -> F32:
        """The vision tower alone: one image, float32 [3, side, side] in [-1, 1], → [P, C] float32."""
        vision, weights = self._tower(1)
        pixels = self._checked_images(np.asarray(pixels)[None], None)[0]
        with formulas_only(self.backend == "numpy"), threads(self.threads):
            return vision_tower(pixels, weights, vision, NO_TAPS.within("images.0"))

    def _tower(self, images: int) -> tuple[VisionConfig, VisionWeights]:
        """Config and weights of the vision tower, or the ValueError for that many images where there is none."""
        if self.vision is None or self.weights.vision is None:
            raise no_vision(self.name, images)
        return self.vision, self.weights.vision

    def image_runs(self, ids: Sequence[int] | np.ndarray) -> list[tuple[int, int]]:
        """(first, last + 1) of each image's tokens among `ids`; ValueError for a run that is no whole image."""
        if self.vision is None:
            return []
        marked = np.concatenate([[0], np.equal(ids, self.vision.image_token), [0]]).astype(np.int8)
        edges = np.flatnonzero(np.diff(marked)).tolist()
        runs = list(zip(edges[::2], edges[1::2], strict=True))
        for first, last in runs:
            if last - first != self.vision.tokens:
                raise ValueError(
                    f"{last - first} image tokens follow one another from id {first} on, but an image has "
                    f"{self.vision.tokens}; they must come in one call"
                )
        return runs

    def _layers(
        self, ids: np.ndarray, first: int, last: int, spans: list[ImageSpan], cache: Cache, taps: Taps, last_only: bool
    ) -> F32:
        here = ids[first:last]
        if self.vision:  # not every embedding has a row for the image token
            here = np.where(here == self.vision.image_token, 0, here)
        x = embed(here, self.weights.embedding, self.embedding_scale)
        positions = np.arange(cache.position, cache.position + last - first, dtype=np.int32)
        until = positions.copy()
        for span in spans:
            if first <= span.first < last:
                inside = slice(span.first - first, span.last - first)
                x[inside], until[inside] = span.features, positions[inside][-1]
        x, places = taps("embedding", x), TokenPositions(positions, until, len(here))
        for layer, state in enumerate(cache.layers):
            if layer == len(cache.layers) - 1 and last_only and not taps.patterns:
                places = replace(places, outputs=1)  # what the others are for, keys and values, the layer still makes
            x = self.block(x, layer, state, places, taps.within(f"blocks.{layer}"))
        cache.advance(last - first)
        return x

    @cached_property
    def _compiled(self) -> CompiledLayers | None:
        w = self.weights
        if not can_be_compiled(self.config, w.blocks, w.scores):
            return None
        return CompiledLayers(self.config, w.embedding, self.embedding_scale, w.blocks, w.final_norm, w.scores)

    @cached_property
    def preview(self) -> Preview | None:
        """What likely next tokens are found by, made when it is first asked for. None in the exact mode, where there is
        no room for it, and for a head that is small or has few bits already.
        """
        if not self.previews or self.exact:
            return None
        return preview_of(self.weights.scores, self.weights.final_norm, self.config.eps)

    def _compiled_for(self, ids: np.ndarray, cache: Cache) -> CompiledLayers | None:
        """The compiled code that stands for blocks and head, for a few tokens that nobody looks inside of and none of
        which is an image's; None where it may not.
        """
        if self.backend == "numpy" or runs_formulas() or (self.vision and (ids == self.vision.image_token).any()):
            return None
        return self._compiled if self._compiled and self._compiled.take(len(ids), cache) else None

    def _next(self, compiled: CompiledLayers, tokens: np.ndarray, cache: Cache, likely_only: bool) -> F32:
        """`forward` for one token that is alone."""
        _settled(cache, 1)
        with threads(self.threads):
            logits = compiled.next(tokens, cache, self.preview if likely_only else None)
            cache.advance(1)
            return self._capped(logits)

    def _capped(self, logits: F32) -> F32:
        return logits if self.config.logit_cap is None else soft_cap(logits, self.config.logit_cap)

    def _head(self, x: F32, taps: Taps) -> F32:
        if len(x) == 1 and not taps.patterns and not runs_formulas() and self._compiled:
            logits = self._compiled.logits(x)
        else:
            x = taps("final_norm", rms_norm(x, self.weights.final_norm, self.config.eps))
            logits = linear(x, self.weights.scores)
        return taps("logits", self._capped(logits))

    def _checked(self, ids: Sequence[int]) -> np.ndarray:
        """The ids as an array, or a ValueError that says what is wrong with them: kernels check no index."""
        if type(ids) is list and len(ids) == 1 and type(ids[0]) is int and 0 <= ids[0] < self.config.vocab:
            return np.array(ids)  # at once: so comes each token that is generated
        tokens = np.asarray(ids)
        if tokens.ndim != 1 or not len(tokens):
            raise ValueError(f"ids must be a sequence of at least one token id, not of shape {list(tokens.shape)}")
        if tokens.dtype.kind not in "iu":
            raise ValueError(f"token ids must be whole numbers, not {tokens.dtype}")
        wrong = (tokens < 0) | (tokens >= self.config.vocab)
        wrong = tokens[wrong & (tokens != self.vision.image_token) if self.vision else wrong]
        if len(wrong):
            raise ValueError(
                f"token id {wrong[0]} is outside the vocabulary of {self.config.vocab} (0 … {self.config.vocab - 1})"
            )
        return tokens.astype(np.int64)

    def _checked_images(self, images: Any, runs: int | None) -> F32:
        """Images or their features as an array, as many as there are runs of image tokens; or a ValueError."""
        given = 0 if images is None else len(images)
        vision = self.vision
        if vision is None:
            return np.empty((0, 0, 0), np.float32)
        if runs is not None and given != runs:
            raise ValueError(f"{given} images were given, and the ids have the tokens of {runs}")
        if not given:
            return np.empty((0, vision.tokens, self.config.width), np.float32)
        array = np.asarray(images)
        shapes = {(3, vision.side, vision.side): "an image", (vision.tokens, self.config.width): "an image's features"}
        if array.shape[1:] not in shapes or array.dtype != np.float32 or (runs is None and array.ndim == 3):
            raise ValueError(
                f"images are {array.dtype} {list(array.shape)}; they must be float32 [n, 3, {vision.side}, "
                f"{vision.side}] with values from -1 to 1, which images.prepare makes of a file"
            )
        if not np.isfinite(array).all():
            raise ValueError("an image has values that are infinite or not a number")
        if array.ndim == 4 and abs(array).max() > 1.001:
            raise ValueError(f"an image has values up to {abs(array).max():g}; they must be from -1 to 1")
        return np.ascontiguousarray(array)


def _settled(cache: Cache, tokens: int) -> None:
    """Finish what a call left undone that was interrupted; ValueError if there is no room for so many tokens more."""
    cache.settle()
    if cache.position + tokens > cache.max_tokens:
        held = f"{cache.position} held + {tokens} new tokens"
        raise ValueError(f"{held} are more than the cache's {cache.max_tokens}; make it with new_cache(max_tokens=…)")


def pieces(count: int, runs: Sequence[tuple[int, int]], size: int) -> list[tuple[int, int]]:
    """Cut `count` tokens into pieces of `size`, (first, last + 1) each, but never through one of `runs`.

    >>> pieces(10, [(3, 7)], 4)
    [(0, 3), (3, 7), (7, 10)]
    """
    cuts = [0]
    while cuts[-1] < count:
        end = min(cuts[-1] + size, count)
        for first, last in runs:
            if first < end < last:
                end = first if first > cuts[-1] else last
        cuts.append(end)
    return list(pairwise(cuts))
