"""Two ways to compute one formula: the definition in plain NumPy, and the kernel under it.

    @definition
    def soft_cap(x, cap):                  # the formula, which is also what a reader steps through
        return cap * np.tanh(x / cap)

    @soft_cap.kernel
    @jit
    def _soft_cap(x, cap): ...             # the same arguments, the same result, faster

Whoever calls `soft_cap` gets the kernel; inside `with formulas_only():` the definition. The choice is a context
variable, so two threads may differ.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from functools import update_wrapper
from typing import Any, Generic, ParamSpec, TypeVar

P = ParamSpec("P")
Result = TypeVar("Result")

DEFINITIONS: dict[str, Definition] = {}  # every definition by its name, so that one test can walk them all

_formulas_only: ContextVar[bool] = ContextVar("formulas_only", default=False)


@contextmanager
def formulas_only(wanted: bool = True) -> Iterator[None]:
    """Inside this block every formula runs as its NumPy definition (with False: as outside of it)."""
    token = _formulas_only.set(wanted or _formulas_only.get())
    try:
        yield
    finally:
        _formulas_only.reset(token)


def runs_formulas() -> bool:
    """Is this inside `formulas_only`?"""
    return _formulas_only.get()


def require(fits: bool, what: str, *arrays: Any) -> None:
    """Raise ValueError unless `fits`: kernels check no index, so whoever calls one has looked at the shapes before."""
    if not fits:
        shapes = ", ".join(f"{array.dtype} {list(array.shape)}" for array in arrays)
        raise ValueError(f"{what}: the shapes {shapes} do not fit together")


class Definition(Generic[P, Result]):
    """A formula in NumPy, and perhaps a kernel that computes the same."""

    def __init__(self, formula: Callable[P, Result]) -> None:
        update_wrapper(self, formula)
        self.__name__ = formula.__name__
        self.formula = formula
        self.fast: Callable[P, Result] | None = None

    def kernel(self, fast: Callable[P, Result]) -> Callable[P, Result]:
        """Decorator: `fast` takes the same arguments, by name and order, and returns the same."""
        mine, theirs = (list(inspect.signature(f).parameters) for f in (self.formula, getattr(fast, "py_func", fast)))
        if mine != theirs:
            raise TypeError(f"{self.__name__}{mine} and its kernel {theirs} must take the same arguments")
        self.fast = fast
        return fast

    def __call__(self, *args: P.args, **kwargs: P.kwargs) -> Result:
        """The result, by the kernel if there is one and it may run."""
        if self.fast is None or _formulas_only.get():
            return self.formula(*args, **kwargs)
        return self.fast(*args, **kwargs)


def definition(formula: Callable[P, Result]) -> Definition[P, Result]:
    """Decorator: this NumPy function is the definition of a formula."""
    made = Definition(formula)
    DEFINITIONS[formula.__name__] = made
    return made
