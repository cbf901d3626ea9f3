"""Threads that work together on one kernel.

    @jit_inner
    def _some_rows(worker, workers, x, y):
        for t in chunk(worker, workers, len(x)):            # this worker's range of the rows
            …

    @jit
    def _rows(workers, x, y):
        parallel_for(_some_rows, workers, (x, y))              # each worker on a thread of its own

is a parallel region: what Numba's `prange` does, by the same thread pool. But Numba compiles the body of a prange loop
five times over, wrapped in one function after the other, and this one twice; for kernels as large as these that is half
of the time that a first run takes.

A region takes microseconds to begin and to end, and meanwhile memory stands idle. One layer of a token would be five
such regions of 20 to 50 microseconds each; so it is one (one_layer.py), in which the threads share out each step
themselves:

    done = 0
    piece = next_task(board, step, worker, workers, pieces)
    while piece >= 0:                                   # a piece that nobody else has begun
        …
        done += 1
        piece = next_task(board, step, worker, workers, pieces)
    barrier(board, step, done, workers, pieces, …)     # until all pieces of this step are done

Nobody waits for a thread that has not come, only for pieces that have been begun: a thread that is kept busy by another
program finds, when it comes at last, that the others have done its share. For that to be right a step may write only
what no earlier step of the region reads: the late thread still goes through all steps, and must see in each what the
others saw. (Keys and values of new tokens all threads write into the cache, each before it reads them: all of them
write the same, as often as they come.)

Who waits reads ahead: the first weights of the next step come into its second-level cache. Then it gives way: another
program that wants the core had better take it now, from a thread that waits, than later in the middle of a piece, for
which all others would wait.
"""

from __future__ import annotations

import sys

import numpy as np
from llvmlite import ir
from numba import get_num_threads, types
from numba.core import cgutils
from numba.extending import intrinsic

from .compiler import jit_inner
from .simd import prefetch
from .views import new_zeros

PIECES = 8  # of each step, for each thread: so many times one may help out another
LINE = 8  # int64 in a cache line: counters of two threads in one would be sent to and fro
READ_AHEAD = 1 << 16  # bytes at most that a waiting thread asks for


_BYTES, _INT = ir.IntType(8).as_pointer(), ir.IntType(64)


@intrinsic
def parallel_for(typingctx, function, workers, arguments):
    """function(worker, workers, *arguments) for worker = 0 … workers - 1, each on a thread; returns when all are done.

    For one worker no thread is woken. What `function` returns is lost. MemoryError if one of them fails: there is
    nothing else in a kernel that can.
    """
    types_in = (types.int64, types.int64, *(types.unliteral(kind) for kind in arguments))
    called = function.get_call_type(typingctx, types_in, {})
    compiled = function.dispatcher.overloads[called.args]

    def codegen(context, builder, signature, args):
        # `get_num_threads` has Numba start its pool, if it has not; now, and when this kernel is read from the cache.
        get_num_threads()
        context.active_code_library._reload_init.add(get_num_threads)
        failed = cgutils.alloca_once_value(builder, _INT(0))
        packed = cgutils.alloca_once_value(builder, cgutils.pack_struct(builder, [*args[1:], failed]))
        one_share = _share_function(context, builder, compiled, packed.type)
        # The pool calls one_share(begin, [count], …, packed) for ranges of workers, where `begin` is the address of an
        # array moved on by the worker's number: of bytes from address 0, so that the address is the number itself.
        begin = cgutils.alloca_once_value(builder, ir.Constant(_BYTES, None))
        count, size = (cgutils.alloca_once_value(builder, number) for number in (args[1], _INT(1)))
        pool = ir.FunctionType(ir.VoidType(), [_BYTES] * 5 + [_INT] * 3)
        run = cgutils.get_or_insert_function(builder.module, pool, "numba_parallel_for")
        pointers = [builder.bitcast(value, _BYTES) for value in (one_share, begin, count, size, packed)]
        with builder.if_else(builder.icmp_signed(">", args[1], _INT(1))) as (several, one):
            with several:
                builder.call(run, [*pointers, _INT(0), _INT(1), args[1]])
            with one:
                builder.call(one_share, [begin, count, size, pointers[-1]])
        with builder.if_then(cgutils.is_not_null(builder, builder.load(failed)), likely=False):
            message = "a thread of a kernel could not have the memory that it works in"
            context.call_conv.return_user_exc(builder, MemoryError, (message,))
        return context.get_dummy_value()

    return types.void(function, types.int64, arguments), codegen


def _share_function(context, builder, compiled, packed_type):
    """A function in the form that the thread pool calls, which calls the compiled one for a range of workers."""
    form = ir.FunctionType(ir.VoidType(), [_BYTES.as_pointer(), _INT.as_pointer(), _INT.as_pointer(), _BYTES])
    name = f"share.{len(builder.module.functions)}.{compiled.fndesc.mangled_name}"
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
        worker, kind = inside.add(first, loop.index), compiled.signature
        passed = [worker, *unpacked]
        status, _ = context.call_conv.call_function(inside, target, kind.return_type, kind.args, passed)
        with inside.if_then(status.is_error, likely=False):
            inside.store(_INT(1), failed)
    inside.ret_void()
    return function


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
    """Let another program's thread have this core, if one wants it; else nothing."""

    def codegen(context, builder, signature, args):
        name = "SwitchToThread" if sys.platform == "win32" else "sched_yield"
        builder.call(cgutils.get_or_insert_function(builder.module, ir.FunctionType(ir.IntType(32), []), name), [])
        return context.get_dummy_value()

    return types.void(), codegen


@jit_inner
def new_counters(steps, workers):
    """Counters of all steps: for each thread's share the pieces begun, then the pieces done."""
    return new_zeros(steps * (workers + 1) * LINE, np.int64)


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
