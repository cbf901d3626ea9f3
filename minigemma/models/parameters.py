"""A model's weights by name, as files and training hold them, and as the dataclasses that models read.

Training changes parameters: a flat dict of float32 arrays by our names (registry.all_names), in the shapes that the
model holds. The one exception is the RG-LRU's: the dict has Λ, the model softplus(Λ).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np

from ..arrays import F32, read_only
from ..blocks.feedforward import FeedForwardWeights
from ..blocks.gqa import AttentionWeights
from ..blocks.griffin import RecurrentWeights
from ..blocks.layers import LayerWeights
from ..blocks.siglip import SiglipBlock, VisionWeights
from ..config import TextConfig, VisionConfig
from ..formulas.linear import Gradients
from ..formulas.rglru import softplus
from ..layouts import LAYOUTS, Weight
from .decoder import Decoder, DecoderWeights
from .registry import FAMILIES, layer_tensors
from .vision import VISION, VISION_LAYER
from .weights import named_weights

PARTS: dict[str, Callable[..., Any]] = {
    "attention": AttentionWeights,
    "ffn": FeedForwardWeights,
    "recurrent": RecurrentWeights,
}
DECAY = "recurrent.decay"  # Λ among parameters, softplus(Λ) in a model


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
    dense = tuple(weights[name] for name in ("dense.0", "dense.1") if name in weights)
    return DecoderWeights(
        weights["embedding"], tuple(blocks), weights["final_norm"], weights.get("head"), vision, dense
    )


def _tower(vision: VisionConfig, weights: dict[str, Any]) -> VisionWeights:
    layers = range(vision.layers)
    blocks = tuple(SiglipBlock(**{name: weights[f"vision.blocks.{i}.{name}"] for name in VISION_LAYER}) for i in layers)
    return VisionWeights(**{name: weights[f"vision.{name}"] for name in VISION}, blocks=blocks)


def model_of(
    config: TextConfig, parameters: dict[str, F32], tokenizer: Any = None, threads: int | None = None
) -> Decoder:
    """A model over these parameters, which it reads where they are; after they change, `refresh` it.

    Raises ValueError for a model with a vision tower: only text models are trained.
    """
    if config.vision:
        raise ValueError(f"{config.name or 'the model'} has a vision tower; only text models are trained")
    rounded = config.family == "recurrentgemma"
    weights = {name: _view(name, array) for name, array in parameters.items()}
    made = FAMILIES[config.family].model
    return made(
        config, assembled(config, weights), tokenizer=tokenizer, exact=True, round_scale=rounded, threads=threads
    )


def _view(name: str, parameter: F32) -> Weight | F32:
    """A parameter as the model holds it: a weight, or a read-only array."""
    if name.endswith(DECAY):
        return read_only(softplus(parameter)[:])
    if parameter.ndim == 2 and not name.endswith(("_bias", "recurrent.conv")):
        return Weight(LAYOUTS["f32"], parameter, parameter.shape)
    return read_only(parameter[:])


def refresh(model: Decoder, parameters: dict[str, F32]) -> None:
    """Computes again what `model_of` derived from the parameters: softplus(Λ), and what kernels keep of weights."""
    for name, weight in named_weights(model.weights):
        if isinstance(weight, Weight):
            weight.forms.clear()
        elif name.endswith(DECAY):
            weight.base[...] = softplus(parameters[name])


def zeros_like(parameters: dict[str, F32]) -> Gradients:
    """Zeros in the shape of each parameter."""
    return {name: np.zeros_like(array) for name, array in parameters.items()}
