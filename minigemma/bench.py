"""What a model does on this machine, beside what the machine can do.

A token reads every weight once, so its limit is the bandwidth of memory; a prompt's is arithmetic. Both limits are
measured in the same run by kernels that do nothing else. Times are medians; where another program is measured too,
the two take turns.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
from numba import get_num_threads, prange

from .backend import jit_inner, jit_parallel, threads
from .cache import Cache
from .decoder import Decoder
from .peers import PEERS, Peer, weight_bytes
from .simd import LANES, ROWS, load, prefetch, sum_lanes, tile_add_outer, tile_store, tile_zeros, zeros

READ_BYTES = 1 << 29  # far more than any cache holds
AHEAD = 2048  # float32 numbers
STEPS = 1 << 20  # of the arithmetic loop
FEWEST = 6  # tokens of one measurement of decoding

Progress = Callable[[str], None]


def bench(
    model: Decoder,
    prompt_tokens: int = 512,
    new_tokens: int = 32,
    positions: Sequence[int] = (),
    against: Sequence[str] = (),
    repeat: int = 3,
    progress: Progress = lambda doing: None,
) -> dict[str, Any]:
    """Measure `model`, and the programs named in `against` with the same weights, in turns; all numbers, by name.

    positions: milliseconds a token with so many tokens before it, which are not read: the cache is only as full as if.
    Speeds are tokens a second, times seconds unless the name says milliseconds. Raises ValueError for an unknown
    program and where prompt and answer do not fit into the context.
    """
    unknown = [name for name in against if name not in PEERS]
    if unknown:
        raise ValueError(f"{unknown[0]!r} is no program that is known here; those that are: {', '.join(PEERS)}")
    total = prompt_tokens + new_tokens
    if max(total, *positions, 0) > model.config.context:
        raise ValueError(f"the model's context is {model.config.context:,} tokens; measure within it")
    runners: dict[str, Peer] = {"minigemma": Ours(model, total)}
    missing = {}
    for name in against:
        progress(f"preparing {name}")
        try:
            runners[name] = PEERS[name](model)
        except ImportError as error:
            missing[name] = str(error)
    ids = np.random.default_rng(0).integers(3, min(model.config.vocab, 200_000), prompt_tokens).tolist()
    prompt, token = measure(runners, ids, new_tokens, repeat, progress)
    progress("measuring the machine")
    with threads(model.threads):
        bandwidth, peak = read_bandwidth(), arithmetic_peak()
    read = weight_bytes(model.weights)
    report: dict[str, Any] = {
        "name": model.name,
        "parameters": model.config.embedding_parameters + model.config.non_embedding_parameters,
        "threads": model.threads,
        "prompt_tokens": prompt_tokens,
        "new_tokens": new_tokens,
        "weight_bytes": read,
        "resident_bytes": resident_bytes(),
        "read_bytes_per_second": bandwidth,
        "flops_per_second": peak,
        "decode_limit_tps": bandwidth / read,
        "programs": {
            name: {"prefill_tps": prompt_tokens / prompt[name], "decode_tps": 1 / token[name]} for name in runners
        },
        "missing": missing,
    }
    if positions:
        report["milliseconds_per_token_at"] = {
            str(p): 1000 * seconds for p, seconds in token_at(model, positions, new_tokens, repeat, progress).items()
        }
    return report


class Ours(Peer):
    """minigemma, as it would run for anyone."""

    name = "minigemma"

    def __init__(self, model: Decoder, most: int) -> None:
        self.model, self.most = model, most

    def prefill(self, ids: Sequence[int]) -> float:
        """As every peer."""
        self.cache = self.model.new_cache(self.most)
        began = time.perf_counter()
        self.logits = self.model.forward(ids, self.cache, last_only=True)
        return time.perf_counter() - began

    def decode(self, count: int) -> float:
        """As every peer."""
        began = time.perf_counter()
        for _ in range(count):
            self.logits = self.model.forward([int(self.logits[0].argmax())], self.cache, last_only=True)
        return (time.perf_counter() - began) / count


def measure(
    runners: dict[str, Peer], ids: Sequence[int], new_tokens: int, repeat: int, progress: Progress
) -> tuple[dict[str, float], dict[str, float]]:
    """Seconds of the prompt and of a token, the median of `repeat` rounds in which each program has its turn."""
    prompt: dict[str, list[float]] = {name: [] for name in runners}
    token: dict[str, list[float]] = {name: [] for name in runners}
    for number in range(repeat + 1):  # the first round warms up: compiles, maps pages, starts threads
        for name, runner in runners.items():
            progress(f"{name}: {f'round {number} of {repeat}' if number else 'warming up'}")
            prompt[name].append(runner.prefill(ids))
            token[name].append(runner.decode(new_tokens if number else 1))
    return ({name: median(t[1:]) for name, t in prompt.items()}, {name: median(t[1:]) for name, t in token.items()})


def token_at(
    model: Decoder, positions: Sequence[int], new_tokens: int, repeat: int, progress: Progress
) -> dict[int, float]:
    """Seconds a token at each position; the positions take turns, a few tokens each, and the medians are returned."""
    count = max(new_tokens, FEWEST)
    caches: dict[int, Cache] = {}
    for position in positions:
        caches[position] = model.new_cache(min(model.config.context, position + count * (repeat + 1)))
        caches[position].skip_to(position)
    times: dict[int, list[float]] = {position: [] for position in positions}
    for number in range(repeat + 1):
        for position, cache in caches.items():
            progress(f"a token at position {position:,}")
            for _ in range(count if number else 1):
                began = time.perf_counter()
                model.forward([3], cache, last_only=True)
                if number:
                    times[position].append(time.perf_counter() - began)
    return {position: median(t) for position, t in times.items()}


# ---- the machine


@jit_inner
def _read(numbers, first, last):
    a, b, c, d = zeros(), zeros(), zeros(), zeros()
    for i in range(first, last, 4 * LANES):
        prefetch(numbers, i + AHEAD)
        prefetch(numbers, i + AHEAD + 16)
        a, b = a + load(numbers, i), b + load(numbers, i + LANES)
        c, d = c + load(numbers, i + 2 * LANES), d + load(numbers, i + 3 * LANES)
    return sum_lanes((a + b) + (c + d))


@jit_parallel
def _read_all(numbers, workers):
    total = np.float32(0)
    size = numbers.size // workers // (4 * LANES) * (4 * LANES)
    for worker in prange(workers):
        total += _read(numbers, np.int64(worker * size), np.int64((worker + 1) * size))
    return total


def read_bandwidth() -> float:
    """Bytes a second that the threads together read from memory, once in order: the median of nine tries."""
    numbers = np.ones(READ_BYTES // 4, np.float32)
    return READ_BYTES / _median_seconds(lambda: _read_all(numbers, get_num_threads()))


@jit_inner
def _multiply(a, b, steps, out):
    tile = tile_zeros()
    for step in range(steps):
        tile = tile_add_outer(tile, a, step % 64, 64, b, step % 64 * 2 * LANES)
    tile_store(tile, out, 0, 2 * LANES)


@jit_parallel
def _multiply_all(a, b, steps, workers, out):
    for worker in prange(workers):
        _multiply(a, b, steps, out[worker])


def arithmetic_peak() -> float:
    """Multiplications and additions a second of float32 vectors that never leave the first-level cache."""
    a, b = np.zeros(64 * (ROWS + 1), np.float32), np.zeros(64 * 2 * LANES, np.float32)
    out = np.zeros((get_num_threads(), ROWS * 2 * LANES), np.float32)
    work = 2 * ROWS * 2 * LANES * STEPS * get_num_threads()
    return work / _median_seconds(lambda: _multiply_all(a, b, STEPS, get_num_threads(), out))


def _median_seconds(run: Callable[[], Any]) -> float:
    run()
    times = []
    for _ in range(9):
        began = time.perf_counter()
        run()
        times.append(time.perf_counter() - began)
    return median(times)


def resident_bytes() -> int:
    """Memory that this process has in use, 0 where the system does not say."""
    path = Path("/proc/self/statm")
    return int(path.read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE") if path.exists() else 0
