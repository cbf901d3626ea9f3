"""Arrays that kernels make and see in another shape: they are NumPy's, and they live as long as somebody holds them."""

import gc

import numba
import numpy as np
import pytest

from minigemma.arrays import read_only
from minigemma.kernels.views import array_at, arrays_of, new_array, new_zeros, reshaped


@numba.njit
def filled(a, b, value):
    one, two = new_array(a, np.int16), new_array((a, b, 2), np.float32)
    for i in range(a):
        one[i] = value
        for j in range(b):
            two[i, j, 0], two[i, j, 1] = value, -value
    return one, two


@numba.njit
def after_others(shape):
    for _ in range(8):  # memory that was full of ones
        new_array(shape, np.uint8)[:] = 255
    return new_zeros(shape, np.uint8), new_zeros((shape, 3), np.float64), new_zeros(0, np.int16)


@numba.njit
def in_rows(array, rows, columns):
    return reshaped(array, (rows, columns))


@numba.njit
def in_one_axis(array):
    return reshaped(array, array.size)


@numba.njit
def sum_of(table, row, i, like):
    return array_at(table, row, i, like).sum()


@pytest.mark.parametrize("size", (1, 7, 4096))
def test_new_zeros_are_zeros(size):
    one, two, none = after_others(size)
    assert one.shape == (size,) and not one.any() and one.dtype == np.uint8
    assert two.shape == (size, 3) and not two.any() and none.shape == (0,)


def test_new_arrays_are_numpys():
    one, two = filled(3, 4, 7)
    assert one.dtype == np.int16 and one.tolist() == [7] * 3
    assert two.dtype == np.float32 and two.shape == (3, 4, 2) and two.flags.c_contiguous
    assert np.array_equal(two[..., 0], np.full((3, 4), 7)) and np.array_equal(two[..., 1], np.full((3, 4), -7))


def test_another_shape_is_the_same_memory_and_keeps_it():
    x = np.arange(12, dtype=np.float32)
    y = in_rows(x, 3, 4)
    assert np.array_equal(y, x.reshape(3, 4))
    y[1, 1] = 100
    assert x[5] == 100
    z = in_one_axis(in_rows(filled(50, 60, 3)[1].reshape(-1), 100, 60))
    gc.collect()
    filled(50, 60, 9)  # would take the place of what nobody holds
    assert np.array_equal(z.reshape(-1, 2), [[3, -3]] * 3000)


def test_what_is_read_only_stays_so():
    assert not in_rows(read_only(np.arange(6)), 2, 3).flags.writeable


def test_rows_with_gaps_are_refused():
    with pytest.raises(TypeError, match="gaps"):
        in_one_axis(np.zeros((4, 4))[:, :2])


def test_arrays_of_a_table():
    rows = [[np.arange(i + j, dtype=np.int32) for j in range(3)] for i in range(4)]
    table = arrays_of(rows)
    for i in range(4):
        for j in range(3):
            assert sum_of(table, i, j, rows[0][0]) == sum(range(i + j))
