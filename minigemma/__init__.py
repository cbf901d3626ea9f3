"""minigemma: the Gemma papers as running code, and the released weights on your CPU at the speed of its memory.

import minigemma as mg
model = mg.load("gemma-3-270m")
print(mg.generate(model, "Once upon a time", max_new_tokens=40))
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

from . import moved  # noqa: F401  # old names of modules

__version__ = "0.1.0"

if TYPE_CHECKING:
    from .errors import ModelFormatError
    from .files.cache_file import load_cache
    from .files.load import load
    from .taps import Edits, Taps
    from .text.batch import generate_batch
    from .text.chat import Chat
    from .text.embedding import embed
    from .text.generation import generate, stream_generate
    from .text.scoring import choose, score, score_choices
    from .train.finetune import FineTuning, Lora
    from .train.targets import Distillation
    from .train.trainer import Training

__all__ = [
    "Chat",
    "Distillation",
    "Edits",
    "FineTuning",
    "Lora",
    "ModelFormatError",
    "Taps",
    "Training",
    "choose",
    "embed",
    "generate",
    "generate_batch",
    "load",
    "load_cache",
    "score",
    "score_choices",
    "stream_generate",
]

_HOME = {
    "Chat": "text.chat",
    "Distillation": "train.targets",
    "Edits": "taps",
    "FineTuning": "train.finetune",
    "Lora": "train.finetune",
    "ModelFormatError": "errors",
    "Taps": "taps",
    "Training": "train.trainer",
    "choose": "text.scoring",
    "embed": "text.embedding",
    "generate": "text.generation",
    "generate_batch": "text.batch",
    "load": "files.load",
    "load_cache": "files.cache_file",
    "score": "text.scoring",
    "score_choices": "text.scoring",
    "stream_generate": "text.generation",
}


def __dir__() -> list[str]:
    """The public names, also those that are not imported yet: for completion."""
    return sorted(["__version__", *__all__])


def __getattr__(name: str) -> Any:
    """Import a public name when it is first used, so that `minigemma --help` need not wait for Numba."""
    if name not in _HOME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f".{_HOME[name]}", __name__), name)
