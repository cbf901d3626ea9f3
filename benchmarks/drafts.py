"""What a draft saves, on a text that repeats and on prose.

python -m benchmarks.drafts [-m MODEL] [--dtype int8] [--draft prompt|MODEL] [-n 192] [-r 5] [-t 2]

With and without the draft take turns, after one turn of each that is not counted; the medians of tokens per second and
of the ratios are printed. The text that repeats is a piece of code and its first lines once more, continued greedily;
prose is sampled as the checkpoint says.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from statistics import median
from typing import Any

import minigemma as mg
from minigemma.text.generation import stream_generate

ROOT = Path(__file__).parents[1]


def texts() -> dict[str, tuple[str, dict[str, Any]]]:
    """The prompts and how they are continued."""
    code = (ROOT / "minigemma" / "formulas" / "penalties.py").read_text()
    again = f"{code}\n\n# The same file again, with the names of variables spelled out:\n\n{code[: len(code) // 4]}"
    prose = (ROOT / "tests" / "data" / "prose.txt").read_text()[:1500]
    return {"text that repeats": (again, {"temperature": 0}), "prose": (prose, {})}


def speed(model: Any, prompt: str, count: int, **settings: Any) -> float:
    """Tokens per second of an answer of `count` tokens, or one that ends before, without reading the prompt."""
    *_, last = stream_generate(model, prompt, max_new_tokens=count, raw=True, **settings)
    return last.generation_tps


def main() -> int:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("-m", "--model", default="gemma-3-270m")
    parser.add_argument("--dtype")
    parser.add_argument("--draft", default="prompt")
    parser.add_argument("-n", "--tokens", type=int, default=192)
    parser.add_argument("-r", "--repeat", type=int, default=5)
    parser.add_argument("-t", "--threads", type=int)
    args = parser.parse_args()
    model = mg.load(args.model, args.dtype, threads=args.threads)
    draft = "prompt" if args.draft == "prompt" else mg.load(args.draft, threads=args.threads)
    for name, (prompt, settings) in texts().items():
        found = []
        for _ in range(args.repeat + 1):
            alone, ahead = (speed(model, prompt, args.tokens, draft=each, **settings) for each in (None, draft))
            found.append((alone, ahead, ahead / alone))
        alone, ahead, ratio = (median(column) for column in zip(*found[1:], strict=True))
        print(f"{name:18} {alone:6.1f} tokens/s alone, {ahead:6.1f} with --draft {args.draft}: {ratio:.2f} x")
    return 0


if __name__ == "__main__":
    sys.exit(main())
