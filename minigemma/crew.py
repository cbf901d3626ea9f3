"""Threads that go through the steps of one parallel region together.

A parallel region takes microseconds to begin and to end, and meanwhile memory stands idle. One layer of a token would
be four or five such regions of 20 to 50 microseconds each; here it is one, in which the threads share out each step
among themselves:

    for worker in prange(workers):
        done = 0
        piece = claim(board, step, worker, workers, pieces)
        while piece >= 0:                                   # a piece that nobody else has begun
            …
            done += 1
            piece = claim(board, step, worker, workers, pieces)
        together(board, step, done, workers, pieces, …)     # until all pieces of this step are done

Nobody waits for a thread that has not come, only for pieces that have been begun: a thread that is kept busy by another
program finds, when it comes at last, that the others have done its share. For that to be right a step may write only
what no earlier step of the region reads: the late thread still goes through all steps, and must see in each what the
others saw.

Who waits reads ahead: the first weights of the next step come into its second-level cache.
"""

from __future__ import annotations

import numpy as np
from numba import types
from numba.extending import intrinsic

from .backend import jit_inner
from .simd import prefetch

PIECES = 8  # of each step, for each thread: so many times one may help out another
LINE = 8  # int64 in a cache line: counters of two threads in one would be sent to and fro
READ_AHEAD = 1 << 16  # bytes at most that a waiting thread asks for


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


@jit_inner
def new_board(steps, workers):
    """Counters of all steps: for each thread's share the pieces begun, then the pieces done."""
    return np.zeros(steps * (workers + 1) * LINE, np.int64)


@jit_inner
def claim(board, step, worker, workers, pieces):
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
def together(board, step, done, workers, pieces, ahead, at):
    """This worker has done `done` pieces; return when all are done. Meanwhile ahead[at :], bytes, is asked for."""
    counter = (step * (workers + 1) + workers) * LINE
    _add(board, counter, done)
    asked = 0
    while _look(board, counter) < pieces:
        if asked < READ_AHEAD:
            prefetch(ahead, at + asked // ahead.itemsize)
            asked += 64
