"""Threads that share the work of one kernel.

    @jit_inner
    def _some_rows(worker, workers, x, y):
        for t in chunk(worker, workers, len(x)):            # this worker's range of the rows
            …

    @jit
    def _rows(workers, x, y):
        parallel_for(_some_rows, workers, (x, y))              # each worker on a thread of its own

is a parallel region: what Numba's `prange` does, on the same thread pool, compiled twice instead of five times.

A region takes microseconds to start and to end, and no weights are read meanwhile. A kernel of several steps is
therefore one region, in which the threads share out each step themselves:

    done = 0
    task = next_task(counters, step, worker, workers, tasks)
    while task >= 0:                                    # a task that no other thread has claimed
        …
        done += 1
        task = next_task(counters, step, worker, workers, tasks)
    barrier(counters, step, done, workers, tasks, …)    # until all tasks of this step are done

Only claimed tasks are awaited, so a descheduled thread cannot stall a step: when it comes late, the others have done
its share. A step may therefore write only what no earlier step of the region reads, since the late thread still goes
through all steps and must see in each what the others saw. (All threads write keys and values of new tokens into the
cache, each before it reads them, and all write the same values.)

A waiting thread prefetches: the first weights of the next step come into its second-level cache. Then it yields its
core, so that another program takes it now and not in the middle of a task for which all others would wait.
"""

from __future__ import annotations

import ctypes
import os
import site
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from contextvars import ContextVar
from pathlib import Path

import llvmlite.binding
import numba
import numpy as np
from llvmlite import ir
from numba import types
from numba.extending import intrinsic, overload
from threadpoolctl import threadpool_limits

from ..definition import runs_formulas
from .compiler import BEFORE_USE, INLINED, KERNEL, NO_MEMORY, PLAIN, jit_inner, on_threads
from .simd import prefetch

PIECES = 8  # tasks of each step per thread, the most that other threads can take over
LINE = 8  # int64 in a cache line: counters of two threads in one line would move between their caches
READ_AHEAD = 1 << 16  # bytes at most that a waiting thread prefetches

# OpenMP, where there is no TBB: a waiting thread spins for a fraction of a millisecond, longer than Python takes
# between two kernels, then sleeps. GNU OpenMP's own limit is many times that: where another program wants the cores,
# spinning threads take time from the one they wait for.
if not {"OMP_WAIT_POLICY", "GOMP_SPINCOUNT"} & set(os.environ):
    os.environ["GOMP_SPINCOUNT"] = "10000"

# A parallel region costs 1.5 µs under TBB and OpenMP and 100 µs under Numba's own workqueue. TBB comes first: there a
# thread that is free takes over work that another has not begun, while OpenMP waits for every thread in every region,
# which costs half a millisecond each as soon as another program wants one of the cores.
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
    """Inside this block kernels use `count` threads, or all there are if that is fewer. Definitions use as many in
    NumPy's own products.
    """
    if runs_formulas():
        with threadpool_limits(count):
            yield
        return
    start_threads()
    before, count = numba.get_num_threads(), min(count, most_threads())
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


def most_threads() -> int:
    """The most threads that a kernel may use: what Numba was started with, by default one per core."""
    return int(numba.config.NUMBA_NUM_THREADS)


def default_threads() -> int:
    """One thread for each core that this process may use, and no more than Numba was started with."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return max(1, min(cores, most_threads()))


def threading_layer() -> str:
    """What starts a parallel region: "tbb", "omp" (OpenMP) or "workqueue", Numba's own, 50 times as slow at it."""
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


def start_threads() -> None:
    """Start Numba's thread pool, unless it runs."""
    numba.get_num_threads()
    if _region.value == _NO_LOCK and numba.threading_layer() == "workqueue":
        _region.value = _UNLOCKED


BEFORE_USE.append(start_threads)


def _external(builder: ir.IRBuilder, name: str, make: Callable, kind: ir.Type) -> ir.Value:
    found = builder.module.globals.get(name)
    return make(builder.module, kind, name) if found is None else found


def _yield_core(builder: ir.IRBuilder) -> None:
    name = "SwitchToThread" if sys.platform == "win32" else "sched_yield"
    builder.call(_external(builder, name, ir.Function, ir.FunctionType(ir.IntType(32), [])), [])


def _lock(builder: ir.IRBuilder) -> ir.Value:
    """Wait for the lock; returns what it was: _UNLOCKED, or _NO_LOCK where none is needed."""
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


# The same with public Numba. The arguments pass through `prange` as an address: it takes no tuples of NamedTuples.


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
    """Where a copy of the tuple lies, until the function that calls this ends."""

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
    """Stands for what the next function returns."""


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
# each on a thread, and returns when all are done. For one worker no thread is woken. What `function` returns is lost.
# MemoryError if one of them fails: nothing else in a kernel can.
parallel_for = _with_prange if PLAIN else _on_pool


@jit_inner
def chunk(worker, workers, count):
    """The range of 0 … count - 1 that is this worker's."""
    return range(worker * count // workers, (worker + 1) * count // workers)


@intrinsic
def _add(typingctx, counters, index, amount):
    """counters[index] += amount as one indivisible operation; returns what was there before."""

    def codegen(context, builder, signature, args):
        data = context.make_array(signature.args[0])(context, builder, args[0]).data
        return builder.atomic_rmw("add", builder.gep(data, [args[1]]), args[2], "seq_cst")

    return types.int64(counters, types.intp, types.int64), codegen


@intrinsic
def _look(typingctx, counters, index):
    """counters[index] as it is now, and with it everything that was written before it was added to."""

    def codegen(context, builder, signature, args):
        data = context.make_array(signature.args[0])(context, builder, args[0]).data
        return builder.load_atomic(builder.gep(data, [args[1]]), "acquire", 8)

    return types.int64(counters, types.intp), codegen


@intrinsic
def _give_way(typingctx):
    """Yield this core to another program's thread, if one waits for it."""

    def codegen(context, builder, signature, args):
        _yield_core(builder)
        return context.get_dummy_value()

    return types.void(), codegen


@jit_inner
def new_counters(steps, workers):
    """Counters of all steps: for each thread's share the pieces begun, then the pieces done."""
    return np.zeros(steps * (workers + 1) * LINE, np.int64)


@jit_inner
def next_task(board, step, worker, workers, pieces):
    """A piece of 0 … pieces - 1 that nobody has begun: of this worker's own share, else of another's; -1: none left."""
    for i in range(workers):
        owner = (worker + i) % workers
        first, last = owner * pieces // workers, (owner + 1) * pieces // workers
        at = (step * (workers + 1) + owner) * LINE
        if _look(board, at) < last - first:
            piece = first + _add(board, at, 1)
            if piece < last:
                return piece
    return -1


@jit_inner
def barrier(board, step, done, workers, pieces, ahead, at):
    """This worker has done `done` pieces; return when all are done. Meanwhile ahead[at :], bytes, is asked for."""
    counter = (step * (workers + 1) + workers) * LINE
    _add(board, counter, done)
    asked = 0
    while _look(board, counter) < pieces:
        if asked < READ_AHEAD:
            prefetch(ahead, at + asked // ahead.itemsize)
            asked += 64
        else:
            _give_way()
