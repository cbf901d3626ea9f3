"""From files to a model: which tensor is which weight, and `load`.

Weights are used where they lie: a bf16 safetensors file and the Q8_0 tensors of a GGUF file are mapped into memory and
never copied. Other GGUF tensors, and every tensor where `dtype` names another layout, are converted one by one
(convert.py).
"""

from __future__ import annotations

import re
import warnings
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from ..arrays import LargePages
from ..blocks.feedforward import FeedForwardWeights
from ..blocks.gqa import AttentionWeights
from ..blocks.griffin import RecurrentWeights
from ..blocks.siglip import SiglipBlock, VisionWeights
from ..config import TextConfig, VisionConfig
from ..errors import ModelFormatError
from ..formulas.two_pass_head import preview_bytes
from ..kernels.parallel import most_threads
from ..models.decoder import Decoder, DecoderWeights, LayerWeights
from ..models.registry import FAMILIES, all_names, layer_tensors
from ..models.vision import VISION, VISION_LAYER
from .config_gguf import config_from_gguf, vision_from_gguf
from .config_json import config_from_json
from .convert import (
    AS_STORED,
    CONVERTED_TOGETHER,
    FORMATS,
    READABLE,
    Stored,
    converted_weight,
    held_bytes,
    stored_tensor,
    widened,
)
from .gguf_file import GGUF, open_gguf
from .memory import check_memory, fits_memory
from .resolve import resolve
from .safetensors_file import FOREIGN, Tensor, open_checkpoint_files, unreadable, what_is
from .statements import Statements, folder_statements, gguf_statements
from .tokenizer import Tokenizer, stop_ids

ROWS_WITHOUT_PIECE = 4096  # at most: 64 in Gemma 3 from 4B up; a Gemma 2's tokenizer would leave 6,144 of a Gemma 3's
ROWS_COMPARED = 4096

PARTS: dict[str, Callable[..., Any]] = {
    "attention": AttentionWeights,
    "ffn": FeedForwardWeights,
    "recurrent": RecurrentWeights,
}


# Text tensors have had three prefixes. The vision tower's may have "model." in front and "vision_model." inside.
PREFIXES = ("model.", "language_model.model.", "model.language_model.", "language_model.", "")
HEAD = re.compile(r"(model\.|language_model\.)*lm_head\.weight")
WRAPPERS = re.compile(r"^((module|base_model\.model)\.)+|(?<![^.])_orig_mod\.")  # DataParallel, PEFT, torch.compile
SEES = re.compile(r"^(model\.)?(?P<name>(?P<part>vision_tower|multi_modal_projector)\.)(vision_model\.)?")
BUFFERS = re.compile(r"(^|[._])(inv_freq|embed_scale|position_ids|normalizer)$")  # computed from the config, no weights


@dataclass(frozen=True)
class Files:
    """What the files of a checkpoint say, before any weight has been read."""

    path: Path
    config: TextConfig
    tensors: dict[str, Stored]  # by our names
    norm_offset: float  # what a stored RMSNorm has too much: 1 in a GGUF file
    make_tokenizer: Callable[[], Tokenizer | None]
    states: Statements


@dataclass(frozen=True)
class Description:
    """What `minigemma inspect` prints: all of it from headers, no weight is read."""

    config: TextConfig
    files: tuple[Path, ...]
    tensors: dict[str, tuple[str, tuple[int, ...], int]]  # name → (type in the file, shape, bytes)
    weight_bytes: int  # of all of them as they are held in memory once loaded
    instruction_tuned: bool


