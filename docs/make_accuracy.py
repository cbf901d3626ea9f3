"""Print docs/accuracy.md: the accuracy cost of each layout of weights, and of keys and values, on real text.

python docs/make_accuracy.py > docs/accuracy.md          (--chunks 1 for a quick look)

The demo weights in float32 are the reference. All models read the same tokens chunk by chunk, so only the logits of one
chunk exist at a time.
"""

from __future__ import annotations

import argparse
import copy
import ctypes
import importlib
import platform
import pydoc_data.topics
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, fields, is_dataclass, replace
from itertools import islice
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
from numba import get_num_threads
from numpy.typing import NDArray

import minigemma as mg
from minigemma.arrays import F32
from minigemma.cli.measure import weight_bytes
from minigemma.files.convert import FORMATS
from minigemma.files.load import describe
from minigemma.kernels.amx import choice
from minigemma.kernels.parallel import chunk, parallel
from minigemma.layouts import LAYOUTS, Weight
from minigemma.models.decoder import Decoder
from minigemma.text.generation import sampling_logits

PROSE = Path(__file__).parent.parent / "tests" / "data" / "prose.txt"
TOPICS = ("objects", "types", "execmodel", "specialnames")  # chapters of Python's language reference, mostly sentences
CHUNK = 1024  # tokens per cache, BOS included
WARM = 128  # tokens before the first scored position
PREFILL_CHUNK = 64  # tokens whose logits exist at once
TOGETHER = 5  # models compared with the reference in one pass

Read = Callable[[Sequence[int]], F32]  # the next tokens of a chunk → their logits [T, V]
Row = tuple[str, int, float, float, float, float]  # name, bytes of weights, and a Found's numbers


@dataclass
class Found:
    """One model's distributions at every scored position."""

    kl: list[float] = field(default_factory=list)  # from the reference's, in nats
    same: list[bool] = field(default_factory=list)  # is the likeliest token the reference's?
    logprob: list[float] = field(default_factory=list)  # of the token that came

    def add(self, reference: F32, logits: F32, following: NDArray) -> None:
        """Adds positions."""
        kl, same, logprob = np.empty(len(logits)), np.empty(len(logits), bool), np.empty(len(logits))
        judge(get_num_threads(), reference, logits, following, kl, same, logprob)
        self.kl += kl.tolist()
        self.same += same.tolist()
        self.logprob += logprob.tolist()

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
    """A model that reads tokens: `begin` clears its cache and returns the function that reads on."""

    name: str
    size: int  # bytes of weights
    begin: Callable[[], Read]


def contender(name: str, model: Decoder, step: int = PREFILL_CHUNK, likely: bool = False) -> Contender:
    """A minigemma model that reads `step` tokens per call; with `likely`, one token with the coarse head."""

    def begin() -> Read:
        cache = model.new_cache(CHUNK)

        def read(ids: Sequence[int]) -> F32:
            if likely:
                return np.stack([sampling_logits(model, token, cache) for token in ids])
            return np.concatenate([model.forward(ids[i : i + step], cache) for i in range(0, len(ids), step)])

        return read

    return Contender(name, weight_bytes(model.weights), begin)


def llama_cpp(model: Decoder, name: str = "llama.cpp") -> Contender:
    """llama.cpp on the file that `model` came from; ImportError where it is not installed."""
    library = importlib.import_module("llama_cpp")
    settings = {"n_ctx": CHUNK, "n_batch": PREFILL_CHUNK, "n_threads": model.threads, "n_threads_batch": model.threads}
    llama = library.Llama(model_path=str(model.path), logits_all=True, verbose=False, **settings)

    def begin() -> Read:
        llama.reset()

        def read(ids: Sequence[int]) -> F32:
            llama.eval(list(ids))
            return llama.scores[llama.n_tokens - len(ids) : llama.n_tokens]

        return read

    size = sum(size for _, _, size in describe(model.path).tensors.values())
    return Contender(f"{name} (llama-cpp-python {library.__version__})", size, begin)


