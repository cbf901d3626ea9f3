"""`minigemma finetune`: an adapter for a model, or all of it, from prompts and answers; `--resume` goes on."""

import argparse
from pathlib import Path

from ..train.finetune import FineTuning, Lora
from ..train.settings import Settings
from .export import write_model
from .progress import Progress
from .roofline import plottable
from .train import follow, given, refuse_changes
from .values import check_new

OWN = ("rank", "alpha", "modules", "full", "dtype", "raw")


def run(args: argparse.Namespace, progress: Progress) -> None:
    """Train until the end, --stop-after or Ctrl-C, and print where the adapter is and how the model predicts."""
    args.model = args.named or args.out or args.command
    if args.plot:
        plottable(args.plot)
    if args.merge:
        check_new(Path(args.merge))
    progress.watch_compiler()
    tuning = _resumed(args, progress) if args.resume else _begun(args, progress)
    follow(tuning, args, progress)
    if args.merge and tuning.finished:
        adapters = [args.out] if tuning.lora else []
        write_model(tuning.name if tuning.lora else args.out, Path(args.merge), None, None, adapters)


def _begun(args: argparse.Namespace, progress: Progress) -> FineTuning:
    needed = {"-m": args.named, "--data": args.data, "--out": args.out}
    if missing := [flag for flag, value in needed.items() if not value]:
        args.parser.error(f"{missing[0]} is missing")
    told = given(args)
    Settings(**told)  # before anything is read
    if args.full and (args.rank or args.alpha or args.modules or args.dtype):
        args.parser.error(
            "--full trains every parameter in float32: it takes no --rank, --alpha, --target-modules, --dtype"
        )
    parts = {"rank": args.rank, "alpha": args.alpha, "modules": args.modules}
    lora = Lora(**{name: value for name, value in parts.items() if value is not None})
    progress(f"loading {args.named}, reading {', '.join(args.data)}")
    turns = None if args.raw is None else not args.raw
    how = {"full": args.full, "dtype": args.dtype, "turns": turns, "threads": args.threads}
    return FineTuning(args.named, args.data, args.out, lora=lora, **how, **told)


def _resumed(args: argparse.Namespace, progress: Progress) -> FineTuning:
    refuse_changes(args, OWN)
    progress(f"resuming {args.out}")
    tuning = FineTuning.resume(args.out, args.data, args.threads)
    assert isinstance(tuning, FineTuning)
    return tuning
