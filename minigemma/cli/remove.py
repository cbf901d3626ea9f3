"""`minigemma remove`: delete a model that `minigemma list` shows."""

import argparse
import sys

from ..files.local import local_models, remove
from .inspect import bytes_text
from .progress import Progress


def run(args: argparse.Namespace, progress: Progress) -> None:
    """Delete a local model after asking, or with --yes at once. ValueError for unknown names and without a terminal."""
    models = list(local_models())
    found = [model for model in models if args.model in (model.name, model.name.rpartition("/")[2])]
    if len(found) != 1:
        what = "matches several models" if found else "is not the name of a local model"
        names = ", ".join(model.name for model in found or models) or "none"
        raise ValueError(f"{what}; local models: {names}")
    [model] = found
    told = f"{model.name}, {bytes_text(model.size)} in {model.path}"
    if not args.yes:
        if not sys.stdin.isatty():
            raise ValueError(f"that is {told}; --yes removes it")
        progress("")
        print(f"remove {told}? [y/N] ", end="", file=sys.stderr, flush=True)
        if sys.stdin.readline().strip().lower() not in ("y", "yes"):
            raise ValueError("nothing was removed")
    remove(model)
    print(f"removed {told}")