def load(
    name: str | Path,
    dtype: str | None = None,
    backend: str = "numba",
    threads: int | None = None,
    progress: Callable[[int, int], None] | None = None,
    vision: bool = True,
    mmproj: str | Path | None = None,
    context: int | None = None,
    force: bool = False,
) -> Decoder:
    """The model in a folder or file, by a name in weights/ or the Hugging Face cache, or "gemma-3-270m", the demo.

    dtype    None: as stored; "f32": the exact mode; or "bf16", "int8", "int4", "sfp8", "int8-row", "int4-row", which
             layouts/ describes; the embedding of an int4 model is int8
    backend  "numba": kernels; "numpy": the definitions alone, which a debugger can step through
    threads  how many cores a kernel uses; None: all that this process may use
    vision   False: leave the vision tower of a model that has one in its file
    mmproj   the GGUF file of the vision tower, for a GGUF file of the text model
    context  so many tokens are meant to be held at most, which counts towards the memory it takes
    force    True: go on also where weights and cache are more than the machine's memory
    progress is called with (bytes done, bytes in all) after each tensor

    Raises ModelFormatError for files that cannot be used, ValueError for arguments that cannot and for a model that
    does not fit into memory.
    """
    if dtype not in (None, *FORMATS):
        raise ValueError(f"dtype is {dtype!r}; it must be one of {', '.join(FORMATS)}, or None for as stored")
    if backend not in ("numba", "numpy"):
        raise ValueError(f"backend is {backend!r}; it must be 'numba' or 'numpy'")
    if threads is not None and not 1 <= threads <= most_threads():
        raise ValueError(f"threads is {threads}; this machine offers 1 … {most_threads()}")
    files = open_files(resolve(name), vision, mmproj)
    held = sum(held_bytes(ours, t, dtype) for ours, t in files.tensors.items())
    cache = files.config.cache_bytes(min(context or 0, files.config.context))
    if not force:
        check_memory(str(name), held, cache)
    with ThreadPoolExecutor(1) as side:  # the tokenizer is Python's work, the weights are not: they go side by side
        making = side.submit(files.make_tokenizer)
        weights = _weights(files, dtype, progress)
        tokenizer = making.result()
    if tokenizer:
        tokenizer.add(files.states.added, files.config.vocab)
    for ours, weight in weights.items():  # the small ones; looking at all would read the whole file now
        if isinstance(weight, np.ndarray) and weight.ndim == 1 and not np.isfinite(weight).all():
            told = "has values that are NaN or infinite; `minigemma inspect --check` looks at every weight"
            warnings.warn(f"{files.path}: {ours} {told}", stacklevel=2)
            break
    stored = files.tensors["embedding"].kind
    if tokenizer and not 0 <= files.config.vocab - tokenizer.size <= ROWS_WITHOUT_PIECE:
        raise ModelFormatError(
            files.path,
            f"its tokenizer has {tokenizer.size} pieces, its embedding {files.config.vocab} rows",
            "take the tokenizer.model that was released with these weights",
        )
    model = FAMILIES[files.config.family].model(
        files.config,
        assembled(files.config, weights),
        tokenizer=tokenizer,
        exact=dtype == "f32" or (dtype is None and stored == "F32"),
        round_scale=stored != "F32" or files.config.family == "recurrentgemma",
        backend=backend,
        threads=threads,
        previews=fits_memory(held + preview_bytes(files.config.vocab, files.config.width), cache),
        instruction_tuned=files.states.instruction_tuned,
        path=files.path,
    )
    take_up(model, files.states)
    return model


def take_up(model: Decoder, states: Statements) -> None:
    """Give the model what its checkpoint states about tokens and turns; warn about a foreign chat template."""
    if model.tokenizer:
        model.eos = stop_ids(model.tokenizer, states.ends, states.instruction_tuned)
    else:
        model.eos = tuple(end for end in states.ends if isinstance(end, int))
    model.sampling, model.foreign_turns = states.sampling, states.foreign_turns
    if states.foreign_turns:
        told = f"its chat template writes {states.foreign_turns}, not Gemma's turns; templates are not run"
        warnings.warn(f"{model.path}: {told}", stacklevel=3)


def _weights(files: Files, dtype: str | None, progress: Callable[[int, int], None] | None) -> dict[str, Any]:
    """Every tensor in the format that it runs in, by our names."""
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


