"""The weights of a model as other programs take them: under Hugging Face's names, as torch tensors in bf16."""

from __future__ import annotations

import importlib
from collections.abc import Iterator
from types import ModuleType
from typing import Any

import numpy as np

from minigemma.arrays import round_bf16
from minigemma.layouts import Weight
from minigemma.models.decoder import Decoder
from minigemma.models.registry import FAMILIES, layer_tensors


def named_weights(model: Decoder) -> Iterator[tuple[str, Any]]:
    """(name in a Hugging Face file, weight as it is held here) of every weight but softplus(Λ), which is undone."""
    config = model.config
    tables = [("", "model.", model.weights, FAMILIES[config.family].tensors)]
    for i, block in enumerate(model.weights.blocks):
        tables.append((f"blocks.{i}", f"model.layers.{i}.", block, layer_tensors(config, i)))
    for _, prefix, owner, table in tables:
        for ours, (theirs, *_) in table.items():
            value: Any = owner
            for part in ours.split("."):
                value = getattr(value, part)
            if ours == "recurrent.decay":
                value = np.log(np.expm1(value))
            if ours == "recurrent.conv":
                value = np.ascontiguousarray(value.T)[:, None]
            yield prefix + theirs, value


def as_bf16(torch: ModuleType, weight: Weight | np.ndarray) -> Any:
    """A weight in any layout as a bf16 tensor; where it is bf16 already, the same memory."""
    words = weight.data if isinstance(weight, Weight) else weight
    if words.dtype != np.uint16:
        words = round_bf16(weight.widen() if isinstance(weight, Weight) else weight)
    return torch.from_numpy(np.array(words, copy=not words.flags.writeable).view(np.int16)).view(torch.bfloat16)


def torch_for(model: Decoder) -> ModuleType:
    """The module torch, set to the threads of `model` and to no gradients."""
    torch = importlib.import_module("torch")
    torch.set_num_threads(model.threads)
    torch.set_grad_enabled(False)
    return torch
