"""Measure what docs/performance.md says, and write it into its tables.

python docs/make_performance.py [SECTION …]   sections: products attention token prompt together models peers start; all

Each table stands between two comments that name it; the text around them is written by hand. Programs that are compared
take turns in one run; times are medians. The whole takes about half an hour on two cores that nothing else wants, of
which `models` is most.
"""

from __future__ import annotations

import os
import platform
import re
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import cache, partial
from itertools import product as product_of
from pathlib import Path
from statistics import median
from typing import Any
from unittest.mock import patch

import numpy as np
import torch

import minigemma as mg
from minigemma.blocks import feedforward, gqa
from minigemma.cli.measure import Plan, bench, parameters, weight_bytes
from minigemma.cli.random_weights import random_model
from minigemma.definition import Definition
from minigemma.formulas.attention import Mask, attention
from minigemma.formulas.linear import linear
from minigemma.kernels.amx import choice
from minigemma.kernels.matvec import TOGETHER, matvec
from minigemma.kernels.parallel import threading_layer, threads
from minigemma.kernels.peaks import READ_BYTES, amx_peak, arithmetic_peak, peak_for, read_all, read_bandwidth
from minigemma.kernels.simd.cpu import LANES
from minigemma.kernels.weights import no_rows, of
from minigemma.layouts import LAYOUTS, Weight
from minigemma.models.decoder import Decoder
from minigemma.text.generation import sampling_logits

THREADS = 2
ROUNDS = 15
RNG = np.random.default_rng(0)


def in_turns(*runs: Callable[[], object], rounds: int = ROUNDS) -> list[float]:
    """Median seconds of each. They take turns of three calls, after some that do not count: for a few milliseconds the
    threads of the program before may still be awake.
    """
    times: list[list[float]] = [[] for _ in runs]
    for number in range(rounds + 1):
        for run, taken in zip(runs, times, strict=True):
            began = time.perf_counter()
            while time.perf_counter() - began < 0.02:
                run()
            for _ in range(3 if number else 0):
                began = time.perf_counter()
                run()
                taken.append(time.perf_counter() - began)
    return [median(taken) for taken in times]


def as_torch(bf16: np.ndarray) -> torch.Tensor:
    """The same memory as a torch array."""
    return torch.from_numpy(bf16.view(np.int16)).view(torch.bfloat16)


