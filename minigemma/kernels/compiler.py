"""How kernels are compiled and kept: Numba's decorators, with what of its inner parts this package changes."""

from __future__ import annotations

import ctypes
import gc
import inspect
import os
import site
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from functools import cached_property, update_wrapper
from itertools import count
from pathlib import Path
from typing import Any, cast

import numba
import numpy as np
from llvmlite import ir
from llvmlite.binding import parse_assembly
from numba import types
from numba.core.caching import CompileResultCacheImpl, FunctionCache, IndexDataCacheFile
from numba.core.codegen import JITCodeLibrary
from numba.core.compiler import CompilerBase, DefaultPassBuilder
from numba.core.environment import Environment
from numba.core.errors import TypingError
from numba.core.registry import CPUDispatcher
from numba.core.runtime import rtsys
from numba.extending import overload
from threadpoolctl import threadpool_limits

from ..definition import runs_formulas

# Sums may be reordered and multiply-adds fused; NaN and infinity keep their meaning (masks are -inf).
FASTMATH = {"contract", "nsz", "reassoc"}


class _Part(JITCodeLibrary):
    """Code that only other code calls. Numba would optimise it by itself and then again inside of each of its callers;
    this leaves it to those, which halves the time to compile.
    """

    def _optimize_final_module(self) -> None:
        pass

    def _finalize_final_module(self) -> None:
        self._finalized = True

    def get_pointer_to_function(self, name: str) -> int:
        return 0

    @property
    def codegen(self) -> _Part:
        return self

    def set_env(self, name: str, env: object) -> None:
        pass


# Steps of Numba's compiler that look for what kernels do not have: closures, comprehensions, arithmetic with whole
# arrays, loops over tuples. A tenth of the time to compile.
NEEDLESS = {
    *("nopython_rewrites", "inline_closure_likes", "make_function_op_code_to_jit_function", "inline_inlinables"),
    *("inline_overloads", "with_lifting", "literal_unroll", "find_literally", "LiteralPropagation"),
    *("Rewrite dynamic raises", "dump_parfor_diagnostics"),
}


class _KernelCompiler(CompilerBase):
    def define_pipelines(self) -> list[Any]:
        steps = DefaultPassBuilder.define_nopython_pipeline(self.state)
        steps.passes = [step for step in steps.passes if step[0].name() not in NEEDLESS]
        return [steps]


class _PartCompiler(_KernelCompiler):
    def define_pipelines(self) -> list[Any]:
        self.state.library = _Part(self.state.targetctx.codegen(), self.state.func_id.func_qualname)
        return super().define_pipelines()


KERNEL: dict[str, Any] = {"error_model": "numpy", "fastmath": FASTMATH, "no_cfunc_wrapper": True}
INNER: dict[str, Any] = {**KERNEL, "no_cpython_wrapper": True, "pipeline_class": _PartCompiler}
INLINED: dict[str, Any] = {**INNER, "forceinline": True}


class _MachineCode(CompileResultCacheImpl):
    """What is written to the cache: all but the environments of functions that became part of a kernel, which only code
    looks into that handles objects of Python; and but LLVM's code, which other kernels would be built with: of that the
    names are left by which the machine code is found.
    """

    def reduce(self, cres: Any) -> tuple[Any, ...]:
        (name, kind, (machine_code, _)), *parts = super().reduce(cres)
        for i, part in enumerate(parts):
            if isinstance(part, tuple) and part and isinstance(part[0], Environment):
                parts[i] = ()
        names = ir.Module()
        for entry in (cres.fndesc.llvm_func_name, cres.fndesc.llvm_cpython_wrapper_name):
            ir.IRBuilder(ir.Function(names, ir.FunctionType(ir.VoidType(), ()), entry).append_basic_block()).ret_void()
        return (name, kind, (machine_code, parse_assembly(str(names)).as_bitcode())), *parts


class _Files(IndexDataCacheFile):
    """An index, and a file of machine code for each entry. Numba writes the index first; a process that ends before the
    rest is written would leave an index that names what an older source was compiled to.
    """

    def save(self, key: Any, data: Any) -> None:
        """Write the machine code, then the index."""
        names = self._load_index()
        name = names.get(key) or next(n for n in map(self._data_name, count(1)) if n not in names.values())
        self._save_data(name, data)
        self._save_index(names | {key: name})


