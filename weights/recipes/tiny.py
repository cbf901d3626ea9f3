"""Trains a tiny model as it lies in weights/, from the text beside it.

    python weights/recipes/tiny.py tiny-gemma-3 runs/tiny-gemma-3 [TOKENS]

The run goes into the folder named; what is copied to weights/tiny-gemma-3 are runs/tiny-gemma-3/bf16 and log.jsonl.
TOKENS defaults to what the committed models saw. One thread, so that a run on another machine of the same kind repeats
it; `minigemma train` with the flags below and without --threads is faster.
"""

import shutil
import sys
from pathlib import Path

from minigemma.cli import main

TEXT = Path(__file__).resolve().parents[1] / "texts" / "bible.txt.xz"
TOKENS = "600000"
FLAGS = ["--batch-tokens", "1024", "--seed", "0", "--threads", "1", "--eval-every", "100"]
FLAGS += ["--sample-every", "200", "--prompt", "In the beginning"]

if __name__ == "__main__":
    if len(sys.argv) not in (3, 4):
        raise SystemExit(__doc__)
    name, out, *tokens = sys.argv[1:]
    failed = main(["train", "-m", name, "--data", str(TEXT), "--out", out, "--tokens", *(tokens or [TOKENS]), *FLAGS])
    failed = failed or main(["export", out, f"{out}/bf16", "--dtype", "bf16"])
    if not failed:
        shutil.copy(Path(out) / "log.jsonl", f"{out}/bf16")
    raise SystemExit(failed)
