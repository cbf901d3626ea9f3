"""The recurrence of Griffin by what is known of it without running it: closed forms, plain loops, explicit matrices."""

from __future__ import annotations

import math

import numpy as np
import pytest

from minigemma.arrays import round_bf16, widen_bf16
from minigemma.blocks.griffin import RecurrentWeights, recurrent_block
from minigemma.cache import Cache, RecurrentState, TokenPositions
from minigemma.definition import formulas_only
from minigemma.formulas.conv1d import causal_conv1d
from minigemma.formulas.rglru import (
    associative_scan,
    block_diagonal,
    decay_and_input,
    linear_scan,
    rg_lru,
    sigmoid,
    softplus,
)
from minigemma.layouts import LAYOUTS, Weight
from minigemma.taps import NO_TAPS

rng = np.random.default_rng(23)


@pytest.fixture(params=["numba", "numpy"], autouse=True)
def backend(request):
    """Every test runs with the kernels and with the definitions alone."""
    with formulas_only(request.param == "numpy"):
        yield


def normal(*shape):
    return rng.standard_normal(shape, np.float32)


def close(found, expected, tolerance=2e-6):
    """Equal up to `tolerance` of the largest expected value."""
    expected = np.asarray(expected, np.float64)
    assert found.dtype == np.float32
    assert found.shape == expected.shape
    np.testing.assert_allclose(found, expected, rtol=0, atol=tolerance * max(1e-30, np.abs(expected).max()))


# ---- the linear scan


@pytest.mark.parametrize("decay", [0.0, 0.5, 0.96875, 1.0])
def test_scan_of_a_constant_is_a_geometric_series(decay):
    """h_t = a^(t+1) h_{-1} + x (1 - a^(t+1)) / (1 - a), and h_{-1} + (t + 1) x where a = 1."""
    T = 90
    state, x = np.float32([1, -3, 0.25]), np.float32([2, 0.5, -1])
    h = linear_scan(np.tile(x, (T, 1)), np.full((T, 3), decay, np.float32), state)
    power = decay ** np.arange(1, T + 1)[:, None]
    series = np.arange(1, T + 1)[:, None] if decay == 1 else (1 - power) / (1 - decay)
    close(h, power * state + series * x)


@pytest.mark.parametrize("T, E", [(1, 1), (2, 5), (37, 67), (200, 33)])
def test_scan_is_the_loop(T, E):
    x, decay, state = normal(T, E), rng.random((T, E), np.float32), normal(E)
    expected = np.empty((T, E))
    for e in range(E):
        h = float(state[e])
        for t in range(T):
            h = float(decay[t, e]) * h + float(x[t, e])
            expected[t, e] = h
    close(linear_scan(x, decay, state), expected)


@pytest.mark.parametrize("T", [1, 2, 3, 7, 64, 100])
def test_the_tree_gives_what_the_loop_gives(T):
    x, decay, state = normal(T, 9), rng.random((T, 9), np.float32), normal(9)
    kept = x.copy(), decay.copy(), state.copy()
    close(associative_scan(x, decay, state), linear_scan(x, decay, state))
    for now, before in zip((x, decay, state), kept, strict=True):
        assert np.array_equal(now, before), "an argument was overwritten"


@pytest.mark.parametrize("cut", [1, 5, 39])
def test_scan_goes_on_from_its_own_last_state(cut):
    x, decay, state = normal(40, 6), rng.random((40, 6), np.float32), normal(6)
    whole = linear_scan(x, decay, state)
    first = linear_scan(x[:cut], decay[:cut], state)
    close(np.concatenate([first, linear_scan(x[cut:], decay[cut:], first[-1])]), whole)


# ---- gates and decay


def test_sigmoid_and_softplus():
    x = np.float32([-80, -20, -1, 0, 1, 20, 80])
    close(sigmoid(x), [1 / (1 + math.exp(-v)) for v in x.tolist()])
    expected = [math.log1p(math.exp(-abs(v))) + max(v, 0) for v in x.tolist()]
    np.testing.assert_allclose(softplus(x), expected, rtol=1e-6)
    assert softplus(np.float32([1e4]))[0] == 1e4, "overflow"


