"""Does a tiny model learn here what it learns in PyTorch?      python -m benchmarks.learning [NAME … [--tokens N]]

Trains weights/recipes/tiny.py's models, shortened to N tokens, twice: with minigemma.Training, and with transformers'
model and torch's AdamW in float32. Both begin with the same parameters and take the same windows of the same text in
the same order, at the same learning rates, with weight decay on the same matrices. Losses are added to learning.json;
without a NAME the table of what it holds is printed. Needs torch and transformers.
"""

from __future__ import annotations

import argparse
import importlib
import json
import tempfile
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

import minigemma as mg
from minigemma.files.save import save_model
from minigemma.train.data import Windows
from minigemma.train.optimizer import BETA_1, BETA_2, EPSILON, learning_rate
from minigemma.train.sizes import TINY
from minigemma.train.trainer import EVALUATED

RECORD = Path(__file__).with_name("learning.json")
TEXT = Path(__file__).resolve().parents[1] / "weights/texts/bible.txt.xz"
TOGETHER = 8  # held-out windows that go through torch's model at once
RECIPE: dict[str, Any] = {"batch_tokens": 1024, "seed": 0, "eval_every": 1 << 30}  # tiny.py's


class Batches(NamedTuple):
    """Windows as torch takes them: one row each, padded on the right, where nothing looks."""

    ids: Any  # [B, T]
    following: Any  # [B, T], -100 where there is none


def padded(training: mg.Training, windows: Windows) -> Batches:
    """Windows one under another."""
    torch = importlib.import_module("torch")
    ids, following, starts = training.corpus.inputs(windows, training.tokenizer.bos)
    rows = np.zeros((2, len(windows), int((windows[:, 1] - windows[:, 0]).max())), np.int64)
    rows[1] = -100
    for row, (given, next_) in enumerate(zip(np.split(ids, starts[1:]), np.split(following, starts[1:]), strict=True)):
        rows[0, row, : len(given)], rows[1, row, : len(given)] = given, next_
    return Batches(*map(torch.from_numpy, rows))


def summed_loss(model: Any, batches: Batches) -> Any:
    """The sum of all tokens' losses."""
    torch = importlib.import_module("torch")
    logits = model(batches.ids, use_cache=False).logits
    return torch.nn.functional.cross_entropy(logits.flatten(0, 1), batches.following.flatten(), reduction="sum")


def torch_model(training: mg.Training) -> Any:
    """transformers' model with the parameters of this moment."""
    torch, transformers = (importlib.import_module(name) for name in ("torch", "transformers"))
    torch.set_num_threads(training.model.threads)
    torch.set_grad_enabled(True)
    options: dict[str, Any] = {"dtype": torch.float32, "attn_implementation": "eager"}  # sdpa has no soft-cap
    if training.config.family == "recurrentgemma":
        options["attention_window_size"] = training.config.window + 1  # its window counts the token itself
    with tempfile.TemporaryDirectory() as folder:
        save_model(folder, training.config, training.adam.parameters, training.tokenizer, "f32")
        return transformers.AutoModelForCausalLM.from_pretrained(folder, **options).train()


def torch_adam(model: Any, weight_decay: float) -> Any:
    """AdamW that decays what minigemma decays: linear maps and the convolution."""
    torch = importlib.import_module("torch")
    groups: tuple[list[Any], list[Any]] = [], []
    for name, values in model.named_parameters():
        matrix = (values.ndim == 2 and "embed" not in name) or name.endswith("conv_1d.weight")
        groups[matrix and not name.endswith("bias")].append(values)
    told = [{"params": group, "weight_decay": decay} for group, decay in zip(groups, (0.0, weight_decay), strict=True)]
    return torch.optim.AdamW(told, lr=0.0, betas=(BETA_1, BETA_2), eps=EPSILON)


def in_torch(training: mg.Training, held_out: Windows) -> tuple[list[float], float]:
    """Mean loss of each step, and the loss on the held-out windows at the end."""
    torch, s = importlib.import_module("torch"), training.settings
    model = torch_model(training)
    adam, losses, tokens, cursor = torch_adam(model, s.weight_decay), [], 0, 0
    while tokens < (s.tokens or 0):
        windows = training.order.take(cursor, s.batch_tokens)
        count = int((windows[:, 1] - windows[:, 0]).sum())
        tokens, cursor = tokens + count, cursor + len(windows)
        for group in adam.param_groups:
            group["lr"] = learning_rate(s.progress(0, tokens), s.lr, s.warmup, s.min_lr)
        adam.zero_grad(set_to_none=True)
        loss = summed_loss(model, padded(training, windows)) / count
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), s.clip)
        adam.step()
        losses.append(float(loss.detach()))
    with torch.no_grad():
        some = (held_out[first : first + TOGETHER] for first in range(0, len(held_out), TOGETHER))
        total = sum(float(summed_loss(model, padded(training, windows))) for windows in some)
    return losses, total / float((held_out[:, 1] - held_out[:, 0]).sum())


def compared(name: str, tokens: int) -> dict[str, Any]:
    """Both trainings of one model."""
    training = mg.Training(name, TEXT, threads=1, tokens=tokens, **RECIPE)
    windows = training.corpus.windows(training.seq, held_out=True)
    windows = windows[np.linspace(0, len(windows) - 1, EVALUATED // training.seq).astype(int)]  # as `evaluate` does
    their_losses, their_held_out = in_torch(training, windows)
    steps = list(training)
    return {
        "tokens": training.counters.tokens,
        "held_out": {"minigemma": round(float(steps[-1].held_out or 0), 5), "torch": round(their_held_out, 5)},
        "losses": {"minigemma": [round(step.loss, 4) for step in steps], "torch": [round(x, 4) for x in their_losses]},
    }


def table(record: dict[str, Any]) -> str:
    """What is recorded, a model a row."""
    rows = ["| model | tokens | held-out loss: minigemma | torch | difference | steps' losses differ by at most |"]
    rows.append("|--|--:|--:|--:|--:|--:|")
    for name, run in record.items():
        own, theirs = run["held_out"]["minigemma"], run["held_out"]["torch"]
        apart = np.abs(np.subtract(run["losses"]["minigemma"], run["losses"]["torch"])).max()
        rows.append(
            f"| {name} | {run['tokens']:,} | {own:.4f} | {theirs:.4f} | {own / theirs - 1:+.2%} | {apart:.4f} |"
        )
    return "\n".join(rows)


def main() -> None:
    """Run what is named, and print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("names", nargs="*", metavar="NAME", help=f"of {', '.join(TINY)}")
    parser.add_argument("--tokens", type=int, default=100_000)
    args = parser.parse_args()
    record = json.loads(RECORD.read_text()) if RECORD.exists() else {}
    for name in args.names:
        record[name] = compared(name, args.tokens)
        rows = ",\n".join(f'"{name}": {json.dumps(run)}' for name, run in sorted(record.items()))
        RECORD.write_text(f"{{\n{rows}\n}}\n", encoding="utf-8")
    print(table(record))


if __name__ == "__main__":
    main()
