"""The frame that all Gemmas share: embed, run the blocks over a cache, norm, and score every token of the vocabulary.

    x      = E[ids] · √D
    x      = block_i(x)                      i = 0 … layers - 1: defined on each paper's page
    x      = RMSNorm(x)                      the hidden states
    logits = E · x                           the head is the embedding, unscaled; soft-capped in Gemma 2

With images, x of an image's tokens is the output of the vision tower, unscaled (Gemma 3 §2.1; siglip.py).

√D: all of DeepMind's bf16 runs round it to bf16 (25.25 for 270M, where √640 = 25.298), so it is rounded here wherever
the embedding is stored in bf16 or quantized, and not where it is stored in float32.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager
from copy import copy
from dataclasses import dataclass
from functools import cached_property
from itertools import pairwise
from pathlib import Path
from types import MappingProxyType
from typing import Any, Self

import numpy as np
from numpy.typing import NDArray

from ..arrays import F32, round_bf16, widen_bf16
from ..blocks.layers import LayerWeights, attention_layer, recurrent_layer
from ..blocks.siglip import VisionWeights, soft_tokens, vision_tower
from ..cache import Cache, KeyValueRing, LayerState, TokenPositions
from ..config import TextConfig, VisionConfig
from ..errors import check_type, no_vision
from ..formulas.linear import embed, linear
from ..formulas.rmsnorm import rms_norm
from ..formulas.softcap import soft_cap
from ..formulas.two_pass_head import CoarseHead, coarse_head_of
from ..kernels.parallel import default_threads, threads
from ..layouts.weight import Adapted, Weight
from ..taps import NO_TAPS, Scope, Taps
from . import fused
from .vocabulary import Vocabulary
from .weights import fingerprint_of, replaced

PREFILL_CHUNK = 256  # tokens that go through the layers together, which bounds the memory of a long prompt


@dataclass(frozen=True, eq=False)
class DecoderWeights:
    """All weights of a text model."""

    embedding: Weight  # [V, D]
    blocks: tuple[LayerWeights, ...]
    final_norm: F32  # [D]
    head: Weight | None = None  # [V, D], where a file holds a head of its own
    vision: VisionWeights | None = None
    dense: tuple[Weight, ...] = ()  # of EmbeddingGemma, after the mean: [P, D], [E, P]

    def __repr__(self) -> str:
        """How many layers, and the shape of the embedding."""
        return f"<DecoderWeights: {len(self.blocks)} layers, embedding {list(self.embedding.shape)}>"

    @property
    def scores(self) -> Weight:
        """The matrix of the logits, [V, D]: the head, or the embedding where there is none."""
        return self.embedding if self.head is None else self.head


@dataclass(frozen=True)
class ImageSpan:
    """The tokens first … last - 1 of a call are an image; `features` [last - first, D] replace their embeddings."""

    first: int
    last: int
    features: F32


class Decoder:
    """A text model: config, weights and tokenizer; no state."""

    path: Path | None = None  # the file or folder it was loaded from
    eos: tuple[int, ...] = (1,)  # ids that end a text
    instruction_tuned = False
    sampling: Mapping[str, Any] = MappingProxyType({})  # the checkpoint's own settings: temperature, top_k, …
    foreign_turns: str = ""  # a mark of its chat template, where that is not Gemma's
    bidirectional = False  # tokens see later ones, so that all go through the layers in one chunk

    def __init__(
        self,
        config: TextConfig,
        weights: DecoderWeights,
        *,
        tokenizer: Vocabulary | None = None,
        exact: bool = False,
        round_scale: bool = True,
        backend: str = "numba",
        threads: int | None = None,
        coarse_head_fits: bool = True,
    ) -> None:
        self.config, self.weights, self.tokenizer, self.name = config, weights, tokenizer, config.name
        self.attention = tuple(config.attention(i) for i in range(config.layers))
        self.exact = exact  # keys and values in float32, not bf16
        self.backend, self.threads = backend, threads or default_threads()
        self.coarse_head_fits = coarse_head_fits  # there is memory for `coarse_head`
        scale = np.sqrt(np.float32(config.width))
        self.embedding_scale = float(widen_bf16(round_bf16(np.array([scale])))[0] if round_scale else scale)

    def __repr__(self) -> str:
        """Family, name and sizes."""
        c, name = self.config, self.name or "without a name"
        return f"<{type(self).__name__} {name}: {c.layers} layers, width {c.width}, {c.vocab:,} tokens>"

    @property
    def vocab_limit(self) -> int:
        """Ids from here on are rows of the embedding without a token; they are never sampled."""
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
        check_type("max_tokens", max_tokens, (int, np.integer), "an integer", optional=False)
        if max_tokens < 1:
            raise ValueError(f"a cache for {max_tokens} tokens; it needs room for 1 at least")
        states = (self.layer_state(i, max_tokens, kept) for i in range(self.config.layers))
        return Cache(tuple(states), max_tokens, lambda: fingerprint_of(self.config, self.weights))

    def layer_state(self, layer: int, max_tokens: int, dtype: type) -> LayerState:
        """The initial state of one layer: an empty ring, as long as its window or the whole sequence."""
        c = self.config
        limit = min(self.attention[layer].window or max_tokens, max_tokens)
        return KeyValueRing(limit, c.kv_heads, c.head_dim, dtype)

    def forward(
        self,
        ids: Sequence[int],
        cache: Cache | None = None,
        images: Any = None,
        last_only: bool = False,
        taps: Taps | None = None,
    ) -> F32:
        """Logits of the token that follows each of `ids`: float32 [T, V], or [1, V] of the last one with `last_only`.

        Without a cache, ids are the whole sequence. With one they follow the tokens in it, in chunks of any length, and
        are in it afterwards. `images` are float32 [n, 3, side, side] in [-1, 1], one for each run of image tokens in
        ids, or their `image_features`, [n, tokens, D]; the tokens of an image come in one call. `taps` is filled with
        the values that it names, and changes them if it is `Edits`; all of ids then go through the layers in one chunk.

        Raises ValueError for ids outside the vocabulary, no ids, more of them than the cache has room for, and images
        that do not fit them.
        """
        all_scored = not last_only or (taps is not None and taps.wants("logits"))
        logits = self.head(self.hidden_states(ids, cache, images, not all_scored, taps), taps)
        return logits[-1:] if last_only else logits

    def hidden_states(
        self,
        ids: Sequence[int],
        cache: Cache | None = None,
        images: Any = None,
        last_only: bool = False,
        taps: Taps | None = None,
    ) -> F32:
        """The output of the last layer after the final norm, float32 [T, D], or [1, D] with `last_only`.

        Arguments and errors are those of `forward`.
        """
        check_type("taps", taps, Taps, "mg.Taps(pattern, …) or mg.Edits")
        check_type("cache", cache, Cache, "one that model.new_cache made")
        taps = NO_TAPS if taps is None else taps
        check_type("images", images, (Sequence, np.ndarray), "an array of images, or of their features")
        if images is not None and len(images):
            self._tower(len(images))  # said before what is wrong with the ids, which then may hold image tokens
        tokens = self.checked_ids(ids)
        runs = self.image_runs(tokens)
        spans = self._spans(runs, images, taps)
        cache = cache or self.new_cache(len(tokens))
        cache.settle()
        check_room(cache, len(tokens))
        with self.running():
            rows, whole = [], taps.patterns or self.bidirectional
            for first, last in chunks(len(tokens), runs, len(tokens) if whole else PREFILL_CHUNK):
                x, places = self._embedded(tokens, first, last, spans, cache.position)
                rows.append(self.layers(taps("embedding", x), places, [cache], taps, last_only))
                taps.check("final_norm", "logits")  # a misspelt pattern leaves the cache as it was
                cache.advance(tokens[first:last])
            tail = rows[-1] if taps.patterns else rows[-1][-1:]
            x = tail if last_only else np.concatenate(rows) if rows[1:] else rows[0]
            x = taps("final_norm", rms_norm(x, self.weights.final_norm, self.config.eps))
            return x[-1:] if last_only else x

    def head(self, x: F32, taps: Taps | None = None) -> F32:
        """Logits from hidden states: float32 [T, D] → [T, V]."""
        with self.running():
            logits = linear(x, self.weights.scores)
            if self.config.logit_cap is not None:
                logits = soft_cap(logits, self.config.logit_cap)
            return logits if taps is None else taps("logits", logits)

    def block(self, x: F32, layer: int, state: Any, tokens: TokenPositions, taps: Scope) -> F32:
        """One layer: the residual of `tokens`, x [T, D], → [T, D], or the last `tokens.outputs` rows of it.

        A page whose layers do something else has a block of its own.
        """
        w = self.weights.blocks[layer]
        if w.attention is None:
            return recurrent_layer(x, w, self.config.eps, state, tokens, taps)
        return attention_layer(x, w, self.attention[layer], state, tokens, taps)

    def with_weights(self, changed: Mapping[str, Weight | F32]) -> Self:
        """A copy of this model with other weights under the given names ("blocks.5.attention.o"); this one stays as it
        is, and all other weights are shared. Float32 arrays are rounded to the layout of the weight they replace.

        Raises ValueError for a name that the model does not have, with the nearest, and for another shape.
        """
        model = copy(self)
        model.weights = replaced(self.weights, changed)
        model.__dict__.pop("coarse_head", None)  # made of the old weights
        return model

    def image_features(self, images: Any, taps: Taps | None = None) -> F32:
        """The tokens of images for the text model: float32 [n, 3, side, side] in [-1, 1] → float32 [n, tokens, D].

        Taps of image i are named "images.i.…". Raises ValueError for other shapes and a model without a vision tower.
        """
        vision, weights = self._tower(len(images))
        images, taps = self._checked_images(images, None), NO_TAPS if taps is None else taps
        features = np.empty((len(images), vision.tokens, self.config.width), np.float32)
        with self.running():
            for i, pixels in enumerate(images):
                scope = taps.within(f"images.{i}")
                features[i] = soft_tokens(vision_tower(pixels, weights, vision, scope), weights, vision, scope)
        return features

    def vision_tower(self, pixels: Any) -> F32:
        """The vision tower alone: one image, float32 [3, side, side] in [-1, 1], → [P, C] float32."""
        vision, weights = self._tower(1)
        pixels = self._checked_images(np.asarray(pixels)[None], None)[0]
        with self.running():
            return vision_tower(pixels, weights, vision, NO_TAPS.within("images.0"))

    def _tower(self, images: int) -> tuple[VisionConfig, VisionWeights]:
        """Config and weights of the vision tower, or the ValueError for that many images where there is none."""
        if self.vision is None or self.weights.vision is None:
            raise no_vision(self.name, images)
        return self.vision, self.weights.vision

    def image_runs(self, ids: Sequence[int] | NDArray) -> list[tuple[int, int]]:
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

    def running(self) -> AbstractContextManager[None]:
        """Inside this block, the model's backend and number of threads."""
        return threads(self.threads, formulas=self.backend == "numpy")

    def _spans(self, runs: Sequence[tuple[int, int]], images: Any, taps: Taps) -> list[ImageSpan]:
        """The runs of image tokens with the features of their images."""
        images = self._checked_images(images, len(runs))
        features = images if images.ndim == 3 else self.image_features(images, taps)
        return [ImageSpan(*run, feature) for run, feature in zip(runs, features, strict=True)]

    def _embedded(
        self, ids: NDArray, first: int, last: int, spans: Sequence[ImageSpan], position: int
    ) -> tuple[F32, TokenPositions]:
        """The tokens first … last - 1 of `ids`, the first of them at `position`: the embedding, and their positions."""
        chunk = ids[first:last]
        if self.vision:  # not every embedding has a row for the image token
            chunk = np.where(chunk == self.vision.image_token, 0, chunk)
        x = embed(chunk, self.weights.embedding, self.embedding_scale)
        positions = last_visible = np.arange(position, position + len(chunk), dtype=np.int32)
        for span in spans:
            if first <= span.first < last:
                inside = slice(span.first - first, span.last - first)
                last_visible = last_visible.copy()
                x[inside], last_visible[inside] = span.features, positions[inside][-1]
        return x, TokenPositions(positions, last_visible, len(chunk))

    def layers(
        self, x: F32, tokens: TokenPositions, caches: Sequence[Cache], taps: Taps = NO_TAPS, last_only: bool = False
    ) -> F32:
        """All layers: x [T, D] of one sequence, or of each cache the next token, → [T, D]; or [1, D] of the last token
        with `last_only` and no taps. Nothing checks the arguments; the caches have yet to `advance`.
        """
        if (len(x) == 1 or tokens.starts) and not taps.patterns and type(self).block is Decoder.block:
            done = fused.decode(x, self.weights, self.attention, caches, tokens)
            if done is not None:
                return done
        final, states = len(self.attention) - 1, zip(*(cache.layers for cache in caches), strict=True)
        for layer, state in enumerate(states):
            if layer == final and last_only and not taps.patterns:  # the other tokens only leave keys and values
                tokens = TokenPositions(tokens.positions, tokens.last_visible, outputs=1)
            x = self.block(x, layer, state if tokens.starts else state[0], tokens, taps.within(f"blocks.{layer}"))
        return x

    @cached_property
    def coarse_head(self) -> CoarseHead | None:
        """The coarse copy of the head that finds likely next tokens, made when first used. None in the exact mode,
        without memory for it, and for a head that is small, has few bits already or an adapter.
        """
        if not self.coarse_head_fits or self.exact or isinstance(self.weights.scores, Adapted):
            return None
        return coarse_head_of(self.weights.scores, self.weights.final_norm)

    def checked_ids(self, ids: Sequence[int]) -> NDArray:
        """The ids as an array, or a ValueError that says what is wrong with them: kernels check no index."""
        if type(ids) is list and len(ids) == 1 and type(ids[0]) is int and 0 <= ids[0] < self.config.vocab:
            return np.array(ids)  # at once: so comes each token that is generated
        if isinstance(ids, (str, bytes)):
            raise ValueError("ids is a text; give the ids of its tokens, as model.tokenizer.encode(text) does")
        tokens = np.asarray(ids)
        if tokens.ndim != 1 or not len(tokens):
            raise ValueError(f"ids must be a sequence of at least one token id, not of shape {list(tokens.shape)}")
        if tokens.dtype.kind not in "iu":
            raise ValueError(f"token ids must be integers, not {tokens.dtype}")
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


def check_room(cache: Cache, tokens: int) -> None:
    """Raises ValueError if the cache has no room for that many tokens more."""
    if cache.position + tokens > cache.max_tokens:
        held = f"{cache.position} held + {tokens} new tokens"
        raise ValueError(f"{held} are more than the cache's {cache.max_tokens}; make it with new_cache(max_tokens=…)")


def chunks(count: int, runs: Sequence[tuple[int, int]], size: int) -> list[tuple[int, int]]:
    """Cut `count` tokens into chunks of `size`, (first, last + 1) each, but never through one of `runs`.

    >>> chunks(10, [(3, 7)], 4)
    [(0, 3), (3, 7), (7, 10)]
    """
    if count <= size:
        return [(0, count)]
    cuts = [0]
    while cuts[-1] < count:
        end = min(cuts[-1] + size, count)
        for first, last in runs:
            if first < end < last:
                end = first if first > cuts[-1] else last
        cuts.append(end)
    return list(pairwise(cuts))
