"""`load`: from files to a model.

Weights are used in place: a bf16 safetensors file and the Q8_0 tensors of a GGUF file are memory-mapped and never
copied. Other GGUF tensors, and every tensor if `dtype` names another layout, are converted one by one (convert.py).
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np

from ..arrays import LargePages
from ..config import TextConfig
from ..errors import ModelFormatError, check_type
from ..formulas.two_pass_head import coarse_bytes
from ..kernels.parallel import most_threads
from ..models.decoder import Decoder
from ..models.parameters import assembled
from ..models.registry import FAMILIES, RELEASED, all_names
from .adapter import adapted, read_adapter
from .convert import CONVERTED_TOGETHER, FORMATS, Stored, converted_weight, held_bytes, runs_as, widened
from .memory import check_memory, fits_memory
from .open import Files, open_files
from .resolve import model_name, resolve
from .statements import Statements
from .tokenizer import REMEDY, Tokenizer, stop_ids

Dtype = Literal["f32", "bf16", "int8", "int4", "int4-symmetric", "sfp8", "int8-row", "int4-row"]
ROWS_WITHOUT_PIECE = 4096  # at most: 64 in Gemma 3 from 4B up; a Gemma 2's tokenizer would leave 6,144 of a Gemma 3's


@dataclass(frozen=True)
class Description:
    """What `minigemma inspect` prints, read from headers only."""

    config: TextConfig
    files: tuple[Path, ...]
    tensors: dict[str, tuple[str, tuple[int, ...], int]]  # name → (type in the file, shape, bytes)
    held: dict[str, tuple[str, int]]  # name → (what it runs as, bytes in memory once loaded)
    weight_bytes: int  # of all of them in memory
    instruction_tuned: bool | None  # None: there is no file that says


def load(
    name: str | Path,
    dtype: Dtype | None = None,
    backend: Literal["numba", "numpy"] = "numba",
    threads: int | None = None,
    progress: Callable[[int, int], None] | None = None,
    vision: bool = True,
    mmproj: str | Path | None = None,
    context: int | None = None,
    force: bool = False,
    adapter: str | Path | Sequence[str | Path] = (),
) -> Decoder:
    """Loads a model: a folder or file, a name in weights/ or the Hugging Face cache, or "gemma-3-270m", the demo.

    dtype    None: as stored; "f32": the exact mode; or "bf16", "int8", "int4", "int4-symmetric", "sfp8", "int8-row",
             "int4-row", which layouts/ describes; the embedding, q, k and v of an int4 model are int8, and gate
             and up where it is less than 1,024 wide
    backend  "numba": kernels; "numpy": the definitions alone, which a debugger can step through
    threads  how many cores a kernel uses; None: all that this process may use
    vision   False: do not load the vision tower of a model that has one in its file
    mmproj   the GGUF file of the vision tower, for a GGUF file of the text model
    context  the most tokens that the cache will hold, which counts towards the memory needed
    force    True: load also where weights and cache need more than the machine's memory
    adapter  a folder with a LoRA adapter of peft, or several, which add up; they are applied beside the weights
    progress is called with (bytes done, bytes in all) after each tensor

    Raises ModelFormatError for files that cannot be used, ValueError for invalid arguments and for a model that does
    not fit into memory.
    """
    _check_arguments(dtype, backend, threads, context, progress, adapter)
    files = open_files(resolve(name), vision, mmproj)
    folders = [adapter] if isinstance(adapter, (str, Path)) else adapter or ()
    adapters = [read_adapter(folder, files.config) for folder in folders]
    held = sum(held_bytes(ours, t, dtype) for ours, t in files.tensors.items())
    cache = files.config.cache_bytes(min(context or 0, files.config.context))
    if not force:
        check_memory(str(name), held, cache)
    with ThreadPoolExecutor(1) as side:  # reading the tokenizer is Python work and overlaps with converting weights
        making = side.submit(files.make_tokenizer)
        weights = _weights(files, dtype, progress)
        tokenizer = making.result()
    _check_loaded(files, weights, tokenizer)
    stored = files.tensors["embedding"].kind
    model = FAMILIES[files.config.family].model(
        files.config,
        assembled(files.config, weights),
        tokenizer=tokenizer,
        exact=dtype == "f32" or (dtype is None and stored == "F32"),
        round_scale=stored != "F32" or files.config.family == "recurrentgemma",
        backend=backend,
        threads=threads,
        coarse_head_fits=fits_memory(held + coarse_bytes(files.config.vocab, files.config.width), cache),
    )
    model.path = files.path
    model.name = model.name or model_name(files.path)
    take_up(model, files.states)
    return adapted(model, adapters)


def _check_arguments(
    dtype: str | None, backend: str, threads: int | None, context: int | None, progress: Any, adapter: Any
) -> None:
    """Raise ValueError for what `load` cannot do."""
    check_type("adapter", adapter, (str, Path, Sequence), "the folder of an adapter, or a list of them")
    check_type("progress", progress, Callable, "a function of the bytes done and of all")
    if dtype not in (None, *FORMATS):
        raise ValueError(f"dtype is {dtype!r}; it must be one of {', '.join(FORMATS)}, or None for as stored")
    if backend not in ("numba", "numpy"):
        raise ValueError(f"backend is {backend!r}; it must be 'numba' or 'numpy'")
    if context is not None and (not isinstance(context, int) or context < 1):
        raise ValueError(f"context is {context!r}; it must be an integer from 1, or None")
    if threads is not None and not (type(threads) is int and 1 <= threads <= most_threads()):
        raise ValueError(f"threads is {threads!r}; this machine offers 1 … {most_threads()}")


def _check_loaded(files: Files, weights: dict[str, Any], tokenizer: Tokenizer | None) -> None:
    """Warns about NaN or infinity in small weights. ModelFormatError if the tokenizer is of another model."""
    for ours, weight in weights.items():  # the small ones; looking at all would read the whole file now
        if isinstance(weight, np.ndarray) and weight.ndim == 1 and not np.isfinite(weight).all():
            told = "has values that are NaN or infinite; `minigemma inspect --check` looks at every weight"
            warnings.warn(f"{files.path}: {ours} {told}", stacklevel=3)
            break
    if tokenizer and not 0 <= files.config.vocab - tokenizer.size <= ROWS_WITHOUT_PIECE:
        raise ModelFormatError(
            files.path, f"its tokenizer has {tokenizer.size} pieces, its embedding {files.config.vocab} rows", REMEDY
        )


def take_up(model: Decoder, states: Statements) -> None:
    """Give the model what its checkpoint states about tokens and turns; warn about what of it is not done."""
    if model.tokenizer:
        model.tokenizer.add(states.added, model.config.vocab)
        model.eos = stop_ids(model.tokenizer, states.ends, states.instruction_tuned)
    else:
        model.eos = tuple(end for end in states.ends if isinstance(end, int))
    model.instruction_tuned = states.instruction_tuned
    model.sampling, model.foreign_turns = states.sampling, states.foreign_turns
    if states.foreign_turns:
        told = f"its chat template writes {states.foreign_turns}, not Gemma's turns; templates are not run"
        warnings.warn(f"{model.path}: {told}", stacklevel=3)
    if states.not_done and not model.bidirectional:  # an encoder's texts have <eos>, too
        told = (
            f"its tokenizer states {states.not_done}; here <bos> stands before a text to continue, and nothing after it"
        )
        warnings.warn(f"{model.path}: {told}", stacklevel=3)


def _weights(files: Files, dtype: str | None, progress: Callable[[int, int], None] | None) -> dict[str, Any]:
    """Every tensor in its running layout, by our names."""
    total, done, weights = sum(t.array.nbytes for t in files.tensors.values()), 0, {}
    pages = LargePages()

    def convert(named: tuple[str, Stored]) -> Any:
        return converted_weight(*named, dtype, files.norm_offset, pages)

    with ThreadPoolExecutor(most_threads()) as pool:
        for (ours, tensor), weight in zip(files.tensors.items(), pool.map(convert, files.tensors.items()), strict=True):
            weights[ours] = weight
            done += tensor.array.nbytes
            if progress:
                progress(done, total)
    return weights


def not_finite(
    name: str | Path, mmproj: str | Path | None = None, progress: Callable[[int, int], None] | None = None
) -> dict[str, int]:
    """Counts NaN and infinite values per tensor, by our names; tensors without any are left out. Reads every weight."""
    files, found, done = open_files(resolve(name), mmproj=mmproj), {}, 0
    total = sum(tensor.array.nbytes for tensor in files.tensors.values())
    for ours, tensor in files.tensors.items():
        rows = max(1, CONVERTED_TOGETHER * len(tensor.array) // max(1, tensor.array.size))
        pieces = range(0, len(tensor.array), rows)
        wrong = sum(int((~np.isfinite(widened(tensor.kind, tensor.array[r : r + rows]))).sum()) for r in pieces)
        if wrong:
            found[ours] = wrong
        done += tensor.array.nbytes
        if progress:
            progress(done, total)
    return found


def describe(
    name: str | Path, dtype: str | None = None, vision: bool = True, mmproj: str | Path | None = None
) -> Description:
    """Describes a checkpoint from its headers, with the memory that `load` with this dtype would take."""
    files = open_files(resolve(name), vision, mmproj)
    parts = (files.path,) if files.path.is_file() else tuple(sorted(files.path.glob("*.safetensors")))
    return _described(files.config, parts, files.tensors, dtype, files.states.instruction_tuned)


def planned(name: str, dtype: str) -> Description:
    """Describes a released size such as "gemma-2-2b" without files. ValueError for another name."""
    if name not in RELEASED:
        raise ValueError(f"no released size is named {name!r}; those that are: {', '.join(RELEASED)}")
    config, zero = RELEASED[name], np.zeros((), np.uint16)
    shapes = {ours: (theirs, shape) for ours, theirs, shape in all_names(config, 0)}
    tensors = {ours: Stored(of, "BF16", shape, np.broadcast_to(zero, shape)) for ours, (of, shape) in shapes.items()}
    return _described(config, (), tensors, dtype, None)


def _described(
    config: TextConfig, files: tuple[Path, ...], stored: dict[str, Stored], dtype: str | None, tuned: bool | None
) -> Description:
    tensors = {ours: (t.kind, t.shape, t.array.nbytes) for ours, t in stored.items()}
    held = {ours: (runs_as(ours, t, dtype), held_bytes(ours, t, dtype)) for ours, t in stored.items()}
    return Description(config, files, tensors, held, sum(size for _, size in held.values()), tuned)
