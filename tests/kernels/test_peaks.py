"""The machine is measured."""

import numpy as np

from minigemma.kernels.dispatch import TABLE
from minigemma.kernels.peaks import PEAKS, arithmetic_peak, read_bandwidth


def test_the_machine_is_measured():
    assert 1e7 < read_bandwidth(np.ones(1 << 24, np.float32)) < 1e13  # whatever else wants the machine meanwhile
    assert 1e7 < arithmetic_peak() < 1e14


def test_every_multiply_of_the_dispatch_table_has_a_peak():
    assert {path.multiplies for row in TABLE.values() for path in row.values()} == set(PEAKS)
