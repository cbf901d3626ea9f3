"""`minigemma score`: the perplexity of a text."""

import argparse
import math

from ..text.prompt import text_ids
from ..text.scoring import score
from .opening import open_model
from .progress import Progress, print_json
from .values import read_text


def run(args: argparse.Namespace, progress: Progress) -> None:
    """Print the perplexity of the text and, with -v, the log-probability of each token."""
    text = read_text(args)
    model = open_model(args, progress)
    assert model.tokenizer, "open_model refuses a model without one"
    ids = text_ids(model.tokenizer, text, control=args.control_tokens)
    progress(f"scoring {len(ids):,} tokens")
    result = score(model, ids, stride=args.stride, **progress.watched(f"scoring {len(ids):,} tokens"))
    progress("")
    if math.isnan(result.perplexity):
        raise ValueError("the model's logits are NaN; `minigemma inspect --check` finds the weights that are")
    told = [(model.tokenizer.decode([token]), float(p)) for token, p in zip(ids[1:], result.logprobs, strict=True)]
    if args.json:
        print_json({"perplexity": result.perplexity, "tokens": len(told), "logprobs": told})
        return
    if args.verbose:
        for token, logprob in told:
            print(f"{logprob:9.4f}  {token!r}")
    print(f"perplexity {result.perplexity:.4f} over {len(told):,} tokens")