def equations(x, recurrence, entering, decay_rate, state, start):
    """De et al. 2024 eqs. 1-4 in float64, one channel and one token at a time; 1 - a² without its cancellation."""
    h = np.empty(x.shape)
    for e in range(x.shape[1]):
        before = float(state[e])
        for t in range(len(x)):
            r, i = (1 / (1 + math.exp(-float(gate[t, e]))) for gate in (recurrence, entering))
            log_a = -8 * r * float(decay_rate[e])
            a, m = (0.0, 1.0) if start and t == 0 else (math.exp(log_a), math.sqrt(-math.expm1(2 * log_a)))
            h[t, e] = before = a * before + m * i * float(x[t, e])
    return h


@pytest.mark.parametrize("start", [True, False])
@pytest.mark.parametrize("T, E", [(1, 1), (1, 32), (2, 67), (50, 64)])
def test_rg_lru_is_the_papers_equations(T, E, start):
    x, recurrence, entering, state = normal(T, E), normal(T, E) * 3, normal(T, E) * 3, normal(E)
    decay_rate = softplus(rng.uniform(-9, 3, E).astype(np.float32))
    expected = equations(x, recurrence, entering, decay_rate, state, start)
    close(rg_lru(x, recurrence, entering, decay_rate, state, start), expected, 4e-6)


def test_position_0_resets():
    """The state does not enter, not even an infinite one; the input enters whole, √(1 - a²) or not."""
    T, E = 3, 35
    x, recurrence, entering = normal(T, E), normal(T, E), normal(T, E)
    decay_rate = np.full(E, 1e-3, np.float32)  # √(1 - a²) is about 0.09
    clean = rg_lru(x, recurrence, entering, decay_rate, np.zeros(E, np.float32), True)
    close(clean[0], x[0] / (1 + np.exp(-entering[0].astype(np.float64))))
    assert np.array_equal(rg_lru(x, recurrence, entering, decay_rate, np.full(E, 1e9, np.float32), True), clean)
    later = rg_lru(x, recurrence, entering, decay_rate, np.zeros(E, np.float32), False)
    assert np.abs(later[0]).max() < 0.2 * np.abs(clean[0]).max(), "without a reset the normaliser damps the input"


@pytest.mark.parametrize("decay_rate", [1e-7, 3e-7, 1e-5, 1e-3, 0.1, 3.0])
def test_normaliser_does_not_cancel(decay_rate):
    """h = √(1 - a²) where state is 0, the input gate open and x = 1: six digits right, even where float32's a is 1.

    log a = -4 · decay_rate where the recurrence gate is half open.
    """
    E = 32
    zeros, open_gate, rate = np.zeros((1, E), np.float32), np.full((1, E), 40, np.float32), np.float32(decay_rate)
    h = rg_lru(zeros + 1, zeros, open_gate, np.full(E, rate), zeros[0], False)
    expected = np.sqrt(-np.expm1(-8 * np.float64(rate)))
    np.testing.assert_allclose(h, np.full((1, E), expected), rtol=1e-6)
    a, gated = decay_and_input(zeros + 1, zeros, open_gate, np.full(E, rate), False)
    np.testing.assert_allclose(gated, np.full((1, E), expected), rtol=1e-6)
    np.testing.assert_allclose(a, np.full((1, E), np.exp(-4 * np.float64(rate))), rtol=1e-6)


@pytest.mark.parametrize("value", [-120, -30, 0, 30, 120])
def test_gates_that_are_shut_or_open_give_finite_states(value):
    """Shut: a = 1, nothing enters, h stays. Open: a = e^(-8 softplus Λ), all of x enters."""
    T, E = 5, 33
    gate, x, state = np.full((T, E), value, np.float32), normal(T, E), normal(E)
    with np.errstate(over="ignore"):  # in the definition e¹²⁰ is infinite on its way to a gate of 0
        h = rg_lru(x, gate, gate, np.full(E, 2, np.float32), state, False)
    assert np.isfinite(h).all()
    if value == -120:
        close(h, np.tile(state, (T, 1)))
    if value > 0:  # a = e⁻¹⁶
        close(h, x, 1e-6)


