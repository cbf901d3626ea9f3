"""Penalties: logits of tokens that the text has already are lowered, so that it repeats itself less.

ids [T] are tokens, in any order and often more than once; logits z [V] float32 are changed in place and returned.
Ids outside the vocabulary, which stand for images, change nothing.
"""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
from numpy.typing import NDArray

from ..arrays import F32, I32


def repetition_penalty(logits: F32, ids: I32, penalty: float) -> F32:
    """z_v / θ where z_v > 0, else z_v · θ, of each token v among ids      [Keskar et al. 2019, "CTRL", §4.1]

    The paper divides every logit, which makes a token of a negative one likelier; transformers and llama.cpp multiply
    those, as is done here. θ = 1 changes nothing, 1.2 is the paper's choice.
    """
    seen, _ = _counted(logits, ids)
    z = logits[seen]
    logits[seen] = np.where(z > 0, z / np.float32(penalty), z * np.float32(penalty))
    return logits


def frequency_penalty(logits: F32, ids: I32, penalty: float) -> F32:
    """z_v - α · c_v, where v stands c_v times among ids      [OpenAI API reference, "Frequency penalty"]"""
    seen, counts = _counted(logits, ids)
    logits[seen] -= np.float32(penalty) * counts.astype(np.float32)
    return logits


def presence_penalty(logits: F32, ids: I32, penalty: float) -> F32:
    """z_v - α of each token v among ids, however often it is there      [OpenAI API reference, as above]"""
    seen, _ = _counted(logits, ids)
    logits[seen] -= np.float32(penalty)
    return logits


def logit_bias(logits: F32, bias: Mapping[int, float]) -> F32:
    """z_v + b_v for each v of `bias`; -∞ forbids a token      [OpenAI API reference, logit_bias]"""
    for token, value in bias.items():
        logits[token] += np.float32(value)
    return logits


def _counted(logits: F32, ids: I32) -> tuple[I32, NDArray[np.intp]]:
    """The tokens among ids that have a logit, and how often each is there."""
    return np.unique(ids[ids < len(logits)], return_counts=True)
