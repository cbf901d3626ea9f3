"""Opens a checkpoint: which tensor is which weight, from the headers of its files; no weight is read."""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

import numpy as np

from ..config import TextConfig
from ..errors import ModelFormatError
from ..models.registry import all_names
from .config_gguf import config_from_gguf, fields_under, vision_from_gguf
from .config_json import check_pictures, config_from_json
from .convert import AS_STORED, READABLE, Stored, in_mostly_other_bits, stored_tensor
from .foreign import FOREIGN, foreign_tensors
from .gguf_file import GGUF, open_gguf
from .safetensors_file import Tensor, open_checkpoint_files, unreadable, what_is
from .statements import Statements, folder_statements, gguf_statements
from .tokenizer import Tokenizer
from .tokenizer_json import read_tokenizer_json

ROWS_COMPARED = 4096

# Text tensors have had three prefixes. The vision tower's may have "model." in front and "vision_model." inside.
PREFIXES = ("model.", "language_model.model.", "model.language_model.", "language_model.", "")
WRAPPERS = (
    re.compile(  # of DataParallel and PEFT; of torch.compile, FSDP and checkpointing, which are in the middle, too
        r"^((module|base_model\.model|_orig_mod)\.)+"
        r"|(?<![^.])(_orig_mod|_fsdp_wrapped_module|_checkpoint_wrapped_module|base_layer)\."
    )
)
HEAD = re.compile(r"(.+\.)?lm_head\.weight")
EMBEDDING = "embed_tokens.weight"
SEES = re.compile(r"^(model\.)?(?P<name>(?P<part>vision_tower|multi_modal_projector)\.)(vision_model\.)?")
# Computed from the config, or counters: no weights.
BUFFERS = re.compile(
    r"(^|[._])(inv_freq|(cos|sin)_cached|embed_scale|position_ids|normalizer"
    r"|causal_mask|masked_bias|num_batches_tracked)$"
)


@dataclass(frozen=True)
class Files:
    """What the files of a checkpoint say, before any weight has been read."""

    path: Path
    config: TextConfig
    tensors: dict[str, Stored]  # by our names
    norm_offset: float  # to subtract from a stored RMSNorm weight: 1 in a GGUF file
    make_tokenizer: Callable[[], Tokenizer | None]
    states: Statements


def open_files(path: Path, vision: bool = True, mmproj: str | Path | None = None) -> Files:
    """Reads the headers of a checkpoint. ModelFormatError unless all tensors are there, with the right shapes."""
    try:
        kind = "" if path.is_dir() else what_is(path)
    except OSError as error:
        raise unreadable(path, error) from error
    if kind not in ("", "safetensors", "gguf"):
        raise ModelFormatError(path, *FOREIGN[kind])
    if not kind and not path.is_dir() and path.suffix.lower() != ".gguf":
        raise ModelFormatError(path, "is neither a safetensors nor a GGUF file", "name a model's folder or GGUF file")
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
    for part in {theirs.rpartition("/")[0] for _, theirs, _ in all_names(config, 0)} - {""}:  # EmbeddingGemma's 2_Dense
        if (folder / part / "model.safetensors").exists():  # not where `minigemma quantize` wrote one file
            stored |= {f"{part}/{name}": t for name, t in open_checkpoint_files(folder / part).items()}
    found = [name.removesuffix(EMBEDDING) for name in stored if name.endswith(EMBEDDING)]
    prefix = next((p for p in PREFIXES if p in found), found[0] if len(found) == 1 else None)
    if prefix is None and any(name.startswith(("embedder.", "params/")) for name in stored):
        problem = "holds the tensors under DeepMind's own names (Kaggle's flax or torch files)"
        raise ModelFormatError(folder, problem, "take the Hugging Face release: minigemma download google/<model>")
    if prefix is None:
        raise ModelFormatError(folder, "its files hold no embed_tokens.weight", "these are not the weights of a Gemma")
    tower = {SEES.sub(r"\g<name>", name): name for name in stored if SEES.match(name) and not BUFFERS.search(name)}
    if not (vision and tower):
        config = replace(config, vision=None)
    if config.vision:
        check_pictures(folder, config.vision)
    named = {
        ours: tower.get(theirs, theirs) if ours.startswith(("vision.", "dense.")) else f"{prefix}{theirs}"
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
    if other := next((tensor for tensor in tensors.values() if tensor.kind not in (*AS_STORED, "F16")), None):
        problem = f"{other.name} is of type {other.kind}"
        raise ModelFormatError(folder, problem, "take the released bf16 or float32 file")
    states = folder_statements(folder, fields)
    return Files(folder, config, tensors, 0.0, partial(folder_tokenizer, folder), states)


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
        has_one = "tokenizer.ggml.tokens" in gguf.metadata
        return Tokenizer.from_vocabulary(*gguf.vocabulary, path=path) if has_one else None

    states = gguf_statements(path, fields_under(gguf, "").stated)
    return Files(path, config, tensors, 1.0, make_tokenizer, states)


def _gguf_tensors(path: Path, gguf: GGUF, named: dict[str, str]) -> dict[str, Stored]:
    """The tensors of a file by our names. ModelFormatError for missing or unexpected ones."""
    tower = ("v.", "mm.") if "token_embd.weight" in gguf.tensors else ()  # in the text model's file it is not loaded
    extra = {name for name in gguf.tensors if not name.startswith(tower)} - {*named.values(), "rope_freqs.weight"}
    _report(path, set(named.values()) - set(gguf.tensors), extra)
    found = {ours: gguf.tensors[name] for ours, name in named.items()}
    tensors = {ours: Stored(named[ours], t.type, t.shape, t.blocks) for ours, t in found.items()}
    for ours, tensor in tensors.items():
        if tensor.kind not in (READABLE[:3] if ours == "vision.patch" else READABLE):
            remedy = f"take a file of {', '.join(READABLE)}"
            raise ModelFormatError(path, f"{tensor.name} is of type {tensor.kind}, which has no reader here", remedy)
    return in_mostly_other_bits(tensors)


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
    if foreign := foreign_tensors(unexpected):
        raise ModelFormatError(path, *foreign)
    for what, names in (("lacks {} tensors", missing), ("has {} unexpected tensors", unexpected)):
        if names:
            first = ", ".join(ascii(name)[1:-1][:100] for name in sorted(names)[:5]) + (" …" if len(names) > 5 else "")
            problem = f"{what.format(len(names))}: {first}"
            raise ModelFormatError(path, problem, "config and weights are of different models")


def folder_tokenizer(folder: Path) -> Tokenizer | None:
    """Reads tokenizer.model, else tokenizer.json, the only one that transformers 5 writes; None without either."""
    model, described = folder / "tokenizer.model", folder / "tokenizer.json"
    if model.exists() or not described.exists():
        return Tokenizer.from_model_file(model) if model.exists() else None
    return read_tokenizer_json(described)