class _Compiled(FunctionCache):
    """Kernels compiled by an earlier run. Numba would import all that its compiler may need, and the modules of all
    functions that are part of a kernel, which takes as long as importing Numba itself. Machine code needs only the
    runtime that it calls.
    """

    _impl_class = _MachineCode

    def __init__(self, function: Callable) -> None:
        super().__init__(function)
        stamp = self._impl.locator.get_source_stamp()
        self._cache_file = _Files(self._cache_path, self._impl.filename_base, stamp)

    def load_overload(self, sig: Any, target_context: Any) -> Any:
        rtsys.initialize(target_context)
        with self._guard_against_spurious_io_errors():
            return self._load_overload(sig, target_context)

    def index(self) -> dict[Any, str]:
        """What earlier runs have compiled."""
        with self._guard_against_spurious_io_errors():
            return cast(dict[Any, str], self._cache_file._load_index())
        return {}

    def has(self, signature: Any, target_context: Any) -> bool:
        """Is there what an earlier run compiled for arguments of these types?"""
        return self._index_key(signature, target_context.codegen()) in self.index()


class Kernel(CPUDispatcher):
    """A kernel, during which Python's other threads may run. Several cores are put to it by crew.py."""

    def __init__(self, function: Callable, *_: Any) -> None:  # a pickle of it brings Numba's options, too
        options = KERNEL | {"nopython": True, "nogil": True}
        super().__init__(function, targetoptions=options, pipeline_class=_KernelCompiler)
        self._cache = _Compiled(function)

    def compile(self, sig: Any) -> Any:
        """What Numba does for new types, without Python's collector: it finds little and looks all the time."""
        collecting = gc.isenabled()
        gc.disable()
        try:
            return super().compile(sig)
        finally:
            if collecting:
                gc.enable()

    def get_call_template(self, args: Any, kws: Any) -> Any:
        """Nothing for other kernels: of what is in the cache no other code can be built."""
        raise TypeError(f"{self.__name__} is a kernel; what kernels call is a function of jit_inner")

    def _compilation_chain_init_hook(self) -> None:
        """Numba would look through all installed packages for such as extend its compiler, if it compiles or not."""


def jit(function: Callable) -> Any:
    """Decorator: a kernel."""
    return Kernel(function)


def is_compiled(kernel: Any, *arguments: Any) -> bool:
    """Has this run, or an earlier one, compiled the kernel for arguments of these types?"""
    signature = tuple(map(kernel.typeof_pyval, arguments))
    return signature in kernel.overloads or kernel._cache.has(signature, kernel.targetctx)


def is_cached(kernel: Any) -> bool:
    """Has an earlier run compiled the kernel, for arguments of whatever types?"""
    return bool(kernel._cache.index())


class Inner:
    """A function that only kernels call. What Numba wants to know of it is made when a kernel that calls it is
    compiled; most runs compile none, and there are two hundred such functions.
    """

    def __init__(self, function: Callable, options: dict[str, Any]) -> None:
        update_wrapper(cast(Any, self), function)
        self.py_func, self._options = function, options

    @cached_property
    def _numba_type_(self) -> Any:
        """Its type, for which Numba asks every value that it does not know itself."""
        self._made = made = numba.njit(**self._options)(self.py_func)
        template = made.get_call_template

        def of_any_number(args: Any, kws: Any) -> Any:  # Numba would compile it once for each number written in a call
            return template(tuple(map(types.unliteral, args)), kws)

        made.get_call_template = of_any_number
        return numba.typeof(made)


def jit_inner(function: Callable) -> Any:
    """Decorator: a function that only kernels call."""
    return Inner(function, INNER)


def jit_inlined(function: Callable) -> Any:
    """Decorator: the same, for what is called so often that the call itself would cost."""
    return Inner(function, INLINED)


