"""A model for EleutherAI's harness (`pip install lm_eval`): scores and answers for any of its tasks.

python -m benchmarks.harness -m gemma-3-270m --tasks arc_easy,hellaswag --limit 100
"""

from __future__ import annotations

import argparse
import sys
from typing import Any

import numpy as np
from lm_eval import simple_evaluate
from lm_eval.api.model import LM
from lm_eval.utils import make_table

import minigemma as mg
from minigemma.formulas.sampling import logprob_of
from minigemma.text.prompt import text_ids


class Harness(LM):
    """A minigemma model in the harness's words. Texts are continued as they are, after BOS."""

    def __init__(self, model: Any) -> None:
        super().__init__()
        self.model = model

    def loglikelihood(self, requests: list[Any], disable_tqdm: bool = False) -> list[tuple[float, bool]]:
        """For each (context, continuation): log p(continuation | context), and whether greedy text would be it.

        Continuations of one context, which follow one another, read it once.
        """
        found, held, cache, last = [], None, None, None
        for context, continuation in (request.args for request in requests):
            ids = text_ids(self.model.tokenizer, context)
            new = text_ids(self.model.tokenizer, context + continuation)[len(ids) :]
            if ids != held:
                held, cache = ids, self.model.new_cache(self.model.config.context)
                last = self.model.forward(ids, cache, last_only=True)
            logits = last if len(new) < 2 else np.concatenate([last, self.model.forward(new[:-1], cache.copy())])
            found.append((float(logprob_of(logits, new).sum()), bool((logits.argmax(-1) == new).all())))
        return found

    def loglikelihood_rolling(self, requests: list[Any], disable_tqdm: bool = False) -> list[float]:
        """log p of each text after BOS."""
        return [float(mg.score(self.model, text).logprobs.sum()) for (text,) in (request.args for request in requests)]

    def generate_until(self, requests: list[Any], disable_tqdm: bool = False) -> list[str]:
        """The greedy text after each context, up to one of its stop strings."""
        found = []
        for context, wanted in (request.args for request in requests):
            stop = [text for text in wanted.get("until", []) if text]
            settings = {"max_new_tokens": wanted.get("max_gen_toks", 256), "stop": stop}
            temperature = wanted.get("temperature", 0) if wanted.get("do_sample") else 0
            found.append(mg.generate(self.model, context, temperature=temperature, raw=True, **settings))
        return found


def main() -> int:
    """Evaluate; the harness fetches its tasks' texts from the Hugging Face hub."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.harness", description=__doc__.split("\n")[0])
    parser.add_argument("-m", "--model", default="gemma-3-270m")
    parser.add_argument("--dtype")
    parser.add_argument("--tasks", required=True, help="names of the harness, separated by commas")
    parser.add_argument("--limit", type=int, help="only the first N of each task")
    args = parser.parse_args()
    model = Harness(mg.load(args.model, dtype=args.dtype))
    print(make_table(simple_evaluate(model, tasks=args.tasks.split(","), limit=args.limit, bootstrap_iters=0)))
    return 0


if __name__ == "__main__":
    sys.exit(main())
