"""Threads that share the work of one kernel.

    @parallel
    def _rows(worker, workers, x, y):
        for t in chunk(worker, workers, len(x)):         # this worker's range of the rows
            …

    _rows(workers, x, y)                                 # each worker on its own thread

is a parallel region: the same as Numba's `prange`, on the same thread pool, compiled twice instead of five times.

Starting and ending a region takes microseconds in which no weights are read. A kernel of several steps is therefore one
region, whose threads claim the tasks of each step:

    done = 0
    task = next_task(counters, step, worker, workers, tasks)
    while task >= 0:                                    # a task that no other thread has claimed
        …
        done += 1
        task = next_task(counters, step, worker, workers, tasks)
    barrier(counters, step, done, workers, tasks, …)    # until all tasks of this step are done

Only claimed tasks are awaited, so a descheduled thread cannot stall a step: the others take over its share. A late
thread still runs all steps and must read the same values as the others, so a step may write only what no earlier step
of the region reads. (All threads write the same keys and values of new tokens into the cache, each before reading.)

A waiting thread prefetches the first weights of the next step into its second-level cache. Then it yields its core, so
that other programs run now and not in the middle of a task that all threads wait for.
"""

import ctypes
import os
import site
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from contextvars import ContextVar
from pathlib import Path
from typing import Any

import llvmlite.binding
import numba
import numpy as np
from llvmlite import ir
from numba import types
from numba.extending import intrinsic, overload
from threadpoolctl import threadpool_limits

from ..definition import formulas_only, runs_formulas
from ..environment import LAYERS
from .compiler import BEFORE_USE, INLINED, KERNEL, NO_MEMORY, PLAIN, jit, jit_inner, on_threads
from .simd.memory import prefetch

TASKS_PER_THREAD = 8  # of each step: a late thread delays the others by one of them at most
LINE = 8  # int64 in a cache line: counters of two threads in one line would be false sharing
READ_AHEAD = 1 << 16  # bytes at most that a waiting thread prefetches

# Under OpenMP a waiting thread spins for part of a millisecond, longer than Python takes between two kernels, then
# sleeps. GNU OpenMP's own limit is many times that: on a shared machine spinning threads delay the one they wait for.
if not {"OMP_WAIT_POLICY", "GOMP_SPINCOUNT"} & set(os.environ):
    os.environ["GOMP_SPINCOUNT"] = "10000"

# A parallel region costs 1.5 µs under TBB and OpenMP and 100 µs under Numba's own workqueue. TBB comes first: its idle
# threads take over work that others have not begun, while OpenMP waits for every thread in every region, half a
# millisecond each as soon as another program runs on one of the cores.
numba.config.THREADING_LAYER_PRIORITY = list(LAYERS)


def _find_tbb() -> None:
    """Loads TBB from the folder where pip installs it, which the system does not search."""
    for folder in (sys.prefix, site.USER_BASE or sys.prefix):
        library = Path(folder) / "lib" / "libtbb.so.12"
        if library.exists():
            with suppress(OSError):  # built for another system: Numba then takes OpenMP
                ctypes.CDLL(str(library), mode=ctypes.RTLD_GLOBAL)
            return


_find_tbb()


@contextmanager
def threads(count: int, formulas: bool = False) -> Iterator[None]:
    """Runs kernels on at most `count` threads; with `formulas`, definitions run in NumPy, on as many."""
    if formulas or runs_formulas():
        with formulas_only(), threadpool_limits(count):
            yield
        return
    before, count = start_threads(), min(count, most_threads())
    token = _workers.set(count)
    if before != count:
        numba.set_num_threads(count)
    try:
        yield
    finally:
        _workers.reset(token)
        if before != count:
            numba.set_num_threads(before)


_workers: ContextVar[int] = ContextVar("workers", default=0)


def workers() -> int:
    """The threads that kernels use here: inside `threads` without asking Numba, which takes a microsecond."""
    return _workers.get() or numba.get_num_threads()


def workers_for(x: Any) -> int:
    """Threads for the rows of x: one for a single token and where waking others takes longer than the work."""
    return 1 if len(x) == 1 or x.size < 1 << 15 else workers()


def most_threads() -> int:
    """The number of threads that Numba was started with, by default one per core."""
    return int(numba.config.NUMBA_NUM_THREADS)


