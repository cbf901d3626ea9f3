"""How far two models' logits are apart, and a text fed to a cache."""

from __future__ import annotations

from typing import Any

import numpy as np

TOLERANCE = 1e-4  # of the largest logit, in float32 mode


def in_chunks(model: Any, size: int, ids: np.ndarray) -> np.ndarray:
    """Logits of `ids`, fed to a cache `size` at a time."""
    held = model.new_cache(len(ids))
    chunks = [model.forward(ids[i : i + size], cache=held) for i in range(0, len(ids), size)]
    assert held.position == len(ids)
    return np.concatenate(chunks)


def distance(found: np.ndarray, expected: np.ndarray) -> float:
    """The largest difference, relative to the largest expected value; NaN counts as infinitely far."""
    return float(np.nan_to_num(np.abs(found - expected), nan=np.inf).max() / np.abs(expected).max())


def log_softmax_at(logits: np.ndarray, targets: np.ndarray) -> np.ndarray:
    """log p(target) of each row."""
    top = logits.max(axis=1)
    total = np.exp(logits - top[:, None]).sum(axis=1, dtype=np.float64)
    return logits[np.arange(len(targets)), targets] - top - np.log(total)
