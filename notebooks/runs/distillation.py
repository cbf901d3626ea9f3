"""Students that learn from a teacher against students that learn the next token: the runs of notebook 18.

    python notebooks/runs/distillation.py             the runs that ../data/distillation.json lacks; minutes each
    python notebooks/runs/distillation.py --table     the tables of what it holds

The teacher is weights/tiny-gemma-3, which read 600,000 tokens of the Bible. A student is a smaller Gemma 3 that has
six books of it, 107,000 tokens, which it reads five times; the loss is measured on six other books, which neither saw.
Students with the same seed begin with the same parameters and read the same batches; only their targets differ.
"""

from __future__ import annotations

import json
import lzma
import sys
import time
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

import minigemma as mg
from minigemma.config import TextConfig
from minigemma.files.tokenizer import Tokenizer
from minigemma.formulas.attention import softmax
from minigemma.models.backward import Batch, hidden
from minigemma.models.gemma3 import Gemma3Config
from minigemma.train.sizes import config_named
from minigemma.train.targets import Distillation
from minigemma.train.teacher import Teacher

HERE = Path(__file__).resolve().parent
RECORD = HERE.parent / "data/distillation.json"
BIBLE = HERE.parents[1] / "weights/texts/bible.txt.xz"
TEACHER, KEPT = "tiny-gemma-3", Path("runs/targets")  # in the folder that the command runs in
READ, HELD_OUT = slice(5, 73, 12), slice(73, 79)  # Joshua, Job, Hosea, ...; Ecclesiastes, Amos, John, Romans, ...
TOKENS, WIDTHS, SEEDS = 534_000, (48, 72, 112), (0, 1, 2)
RECIPE: dict[str, Any] = {"batch_tokens": 1024, "lr": 4e-3, "eval_every": 65}
MEASURED = 32  # held-out windows for all but the loss


class Run(NamedTuple):
    """One student: what it learns from, how wide it is, and the seed of its beginning and its batches."""

    targets: str  # "next token", or what `--draws` takes
    width: int
    seed: int

    @property
    def name(self) -> str:
        """The key of the record."""
        return f"{self.targets}, width {self.width}, seed {self.seed}"


PAIR = ("256", "next token")
RUNS = [Run(targets, 72, seed) for seed in SEEDS for targets in PAIR]
RUNS += [Run(draws, 72, 0) for draws in ("all", "64", "16", "top:64", "set:256")]
RUNS += [Run(targets, width, seed) for seed in SEEDS for width in (48, 112) for targets in PAIR]


def student(width: int) -> tuple[TextConfig, Tokenizer]:
    """A Gemma 3 of four layers, the last of them global, and the teacher's tokenizer."""
    teacher, tokenizer = config_named(TEACHER)
    heads, ffn = width // 24, 2 * width
    shape = {"width": width, "heads": heads, "kv_heads": 1, "head_dim": 32, "ffn_width": ffn, "vocab": teacher.vocab}
    return Gemma3Config(name=f"student-{width}", layers=4, pattern=4, window=64, context=1024, **shape), tokenizer


def books(path: Path) -> tuple[Path, float]:
    """Writes the student's books and the held-out ones to a file; returns it and the share that is held out."""
    text = lzma.decompress(BIBLE.read_bytes()).decode().split("\f")
    read, held = ("\f".join(text[some]) for some in (READ, HELD_OUT))
    path.write_text(f"{read}\f{held}", encoding="utf-8")
    return path, len(held) / (len(read) + len(held))


def training(run: Run, folder: Path, **settings: Any) -> mg.Training:
    """The training of a run; its teacher's targets are kept in `folder`."""
    data, held_out = books(folder / "books.txt")
    kept = str(folder / run.targets.replace(":", "-"))
    told = None if run.targets == "next token" else Distillation(teacher=TEACHER, draws=run.targets, targets=kept)
    told_settings = {"tokens": TOKENS, "seed": run.seed, "held_out": held_out} | RECIPE | settings
    return mg.Training(student(run.width), data, distillation=told, threads=1, **told_settings)


