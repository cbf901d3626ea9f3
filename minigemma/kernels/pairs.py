"""Rows read in pairs: as two streams from memory where that is faster (`STREAMS`, simd/cpu.py).

AMD's Zen 3 reads up to a quarter faster as two streams; Intel's processors read more slowly. With two streams a pair is
a row from each half of a thread's rows. With one, a pair is two neighbors if they share the loads of x (several
tokens); else each row is `alone`, its own partner.
"""

from typing import NamedTuple

from .compiler import jit_inlined, jit_inner
from .parallel import chunk
from .simd.cpu import STREAMS


class Pairs(NamedTuple):
    """`length` pairs: pair i is row first + i · step and the row `partner` after it. Rows end before `end`."""

    first: int
    partner: int
    step: int
    length: int
    end: int


@jit_inner
def pairs_of(first, end, alone):
    """The pairs of rows first … end - 1."""
    half = (end - first + 1) // 2
    if STREAMS == 2:
        return Pairs(first, half, 1, half, end)
    return Pairs(first, 0, 1, end - first, end) if alone else Pairs(first, 1, 2, half, end)


@jit_inner
def pairs_of_task(task, tasks, per_thread, rows, alone):
    """The pairs of a task; each thread has `per_thread` tasks. The next task continues where this one ends, in both
    halves of the thread's rows, so what this one prefetches beyond its end is used.
    """
    mine = chunk(task // per_thread, tasks // per_thread, rows)
    pairs = pairs_of(mine.start, mine.stop, alone)
    own = chunk(task % per_thread, per_thread, pairs.length)
    return some_pairs(pairs, own.start, own.stop - own.start)


@jit_inner
def some_pairs(pairs, start, count):
    """At most `count` of the pairs, from pair `start` on."""
    first, count = pairs.first + start * pairs.step, min(count, pairs.length - start)
    return Pairs(first, pairs.partner, pairs.step, count, pairs.end)


@jit_inlined
def partner_of(pairs, row):
    """The second row of the pair that begins with `row`, clamped to the last row."""
    return min(row + pairs.partner, pairs.end - 1)


@jit_inlined
def stream_of(pairs, row):
    """The same of pairs that are made `alone`. With one stream it is `row` itself, so that the compiler drops the
    work on the second row.
    """
    return row if STREAMS == 1 else partner_of(pairs, row)
