"""Small models that learn to recall what left their window: the runs of notebook 19 (Griffin §6.2).

    python notebooks/runs/recall.py             the runs that ../data/recall.json lacks
    python notebooks/runs/recall.py --table     accuracies of what it holds

Induction heads: a random sequence in which one special token occurs, followed by a value; it comes again at the end,
and the value should follow. Selective copying: four values between blanks, then four questions, to be answered with
the values in order. Only answers have a loss. Three models of one size with windows of 4 tokens read sequences of 32.
"""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from minigemma.arrays import I32
from minigemma.config import TextConfig
from minigemma.formulas.cross_entropy import Targets
from minigemma.models.backward import Batch, hidden, loss_and_gradients
from minigemma.models.decoder import Decoder
from minigemma.models.gemma3 import Gemma3Config
from minigemma.models.parameters import model_of, refresh
from minigemma.models.recurrentgemma import RecurrentGemmaConfig
from minigemma.train.initial import initial_parameters
from minigemma.train.optimizer import AdamW, learning_rate

RECORD = Path(__file__).resolve().parent.parent / "data/recall.json"
VALUES, BLANK, SPECIAL = 16, 16, 17  # ids 0 to 15 are values
LENGTH, WINDOW, COPIED = 32, 4, 4
SHARED: dict[str, Any] = {"width": 64, "layers": 3, "heads": 2, "kv_heads": 1, "head_dim": 32, "vocab": 32}
MODELS: dict[str, TextConfig] = {
    "Griffin": RecurrentGemmaConfig(**SHARED, window=WINDOW, context=1024, ffn_width=96, lru_width=64, gate_blocks=2),
    "Gemma, local": Gemma3Config(**SHARED, window=WINDOW, context=1024, ffn_width=128, pattern=99),
    "Gemma, one global": Gemma3Config(**SHARED, window=WINDOW, context=1024, ffn_width=128, pattern=3),
}
STEPS, SEQUENCES, RATE = {"induction": 300, "copying": 600}, 64, 4e-3
LENGTHS, MEASURED = (32, 64, 128, 256), 256  # sequences of each length


class Task(NamedTuple):
    """Sequences [B, T], the value that should follow each token, -1 for none, and how far back it was, [B, T]."""

    ids: I32
    answers: I32
    distance: I32


def induction(random: np.random.Generator, count: int, length: int) -> Task:
    """The special token and its value somewhere, and again the special token at the end."""
    ids = random.integers(0, VALUES, (count, length)).astype(np.int32)
    rows, place = np.arange(count), random.integers(0, length - 2, count)
    ids[rows, place] = ids[:, -1] = SPECIAL
    answers, distance = np.full((2, count, length), -1, np.int32)
    answers[:, -1], distance[:, -1] = ids[rows, place + 1], length - 2 - place
    return Task(ids, answers, distance)


def copying(random: np.random.Generator, count: int, length: int) -> Task:
    """Values among blanks, then as many questions."""
    ids = np.full((count, length), BLANK, np.int32)
    ids[:, -COPIED:] = SPECIAL
    places = np.sort(random.permuted(np.tile(np.arange(length - COPIED), (count, 1)), axis=1)[:, :COPIED], axis=1)
    values = random.integers(0, VALUES, places.shape)
    np.put_along_axis(ids, places, values.astype(np.int32), axis=1)
    answers, distance = np.full((2, count, length), -1, np.int32)
    answers[:, -COPIED:], distance[:, -COPIED:] = values, np.arange(length - COPIED, length) - places
    return Task(ids, answers, distance)


TASKS: dict[str, Callable[[np.random.Generator, int, int], Task]] = {"induction": induction, "copying": copying}


def batch_of(task: Task) -> tuple[Batch, Targets]:
    """The sequences one after another, and targets that count only where there is an answer."""
    starts = np.arange(0, task.ids.size, task.ids.shape[1], dtype=np.int32)
    answers = task.answers.reshape(-1, 1)
    return Batch(task.ids.reshape(-1), starts), Targets(np.maximum(answers, 0), (answers >= 0).astype(np.float32))


