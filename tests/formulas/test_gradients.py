"""Every gradient: against finite differences of its definition in float64, and against torch's autograd."""

from dataclasses import replace

import numpy as np
import pytest

from minigemma.definition import DEFINITIONS, formulas_only
from minigemma.formulas import conv1d, geglu, layernorm, linear, lora, rglru, rmsnorm, sampling  # noqa: F401
from minigemma.formulas.attention import Mask, softmax, visible
from minigemma.formulas.cross_entropy import Targets
from minigemma.formulas.divergence import Toward
from minigemma.formulas.rope import angles
from minigemma.layouts import LAYOUTS, Weight

rng = np.random.default_rng(11)


def normal(*shape):
    return rng.standard_normal(shape, np.float32)


def attention_case(T, S, N, K, H, window, cap):
    until = np.arange(S - T, S, dtype=np.int32)
    until[: T // 2] = until[T // 2]  # the first half is one image
    mask = Mask(np.arange(S - T, S, dtype=np.int32), until, rng.permutation(S).astype(np.int32), window)
    return normal(T, N, H), normal(S, K, H), normal(S, K, H), mask, H**-0.5, cap


def lru_case(T, E, start):
    return normal(T, E), normal(T, E), normal(T, E), rng.random(E, np.float32) * 0.3 + 0.01, normal(E), start


def matrix(*shape):
    return Weight.pack(LAYOUTS["f32"], normal(*shape))


def targets(T, k, V):
    return Targets(rng.integers(0, V, (T, k)).astype(np.int32), rng.random((T, k), np.float32))


CASES = {
    "linear": [(normal(T, 16), matrix(9, 16)) for T in (1, 7)],
    "low_rank": [(normal(T, 16), normal(3, 16), normal(9, 3), 0.7) for T in (1, 7)],
    "embed": [(np.array([3, 0, 3, 8]), matrix(9, 16), 4.0)],
    "cross_entropy": [(normal(5, 20) * 3, targets(5, k, 20)) for k in (1, 8)],
    "divergence": [(normal(5, 20), Toward(softmax(normal(5, 20)), beta)) for beta in (0, 0.3, 1)],
    "rms_norm": [(normal(3, 16), normal(16), 1e-6), (normal(2, 3, 8), normal(8) - 1, 1e-2)],
    "layer_norm": [(normal(3, 16) * 3 + 1, normal(16), normal(16), 1e-6)],
    "rope": [
        (normal(5, 2, 16), np.arange(7, 12, dtype=np.int32), 1e4, 8.0, 16),
        (normal(3, 1, 16), np.arange(3, dtype=np.int32), 1e4, 1.0, 8),
    ],
    "soft_cap": [(normal(3, 16) * 5, 7.0)],
    "gelu": [(normal(3, 16) * 2,)],
    "gated_gelu": [(normal(3, 16) * 2, normal(3, 16))],
    "log_sum_exp": [(normal(3, 20) * 3,)],
    "causal_conv1d": [(normal(T, 16), normal(4, 16), normal(16), normal(3, 16)) for T in (1, 2, 9)],
    "block_diagonal": [(normal(5, 12), normal(3, 4, 4), normal(3, 4))],
    "linear_scan": [(normal(T, 16), rng.random((T, 16), np.float32), normal(16)) for T in (1, 7)],
    "rg_lru": [lru_case(T, 16, start) for T in (1, 7) for start in (False, True)],
    "attention": [
        attention_case(6, 6, 4, 2, 8, None, None),
        attention_case(5, 9, 4, 1, 8, 4, 2.0),
        attention_case(1, 9, 2, 2, 8, 5, None),
    ],
}
WITH_TORCH = [(name, i) for name, cases in CASES.items() for i in range(len(cases))]


def results(gradient):
    return gradient if isinstance(gradient, tuple) else (gradient,)


def float_arguments(case):
    """Which arguments are arrays of floats, or weights: those that have a gradient."""
    return [i for i, value in enumerate(case) if getattr(value, "dtype", None) == np.float32 or is_weight(value)]


def is_weight(value):
    return isinstance(value, Weight)


def numbers(value):
    """The array of an argument that has a gradient."""
    return value.widen() if is_weight(value) else value


def like(value, array):
    """An array of float64 as the argument that it stands for."""
    if is_weight(value):
        return Weight(replace(value.layout, dtype=np.float64), array, array.shape)
    return array


def test_every_gradient_has_cases():
    with_gradient = {name for name, made in DEFINITIONS.items() if made.backward and not name.startswith("_")}
    assert set(CASES) == with_gradient


@pytest.mark.parametrize("name, number", WITH_TORCH)
def test_gradient_is_the_finite_difference_of_the_definition(name, number):
    made, case = DEFINITIONS[name], CASES[name][number]
    where = float_arguments(case)
    wide = [numbers(value).astype(np.float64) if i in where else value for i, value in enumerate(case)]

    def called(function, *arrays):
        return function(*(like(value, array) for value, array in zip(case, arrays, strict=True)))

    with formulas_only():
        y = called(made, *wide)
        dy = rng.standard_normal(y.shape)
        gradients = results(called(lambda *arguments: made.backward(dy, *arguments), *wide))
        assert len(gradients) == len(where)
        step = 1e-5
        for i, gradient in zip(where, gradients, strict=True):
            direction = rng.standard_normal(wide[i].shape)
            up, down = ([*wide[:i], wide[i] + sign * step * direction, *wide[i + 1 :]] for sign in (1, -1))
            difference = ((called(made, *up) - called(made, *down)) * dy).sum() / (2 * step)
            found, size = (gradient * direction).sum(), np.linalg.norm(gradient) * np.linalg.norm(direction)
            assert abs(found - difference) <= 1e-6 * size, (i, found, difference)


@pytest.mark.oracle
@pytest.mark.parametrize("name, number", WITH_TORCH)
def test_gradient_is_the_one_of_autograd(name, number):
    """The gradient in float32, whose formulas run as kernels, against torch in float64."""
    torch = pytest.importorskip("torch")
    case, where = CASES[name][number], float_arguments(CASES[name][number])
    leaves = [torch.tensor(numbers(case[i]), dtype=torch.float64, requires_grad=True) for i in where]
    given = iter(leaves)
    with torch.enable_grad():  # other programs' tests may have switched gradients off
        y = getattr(Autograd(torch), name)(*(next(given) if i in where else value for i, value in enumerate(case)))
        dy = normal(*y.shape)
        expected = torch.autograd.grad(y, leaves, torch.tensor(dy, dtype=torch.float64), allow_unused=True)
    for found, gradient, leaf in zip(results(DEFINITIONS[name].backward(dy, *case)), expected, leaves, strict=True):
        gradient = np.zeros(leaf.shape) if gradient is None else gradient.numpy()
        assert found.dtype == np.float32 and found.shape == gradient.shape
        np.testing.assert_allclose(found, gradient, rtol=0, atol=1e-5 * max(1, np.abs(gradient).max()))


class Autograd:
    """The formulas in torch, by its own functions where it has them."""

    def __init__(self, torch):
        self.torch, self.functional = torch, torch.nn.functional

    def linear(self, x, weight):
        return self.functional.linear(x, weight)

    def low_rank(self, x, a, b, scale):
        return self.functional.linear(x, (b @ a) * scale)

    def embed(self, ids, weight, scale):
        return self.functional.embedding(self.torch.tensor(ids), weight) * scale

    def cross_entropy(self, logits, targets):
        dense = self.torch.zeros_like(logits)
        dense.scatter_add_(1, self.torch.tensor(targets.ids).long(), self.torch.tensor(targets.weights).double())
        return self.functional.cross_entropy(logits, dense, reduction="none")

    def divergence(self, logits, toward):
        p, q = self.torch.tensor(toward.p).double(), logits.log_softmax(-1)
        m, kl = toward.beta * p + (1 - toward.beta) * q.exp(), self.functional.kl_div
        if toward.beta in (0, 1):
            pair = (q, p.log()) if toward.beta == 0 else (p.log(), q)
            return kl(*pair, reduction="none", log_target=True).sum(-1)
        parts = (kl(m.log(), each, reduction="none", log_target=True).sum(-1) for each in (p.log(), q))
        return sum(share * part for share, part in zip((toward.beta, 1 - toward.beta), parts, strict=True))

    def rms_norm(self, x, weight, eps):
        return self.functional.rms_norm(x, weight.shape, 1 + weight, float(np.float32(eps)))

    def layer_norm(self, x, weight, bias, eps):
        return self.functional.layer_norm(x, weight.shape, weight, bias, float(np.float32(eps)))

    def rope(self, x, positions, base, scale, rotated):
        cos, sin = (self.torch.tensor(a).double()[:, None] for a in angles(positions, base, scale, rotated))
        pairs = self.torch.complex(x[..., : rotated // 2], x[..., rotated // 2 : rotated])
        turned = pairs * self.torch.complex(cos, sin)
        return self.torch.cat([turned.real, turned.imag, x[..., rotated:]], dim=-1)

    def soft_cap(self, x, cap):
        return cap * self.torch.tanh(x / cap)

    def gelu(self, z):
        return self.functional.gelu(z, approximate="tanh")

    def gated_gelu(self, gate, up):
        return self.gelu(gate) * up

    def log_sum_exp(self, logits):
        return self.torch.logsumexp(logits, dim=-1)

    def causal_conv1d(self, x, weight, bias, before):
        seen = self.torch.cat([before, x]).T[None]
        return self.functional.conv1d(seen, weight.T[:, None], bias, groups=len(bias))[0].T

    def block_diagonal(self, x, weight, bias):
        blocks = x.reshape(len(x), len(weight), -1).transpose(0, 1)
        return self.torch.baddbmm(bias[:, None], blocks, weight).transpose(0, 1).reshape(x.shape)

    def linear_scan(self, x, decay, state):
        h = []
        for t in range(len(x)):
            state = decay[t] * state + x[t]
            h.append(state)
        return self.torch.stack(h)

    def rg_lru(self, x, recurrence, entering, decay_rate, state, start):
        a = self.torch.exp(-8 * self.torch.sigmoid(recurrence) * decay_rate)
        root = self.torch.sqrt(1 - a * a)
        if start:
            first = self.torch.arange(len(x))[:, None] == 0
            a, root = a.masked_fill(first, 0), root.masked_fill(first, 1)
        return self.linear_scan(root * self.torch.sigmoid(entering) * x, a, state)

    def attention(self, q, k, v, mask, scale, cap):
        groups = q.shape[1] // k.shape[1]
        k, v = (a.repeat_interleave(groups, dim=1) for a in (k, v))
        scores = self.torch.einsum("tnh,snh->nts", q, k) * scale
        scores = scores if cap is None else self.soft_cap(scores, cap)
        hidden = self.torch.tensor(~visible(*mask))
        return self.torch.einsum("nts,snh->tnh", scores.masked_fill(hidden, -self.torch.inf).softmax(-1), v)


@pytest.mark.parametrize("cut", [1, 4, 6])
def test_scan_handed_over_at_a_cut_has_the_gradient_of_the_whole(cut):
    """The second piece hands the gradient of its state back to the first, whose last h that state is."""
    x, recurrence, entering, rate, state, start = lru_case(7, 16, False)
    dh, rows = normal(7, 16), (x, recurrence, entering)
    gradient, run = DEFINITIONS["rg_lru"].backward, DEFINITIONS["rg_lru"]
    whole = gradient(dh, *rows, rate, state, start)
    middle = run(*(a[:cut] for a in rows), rate, state, start)[-1]
    second = gradient(dh[cut:], *(a[cut:] for a in rows), rate, middle, False)
    dh_first = dh[:cut].copy()
    dh_first[-1] += second[4]
    first = gradient(dh_first, *(a[:cut] for a in rows), rate, state, start)
    for a, b, both in zip(first[:3], second[:3], whole[:3], strict=True):
        np.testing.assert_allclose(np.concatenate([a, b]), both, atol=1e-5)
    np.testing.assert_allclose(first[3] + second[3], whole[3], atol=1e-4)
    np.testing.assert_allclose(first[4], whole[4], atol=1e-5)


def test_the_derivative_of_the_root_is_bounded():
    """Near a = 1 the derivative of √(1 - a²) grows without bound; RecurrentGemma was trained with at most 1,000."""
    x, recurrence, entering, _, state, _ = lru_case(3, 16, False)
    for rate in np.float32([0, 1e-12, 1e-9]):
        arguments = x, recurrence, entering, np.full(16, rate), state, False
        gradients = DEFINITIONS["rg_lru"].backward(normal(3, 16), *arguments)
        assert all(np.isfinite(gradient).all() for gradient in gradients)
