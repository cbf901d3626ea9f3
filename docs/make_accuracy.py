"""Print docs/accuracy.md: what each format of the weights, and of keys and values, costs on real text.

python docs/make_accuracy.py > docs/accuracy.md          (--chunks 1 for a quick look)

The demo weights in float32 are the reference; the others read the same tokens beside it, a piece at a time, so that
the logits of one piece are all that is ever held.
"""

from __future__ import annotations

import argparse
import copy
import importlib
import platform
import pydoc_data.topics
import sys
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, fields, is_dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

import minigemma as mg
from minigemma.arrays import F32, read_only
from minigemma.decoder import Decoder
from minigemma.peers import weight_bytes
from minigemma.quantize import quantise_int4, quantise_int8

PROSE = Path(__file__).parent.parent / "tests" / "data" / "prose.txt"
TOPICS = ("objects", "types", "execmodel", "specialnames")  # chapters of Python's language reference, mostly sentences
CHUNK = 1024  # tokens that are read with one cache, BOS among them
WARM = 128  # tokens that stand before the first position that counts
PIECE = 64  # tokens whose logits exist at once
ROWS = 8  # of them that one thread turns into float64

Read = Callable[[Sequence[int]], F32]  # the next tokens of a chunk → their logits [T, V]


@dataclass
class Found:
    """What one reader's distributions were, at every position that counts."""

    kl: list[float] = field(default_factory=list)  # from the reference's, in nats
    same: list[bool] = field(default_factory=list)  # is the likeliest token the reference's?
    logprob: list[float] = field(default_factory=list)  # of the token that follows

    @property
    def perplexity(self) -> float:
        """exp of the mean negative log-probability."""
        return float(np.exp(-np.mean(self.logprob)))

    @property
    def numbers(self) -> tuple[float, float, float, float]:
        """Mean KL, its 99th percentile, the share of equal likeliest tokens, perplexity."""
        return float(np.mean(self.kl)), float(np.percentile(self.kl, 99)), float(np.mean(self.same)), self.perplexity


@dataclass(frozen=True)
class Contender:
    """Something that reads: `begin` forgets what it read and gives the function that reads on."""

    name: str
    size: int  # bytes of weights
    begin: Callable[[], Read]


def contender(name: str, model: Decoder, step: int = PIECE) -> Contender:
    """A model of minigemma that reads `step` tokens in a call."""

    def begin() -> Read:
        cache = model.new_cache(CHUNK)

        def read(ids: Sequence[int]) -> F32:
            return np.concatenate([model.forward(ids[i : i + step], cache) for i in range(0, len(ids), step)])

        return read

    return Contender(name, weight_bytes(model.weights), begin)


def llama_cpp(model: Decoder, size: int) -> Contender:
    """llama.cpp on the file that `model` came from."""
    library = importlib.import_module("llama_cpp")
    settings = {"n_ctx": CHUNK, "n_batch": PIECE, "n_threads": model.threads, "n_threads_batch": model.threads}
    llama = library.Llama(model_path=str(model.path), logits_all=True, verbose=False, **settings)

    def begin() -> Read:
        llama.reset()

        def read(ids: Sequence[int]) -> F32:
            llama.eval(list(ids))
            return llama.scores[llama.n_tokens - len(ids) : llama.n_tokens]

        return read

    return Contender(f"llama.cpp (llama-cpp-python {library.__version__}) on the same file", size, begin)


def log_softmax(logits: F32) -> NDArray[np.float64]:
    """log p of every token, in float64: logits [T, V] → [T, V]."""
    z = logits.astype(np.float64)
    z -= z.max(axis=-1, keepdims=True)
    return z - np.log(np.exp(z).sum(axis=-1, keepdims=True))


def judge(reference: F32, logits: F32, following: NDArray, found: Found) -> None:
    """Add to `found` what a reader's logits [T, V] say beside the reference's, `following` [T] being what came."""

    def rows(first: int) -> tuple[NDArray, NDArray, NDArray]:
        here = slice(first, first + ROWS)
        p, q = log_softmax(reference[here]), log_softmax(logits[here])
        kl = np.einsum("tv,tv->t", np.exp(p), p - q)
        chosen = following[here]
        return kl, reference[here].argmax(-1) == logits[here].argmax(-1), q[np.arange(len(q)), chosen]

    with ThreadPoolExecutor() as pool:
        for kl, same, logprob in pool.map(rows, range(0, len(logits), ROWS)):
            found.kl += kl.tolist()
            found.same += same.tolist()
            found.logprob += logprob.tolist()