def right(model: Decoder, task: Task) -> np.ndarray:
    """Whether each answer is the likeliest token: booleans in the order of `task.answers >= 0`."""
    batch, targets = batch_of(task)
    asked = targets.weights[:, 0] > 0
    return model.head(hidden(model, batch)[asked]).argmax(axis=1) == targets.ids[asked, 0]


def trained(name: str, task: str, seed: int, steps: int, until: int | None = None) -> tuple[Decoder, list[float]]:
    """A model after `steps` steps, or the first `until` of them, and the loss of each."""
    config, random = MODELS[name], np.random.default_rng(seed)
    adam, losses = AdamW(initial_parameters(config, seed)), []
    model = model_of(config, adam.parameters, threads=1)
    for step in range(1, (until or steps) + 1):
        batch, targets = batch_of(TASKS[task](random, SEQUENCES, LENGTH))
        asked = targets.weights.sum()
        losses.append(float(loss_and_gradients(model, batch, targets, 1 / asked, adam.gradients).sum() / asked))
        adam.step(learning_rate(step / steps, RATE, 0.1, 0.1), clip=1.0)
        refresh(model, adam.parameters)
    return model, losses


def recorded(name: str, task: str) -> dict[str, Any]:
    """A run from beginning to end: losses, and right answers by length and by distance."""
    began = time.process_time()
    model, losses = trained(name, task, 0, STEPS[task])
    seconds, accuracy = time.process_time() - began, {}
    for length in LENGTHS:
        asked = TASKS[task](np.random.default_rng((1, length)), MEASURED, length)
        correct, distance = right(model, asked), asked.distance[asked.answers >= 0]
        bins = [(low, 2 * low) for low in (1, 2, 4, 8, 16, 32, 64, 128)]
        by_distance = {low: correct[(distance >= low) & (distance < high)] for low, high in bins}
        near = {low: [round(float(found.mean()), 3), len(found)] for low, found in by_distance.items() if len(found)}
        accuracy[length] = {"all": round(float(correct.mean()), 3), "by_distance": near}
    return {
        "model": name,
        "task": task,
        "body": model.config.non_embedding_parameters,
        "losses": [round(float(np.mean(losses[i : i + 10])), 4) for i in range(0, len(losses), 10)],
        "accuracy": accuracy,  # by length; by_distance: of answers at least so far back and less than twice as far
        "cpu_seconds": round(seconds),
    }


def table(record: dict[str, Any]) -> str:
    """Right answers by the length of the sequence."""
    rows = ["| task | model | parameters | " + " | ".join(f"{length} tokens" for length in LENGTHS) + " |"]
    rows.append("|--|--|--:|" + "--:|" * len(LENGTHS))
    for run in record.values():
        shares = [f"{run['accuracy'][str(length)]['all']:.0%}" for length in LENGTHS]
        rows.append(f"| {run['task']} | {run['model']} | {run['body']:,} | {' | '.join(shares)} |")
    return "\n".join(rows)


def main() -> None:
    """Add the missing runs to the record, or print it."""
    record = json.loads(RECORD.read_text()) if RECORD.exists() else {}
    if "--table" in sys.argv:
        print(table(record))
        return
    for task in TASKS:
        for name in MODELS:
            if f"{task}, {name}" in record:
                continue
            run = record[f"{task}, {name}"] = recorded(name, task)
            rows = ",\n".join(f"{json.dumps(key)}: {json.dumps(value)}" for key, value in record.items())
            RECORD.write_text(f"{{\n{rows}\n}}\n", encoding="utf-8")
            print(f"{task}, {name}: {run['losses'][-1]:.3f}, {run['cpu_seconds']} s", flush=True)


if __name__ == "__main__":
    main()
