"""A weight's array is what its layout says, and every layout gives its rows back."""

import pickle

import numpy as np
import pytest

from minigemma.layouts import LAYOUTS, STORED, Weight, int8
from minigemma.layouts.gguf_blocks import dequantize

FORMS = LAYOUTS | STORED


@pytest.mark.parametrize("name", FORMS)
def test_a_weight_and_its_rows(name):
    x = np.random.default_rng(0).standard_normal((48, 96), np.float32)
    layout, ids = FORMS[name], np.array([17, 0, 47, 17])
    weight = Weight.pack(layout, x)
    wide = weight.widen()
    assert (
        weight.nbytes == layout.nbytes(48, 96) and wide.shape == weight.shape == (48, 96) and wide.dtype == np.float32
    )
    assert weight.nbytes == pytest.approx(48 * 96 * layout.bits / 8, rel=0.1)  # with the scales of rows of 96
    assert np.abs(wide - x).max() <= {32: 0, 16: 0.02, 8.5: 0.02, 8: 0.14}.get(layout.bits, 0.9)
    np.testing.assert_array_equal(weight.rows(ids), wide[ids])
    np.testing.assert_array_equal(weight.part(16, 32).widen(), wide[16:32])
    with pytest.raises(IndexError):
        weight.rows(np.array([48]))
    with pytest.raises(ValueError, match="read-only"):
        weight.data[:] = 0


@pytest.mark.parametrize("name", FORMS)
def test_an_array_that_is_not_what_the_layout_says_is_refused(name):
    layout = FORMS[name]
    data = layout.pack(np.ones((32, 64), np.float32))
    assert Weight(layout, data, (32, 64)).data.flags.c_contiguous
    wrong = [data[:-1], data[..., :-1], data[None], data.astype(np.float64), data.astype(np.int16)]
    for array in (*wrong, np.repeat(data, 2, axis=0)):
        with pytest.raises(ValueError, match="is not the layout"):
            Weight(layout, array, (32, 64))
    for shape in ((32, 65), (31, 64), (32,), (32, 64, 1)):
        with pytest.raises(ValueError, match="is not the layout"):
            Weight(layout, data, shape)


def test_the_array_that_was_given_stays_as_it_was():
    data = np.ones((3, 4), np.float32)
    assert not Weight(LAYOUTS["f32"], data, (3, 4)).data.flags.writeable and data.flags.writeable


def test_blocks_widen_as_ggml_says():
    blocks = np.zeros((1, 1, 34), np.uint8)
    blocks[0, 0, :2] = np.array([0.5], np.float16).view(np.uint8)
    blocks[0, 0, 2:] = np.arange(-16, 16).astype(np.int8).view(np.uint8)
    assert int8.unpack(blocks)[0].tolist() == [q / 2 for q in range(-16, 16)]
    int4 = np.zeros((1, 1, 18), np.uint8)
    int4[0, 0, :2] = np.array([-2], np.float16).view(np.uint8)
    int4[0, 0, 2:] = [i | (15 - i) << 4 for i in range(16)]
    assert dequantize("Q4_0", int4)[0].tolist() == [-2 * (q - 8) for q in [*range(16), *range(15, -1, -1)]]


@pytest.mark.parametrize("name", [*LAYOUTS, *STORED])
def test_a_weight_goes_to_another_process(name):
    layout = (LAYOUTS | STORED)[name]
    weight = Weight.pack(layout, np.random.default_rng(0).standard_normal((32, 64), np.float32))
    weight.forms["made by a kernel"] = lambda: None  # is made again there
    other = pickle.loads(pickle.dumps(weight))
    assert other.layout is layout and other.shape == (32, 64) and np.array_equal(other.data, weight.data)
    assert not other.forms and weight.forms
