"""bf16: uint16 [R, D], the upper 16 bits of each float32 (arrays.py). 16 bits a weight."""

from __future__ import annotations

import numpy as np

from ..arrays import round_bf16, widen_bf16
from .weight import Layout

LAYOUT = Layout("bf16", 16, np.uint16, data_shape=lambda R, D: (R, D), pack=round_bf16, unpack=widen_bf16)