def not_finite(name: str | Path, mmproj: str | Path | None = None) -> dict[str, int]:
    """How many values of each tensor are NaN or infinite, by our names; empty if none is. Reads every weight."""
    files, found = open_files(resolve(name), mmproj=mmproj), {}
    for ours, tensor in files.tensors.items():
        rows = max(1, CONVERTED_TOGETHER * len(tensor.array) // max(1, tensor.array.size))
        pieces = range(0, len(tensor.array), rows)
        wrong = sum(int((~np.isfinite(widened(tensor.kind, tensor.array[r : r + rows]))).sum()) for r in pieces)
        if wrong:
            found[ours] = wrong
    return found


def describe(
    name: str | Path, dtype: str | None = None, vision: bool = True, mmproj: str | Path | None = None
) -> Description:
    """What a checkpoint is, read from its headers alone, and how much memory `load` with this dtype would hold."""
    files = open_files(resolve(name), vision, mmproj)
    tensors = {ours: (t.kind, t.shape, t.array.nbytes) for ours, t in files.tensors.items()}
    held = sum(held_bytes(ours, t, dtype) for ours, t in files.tensors.items())
    parts = (files.path,) if files.path.is_file() else tuple(sorted(files.path.glob("*.safetensors")))
    return Description(files.config, parts, tensors, held, files.states.instruction_tuned)


def open_files(path: Path, vision: bool = True, mmproj: str | Path | None = None) -> Files:
    """The headers of a checkpoint, every tensor found, named and of the right shape; else ModelFormatError."""
    try:
        kind = "" if path.is_dir() else what_is(path)
    except OSError as error:
        raise unreadable(path, error) from error
    if kind not in ("", "safetensors", "gguf"):
        raise ModelFormatError(path, *FOREIGN[kind])
    if kind == "safetensors" and not re.fullmatch(r"model(-\d{5}-of-\d{5})?\.safetensors", path.name):
        problem = "is not what a model's file is called, model.safetensors or model-0000n-of-0000m.safetensors"
        raise ModelFormatError(path, problem, "name the model's folder")
    folder = path.parent if kind == "safetensors" else path
    if mmproj is not None and folder.is_dir():
        raise ModelFormatError(path, "has its own vision tower if it has any", "--mmproj goes with a GGUF file only")
    files = _open_folder(folder, vision) if folder.is_dir() else _open_gguf(path, mmproj if vision else None)
    implied = {ours: shape for ours, _, shape in all_names(files.config, 0)}
    for ours, tensor in files.tensors.items():
        expected = implied["embedding" if ours == "head" else ours]
        if tensor.shape != expected:
            raise ModelFormatError(
                mmproj if mmproj and ours.startswith("vision.") else path,
                f"{tensor.name} is {list(tensor.shape)}, the config implies {list(expected)}",
                "weights and config are of different models: take both from one release",
            )
    return files


def _open_folder(folder: Path, vision: bool) -> Files:
    config, fields = config_from_json(folder / "config.json")
    stored = {WRAPPERS.sub("", name): tensor for name, tensor in open_checkpoint_files(folder).items()}
    prefix = next((p for p in PREFIXES if f"{p}embed_tokens.weight" in stored), None)
    if prefix is None and any(name.startswith(("embedder.", "params/")) for name in stored):
        problem = "holds the tensors under DeepMind's own names (Kaggle's flax or torch files)"
        raise ModelFormatError(folder, problem, "take the Hugging Face release: minigemma download google/<model>")
    if prefix is None:
        raise ModelFormatError(folder, "its files hold no embed_tokens.weight", "these are not the weights of a Gemma")
    tower = {SEES.sub(r"\g<name>", name): name for name in stored if SEES.match(name) and not BUFFERS.search(name)}
    if not (vision and tower):
        config = replace(config, vision=None)
    named = {
        ours: tower.get(theirs, theirs) if ours.startswith("vision.") else f"{prefix}{theirs}"
        for ours, theirs, _ in all_names(config, 0)
    }
    heads = [name for name in stored if HEAD.fullmatch(name)]
    if not fields["tie_word_embeddings"] and not heads:
        heads = ["lm_head.weight"]  # which is reported as missing
    ignored = {name for name in stored if BUFFERS.search(name)} | (set() if config.vision else set(tower.values()))
    if heads and _same(stored.get(heads[0]), stored[named["embedding"]]):
        ignored.add(heads[0])  # the embedding, written a second time
    elif heads:
        named["head"] = heads[0]
    _report(folder, set(named.values()) - set(stored), set(stored) - set(named.values()) - ignored)
    tensors = {ours: stored_tensor(name, stored[name].dtype, stored[name].array) for ours, name in named.items()}
    _check_kinds(folder, tensors)
    states = folder_statements(folder, fields)
    return Files(folder, config, tensors, 0.0, partial(_folder_tokenizer, folder), states)


def _same(one: Tensor | None, other: Tensor) -> bool:
    """Whether two tensors hold the same bytes."""
    if one is None or (one.dtype, one.array.shape) != (other.dtype, other.array.shape):
        return False
    parts = [slice(r, r + ROWS_COMPARED) for r in range(0, len(one.array), ROWS_COMPARED)]
    return all(np.array_equal(one.array[part], other.array[part]) for part in parts)


def _open_gguf(path: Path, mmproj: str | Path | None) -> Files:
    gguf = open_gguf(path)
    config = config_from_gguf(gguf)
    frequencies = gguf.tensors.get("rope_freqs.weight")
    if frequencies is not None and not (frequencies.type == "F32" and (frequencies.blocks == 1).all()):
        problem = "has rope_freqs.weight, factors of the rope frequencies that minigemma does not apply"
        raise ModelFormatError(path, problem, "take a file of the released model")
    named = {ours: theirs for ours, theirs, _ in all_names(config, 1)}
    if "output.weight" in gguf.tensors:
        named["head"] = "output.weight"
    tensors = _gguf_tensors(path, gguf, named)
    if mmproj is not None:
        projector = open_gguf(mmproj)
        config = vision_from_gguf(projector, config)
        named = {ours: theirs for ours, theirs, _ in all_names(config, 1) if ours.startswith("vision.")}
        tensors |= _gguf_tensors(Path(mmproj), projector, _unswapped(named, projector, config))

    def make_tokenizer() -> Tokenizer | None:
        return (
            Tokenizer.from_vocabulary(*gguf.vocabulary, path=path) if "tokenizer.ggml.tokens" in gguf.metadata else None
        )

    states = gguf_statements(path, gguf.metadata)
    return Files(path, config, tensors, 1.0, make_tokenizer, states)


def _gguf_tensors(path: Path, gguf: GGUF, named: dict[str, str]) -> dict[str, Stored]:
    """The tensors of a file by our names; none may be missing, none left over."""
    tower = ("v.", "mm.") if "token_embd.weight" in gguf.tensors else ()  # in the text model's file it is not loaded
    extra = {name for name in gguf.tensors if not name.startswith(tower)} - {*named.values(), "rope_freqs.weight"}
    _report(path, set(named.values()) - set(gguf.tensors), extra)
    found = {ours: gguf.tensors[name] for ours, name in named.items()}
    tensors = {ours: Stored(named[ours], t.type, t.shape, t.blocks) for ours, t in found.items()}
    for ours, tensor in tensors.items():
        if tensor.kind not in (READABLE[:3] if ours in ("vision.patch", "vision.projection") else READABLE):
            remedy = f"take a file of {', '.join(READABLE)}"
            raise ModelFormatError(path, f"{tensor.name} is of type {tensor.kind}, which has no reader here", remedy)
    return tensors


def _unswapped(named: dict[str, str], projector: GGUF, config: TextConfig) -> dict[str, str]:
    """The names of an mmproj file; the first converters called fc2 ffn_up and fc1 ffn_down, which the shapes show."""
    first = projector.tensors.get("v.blk.0.ffn_up.weight")
    if first is None or config.vision is None or first.shape[0] != config.vision.width:
        return named
    other = {"up": "down", "down": "up", "up_bias": "down_bias", "down_bias": "up_bias"}
    return {
        ours: named[f"{layer}.{other.get(part, part)}"] if layer else theirs
        for ours, theirs in named.items()
        for layer, _, part in [ours.rpartition(".")]
    }


def _report(path: Path, missing: set[str], unexpected: set[str]) -> None:
    for what, names in (("lacks", missing), ("has beside a Gemma's", unexpected)):
        if names:
            first = ", ".join(ascii(name)[1:-1][:100] for name in sorted(names)[:5]) + (" …" if len(names) > 5 else "")
            raise ModelFormatError(
                path, f"{what} {len(names)} tensors: {first}", "config and weights are of different models"
            )


def _check_kinds(path: Path, tensors: dict[str, Stored]) -> None:
    for tensor in tensors.values():
        if tensor.kind not in (*AS_STORED, "F16"):
            raise ModelFormatError(
                path, f"{tensor.name} is of type {tensor.kind}", "take the released bf16 or float32 file"
            )


def assembled(config: TextConfig, weights: dict[str, Any]) -> DecoderWeights:
    """The flat names as the dataclasses that the models read."""
    blocks = []
    for i in range(config.layers):
        parts: dict[str, dict[str, Any]] = {}
        for name in layer_tensors(config, i):
            part, _, field = name.partition(".")
            parts.setdefault(part, {})[field] = weights[f"blocks.{i}.{name}"]
        blocks.append(LayerWeights(**{part: PARTS[part](**w) for part, w in parts.items()}))
    vision = _tower(config.vision, weights) if config.vision and "vision.patch" in weights else None
    return DecoderWeights(weights["embedding"], tuple(blocks), weights["final_norm"], weights.get("head"), vision)


def _tower(vision: VisionConfig, weights: dict[str, Any]) -> VisionWeights:
    layers = range(vision.layers)
    blocks = tuple(SiglipBlock(**{name: weights[f"vision.blocks.{i}.{name}"] for name in VISION_LAYER}) for i in layers)
    return VisionWeights(**{name: weights[f"vision.{name}"] for name in VISION}, blocks=blocks)


def _folder_tokenizer(folder: Path) -> Tokenizer | None:
    path = folder / "tokenizer.model"
    return Tokenizer.from_model_file(path) if path.exists() else None
