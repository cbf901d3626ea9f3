"""f32: float32 [R, D], 32 bits a weight."""

from __future__ import annotations

import numpy as np

from .weight import Layout

LAYOUT = Layout(
    "f32", 32, np.float32, data_shape=lambda R, D: (R, D), pack=np.ascontiguousarray, unpack=lambda data: data
)
