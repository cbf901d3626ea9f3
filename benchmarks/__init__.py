"""Other programs with the same weights, measured in turns with minigemma. Not part of the installed package."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from pathlib import Path

from minigemma.cli.measure import Program
from minigemma.models.decoder import Decoder

from .converted import CTranslate2, OnnxRuntimeGenAI, OpenVINOGenAI
from .llama_cpp import LlamaCpp
from .openvino import OpenVINO
from .torch_programs import DeepMind, Transformers

PAGE = Path(__file__).parents[1] / "docs" / "performance.md"
CONVERTED = (OpenVINOGenAI, CTranslate2, OnnxRuntimeGenAI)
PROGRAMS: dict[str, type[Program]] = {p.name: p for p in (Transformers, LlamaCpp, DeepMind, OpenVINO, *CONVERTED)}


def put_into_page(name: str, table: str) -> None:
    """Put a table into docs/performance.md, between the two comments of its name."""
    text = PAGE.read_text("utf-8")
    mark = re.compile(rf"(<!-- {name} -->\n).*?(<!-- end of {name} -->)", re.S)
    assert mark.search(text), f"{PAGE.name} has no place for {name}"
    PAGE.write_text(mark.sub(lambda found: found[1] + table + "\n" + found[2], text), "utf-8")


def programs_with(
    model: Decoder, names: Sequence[str], progress: Callable[[str], None] = lambda doing: None
) -> tuple[dict[str, Program], dict[str, str]]:
    """The programs of these names with the weights of `model`; and for each that cannot run, the reason.

    names: of PROGRAMS; one of CONVERTED as NAME=FOLDER.
    Raises ValueError for an unknown name.
    """
    folders = dict(name.partition("=")[::2] for name in names)
    converted = [program.name for program in CONVERTED]
    if unknown := [name for name, folder in folders.items() if name not in (converted if folder else PROGRAMS)]:
        raise ValueError(f"{unknown[0]!r} is no known program; known are {', '.join(PROGRAMS)}")
    made, missing = {}, {}
    for name, folder in folders.items():
        progress(f"preparing {name}")
        try:
            made[name] = PROGRAMS[name](model, *([folder] if folder else []))
        except ImportError as error:
            missing[name] = str(error)
    return made, missing
