"""Which kernel multiplies x by a weight: a row for each layout and kind of work, a column for each processor.

`linear`, `minigemma inspect --cpu`, `minigemma bench` and the docs read this table. A new processor is a new column
(and a form of x with its steps in matmul.py), a new layout two new rows.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

from ..arrays import F32
from . import amx
from .amx_panels import tile_tokens, tile_tokens_a
from .int4 import byte_tokens
from .matmul import float_tokens, pair_tokens, rounded_tokens
from .matvec import FEW, takes
from .simd.cpu import DOTS
from .weights import KernelWeight

FEWER = 8  # tokens from which a panel is as fast on AMX


class Path(NamedTuple):
    """How x is multiplied."""

    form: str  # of x
    multiplies: str  # the kind of instruction, whose peak `bench` measures
    pack: Callable[[F32], Any] | None  # x → the form that matmul.py takes; None: matvec.py


FLOATS, PAIRS, FOURS, TILES = "float32", "16-bit integers", "8-bit integers", "bf16 on AMX"
ROUNDED = "bf16"
_FLOATS = Path("float32", FLOATS, float_tokens)
_PAIRS = Path("16 bits, a scale for each token", PAIRS, pair_tokens)
_FOURS = Path("8 bits, a scale for each block of 32", FOURS, byte_tokens)
_ROUNDED = Path("bf16", ROUNDED, rounded_tokens)
_TILES = Path("bf16", TILES, tile_tokens)
TABLE: dict[tuple[str, str], dict[str, Path]] = {
    ("f32", "few"): {"vectors": _FLOATS._replace(pack=None)},
    ("bf16", "few"): {"vectors": _FLOATS._replace(pack=None)},
    ("int8", "few"): {"vectors": _PAIRS._replace(pack=None)},
    ("int4", "few"): {"vectors": _FOURS._replace(pack=None)},
    ("f32", "many"): {"vectors": _FLOATS},
    ("bf16", "many"): {"vectors": _FLOATS, "vdpbf16ps": _ROUNDED, "AMX": _TILES},
    ("int8", "many"): {"vectors": _PAIRS, "vpdpbusd": _FOURS, "AMX": _TILES},
    ("int4", "many"): {"vectors": _FOURS, "AMX": _TILES._replace(pack=tile_tokens_a)},
}
TABLE |= {("int4-symmetric", work): TABLE["int4", work] for work in ("few", "many")}  # the same kernels


def columns() -> tuple[str, ...]:
    """The columns of this processor, the fastest first."""
    return (*(("AMX",) if amx.choice()[0] != "vectors" else ()), *DOTS, "vectors")


def few() -> int:
    """The largest T for matvec; above it, blocked matmul."""
    return FEWER if columns()[0] == "AMX" else FEW


def path(layout: str, work: str) -> Path:
    """The path on this processor; work is "few" (1 … few() tokens) or "many"."""
    row = TABLE[layout, work]
    return next(row[column] for column in columns() if column in row)


def path_for(layout: str, weight: KernelWeight, tokens: int) -> Path:
    """The path for a weight and a number of tokens."""
    most = 1 if tokens == 1 else few()  # asked for no more often than needed: a token of a small model takes 5 ms
    return path(layout, "few" if tokens <= most and takes(weight) else "many")


def rows() -> list[tuple[str, str, Path]]:
    """(layout, work, path) of this processor, for people to read."""
    return [(layout, work, path(layout, work)) for layout, work in TABLE]
