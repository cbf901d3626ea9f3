"""How kernels are compiled and cached.

    @jit_inner                          # called by kernels only
    def _row(x, y): ...

    @jit                                # a kernel, called from Python
    def _rows(x, y): ...

Public Numba does all of this with `MINIGEMMA_COMPILER=plain` in the environment, and with versions of Numba that this
file was not tested with. Otherwise this file, and no other, uses undocumented parts of Numba. They save, in a first run
(1) and when a later run starts (2):

    _InnerLibrary       (1) half of the time to compile: an inner function is optimized in its kernel only
    OMITTED_PASSES      (1) a tenth: passes for what kernels do not contain
    on_threads          (1) half: `prange` compiles its body five times, this twice
    Inner               (2) 0.06 s: the 200 inner functions are typed only if a kernel is compiled
    KernelCache         (2) 0.25 s: loads machine code without the modules that only the compiler needs; its key covers
                        all sources of kernels, not only the kernel's own file
"""

from __future__ import annotations

import hashlib
import inspect
import logging
import os
import pickle
import sys
import tempfile
import time
import zlib
from collections.abc import Callable
from contextlib import suppress
from functools import cache, cached_property, update_wrapper
from pathlib import Path
from typing import Any, cast

import numba
import numpy as np
from llvmlite import ir
from llvmlite.binding import parse_assembly
from numba import types
from numba.core import event
from numba.extending import overload

from ..environment import cache_folder, setting

OLDEST, NEWEST = (0, 61), (0, 68)  # the versions of Numba whose private parts were tested
PLAIN = setting("MINIGEMMA_COMPILER", ["plain"]) == "plain" or not OLDEST <= numba.version_info.short <= NEWEST

if not PLAIN:
    from numba.core import cgutils, codegen, compiler, environment, registry, runtime, serialize

_Library: Any = object if PLAIN else codegen.JITCodeLibrary
_Compiler: Any = object if PLAIN else compiler.CompilerBase
_Dispatcher: Any = object if PLAIN else registry.CPUDispatcher

# Sums may be reordered and multiply-adds fused; NaN and infinity keep their meaning (masks are -inf).
FASTMATH = {"contract", "nsz", "reassoc"}
KERNEL: dict[str, Any] = {"error_model": "numpy", "fastmath": FASTMATH, "no_cfunc_wrapper": True}
INNER: dict[str, Any] = dict(KERNEL)
INLINED: dict[str, Any] = INNER | {"forceinline": True}
NO_MEMORY = "a thread of a kernel could not allocate its working memory"


def jit(function: Callable) -> Any:
    """Decorator: a kernel, during which other Python threads may run. Its machine code is cached."""
    if not PLAIN:
        return Kernel(function)
    before, folder = numba.config.CACHE_DIR, kernel_folder() / f"plain-{sources_digest().hex()}"
    numba.config.CACHE_DIR = str(folder)
    try:
        return numba.njit(function, nogil=True, cache=True, **KERNEL)
    except RuntimeError as reason:
        _say_once("kernels are compiled in memory", f"{folder} cannot be written: {reason}")
        return numba.njit(function, nogil=True, **KERNEL)
    finally:
        numba.config.CACHE_DIR = before


def jit_inner(function: Callable) -> Any:
    """Decorator: a function that only kernels call."""
    return _inner(function, INNER)


def jit_inlined(function: Callable) -> Any:
    """Decorator: the same, inlined at every call."""
    return _inner(function, INLINED)


def _inner(function: Callable, options: dict[str, Any]) -> Any:
    made = numba.njit(function, **options) if PLAIN else Inner(function, options)
    made._options = options
    return made


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
            raise numba.TypingError(f"{name} takes {accepted}, not {kind}")
        return cast(Callable, keys[key].py_func)

    def joined() -> None:
        """Replaced by one of `functions` when a kernel is compiled."""

    cast(Any, choose).__signature__ = signature
    joined.__name__, joined.__qualname__, joined.__doc__ = name, name, first.__doc__
    overload(joined, jit_options=first._options, strict=False)(choose)
    return joined


