"""From files to a model: which tensor is which weight, in which format it runs, and `load`.

Weights are used where they lie: a bf16 safetensors file and the Q8_0 and Q4_0 tensors of a GGUF file are mapped into
memory and never copied. Other GGUF tensors, and every tensor when `dtype` asks for another format, are converted one by
one.
"""

from __future__ import annotations

import math
import re
import warnings
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ..arrays import F32, LargePages, read_only, round_bf16
from ..blocks.feedforward import FeedForwardWeights
from ..blocks.gqa import AttentionWeights
from ..blocks.griffin import RecurrentWeights
from ..blocks.siglip import SiglipBlock, VisionWeights
from ..config import TextConfig
from ..errors import ModelFormatError
from ..formulas.rglru import softplus
from ..formulas.two_pass_head import preview_bytes
from ..kernels import gguf_blocks as _gguf_kernels  # noqa: F401  they run in place of the definitions
from ..kernels.compiler import most_threads
from ..layouts.gguf_blocks import (
    KINDS,
    OURS,
    dequantize,
    quantize_int4,
    quantize_int4_rows,
    quantize_int8_rows,
    to_int8,
)
from ..layouts.int4 import SIDE, can_lie_side_by_side, row_by_row, side_by_side
from ..layouts.sfp8 import quantize_sfp8
from ..layouts.weight import BLOCK, BLOCK_BYTES, Weight, format_of, is_side_by_side, packed_shape, rows_columns
from ..models.decoder import Decoder, DecoderWeights
from ..models.gemma import Gemma, GemmaBlock
from ..models.gemma2 import Gemma2, Gemma2Block
from ..models.gemma3 import Gemma3, Gemma3Block
from ..models.recurrentgemma import RecurrentGemma, RecurrentGemmaBlock
from ..models.tensor_names import VISION, VISION_LAYER, all_names, layer_tensors
from .config_file import config_from_gguf, config_from_json, vision_from_gguf
from .gguf_file import GGUF, open_gguf
from .memory import check_memory, fits_memory
from .resolve import resolve
from .safetensors_file import DAMAGED, FOREIGN, open_checkpoint_files, read_json, short, unreadable, what_is
from .tokenizer import Tokenizer, stop_ids

CONVERTED_TOGETHER = 1 << 24  # weights that are float32 for a moment on their way to another format
ROWS_WITHOUT_PIECE = 4096  # at most: 64 in Gemma 3 from 4B up; a Gemma 2's tokenizer would leave 6,144 of a Gemma 3's
READABLE = ("F32", "F16", "BF16", *KINDS)
NARROW = ("int8", "int4", "sfp8", "int8-row", "int4-row")
FORMATS = ("f32", "bf16", *NARROW)
AS_STORED = {kind: kind.lower() for kind in OURS} | {"F32": "f32", "BF16": "bf16", "Q8_0": "int8", "Q4_0": "int4"}
KIND = {form: kind for kind, form in AS_STORED.items()}
QUANTIZERS: dict[str, Callable[[F32], Weight]] = {
    "bf16": round_bf16,
    "sfp8": quantize_sfp8,
    "int8-row": quantize_int8_rows,
    "int4-row": quantize_int4_rows,
}

MODELS: dict[str, tuple[type[Decoder], Callable[..., Any]]] = {
    "gemma": (Gemma, GemmaBlock),
    "gemma2": (Gemma2, Gemma2Block),
    "gemma3": (Gemma3, Gemma3Block),
    "recurrentgemma": (RecurrentGemma, RecurrentGemmaBlock),
}
PARTS: dict[str, Callable[..., Any]] = {
    "attention": AttentionWeights,
    "ffn": FeedForwardWeights,
    "recurrent": RecurrentWeights,
}


# Text tensors have had three prefixes. The vision tower's may have "model." in front and "vision_model." inside.
PREFIXES = ("model.", "language_model.model.", "model.language_model.", "language_model.", "")
HEADS = ("lm_head.weight", "language_model.lm_head.weight", "model.lm_head.weight")
SEES = re.compile(r"^(model\.)?(?P<name>(?P<part>vision_tower|multi_modal_projector)\.)(vision_model\.)?")
BUFFERS = re.compile(r"\.(rotary_emb\.inv_freq|embeddings\.position_ids)$")  # what some files hold beside weights


@dataclass(frozen=True)
class Stored:
    """A tensor as its file has it: `kind` is the file's name of its type ("BF16", "Q5_0", …), `shape` [R, D] or [D]."""

    name: str
    kind: str
    shape: tuple[int, ...]
    array: NDArray


