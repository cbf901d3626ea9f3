"""AdamW with decoupled weight decay, clipping by the global norm, and the schedule of the learning rate.

    m ← β₁ m + (1 - β₁) g            v ← β₂ v + (1 - β₂) g²            of the clipped gradient g · min(1, c / ‖g‖)
    w ← w - η ( m̂ / (√v̂ + ε) + λ w )      m̂ = m / (1 - β₁ᵗ), v̂ = v / (1 - β₂ᵗ)      [Loshchilov & Hutter 2019, alg. 2]

The decay λ is outside of the moments. It applies to matrices alone: not to norms, biases, the embedding, nor the gates
and Λ of the RG-LRU, whose memory it would change (RecurrentGemma §2).
"""

from __future__ import annotations

import math
from collections.abc import Mapping

import numpy as np

from ..arrays import F32, aligned
from ..kernels.adamw import Rates, sum_of_squares, update

BETA_1, BETA_2, EPSILON = 0.9, 0.95, 1e-8
LINE = 16  # float32 of a cache line, on which every parameter begins


def learning_rate(progress: float, peak: float, warmup: float, lowest: float) -> float:
    """η after a share `progress` of the training: linear up to `peak` at `warmup`, then half a cosine to peak · lowest.

    >>> [round(learning_rate(done, 1.0, 0.2, 0.1), 3) for done in (0.1, 0.2, 0.6, 1.0)]
    [0.5, 1.0, 0.55, 0.1]
    """
    if progress < warmup:
        return peak * progress / warmup
    turn = math.pi * min(1.0, (progress - warmup) / max(1 - warmup, 1e-9))
    return peak * (lowest + (1 - lowest) * (1 + math.cos(turn)) / 2)


def decays(name: str, values: F32) -> bool:
    """Does weight decay apply to this parameter? To the matrices of linear maps and to the convolution."""
    return values.ndim == 2 and name not in ("embedding", "head") and not name.endswith("bias")


class AdamW:
    """Parameters with their gradients and moments; each kind lies in one array, so that an update is one pass.

    >>> adam = AdamW({"w": np.ones((1, 2), np.float32)}, weight_decay=0.0)
    >>> adam.gradients["w"][:] = 1
    >>> round(adam.step(0.1, clip=1.0), 4), adam.parameters["w"].round(3)
    (1.4142, array([[0.9, 0.9]], dtype=float32))
    """

    def __init__(self, parameters: Mapping[str, F32], weight_decay: float = 0.1) -> None:
        """Copies `parameters`; `self.parameters` and `self.gradients` are views by the same names."""
        self.weight_decay, self.updates = weight_decay, 0
        order = sorted(parameters, key=lambda name: not decays(name, parameters[name]))
        sizes = {name: -(-parameters[name].size // LINE) * LINE for name in order}
        self.decayed = sum(size for name, size in sizes.items() if decays(name, parameters[name]))
        self.arrays = tuple(aligned(sum(sizes.values()), np.float32) for _ in range(4))
        self.weights, gradients, self.means, self.squares = self.arrays
        for array in self.arrays:
            array.fill(0)
        self.parameters: dict[str, F32] = {}
        self.gradients: dict[str, F32] = {}
        first = 0
        for name, size in sizes.items():
            values, place = parameters[name], slice(first, first + parameters[name].size)
            self.parameters[name] = self.weights[place].reshape(values.shape)
            self.gradients[name] = gradients[place].reshape(values.shape)
            self.parameters[name][...] = values
            first += size

    def step(self, rate: float, clip: float, usable: bool = True) -> float:
        """Apply the gradients, clipped to the norm `clip`, set them to zero, and return their norm before clipping.

        Nothing else changes with a norm that is infinite or not a number, nor with gradients that are not `usable`.
        """
        gradients = self.arrays[1]
        norm = math.sqrt(sum_of_squares(gradients))
        if not (usable and math.isfinite(norm)):
            gradients.fill(0)
            return norm
        self.updates += 1
        share, first, second = clip / norm if norm > clip else 1.0, 1 - BETA_1**self.updates, 1 - BETA_2**self.updates
        for part, decay in ((slice(self.decayed), self.weight_decay), (slice(self.decayed, None), 0.0)):
            factors = (share, BETA_1, BETA_2, 1 - rate * decay, rate / first, second**-0.5, EPSILON)
            w, g, m, v = (array[part] for array in self.arrays)
            update(w, g, m, v, Rates(*map(np.float32, factors)))
        return norm
