"""The machine is measured."""

import numpy as np

from minigemma.kernels.peaks import arithmetic_peak, read_bandwidth


def test_the_machine_is_measured():
    assert 1e7 < read_bandwidth(np.ones(1 << 24, np.float32)) < 1e13  # whatever else wants the machine meanwhile
    assert 1e7 < arithmetic_peak() < 1e14
