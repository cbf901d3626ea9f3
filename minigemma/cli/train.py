"""`minigemma train` and `distill`: a small model from a text, with a teacher or without; `--resume` goes on."""

import argparse
import time
from collections.abc import Sequence
from dataclasses import fields
from pathlib import Path
from typing import Any

from ..train.settings import Settings
from ..train.sizes import config_named
from ..train.targets import Distillation
from ..train.trainer import Step, Training
from .curves import draw
from .progress import Progress, note, print_json
from .roofline import plottable

SHOWN_EVERY = 10  # seconds between two lines where stderr is no terminal
OWN = tuple(field.name for field in fields(Settings))  # a flag for each


def run(args: argparse.Namespace, progress: Progress) -> None:
    """Train until the end, --stop-after or Ctrl-C, and print where the model is and how it predicts."""
    args.model = args.named or args.out or args.command
    if args.plot:
        plottable(args.plot)
    progress.watch_compiler()
    follow(_resumed(args, progress) if args.resume else _begun(args, progress), args, progress)


def given(args: argparse.Namespace) -> dict[str, Any]:
    """The fields of `Settings` that flags state."""
    return {name: getattr(args, name) for name in OWN if getattr(args, name, None) is not None}


def _begun(args: argparse.Namespace, progress: Progress) -> Training:
    needed = {"-m": args.named, "--data": args.data, "--out": args.out, "--teacher": getattr(args, "teacher", "none")}
    if missing := [flag for flag, value in needed.items() if not value]:
        args.parser.error(f"{missing[0]} is missing")
    told = given(args)
    Settings(**told)  # before anything is read
    if args.command == "distill":
        names = ("teacher", "draws", "soft", "targets", "on_policy", "beta")
        told["distillation"] = Distillation(**{n: getattr(args, n) for n in names if getattr(args, n) is not None})
    progress(f"reading {', '.join(args.data)}")
    model = config_named(args.named, args.vocab)
    return Training(model, args.data, args.out, init=args.init, threads=args.threads, **told)


def refuse_changes(args: argparse.Namespace, fixed: Sequence[str]) -> None:
    """Exit with 2 for flags beside --resume that would change a run."""
    told = [*(["-m"] if args.named else []), *(f"--{name.replace('_', '-')}" for name in given(args))]
    told += [f"--{name}" for name in fixed if getattr(args, name, None) not in (None, False)]
    if told or not args.out:
        what = f"{told[0]} cannot change" if told else "--out is missing"
        args.parser.error(f"{what}: --resume goes on with the run in --out as it was begun")


def _resumed(args: argparse.Namespace, progress: Progress) -> Training:
    refuse_changes(args, ("init", "vocab", "teacher", "draws", "soft", "targets", "on_policy", "beta"))
    progress(f"resuming {args.out}")
    return Training.resume(args.out, args.data, args.threads)


def follow(training: Training, args: argparse.Namespace, progress: Progress) -> None:
    """Run the steps, show them, and save where the run stops."""
    shown, first, last = time.monotonic(), training.counters.step, None
    stop = first + args.stop_after if args.stop_after else None
    try:
        training.prepare(progress.per_cent("asking the teacher"))
        for last in training:
            told = line(last, training.settings.steps)
            if last.skipped:
                note(args, f"{told}; the step was skipped: its loss or gradient is not finite")
            if last.number == first + 3 and not training.finished:
                note(args, f"this takes about {duration(last.seconds_left)} ({last.tokens_per_second:,.0f} tokens/s)")
            if last.held_out is not None or (not progress.terminal and time.monotonic() > shown + SHOWN_EVERY):
                shown = time.monotonic()
                progress("")
                note(args, told)
            if last.sample is not None:
                note(args, f"sample: {training.settings.prompt}{last.sample!r}")
            progress.doing = told
            if stop is not None and last.number >= stop and not training.finished:
                training.save()
                break
    except KeyboardInterrupt:
        progress("")
        training.save()
        note(args, f"stopped after step {training.counters.step:,}; {again(args)}")
        raise
    finally:
        if args.plot and training.counters.step:
            draw(Path(args.out), args.plot)
    progress("")
    _summary(training, last, args)


def _summary(training: Training, last: Step | None, args: argparse.Namespace) -> None:
    c, s = training.counters, training.settings
    report: dict[str, Any] = {
        "folder": str(args.out),
        "step": c.step,
        "tokens": c.tokens,
        "finished": training.finished,
    }
    if last is not None:
        report |= {"loss": last.loss, "kl": last.kl, "held_out": last.held_out, "bits_per_byte": last.bits_per_byte}
    if args.json:
        print_json(report)
        return
    length = f"{s.steps:,} steps" if s.steps else f"{s.tokens:,} tokens"
    state = "finished" if training.finished else f"not finished; {again(args)}"
    print(f"{args.out}: step {c.step:,} and {c.tokens:,} tokens of {length}, {state}")
    if last is not None and last.held_out is not None:
        print(f"held-out loss {last.held_out:.4f} nats per token, {last.bits_per_byte:.3f} bits per byte")


def again(args: argparse.Namespace) -> str:
    """How to go on with a run."""
    return f"minigemma {args.command} --resume --out {args.out} goes on"


def line(step: Step, steps: int | None) -> str:
    """A step for people."""
    parts = [
        f"step {step.number:,}" + (f"/{steps:,}" if steps else ""),
        f"{step.tokens:,} tokens",
        f"loss {step.loss:.4f}",
        *([f"KL {step.kl:.4f}"] if step.kl is not None else []),
        *([f"held-out {step.held_out:.4f}"] if step.held_out is not None else []),
        f"lr {step.lr:.2e}",
        f"norm {step.norm:.2f}",
        f"{step.tokens_per_second:,.0f} tokens/s",
        f"{duration(step.seconds_left)} left",
    ]
    return "  ".join(parts)


def duration(seconds: float) -> str:
    """A time for people.

    >>> duration(40), duration(150), duration(7300)
    ('40 s', '2.5 min', '2.0 h')
    """
    if seconds >= 3600:
        return f"{seconds / 3600:.1f} h"
    return f"{seconds / 60:.1f} min" if seconds >= 100 else f"{seconds:.0f} s"
