"""Initial parameters: normal draws whose spread keeps activations near unit variance.

    embedding                D^-1/2, so that √D · E has unit variance and the tied head's logits begin with about 1
    a linear map             (its inputs)^-1/2; times (2L)^-1/2 where it writes to the residual stream: o, down, out
    convolution [C, E]       (0.01 / C)^1/2, that is 0.05           gates of the RG-LRU [M, I, I]   I^-1/2
    Λ of the RG-LRU          ρ² uniform in [0.9², 0.999²] and softplus(Λ) = -log ρ, so Λ = log(1/ρ - 1)
    norms (1 + w), biases    0

Gemma's reports print no initial values. These are recurrentgemma's published ones (its torch code), and GPT-2's
(2L)^-1/2 for the branches of all families; norms after the branches (Gemma 2 and 3) hide that scale.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from ..arrays import F32
from ..config import TextConfig
from ..models.registry import all_names

TO_RESIDUAL = ("attention.o", "ffn.down", "recurrent.out")


def initial_parameters(config: TextConfig, seed: int) -> dict[str, F32]:
    """Every parameter of the text model by our names, float32 of its shape in a model; the same for the same seed."""
    random = np.random.Generator(np.random.PCG64(seed))
    return {
        name: _drawn(random, name, shape, config.layers)
        for name, _, shape in all_names(config, 0)
        if not name.startswith("vision.")
    }


def _drawn(random: np.random.Generator, name: str, shape: Any, layers: int) -> F32:
    if name.endswith("recurrent.decay"):
        rho = np.sqrt(random.uniform(0.9**2, 0.999**2, shape))
        return np.log(1 / rho - 1).astype(np.float32)
    if name.endswith("recurrent.conv"):
        shape, spread = (shape[2], shape[0]), (0.01 / shape[2]) ** 0.5
    elif len(shape) == 1 or name.endswith("_bias"):
        return np.zeros(shape, np.float32)
    else:
        spread = shape[-1] ** -0.5 * ((2 * layers) ** -0.5 if name.endswith(TO_RESIDUAL) else 1.0)
    return random.standard_normal(shape, np.float32) * np.float32(spread)
