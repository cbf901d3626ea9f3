"""Several sequences that decode together, beside llama.cpp on the same GGUF files (pip install llama-cpp-python).

python -m benchmarks.parallel [-m gemma-3-270m] [-t 2] [-r 7] [--write]

A model's own GGUF file, and its weights once more as Q8_0. A step puts a token into each of 1, 4 and 16 sequences at
position 100 and computes their logits, as `generate_batch` and llama.cpp's server do between two tokens of each. Both
programs take turns; printed are tokens per second, medians. --write puts the table into docs/performance.md.
"""

from __future__ import annotations

import argparse
import importlib
import re
import sys
import tempfile
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from statistics import median
from typing import Any

import minigemma as mg
from minigemma.cli.export import write_model
from minigemma.models.decoder import Decoder
from minigemma.text.batch import Answer, next_logits
from minigemma.text.generation import Token, sampling_logits

from . import put_into_page

COUNTS = (1, 4, 16)
BEFORE = 100  # tokens of each sequence
Step = Callable[[], object]


def ours(model: Decoder, exact: bool) -> list[Step]:
    """A step of minigemma with all logits (`exact`) or with the likely ones in full."""
    first = model.new_cache(4000)
    model.forward(list(range(5, 5 + BEFORE)), first, last_only=True)
    latest = Token("", 7, 0.0, None, BEFORE, 1, 0.0, 0.0, exact=exact)
    answers = [Answer(first.copy(), iter(()), latest) for _ in range(COUNTS[-1])]  # type: ignore[arg-type]
    alone = partial(model.forward, [7], first, last_only=True) if exact else partial(sampling_logits, model, 7, first)
    return [alone, *(partial(next_logits, model, answers[:count]) for count in COUNTS[1:])]


class Theirs:
    """llama.cpp with room for the sequences, all in one batch."""

    def __init__(self, library: Any, path: Path, threads: int) -> None:
        self.library, settings = library, library.llama_context_default_params()
        settings.n_ctx, settings.n_batch, settings.n_seq_max = 2048 * COUNTS[-1], 512, COUNTS[-1]
        settings.n_threads = settings.n_threads_batch = threads
        model = library.llama_model_load_from_file(str(path).encode(), library.llama_model_default_params())
        self.context = library.llama_init_from_model(model, settings)
        self.batch = library.llama_batch_init(512, 0, 1)
        self.positions = [0] * COUNTS[-1]
        for sequence in range(COUNTS[-1]):
            self.put([(5 + i, sequence) for i in range(BEFORE)])

    def put(self, tokens: list[tuple[int, int]], logits: bool = False) -> None:
        """Read tokens, each of its sequence."""
        batch = self.batch
        batch.n_tokens = len(tokens)
        for i, (token, sequence) in enumerate(tokens):
            batch.token[i], batch.pos[i] = token, self.positions[sequence]
            batch.n_seq_id[i], batch.seq_id[i][0], batch.logits[i] = 1, sequence, logits
            self.positions[sequence] += 1
        if self.library.llama_decode(self.context, batch):
            raise RuntimeError("llama.cpp did not decode")

    def steps(self) -> list[Step]:
        """A step of each count."""
        return [partial(self.put, [(7, sequence) for sequence in range(count)], True) for count in COUNTS]


def measured(programs: dict[str, list[Step]], rounds: int) -> dict[str, list[float]]:
    """Tokens per second of each program and count; programs take turns, after a round that does not count."""
    times: dict[str, list[list[float]]] = {name: [[] for _ in COUNTS] for name in programs}
    for number in range(rounds + 1):
        for i in range(len(COUNTS)):
            for name, steps in programs.items():
                steps[i]()  # the threads of the program before may still be awake
                for _ in range(3 if number else 0):
                    began = time.perf_counter()
                    steps[i]()
                    times[name][i].append(time.perf_counter() - began)
    return {
        name: [count / median(taken) for count, taken in zip(COUNTS, own, strict=True)] for name, own in times.items()
    }


def rows_of(name: str, path: Path, library: Any, threads: int, rounds: int) -> list[str]:
    """The rows of a file's table."""
    model = mg.load(path, threads=threads)
    programs = {"minigemma, likely logits": ours(model, False), "minigemma, all logits": ours(model, True)}
    found = measured(programs | {"llama.cpp": Theirs(library, path, threads).steps()}, rounds)
    peer, rows = found["llama.cpp"], []
    for program, speeds in found.items():
        cells = [f"{speed:.1f}" for speed in speeds]
        if program != "llama.cpp":
            cells = [f"{cell} ({speed / its:.2f} x)" for cell, speed, its in zip(cells, speeds, peer, strict=True)]
        rows.append(f"| {name} | {program} | {' | '.join(cells)} |")
    return rows


def main() -> int:
    """Measure, print, and with --write put the table into its place."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.parallel", description=__doc__.split("\n")[0])
    parser.add_argument("-m", "--model", default="gemma-3-270m", help="one whose file is GGUF")
    parser.add_argument("-t", "--threads", type=int, default=2)
    parser.add_argument("-r", "--rounds", type=int, default=7)
    parser.add_argument("--write", action="store_true")
    args = parser.parse_args()
    try:
        library = importlib.import_module("llama_cpp")
    except ImportError:
        print("this takes llama.cpp: pip install llama-cpp-python (it builds for some minutes)", file=sys.stderr)
        return 1
    silent = library.llama_log_callback(lambda *_: None)
    library.llama_log_set(silent, None)
    path = mg.load(args.model).path
    if path is None or path.suffix != ".gguf":
        print(f"{args.model} is no GGUF file, and llama.cpp reads no other", file=sys.stderr)
        return 1
    heads = "".join(f" {count} |" for count in COUNTS)
    lines = [f"| tokens/s of sequences together | program |{heads}", "| -- | -- |" + " --: |" * len(COUNTS)]
    lines += rows_of(path.stem, path, library, args.threads, args.rounds)
    with tempfile.TemporaryDirectory() as folder:
        other = Path(folder) / "q8_0.gguf"
        write_model(args.model, other, "gguf", "int8", ())
        lines += rows_of("the same in Q8_0", other, library, args.threads, args.rounds)
    cpu = re.findall(r"model name\s*: (.*)", Path("/proc/cpuinfo").read_text())
    text = (
        f"*{cpu[0] if cpu else 'this processor'}, {args.threads} threads; llama-cpp-python {library.__version__}*\n\n"
    )
    text += "\n".join(lines)
    print(text)
    if args.write:
        put_into_page("parallel", text)
    return 0


if __name__ == "__main__":
    sys.exit(main())
