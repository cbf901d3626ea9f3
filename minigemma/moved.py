"""The modules of 0.1 under their old names, for one release: `from minigemma.tokenizer import …` still works."""

from __future__ import annotations

import sys
import warnings
from collections.abc import Sequence
from importlib import import_module
from importlib.abc import Loader, MetaPathFinder
from importlib.machinery import ModuleSpec
from types import ModuleType

MOVED = {
    **{name: f"files.{name}" for name in ("download", "gguf_file", "images", "safetensors_file", "tokenizer")},
    **{name: f"text.{name}" for name in ("chat", "generation", "prompt", "scoring")},
    "checkpoint": "files.load",
    "locate": "files.resolve",
    "convert": "cli.quantize",
    "random_weights": "cli.random_weights",
}


class _Moved(MetaPathFinder, Loader):
    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        package, _, name = fullname.partition(".")
        return ModuleSpec(fullname, self) if package == "minigemma" and name in MOVED else None

    def create_module(self, spec: ModuleSpec) -> ModuleType:
        moved = "minigemma." + MOVED[spec.name.partition(".")[2]]
        warnings.warn(f"{spec.name} is {moved} now", DeprecationWarning, stacklevel=2)
        module = import_module(moved)
        self.spec = module.__spec__
        return module

    def exec_module(self, module: ModuleType) -> None:
        """It has run under its own name, and keeps it."""
        module.__spec__ = self.spec


if not any(type(finder).__name__ == "_Moved" for finder in sys.meta_path):
    sys.meta_path.append(_Moved())
