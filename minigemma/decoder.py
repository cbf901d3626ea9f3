"""The frame that all Gemmas share: embed, run the blocks over a cache, norm, and score every token of the vocabulary.

    x      = E[ids] · √D
    x      = block_i(x)                      i = 0 … layers - 1: what a paper's own file defines
    logits = E · RMSNorm(x)                  the head is the embedding, unscaled; soft-capped in Gemma 2

√D: all of DeepMind's bf16 runs round it to bf16 (25.25 for 270M, where √640 = 25.298), so it is rounded here wherever
the embedding is stored in bf16 or quantised, and not where it is stored in float32.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from .arrays import F32, round_bf16, widen_bf16
from .backend import default_threads, formulas_only, threads
from .cache import Cache, KeyValueRing, LayerState
from .config import TextConfig
from .linear import Weight, embed, linear
from .rmsnorm import rms_norm
from .softcap import soft_cap
from .taps import NO_TAPS, Scope, Taps

PIECE = 256  # tokens that go through the layers together: what bounds the memory of a long prompt


@dataclass(frozen=True)
class DecoderWeights:
    """All weights of a text model."""

    embedding: Weight  # [V, D]
    blocks: tuple[Any, ...]  # one for each layer, of the dataclass that the model's file defines
    final_norm: F32  # [D]
    head: Weight | None = None  # [V, D], where a file holds one that is not the embedding


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
        eos: tuple[int, ...] = (1,),
        instruction_tuned: bool = False,
    ) -> None:
        self.config, self.weights, self.tokenizer = config, weights, tokenizer
        self.name = config.name
        self.exact = exact  # keys and values in float32, not bf16
        self.backend, self.threads = backend, threads or default_threads()
        self.eos, self.instruction_tuned = eos, instruction_tuned
        scale = np.sqrt(np.float32(config.width))
        self.embedding_scale = float(widen_bf16(round_bf16(np.array([scale])))[0] if round_scale else scale)

    @property
    def vocab_limit(self) -> int:
        """Ids from here on are rows of the embedding that no token has; they are never sampled."""
        return min(self.config.vocab, self.tokenizer.size) if self.tokenizer else self.config.vocab

    @property
    def banned(self) -> tuple[int, ...]:
        """Ids that are never sampled: the marks around images, which a text cannot continue with."""
        marks = ("<start_of_image>", "<end_of_image>")
        ids = (self.tokenizer.id_of(mark) for mark in marks) if self.tokenizer else ()
        return tuple(i for i in ids if i is not None)

    def new_cache(self, max_tokens: int) -> Cache:
        """An empty cache for a sequence of at most `max_tokens`."""
        if max_tokens < 1:
            raise ValueError(f"a cache for {max_tokens} tokens; it needs room for 1 at least")
        return Cache(tuple(self.layer_state(i, max_tokens) for i in range(self.config.layers)), max_tokens)

    def layer_state(self, layer: int, max_tokens: int) -> LayerState:
        """What one layer begins with: an empty ring, as long as its window or the whole sequence."""
        c = self.config
        limit = min(c.attention(layer).window or max_tokens, max_tokens)
        return KeyValueRing(limit, c.kv_heads, c.head_dim, np.float32 if self.exact else np.uint16)

    def forward(
        self,
        ids: Sequence[int],
        cache: Cache | None = None,
        images: Any = None,
        last_only: bool = False,
        taps: Taps | None = None,
    ) -> F32:
        """Logits of the token that follows each of `ids`: float32 [T, V], or [1, V] of the last one with `last_only`.

        Without a cache, ids are the whole sequence; with one they follow what it holds, in pieces of any length, and it
        holds them afterwards. `taps` is filled with the values that it names; then all of ids go through in one piece.

        Raises ValueError for ids outside the vocabulary, no ids, more of them than the cache has room for, and images.
        """
        tokens = self._checked(ids, images)
        cache = cache or self.new_cache(len(tokens))
        cache.settle()
        if cache.position + len(tokens) > cache.max_tokens:
            held = f"{cache.position} held + {len(tokens)} new tokens"
            raise ValueError(
                f"{held} are more than the cache's {cache.max_tokens}; make it with new_cache(max_tokens=…)"
            )
        taps = NO_TAPS if taps is None else taps
        piece = len(tokens) if taps.patterns else PIECE
        with formulas_only(self.backend == "numpy"), threads(self.threads):
            outputs = []
            for first in range(0, len(tokens), piece):
                x = self._layers(tokens[first : first + piece], cache, taps)
                if not last_only:
                    outputs.append(self._head(x, taps))
            return self._head(x[-1:], taps) if last_only else np.concatenate(outputs) if outputs[1:] else outputs[0]

    @abstractmethod
    def block(self, x: F32, layer: int, state: Any, position: int, taps: Scope) -> F32:
        """One layer: x [T, D], the tokens from `position` on, → [T, D] float32."""

    def _layers(self, ids: np.ndarray, cache: Cache, taps: Taps) -> F32:
        x = taps("embedding", embed(ids, self.weights.embedding, self.embedding_scale))
        for layer, state in enumerate(cache.layers):
            x = self.block(x, layer, state, cache.position, taps.within(f"blocks.{layer}"))
        cache.advance(len(ids))
        return x

    def _head(self, x: F32, taps: Taps) -> F32:
        w = self.weights
        x = taps("final_norm", rms_norm(x, w.final_norm, self.config.eps))
        logits = linear(x, w.embedding if w.head is None else w.head)
        if self.config.logit_cap is not None:
            logits = soft_cap(logits, self.config.logit_cap)
        return taps("logits", logits)

    def _checked(self, ids: Sequence[int], images: Any) -> np.ndarray:
        """The ids as an array, or a ValueError that says what is wrong with them: kernels check no index."""
        if images is not None and len(images):
            raise ValueError(
                f"{self.name or 'this model'} has no vision tower, but {len(images)} image(s) were given; "
                "use gemma-3-4b or larger"
            )
        tokens = np.asarray(ids)
        if tokens.ndim != 1 or not len(tokens):
            raise ValueError(f"ids must be a sequence of at least one token id, not of shape {list(tokens.shape)}")
        if tokens.dtype.kind not in "iu":
            raise ValueError(f"token ids must be whole numbers, not {tokens.dtype}")
        wrong = tokens[(tokens < 0) | (tokens >= self.config.vocab)]
        if len(wrong):
            raise ValueError(
                f"token id {wrong[0]} is outside the vocabulary of {self.config.vocab} (0 … {self.config.vocab - 1})"
            )
        return tokens.astype(np.int64)
