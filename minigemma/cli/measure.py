"""Measures the speed of a model: prompts, tokens, images, optionally in turns with other programs.

Times are medians of rounds in which every program runs once. The machine's limits are measured in the same rounds
(kernels/peaks.py).
"""

from __future__ import annotations

import os
import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import fields, is_dataclass, replace
from pathlib import Path
from statistics import median
from typing import Any, NamedTuple

import numpy as np

from ..arrays import F32
from ..blocks.siglip import soft_tokens, vision_tower
from ..cache import Cache
from ..errors import no_vision
from ..formulas.rglru import linear_scan
from ..kernels.parallel import threads
from ..kernels.peaks import READ_BYTES, Machine, median_seconds
from ..kernels.simd.cpu import LANES
from ..layouts import Weight
from ..models.decoder import Decoder
from ..models.recurrentgemma import RecurrentGemmaConfig
from ..taps import NO_TAPS
from ..text.generation import sampling_logits

STAGES = ("scaling the picture", "vision tower", "pooling and projection", "reading its tokens", "one more token")
SCAN_TOKENS = 2048
FEWEST = 6  # tokens of one measurement of decoding

Progress = Callable[[str], None]


class Program(ABC):
    """A program with a model's weights: `prefill` reads a prompt, `decode` continues it; both return seconds."""

    name: str
    read_bytes: int  # of weights, which each token reads

    @abstractmethod
    def prefill(self, ids: Sequence[int]) -> float:
        """Seconds until the logits after the last of `ids` are ready. Starts from an empty cache."""

    @abstractmethod
    def decode(self, count: int) -> float:
        """Seconds per token of `count` more tokens, each the likeliest."""

    def look(self, pixels: F32) -> float | None:
        """Seconds of the vision tower over an image [3, side, side]; None where it is not measured."""
        return None


class Plan(NamedTuple):
    """What `bench` measures.

    positions: milliseconds per token with this many tokens in the cache, which is filled without reading them.
    image: also the time of an image, stage by stage, for a model with a vision tower.
    lengths: also the speed of prompts of these lengths.
    """

    prompt_tokens: int = 512
    new_tokens: int = 32
    positions: Sequence[int] = ()
    repeat: int = 3
    image: bool = False
    lengths: Sequence[int] = ()


def bench(
    model: Decoder,
    plan: Plan = Plan(),  # noqa: B008  immutable
    others: Mapping[str, Program] | None = None,
    progress: Progress = lambda doing: None,
) -> dict[str, Any]:
    """Measure `model`, in turns with `others`, which hold the same weights; returns all numbers, by name.

    Speeds are tokens per second, times seconds unless the name says milliseconds. Raises ValueError where prompt and
    answer do not fit into the context.
    """
    total = plan.prompt_tokens + plan.new_tokens + 1
    if max(total, *plan.positions, *plan.lengths, 0) > model.config.context:
        raise ValueError(f"the model's context is {model.config.context:,} tokens; measure within it")
    ours = Ours(model, max(total, *(n + 3 for n in plan.lengths), 0))
    programs: dict[str, Program] = {"minigemma": ours, **(others or {})}
    report = about(model, ours) | speeds(model, plan, programs, progress)
    report["decode_limit_tps"] = report["read_bytes_per_second"] / ours.read_bytes
    if isinstance(model.config, RecurrentGemmaConfig):
        with threads(model.threads):
            report["scan_bytes_per_second"] = scan_speed(model.config.lru_width)
    if plan.image:
        report["image"] = image_stages(model, plan.repeat, progress)
        report["tower_seconds"] = tower_seconds(model, programs, plan.repeat)
    if plan.positions:
        at = token_at(model, plan.positions, plan.new_tokens, plan.repeat, progress)
        report["milliseconds_per_token_at"] = {str(p): 1000 * seconds for p, seconds in at.items()}
    return report


def about(model: Decoder, ours: Ours) -> dict[str, Any]:
    """What is measured; the dtype is the narrower one of the first feed-forward block."""
    ffn = model.weights.blocks[0].ffn
    return {
        "name": model.name,
        "parameters": parameters(model),
        "dtype": min((ffn.gate.layout, ffn.down.layout), key=lambda layout: layout.bits).name,
        "threads": model.threads,
        "vectors": f"{LANES} lanes",
        "weight_bytes": ours.weight_bytes,
        "read_bytes_per_token": ours.read_bytes,
        "flops_per_token": prompt_flops(model),
    }


def speeds(model: Decoder, plan: Plan, programs: dict[str, Program], progress: Progress) -> dict[str, Any]:
    """The speeds of all programs, and of the machine while they ran."""
    longest = max(plan.prompt_tokens, *plan.lengths, 0)
    ids = np.random.default_rng(0).integers(3, min(model.config.vocab, 200_000), longest).tolist()
    machine = Machine(model.threads, model.weights.blocks[0].ffn.gate)
    rounds = (plan.repeat, progress)
    prompt, token = measure(programs, ids[: plan.prompt_tokens], plan.new_tokens, *rounds, machine)
    lengths = {str(n): measure(programs, ids[:n], 1, *rounds)[0] for n in plan.lengths}
    return {
        "prompt_tokens": plan.prompt_tokens,
        "new_tokens": plan.new_tokens,
        "resident_bytes": resident_bytes() - READ_BYTES,
        "read_bytes_per_second": machine.bandwidth,
        "flops_per_second": machine.peak,
        "multiplies": machine.numbers,
        "programs": {
            name: {
                "prefill_tps": plan.prompt_tokens / prompt[name],
                "seconds_to_first_token": prompt[name],
                "decode_tps": 1 / token[name],
                "weight_bytes": program.read_bytes,
            }
            for name, program in programs.items()
        },
        "prefill_tps_of": {n: {name: int(n) / taken[name] for name in programs} for n, taken in lengths.items()},
    }


