"""A formula, its gradient and its kernel.

    @definition
    def soft_cap(x, cap):                  # the formula: plain NumPy, to read and to step through
        return cap * np.tanh(x / cap)

    @soft_cap.gradient
    def soft_cap_gradient(dy, x, cap):     # ∂L/∂x from dy = ∂L/∂y, for training
        return dy / np.cosh(x / cap) ** 2

    @soft_cap.kernel
    @jit
    def _soft_cap(x, cap): ...             # the same arguments, the same result, faster

A call of `soft_cap` runs the kernel. It runs the formula inside `with formulas_only():`, where there is no kernel, and
where the kernel returns NotImplemented: a fused kernel does so for arguments that it does not cover. Backend "numpy" of
a model is `formulas_only`; as a context variable, it holds for one thread and not for the others. A gradient is a
definition itself, so it may have a kernel, too.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from functools import update_wrapper
from typing import Any, Generic, ParamSpec, TypeVar

P = ParamSpec("P")
Q = ParamSpec("Q")
Gradients = TypeVar("Gradients")
Result = TypeVar("Result")
Function = TypeVar("Function", bound=Callable)

DEFINITIONS: dict[str, Definition] = {}  # every definition by its name, for the test that walks them all

_formulas_only: ContextVar[bool] = ContextVar("formulas_only", default=False)


@contextmanager
def formulas_only(wanted: bool = True) -> Iterator[None]:
    """Runs every definition as its NumPy formula inside this block. With False nothing changes."""
    token = _formulas_only.set(wanted or _formulas_only.get())
    try:
        yield
    finally:
        _formulas_only.reset(token)


def runs_formulas() -> bool:
    """Returns True inside `formulas_only`."""
    return _formulas_only.get()


def require(fits: bool, what: str, *arrays: Any) -> None:
    """Raises ValueError with the shapes unless `fits`: kernels check no index, so their callers check shapes."""
    if not fits:
        shapes = ", ".join(f"{getattr(array, 'dtype', 'a weight')} {list(array.shape)}" for array in arrays)
        raise ValueError(f"{what}: the shapes {shapes} do not fit together")


class Definition(Generic[P, Result]):
    """A formula in NumPy, with the kernel and the gradient that were registered for it, if any."""

    def __init__(self, formula: Callable[P, Result]) -> None:
        update_wrapper(self, formula)
        self.__name__ = formula.__name__
        self.formula = formula
        self.fast: Callable[P, Result] | None = None
        self.backward: Definition[..., Any] | None = None

    def __call__(self, *args: P.args, **kwargs: P.kwargs) -> Result:
        """Returns the kernel's result, or the formula's where no kernel takes these arguments."""
        if self.fast is not None and not _formulas_only.get():
            result = self.fast(*args, **kwargs)
            if result is not NotImplemented:
                return result
        return self.formula(*args, **kwargs)

    def kernel(self, fast: Function) -> Function:
        """Decorator: `fast` takes the formula's arguments, by name and order, and returns its result."""
        own, given = _parameters(self.formula), _parameters(fast)
        if given != own:
            raise TypeError(f"{self.__name__}{own} and its kernel {given} must take the same arguments")
        self.fast = fast
        return fast

    def gradient(self, backward: Callable[Q, Gradients]) -> Definition[Q, Gradients]:
        """Decorator: `backward` takes ∂L/∂y of each result, named d…, then the formula's arguments.

        It returns the gradient of each array that training changes or passes on, in the order of the arguments, and
        becomes a definition itself.
        """
        own, given = _parameters(self.formula), _parameters(backward)
        results = given[: len(given) - len(own)]
        if given[len(results) :] != own or not results or not all(name.startswith("d") for name in results):
            raise TypeError(f"the gradient of {self.__name__}{own} must take dy … and then these, not {given}")
        self.backward = made = definition(backward)
        return made


def _parameters(function: Callable) -> list[str]:
    return list(inspect.signature(getattr(function, "py_func", function)).parameters)


def definition(formula: Callable[P, Result]) -> Definition[P, Result]:
    """Decorator: this NumPy function is the definition of a formula."""
    made = Definition(formula)
    DEFINITIONS[formula.__name__] = made
    return made