def q4_0_file(model: Decoder, folder: Path) -> Path:
    """The file that `model` came from, its layers made Q4_0 by llama.cpp and its embedding Q8_0."""
    library, path = importlib.import_module("llama_cpp"), folder / "q4_0.gguf"
    wanted = library.llama_model_quantize_default_params()
    wanted.ftype, wanted.token_embedding_type = library.LLAMA_FTYPE_MOSTLY_Q4_0, library.GGML_TYPE_Q8_0
    wanted.allow_requantize = True
    if library.llama_model_quantize(str(model.path).encode(), str(path).encode(), ctypes.byref(wanted)):
        raise SystemExit("llama.cpp could not make the Q4_0 file")
    return path


@parallel
def judge(worker, workers, reference, logits, following, kl, same, logprob):
    """Compare logits [T, V] with the reference's, in float64; `following` [T] are the tokens that came.

    kl [T] = Σ p (log p - log q); same [T]: is the likeliest token the same one?; logprob [T] = log q of what came.
    """
    for t in chunk(worker, workers, len(reference)):
        p, q = reference[t], logits[t]
        top_p, top_q = np.float64(p.max()), np.float64(q.max())
        sum_p, sum_q, apart = 0.0, 0.0, 0.0
        for v in range(p.size):
            a, b = p[v] - top_p, q[v] - top_q
            e = np.exp(a)
            sum_p, sum_q, apart = sum_p + e, sum_q + np.exp(b), apart + e * (a - b)
        kl[t] = apart / sum_p - np.log(sum_p) + np.log(sum_q)
        same[t] = p.argmax() == q.argmax()
        logprob[t] = q[following[t]] - top_q - np.log(sum_q)


def compare(
    reference: Contender, others: Sequence[Contender], chunks: Sequence[NDArray], warm: int = WARM
) -> dict[str, Found]:
    """Lets all models read all chunks; scores positions with `warm` tokens before them and one after."""
    found = {c.name: Found() for c in (reference, *others)}
    began = time.perf_counter()
    for number, ids in enumerate(chunks, 1):
        reads = [(c.name, c.begin()) for c in others]
        read_reference = reference.begin()
        for first in range(0, len(ids), PREFILL_CHUNK):
            piece = ids[first : first + PREFILL_CHUNK]
            counted = slice(max(warm - first, 0), min(len(ids) - 1 - first, PREFILL_CHUNK))
            following = ids[first + 1 : first + 1 + PREFILL_CHUNK][counted]
            truth = read_reference(piece)[counted]
            found[reference.name].add(truth, truth, following)
            for name, read in reads:
                found[name].add(truth, read(piece)[counted], following)
        print(f"{number} of {len(chunks)} chunks, {time.perf_counter() - began:.0f} s", file=sys.stderr)
    return found


def texts(model: Decoder, chunks: int) -> tuple[list[NDArray], int]:
    """Returns this many chunks of ids, BOS first in each, and how many are prose; the rest is Python's manual."""
    manual = "\n\n".join(pydoc_data.topics.topics[name] for name in TOPICS)
    parts = []
    for text in (PROSE.read_text("utf-8"), manual):
        ids, inside = model.tokenizer.encode(text), CHUNK - 1
        whole = range(0, len(ids) - inside + 1, inside)
        parts.append([np.array([model.tokenizer.bos, *ids[first : first + inside]]) for first in whole])
    made = parts[0] + parts[1]
    if not 1 <= chunks <= len(made):
        raise SystemExit(f"the texts make 1 to {len(made)} chunks of {CHUNK} tokens, not {chunks}")
    return made[:chunks], min(len(parts[0]), chunks)


def remade(weights: Any, layout: str) -> Any:
    """Returns the tree of weights with every matrix in another layout."""
    if isinstance(weights, Weight):
        return Weight.pack(LAYOUTS[layout], weights.widen())
    if is_dataclass(weights):
        parts = {f.name: remade(getattr(weights, f.name), layout) for f in fields(weights)}
        return replace(weights, **parts)  # type: ignore[type-var]
    if isinstance(weights, tuple):
        return tuple(remade(part, layout) for part in weights)
    return weights


def altered(model: Decoder, **attributes: Any) -> Decoder:
    """Returns the model with some attributes replaced."""
    other = copy.copy(model)
    for name, value in attributes.items():
        setattr(other, name, value)
    return other