def parameters(model: Decoder) -> int:
    """The number of weights of the text model, without the vision tower."""
    return model.config.embedding_parameters + model.config.non_embedding_parameters


def weight_bytes(weights: Any) -> int:
    """Bytes of all arrays in the tree of dataclasses and tuples that a model's weights are."""
    if is_dataclass(weights) and not isinstance(weights, Weight):
        return sum(weight_bytes(getattr(weights, field.name)) for field in fields(weights))
    return sum(map(weight_bytes, weights)) if isinstance(weights, tuple) else getattr(weights, "nbytes", 0)


def prompt_flops(model: Decoder) -> int:
    """Operations per token of a prompt but its last: in the last layer only keys, values and state are computed."""
    last = model.weights.blocks[-1]
    a, r, f = last.attention, last.recurrent, last.ffn
    idle = [f.gate, f.up, f.down, *((a.q, a.o) if a else ()), *((r.y, r.out) if r else ())]
    sizes = [rows * columns for rows, columns in (weight.shape for weight in idle)]
    return 2 * (model.config.non_embedding_parameters - sum(sizes))


class Ours(Program):
    """minigemma, as generation runs it."""

    name = "minigemma"

    def __init__(self, model: Decoder, most: int) -> None:
        self.model, self.most = model, most
        self.weight_bytes = self.read_bytes = weight_bytes(replace(model.weights, vision=None))
        with threads(model.threads):
            coarse = model.coarse_head
        if coarse:  # a token reads the coarse head and a few rows of the head, which are not counted
            self.read_bytes += coarse.nbytes - coarse.head.nbytes

    def prefill(self, ids: Sequence[int]) -> float:
        """As every program."""
        self.cache = self.model.new_cache(self.most)
        began = time.perf_counter()
        self.logits = self.model.forward(ids, self.cache, last_only=True)
        return time.perf_counter() - began

    def decode(self, count: int) -> float:
        """As every program."""
        began = time.perf_counter()
        for _ in range(count):
            token = int(self.logits[0].argmax())
            self.logits = sampling_logits(self.model, token, self.cache)[None]
        return (time.perf_counter() - began) / count

    def look(self, pixels: F32) -> float | None:
        """As every program."""
        began = time.perf_counter()
        self.model.vision_tower(pixels)
        return time.perf_counter() - began


def measure(
    programs: dict[str, Program],
    ids: Sequence[int],
    new_tokens: int,
    repeat: int,
    progress: Progress,
    machine: Machine | None = None,
) -> tuple[dict[str, float], dict[str, float]]:
    """Seconds of the prompt and per token: medians of `repeat` rounds in which each program, and the machine, has its
    turn.
    """
    prompt: dict[str, list[float]] = {name: [] for name in programs}
    token: dict[str, list[float]] = {name: [] for name in programs}
    for number in range(repeat + 1):  # the first round warms up: compiles, maps pages, starts threads
        for name, program in programs.items():
            progress(f"{name}: {f'round {number} of {repeat}' if number else 'warming up'}")
            prompt[name].append(program.prefill(ids))
            program.decode(1)  # evicts the other program's data from the caches
            token[name].append(program.decode(new_tokens if number else 1))
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


def tower_seconds(model: Decoder, programs: dict[str, Program], repeat: int) -> dict[str, float]:
    """Seconds per image in the vision tower of each program that has one."""
    side = model.vision.side if model.vision else 0
    pixels = np.random.default_rng(0).uniform(-1, 1, (3, side, side)).astype(np.float32)
    seers = {name: program for name, program in programs.items() if program.look(pixels)}
    times = [{name: program.look(pixels) or 0.0 for name, program in seers.items()} for _ in range(repeat)]
    return {name: median(taken[name] for taken in times) for name in seers}


def token_at(
    model: Decoder, positions: Sequence[int], new_tokens: int, repeat: int, progress: Progress
) -> dict[int, float]:
    """Median seconds per token at each position; the positions take turns, one token each."""
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


def scan_speed(width: int) -> float:
    """Bytes per second of the scan h = a h + x alone, which reads two arrays [T, E] and writes one."""
    x, decay = np.ones((SCAN_TOKENS, width), np.float32), np.full((SCAN_TOKENS, width), 0.5, np.float32)
    return 3 * x.nbytes / median_seconds(lambda: linear_scan(x, decay, x[0]))


def resident_bytes() -> int:
    """Memory that this process has in use, 0 where the system does not say."""
    path = Path("/proc/self/statm")
    return int(path.read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE") if path.exists() else 0