@pytest.mark.parametrize("cut", [1, 4, 19])
@pytest.mark.parametrize("E", [64, 50])
def test_rg_lru_in_two_pieces_is_one(E, cut):
    args = [normal(20, E) for _ in range(3)]
    decay_rate = np.full(E, 0.05, np.float32)
    whole = rg_lru(*args, decay_rate, normal(E), True)
    first = rg_lru(*(a[:cut] for a in args), decay_rate, np.zeros(E, np.float32), True)
    rest = rg_lru(*(a[cut:] for a in args), decay_rate, first[-1], False)
    close(np.concatenate([first, rest]), whole)


# ---- the convolution and the gates' matrices


def test_convolution_by_hand():
    """Weight 1000, 100, 10, 1 writes the last four inputs as the digits of a number, the current one last."""
    x = np.float32([[3], [1], [4], [1], [5]])
    weight, bias = np.float32([[1000], [100], [10], [1]]), np.float32([0.5])
    nothing, before = np.zeros((3, 1), np.float32), np.float32([[7], [8], [9]])
    expected = [[3.5], [31.5], [314.5], [3141.5], [1415.5]]
    assert causal_conv1d(x, weight, bias, nothing).tolist() == expected
    expected[:3] = [[7893.5], [8931.5], [9314.5]]
    assert causal_conv1d(x, weight, bias, before).tolist() == expected


def test_convolution_keeps_channels_apart():
    x, weight, bias, before = normal(9, 6), normal(4, 6), normal(6), normal(3, 6)
    whole = causal_conv1d(x, weight, bias, before)
    for e in range(6):
        seen = np.concatenate([before, x])[:, e].astype(np.float64)
        close(whole[:, e], np.convolve(seen, weight[::-1, e].astype(np.float64), "valid") + bias[e])


@pytest.mark.parametrize("cut", [1, 2, 3, 8])
def test_convolution_in_two_pieces_is_one(cut):
    x, weight, bias, before = normal(11, 5), normal(4, 5), normal(5), normal(3, 5)
    whole = causal_conv1d(x, weight, bias, before)
    tail = np.concatenate([before, x[:cut]])[-3:]
    pieces = causal_conv1d(x[:cut], weight, bias, before), causal_conv1d(x[cut:], weight, bias, tail)
    close(np.concatenate(pieces), whole)


@pytest.mark.parametrize("kind", [np.asarray, round_bf16], ids=["f32", "bf16"])
@pytest.mark.parametrize("T, M, size", [(1, 1, 8), (3, 4, 18), (33, 2, 64), (9, 10, 32)])
def test_block_diagonal_is_the_dense_matrix_with_zeros_elsewhere(T, M, size, kind):
    """The stored axes are (block, input, output): the dense matrix multiplies from the right, untransposed."""
    x, weight, bias = normal(T, M * size), kind(normal(M, size, size)), normal(M, size)
    dense = np.zeros((M * size, M * size))
    for m in range(M):
        block = slice(m * size, (m + 1) * size)
        dense[block, block] = widen_bf16(weight[m])
    close(block_diagonal(x, weight, bias), x.astype(np.float64) @ dense + bias.reshape(-1))


# ---- the whole block, and its state


def make_block(D=40, E=24, M=3):
    size = E // M
    shapes = {"y": (E, D), "x": (E, D), "out": (D, E)}
    matrices = {name: Weight.pack(LAYOUTS["f32"], normal(*shape) / 6) for name, shape in shapes.items()}
    biases = {"y_bias": normal(E), "x_bias": normal(E), "out_bias": normal(D)}
    gates = {"recurrence_gate": normal(M, size, size), "recurrence_bias": normal(M, size)}
    gates |= {"input_gate": normal(M, size, size), "input_bias": normal(M, size)}
    conv = {"conv": normal(4, E), "conv_bias": normal(E)}
    decay = softplus(rng.uniform(-7, 0, E).astype(np.float32))
    return RecurrentWeights(pre_norm=normal(D), **matrices, **biases, **gates, **conv, decay=decay)


