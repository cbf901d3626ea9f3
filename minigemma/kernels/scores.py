"""Arguments of the attention kernels, and the steps from a product to a score.

`is_visible` is the only place in compiled code that decides which keys a query sees. It is inlined by every attention
kernel and takes numbers; `hide_lanes`, next to it, applies it to a vector of queries.
"""

from typing import Any, NamedTuple

import numpy as np
from numba import float32
from numpy.typing import NDArray

from ..arrays import F32, I32
from .compiler import jit_inlined, jit_inner
from .simd.vectors import splat, tanh, where_less

EVERYTHING = 2**30  # a window wider than any position: a global layer
LOWEST = np.float32(-1e30)  # the maximum of no scores; finite, so that the difference of two is a number


class Queries(NamedTuple):
    """Queries, grouped by key head, and where they stand."""

    q: F32  # [T, K, G, H]
    positions: I32  # [T]
    last_visible: I32  # [T], the last position that each query may see


class Keys(NamedTuple):
    """Keys and values, float32 or bf16 as uint16, and where they stand."""

    k: NDArray[Any]  # [S, K, H]
    v: NDArray[Any]  # [S, K, H]
    positions: I32  # [S]


class Scoring(NamedTuple):
    """How a product of query and key becomes a score."""

    window: np.float32  # EVERYTHING on global layers
    scale: np.float32
    cap: np.float32  # 0: no cap


@jit_inlined
def is_visible(query, last_visible, key, window):
    """May a query at position `query` see the key at position `key`? As `visible` in formulas/attention.py."""
    return key <= last_visible and query - key < window


@jit_inlined
def hide_lanes(query, last_visible, key, window, score):
    """The scores of one key where `is_visible`, -inf elsewhere; vectors of float32, a query a lane."""
    hidden = splat(float32(-np.inf))
    return where_less(last_visible, key, hidden, where_less(query - key, window, score, hidden))


@jit_inner
def soft_cap_lanes(x, cap):
    """cap · tanh(x / cap) of one vector."""
    return splat(cap) * tanh(x * splat(float32(1) / cap))
