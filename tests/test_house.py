"""The laws of the house: which folder may import which, and how long files, functions and signatures may be.

A page of formulas has at most 150 lines, 200 once it holds a gradient; any file 400; a function 40 without its
docstring, 60 in kernels/; a signature 8 parameters, public functions of the top, text/, models/ and files/ excepted.
Numba's private modules are imported in kernels/compiler.py alone. The package has at most 11,500 lines without train/.
"""

import ast
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

LARGEST = 22_972  # lines of the package without train/, today; the law is 11,500

PACKAGE = Path(__file__).parents[1] / "minigemma"
FLOORS = ("", "layouts", "kernels", "formulas", "blocks", "models", "files", "text", "train", "cli")
MODULES = sorted(PACKAGE.rglob("*.py"))
ABOVE_ALL = ("__init__", "__main__")  # which name what a user calls
PUBLIC_FLOORS = ("", "text", "models", "files")
PRIVATE_NUMBA = r"numba\.(core|np|parfors|experimental|misc|cpython)\b"


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


def length(node: ast.FunctionDef | ast.AsyncFunctionDef) -> int:
    """Lines of a function without its docstring."""
    doc = ast.get_docstring(node, clean=False)
    return (node.end_lineno or 0) - node.lineno + 1 - (doc.count("\n") + 1 if doc else 0)


def parameters(node: ast.FunctionDef | ast.AsyncFunctionDef) -> int:
    """How many a signature has, `self` apart."""
    positional = [*node.args.posonlyargs, *node.args.args]
    bound = bool(positional) and positional[0].arg in ("self", "cls")
    return len(positional) + len(node.args.kwonlyargs) - bound


def broken(floor: str, name: str, source: str) -> Iterator[str]:
    """The laws that a module breaks, each as "<path>[:<function>] <law>"."""
    tree, count = ast.parse(source), source.count("\n")
    at = f"{floor}/{name}" if floor else name
    if count > 400:
        yield f"{at} file"
    if floor == "formulas" and count > (200 if ".gradient" in source else 150):
        yield f"{at} page"
    for node in ast.walk(tree):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            if length(node) > (60 if floor == "kernels" else 40):
                yield f"{at}:{node.name} lines"
            public = floor in PUBLIC_FLOORS and not node.name.startswith("_")
            if parameters(node) > 8 and not public:
                yield f"{at}:{node.name} parameters"
        names = []
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom) and not node.level:
            names = [f"{node.module}.{alias.name}" for alias in node.names]
        if (floor, name) != ("kernels", "compiler.py") and any(re.match(PRIVATE_NUMBA, found) for found in names):
            yield f"{at} numba"


def test_pages_files_functions_and_signatures_are_short():
    found = set()
    for path in MODULES:
        folders = path.relative_to(PACKAGE).parts[:-1]
        inside = "/".join([*folders[1:], path.name])
        found |= set(broken(folders[0] if folders else "", inside, path.read_text("utf-8")))
    assert not found


def test_the_package_is_small():
    paths = [path for path in MODULES if path.relative_to(PACKAGE).parts[0] != "train"]
    lines = sum(path.read_text("utf-8").count("\n") for path in paths)
    assert lines <= LARGEST, f"{lines:,} lines"


@pytest.mark.parametrize(
    "floor, name, source, law",
    [
        ("models", "x.py", "\n" * 401, "models/x.py file"),
        ("formulas", "x.py", "\n" * 151, "formulas/x.py page"),
        ("formulas", "x.py", "@f.gradient\ndef g(): ...\n" + "\n" * 199, "formulas/x.py page"),
        ("blocks", "x.py", "def f():\n" + "    1\n" * 40, "blocks/x.py:f lines"),
        ("kernels", "simd/x.py", "def f():\n" + "    1\n" * 60, "kernels/simd/x.py:f lines"),
        ("kernels", "x.py", "def f(a, b, c, d, e, f, g, h, i): ...", "kernels/x.py:f parameters"),
        ("text", "x.py", "def _f(a, b, c, d, /, e, f, *, g, h, i): ...", "text/x.py:_f parameters"),
        ("kernels", "x.py", "from numba.core import types", "kernels/x.py numba"),
        ("kernels", "x.py", "from numba import core", "kernels/x.py numba"),
        ("cli", "x.py", "def f():\n    import numba.np.ufunc.parallel", "cli/x.py numba"),
    ],
)
def test_every_broken_law_is_seen(floor, name, source, law):
    assert list(broken(floor, name, source)) == [law]


@pytest.mark.parametrize(
    "floor, name, source",
    [
        ("formulas", "x.py", "@f.gradient\ndef g(): ...\n" + "\n" * 198),
        ("kernels", "x.py", "def f():\n" + "    1\n" * 59),
        ("blocks", "x.py", 'def f():\n    """' + "\n" * 60 + '    """\n' + "    1\n" * 38),
        ("text", "x.py", "def f(a, b, c, d, e, f, g, h, i): ..."),
        ("blocks", "x.py", "class C:\n    def f(self, a, b, c, d, e, f, g, h): ..."),
        ("kernels", "compiler.py", "from numba.core import types"),
        ("kernels", "x.py", "from numba.extending import intrinsic\nfrom llvmlite import ir"),
    ],
)
def test_what_keeps_the_laws_passes(floor, name, source):
    assert not list(broken(floor, name, source))