def compare(
    reference: Contender, others: Sequence[Contender], chunks: Sequence[NDArray], warm: int = WARM
) -> dict[str, Found]:
    """Let all read all chunks; positions count that have `warm` tokens before them and one after them."""
    found = {c.name: Found() for c in (reference, *others)}
    began = time.perf_counter()
    for number, ids in enumerate(chunks, 1):
        reads = [(c.name, c.begin()) for c in others]
        read_reference = reference.begin()
        for first in range(0, len(ids), PIECE):
            piece = ids[first : first + PIECE]
            counted = slice(max(warm - first, 0), min(len(ids) - 1 - first, PIECE))
            following = ids[first + 1 : first + 1 + PIECE][counted]
            truth = read_reference(piece)[counted]
            for name, read in [*reads, (reference.name, None)]:
                logits = read(piece)[counted] if read else truth
                judge(truth, logits, following, found[name])
        print(f"{number} of {len(chunks)} chunks, {time.perf_counter() - began:.0f} s", file=sys.stderr)
    return found


def texts(model: Decoder, chunks: int) -> tuple[list[NDArray], int]:
    """So many chunks of ids, BOS first in each, and how many of them are prose; the others are Python's manual."""
    manual = "\n\n".join(pydoc_data.topics.topics[name] for name in TOPICS)
    made: list[NDArray] = []
    prose = 0
    for text in (PROSE.read_text("utf-8"), manual):
        ids, inside = model.tokenizer.encode(text), CHUNK - 1
        for first in range(0, len(ids) - inside + 1, inside):
            made.append(np.array([model.tokenizer.bos, *ids[first : first + inside]]))
        prose = prose or len(made)
    if chunks > len(made):
        raise SystemExit(f"the texts make {len(made)} chunks of {CHUNK} tokens, not {chunks}")
    return made[:chunks], min(prose, chunks)


def remade(weights: Any, make: Callable[[F32], NDArray]) -> Any:
    """The tree of dataclasses and tuples that a model's weights are, every matrix in another format."""
    if is_dataclass(weights):
        parts = {f.name: remade(getattr(weights, f.name), make) for f in fields(weights)}
        return replace(weights, **parts)  # type: ignore[type-var]
    if isinstance(weights, tuple):
        return tuple(remade(part, make) for part in weights)
    return read_only(make(weights)) if getattr(weights, "ndim", 0) == 2 else weights


def altered(model: Decoder, **attributes: Any) -> Decoder:
    """The model with something else in place of some of its attributes."""
    other = copy.copy(model)
    for name, value in attributes.items():
        setattr(other, name, value)
    return other


PAGE = """# What each format costs in accuracy

The demo weights, {file} ({types}), read {tokens:,} tokens of English: {chunks} chunks of {chunk:,} tokens, BOS
among them, each with an empty cache. {prose} are of Carroll, Austen and Melville (`tests/data/prose.txt`), {manual} of the manual
that Python {python} brings (`pydoc_data.topics`; another Python's may differ). The {counted:,} positions count that have at least
{warm} tokens of their chunk before them and one after them.

The reference is `dtype="f32"`, the exact mode: the file's own weights widened to float32, all arithmetic in float32, keys and
values too. KL is KL(reference ‖ row) in nats over the whole vocabulary, in float64. What the file lost when it was quantised
is in every row, the reference among them, so that no row says how far a model is from the bf16 weights that Google released.

Made by `python docs/make_accuracy.py > docs/accuracy.md` with minigemma {version} on {threads} threads; many tokens are multiplied by
{unit}.

## Weights

As `load(dtype=…)` makes them of this file, keys and values in bf16, {piece} tokens in a call; bytes are those of all weights.

{weights}

{stored} Rows with "from float32" go the way of a bf16 checkpoint's weights: what they were
quantised to before is not made use of.

## Keys and values, and the rest

The weights in float32, one thing changed; and the formats again as decoding computes them, where x is rounded to 16 bits.
Bytes are those of keys and values after {chunk:,} tokens.

{rest}

## A file of its own kind

{llama}

llama.cpp multiplies blocks of 8-bit activations, keeps keys and values in float16, and scales embeddings by √{width} itself
where minigemma takes the {scale} that it is in bf16 (docs of `minigemma/decoder.py`); the last row is the reference with that one
number changed.
"""