@dataclass(frozen=True)
class Files:
    """What the files of a checkpoint say, before any weight has been read."""

    path: Path
    config: TextConfig
    tensors: dict[str, Stored]  # by our names
    norm_offset: float  # what a stored RMSNorm has too much: 1 in a GGUF file
    make_tokenizer: Callable[[], Tokenizer | None]
    eos: tuple[int, ...]
    instruction_tuned: bool


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
             formats.py describes; the embedding of an int4 model is int8
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
    held = sum(_held_bytes(ours, t, dtype) for ours, t in files.tensors.items())
    cache = files.config.cache_bytes(min(context or 0, files.config.context))
    if not force:
        check_memory(str(name), held, cache)
    with ThreadPoolExecutor(1) as side:  # the tokenizer is Python's work, the weights are not: they go side by side
        making = side.submit(files.make_tokenizer)
        weights = _weights(files, dtype, progress)
        tokenizer = making.result()
    for ours, weight in weights.items():  # the small ones; looking at all would read the whole file now
        if weight.dtype == np.float32 and weight.ndim == 1 and not np.isfinite(weight).all():
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
    return MODELS[files.config.family][0](
        files.config,
        assembled(files.config, weights),
        tokenizer=tokenizer,
        exact=dtype == "f32" or (dtype is None and stored == "F32"),
        round_scale=stored != "F32" or files.config.family == "recurrentgemma",
        backend=backend,
        threads=threads,
        previews=fits_memory(held + preview_bytes(files.config.vocab, files.config.width), cache),
        eos=stop_ids(tokenizer, files.eos, files.instruction_tuned) if tokenizer else files.eos,
        instruction_tuned=files.instruction_tuned,
        path=files.path,
    )


def _weights(files: Files, dtype: str | None, progress: Callable[[int, int], None] | None) -> dict[str, Any]:
    """Every tensor in the format that it runs in, by our names."""
    total, done, weights = sum(t.array.nbytes for t in files.tensors.values()), 0, {}
    pages = LargePages()

    def convert(named: tuple[str, Stored]) -> Any:
        return _weight(*named, dtype, files.norm_offset, pages)

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
        wrong = sum(int((~np.isfinite(dequantize(tensor.kind, tensor.array[r : r + rows]))).sum()) for r in pieces)
        if wrong:
            found[ours] = wrong
    return found


def describe(
    name: str | Path, dtype: str | None = None, vision: bool = True, mmproj: str | Path | None = None
) -> Description:
    """What a checkpoint is, read from its headers alone, and how much memory `load` with this dtype would hold."""
    files = open_files(resolve(name), vision, mmproj)
    tensors = {ours: (t.kind, t.shape, t.array.nbytes) for ours, t in files.tensors.items()}
    held = sum(_held_bytes(ours, t, dtype) for ours, t in files.tensors.items())
    parts = (files.path,) if files.path.is_file() else tuple(sorted(files.path.glob("*.safetensors")))
    return Description(files.config, parts, tensors, held, files.instruction_tuned)


def _held_bytes(ours: str, tensor: Stored, dtype: str | None) -> int:
    weights, tensor = int(np.prod(tensor.shape)), _laid_out(ours, tensor)
    if not is_matrix(ours, tensor):
        as_stored = ours.endswith("_gate") and tensor.kind == "BF16" and dtype != "f32"
        return (2 if as_stored else 4) * weights
    form = format_for(tensor, dtype, ours)
    return math.prod(packed_shape(form, *tensor.shape)) if form in NARROW else weights * {"f32": 4, "bf16": 2}[form]


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
    stored = open_checkpoint_files(folder)
    prefix = next((p for p in PREFIXES if f"{p}embed_tokens.weight" in stored), None)
    if prefix is None and any(name.startswith(("embedder.", "params/")) for name in stored):
        problem = "holds the tensors under DeepMind's own names (Kaggle's flax or torch files)"
        raise ModelFormatError(folder, problem, "take the Hugging Face release: minigemma download google/<model>")
    if prefix is None:
        raise ModelFormatError(folder, "its files hold no embed_tokens.weight", "these are not the weights of a Gemma")
    tower = {SEES.sub(r"\g<name>", name): name for name in stored if SEES.match(name) and not BUFFERS.search(name)}
    if getattr(config, "vision", None) and not (vision and tower):
        config = replace(config, vision=None)  # type: ignore[call-arg]  # only a Gemma 3 has the field
    sees = getattr(config, "vision", None) is not None
    named = {
        ours: tower.get(theirs, theirs) if ours.startswith("vision.") else f"{prefix}{theirs}"
        for ours, theirs, _ in all_names(config, 0)
    }
    if not fields["tie_word_embeddings"]:
        named["head"] = next((name for name in HEADS if name in stored), HEADS[0])
    ignored = {name for name in stored if BUFFERS.search(name)} | set(HEADS) | (set() if sees else set(tower.values()))
    _report(folder, set(named.values()) - set(stored), set(stored) - set(named.values()) - ignored)
    tensors = {ours: _stored(name, stored[name].dtype, stored[name].array) for ours, name in named.items()}
    _check_kinds(folder, tensors)
    eos, chatty = _folder_eos(folder, fields)
    return Files(folder, config, tensors, 0.0, partial(_folder_tokenizer, folder), eos, chatty)


