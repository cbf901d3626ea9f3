"""Threads that share a kernel: every task is done once, whichever thread is late or missing."""

from __future__ import annotations

import os
import subprocess
import sys

import numba
import numpy as np
import pytest

from minigemma.kernels.compiler import PLAIN, jit, jit_inner
from minigemma.kernels.parallel import barrier, chunk, most_threads, new_counters, next_task, parallel_for, threads

FEW_THREADS = pytest.mark.skipif(most_threads() < 2, reason="one core")


@jit_inner
def _count_some(worker, workers, times, who):
    for i in chunk(worker, workers, len(times)):
        times[i] += 1
        who[i] = worker


@jit
def _count(workers, times, who):
    parallel_for(_count_some, workers, (times, who))


@jit_inner
def _steps(worker, workers, tasks, counters, counts):
    for step in range(len(counts)):
        done = 0
        task = next_task(counters, step, worker, workers, tasks)
        while task >= 0:
            counts[step, task] = 1 + (counts[step - 1].sum() if step else 0)
            done += 1
            task = next_task(counters, step, worker, workers, tasks)
        barrier(counters, step, done, workers, tasks, counts.reshape(-1).view(np.uint8), 0)


@jit
def _region(workers, tasks, counts):
    parallel_for(_steps, workers, (tasks, new_counters(len(counts), workers), counts))


@jit
def _one_after_the_other(workers, tasks, counts):
    counters = new_counters(len(counts), workers)
    for worker in range(workers):
        _steps(worker, workers, tasks, counters, counts)


@jit_inner
def _greedy(worker, workers, sizes):
    np.empty(sizes[worker], np.int8)[:1] = 1


@jit
def _allocate(workers, sizes):
    parallel_for(_greedy, workers, (sizes,))


@pytest.mark.parametrize("workers", [1, pytest.param(2, marks=FEW_THREADS)])
def test_a_worker_without_memory_is_an_error(workers):
    sizes = np.ones(workers, np.int64)
    _allocate(workers, sizes)
    sizes[-1] = 1 << 60
    with pytest.raises(MemoryError, match="a thread"):
        _allocate(workers, sizes)


@pytest.mark.parametrize("workers", [1, pytest.param(2, marks=FEW_THREADS)])
@pytest.mark.parametrize("rows", [0, 1, 2, 7, 1000])
def test_each_row_is_one_workers(workers, rows):
    times, who = np.zeros(rows, np.int64), np.zeros(rows, np.int64)
    _count(workers, times, who)
    assert (times == 1).all()
    assert np.array_equal(who, np.sort(who)), "a worker's rows lie together"
    assert rows < workers or len(set(who)) == workers


def _expected(steps, pieces):
    """Every piece of a step sees the whole step before it: 1, 1 + pieces · 1, 1 + pieces · (1 + pieces), …"""
    value, rows = 1, []
    for _ in range(steps):
        rows.append([value] * pieces)
        value = 1 + pieces * value
    return np.array(rows)


@pytest.mark.parametrize("workers", [1, pytest.param(2, marks=FEW_THREADS)])
@pytest.mark.parametrize("pieces", [1, 2, 5, 16])
def test_a_step_begins_when_the_one_before_is_done(workers, pieces):
    for _ in range(200):
        counts = np.zeros((5, pieces), np.int64)
        _region(workers, pieces, counts)
        assert np.array_equal(counts, _expected(5, pieces))


@pytest.mark.parametrize("workers", [2, 3, 8])
def test_a_thread_that_comes_when_all_is_done_finds_nothing_to_do(workers):
    counts = np.zeros((4, 6), np.int64)
    _one_after_the_other(workers, 6, counts)  # the first worker never waits for the others
    assert np.array_equal(counts, _expected(4, 6))


@FEW_THREADS
@pytest.mark.parametrize("layer", ["tbb", "omp", "workqueue"])
def test_every_threading_layer(layer):
    script = (
        "import numpy as np, numba, sys; sys.path.insert(0, 'tests/kernels')\n"
        "from test_parallel import _count, _region, _expected\n"
        "assert numba.get_num_threads() > 1\n"
        "times, counts = np.zeros(9, int), np.zeros((3, 4), int)\n"
        "for _ in range(50): _count(2, times, times.copy()); _region(2, 4, counts)\n"
        "assert (times == 50).all() and np.array_equal(counts, _expected(3, 4))\n"
        "print(numba.threading_layer())"
    )
    run = subprocess.run(
        [sys.executable, "-c", script],
        env=os.environ | {"NUMBA_THREADING_LAYER": layer},
        capture_output=True,
        text=True,
    )
    if "No threading layer could be loaded" in run.stderr:
        pytest.skip(f"{layer} is not installed")
    assert run.stdout.strip() == layer, run.stderr


@FEW_THREADS
@pytest.mark.parametrize("layer", ["workqueue", "tbb"])
def test_several_python_threads_share_one_pool(layer):
    """Numba's workqueue ends the process where two regions overlap, so they take turns."""
    if PLAIN and layer == "workqueue":
        pytest.skip("public Numba cannot make them take turns")
    script = (
        "import numpy as np, sys; sys.path.insert(0, 'tests/kernels')\n"
        "from concurrent.futures import ThreadPoolExecutor\n"
        "from test_parallel import _count, threads\n"
        "def many(_):\n"
        "    times = np.zeros(9000, int)\n"
        "    with threads(2):\n"
        "        for _ in range(300): _count(2, times, times.copy())\n"
        "    return (times == 300).all()\n"
        "with ThreadPoolExecutor(4) as pool: print(all(pool.map(many, range(8))))"
    )
    run = subprocess.run(
        [sys.executable, "-c", script],
        env=os.environ | {"NUMBA_THREADING_LAYER": layer},
        capture_output=True,
        text=True,
    )
    if "No threading layer could be loaded" in run.stderr:
        pytest.skip(f"{layer} is not installed")
    assert run.stdout.strip() == "True", run.stderr


def test_more_threads_than_there_are_is_all_of_them():
    with threads(most_threads() + 5):
        assert numba.get_num_threads() == most_threads()