class Compilations(event.TimingListener):
    """How many functions were compiled, not loaded, when the latest began, and `duration`: the seconds of all."""

    count, latest, _duration = 0, 0.0, 0.0

    def on_start(self, event: Any) -> None:
        """Numba begins to compile a function, maybe inside another."""
        self.count, self.latest = self.count + 1, time.perf_counter()
        super().on_start(event)


event.register("numba:compile", compilations := Compilations())


def running_seconds() -> float:
    """A clock that stands still while kernels are compiled."""
    return time.perf_counter() - compilations.duration


# ---- the cache


def kernel_folder() -> Path:
    """$NUMBA_CACHE_DIR, else `kernels` under $MINIGEMMA_CACHE, $XDG_CACHE_HOME/minigemma or ~/.cache/minigemma."""
    if numba.config.CACHE_DIR:
        return Path(numba.config.CACHE_DIR)
    return cache_folder() / "kernels"


@cache
def sources_digest() -> bytes:
    """16 bytes that change with the source of any kernel or of a function in it: 2 ms, once per process."""
    package, digest = Path(__file__).parents[1], hashlib.blake2b(digest_size=16)
    for folder in ("layouts", "kernels", "formulas", "models"):
        for path in sorted(package.glob(f"{folder}/**/*.py")):
            digest.update(path.read_bytes())
    return digest.digest()


_said: set[str] = set()


def _say_once(what: str, why: str) -> None:
    """Logs each kind of problem once: what is wrong with one kernel's file is usually wrong with all."""
    if what not in _said:
        _said.add(what)
        logging.getLogger("minigemma").warning(f"{what}: {why}")


BEFORE_USE: list[Callable[[], object]] = []  # called before a process loads its first kernel


class KernelCache:
    """Machine code that earlier runs compiled: a file for each kernel, types of arguments, processor and version.

    A file begins with a digest of the sources and of its content. A kernel whose file is missing, damaged or of other
    sources is compiled. Where no file can be written kernels are compiled in memory, and one line says so.
    """

    def __init__(self, function: Callable) -> None:
        self._function, self.cache_path = function, str(kernel_folder())

    def path(self, signature: Any, context: Any) -> Path:
        """The file of one kernel compiled for one tuple of types."""
        code = self._function.__code__
        own = (code.co_filename, self._function.__qualname__, str(signature), context.codegen().magic_tuple())
        key = repr((*own, numba.__version__, np.__version__, sys.implementation.cache_tag))
        name = self._function.__name__.strip("_<>")
        return Path(self.cache_path) / f"{name}-{hashlib.blake2b(key.encode(), digest_size=12).hexdigest()}.kernel"

    def _digest(self, content: bytes) -> bytes:
        own = zlib.crc32(self._function.__code__.co_code)  # of a kernel outside of those sources
        return sources_digest() + zlib.crc32(content, own).to_bytes(4, "little")

    def load_overload(self, signature: Any, context: Any) -> Any:
        """Returns the compiled kernel, or None."""
        runtime.rtsys.initialize(context)
        path, data, size = self.path(signature, context), b"", len(sources_digest())
        with suppress(OSError):
            data = path.read_bytes() if path.is_file() else data  # a pipe would wait for a writer
        content = data[size + 4 :]
        if data[:size] == sources_digest():
            try:
                if data[: size + 4] != self._digest(content):
                    raise ValueError("its content is damaged")
                return compiler.CompileResult._rebuild(context, *pickle.loads(content))
            except Exception as reason:
                _say_once("kernels are compiled again", f"{path}: {reason}")
        return None

    def save_overload(self, signature: Any, result: Any) -> None:
        """Writes a compiled kernel in one step, so that an interrupted run leaves no partial file."""
        path, temporary = self.path(signature, result.target_context), None
        try:
            content = serialize.dumps(_reduced(result))
            path.parent.mkdir(0o700, parents=True, exist_ok=True)
            with tempfile.NamedTemporaryFile(dir=path.parent, delete=False) as file:
                temporary = file.name
                file.write(self._digest(content) + content)
            os.replace(temporary, path)
        except OSError as reason:
            _say_once("kernels are compiled in memory", f"{path.parent} cannot be written: {reason.strerror or reason}")
            if temporary:
                with suppress(OSError):
                    os.unlink(temporary)


