"""`minigemma remove`: delete a model that `minigemma list` shows."""

from __future__ import annotations

import argparse
import sys

from ..files.local import local_models, remove
from .inspect import bytes_text
from .progress import Progress


def run(args: argparse.Namespace, progress: Progress) -> None:
    """Delete it after a question, which --yes answers. ValueError for other names, and where nobody can be asked."""
    models = list(local_models())
    found = [model for model in models if args.model in (model.name, model.name.rpartition("/")[2])]
    if len(found) != 1:
        what = "means several models" if found else "is no model that is kept here"
        names = ", ".join(model.name for model in found or models) or "none"
        raise ValueError(f"{what}; those that can be removed: {names}")
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
