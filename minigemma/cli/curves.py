"""Draws the curves of a training from its log: loss, held-out loss and learning rate over tokens."""

import json
from pathlib import Path


def draw(run: Path, path: Path) -> None:
    """Draw the log of the folder `run` into a figure at `path` (matplotlib)."""
    from matplotlib.figure import Figure

    rows = [json.loads(row) for row in (run / "log.jsonl").read_text("utf-8").splitlines()]
    figure = Figure(figsize=(9, 6), layout="constrained")
    axes = figure.add_subplot()
    for name, style in (("loss", {"linewidth": 0.8}), ("kl", {"linewidth": 0.8}), ("held_out", {"marker": "o"})):
        points = [(row["tokens"], row[name]) for row in rows if row.get(name) is not None]
        if points:
            axes.plot(*zip(*points, strict=True), label=name.replace("_", "-"), **style)
    axes.set_xlabel("tokens")
    axes.set_ylabel("nats per token")
    axes.set_title(run.name)
    axes.grid(alpha=0.2)
    axes.legend(loc="upper right")
    rates = axes.twinx()
    rates.plot([row["tokens"] for row in rows], [row["lr"] for row in rows], color="gray", linestyle=":")
    rates.set_ylabel("learning rate (dotted)")
    figure.savefig(path, dpi=150)
