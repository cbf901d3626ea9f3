"""The RG-LRU, the real-gated linear recurrent unit: a diagonal linear recurrence whose decay the input chooses
(De et al. 2024, "Griffin", §2.4).

    r_t = σ(A x_t + b_a)                        recurrence gate                               eq. 1
    i_t = σ(B x_t + b_x)                        input gate                                    eq. 2
    a_t = exp(-8 · r_t · softplus(Λ))           decay, each channel its own                   eq. 3
    h_t = a_t · h_{t-1} + √(1 - a_t²) · (i_t · x_t)                                           eq. 4

A and B are block-diagonal: a block of channels is multiplied by its own matrix. At position 0 there is no earlier
state: a = 0, and the input enters unscaled.

Departs from the paper in the sign of Λ: it writes a = σ(Λ), whose logarithm is -softplus(-Λ); the released weights hold
the Λ of softplus(Λ), as the code that trained them has it. √(1 - a²) is computed as √(-expm1(2 log a)): near a = 1,
where memory is long, 1 - a² would lose its digits. The state h is float32 for every type of weight.
"""

from __future__ import annotations

import numpy as np

from ..arrays import F32, U16, widen_bf16
from ..definition import definition, require
from ..kernels.parallel import workers
from ..kernels.product import multiply
from ..kernels.rows import whole_vectors
from ..kernels.scan import DECAY, STEEPEST, all_blocks, rg_lru_scan, rg_lru_scan_back, scan


def sigmoid(x: F32) -> F32:
    """1 / (1 + e⁻ˣ), as exp(-log(1 + e⁻ˣ)), which never overflows."""
    return np.exp(-np.logaddexp(np.float32(0), -x))


def softplus(x: F32) -> F32:
    """log(1 + eˣ), without overflow."""
    return (np.log1p(np.exp(-np.abs(x))) + np.maximum(x, 0)).astype(np.float32)


@definition
def block_diagonal(x: F32, weight: F32 | U16, bias: F32) -> F32:
    """Each block of channels times its own matrix: y[n] = x[n] W[n] + b[n]      [De et al. 2024 §2.4; App. A]

    x [T, E] float32, weight [M, I, J] float32 or bf16, bias [M, J] float32 → [T, E] float32, E = M · I = M · J
    """
    blocks = x.reshape(len(x), *weight.shape[:2])
    y = np.einsum("TMI,MIJ->TMJ", blocks, widen_bf16(weight), optimize=True) + bias
    return y.reshape(x.shape)


@block_diagonal.gradient
def block_diagonal_gradient(dy: F32, x: F32, weight: F32 | U16, bias: F32) -> tuple[F32, F32, F32]:
    """dx[n] = dy[n] W[n]ᵀ, dW[n] = x[n]ᵀ dy[n] and db[n] = Σ_t dy[n], block by block

    dy, x [T, E] float32, weight [M, I, J] float32 or bf16, bias [M, J] float32 → dx [T, E], dweight [M, I, J], dbias
    [M, J] float32
    """
    blocks, dblocks = x.reshape(len(x), *weight.shape[:2]), dy.reshape(len(x), *bias.shape)
    dx, by_block = np.empty_like(blocks), dblocks.swapaxes(0, 1)
    np.matmul(by_block, widen_bf16(weight).swapaxes(1, 2), out=dx.swapaxes(0, 1))
    return dx.reshape(x.shape), np.matmul(blocks.transpose(1, 2, 0), by_block), dblocks.sum(axis=0)


