"""What the fused kernels share: the steps of one parallel region, and what each thread computes for itself.

A block of one to sixteen tokens is one parallel region. Products are steps: tasks that threads claim, then a barrier
(parallel.py). Norms, RoPE and GELU, which have no weights, are computed by every thread for itself: sharing them would
take longer for one token, and for sixteen they cost little compared with the products.
"""

from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from .compiler import by_type, jit_inner
from .matvec import matvec_task
from .parallel import TASKS_PER_THREAD, barrier, next_task
from .prepare import prepare
from .rows import gated_gelu_row, norm_row
from .simd.memory import bf16_bits


class Team(NamedTuple):
    """One thread of a parallel region."""

    counters: NDArray[np.int64]  # of all steps: tasks claimed and done
    worker: int
    workers: int


@jit_inner
def wait(team, step, done, tasks, following):
    """Returns when all `tasks` of the step are done, of which this thread did `done`; prefetches `following`."""
    at = team.worker * following.size // team.workers
    barrier(team.counters, step, done, team.workers, tasks, following, at)


@jit_inner
def product(team, step, x, weights, outs, following):
    """outs[i] [T, R] = x weights[i]ᵀ, x [T, D]; returns when all tasks are done. `following` is the weight read next.

    weights and outs are tuples of three, so that one version is compiled; a weight whose out has no tokens is skipped.
    """
    prepared, tasks, done = prepare(x, weights[0]), TASKS_PER_THREAD * team.workers, 0
    task = next_task(team.counters, step, team.worker, team.workers, tasks)
    while task >= 0:
        matvec_task(task, tasks, TASKS_PER_THREAD, prepared, weights, outs)
        done += 1
        task = next_task(team.counters, step, team.worker, team.workers, tasks)
    wait(team, step, done, tasks, following.data)


@jit_inner
def plus_bias(y, bias):
    """y + bias, or y where there is no bias: y [T, R]."""
    if not bias.size:
        return y
    out = np.empty(y.shape, np.float32)
    for t in range(len(y)):
        for i in range(bias.size):
            out[t, i] = y[t, i] + bias[i]
    return out


@jit_inner
def normed(x, weight, eps):
    """RMSNorm of each row of x [T, D]."""
    h = np.empty(x.shape, np.float32)
    for t in range(len(x)):
        norm_row(x[t], weight, eps, h[t])
    return h


@jit_inner
def gated(gate, up):
    """gelu(gate) · up, both [T, F]."""
    h = np.empty(gate.shape, np.float32)
    for t in range(len(h)):
        gated_gelu_row(gate[t], up[t], h[t])
    return h


@jit_inner
def residual(x, y, bias, post_norm, eps, rows):
    """x + norm(y + bias) of the last `rows` rows of x [T, D], where there are a norm and a bias."""
    h, first, out = plus_bias(y, bias), len(x) - rows, np.empty((rows, x.shape[1]), np.float32)
    if post_norm.size:
        h = normed(h, post_norm, eps)
    for t in range(rows):
        for d in range(out.shape[1]):
            out[t, d] = x[first + t, d] + h[t, d]
    return out


@jit_inner
def hand_over(x, out):
    """out = x, what all threads have: one of them calls this."""
    for t in range(len(out)):
        _copy_row(x[t], out[t])


@jit_inner
def _copy_row(x, out):
    for i in range(x.size):
        out[i] = x[i]


@jit_inner
def _round_row(x, out):
    for i in range(x.size):
        out[i] = bf16_bits(x[i])


keep_row = by_type("keep_row", {np.float32: _copy_row, np.uint16: _round_row}, on="out")
