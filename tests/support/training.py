"""A batch to train on, and a checkpoint's tensors as parameters."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
from support.checkpoints import VOCAB
from support.tensors import read

from minigemma.formulas.cross_entropy import Targets
from minigemma.models.backward import Batch
from minigemma.models.registry import all_names

rng = np.random.default_rng(13)
T = 60  # of which the second sequence has 37: five windows of every small checkpoint
BATCH = Batch(rng.integers(3, VOCAB - 1, T).astype(np.int32), np.array([0, 9, 46, 47], np.int32))
TARGETS = Targets(rng.integers(0, VOCAB, (T, 3)).astype(np.int32), rng.random((T, 3), np.float32))
TARGETS.weights[5::11] = 0  # tokens that do not count


def ours(name: str, tensor: np.ndarray) -> np.ndarray:
    """A tensor of a file, or its gradient, as a parameter."""
    return np.ascontiguousarray(tensor[:, 0].T) if name.endswith("recurrent.conv") else tensor


def parameters(folder: Path, config: Any) -> dict[str, np.ndarray]:
    """The tensors of a checkpoint by our names."""
    tensors = read(folder / "model.safetensors")
    return {name: ours(name, tensors[f"model.{stored}"].copy()) for name, stored, _ in all_names(config, 0)}
