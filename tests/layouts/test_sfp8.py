"""SFP8: every code by hand, nearest by exhaustion, and the facts that are known of the format."""

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from minigemma.layouts.sfp8 import LARGEST, MAGNITUDES, SCALE_BYTES, VALUES, dequantize_sfp8, quantize_sfp8


def by_hand(code):
    """The table at the top of sfp8.py, bit by bit."""
    sign = -1 if code & 0b1000_0000 else 1
    if code & 0b0100_0000:
        return sign * (1 + (code & 0b111) / 8) * 2.0 ** ((code >> 3 & 0b111) - 7)
    if not code & 0b0111_1111:
        return 0.0
    return sign * (1 + (code & 0b11) / 4) * 2.0 ** ((code >> 2 & 0b1111) - 23)


def test_every_code():
    assert [float(v) for v in VALUES] == [by_hand(code) for code in range(256)]


def test_known_facts():
    """Largest 1.875, smallest 0.625 · 2⁻²², three bits of fraction from 2⁻⁷ on, magnitudes that rise with the code."""
    assert MAGNITUDES[-1] == LARGEST == 1.875
    assert MAGNITUDES[1] == 0.625 * 2.0**-22
    assert (np.diff(MAGNITUDES) > 0).all()
    assert MAGNITUDES[64] == 2.0**-7
    assert MAGNITUDES[65] / MAGNITUDES[64] == 1.125 and MAGNITUDES[62] / MAGNITUDES[61] == 1.5 / 1.25


@given(st.lists(st.floats(-1e3, 1e3, width=32), min_size=1, max_size=20))
def test_nearest(row):
    x = np.array([row], np.float32)
    made = quantize_sfp8(x)
    scale = made[0, :SCALE_BYTES].copy().view(np.float32)[0]
    found = dequantize_sfp8(made)[0]
    for value, got in zip(x[0].astype(np.float64), found.astype(np.float64), strict=True):
        best = np.abs(VALUES.astype(np.float64) * scale - value).min()
        assert abs(got - value) <= best + 1e-6 * abs(value) + 1e-12


def test_what_it_means_comes_back_exactly():
    codes = np.setdiff1d(np.arange(256), [128]).astype(np.uint8)  # 128 is a second zero
    rows = np.concatenate([np.array([0.25], np.float32).view(np.uint8), codes])[None]
    np.testing.assert_array_equal(quantize_sfp8(dequantize_sfp8(rows)), rows)


def test_rows_of_zeros():
    assert not dequantize_sfp8(quantize_sfp8(np.zeros((2, 8), np.float32))).any()