def run(x, w, state, position, commit=True):
    positions = np.arange(position, position + len(x), dtype=np.int32)
    tokens = TokenPositions(positions, positions, len(x))
    y = recurrent_block(x, w, 1e-6, state, tokens, NO_TAPS.within("blocks.0"))
    if commit:
        state.commit(position + len(x))
    return y


def by_figure_2(x, w):
    """Figure 2 of the paper in float64, from position 0, with dense gates, the equations above, norm and residual."""
    residual, E = x.astype(np.float64), len(w.decay)
    x = residual / np.sqrt((residual**2).mean(axis=-1, keepdims=True) + 1e-6) * (1 + w.pre_norm)
    z, through = x @ w.x.widen().T + w.x_bias, x @ w.y.widen().T + w.y_bias
    padded = np.concatenate([np.zeros((3, E)), z])
    conv = sum(w.conv[c] * padded[c : c + len(x)] for c in range(4)) + w.conv_bias
    gates = []
    for weight, bias in ((w.recurrence_gate, w.recurrence_bias), (w.input_gate, w.input_bias)):
        parts = [part @ weight[m] + bias[m] for m, part in enumerate(np.split(conv, len(weight), axis=1))]
        gates.append(np.concatenate(parts, axis=1))
    h = equations(conv, *gates, w.decay, np.zeros(E), True)
    gelu = through / 2 * (1 + np.tanh(np.sqrt(2 / np.pi) * (through + 0.044715 * through**3)))
    return residual + (h * gelu) @ w.out.widen().T + w.out_bias, z, h


def test_recurrent_block_is_figure_2():
    w, x, state = make_block(), normal(13, 40), RecurrentState(4, 24)
    expected, z, h = by_figure_2(x, w)
    close(run(x, w, state, 0), expected, 1e-5)
    close(state.tail, z[-3:], 1e-5)
    close(state.h, h[-1], 1e-5)


@pytest.mark.parametrize("size", [1, 2, 3, 5])
def test_recurrent_block_in_pieces_is_one(size):
    """Pieces of 1 and 2 are shorter than the tail of the convolution."""
    w, x, state = make_block(), normal(13, 40), RecurrentState(4, 24)
    pieces = [run(x[t : t + size], w, state, t) for t in range(0, len(x), size)]
    close(np.concatenate(pieces), by_figure_2(x, w)[0], 1e-5)


@pytest.mark.parametrize("lost", [1, 2, 7])
def test_an_interrupted_pass_leaves_the_state_as_it_was(lost):
    w, x = make_block(), normal(20, 40)
    whole, broken = RecurrentState(4, 24), RecurrentState(4, 24)
    for state in (whole, broken):
        run(x[:9], w, state, 0)
    tail, h = (a.copy() for a in broken.read())
    run(x[9 : 9 + lost] + 5, w, broken, 9, commit=False)
    assert np.array_equal(broken.read()[0], tail)
    assert np.array_equal(broken.read()[1], h)
    for t in range(9, 20):
        assert np.array_equal(run(x[t : t + 1], w, broken, t), run(x[t : t + 1], w, whole, t))


def test_a_state_does_not_share_memory_with_what_was_proposed():
    state, tail, h = RecurrentState(4, 5), normal(3, 5), normal(5)
    kept = tail.copy(), h.copy()
    state.propose(tail, h)
    tail[:], h[:] = 0, 0
    state.commit(1)
    assert np.array_equal(state.tail, kept[0])
    assert np.array_equal(state.h, kept[1])


def test_size_of_a_state_and_copies_that_part():
    state = RecurrentState(4, 24)
    assert state.nbytes == 4 * (3 * 24 + 24)
    w, x = make_block(), normal(6, 40)
    run(x[:5], w, state, 0)
    other = Cache((state,), 10).copy().layers[0]
    tail, h = state.tail.copy(), state.h.copy()
    run(x[5:], w, other, 5)
    assert np.array_equal(state.tail, tail)
    assert np.array_equal(state.h, h)
    assert not np.array_equal(other.h, h)
    assert state.nbytes == other.nbytes == 4 * (3 * 24 + 24)
