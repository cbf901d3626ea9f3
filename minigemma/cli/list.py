"""`minigemma list`: the models on this machine."""

import argparse

from ..files.local import local_models, what_it_is
from .inspect import KINDS, bytes_text
from .progress import Progress, note, print_json


def run(args: argparse.Namespace, progress: Progress) -> None:
    """Print name, size and kind of each model; with --json one object each."""
    progress("looking for models")
    found = list(local_models())
    progress("")
    for model in found:
        about = what_it_is(model)
        kind = f"cannot be used: {about}"
        if not isinstance(about, str):
            kind = f"{about.config.family}, {KINDS[about.instruction_tuned]}"
        if args.json:
            print_json({"name": model.name, "path": str(model.path), "bytes": model.size, "kind": kind})
        else:
            print(f"{model.name:40} {bytes_text(model.size):>9}  {kind}")
    if not found:
        note(args, "there is no model yet: minigemma download google/gemma-3-1b-it")
