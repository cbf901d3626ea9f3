"""Weights as kernels take them: a NamedTuple type for each layout, by which `by_type` picks the functions for it;
and rows as float32.

`data` has one axis and is read-only. Rows of float32 and bf16 are padded with zeros to a multiple of 16 columns, in a
copy, so that no kernel has a loop for a partial vector; no released text model needs this.
"""

from collections.abc import Iterable
from typing import Any, NamedTuple

import numpy as np
from llvmlite import ir
from numba.extending import intrinsic
from numpy.typing import NDArray

from ..arrays import F32, read_only
from ..layouts import Weight
from ..layouts.int4 import SIDE, SYMMETRIC_BYTES
from ..layouts.int8 import BLOCK, BYTES
from .compiler import by_type, jit_inlined, jit_inner
from .simd.cpu import LANES
from .simd.memory import load, splat_half, store

SYMMETRIC_WORDS = SYMMETRIC_BYTES // 4  # of a block without minima
SHORTEST, PADDED = 16, 32  # columns of the longest vector; rows are padded to a multiple of PADDED


class F32Rows(NamedTuple):
    """float32, row after row."""

    data: F32
    rows: int
    columns: int


class BF16Rows(NamedTuple):
    """bf16 as uint16, row after row."""

    data: NDArray[np.uint16]
    rows: int
    columns: int


class Int8Rows(NamedTuple):
    """Blocks of 34 bytes: a float16 scale, then 32 int8 (layouts/int8.py)."""

    data: NDArray[np.int8]
    rows: int
    columns: int


class Int4Rows(NamedTuple):
    """Blocks of 80 words, or of 72 without minima, in which sixteen rows are interleaved (layouts/int4.py)."""

    data: NDArray[np.uint32]
    rows: int
    columns: int


KernelWeight = F32Rows | BF16Rows | Int8Rows | Int4Rows
TYPES: dict[str, tuple[type, type]] = {
    "f32": (F32Rows, np.float32),
    "bf16": (BF16Rows, np.uint16),
    "int8": (Int8Rows, np.int8),
    "int4": (Int4Rows, np.uint32),
    "int4-symmetric": (Int4Rows, np.uint32),
}


def of(weight: Weight) -> KernelWeight:
    """The weight as kernels take it, made once. Its `columns` include padding."""
    if "rows" not in weight.forms:
        made, kind = TYPES[weight.layout.name]
        (R, D), data = weight.shape, weight.data
        if weight.layout.columns == 1 and D % SHORTEST:
            data, D = np.pad(data, ((0, 0), (0, -D % PADDED))), D + -D % PADDED
        weight.forms["rows"] = made(read_only(data.reshape(-1).view(kind)), R, D)
    return weight.forms["rows"]


def no_rows(weight: KernelWeight) -> KernelWeight:
    """The same weight without rows, to fill up the three that a kernel takes."""
    return type(weight)(weight.data[:0], 0, weight.columns)  # type: ignore[arg-type]


@jit_inlined
def _length_of_numbers(weight):
    """The elements of a row."""
    return weight.columns


@jit_inlined
def _length_of_blocks(weight):
    return weight.columns // BLOCK * BYTES


row_length = by_type(
    "row_length", {F32Rows: _length_of_numbers, BF16Rows: _length_of_numbers, Int8Rows: _length_of_blocks}
)


@jit_inner
def _widen_numbers(weight, row, first, count, out, to):
    """out[to : to + count] = columns first … first + count - 1 of a row; both multiples of LANES, of int8 of 32."""
    at = row * weight.columns + first
    for k in range(0, count, LANES):
        store(out, to + k, load(weight.data, at + k))


@jit_inner
def _widen_blocks(weight, row, first, count, out, to):
    at = row * row_length(weight) + first // BLOCK * BYTES
    for k in range(to, to + count, BLOCK):
        scale = splat_half(weight.data, at)
        for j in range(0, BLOCK, LANES):
            store(out, k + j, load(weight.data, at + 2 + j) * scale)
        at += BYTES


widen_row = by_type("widen_row", {F32Rows: _widen_numbers, BF16Rows: _widen_numbers, Int8Rows: _widen_blocks})


def _receives(kind):
    @jit_inlined
    def rows_of(data, rows, columns):
        return kind(data, rows, columns)

    return rows_of


# The weight of `data` [·] as its NamedTuple, inside a kernel. Numba takes 0.7 µs to receive each NamedTuple from Python
# and 0.1 µs for each item of a plain tuple, so the fused kernels receive plain tuples and begin with this.
received = by_type("received", {kind: _receives(made) for made, kind in TYPES.values()}, on="data")


# A kernel of many layers would take 0.1 µs to receive each of their arrays from Python. It receives a table of their
# addresses instead, made once; Python keeps the arrays alive.


def addresses(rows: Iterable[Iterable[NDArray[Any]]]) -> NDArray[np.int64]:
    """Address and size of contiguous arrays of one axis: int64 [rows, arrays of a row, 2]."""
    return np.array([[(array.ctypes.data, array.size) for array in row] for row in rows], np.int64)


@intrinsic
def arrays_at(typingctx, table, row, like):
    """The arrays of one row of `addresses`, with the types of the arrays in the tuple `like`."""
    word = ir.IntType(64)

    def codegen(context, builder, signature, args):
        data = context.make_array(table)(context, builder, args[0]).data
        first, arrays = builder.mul(args[1], word(2 * len(like))), []
        for i, kind in enumerate(like):
            array = context.make_array(kind)(context, builder)
            at = [builder.add(first, word(2 * i + j)) for j in range(2)]
            address, size = (builder.load(builder.gep(data, [index])) for index in at)
            array.data = builder.inttoptr(address, array.data.type)
            array.nitems, array.itemsize = size, word(kind.dtype.bitwidth // 8)
            array.shape = builder.insert_value(array.shape, size, 0)
            array.strides = builder.insert_value(array.strides, array.itemsize, 0)
            array.meminfo, array.parent = array.meminfo.type(None), array.parent.type(None)
            arrays.append(array._getvalue())
        return context.make_tuple(builder, like, arrays)

    return like(table, row, like), codegen


# ---- int4: what differs between blocks with minima and those without


@jit_inlined
def block_words(weight):
    """The words of a block of sixteen rows."""
    return weight.data.size // max(1, weight.rows // SIDE * (weight.columns // BLOCK))


@jit_inlined
def minima_at(weight):
    """The word of a block at which the minima begin; 0: there are none, and its scales take their place."""
    return block_words(weight) - SYMMETRIC_WORDS


@jit_inlined
def factor_of_minima(weight):
    """What those numbers are multiplied by."""
    return np.float32(1 if minima_at(weight) else -8)
