"""`minigemma download`: fetch a model from the Hugging Face hub into its cache."""

import argparse

from ..files.download import download
from .progress import Progress, print_json


def run(args: argparse.Namespace, progress: Progress) -> None:
    """Download and print the folder of the model's files."""
    folder = download(args.model, args.revision)
    if args.json:
        print_json({"model": args.model, "folder": str(folder)})
    else:
        print(folder)