def weight_formats(file: str, exact: Decoder) -> Iterator[Contender]:
    """Every format that `load` makes, and what it does not make: int8 of weights that were not quantized before, and an
    int4 model whose embedding is int4 too.
    """
    for dtype in FORMATS[1:]:
        yield contender(NAMES.get(dtype, dtype), mg.load(file, dtype=dtype))
        if dtype == "int8":
            yield contender(AFRESH, altered(exact, exact=False, weights=remade(exact.weights, "int8")))
        if dtype == "int4":
            narrow = Weight.pack(LAYOUTS["int4"], exact.weights.embedding.widen())
            model = mg.load(file, dtype=dtype)
            yield contender(ALL_INT4, altered(model, weights=replace(model.weights, embedding=narrow)))


def other_choices(file: str, exact: Decoder) -> Iterator[Contender]:
    """Keys and values in bf16, and decode, with the coarse head too."""
    yield contender("keys and values in bf16", altered(exact, exact=False))
    yield contender("int8, one token in a call", mg.load(file, dtype="int8"), step=1)
    for dtype in ("bf16", "int8"):
        yield contender(f"{dtype}, one token, coarse head", mg.load(file, dtype=dtype), step=1, likely=True)


def other_programs(file: str, exact: Decoder) -> Iterator[Contender]:
    """llama.cpp, where it is installed, on this file and on an int4 file that it makes of it, which minigemma reads
    too; and the one number by which it differs from minigemma's reference.
    """
    try:
        yield llama_cpp(exact)
        with TemporaryDirectory() as folder:
            path = q4_0_file(exact, Path(folder))
            narrow = mg.load(path)
            yield contender("a Q4_0 file made of it: minigemma", narrow)
            yield contender('the same, dtype="int4"', mg.load(path, dtype="int4"))
            likely = mg.load(path, dtype="int4")
            yield contender('the same, dtype="int4", one token, coarse head', likely, step=1, likely=True)
            yield llama_cpp(narrow, "a Q4_0 file made of it: llama.cpp")
    except ImportError:
        print("llama-cpp-python is not installed: the page will have no row of it", file=sys.stderr)
    scale = float(np.sqrt(np.float32(exact.config.width)))
    yield contender("float32, embeddings times √D not rounded", altered(exact, embedding_scale=scale))


def measured(exact: Decoder, sections: Sequence[Iterator[Contender]], chunks: Sequence[NDArray]) -> list[list[Row]]:
    """Returns the rows of each section, the reference first; TOGETHER models read in one pass."""
    reference = contender(REFERENCE, exact)
    rows: list[list[Row]] = [[] for _ in sections]
    waiting = ((number, c) for number, section in enumerate(sections) for c in section)
    while group := list(islice(waiting, TOGETHER)):
        found = compare(reference, [c for _, c in group], chunks)
        for number, c in group:
            for each in (c,) if rows[number] else (reference, c):
                rows[number].append((each.name, each.size, *found[each.name].numbers))
    return rows


def table(rows: Sequence[Row]) -> str:
    """Rows of Markdown."""
    lines = [
        "| | MB of weights | mean KL | 99th percentile | same likeliest token | perplexity |",
        "|--|--:|--:|--:|--:|--:|",
    ]
    for name, size, kl, high, same, perplexity in rows:
        shown = " | ".join(np.format_float_positional(x, 2, fractional=False, trim="-") for x in (kl, high))
        lines.append(f"| {name} | {size / 1e6:.0f} | {shown} | {same:.1%} | {perplexity:.2f} |")
    return "\n".join(lines)


