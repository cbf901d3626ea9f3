"""The laws of the house: which folder may import which, and how long files, functions and signatures may be."""

import ast
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parents[1] / "minigemma"
FLOORS = ("", "layouts", "kernels", "formulas", "blocks", "models", "files", "text", "train", "cli")
MODULES = sorted(PACKAGE.rglob("*.py"))
ABOVE_ALL = ("__init__", "__main__")  # which name what a user calls


def floor_of(path: Path) -> int:
    folders = path.relative_to(PACKAGE).parts[:-1]
    return FLOORS.index(folders[0] if folders else "")


def imported(tree: ast.AST, folder: tuple[str, ...] = ()) -> set[str]:
    """The folders of the package that a syntax tree imports from, "" for the modules beside them."""
    found = set()
    for node in ast.walk(tree):
        names = []
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            origin = ["minigemma", *folder][: len(folder) + 2 - node.level] if node.level else []
            path = ".".join([*origin, *([node.module] if node.module else [])])
            names = [f"{path}.{alias.name}" for alias in node.names] if path == "minigemma" else [path]
        for name in names:
            first, *rest = name.split(".")
            if first == "minigemma":
                found.add(rest[0] if rest and rest[0] in FLOORS else "")
    return found


@pytest.mark.parametrize("path", MODULES, ids=lambda path: str(path.relative_to(PACKAGE)))
def test_imports_run_downward(path):
    if path.parent == PACKAGE and path.stem in ABOVE_ALL:
        return
    own = floor_of(path)
    found = imported(ast.parse(path.read_text()), path.relative_to(PACKAGE).parts[:-1])
    upward = {name for name in found if FLOORS.index(name) > own}
    assert not upward, f"{path.name} ({FLOORS[own] or 'top'}) imports upward from {upward}"


@pytest.mark.parametrize(
    "line, names",
    [
        ("import numpy.linalg, os", set()),
        ("import minigemma", {""}),
        ("import minigemma.formulas.rope as r", {"formulas"}),
        ("from minigemma.formulas.rope import rope", {"formulas"}),
        ("from ..formulas.rope import rope", {"formulas"}),
        ("from ..formulas import rope", {"formulas"}),
        ("from .. import arrays", {""}),
        ("from ..arrays import F32", {""}),
        ("from .gqa import attention", {"blocks"}),
        ("def f():\n    from ..files.load import load", {"files"}),
        ("if TYPE_CHECKING:\n    from ..models.decoder import Model", {"models"}),
    ],
)
def test_every_spelling_of_an_import_is_seen(line, names):
    assert imported(ast.parse(line), ("blocks",)) == names
