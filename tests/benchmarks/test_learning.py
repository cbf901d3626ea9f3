"""The comparison of a training: the recorded runs agree with torch's, and a new one begins like it."""

import json

import pytest

from benchmarks import learning
from minigemma.train.sizes import TINY

WITHIN = 0.03  # of torch's held-out loss


def test_recorded_losses_are_those_of_torch():
    record = json.loads(learning.RECORD.read_text())
    assert set(record) == set(TINY)
    for run in record.values():
        assert run["held_out"]["minigemma"] == pytest.approx(run["held_out"]["torch"], rel=WITHIN)
    assert learning.table(record).count("\n") == 1 + len(TINY)


@pytest.mark.oracle
@pytest.mark.parametrize("name", ["tiny-gemma-2", "tiny-gemma-3"])
def test_steps_in_torch_have_the_same_losses(name):
    pytest.importorskip("transformers")
    run = learning.compared(name, 2000)
    assert run["losses"]["minigemma"] == pytest.approx(run["losses"]["torch"], abs=1e-3)
    assert run["held_out"]["minigemma"] == pytest.approx(run["held_out"]["torch"], abs=1e-3)
