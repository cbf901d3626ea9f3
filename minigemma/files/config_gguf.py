"""Reads the config from a GGUF header: finds the family, lets its page read the fields, refuses fields nothing reads.

llama.cpp reads a model's numbers only under the name of its architecture, so fields with other prefixes ("general.",
"tokenizer.", "quantize.", or a publisher's own) change nothing here.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

from ..config import TextConfig
from ..errors import ModelFormatError
from ..models.fields import Fields
from ..models.registry import FAMILIES, named
from ..models.vision import vision_from_gguf as read_vision
from .config_json import MAX_PROBLEM, UNKNOWN, runs
from .gguf_file import GGUF, SCALARS, LazyArray
from .known_keys import CLIP, CLIP_VALUES, GGUF_PREFIXES, GGUF_VALUES, VOCABULARY, VOCABULARY_VALUES, changes_results
from .known_keys import GGUF as HARMLESS
from .safetensors_file import short

MAX_LAYERS = 1000
AGAIN = "convert the model again with a current llama.cpp"
ITS_OWN = "take the mmproj file of this model"
RELEASED_ONE = "take a file of the released model"
OTHER_KINDS = {
    "adapter": ("is a LoRA adapter", "merge it into its base model and convert that"),
    "controlvector": ("is a control vector, which is added to a model's layers", "take the GGUF file of the model"),
    "imatrix": ("is an imatrix, the statistics of a quantization", "take the GGUF file of the model"),
    "vocab": ("is a vocab file without weights", "take the GGUF file of the model"),
    "mmproj": ("is the vision tower of a model (mmproj)", "give it as --mmproj (mmproj=…) with the text model's file"),
}


def config_from_gguf(gguf: GGUF) -> TextConfig:
    """The config of a GGUF file's text model.

    Raises ModelFormatError for a file of another kind, for missing and impossible fields, and for a field of the
    architecture that is neither used nor known to be harmless (known_keys.py).
    """
    path, architecture = gguf.path, gguf.metadata.get("general.architecture")
    by_architecture = {"clip": "mmproj", "controlvector": "controlvector"}
    kind = by_architecture.get(str(architecture), gguf.metadata.get("general.type"))
    if "adapter.type" in gguf.metadata:
        kind = "adapter"
    if isinstance(kind, str) and kind in OTHER_KINDS:
        raise ModelFormatError(path, *OTHER_KINDS[kind])
    family = next((f for f in FAMILIES.values() if f.architecture and f.architecture == architecture), None)
    if family is None or family.from_gguf is None:
        problem = f"is a GGUF of architecture {short(architecture)}"
        raise ModelFormatError(path, problem, f"{runs()}: take one of their checkpoints")
    embedding = gguf.tensors.get("token_embd.weight")
    rows, read = embedding.shape[0] if embedding else 1, family.from_gguf
    fields = fields_under(gguf, f"{architecture}.")
    config = _reading(path, (AGAIN, RELEASED_ONE), lambda: named(read(fields, rows)))
    _refuse_left_over(path, fields, HARMLESS, GGUF_VALUES)
    vocabulary = fields_under(gguf, "tokenizer.ggml.")
    for name, values in VOCABULARY_VALUES.items():
        _reading(path, (AGAIN, RELEASED_ONE), partial(vocabulary.expect, name, *values))
    _refuse_left_over(path, vocabulary, VOCABULARY, {})
    return config


def vision_from_gguf(gguf: GGUF, text: TextConfig) -> TextConfig:
    """Adds the vision tower of an mmproj file to a text model's config. ModelFormatError for another model's tower."""
    metadata, path = gguf.metadata, gguf.path
    kind = metadata.get("clip.vision.projector_type", metadata.get("clip.projector_type"))
    if metadata.get("general.architecture") != "clip" or kind != "gemma3" or text.family != "gemma3":
        architecture = short(metadata.get("general.architecture"))
        what = f"is a GGUF file of architecture {architecture} and projector type {short(kind)}"
        raise ModelFormatError(path, f"{what}, for a model of {text.family}", "take the mmproj file of a Gemma 3")
    fields = fields_under(gguf, "clip.")
    vision = _reading(path, (ITS_OWN, ITS_OWN), lambda: read_vision(fields, text.width))
    _refuse_left_over(path, fields, CLIP, CLIP_VALUES)
    return replace(text, vision=vision)


def fields_under(gguf: GGUF, prefix: str) -> Fields:
    """The fields under a prefix, arrays of few numbers as lists."""
    found = {name.removeprefix(prefix): value for name, value in gguf.metadata.items() if name.startswith(prefix)}
    for name, value in found.items():
        if isinstance(value, LazyArray) and value.type in SCALARS and value.count <= MAX_LAYERS:
            found[name] = gguf.numbers(prefix + name, value.type).tolist()
    return Fields(found, prefix=prefix)


def _reading(path: Path, remedies: tuple[str, str], read: Callable[[], Any]) -> Any:
    """What `read` returns, or ModelFormatError with a remedy for a missing or for an impossible field."""
    try:
        return read()
    except KeyError as error:
        raise ModelFormatError(path, f"has no {error.args[0]}", remedies[0]) from None
    except (TypeError, ValueError, OverflowError, ZeroDivisionError) as error:
        raise ModelFormatError(path, str(error)[:MAX_PROBLEM], remedies[1]) from None


def _refuse_left_over(path: Path, fields: Fields, harmless: set[str], values: dict[str, tuple[Any, ...]]) -> None:
    for name, value in fields.left_over().items():
        if changes_results(name, value, harmless, values) and not name.startswith(GGUF_PREFIXES):
            stated = f"an array of {value.count}" if isinstance(value, LazyArray) else short(value)
            raise ModelFormatError(path, f"{short(fields.prefix + name)} is {stated}{UNKNOWN}", RELEASED_ONE)