def _stored(name: str, dtype: str, array: NDArray) -> Stored:
    """A tensor of a safetensors file; bytes are what `minigemma quantize` writes, and their shape says the format."""
    if dtype in ("U8", "I8"):
        with suppress(ValueError):  # in a shape that is none of ours they keep their type, which is refused
            kind = "INT4" if is_side_by_side(array) else KIND[format_of(array)]
            return Stored(name, kind, rows_columns(array), array)
    return Stored(name, dtype, array.shape, array)


def _open_gguf(path: Path, mmproj: str | Path | None) -> Files:
    gguf = open_gguf(path)
    embedding = gguf.tensors.get("token_embd.weight")
    config = config_from_gguf(path, gguf.metadata, embedding.shape[0] if embedding else 1)
    named = {ours: theirs for ours, theirs, _ in all_names(config, 1)}
    if "output.weight" in gguf.tensors:
        named["head"] = "output.weight"
    tensors = _gguf_tensors(path, gguf, named)
    if mmproj is not None:
        projector = open_gguf(mmproj)
        config = vision_from_gguf(Path(mmproj), projector.metadata, config)
        named = {ours: theirs for ours, theirs, _ in all_names(config, 1) if ours.startswith("vision.")}
        tensors |= _gguf_tensors(Path(mmproj), projector, _unswapped(named, projector, config))
    eos = gguf.metadata.get("tokenizer.ggml.eos_token_id", 1)
    if not isinstance(eos, int):
        raise ModelFormatError(path, f"tokenizer.ggml.eos_token_id is {short(eos)}; it must be a whole number", DAMAGED)
    name = f"{gguf.metadata.get('general.name', '')} {path.name}"
    chatty = "tokenizer.chat_template" in gguf.metadata or bool(re.search(r"\bit\b", name))

    def make_tokenizer() -> Tokenizer | None:
        return (
            Tokenizer.from_vocabulary(*gguf.vocabulary, path=path) if "tokenizer.ggml.tokens" in gguf.metadata else None
        )

    return Files(path, config, tensors, 1.0, make_tokenizer, (eos,), chatty)


def _gguf_tensors(path: Path, gguf: GGUF, named: dict[str, str]) -> dict[str, Stored]:
    """The tensors of a file by our names; none may be missing, none left over."""
    extra = {n for n in gguf.tensors if n not in named.values() and n != "rope_freqs.weight"}
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
    if first is None or first.shape[0] != config.vision.width:  # type: ignore[attr-defined]
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


def _weight(ours: str, tensor: Stored, dtype: str | None, norm_offset: float, pages: LargePages) -> Any:
    """A tensor as the models want it: matrices in their format, gates as stored, all that is small in float32."""
    tensor = _laid_out(ours, tensor)
    if is_matrix(ours, tensor):
        return _matrix(tensor, dtype, ours, pages)
    if len(tensor.shape) == 3 and ours.endswith("_gate") and tensor.kind == "BF16" and dtype != "f32":
        return read_only(tensor.array)
    wide = np.array(dequantize(tensor.kind, tensor.array), np.float32)
    if ours.endswith("recurrent.conv"):
        wide = np.ascontiguousarray(wide[:, 0].T)
    if ours.endswith("recurrent.decay"):
        return read_only(softplus(wide))
    if ours.startswith("vision.") and ours != "vision.soft_norm":  # a LayerNorm's weight is the gain itself
        return read_only(wide)
    return read_only(wide - np.float32(norm_offset))


def _laid_out(ours: str, tensor: Stored) -> Stored:
    """A convolution of patches as the matrix that it is, and x @ P as x Wᵀ; other tensors as they are."""
    if ours == "vision.patch":
        return replace(
            tensor, shape=(len(tensor.array), tensor.array[0].size), array=tensor.array.reshape(len(tensor.array), -1)
        )
    if ours == "vision.projection":
        return replace(tensor, shape=tensor.shape[::-1], array=tensor.array.T)
    return tensor


def is_matrix(ours: str, tensor: Stored) -> bool:
    """Is this the weight of a linear map or an embedding, which has a format, and no norm, bias or gate?"""
    return len(tensor.shape) == 2 and not ours.endswith("_bias") and ours != "vision.positions"