def table(header: list[str], rows: list[list[str]]) -> str:
    """A table in Markdown."""
    lines = [header, ["--" if i == 0 else "--:" for i in range(len(header))], *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def machine() -> str:
    """One line about the machine, measured now."""
    with threads(THREADS):
        bandwidth, peak = read_bandwidth() / 1e9, arithmetic_peak() / 1e9
        chosen, why = choice()
        used = f"not used: {why}" if chosen == "vectors" else f"used ({amx_peak() / 1e9:.0f} GFLOP/s in bf16)"
    cpu = Path("/proc/cpuinfo")
    names = re.findall(r"model name\s*: (.*)", cpu.read_text()) if cpu.exists() else []
    return (
        f"*{names[0] if names else platform.processor()}, {THREADS} threads ({threading_layer()}), vectors of {LANES} "
        f"float32 numbers, AMX {used}; just after the "
        f"measurement it read {bandwidth:.1f} GB/s and multiplied {peak:.0f} GFLOP/s in float32.*"
    )


def matrices(rows: int, columns: int) -> dict[str, Weight]:
    """One random matrix in each layout but float32."""
    some, made = RNG.standard_normal((1024, columns), np.float32), {}
    for name in ("bf16", "int8", "int4"):
        layout = LAYOUTS[name]
        made[name] = Weight(layout, np.resize(layout.pack(some), layout.data_shape(rows, columns)), (rows, columns))
    return made


def read_once() -> None:
    """Read READ_BYTES of memory, as fast as it goes."""
    read_all(THREADS, _room(), np.empty(THREADS, np.float32))


@cache
def _room() -> np.ndarray:
    return np.ones(READ_BYTES // 4, np.float32)


def one_token(rows: int, columns: int) -> list[str]:
    """Gigabytes of weights a second."""
    x, weights = RNG.standard_normal((1, columns), np.float32), matrices(rows, columns)
    xt, theirs = torch.from_numpy(x).bfloat16(), as_torch(weights["bf16"].data)
    runs = [partial(linear, x, w) for w in weights.values()]
    seconds = in_turns(*runs, partial(torch.nn.functional.linear, xt, theirs), read_once)
    sizes = [w.nbytes for w in weights.values()] + [weights["bf16"].nbytes, READ_BYTES]
    speeds = [size / s for size, s in zip(sizes, seconds, strict=True)]
    return [f"{rows:,} x {columns:,}", *[f"{s / 1e9:.1f}" for s in speeds]]


def many_tokens(rows: int, columns: int, tokens: int) -> list[str]:
    """GFLOP/s."""
    x, weights = RNG.standard_normal((tokens, columns), np.float32), matrices(rows, columns)
    theirs = as_torch(weights["bf16"].data).float()
    runs = [partial(linear, x, w) for w in weights.values()]
    seconds = in_turns(*runs, partial(torch.nn.functional.linear, torch.from_numpy(x), theirs))
    return [f"{rows:,} x {columns:,}, {tokens} tokens", *[f"{2e-9 * rows * columns * tokens / s:.0f}" for s in seconds]]


def products() -> str:
    """y = x Wᵀ alone."""
    torch.set_num_threads(THREADS)
    with threads(THREADS):
        one = [one_token(*shape) for shape in ((262_144, 640), (65_536, 2304))]
        many = [many_tokens(*shape, tokens) for shape in ((2048, 640), (9216, 2304)) for tokens in (16, 256)]
    return "\n\n".join(
        [
            machine(),
            table(["GB/s, one token", "bf16", "int8", "int4", "torch bf16", "reading alone"], one),
            table(["GFLOP/s, many tokens", "bf16", "int8", "int4", "torch float32"], many),
        ]
    )


def one_attention(queries: int, keys: int, window: int | None) -> list[str]:
    """Milliseconds, of torch the better of the forms that it can be written in."""
    q = RNG.standard_normal((queries, 4, 256), np.float32)
    k, v = (RNG.integers(14_000, 16_200, (keys, 1, 256)).astype(np.uint16) for _ in range(2))
    positions, where = np.arange(keys - queries, keys, dtype=np.int32), np.arange(keys, dtype=np.int32)
    tq = torch.from_numpy(q).bfloat16().permute(1, 0, 2)[None]
    tk, tv = (as_torch(a).permute(1, 0, 2)[None] for a in (k, v))
    sdpa = torch.nn.functional.scaled_dot_product_attention
    spread = tk.expand(1, 4, keys, 256), tv.expand(1, 4, keys, 256)  # the key head four times
    if queries == 1:
        forms = [partial(sdpa, tq.transpose(1, 2), tk, tv), partial(sdpa, tq, *spread)]  # or heads as queries
    elif window is None:
        forms = [partial(sdpa, tq, *spread, is_causal=True)]
    else:
        distance = torch.arange(keys)[:, None] - torch.arange(keys)
        forms = [partial(sdpa, tq, *spread, attn_mask=(distance >= 0) & (distance < window))]
    mine = partial(attention, q, k, v, Mask(positions, positions, where, window), 1 / 16, None)
    ours, *theirs = in_turns(mine, *forms, rounds=ROUNDS if queries == 1 else 2)
    name = f"{queries:,} quer{'y' if queries == 1 else 'ies'}, {keys:,} keys"
    name += f", window {window:,}" if window else ""
    return [name, f"{1e3 * ours:.2f}", f"{1e3 * min(theirs):.2f}", f"{min(theirs) / ours:.1f}"]


def attention_alone() -> str:
    """Attention of 4 heads of 256 that share a key head, keys and values in bf16, against torch's SDPA in bf16."""
    torch.set_num_threads(THREADS)
    cases = [(1, 512, None), (1, 4096, None), (1, 32_768, None)]
    cases += [(8192, 8192, 512), (8192, 8192, 1024), (2048, 2048, None)]
    with threads(THREADS):
        rows = [one_attention(*case) for case in cases]
    return f"{machine()}\n\n{table(['ms', 'minigemma', 'torch SDPA, bf16', 'ratio'], rows)}"


def product(*weights: Weight) -> Callable[[], None]:
    """A call of the kernel for one token, with all that Python has to do for it done before."""
    rows, ys = [of(w) for w in weights], [np.empty((1, w.shape[0]), np.float32) for w in weights]
    missing = TOGETHER - len(weights)
    x = RNG.standard_normal((1, weights[0].shape[1]), np.float32)
    padded = *rows, *[no_rows(rows[0])] * missing
    return partial(matvec, THREADS, x, padded, (*ys, *[ys[0][:0]] * missing))


def one_dtype(dtype: str) -> list[str]:
    """Milliseconds of a token of the real 270M, and of its products alone."""
    model = mg.load("gemma-3-270m", dtype=dtype, threads=THREADS)
    w, cache, maps = model.weights, model.new_cache(2000), []
    for block in w.blocks:
        a, f = block.attention, block.ffn
        maps += [product(a.q, a.k, a.v), product(a.o), product(f.gate, f.up), product(f.down)]
    maps.append(product(w.embedding))
    model.forward(list(range(5, 105)), cache, last_only=True)
    with threads(THREADS):
        likely, whole, products, prompt, reading = in_turns(
            partial(sampling_logits, model, 7, cache),
            partial(model.forward, [7], cache, last_only=True),
            lambda: [run() for run in maps],
            partial(model.forward, list(range(5, 21)), last_only=True),
            read_once,
            rounds=40,
        )
    limit = weight_bytes(w) / READ_BYTES * reading
    fewer = (weight_bytes(w) - w.scores.nbytes + model.coarse_head.nbytes) / READ_BYTES * reading
    numbers = [f"{1e3 * s:.2f}" for s in (whole, products, limit, likely, fewer, prompt)]
    return [dtype, *numbers[:3], f"{(whole - products) / whole:.0%}", *numbers[3:]]


def token() -> str:
    """Where the time of one token goes: the real 270M, at position 100."""
    header = ["ms", "a token, all logits", "its products alone", "reading the weights alone", "all else"]
    header += ["a token, likely logits", "reading that alone", "a prompt of 16"]
    return f"{machine()}\n\n{table(header, [one_dtype(dtype) for dtype in ('bf16', 'int8', 'int4')])}"


@contextmanager
def by_part(spent: Counter[str]) -> Iterator[None]:
    """Add up the seconds of each definition and of `linears` inside this block, without those of what they call."""
    inside, call, several = [0.0], Definition.__call__, gqa.linears

    def timed(name: str, function: Callable, *args: Any, **named: Any) -> Any:
        began = time.perf_counter()
        inside.append(0.0)
        result = function(*args, **named)
        taken = time.perf_counter() - began
        spent[name] += taken - inside.pop()
        inside[-1] += taken
        return result

    began = time.perf_counter()
    with (
        patch.object(
            Definition,
            "__call__",
            lambda self, *args, **named: timed(self.__name__, partial(call, self), *args, **named),
        ),
        patch.object(gqa, "linears", partial(timed, "linear", several)),
        patch.object(feedforward, "linears", partial(timed, "linear", several)),
    ):
        yield
    spent["whole"] += time.perf_counter() - began


def one_prompt(dtype: str) -> list[str]:
    """Milliseconds of a prompt of 512 of the real 270M, and the share of each part."""
    model, rounds = mg.load("gemma-3-270m", dtype=dtype, threads=THREADS), []
    for _ in range(ROUNDS + 1):  # the first does not count
        spent: Counter[str] = Counter()
        with by_part(spent):
            model.forward(list(range(5, 517)), last_only=True)
        rounds.append(spent)
    spent = sorted(rounds[1:], key=lambda each: each["whole"])[ROUNDS // 2]
    whole = spent.pop("whole")
    shares = [spent.pop(name) / whole for name in ("linear", "attention", "rms_norm", "rope", "gated_gelu")]
    return [dtype, f"{1e3 * whole:.0f}", *[f"{share:.1%}" for share in (*shares, 1 - sum(shares))]]


def prompt() -> str:
    """Where the time of a prompt goes: 512 tokens of the real 270M; the run whose time is the median."""
    header = ["", "ms", "products", "attention", "norms", "rope", "GeGLU", "residuals, Python and the rest"]
    return f"{machine()}\n\n{table(header, [one_prompt(dtype) for dtype in ('bf16', 'int8', 'int4')])}"


def one_together(name: str, model: Decoder) -> list[str]:
    """Milliseconds of a step of 1, 4 and 16 sequences, at position 100, and tokens per second beside those of one."""
    from benchmarks.parallel import ours

    with threads(THREADS):
        one, *several = in_turns(*ours(model, exact=False), rounds=3)
        _, peak = peak_for(model.weights.blocks[0].ffn.gate)
        limit = 2 * 16 * parameters(model) / peak()
    ratios = [f"{count * one / step:.2f}" for count, step in zip((4, 16, 16), (*several, limit), strict=True)]
    return [name, *[f"{1e3 * step:.1f}" for step in (one, *several)], *ratios]


def together() -> str:
    """Sequences that decode together, beside one alone."""
    rows = [one_together("270M, int8", mg.load("gemma-3-270m", dtype="int8", threads=THREADS))]
    for shape in ("gemma-2-2b", "recurrentgemma-2b"):
        model = random_model(shape, "int8", layers=6, threads=THREADS)
        rows.append(one_together(f"{shape}, 6 layers, int8", model))
    header = ["ms of a step", "1 sequence", "4", "16", "tokens/s of 4, by one's", "of 16", "of 16 at the peak"]
    return f"{machine()}\n\n{table(header, rows)}"


def models() -> str:
    """Decoding and prompts at the shapes of released models, random weights."""
    rows = []
    shapes = ("gemma-3-1b", "gemma-2-2b", "recurrentgemma-2b")
    for shape, dtype in [*product_of(shapes, ("bf16", "int8", "int4")), ("gemma-3-27b", "int4")]:
        model = random_model(shape, dtype, threads=THREADS, vision=False)
        large = shape == "gemma-3-27b"
        r = bench(model, Plan(32 if large else 128, 4 if large else 16, repeat=2 if large else 3))
        ours = r["programs"]["minigemma"]
        rows.append(
            [
                f"{shape}, {dtype}",
                f"{r['weight_bytes'] / 1e9:.2f}",
                f"{r['resident_bytes'] / 1e9:.2f}",
                f"{ours['decode_tps']:.2f}",
                f"{ours['decode_tps'] / r['decode_limit_tps']:.0%}",
                f"{ours['prefill_tps']:.1f}",
                f"{ours['prefill_tps'] * r['flops_per_token'] / r['flops_per_second']:.0%}",
            ]
        )
        del model
    header = ["random weights", "GB of weights", "GB resident", "decode, tokens/s", "of the bandwidth limit"]
    header += ["prompt of 128 (27b: 32), tokens/s", "of the arithmetic peak"]
    model = random_model("gemma-3-1b", "bf16", threads=THREADS, vision=False)
    r = bench(model, Plan(16, 16, (1024, 32_000)))
    near, far = (r["milliseconds_per_token_at"][p] for p in ("1024", "32000"))
    window = model.config.attention(0).window or 0
    layers = sum(model.config.kind(i) == "global" for i in range(model.config.layers))
    more = layers * 2 * model.config.kv_heads * model.config.head_dim * 2 * (32_000 - 1024)
    reading = 1e3 * more / r["read_bytes_per_second"]
    growth = (
        f"A token of gemma-3-1b's shape in bf16 takes {near:.1f} ms with 1,024 tokens before it and {far:.1f} ms with "
        f"32,000: {far - near:.2f} ms more, where reading the {more / 1e6:.0f} MB that the {layers} global layers then "
        f"keep more takes {reading:.2f} ms. Local layers keep their {window}."
    )
    return f"{machine()}\n\n{table(header, rows)}\n\n{growth}"


def peers() -> str:
    """Other programs with the same weights, in turns: the real 270M."""
    from benchmarks import programs_with

    rows = []
    for dtype in ("int8", "int4", "bf16"):
        model = mg.load("gemma-3-270m", dtype=dtype, threads=THREADS)
        for tokens in (512, 2048) if dtype == "int8" else (512,):
            others, missing = programs_with(model, PROGRAMS)
            r = bench(model, Plan(tokens, repeat=5), others)
            ours = r["programs"].pop("minigemma")
            share = ours["decode_tps"] / r["decode_limit_tps"]
            what = f"{dtype}, prompt of {tokens:,}"
            rows.append(
                [
                    what,
                    "minigemma",
                    f"{ours['prefill_tps']:.0f}",
                    "",
                    f"{ours['decode_tps']:.1f}",
                    f"{share:.0%} of the limit",
                ]
            )
            for name, its in r["programs"].items():
                ratios = [f"{ours[kind] / its[kind]:.2f} x" for kind in ("prefill_tps", "decode_tps")]
                rows.append([what, name, f"{its['prefill_tps']:.0f}", ratios[0], f"{its['decode_tps']:.1f}", ratios[1]])
            rows += [[what, name, "not measured", "", "", why] for name, why in missing.items()]
    header = ["minigemma's weights", "program", "prompt, tokens/s", "ratio", "decode, tokens/s", "ratio"]
    return f"{machine()}\n\n{table(header, rows)}"


PROGRAMS = ("llama.cpp", "openvino", "transformers")


def start() -> str:
    """A whole process, from its start to the first token: kernels compiled before, and not."""
    command = [sys.executable, "-m", "minigemma", "generate", "Once upon a time", "-n", "1"]

    def seconds(cache: str | None) -> float:
        environment = os.environ | ({"NUMBA_CACHE_DIR": cache} if cache else {})
        environment.pop("PYTHONDONTWRITEBYTECODE", None)  # modules compiled before, as they are for anybody
        began = time.perf_counter()
        with subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL) as process:
            assert process.stdout and process.stdout.read(1), "no token came"
            return time.perf_counter() - began

    seconds(None)
    warm = [seconds(None) for _ in range(7)]
    cold = []
    for _ in range(3):
        with tempfile.TemporaryDirectory() as empty:
            cold.append(seconds(empty))
    rows = [
        ["kernels compiled before", f"{median(warm):.2f}", f"{min(warm):.2f} … {max(warm):.2f}"],
        ["the first run of all", f"{median(cold):.2f}", f"{min(cold):.2f} … {max(cold):.2f}"],
    ]
    return f"{machine()}\n\n{table(['270M: start of the process to first token', 'seconds', 'from … to'], rows)}"


SECTIONS = {
    f.__name__.split("_")[0]: f for f in (products, attention_alone, token, prompt, together, models, peers, start)
}


def main(names: list[str]) -> None:
    """Measure the sections and put them into the page, each in a process of its own: memory is measured too."""
    if len(names) != 1:
        for name in names or SECTIONS:
            subprocess.run([sys.executable, __file__, name], check=True)
        return
    (name,) = names
    sys.path.append(str(Path(__file__).parents[1]))  # benchmarks is not installed
    from benchmarks import put_into_page

    measured = SECTIONS[name]()
    print(f"## {name}\n{measured}\n", flush=True)
    put_into_page(name, measured)


if __name__ == "__main__":
    main(sys.argv[1:])
