"""A cache from its file: `Cache.save` and `load_cache` are inverses."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np

from ..cache import Cache, checksum
from ..errors import ModelFormatError, check_type
from ..models.decoder import Decoder
from ..models.weights import fingerprint_of
from .safetensors_file import Tensor, open_safetensors

DAMAGED = "the file is damaged: delete it, and the text is read again"
VERSION = 1


def load_cache(model: Decoder, path: str | Path, max_tokens: int | None = None) -> Cache:
    """The cache that `cache.save(path)` wrote, with room for `max_tokens`, or for the model's context.

    Raises ModelFormatError for a file that is damaged or no cache, for the cache of another model or of other weights,
    and for one that holds more tokens.
    """
    check_type("path", path, (str, Path), "the path of a file", optional=False)
    path = Path(path)
    try:
        tensors = open_safetensors(path)
    except ModelFormatError as error:
        remedy = "name the file that cache.save wrote; a damaged one is deleted, and the text read again"
        raise ModelFormatError(path, error.problem, remedy) from None
    about = _about(path, tensors)
    if about["model"] != fingerprint_of(model.config, model.weights):
        raise ModelFormatError(path, "is the cache of another model, or of other weights", "name another file")
    ids, room = tensors["ids"].array, max_tokens or model.config.context
    if len(ids) > room:
        raise ModelFormatError(path, f"holds {len(ids):,} tokens, and there is room for {room:,}", "name another file")
    dtype = "f32" if any(tensor.dtype == "F32" for name, tensor in tensors.items() if name.endswith("keys")) else "bf16"
    cache = model.new_cache(room, dtype)
    for layer, state in enumerate(cache.layers):
        for name, own in state.stored(len(ids)).items():
            found = tensors.get(f"layers.{layer}.{name}")
            if found is None or found.array.shape != own.shape or found.array.dtype != own.dtype:
                raise ModelFormatError(path, f"has no {name} of layer {layer}, or not as this model's", DAMAGED)
            own[...] = found.array
    cache.advance(ids)
    cache.notes = about["notes"]
    return cache


def _about(path: Path, tensors: dict[str, Tensor]) -> dict[str, Any]:
    """What the file says about itself, once its checksum is right and its ids are a list."""
    try:
        about = json.loads(tensors["about"].array.tobytes())
        known = about["version"], str(about["model"]), str(about["notes"])
        rest = {name: tensor.array for name, tensor in tensors.items() if name != "about"}
        whole = rest["ids"].dtype == np.int32 and rest["ids"].ndim == 1 and checksum(rest) == about["checksum"]
    except (KeyError, TypeError, ValueError, RecursionError):
        raise ModelFormatError(path, "is no cache of minigemma", "name the file that cache.save wrote") from None
    if known[0] != VERSION:
        raise ModelFormatError(path, f"is a cache of version {known[0]!r}, not {VERSION}", "delete it")
    if not whole:
        raise ModelFormatError(path, "holds other bytes than were written", DAMAGED)
    return about
