"""What a model does on this machine, beside what the machine can do.

A token reads every weight once, so its limit is the bandwidth of memory; a prompt's is arithmetic. Both limits are
measured in the same run by kernels that do nothing else. Times are medians; where another program is measured too,
the two take turns.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from errno import ENOENT
from importlib.util import find_spec
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
from numba import get_num_threads

from ..arrays import F32, aligned
from ..blocks.siglip import soft_tokens, vision_tower
from ..cache import Cache
from ..errors import no_vision
from ..formulas.rglru import linear_scan
from ..kernels import amx, int4
from ..kernels.compiler import jit, jit_inner
from ..kernels.parallel import chunk, parallel_for, threads
from ..kernels.simd import (
    AHEAD,
    LANES,
    ROWS,
    STREAMS,
    byte_tile_add,
    byte_tile_add_scaled,
    byte_tile_zeros,
    int_tile_add_scaled,
    int_tile_zeros,
    load,
    prefetch_four,
    sum_lanes,
    tile_add_outer,
    tile_add_pairs,
    tile_store,
    tile_zeros,
    zeros,
)
from ..layouts.weight import BLOCK, Weight, block_bytes, format_of, is_side_by_side, rows_columns
from ..models.decoder import Decoder
from ..models.recurrentgemma import RecurrentGemmaConfig
from ..taps import NO_TAPS
from ..text.generation import sampling_logits
from .peers import PEERS, Peer, parameters, weight_bytes

READ_BYTES = 1 << 29  # far more than any cache holds
STEPS = 1 << 20  # of the arithmetic loop
UNIT_DEPTH = 8  # tiles in a row of the matrix unit's loop: 16 KB each of rows and tokens
UNIT_STEPS = 4096 if amx.UNIT else 4  # of that loop; the imitation of the unit is slow
STAGES = ("scaling the picture", "vision tower", "pooling and projection", "reading its tokens", "one more token")
SCAN_TOKENS = 2048
MARKERS = "osD^v"  # of the programs in a figure
FEWEST = 6  # tokens of one measurement of decoding

Progress = Callable[[str], None]


def bench(
    model: Decoder,
    prompt_tokens: int = 512,
    new_tokens: int = 32,
    positions: Sequence[int] = (),
    against: Sequence[str] = (),
    repeat: int = 3,
    image: bool = False,
    lengths: Sequence[int] = (),
    progress: Progress = lambda doing: None,
) -> dict[str, Any]:
    """Measure `model`, and the programs named in `against` with the same weights, in turns; all numbers, by name.

    positions: milliseconds a token with so many tokens before it, which are not read: the cache is only as full as if.
    image: also the time of an image, stage by stage, for a model with a vision tower.
    lengths: also the speed of other prompts, of so many tokens.
    Speeds are tokens a second, times seconds unless the name says milliseconds. Raises ValueError for an unknown
    program and where prompt and answer do not fit into the context.
    """
    unknown = [name for name in against if name not in PEERS]
    if unknown:
        raise ValueError(f"{unknown[0]!r} is no program that is known here; those that are: {', '.join(PEERS)}")
    total = prompt_tokens + new_tokens + 1
    if max(total, *positions, *lengths, 0) > model.config.context:
        raise ValueError(f"the model's context is {model.config.context:,} tokens; measure within it")
    ours = Ours(model, max(total, *(n + 3 for n in lengths), 0))
    runners: dict[str, Peer] = {"minigemma": ours}
    missing = {}
    for name in against:
        progress(f"preparing {name}")
        try:
            runners[name] = PEERS[name](model)
        except ImportError as error:
            missing[name] = str(error)
    longest = max(prompt_tokens, *lengths, 0)
    ids = np.random.default_rng(0).integers(3, min(model.config.vocab, 200_000), longest).tolist()
    matrix = model.weights.blocks[0].ffn.gate
    dtype, machine = format_of(matrix), Machine(model.threads, matrix)
    prompt, token = measure(runners, ids[:prompt_tokens], new_tokens, repeat, progress, machine)
    others = {str(n): measure(runners, ids[:n], 1, repeat, progress)[0] for n in lengths}
    bandwidth, peak = machine.bandwidth, machine.peak
    read = ours.read_bytes
    report: dict[str, Any] = {
        "name": model.name,
        "parameters": parameters(model),
        "dtype": dtype,
        "threads": model.threads,
        "vectors": f"{LANES} lanes",
        "prompt_tokens": prompt_tokens,
        "new_tokens": new_tokens,
        "weight_bytes": ours.weight_bytes,
        "read_bytes_per_token": read,
        "resident_bytes": resident_bytes() - READ_BYTES,
        "read_bytes_per_second": bandwidth,
        "flops_per_second": peak,
        "multiplies": machine.numbers,
        "decode_limit_tps": bandwidth / read,
        "flops_per_token": prompt_flops(model),
        "programs": {
            name: {
                "prefill_tps": prompt_tokens / prompt[name],
                "seconds_to_first_token": prompt[name],
                "decode_tps": 1 / token[name],
                "weight_bytes": runner.read_bytes,
            }
            for name, runner in runners.items()
        },
        "prefill_tps_of": {n: {name: int(n) / taken[name] for name in runners} for n, taken in others.items()},
        "missing": missing,
    }
    if isinstance(model.config, RecurrentGemmaConfig):
        with threads(model.threads):
            report["scan_bytes_per_second"] = scan_speed(model.config.lru_width)
    if image:
        report["image"] = image_stages(model, repeat, progress)
        report["tower_seconds"] = tower_seconds(model, runners, repeat)
    if positions:
        report["milliseconds_per_token_at"] = {
            str(p): 1000 * seconds for p, seconds in token_at(model, positions, new_tokens, repeat, progress).items()
        }
    return report


def table(report: dict[str, Any]) -> str:
    """The report for people: a line for each number, beside its limit where it has one."""
    r, programs = report, dict(report["programs"])
    ours = programs.pop("minigemma")
    gigabytes = r["weight_bytes"] / 1e9
    reached = 100 * ours["prefill_tps"] * r["flops_per_token"] / r["flops_per_second"]
    lines = [
        f"{r['name']}: {r['parameters']:,} parameters, {r['dtype']}, {gigabytes:,.2f} GB, weights {r['weights']}",
        f"machine     reads {r['read_bytes_per_second'] / 1e9:,.1f} GB/s, multiplies "
        f"{r['flops_per_second'] / 1e9:,.0f} GFLOP/s in {r['multiplies']}; {r['threads']} threads, {r['vectors']}",
        f"prompt      {ours['prefill_tps']:,.1f} tokens/s over {r['prompt_tokens']:,}, the first token after "
        f"{ours['seconds_to_first_token']:,.3g} s, {reached:.0f} % of the arithmetic",
        f"decode      {ours['decode_tps']:,.2f} tokens/s, {100 * ours['decode_tps'] / r['decode_limit_tps']:.0f} % of "
        f"the {r['decode_limit_tps']:,.2f} that reading {r['read_bytes_per_token'] / 1e9:,.2f} GB a token allows",
        f"memory      {r['resident_bytes'] / 1e9:,.2f} GB resident",
    ]
    if "scan_bytes_per_second" in r:
        speed = r["scan_bytes_per_second"]
        share = 100 * speed / r["read_bytes_per_second"]
        lines.append(f"scan        {speed / 1e9:,.1f} GB/s over {SCAN_TOKENS:,} tokens, {share:.0f} % of reading")
    for name, its in programs.items():
        ratios = [ours[kind] / its[kind] for kind in ("prefill_tps", "decode_tps")]
        lines.append(
            f"{name:11} prompt {its['prefill_tps']:,.1f}, decode {its['decode_tps']:,.2f} tokens/s; "
            f"minigemma is {ratios[0]:.1f} and {ratios[1]:.1f} times as fast"
        )
    for length, speeds in r["prefill_tps_of"].items():
        each = ", ".join(f"{name} {tps:,.1f}" for name, tps in speeds.items())
        lines.append(f"a prompt    of {int(length):,} tokens: {each} tokens/s")
    lines += [f"{name:11} not measured: {why}" for name, why in r["missing"].items()]
    for name, seconds in r.get("image", {}).items():
        lines.append(f"image       {name:24} {seconds:8.2f} s")
    for name, seconds in r.get("tower_seconds", {}).items():
        lines.append(f"tower       {name:24} {seconds:8.2f} s an image")
    for position, milliseconds in r.get("milliseconds_per_token_at", {}).items():
        lines.append(f"a token     at position {int(position):>9,} {milliseconds:8.2f} ms")
    return "\n".join(lines)


def prompt_flops(model: Decoder) -> int:
    """Operations for a token of a prompt that is not the last: the last layer only takes in what it will remember."""
    last = model.weights.blocks[-1]
    a, r, f = last.attention, last.recurrent, last.ffn
    idle = [f.gate, f.up, f.down, *((a.q, a.o) if a else ()), *((r.y, r.out) if r else ())]
    sizes = [rows * columns for rows, columns in map(rows_columns, idle)]
    return 2 * (model.config.non_embedding_parameters - sum(sizes))


def plottable(path: Path) -> None:
    """Refuse a `path` that `roofline` could not write, before anything is measured."""
    if find_spec("matplotlib") is None:
        raise ImportError("the figure is drawn by matplotlib, which is not installed: pip install matplotlib")
    from matplotlib.backend_bases import FigureCanvasBase

    if path.suffix[1:] not in (kinds := FigureCanvasBase.get_supported_filetypes()):
        raise ValueError(f"{path}: a figure cannot be written so; name it .png, or one of {', '.join(sorted(kinds))}")
    if not path.parent.is_dir():
        raise FileNotFoundError(ENOENT, "No such folder", str(path.parent))


def points(report: dict[str, Any]) -> dict[str, list[tuple[str, float, float]]]:
    """(what, flop for each byte of weights, flop a second) of decoding and of each prompt, by program.

    A prompt of T tokens reads the weights once and multiplies them T times, but for the head and most of the last
    layer: the last token's only. What attention computes and reads is left out.
    """
    inner = report["flops_per_token"]
    head = 2 * report["parameters"] - inner
    prompts = {int(n): speeds for n, speeds in report["prefill_tps_of"].items()}
    prompts[report["prompt_tokens"]] = {name: its["prefill_tps"] for name, its in report["programs"].items()}
    found = {}
    for name, its in report["programs"].items():
        found[name] = [("decode", (inner + head) / its["weight_bytes"], (inner + head) * its["decode_tps"])]
        for length in sorted(prompts):
            work = length * inner + head
            speed = work * prompts[length][name] / length
            found[name].append((f"prompt of {length:,}", work / its["weight_bytes"], speed))
    return found


def roofline(report: dict[str, Any], path: Path) -> None:
    """Draw the report's speeds under what the machine can do at each arithmetic intensity (Williams et al. 2009).

    The level roof is of what multiplies this model's prompts: another program's products of integers may lie above.
    """
    from matplotlib.figure import Figure
    from matplotlib.ticker import LogLocator, NullFormatter

    bandwidth, peak, found = report["read_bytes_per_second"], report["flops_per_second"], points(report)
    ridge = peak / bandwidth
    reached = [ridge, *(intensity for its in found.values() for _, intensity, _ in its)]
    left, right = min(reached) / 4, max(reached) * 2
    figure = Figure(figsize=(9, 6), layout="constrained")
    axes = figure.add_subplot(xscale="log", yscale="log")
    axes.plot([left, ridge, right], [bandwidth * left / 1e9, peak / 1e9, peak / 1e9], color="black")
    corner: dict[str, Any] = {"xy": (ridge, peak / 1e9), "textcoords": "offset points"}
    axes.annotate(f"reads {bandwidth / 1e9:,.1f} GB/s", xytext=(-9, -3), ha="right", **corner)
    axes.annotate(f"multiplies {peak / 1e9:,.0f} GFLOP/s in {report['multiplies']}", xytext=(0, 6), **corner)
    for (name, ((_, *decode), *prompts)), marker in zip(found.items(), MARKERS, strict=False):
        style: dict[str, Any] = {"markersize": 9, "zorder": 3} if name == "minigemma" else {"markersize": 6}
        drawn = axes.plot([x for _, x, _ in prompts], [y / 1e9 for *_, y in prompts], f"{marker}:", label=name, **style)
        style |= {"color": drawn[0].get_color(), "markerfacecolor": "none"}
        axes.plot(decode[0], decode[1] / 1e9, marker, **style)
    before = 0.0
    for what, intensity, speed in found["minigemma"]:
        right_of = what == "decode"  # and prompts to the left, away from the line between them
        left_of = (-4, 7) if speed > before else (-4, -15)
        beside: dict[str, Any] = {"xytext": (9, -3) if right_of else left_of, "ha": "left" if right_of else "right"}
        before = speed
        axes.annotate(what, (intensity, speed / 1e9), textcoords="offset points", fontsize=9, **beside)
    axes.set_xlabel("arithmetic intensity: flop for each byte of weights read")
    axes.set_ylabel("speed: GFLOP/s")
    axes.set_ylim(min(y for its in found.values() for *_, y in its) / 2e9, 1.2 * axes.get_ylim()[1])
    axes.set_xlim(left, right)
    for axis, steps in ((axes.xaxis, [1]), (axes.yaxis, [1, 2, 5])):
        axis.set_major_locator(LogLocator(subs=steps))
        axis.set_major_formatter("{x:g}")
        axis.set_minor_formatter(NullFormatter())
    axes.set_title(f"{report['name']}, {report['dtype']}, {report['threads']} threads, {report['vectors']}")
    axes.grid(which="both", alpha=0.2)
    axes.legend(loc="lower right", title="hollow: decode; filled: prompts")
    figure.savefig(path, dpi=150)


class Ours(Peer):
    """minigemma, as it would run for anyone."""

    name = "minigemma"

    def __init__(self, model: Decoder, most: int) -> None:
        self.model, self.most = model, most
        self.weight_bytes = self.read_bytes = weight_bytes(replace(model.weights, vision=None))
        with threads(model.threads):
            preview = model.preview
        if preview:  # of the head a token reads this, and of the likely rows, which are not counted, a little
            self.read_bytes += preview.nbytes - preview.head.nbytes

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
            token = int(self.logits[0].argmax())
            self.logits = sampling_logits(self.model, token, self.cache)[None]
        return (time.perf_counter() - began) / count

    def look(self, pixels: F32) -> float | None:
        """As every peer."""
        began = time.perf_counter()
        self.model.vision_tower(pixels)
        return time.perf_counter() - began


class Machine:
    """What this machine can do: measured in the same rounds as the programs, as other programs run on it too."""

    def __init__(self, count: int, matrix: Weight) -> None:
        self.threads = count
        self.numbers, self._peak = peak_for(matrix)
        self._room = np.ones(READ_BYTES // 4, np.float32)
        self._bandwidths: list[float] = []
        self._peaks: list[float] = []

    def look(self) -> None:
        """Measure once more."""
        with threads(self.threads):
            self._bandwidths.append(read_bandwidth(self._room))
            self._peaks.append(self._peak())

    @property
    def bandwidth(self) -> float:
        """Bytes read a second."""
        return median(self._bandwidths)

    @property
    def peak(self) -> float:
        """Multiplications and additions a second."""
        return median(self._peaks)


def measure(
    runners: dict[str, Peer],
    ids: Sequence[int],
    new_tokens: int,
    repeat: int,
    progress: Progress,
    machine: Machine | None = None,
) -> tuple[dict[str, float], dict[str, float]]:
    """Seconds of the prompt and of a token, the median of `repeat` rounds in which each program has its turn, and the
    machine.
    """
    prompt: dict[str, list[float]] = {name: [] for name in runners}
    token: dict[str, list[float]] = {name: [] for name in runners}
    for number in range(repeat + 1):  # the first round warms up: compiles, maps pages, starts threads
        for name, runner in runners.items():
            progress(f"{name}: {f'round {number} of {repeat}' if number else 'warming up'}")
            prompt[name].append(runner.prefill(ids))
            runner.decode(1)  # what the other program left in the caches is gone
            token[name].append(runner.decode(new_tokens if number else 1))
            if machine and name == "minigemma":
                machine.look()
    return ({name: median(t[1:]) for name, t in prompt.items()}, {name: median(t[1:]) for name, t in token.items()})


def image_stages(model: Decoder, repeat: int, progress: Progress) -> dict[str, float]:
    """Seconds of each stage between an image of random pixels and the first word about it."""
    from ..files.images import prepare

    if model.vision is None or model.weights.vision is None:
        raise no_vision(model.name, 1)
    vision, weights, quiet = model.vision, model.weights.vision, NO_TAPS.within("")
    picture = np.random.default_rng(0).integers(0, 256, (1024, 768, 3), np.uint8)
    ids = [2, vision.start_token, *[vision.image_token] * vision.tokens, vision.end_token]
    rounds = []
    for number in range(repeat + 1):
        progress(f"an image: {f'round {number} of {repeat}' if number else 'warming up'}")
        cache, marks = model.new_cache(len(ids) + 1), [time.perf_counter()]
        pixels = prepare(picture, vision.side)[0][0]
        marks.append(time.perf_counter())
        with threads(model.threads):
            seen = vision_tower(pixels, weights, vision, quiet)
            marks.append(time.perf_counter())
            soft = soft_tokens(seen, weights, vision, quiet)
        marks.append(time.perf_counter())
        model.forward(ids, cache, soft[None], last_only=True)
        marks.append(time.perf_counter())
        model.forward([3], cache, last_only=True)
        marks.append(time.perf_counter())
        rounds.append(np.diff(marks))
    return dict(zip(STAGES, np.median(rounds[1:], axis=0).tolist(), strict=True))


def tower_seconds(model: Decoder, runners: dict[str, Peer], repeat: int) -> dict[str, float]:
    """Seconds that an image takes in the vision tower of each program that has one."""
    side = model.vision.side if model.vision else 0
    pixels = np.random.default_rng(0).uniform(-1, 1, (3, side, side)).astype(np.float32)
    seers = {name: runner for name, runner in runners.items() if runner.look(pixels)}
    times = [{name: runner.look(pixels) or 0.0 for name, runner in seers.items()} for _ in range(repeat)]
    return {name: median(taken[name] for taken in times) for name in seers}


def token_at(
    model: Decoder, positions: Sequence[int], new_tokens: int, repeat: int, progress: Progress
) -> dict[int, float]:
    """Seconds a token at each position; the positions take turns, a token each, and the medians are returned."""
    count = max(new_tokens, FEWEST) * repeat
    caches: dict[int, Cache] = {}
    for position in positions:
        caches[position] = model.new_cache(min(model.config.context, position + count + 1))
        caches[position].skip_to(position)
    times: dict[int, list[float]] = {position: [] for position in positions}
    for number in range(count + 1):
        progress(f"tokens at {len(caches)} positions: {number} of {count}")
        for position, cache in caches.items():
            began = time.perf_counter()
            model.forward([3], cache, last_only=True)
            times[position].append(time.perf_counter() - began)
    return {position: median(t[1:]) for position, t in times.items()}


# ---- the machine


@jit_inner
def _read(worker, workers, numbers, sums):
    a, b, c, d = zeros(), zeros(), zeros(), zeros()
    step, part = 4 * LANES, numbers.size // STREAMS
    for place in chunk(worker, workers, part // step):
        for i in range(place * step, numbers.size, part):
            if STREAMS == 1:
                prefetch_four(numbers, i + AHEAD // 4)
            a, b = a + load(numbers, i), b + load(numbers, i + LANES)
            c, d = c + load(numbers, i + 2 * LANES), d + load(numbers, i + 3 * LANES)
    sums[worker] = sum_lanes((a + b) + (c + d))  # as what nobody asks for would not be read


@jit
def read_all(workers, numbers, sums):
    """Read all of these float32 numbers from memory."""
    parallel_for(_read, workers, (numbers, sums))


def read_bandwidth(numbers: F32 | None = None) -> float:
    """Bytes a second that the threads together read from memory, of these numbers or of some: the median of a few."""
    numbers = np.ones(READ_BYTES // 4, np.float32) if numbers is None else numbers
    sums = np.empty(get_num_threads(), np.float32)
    return numbers.nbytes / _median_seconds(lambda: read_all(len(sums), numbers, sums))


@jit_inner
def _multiply(worker, workers, a, b, steps, out):
    tile = tile_zeros()
    for step in range(steps):
        tile = tile_add_outer(tile, a, step % 64, 64, b, step % 64 * 2 * LANES)
    tile_store(tile, out[worker], 0, 2 * LANES)


@jit
def _multiply_all(workers, a, b, steps, out):
    parallel_for(_multiply, workers, (a, b, steps, out))


def arithmetic_peak() -> float:
    """Multiplications and additions a second of float32 vectors that never leave the first-level cache."""
    a, b = np.zeros(64 * (ROWS + 1), np.float32), np.zeros(64 * 2 * LANES, np.float32)
    out = _sums()
    work = 2 * ROWS * 2 * LANES * STEPS * get_num_threads()
    return work / _median_seconds(lambda: _multiply_all(len(out), a, b, STEPS, out))


@jit_inner
def _multiply_tiles(worker, workers, tiles, rows, tokens, steps, out):
    registers = tiles.copy()
    amx.begin(registers)
    for _ in range(steps):
        amx.multiply_panel(registers, rows, tokens, UNIT_DEPTH, 0, UNIT_DEPTH, False, out[worker])
    amx.end(registers)


@jit
def _multiply_all_tiles(workers, tiles, rows, tokens, steps, out):
    parallel_for(_multiply_tiles, workers, (tiles, rows, tokens, steps, out))


def unit_peak() -> float:
    """The same of the matrix unit, 32 x 32 sums of bf16 products at a time; where there is none, of its imitation."""
    rows, tokens = (aligned(2 * amx.TILE * UNIT_DEPTH, np.uint16) for _ in range(2))
    rows[:] = tokens[:] = 0
    workers = get_num_threads()
    out = aligned(workers * 1024, np.float32).reshape(workers, 1024)
    work = 2 * 32 * 32 * amx.DEPTH * UNIT_DEPTH * UNIT_STEPS * workers
    return work / _median_seconds(lambda: _multiply_all_tiles(workers, amx.new_tiles(), rows, tokens, UNIT_STEPS, out))


@jit_inner
def _multiply_pairs(worker, workers, a, b, scales, steps, out):
    for step in range(steps // 16):
        tile = int_tile_zeros()
        for pair in range(16):
            tile = tile_add_pairs(tile, a, 2 * pair, BLOCK, b, pair * 4 * LANES)
        int_tile_add_scaled(tile, scales, step % 2, 1, out[worker], 0, 2 * LANES)


@jit
def _multiply_all_pairs(workers, a, b, scales, steps, out):
    parallel_for(_multiply_pairs, workers, (a, b, scales, steps, out))


def pairs_peak() -> float:
    """The same of whole numbers of 16 bits, with a scale for 32."""
    a, b, out = np.ones(BLOCK * ROWS, np.int16), aligned(BLOCK * 2 * LANES, np.int16), _sums()
    b[:], scales = 0, np.ones(2 * ROWS, np.float32)
    work = 2 * ROWS * 4 * LANES * STEPS * len(out)
    return work / _median_seconds(lambda: _multiply_all_pairs(len(out), a, b, scales, STEPS, out))


@jit_inner
def _multiply_fours(worker, workers, x, panel, scales, steps, out):
    for step in range(steps // int4.QUADS):
        tile = byte_tile_zeros()
        for four in range(int4.QUADS):
            tile = byte_tile_add(tile, x[0], 4 * four, BLOCK, panel, four * 8 * LANES)
        own = load(scales, 0), load(scales, LANES)
        byte_tile_add_scaled(tile, own, x[1], x[2], step % 2, 1, out[worker], 0)


@jit
def _multiply_all_fours(workers, x, panel, scales, steps, out):
    parallel_for(_multiply_fours, workers, (x, panel, scales, steps, out))


def fours_peak() -> float:
    """The same of whole numbers of 8 bits."""
    x, panel, out = (
        int4.in_8_bits(np.ones((2 * ROWS, BLOCK), np.float32)),
        aligned(BLOCK * 2 * LANES, np.uint8),
        _sums(),
    )
    panel[:], scales = 0, np.ones(2 * LANES, np.float32)
    work = 2 * ROWS * 8 * LANES * STEPS * len(out)
    return work / _median_seconds(lambda: _multiply_all_fours(len(out), x, panel, scales, STEPS, out))


def _sums() -> F32:
    return np.zeros((get_num_threads(), ROWS * 2 * LANES), np.float32)


def peak_for(matrix: Weight) -> tuple[str, Callable[[], float]]:
    """What multiplies a prompt by this weight, and what measures how fast that can be."""
    if format_of(matrix) != "f32" and amx.choice()[0] != "vectors":
        return "bf16 on the matrix unit", unit_peak
    if is_side_by_side(matrix):
        return "8-bit whole numbers", fours_peak
    return ("16-bit whole numbers", pairs_peak) if block_bytes(matrix) else ("float32", arithmetic_peak)


def scan_speed(width: int) -> float:
    """Bytes a second of the scan h = a h + x alone, which reads two arrays [T, E] and writes one."""
    x, decay = np.ones((SCAN_TOKENS, width), np.float32), np.full((SCAN_TOKENS, width), 0.5, np.float32)
    return 3 * x.nbytes / _median_seconds(lambda: linear_scan(x, decay, x[0]))


def _median_seconds(run: Callable[[], Any]) -> float:
    run()
    times = []
    for _ in range(5):
        began = time.perf_counter()
        run()
        times.append(time.perf_counter() - began)
    return median(times)


def resident_bytes() -> int:
    """Memory that this process has in use, 0 where the system does not say."""
    path = Path("/proc/self/statm")
    return int(path.read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE") if path.exists() else 0