@block_diagonal_gradient.kernel
def _block_diagonal_gradient(dy, x, weight, bias):
    fits = x.ndim == 2 and x.shape == dy.shape and bias.ndim == 2 and weight.shape == (*bias.shape, bias.shape[-1])
    require(fits and bias.size == x.shape[1], "block_diagonal_gradient", dy, x, weight, bias)
    blocks, dblocks = (np.ascontiguousarray(each.reshape(-1, *bias.shape).swapaxes(0, 1)) for each in (x, dy))
    wide, dx, dweight = widen_bf16(weight), np.empty(blocks.shape, np.float32), np.empty(weight.shape, np.float32)
    for m in range(len(bias)):
        multiply(dblocks[m], wide[m].T, dx[m])
        multiply(blocks[m].T, dblocks[m], dweight[m])
    return np.ascontiguousarray(dx.swapaxes(0, 1)).reshape(x.shape), dweight, dblocks.sum(axis=1)


@block_diagonal.kernel
def _block_diagonal(x, weight, bias):
    fits = x.ndim == 2 and weight.ndim == 3 and weight.shape[1] == weight.shape[2] and bias.shape == weight.shape[:2]
    require(fits and len(weight) * weight.shape[1] == x.shape[1], "block_diagonal", x, weight, bias)
    y = np.empty_like(x)
    all_blocks(workers(), x, weight, bias, y)
    return y


@definition
def linear_scan(x: F32, decay: F32, state: F32) -> F32:
    """h_t = decay_t · h_{t-1} + x_t, each channel by itself, h_{-1} = state      [De et al. 2024 eq. 4]

    x [T, E] float32, decay [T, E] float32, state [E] float32 → [T, E] float32
    """
    h = np.empty_like(x)
    for t in range(len(x)):
        state = h[t] = decay[t] * state + x[t]
    return h


@linear_scan.gradient
def linear_scan_gradient(dh: F32, x: F32, decay: F32, state: F32) -> tuple[F32, F32, F32]:
    """A scan from the end: dx_t = dh_t + decay_{t+1} · dx_{t+1}, ddecay_t = h_{t-1} · dx_t, dstate = decay_0 · dx_0

    dh, x, decay [T, E] float32, state [E] float32 → dx [T, E], ddecay [T, E], dstate [E] float32
    """
    before = np.concatenate([state[None], linear_scan(x, decay, state)[:-1]])
    following = np.concatenate([decay[1:], np.zeros_like(decay[:1])])
    backwards = np.ascontiguousarray(dh[::-1]), np.ascontiguousarray(following[::-1])
    dx = linear_scan(*backwards, np.zeros_like(state))[::-1]
    return dx, before * dx, decay[0] * dx[0]


@linear_scan.kernel
def _linear_scan(x, decay, state):
    require(x.ndim == 2 and x.shape == decay.shape and state.shape == x.shape[1:], "linear_scan", x, decay, state)
    E, (x, decay, state) = x.shape[1], whole_vectors(x, decay, state)
    h = np.empty_like(x)
    scan(workers(), x, decay, state, h)
    return np.ascontiguousarray(h[:, :E])


def associative_scan(x: F32, decay: F32, state: F32) -> F32:
    """linear_scan as a tree: pairs (a, b) of h → a h + b compose, (a₂, b₂) after (a₁, b₁) is (a₁ a₂, a₂ b₁ + b₂).

    So the recurrence can run in parallel over time, in log T rounds with twice the work. The paper found the plain loop
    faster, since both wait for memory (App. D). x, decay [T, E], state [E] → [T, E] float32
    """
    a, b = decay.copy(), x.copy()
    b[0] += a[0] * state
    reach = 1
    while reach < len(x):
        b[reach:] = a[reach:] * b[:-reach] + b[reach:]
        a[reach:] = a[reach:] * a[:-reach]
        reach *= 2
    return b


def decay_and_input(x: F32, recurrence: F32, input: F32, decay_rate: F32, start: bool) -> tuple[F32, F32]:
    """a_t and √(1 - a_t²) · i_t · x_t from the gates before their sigmoids      [De et al. 2024 eqs. 1-4]

    x, recurrence, input [T, E], decay_rate [E] = softplus(Λ); `start`: the first token has position 0 → two of [T, E]
    """
    log_a = np.float32(-DECAY) * sigmoid(recurrence) * decay_rate
    a, normalizer = np.exp(log_a), np.sqrt(-np.expm1(2 * log_a))
    if start:
        a[0], normalizer[0] = 0, 1
    return a, normalizer * sigmoid(input) * x


