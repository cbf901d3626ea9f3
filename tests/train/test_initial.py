"""Initial parameters have the spread that the page says, and a model of them starts near the uniform loss."""

import numpy as np
import pytest

from minigemma.formulas.rglru import softplus
from minigemma.train.initial import initial_parameters
from minigemma.train.sizes import TINY


@pytest.mark.parametrize("config", TINY.values(), ids=lambda config: config.name)
def test_every_parameter_is_there_once_with_its_spread(config):
    parameters = initial_parameters(config, seed=3)
    assert sum(x.size for x in parameters.values()) == config.embedding_parameters + config.non_embedding_parameters
    for name, x in parameters.items():
        assert x.dtype == np.float32 and x.flags.c_contiguous
        if name.endswith(("norm", "_bias")):
            assert not x.any()
        elif name.endswith((".o", ".down", ".out")):
            assert x.std() * (2 * config.layers * x.shape[1]) ** 0.5 == pytest.approx(1, abs=0.05)
        elif name.endswith((".q", ".gate", ".x", "_gate")) or name == "embedding":
            assert x.std() * x.shape[-1] ** 0.5 == pytest.approx(1, abs=0.05)


def test_the_recurrence_begins_with_its_decay_between_0_9_and_0_999():
    decays = [x for name, x in initial_parameters(TINY["tiny-recurrentgemma"], 0).items() if name.endswith("decay")]
    rho = np.exp(-softplus(np.concatenate(decays)))
    assert 0.9 <= rho.min() < 0.905 and 0.998 < rho.max() <= 0.9991
    assert np.square(rho).mean() == pytest.approx((0.9**2 + 0.999**2) / 2, abs=0.005)
    assert decays[0].any()


def test_a_seed_says_all():
    one, same, other = (initial_parameters(TINY["tiny-gemma-3"], seed) for seed in (1, 1, 2))
    assert all((one[name] == same[name]).all() for name in one)
    assert (one["embedding"] != other["embedding"]).all()