def by_type(name: str, functions: dict[Any, Any], on: str | None = None) -> Any:
    """An inner function that is one of `functions`, chosen by the type of an argument when a kernel is compiled.

        dot = by_type("dot", {Int8Rows: _dot_int8, Int4Rows: _dot_int4})
        widen = by_type("widen", {np.int8: _widen_int8, np.float32: _copy}, on="row")

    A key is a NamedTuple class, or the element type of an array or number. The argument is the first, or the one named
    `on`; of a tuple of several weights the first one counts. All functions take the same arguments. TypeError, as
    Numba's TypingError, where a kernel calls it with another type.
    """
    first = next(iter(functions.values()))
    signature = inspect.signature(first.py_func)
    for function in functions.values():
        if inspect.signature(function.py_func) != signature or function._options is not first._options:
            raise TypeError(f"{name}: {function.__name__} differs from {first.__name__} in arguments or decorator")
    keys = {key if issubclass(key, tuple) else numba.from_dtype(np.dtype(key)): f for key, f in functions.items()}

    def choose(*types_in: Any, **named: Any) -> Callable:
        arguments = signature.bind(*types_in, **named).arguments
        kind = arguments[on] if on else next(iter(arguments.values()))
        while isinstance(kind, types.BaseTuple) and not isinstance(kind, types.BaseNamedTuple):
            kind = kind[0]
        kind = types.unliteral(kind)
        key = getattr(kind, "instance_class", None) or getattr(kind, "dtype", kind)
        if key not in keys:
            accepted = ", ".join(getattr(key, "__name__", str(key)) for key in keys)
            raise TypingError(f"{name} takes {accepted}, not {kind}")
        return cast(Callable, keys[key].py_func)

    def joined() -> None:
        """Stands for the functions where kernels are compiled."""

    cast(Any, choose).__signature__ = signature
    joined.__name__ = joined.__qualname__ = name
    joined.__doc__ = first.__doc__
    overload(joined, jit_options=first._options, strict=False)(choose)
    return joined


# OpenMP, where there is no TBB: a thread that waits for the others looks out for them for a fraction of a millisecond,
# longer than Python takes between two kernels, then sleeps. GNU OpenMP's own limit is many times that: where another
# program wants the cores, threads that wait awake take the time from the one they wait for.
if not {"OMP_WAIT_POLICY", "GOMP_SPINCOUNT"} & set(os.environ):
    os.environ["GOMP_SPINCOUNT"] = "10000"

# A parallel region costs 1.5 µs under TBB and OpenMP and 100 µs under Numba's own workqueue. TBB comes first: there a
# thread that is ready takes what another has not begun, while OpenMP waits for every thread in every region, which
# costs half a millisecond each as soon as another program wants one of the cores.
numba.config.THREADING_LAYER_PRIORITY = ["tbb", "omp", "workqueue"]


def _find_tbb() -> None:
    """Load TBB from where pip puts it, a folder that the system does not search: Numba then finds it loaded."""
    for folder in (sys.prefix, site.USER_BASE or sys.prefix):
        library = Path(folder) / "lib" / "libtbb.so.12"
        if library.exists():
            with suppress(OSError):  # one that does not fit this system: Numba then takes OpenMP
                ctypes.CDLL(str(library), mode=ctypes.RTLD_GLOBAL)
            return


_find_tbb()


@contextmanager
def threads(count: int) -> Iterator[None]:
    """Inside this block kernels share their work among `count` threads; afterwards among as many as before.

    Where formulas run instead, it is NumPy's own threads that are limited.
    """
    if runs_formulas():
        with threadpool_limits(count):
            yield
        return
    before = numba.get_num_threads()
    if before == count:
        yield
        return
    numba.set_num_threads(count)
    try:
        yield
    finally:
        numba.set_num_threads(before)


def most_threads() -> int:
    """How many threads a kernel may use: what Numba was started with, by default one a core."""
    return int(numba.config.NUMBA_NUM_THREADS)


def default_threads() -> int:
    """As many threads as this process may use cores, and no more than Numba was started with."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return max(1, min(cores, most_threads()))


def threading_layer() -> str:
    """What starts a parallel region: "tbb", "omp" (OpenMP) or "workqueue", Numba's own, 50 times as slow at it."""
    numba.get_num_threads()
    return str(numba.threading_layer())


def workers_for(x: Any) -> int:
    """How many threads to put to the rows of x: one, where that is done before others have been woken, as it always is
    with one token.
    """
    return 1 if len(x) == 1 or x.size < 1 << 15 else numba.get_num_threads()
