"""Writes docs/api.md from the docstrings: every public name, its signature and what it says.

python docs/make_api.py           write the page
python docs/make_api.py --check   exit 1 if the page is older than the code
"""

from __future__ import annotations

import inspect
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import minigemma as mg
from minigemma.cache import Cache
from minigemma.files.tokenizer import Tokenizer
from minigemma.models.decoder import Decoder
from minigemma.text.generation import Token
from minigemma.text.scoring import Score

ROOT = Path(__file__).parents[1]
PAGE = ROOT / "docs" / "api.md"
OBJECTS = {  # what calls return: how the text calls it, and its class
    "model": (Decoder, "what `mg.load` returns"),
    "cache": (Cache, "what `model.new_cache` returns"),
    "tokenizer": (Tokenizer, "`model.tokenizer`"),
    "token": (Token, "what `mg.stream_generate` yields"),
    "score": (Score, "what `mg.score` returns"),
}
HEAD = """# Every public name

`import minigemma as mg`. Names that are not on this page may change without notice. Named values of a run:
[taps.md](taps.md). The command line: `minigemma --help`.

`python docs/make_api.py` writes this page from the docstrings; a test compares them.
"""


def argument(p: inspect.Parameter) -> str:
    """An argument as the source writes it, with its type."""
    star = {p.VAR_POSITIONAL: "*", p.VAR_KEYWORD: "**"}.get(p.kind, "")
    return f"{star}{p.name}: {p.annotation}" + ("" if p.default is p.empty else f" = {p.default!r}")


def signature(name: str, thing: Any) -> str:
    """How the name is called, with the arguments' types; at most 100 characters a line."""
    if isinstance(thing, property) or not callable(thing):
        return name
    own = inspect.signature(thing)
    parameters = [argument(p) for p in own.parameters.values() if p.name != "self"]
    result = "" if own.return_annotation in (inspect.Parameter.empty, "None") else f" → {own.return_annotation}"
    line = f"{name}({', '.join(parameters)}){result}"
    return line if len(line) <= 100 else f"{name}(\n    " + ",\n    ".join(parameters) + f",\n){result}"


def entry(name: str, thing: Any) -> str:
    """A heading, the signature and the docstring as it is written."""
    kind = inspect.unwrap(thing.fget if isinstance(thing, property) else thing)
    path = Path(inspect.getfile(kind)).relative_to(ROOT)
    said = inspect.getdoc(thing) or ""
    return f"### `{name}`\n\n[{path}](../{path})\n\n```python\n{signature(name, thing)}\n```\n\n```text\n{said}\n```\n"


def methods(kind: type) -> Iterator[tuple[str, Any]]:
    """The public methods and properties that minigemma defines on a class, in the order of the file."""
    inherited = [base for base in reversed(kind.__mro__) if base.__module__.startswith("minigemma")]
    for name, thing in {name: thing for base in inherited for name, thing in vars(base).items()}.items():
        if not name.startswith("_") and (inspect.isfunction(thing) or isinstance(thing, property)):
            yield name, thing


def fields(kind: type) -> str:
    """The fields of a dataclass, as a list; "" for other classes."""
    found = getattr(kind, "__dataclass_fields__", {})
    return "Fields: " + ", ".join(f"`.{name}`" for name in found) + ".\n" if found else ""


def page() -> str:
    """The page."""
    parts = [HEAD, "## Functions and classes\n"]
    for name in mg.__all__:
        thing = getattr(mg, name)
        parts.append(entry(f"mg.{name}", thing))
        if inspect.isclass(thing):
            parts += [entry(f"{name}.{method}", what) for method, what in methods(thing)]
    for name, (kind, what) in OBJECTS.items():
        parts.append(f"## `{name}`: {what}\n\n{inspect.getdoc(kind)}\n\n{fields(kind)}".rstrip() + "\n")
        parts += [entry(f"{name}.{method}", method_) for method, method_ in methods(kind)]
    return "\n".join(parts)


def main(check: bool) -> int:
    """Write the page, or compare it."""
    made = page()
    if check:
        return int(PAGE.read_text("utf-8") != made)
    PAGE.write_text(made, "utf-8")
    return 0


if __name__ == "__main__":
    raise SystemExit(main("--check" in sys.argv))
