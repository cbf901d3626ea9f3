"""Other programs with the same weights, measured in turns with minigemma. Not part of the installed package."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from minigemma.cli.measure import Program
from minigemma.models.decoder import Decoder

from .llama_cpp import LlamaCpp
from .openvino import OpenVINO
from .torch_programs import DeepMind, Transformers

PROGRAMS: dict[str, type[Program]] = {p.name: p for p in (Transformers, LlamaCpp, DeepMind, OpenVINO)}


def programs_with(
    model: Decoder, names: Sequence[str], progress: Callable[[str], None] = lambda doing: None
) -> tuple[dict[str, Program], dict[str, str]]:
    """The programs of these names with the weights of `model`; and for each that cannot run, the reason.

    Raises ValueError for an unknown name.
    """
    if unknown := [name for name in names if name not in PROGRAMS]:
        raise ValueError(f"{unknown[0]!r} is no known program; known are {', '.join(PROGRAMS)}")
    made, missing = {}, {}
    for name in names:
        progress(f"preparing {name}")
        try:
            made[name] = PROGRAMS[name](model)
        except ImportError as error:
            missing[name] = str(error)
    return made, missing
