"""`minigemma embed`: the embedding of each text."""

import argparse

from ..text.embedding import embed
from .opening import open_model
from .progress import Progress, print_json
from .values import read_text


def run(args: argparse.Namespace, progress: Progress) -> None:
    """Print a line of numbers per text; with --json one object with all of them."""
    texts = args.texts or read_text(args).splitlines()
    model = open_model(args, progress)
    progress(f"embedding {len(texts):,} texts")
    rows = embed(model, texts, args.prompt_name)
    progress("")
    if args.json:
        print_json({"dimensions": rows.shape[1], "embeddings": rows.tolist()})
        return
    for row in rows:
        print(*(f"{value:.6f}" for value in row))