def default_threads() -> int:
    """One thread per core that this process may use, at most `most_threads()`."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return max(1, min(cores, most_threads()))


def threading_layer() -> str:
    """The thread pool: "tbb", "omp" (OpenMP) or "workqueue", Numba's own, where a region starts 50 times as slowly."""
    start_threads()
    return str(numba.threading_layer())


# ---- a region

_INT = ir.IntType(64)
# Numba's workqueue ends the process if two Python threads start a region at once: there, a region takes this lock.
_UNLOCKED, _LOCKED, _NO_LOCK = range(3)
_region = ctypes.c_int64(_NO_LOCK)
llvmlite.binding.add_symbol("minigemma_region", ctypes.addressof(_region))
if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=lambda: setattr(_region, "value", _region.value & ~_LOCKED))


def start_threads() -> int:
    """Starts Numba's thread pool, unless it runs; returns how many of its threads kernels use."""
    count = numba.get_num_threads()
    if _region.value == _NO_LOCK and numba.threading_layer() == "workqueue":
        _region.value = _UNLOCKED
    return int(count)


BEFORE_USE.append(start_threads)


def _external(builder: ir.IRBuilder, name: str, make: Callable, kind: ir.Type) -> ir.Value:
    found = builder.module.globals.get(name)
    return make(builder.module, kind, name) if found is None else found


def _yield_core(builder: ir.IRBuilder) -> None:
    name = "SwitchToThread" if sys.platform == "win32" else "sched_yield"
    builder.call(_external(builder, name, ir.Function, ir.FunctionType(ir.IntType(32), [])), [])


def _lock(builder: ir.IRBuilder) -> ir.Value:
    """Takes the lock; returns its state before: _UNLOCKED, or _NO_LOCK where none is needed."""
    word = _external(builder, "minigemma_region", ir.GlobalVariable, _INT)
    attempt, wait, locked = (builder.append_basic_block(f"region.{name}") for name in ("attempt", "wait", "locked"))
    builder.branch(attempt)
    builder.position_at_end(attempt)
    before = builder.extract_value(builder.cmpxchg(word, _INT(_UNLOCKED), _INT(_LOCKED), "acq_rel", "acquire"), 0)
    builder.cbranch(builder.icmp_signed("==", before, _INT(_LOCKED)), wait, locked)
    builder.position_at_end(wait)
    _yield_core(builder)
    builder.branch(attempt)
    builder.position_at_end(locked)
    return before


def _unlock(builder: ir.IRBuilder, before: ir.Value) -> None:
    word = _external(builder, "minigemma_region", ir.GlobalVariable, _INT)
    with builder.if_then(builder.icmp_signed("==", before, _INT(_UNLOCKED))):
        builder.store_atomic(before, word, "release", 8)


@contextmanager
def _alone(builder: ir.IRBuilder) -> Iterator[None]:
    before = _lock(builder)
    yield
    _unlock(builder, before)


@intrinsic
def _on_pool(typingctx, function, workers, arguments):
    return on_threads(typingctx, function, arguments, _alone)


# The same with public Numba. The arguments pass through `prange` as an address: it rejects tuples of NamedTuples.


@intrinsic
def _lock_region(typingctx):
    return types.int64(), lambda context, builder, signature, args: _lock(builder)


@intrinsic
def _unlock_region(typingctx, before):
    def codegen(context, builder, signature, args):
        _unlock(builder, args[0])
        return context.get_dummy_value()

    return types.void(types.int64), codegen


@intrinsic
def _address(typingctx, arguments):
    """The address of a copy of the tuple on the stack of the calling function."""

    def codegen(context, builder, signature, args):
        with builder.goto_entry_block():
            copy = builder.alloca(args[0].type)
        builder.store(args[0], copy)
        return builder.ptrtoint(copy, _INT)

    return types.int64(arguments), codegen


def _at_address(kind):
    """An intrinsic that reads a tuple of this type at an address."""

    @intrinsic
    def read(typingctx, address):
        def codegen(context, builder, signature, args):
            value = builder.load(builder.inttoptr(args[0], context.get_value_type(kind).as_pointer()))
            context.nrt.incref(builder, kind, value)
            return value

        return kind(types.int64), codegen

    return read


def _with_prange(function, workers, arguments):
    """The signature that the next function implements."""