def _reduced(result: Any) -> tuple[Any, ...]:
    """The parts of a compiled kernel that its file holds: machine code, and the names of the entry points.

    Other kernels are not built from it, and environments of inner functions serve only code with Python objects.
    """
    (name, kind, (machine_code, _)), *parts = result._reduce()
    for i, part in enumerate(parts):
        if isinstance(part, tuple) and part and isinstance(part[0], environment.Environment):
            parts[i] = ()
    names = ir.Module()
    for entry in (result.fndesc.llvm_func_name, result.fndesc.llvm_cpython_wrapper_name):
        ir.IRBuilder(ir.Function(names, ir.FunctionType(ir.VoidType(), ()), entry).append_basic_block()).ret_void()
    return (name, kind, (machine_code, parse_assembly(str(names)).as_bitcode())), *parts


# ---- Numba's private parts


class _InnerLibrary(_Library):
    """Code of an inner function. Numba would optimize it alone, then again inside each caller; this skips the first."""

    def _optimize_final_module(self) -> None:
        pass

    def _finalize_final_module(self) -> None:
        self._finalized = True

    def get_pointer_to_function(self, name: str) -> int:
        return 0

    @property
    def codegen(self) -> _InnerLibrary:
        return self

    def set_env(self, name: str, env: object) -> None:
        pass


# Passes for closures, comprehensions, arithmetic with whole arrays and loops over tuples.
OMITTED_PASSES = {
    *("nopython_rewrites", "inline_closure_likes", "make_function_op_code_to_jit_function", "inline_inlinables"),
    *("inline_overloads", "with_lifting", "literal_unroll", "find_literally", "LiteralPropagation"),
    *("Rewrite dynamic raises", "dump_parfor_diagnostics"),
}


class _KernelCompiler(_Compiler):
    def define_pipelines(self) -> list[Any]:
        steps = compiler.DefaultPassBuilder.define_nopython_pipeline(self.state)
        steps.passes = [step for step in steps.passes if step[0].name() not in OMITTED_PASSES]
        return [steps]


class _InnerCompiler(_KernelCompiler):
    def define_pipelines(self) -> list[Any]:
        self.state.library = _InnerLibrary(self.state.targetctx.codegen(), self.state.func_id.func_qualname)
        return super().define_pipelines()


if not PLAIN:
    for options in (INNER, INLINED):
        options.update(no_cpython_wrapper=True, pipeline_class=_InnerCompiler)


class Kernel(_Dispatcher):
    """A function that Python calls; parallel.py runs parts of it on several threads."""

    def __init__(self, function: Callable, *_: Any) -> None:  # unpickling passes Numba's options, too
        options = KERNEL | {"nopython": True, "nogil": True}
        super().__init__(function, targetoptions=options, pipeline_class=_KernelCompiler)
        self._cache = KernelCache(function)

    def compile(self, sig: Any) -> Any:
        """Load from the cache or compile."""
        for start in BEFORE_USE:
            start()
        return super().compile(sig)

    def get_call_template(self, args: Any, kws: Any) -> Any:
        """Raises TypeError where another kernel calls this one: the cache holds no code to build one from."""
        raise TypeError(f"{self.__name__} is a kernel; what kernels call is a function of jit_inner")

    def _compilation_chain_init_hook(self) -> None:
        """Skips Numba's search of all installed packages for extensions: 14 ms per start."""


