"""Fine-tune Gemma 3 270M to write dates as ISO 8601 has them, and count how many it gets right before and after.

    python weights/recipes/dates.py runs/dates [--steps 60]

A pretrained model goes on with "March 3, 1987 =" in prose. 1,600 examples of prompts and answers are made from a seed;
40 more are asked before and after, always the likeliest token, and an answer counts if it is right to the last letter.
"""

from __future__ import annotations

import argparse
import json
import random
from calendar import month_name
from pathlib import Path

import minigemma as mg

MODEL, ASKED = "gemma-3-270m", 40


def examples(count: int, seed: int) -> list[dict[str, str]]:
    """Prompts and answers."""
    choose = random.Random(seed)
    found = []
    for _ in range(count):
        year, month, day = choose.randint(1800, 2099), choose.randint(1, 12), choose.randint(1, 28)
        prompt = choose.choice(["{m} {d}, {y} =", "{d} {m} {y} =", "the {d}. of {m} in {y} ="])
        prompt = prompt.format(m=month_name[month], d=day, y=year)
        found.append({"prompt": prompt, "answer": f" {year}-{month:02}-{day:02}"})
    return found


def right(model: object, asked: list[dict[str, str]]) -> int:
    """How many answers are right to the last letter."""
    texts = [""] * len(asked)
    prompts = [example["prompt"] for example in asked]
    for token in mg.generate_batch(model, prompts, max_new_tokens=16, temperature=0, raw=True):
        texts[token.index] += token.text
    return sum(text == example["answer"] for text, example in zip(texts, asked, strict=True))


def main() -> None:
    """Write the examples, train, and print what changed."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path)
    parser.add_argument("--steps", type=int, default=60)
    args = parser.parse_args()
    data, asked = args.out.with_suffix(".jsonl"), examples(ASKED, seed=1)
    prompts = {example["prompt"] for example in asked}
    rows = [json.dumps(example) for example in examples(1600, seed=0) if example["prompt"] not in prompts]
    data.write_text("\n".join(rows) + "\n", "utf-8")
    before = right(mg.load(MODEL), asked)
    tuning = mg.FineTuning(MODEL, data, args.out, steps=args.steps, lr=1e-3, held_out=0.02, eval_every=20)
    print(f"held-out loss before: {tuning.evaluate():.3f} nats per token; right {before} of {ASKED}", flush=True)
    for step in tuning:
        print(f"step {step.number}: loss {step.loss:.3f}, {step.seconds_left / 60:.0f} min left", flush=True)
    after = right(mg.load(MODEL, adapter=args.out), asked)
    print(f"held-out loss after: {step.held_out:.4f} nats per token; right {after} of {ASKED}")


if __name__ == "__main__":
    main()