@definition
def rg_lru(x: F32, recurrence: F32, input: F32, decay_rate: F32, state: F32, start: bool) -> F32:
    """The recurrence, from the gates before their sigmoids to h      [De et al. 2024 eqs. 1-4]

    x [T, E] float32, recurrence [T, E] float32, input [T, E] float32, decay_rate [E] float32, state [E] float32
    → [T, E] float32; `start`: the first token has position 0, and `state` is not used
    """
    a, gated = decay_and_input(x, recurrence, input, decay_rate, start)
    return linear_scan(gated, a, state)


@rg_lru.gradient
def rg_lru_gradient(
    dh: F32, x: F32, recurrence: F32, input: F32, decay_rate: F32, state: F32, start: bool
) -> tuple[F32, F32, F32, F32, F32]:
    """d log a = a · da - 2 a² · min(1 / 2m, 1000) · dm with m = √(1 - a²), and the chain rule through eqs. 1-4

    dh, x, recurrence, input [T, E], decay_rate, state [E] float32 → dx, drecurrence, dinput [T, E], ddecay_rate, dstate
    [E] float32. 1000 bounds the derivative of the root, as RecurrentGemma was trained (Botev et al. 2024, §2).
    """
    r, i = sigmoid(recurrence), sigmoid(input)
    log_a = np.float32(-DECAY) * r * decay_rate
    a, gated = decay_and_input(x, recurrence, input, decay_rate, start)
    du, da, dstate = linear_scan_gradient(dh, gated, a, state)
    normalizer = np.sqrt(-np.expm1(2 * log_a))
    slope = np.float32(0.5) / np.maximum(normalizer, np.float32(0.5 / STEEPEST))
    dlog_a = a * da - 2 * a * a * slope * (du * i * x)
    if start:  # a and the normalizer are constants
        normalizer[0], dlog_a[0] = 1, 0
    drecurrence = np.float32(-DECAY) * decay_rate * dlog_a * r * (1 - r)
    dinput = du * normalizer * x * i * (1 - i)
    return du * normalizer * i, drecurrence, dinput, (np.float32(-DECAY) * r * dlog_a).sum(axis=0), dstate


@rg_lru.kernel
def _rg_lru(x, recurrence, input, decay_rate, state, start):
    fits = x.ndim == 2 and x.shape == recurrence.shape == input.shape
    fits = fits and decay_rate.shape == state.shape == x.shape[1:]
    require(fits, "rg_lru", x, recurrence, input, decay_rate, state)
    E, (*tokens, decay_rate, state) = x.shape[1], whole_vectors(x, recurrence, input, decay_rate, state)
    h = np.empty_like(tokens[0])
    rg_lru_scan(workers(), tuple(tokens), decay_rate, state, start, h)
    return np.ascontiguousarray(h[:, :E])


@rg_lru_gradient.kernel
def _rg_lru_gradient(dh, x, recurrence, input, decay_rate, state, start):
    h = _rg_lru(x, recurrence, input, decay_rate, state, start)
    require(dh.shape == x.shape, "rg_lru_gradient", dh, x)
    E, before = x.shape[1], np.concatenate([state[None], h[:-1]])
    dh, *tokens, decay_rate = whole_vectors(dh, x, recurrence, input, before, decay_rate)
    gradients, sums = tuple(np.empty_like(dh) for _ in range(3)), np.zeros((2, dh.shape[1]), np.float32)
    rg_lru_scan_back(workers(), dh, tuple(tokens), decay_rate, start, gradients, sums)
    dx, drecurrence, dinput, (ddecay_rate, dstate) = (np.ascontiguousarray(each[:, :E]) for each in (*gradients, sums))
    return dx, drecurrence, dinput, ddecay_rate, dstate