def format_for(tensor: Stored, dtype: str | None, ours: str) -> str:
    """The format that a matrix runs in: what `dtype` asks for, or the nearest of ours to the stored one."""
    wanted = dtype or ("bf16" if tensor.kind == "F16" else AS_STORED.get(tensor.kind, "int8"))
    if ours in ("embedding", "head") and AS_STORED.get(tensor.kind) != wanted:
        wanted = wanted.replace("int4", "int8")
    if wanted in BLOCK_BYTES and tensor.shape[1] % BLOCK:
        return "f32" if tensor.kind == "F32" else "bf16"  # rows that do not divide into blocks
    return wanted


def _matrix(tensor: Stored, dtype: str | None, ours: str, pages: LargePages) -> Weight:
    """The matrix in its format: where it lies if it is stored in that one, else converted, in large pages."""
    kind, array, wanted = tensor.kind, tensor.array, format_for(tensor, dtype, ours)
    if AS_STORED.get(kind) == wanted and not (
        kind == "Q4_0" and dtype == "int4" and can_lie_side_by_side(tensor.shape[0])
    ):
        return read_only(np.ascontiguousarray(array))
    first, *others = (converted(kind, rows, wanted, tensor.shape) for rows in some_rows(tensor))
    return read_only(pages.hold(np.concatenate([first, *others]) if others else np.ascontiguousarray(first)))


def some_rows(tensor: Stored) -> Iterator[NDArray]:
    """The array of a matrix in parts of whole sixteens of rows, few enough to be float32 for a moment."""
    in_element = tensor.shape[0] // len(tensor.array)  # sixteen rows, where they lie side by side
    step = max(1, CONVERTED_TOGETHER // tensor.shape[1] // SIDE) * SIDE // in_element
    for r in range(0, len(tensor.array), step):
        yield tensor.array[r : r + step]


def converted(kind: str, rows: NDArray, wanted: str, shape: tuple[int, ...]) -> Weight:
    """Rows of a matrix of some shape, stored as `kind`, in one of the formats of formats.py."""
    if kind == "INT4":
        kind, rows = "Q4_0", row_by_row(rows)
    if wanted == "int8":
        return to_int8(kind, rows)
    if wanted == "int4":
        made = rows if kind == "Q4_0" else quantize_int4(dequantize(kind, rows))
        return side_by_side(made) if can_lie_side_by_side(shape[0]) else made
    wide = dequantize(kind, rows)
    return wide if wanted == "f32" else QUANTIZERS[wanted](wide)


def assembled(config: TextConfig, weights: dict[str, Any]) -> DecoderWeights:
    """The flat names as the dataclasses that the models read."""
    blocks = []
    for i in range(config.layers):
        parts: dict[str, dict[str, Any]] = {"": {}}
        for name in layer_tensors(config, i):
            part, _, field = name.rpartition(".")
            parts.setdefault(part, {})[field] = weights[f"blocks.{i}.{name}"]
        own = parts.pop("")
        blocks.append(MODELS[config.family][1](**own, **{part: PARTS[part](**w) for part, w in parts.items()}))
    vision = _tower(config, weights) if "vision.patch" in weights else None
    return DecoderWeights(weights["embedding"], tuple(blocks), weights["final_norm"], weights.get("head"), vision)


def _tower(config: TextConfig, weights: dict[str, Any]) -> VisionWeights:
    layers = range(config.vision.layers)  # type: ignore[attr-defined]
    blocks = tuple(SiglipBlock(**{name: weights[f"vision.blocks.{i}.{name}"] for name in VISION_LAYER}) for i in layers)
    return VisionWeights(**{name: weights[f"vision.{name}"] for name in VISION}, blocks=blocks)


def _folder_tokenizer(folder: Path) -> Tokenizer | None:
    path = folder / "tokenizer.model"
    return Tokenizer.from_model_file(path) if path.exists() else None


def _folder_eos(folder: Path, fields: dict[str, Any]) -> tuple[tuple[int, ...], bool]:
    """Ids that end a text, from everywhere they may be stated, and whether the model was tuned to instructions."""
    generation = folder / "generation_config.json"
    stated = [fields.get("eos_token_id", 1), read_json(generation).get("eos_token_id", 1) if generation.exists() else 1]
    ids = {i for value in stated for i in (value if isinstance(value, list) else [value]) if isinstance(i, int)}
    chatty = any((folder / name).exists() for name in ("chat_template.json", "chat_template.jinja"))
    described = folder / "tokenizer_config.json"
    chatty = chatty or (described.exists() and "chat_template" in read_json(described))
    chatty = chatty or len(ids) > 1 or bool(re.search(r"\bit\b", folder.name))
    return tuple(sorted(ids)), chatty
