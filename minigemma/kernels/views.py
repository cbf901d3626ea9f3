"""Arrays inside of kernels: made, seen in another shape, found by an address.

Numba's `np.empty`, `np.zeros`, `copy` and `reshape` are functions that it compiles anew for each number of axes and
each kind of caller, a tenth of what a first run compiles; these are a few instructions in the kernel itself.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from llvmlite import ir
from numba import types
from numba.core import cgutils
from numba.core.imputils import impl_ret_borrowed
from numba.extending import intrinsic
from numpy.typing import NDArray


def _sizes(builder, shape, kind):
    return cgutils.unpack_tuple(builder, shape) if isinstance(kind, types.BaseTuple) else [shape]


def _axes(kind):
    return len(kind) if isinstance(kind, types.BaseTuple) else 1


def _fill(context, builder, kind, data, sizes, meminfo, parent=None):
    """An array of `kind`, without gaps, of what lies at `data`."""
    from numba.np.arrayobj import populate_array  # of the compiler, which kernels compiled before do not need

    array, element = context.make_array(kind)(context, builder), context.get_data_type(kind.dtype)
    itemsize = context.get_constant(types.intp, context.get_abi_sizeof(element))
    steps = [itemsize]
    for size in reversed(sizes[1:]):
        steps.append(builder.mul(steps[-1], size))
    populate_array(array, data, sizes, steps[::-1], itemsize, meminfo=meminfo, parent=parent)
    return array._getvalue()


def _new(shape, dtype, zeros):
    """What an intrinsic returns that makes an array."""
    made = types.Array(dtype.dtype, _axes(shape), "C")

    def codegen(context, builder, signature, args):
        from numba.np.arrayobj import _empty_nd_impl

        array = _empty_nd_impl(context, builder, made, _sizes(builder, args[0], signature.args[0]))
        if zeros:
            cgutils.memset(builder, array.data, builder.mul(array.itemsize, array.nitems), 0)
        return array._getvalue()

    return made(shape, dtype), codegen


@intrinsic
def new_array(typingctx, shape, dtype):
    """np.empty(shape, dtype) in a kernel; `shape` is a number or a tuple of numbers."""
    return _new(shape, dtype, zeros=False)


@intrinsic
def new_zeros(typingctx, shape, dtype):
    """np.zeros(shape, dtype) in a kernel."""
    return _new(shape, dtype, zeros=True)


@intrinsic
def reshaped(typingctx, array, shape):
    """array.reshape(shape) in a kernel, of an array without gaps; `shape` has as many numbers in all."""
    if array.layout != "C":
        raise TypeError(f"{array} may have gaps")
    made = array.copy(ndim=_axes(shape))

    def codegen(context, builder, signature, args):
        given = context.make_array(signature.args[0])(context, builder, args[0])
        sizes = _sizes(builder, args[1], signature.args[1])
        value = _fill(context, builder, made, given.data, sizes, given.meminfo, given.parent)
        return impl_ret_borrowed(context, builder, made, value)

    return made(array, shape), codegen


def arrays_of(rows: Sequence[Sequence[NDArray]]) -> NDArray[np.int64]:
    """Where each array begins and how many elements it has: [rows, arrays of a row, 2]. The arrays must stay."""
    return np.array([[(array.ctypes.data, array.size) for array in row] for row in rows], np.int64)


@intrinsic
def array_at(typingctx, table, row, i, like):
    """Array i of a row of `arrays_of`, which is of the type of `like`: one axis, without gaps."""

    def codegen(context, builder, signature, args):
        rows, row, i, _ = args
        of_table, _, _, kind = signature.args
        described = context.make_array(of_table)(context, builder, rows)
        place = builder.add(builder.mul(row, builder.extract_value(described.shape, 1)), i)
        first = builder.gep(described.data, [builder.mul(place, place.type(2))])
        address, size = builder.load(first), builder.load(builder.gep(first, [place.type(1)]))
        data = builder.inttoptr(address, ir.PointerType(context.get_data_type(kind.dtype)))
        return _fill(context, builder, kind, data, [size], None)

    return like(table, types.intp, types.intp, like), codegen