REFERENCE = "float32, the reference"
AFRESH = "int8, made of the float32 weights"
ALL_INT4 = "int4, the embedding too"
NAMES = {"int4": "int4 (embedding int8)", "int4-row": "int4-row (embedding int8-row)"}
PAGE = """# What each layout costs in accuracy

`python docs/make_accuracy.py > docs/accuracy.md` makes this page; `--only weights`, `decoding` or `programs`
makes one table.

The models read the same {tokens:,} tokens of English in chunks of {chunk:,}, each starting with BOS and an empty cache:
{prose} chunks of Carroll, Austen and Melville (`tests/data/prose.txt`) and {manual} of Python's language reference as
shipped with Python {python} (`pydoc_data.topics`: {topics}). The {counted:,} positions with at
least {warm} tokens of their chunk before them and one after are scored.

The reference is the demo weights, `{file}`, with `dtype="f32"`: weights, arithmetic, keys and values in
float32. KL is KL(reference ‖ row) over the whole vocabulary, in nats per position, computed in float64. Perplexity is
that of the text. The file is itself quantized ({types}); every row, the reference too, has that loss.

## Weights

Weights as `load(dtype=…)` makes them, keys and values in bf16, {piece} tokens per call. Activations enter products
{unit}.

{weights}

int8 keeps this file's Q5_0 and Q8_0 blocks exactly (`to_int8` in
[gguf_blocks.py](../minigemma/layouts/gguf_blocks.py)). "{afresh}" rounds all weights again, as it
would for a bf16 checkpoint. int4 rounds weights that were already rounded to four to six bits on another grid, so
it may lose less on a bf16 checkpoint.

## Keys and values, decode, coarse head

The first row is the reference with keys and values in bf16, which take {narrow:.1f} MB per {chunk:,} tokens instead of
{wide:.1f}. In the others each of the {tokens:,} tokens is decoded separately. In "coarse head" rows, logits are those
that generation uses: exact for likely tokens, from a copy of the head in two to four bits for the rest
([two_pass_head.py](../minigemma/formulas/two_pass_head.py)). `--exact-logits` avoids this cost.

{rest}

## llama.cpp, the same files, the same ids

{programs}

llama.cpp multiplies embeddings by √{width} = {unrounded:.4f}, minigemma by {rounded}, which is √{width} in bf16
([decoder.py](../minigemma/models/decoder.py) says why). The last row is the reference with llama.cpp's number.
llama.cpp itself quantized the Q4_0 file from this one, with the embedding in Q8_0; minigemma runs Q4_0 as int4. MB in
llama.cpp's rows are those of the file's tensors.
"""


SECTIONS = {"weights": weight_formats, "decoding": other_choices, "programs": other_programs}


def page(chunks: int, only: str | None) -> str:
    """Returns the measured page, or one section's table."""
    file = "gemma-3-270m"
    exact = mg.load(file, dtype="f32")
    read, prose = texts(exact, chunks)
    wanted = [SECTIONS[name](file, exact) for name in ([only] if only else SECTIONS)]
    parts = measured(exact, wanted, read)
    if only:
        return table(parts[0]) + "\n"
    kinds = sorted({kind for kind, *_ in describe(file).tensors.values()} - {"F32"})
    on_unit = choice()[0] != "vectors"
    return PAGE.format(
        file=exact.path.name,
        types=", ".join(kinds),
        tokens=chunks * CHUNK,
        chunk=CHUNK,
        prose=prose,
        manual=chunks - prose,
        python=platform.python_version(),
        topics=", ".join(TOPICS),
        counted=chunks * (CHUNK - 1 - WARM),
        warm=WARM,
        piece=PREFILL_CHUNK,
        unit="as bf16, on AMX"
        if on_unit
        else "as float32 with bf16 weights, as 16-bit integers with int8, as 8-bit integers with a scale per 32 with "
        "int4\n"
        "(this processor has AVX2; on processors with AMX: as bf16)",
        weights=table(parts[0]),
        afresh=AFRESH,
        narrow=exact.config.cache_bytes(CHUNK) / 1e6,
        wide=exact.config.cache_bytes(CHUNK, 4) / 1e6,
        rest=table(parts[1]),
        programs=table(parts[2]),
        width=exact.config.width,
        unrounded=exact.config.width**0.5,
        rounded=exact.embedding_scale,
    )


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--chunks", type=int, default=12, help=f"of {CHUNK} tokens (default: 12)")
    parser.add_argument("--only", choices=SECTIONS, help="the table of one section, on its own")
    args = parser.parse_args()
    print(page(args.chunks, args.only), end="")
