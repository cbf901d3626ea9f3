"""AdamW against torch's, the schedule at its ends, and which parameters decay."""

import math

import numpy as np
import pytest
from support.oracles import answered_by

from minigemma.train.optimizer import AdamW, decays, learning_rate

STEPS = 10


def start():
    random = np.random.default_rng(5)
    shapes = {"blocks.0.ffn.up": (7, 33), "final_norm": (33,), "embedding": (40, 33)}
    return {name: random.standard_normal(shape, np.float32) for name, shape in shapes.items()}


def gradients(step):
    """Small in the first steps, so that some are clipped to a norm of 1 and some are not."""
    random = np.random.default_rng((6, step))
    return {name: random.standard_normal(w.shape, np.float32) * np.float32(0.01 * step) for name, w in start().items()}


@answered_by("torch", file="adamw")
def ten_steps_of_torch(clip, weight_decay):
    import torch

    weights = {name: torch.nn.Parameter(torch.tensor(w)) for name, w in start().items()}
    plain = [w for name, w in weights.items() if name != "blocks.0.ffn.up"]
    groups = [{"params": [weights["blocks.0.ffn.up"]], "weight_decay": weight_decay}]
    groups += [{"params": plain, "weight_decay": 0.0}]
    adam = torch.optim.AdamW(groups, lr=0.0, betas=(0.9, 0.95), eps=1e-8)
    norms = []
    for step in range(1, STEPS + 1):
        for name, g in gradients(step).items():
            weights[name].grad = torch.tensor(g)
        for group in adam.param_groups:
            group["lr"] = 0.003 * step
        norms.append(float(torch.nn.utils.clip_grad_norm_(weights.values(), clip)))
        adam.step()
    return [np.array(norms, np.float32), *(w.detach().numpy() for w in weights.values())]


def test_ten_steps_equal_those_of_torch(answers):
    adam, norms = AdamW(start(), weight_decay=0.1), []
    for step in range(1, STEPS + 1):
        for name, g in gradients(step).items():
            adam.gradients[name][...] = g
        norms.append(adam.step(0.003 * step, clip=1.0))
        assert not any(g.any() for g in adam.gradients.values())
    expected_norms, *expected = ten_steps_of_torch(1.0, 0.1)
    assert norms[0] < 1 < norms[-1]
    np.testing.assert_allclose(norms, expected_norms, rtol=1e-5)
    for name, values in zip(start(), expected, strict=True):
        np.testing.assert_allclose(adam.parameters[name], values, rtol=0, atol=2e-6)


@pytest.mark.parametrize("spoilt", [np.nan, np.inf, 1e30])
def test_a_gradient_that_is_not_finite_changes_nothing(spoilt):
    adam = AdamW(start())
    before = [array.copy() for array in adam.arrays]
    adam.gradients["embedding"][3, 4] = spoilt
    assert not np.isfinite(adam.step(0.1, clip=1.0))
    assert adam.updates == 0
    for array, was in zip(adam.arrays, before, strict=True):
        np.testing.assert_array_equal(array, was)


@pytest.mark.parametrize("clip", [0.5, math.inf])
def test_an_infinite_clip_cuts_nothing(clip):
    adam = AdamW({"w": np.ones((1, 2), np.float32)}, weight_decay=0.0)
    adam.gradients["w"][:] = 1
    assert adam.step(0.1, clip) == pytest.approx(math.sqrt(2))
    np.testing.assert_allclose(adam.parameters["w"], 0.9, atol=1e-6)
    np.testing.assert_allclose(adam.means[:2], 0.1 * min(1, clip / math.sqrt(2)), rtol=1e-6)


def test_what_the_caller_gave_is_not_changed():
    given = start()
    adam = AdamW(given)
    adam.gradients["final_norm"][:] = 1
    adam.step(0.1, clip=1.0)
    np.testing.assert_array_equal(given["final_norm"], start()["final_norm"])


@pytest.mark.parametrize(
    "name, shape, decayed",
    [
        ("blocks.0.attention.q", (8, 8), True),
        ("blocks.0.ffn.gate", (8, 8), True),
        ("blocks.0.recurrent.conv", (4, 8), True),
        ("embedding", (9, 8), False),
        ("blocks.0.ffn.pre_norm", (8,), False),
        ("blocks.0.ffn.up_bias", (8,), False),
        ("blocks.0.recurrent.decay", (8,), False),
        ("blocks.0.recurrent.input_gate", (2, 4, 4), False),
        ("blocks.0.recurrent.input_bias", (2, 4), False),
    ],
)
def test_weight_decay_spares_what_recurrentgemma_spares(name, shape, decayed):
    assert decays(name, np.zeros(shape, np.float32)) == decayed


def test_the_learning_rate_rises_falls_and_ends():
    rates = [learning_rate(step / 100, 2.0, 0.1, 0.1) for step in range(1, 101)]
    assert np.allclose(np.diff(rates[:10]), 0.2) and rates[9] == 2.0
    assert all(np.diff(rates[9:]) < 0) and rates[-1] == pytest.approx(0.2)
    assert learning_rate(0.5, 2.0, 0.0, 1.0) == 2.0 and learning_rate(1.0, 2.0, 1.0, 0.0) == 2.0
