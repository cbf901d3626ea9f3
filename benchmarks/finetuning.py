"""A LoRA step of Gemma 3 270M beside peft's over transformers: python -m benchmarks.finetuning [--alone] [--rounds N]

Loss, gradients, clipping and AdamW for adapters of rank 8 on all linear maps, over 512 tokens of text in two sequences,
every one of which counts, from the demo weights. minigemma holds them as they are stored and takes a head of the ids
that occur and 8,192 more; torch holds them in float32 and in bfloat16 and takes its whole head. All take turns; other
programs on the machine make a round slower, so the minimum counts. Needs torch, transformers and peft.
"""

from __future__ import annotations

import argparse
import importlib
import resource
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np

from minigemma.kernels.parallel import default_threads
from minigemma.train.data import micro_batches
from minigemma.train.finetune import FineTuning

from .training import Step, adam_step, fastest

LENGTH, TOKENS, MODEL = 256, 512, "gemma-3-270m"
PEFT = ["float32", "bfloat16"]
PROSE = Path(__file__).parents[1] / "tests" / "data" / "prose.txt"


def our_step(dtype: str | None) -> tuple[Step, np.ndarray, FineTuning]:
    """minigemma: a step on always the same windows, and their ids."""
    settings: dict[str, Any] = {"seq": LENGTH, "batch_tokens": TOKENS, "held_out": 0, "steps": 1_000_000}
    tuning = FineTuning(MODEL, PROSE, dtype=dtype, turns=False, **settings)
    windows = tuning.corpus.windows(LENGTH)[: TOKENS // LENGTH]
    ids = np.stack([tuning.corpus.ids[first:last] for first, last in windows]).astype(np.int64)

    def step() -> float:
        total = 0.0
        for some in micro_batches(windows, tuning.settings.micro_tokens):
            batch, following = tuning._batch(some)
            wanted = tuning.source.of(some, following)
            total += float(tuning._learn(batch, wanted.targets, 1 / TOKENS).sum())
        tuning.adam.step(1e-4, clip=1.0)
        return total / TOKENS

    return step, ids, tuning


def torch_step(folder: Path, dtype: str, ids: np.ndarray) -> Step:
    """The same through torch, from a folder of the same weights."""
    torch, transformers, peft = (importlib.import_module(name) for name in ("torch", "transformers", "peft"))
    torch.set_num_threads(default_threads())
    transformers.logging.set_verbosity_error()
    made = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=getattr(torch, dtype))
    model = peft.get_peft_model(made, peft.LoraConfig(r=8, lora_alpha=16, target_modules="all-linear")).train()
    given = torch.tensor(np.concatenate([np.full((len(ids), 1), 2), ids[:, :-1]], axis=1))
    following = torch.tensor(ids)

    def loss_of() -> Any:
        logits = model(given, use_cache=False).logits
        return torch.nn.functional.cross_entropy(logits.flatten(0, 1).float(), following.flatten())

    return adam_step(model, 1e-4, loss_of)


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--peft", nargs="+", choices=PEFT, default=PEFT, help="how peft holds its weights")
    parser.add_argument("--dtype", help="hold our weights so (default: as stored)")
    parser.add_argument("--alone", action="store_true", help="without torch, which shows our memory")
    args = parser.parse_args()
    step, ids, tuning = our_step(args.dtype)
    steps, losses = {"minigemma": step}, {"minigemma": step()}
    memory = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    if not args.alone:
        from minigemma.cli.export import write_model

        with TemporaryDirectory() as room:
            write_model(MODEL, Path(room) / "model", "hf", "bf16", [])
            for dtype in args.peft:
                steps[f"peft, {dtype}"] = torch_step(Path(room) / "model", dtype, ids)
                losses[f"peft, {dtype}"] = steps[f"peft, {dtype}"]()
    times = fastest(steps, args.rounds)
    print(f"LoRA step of {MODEL}, {TOKENS} tokens, {default_threads()} threads; {args.rounds} rounds")
    print("| program | first loss | s, fastest round | tokens/s | minigemma is |\n|--|--|--|--|--|")
    for name, best in times.items():
        speed, ratio = TOKENS / best, best / times["minigemma"]
        print(f"| {name} | {losses[name]:.3f} | {best:.2f} | {speed:,.0f} | {ratio:.2f} x as fast |")
    print(f"memory of the process after minigemma's first step, all of it: {memory:,.0f} MB")
    print(f"head: {tuning._with_short_head[1].size:,} of {tuning.config.vocab:,} rows")


if __name__ == "__main__":
    main()
