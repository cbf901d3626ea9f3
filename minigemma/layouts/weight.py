"""A weight: its layout, the array that holds it, and the shape [R, D] that it has as a matrix."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import numpy as np
from numpy.typing import DTypeLike, NDArray

from ..arrays import F32, I32, read_only


@dataclass(frozen=True, eq=False)
class Layout:
    """How the numbers of a matrix [R, D] lie in an array. `pack` rounds to the nearest, `unpack` is exact."""

    name: str  # as `load(…, dtype=name)` calls it
    bits: float  # of a weight, with its share of the scales
    dtype: DTypeLike  # of the array
    data_shape: Callable[[int, int], tuple[int, ...]]  # of the array, from R and D
    pack: Callable[[F32], NDArray]  # float32 [R, D] → the array
    unpack: Callable[[NDArray], F32]  # the array → float32 [R, D]
    rows: int = 1  # R is a multiple of this: the rows that one step along the array's first axis holds
    columns: int = 1  # D is a multiple of this: the columns of a block

    def fits(self, rows: int, columns: int) -> bool:
        """Can a matrix [R, D] have this layout?"""
        return rows % self.rows == 0 and columns % self.columns == 0

    def __reduce__(self) -> tuple[Any, ...]:
        """For pickle: by its name, since a model that goes to another process finds the layout there."""
        return _named, (self.name,)

    def nbytes(self, rows: int, columns: int) -> int:
        """The bytes of a matrix [R, D]."""
        return int(np.prod(self.data_shape(rows, columns))) * np.dtype(self.dtype).itemsize


def _named(name: str) -> Layout:
    from . import LAYOUTS, STORED

    return (LAYOUTS | STORED)[name]


@dataclass(frozen=True, eq=False)
class Weight:
    """A matrix [R, D] in some layout, read-only. ValueError if the array is not what the layout says."""

    layout: Layout
    data: NDArray[Any]
    shape: tuple[int, int]
    forms: dict[Any, Any] = field(default_factory=dict, init=False, repr=False)  # what kernels keep of it

    def __post_init__(self) -> None:
        layout, data = self.layout, self.data
        fits = len(self.shape) == 2 and layout.fits(*self.shape)
        if not (fits and data.dtype == layout.dtype and data.shape == layout.data_shape(*self.shape)):
            shapes = f"{data.dtype} {list(data.shape)} for a matrix {list(self.shape)}"
            raise ValueError(f"{shapes} is not the layout {layout.name}: see layouts/{layout.name}.py")
        object.__setattr__(self, "data", read_only(np.ascontiguousarray(data).view()))

    def __getstate__(self) -> dict[str, Any]:
        """For pickle and copy: without what kernels keep, which would be the array once more."""
        return self.__dict__ | {"forms": {}}

    @classmethod
    def pack(cls, layout: Layout, x: F32) -> Weight:
        """x [R, D] rounded to the nearest weight of this layout."""
        return cls(layout, layout.pack(x), x.shape)

    @property
    def base(self) -> Weight:
        """The weight without an adapter."""
        return self

    @property
    def nbytes(self) -> int:
        """The bytes that it takes."""
        return self.data.nbytes

    def widen(self) -> F32:
        """The weight as float32 [R, D], exact."""
        return self.layout.unpack(self.data)

    def part(self, first: int, last: int) -> Weight:
        """Rows first … last - 1, multiples of `layout.rows`, without a copy."""
        step = self.layout.rows
        return Weight(self.layout, self.data[first // step : last // step], (last - first, self.shape[1]))

    def rows(self, ids: NDArray[np.integer] | I32) -> F32:
        """Rows `ids` [T] as float32 [T, D]; IndexError where there is no such row."""
        step = self.layout.rows
        if step == 1:
            return self.layout.unpack(self.data[ids])
        together = self.layout.unpack(self.data[ids // step]).reshape(len(ids), step, self.shape[1])
        return together[np.arange(len(ids)), ids % step]


@dataclass(frozen=True, eq=False, kw_only=True)
class Adapted(Weight):
    """A weight W with a LoRA adapter: its matrix is W + s B A (formulas/lora.py). `data` and `layout` are W's."""

    a: F32  # [r, D]
    b: F32  # [R, r]
    scale: float  # s

    @classmethod
    def of(cls, weight: Weight, a: F32, b: F32, scale: float) -> Adapted:
        """The weight with an adapter. ValueError for one of another shape."""
        if a.ndim != 2 or b.ndim != 2 or (len(b), a.shape[1]) != weight.shape or len(a) != b.shape[1]:
            raise ValueError(f"A {list(a.shape)} and B {list(b.shape)} fit no matrix {list(weight.shape)}")
        return cls(weight.layout, weight.data, weight.shape, a=a, b=b, scale=scale)

    @cached_property
    def base(self) -> Weight:
        """W alone."""
        return Weight(self.layout, self.data, self.shape)

    def widen(self) -> F32:
        """W + s B A as float32 [R, D]."""
        return super().widen() + np.float32(self.scale) * (self.b @ self.a)

    def part(self, first: int, last: int) -> Weight:
        """Rows first … last - 1 with their part of the adapter."""
        return Adapted.of(super().part(first, last), self.a, self.b[first:last], self.scale)

    def rows(self, ids: NDArray[np.integer] | I32) -> F32:
        """Rows `ids` [T] of W + s B A as float32 [T, D]."""
        return super().rows(ids) + np.float32(self.scale) * (self.b[ids] @ self.a)
