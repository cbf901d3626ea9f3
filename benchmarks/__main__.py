"""`python -m benchmarks NAME,… [flags of minigemma bench]`: minigemma and other programs, measured in turns."""

from __future__ import annotations

import sys
from functools import partial

from minigemma.cli import bench
from minigemma.cli.arguments import parse
from minigemma.cli.main import one_line
from minigemma.cli.progress import Progress

from . import PROGRAMS, programs_with


def main(words: list[str]) -> int:
    """Measure; 0 where that worked, 1 with one line where it did not, 2 for wrong usage."""
    if not words or words[0].startswith("-"):
        print(f"usage: python -m benchmarks NAME,… [flags of minigemma bench]; names: {', '.join(PROGRAMS)}")
        return 2
    args = parse(["bench", *words[1:]])
    try:
        with Progress(args.quiet) as progress:
            names = [name for name in words[0].split(",") if name]
            bench.run(args, progress, partial(_programs, names))
    except Exception as error:
        if args.debug:
            raise
        print(f"benchmarks: {one_line(error, args.model)}", file=sys.stderr)
        return 1
    return 0


def _programs(names, model, progress):  # type: ignore[no-untyped-def]
    return programs_with(model, names, progress)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
