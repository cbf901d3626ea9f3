"""`minigemma vocab`: a small tokenizer for a training, as files that minigemma and transformers read."""

import argparse
from pathlib import Path

from ..files.open import open_files
from ..files.resolve import resolve
from ..files.save import save_tokenizer
from ..train.data import documents, encoded
from ..train.vocabulary import cut_vocabulary, train_vocabulary
from .progress import Progress, print_json


def run(args: argparse.Namespace, progress: Progress) -> None:
    """Write the tokenizer, and print how many tokens it makes of the text."""
    texts = [text for path in args.data for text in documents(Path(path))]
    if args.model:
        progress(f"reading the vocabulary of {args.model}")
        full = open_files(resolve(args.model)).make_tokenizer()
        if full is None:
            raise ValueError("there is no tokenizer.model or tokenizer.json to take pieces from")
        progress("counting pieces")
        tokenizer = cut_vocabulary(full, texts, args.size)
    else:
        progress("training a vocabulary")
        tokenizer = train_vocabulary(texts, args.size)
    save_tokenizer(args.out, tokenizer)
    progress("encoding the text with it")
    tokens = sum(1 for text in texts for _ in encoded(tokenizer, text))
    size = sum(len(text.encode("utf-8", "replace")) for text in texts)
    progress("")
    if args.json:
        print_json({"folder": args.out, "pieces": tokenizer.size, "tokens": tokens, "bytes": size})
    else:
        told = f"{tokens:,} tokens of {size:,} bytes, {size / max(tokens, 1):.2f} bytes per token"
        print(f"{args.out}: {tokenizer.size:,} pieces; the text is {told}")