class Inner:
    """A function that only kernels call; Numba's own object is made when a kernel that calls it is compiled."""

    def __init__(self, function: Callable, options: dict[str, Any]) -> None:
        update_wrapper(cast(Any, self), function)
        self.py_func, self._options = function, options

    @cached_property
    def _numba_type_(self) -> Any:
        """Its Numba type; Numba reads this attribute of values of unknown classes."""
        self._made = made = numba.njit(**self._options)(self.py_func)
        template = made.get_call_template

        def of_any_number(args: Any, kws: Any) -> Any:  # not compiled again for each number written in a call
            return template(tuple(map(types.unliteral, args)), kws)

        made.get_call_template = of_any_number
        return numba.typeof(made)


_BYTES, _INT = ir.IntType(8).as_pointer(), ir.IntType(64)


def on_threads(typingctx: Any, function: Any, arguments: Any, guard: Callable) -> Any:
    """The result of an intrinsic (function, workers, arguments) that calls function(worker, workers, *arguments) on
    Numba's thread pool. `guard` emits code around the call.
    """
    types_in = (types.int64, types.int64, *map(types.unliteral, arguments))
    compiled = function.dispatcher.overloads[function.get_call_type(typingctx, types_in, {}).args]

    def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        failed = cgutils.alloca_once_value(builder, _INT(0))
        packed = cgutils.alloca_once_value(builder, cgutils.pack_struct(builder, [*args[1:], failed]))
        chunk = _chunk_function(context, builder, compiled, packed.type)
        # The pool calls chunk(begin, [count], …, packed) for ranges of workers, where `begin` is the address of an
        # array advanced by the worker's number: of bytes from address 0, so that the address is the number itself.
        begin = cgutils.alloca_once_value(builder, ir.Constant(_BYTES, None))
        count, size = (cgutils.alloca_once_value(builder, number) for number in (args[1], _INT(1)))
        pool = ir.FunctionType(ir.VoidType(), [_BYTES] * 5 + [_INT] * 3)
        run = cgutils.get_or_insert_function(builder.module, pool, "numba_parallel_for")
        pointers = [builder.bitcast(value, _BYTES) for value in (chunk, begin, count, size, packed)]
        with builder.if_else(builder.icmp_signed(">", args[1], _INT(1))) as (several, one):
            with several, guard(builder):
                builder.call(run, [*pointers, _INT(0), _INT(1), args[1]])
            with one:
                builder.call(chunk, [begin, count, size, pointers[-1]])
        with builder.if_then(cgutils.is_not_null(builder, builder.load(failed)), likely=False):
            context.call_conv.return_user_exc(builder, MemoryError, (NO_MEMORY,))
        return context.get_dummy_value()

    return types.void(function, types.int64, arguments), codegen


def _chunk_function(context: Any, builder: Any, compiled: Any, packed_type: Any) -> Any:
    """A function with the thread pool's signature that calls the compiled one for a range of workers."""
    form = ir.FunctionType(ir.VoidType(), [_BYTES.as_pointer(), _INT.as_pointer(), _INT.as_pointer(), _BYTES])
    name = f"chunk.{len(builder.module.functions)}.{compiled.fndesc.mangled_name}"
    function = ir.Function(builder.module, form, name)
    function.linkage = "internal"
    inside = ir.IRBuilder(function.append_basic_block())
    begin, count, _, data = function.args
    first = inside.ptrtoint(inside.load(begin), _INT)
    workers, arguments, failed = cgutils.unpack_tuple(inside, inside.load(inside.bitcast(data, packed_type)))
    unpacked = [workers, *cgutils.unpack_tuple(inside, arguments)]
    context.active_code_library.add_linking_library(compiled.library)
    target = context.declare_function(builder.module, compiled.fndesc)
    with cgutils.for_range(inside, inside.load(count)) as loop:
        kind, passed = compiled.signature, [inside.add(first, loop.index), *unpacked]
        status, _ = context.call_conv.call_function(inside, target, kind.return_type, kind.args, passed)
        with inside.if_then(status.is_error, likely=False):
            inside.store(_INT(1), failed)
    inside.ret_void()
    return function
