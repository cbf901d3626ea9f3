"""The causal convolution of Griffin's recurrent block, per channel over the last four tokens (De et al. 2024, §2.4,
"temporal convolution").

    y_t = b + Σ_s w_s · x_{t - s}            s = 0 … C - 1, C = 4; x is 0 before the sequence begins

The stored weight is in reverse order: its row C - 1 is w_0, for the current token.
"""

from __future__ import annotations

import numpy as np

from ..arrays import F32
from ..definition import definition, require
from ..kernels.parallel import chunk, parallel, workers_for
from ..kernels.rows import conv_row


@definition
def causal_conv1d(x: F32, weight: F32, bias: F32, before: F32) -> F32:
    """y_t = b + Σ_s w[C - 1 - s] · x_{t - s}, each channel by itself      [De et al. 2024 §2.4]

    x [T, E] float32, weight [C, E] float32, bias [E] float32, before [B, E] float32 (B = C - 1 tokens) → [T, E] float32
    """
    seen = np.concatenate([before, x])
    return bias + sum(weight[c] * seen[c : c + len(x)] for c in range(len(weight)))


@causal_conv1d.gradient
def causal_conv1d_gradient(dy: F32, x: F32, weight: F32, bias: F32, before: F32) -> tuple[F32, F32, F32, F32]:
    """dx_t = Σ_s w[C - 1 - s] · dy_{t + s}, dw[c] = Σ_t seen_{t + c} · dy_t and db = Σ_t dy_t, seen = before, then x

    dy, x [T, E], weight [C, E], bias [E], before [B, E] float32 → dx [T, E], dweight [C, E], dbias [E], dbefore [B, E]
    """
    seen, T = np.concatenate([before, x]), len(x)
    dseen = np.zeros_like(seen)
    for c in range(len(weight)):
        dseen[c : c + T] += weight[c] * dy
    dweight = np.stack([(seen[c : c + T] * dy).sum(axis=0) for c in range(len(weight))])
    return dseen[len(before) :], dweight, dy.sum(axis=0), dseen[: len(before)]


@parallel
def _conv_rows(worker, workers, seen, weight, bias, y):
    for t in chunk(worker, workers, len(y)):
        conv_row(seen, t, weight, bias, y[t])


@causal_conv1d.kernel
def _causal_conv1d(x, weight, bias, before):
    fits = x.ndim == 2 and weight.shape == (len(before) + 1, x.shape[1]) and bias.shape == x.shape[1:]
    require(fits, "causal_conv1d", x, weight, bias, before)
    y = np.empty_like(x)
    _conv_rows(workers_for(x), np.concatenate([before, x]), weight, bias, y)
    return y