def measured(run: mg.Training, teacher: Teacher) -> dict[str, float]:
    """What a student says of held-out text beside the loss: means over tokens."""
    windows = run.corpus.windows(run.seq, held_out=True)
    windows = windows[np.linspace(0, len(windows) - 1, MEASURED).astype(int)]
    ids, following, starts = run.corpus.inputs(windows, run.tokenizer.bos)
    p = softmax(run.model.head(hidden(run.model, Batch(ids, starts))))
    wanted, likeliest = teacher.probabilities(run.corpus, windows), p.argmax(axis=1)
    divergence = (wanted * (np.log(wanted + 1e-30) - np.log(p + 1e-30))).sum(axis=1)
    found = {"kl": divergence, "confidence": p.max(axis=1), "accuracy": likeliest == following}
    found |= {"of_the_next": p[np.arange(len(p)), following]}
    return {name: round(float(values.mean(dtype=np.float64)), 5) for name, values in found.items()}


def recorded(run: Run, folder: Path, teacher: Teacher) -> dict[str, Any]:
    """A run from beginning to end: its losses, and what it is measured by at the end."""
    made, began, course, mean = training(run, folder), time.process_time(), [], []
    for step in made:
        mean.append(step.loss)
        if step.held_out is not None:
            course.append((step.tokens, round(float(np.mean(mean)), 5), round(step.held_out, 5)))
            mean = []
    return {
        **run._asdict(),
        "body": made.config.non_embedding_parameters,
        "course": course,  # tokens, mean training loss since the row before, held-out loss
        "bits_per_byte": round(float(step.bits_per_byte or 0), 5),
        **measured(made, teacher),
        "cpu_seconds": round(time.process_time() - began),
    }


def table(record: dict[str, Any]) -> str:
    """Held-out losses in nats per token: pairs of students that differ in their targets alone, then all targets."""
    last = {name: run["course"][-1][2] for name, run in record.items()}
    rows = ["| body | seed | next token | 256 draws | difference |", "|--:|--:|--:|--:|--:|"]
    for width in WIDTHS:
        pairs = [[last.get(Run(targets, width, seed).name) for targets in PAIR] for seed in SEEDS]
        found = [(seed, soft, hard) for seed, (soft, hard) in zip(SEEDS, pairs, strict=True) if soft and hard]
        for seed, soft, hard in found:
            body = record[Run("256", width, seed).name]["body"]
            rows.append(f"| {body:,} | {seed} | {hard:.3f} | {soft:.3f} | {soft - hard:+.3f} |")
        if len(found) > 1:
            _, *columns = np.array(found).T
            each = [f"{x.mean():.3f} ± {x.std(ddof=1):.3f}" for x in (columns[1], columns[0], columns[0] - columns[1])]
            rows.append(f"| | mean ± standard deviation | {' | '.join(each)} |")
    rows += [
        "",
        "| targets | held-out loss | KL to the teacher | mean probability of the likeliest, and how often it comes |",
    ]
    rows.append("|--|--:|--:|--:|")
    for run in record.values():
        if (run["width"], run["seed"]) == (72, 0):
            told = f"{run['confidence']:.3f}, {run['accuracy']:.3f}"
            rows.append(f"| {run['targets']} | {run['course'][-1][2]:.3f} | {run['kl']:.3f} | {told} |")
    return "\n".join(rows)


def main() -> None:
    """Add the missing runs to the record, or print it."""
    record = json.loads(RECORD.read_text()) if RECORD.exists() else {}
    if "--table" in sys.argv:
        print(table(record))
        return
    KEPT.mkdir(parents=True, exist_ok=True)
    teacher = Teacher(TEACHER, student(72)[1], 1)
    for run in RUNS:
        if run.name in record:
            continue
        record[run.name] = recorded(run, KEPT, teacher)
        rows = ",\n".join(f"{json.dumps(name)}: {json.dumps(row)}" for name, row in record.items())
        RECORD.write_text(f"{{\n{rows}\n}}\n", encoding="utf-8")
        row = record[run.name]
        print(f"{run.name}: {row['course'][-1][2]:.3f} nats, {row['cpu_seconds']} s", flush=True)


if __name__ == "__main__":
    main()
