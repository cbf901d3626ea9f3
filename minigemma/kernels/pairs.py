"""Rows read in pairs, which come from two places in memory at once where that is faster.

AMD's Zen 3 reads up to a quarter faster from two places than from one, as each of them waits less; Intel's processors
are slower at it (`simd.STREAMS`). So a thread walks both halves of its rows together, a row of the first half with one
of the second. Where one place is best, the rows of a pair are neighbors if both use what is loaded of x (several
tokens), else each row is `alone`, its own partner.
"""

from __future__ import annotations

from typing import NamedTuple

from .compiler import jit_inlined, jit_inner
from .parallel import chunk
from .simd import STREAMS


class Pairs(NamedTuple):
    """`length` pairs: pair i is row first + i · step and the row `partner` farther. Rows from `end` on do not exist."""

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
    """The pairs of a task, of which each thread has `per_thread`. The next task goes on where this one ends, in both
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
    """The second row of the pair that begins with `row`; the last row of all if it has none."""
    return min(row + pairs.partner, pairs.end - 1)


@jit_inlined
def stream_of(pairs, row):
    """The same of pairs that are made `alone`: where one place is best the row itself, so that the compiler sees that
    both are the same and drops the work on the second.
    """
    return row if STREAMS == 1 else partner_of(pairs, row)