@overload(_with_prange, jit_options=INLINED | {"parallel": True})
def _choose_with_prange(function, workers, arguments):
    called, read = function.dispatcher, _at_address(arguments)

    @numba.njit(**KERNEL)
    def call(worker, workers, address):
        called(worker, workers, *read(address))

    @numba.njit(**KERNEL)
    def run(worker, workers, address, failed):
        try:
            call(worker, workers, address)
        except Exception:
            failed[0] = 1

    def loop(function, workers, arguments):
        address, failed = _address(arguments), np.zeros(1, np.int64)
        if workers == 1:
            run(0, 1, address, failed)
        else:
            before = _lock_region()
            for worker in numba.prange(workers):
                run(worker, workers, address, failed)
            _unlock_region(before)
        if failed[0]:
            raise MemoryError(NO_MEMORY)

    return loop


# parallel_for(function, workers, arguments) calls function(worker, workers, *arguments) for worker = 0 … workers - 1,
# each on a thread, and returns when all are done; one worker runs on the calling thread. Results are discarded.
# MemoryError if a call fails: allocation is all that can fail in a kernel.
parallel_for = _with_prange if PLAIN else _on_pool


def parallel(function: Callable) -> Any:
    """Decorator: `function(worker, workers, *arguments)` as a kernel (workers, *arguments) of one parallel region."""
    code, inner = function.__code__, jit_inner(function)
    names = ", ".join(code.co_varnames[2 : code.co_argcount])
    source = f"def {function.__name__}(workers, {names}):\n    parallel_for(inner, workers, ({names},))"
    region = {"parallel_for": parallel_for, "inner": inner, "__name__": function.__module__}
    exec(compile(source, code.co_filename, "exec"), region)
    made = region[function.__name__]
    made.__qualname__, made.__doc__ = function.__qualname__, function.__doc__
    return jit(made)


@jit_inner
def chunk(worker, workers, count):
    """The range of 0 … count - 1 that is this worker's."""
    return range(worker * count // workers, (worker + 1) * count // workers)


@intrinsic
def _add(typingctx, counters, index, amount):
    """counters[index] += amount, atomically; returns the value before."""

    def codegen(context, builder, signature, args):
        data = context.make_array(signature.args[0])(context, builder, args[0]).data
        return builder.atomic_rmw("add", builder.gep(data, [args[1]]), args[2], "seq_cst")

    return types.int64(counters, types.intp, types.int64), codegen


@intrinsic
def _read(typingctx, counters, index):
    """counters[index], read atomically: what other threads wrote before they added to it is visible, too."""

    def codegen(context, builder, signature, args):
        data = context.make_array(signature.args[0])(context, builder, args[0]).data
        return builder.load_atomic(builder.gep(data, [args[1]]), "acquire", 8)

    return types.int64(counters, types.intp), codegen


@intrinsic
def _yield_thread(typingctx):
    """Yields this core to another thread, if one waits for it."""

    def codegen(context, builder, signature, args):
        _yield_core(builder)
        return context.get_dummy_value()

    return types.void(), codegen


@jit_inner
def new_counters(steps, workers):
    """Counters of all steps: for each thread's share the tasks begun, then the tasks done."""
    return np.zeros(steps * (workers + 1) * LINE, np.int64)


@jit_inner
def next_task(counters, step, worker, workers, tasks):
    """Claims a task of 0 … tasks - 1 that has not begun, first of this worker's share; -1 if none is left."""
    for i in range(workers):
        owner = (worker + i) % workers
        first, last = owner * tasks // workers, (owner + 1) * tasks // workers
        at = (step * (workers + 1) + owner) * LINE
        if _read(counters, at) < last - first:
            task = first + _add(counters, at, 1)
            if task < last:
                return task
    return -1


@jit_inner
def barrier(counters, step, done, workers, tasks, ahead, at):
    """Returns when all tasks are done, of which this worker did `done`. Prefetches ahead[at :] meanwhile."""
    counter = (step * (workers + 1) + workers) * LINE
    _add(counters, counter, done)
    fetched = 0
    while _read(counters, counter) < tasks:
        if fetched < READ_AHEAD:
            prefetch(ahead, at + fetched // ahead.itemsize)
            fetched += 64
        else:
            _yield_thread()
