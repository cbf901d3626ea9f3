"""A module imports only from rows above its own, and every module is in a row."""

import ast
from pathlib import Path

import pytest

ROWS = """
    arrays errors backend memory views
    simd
    crew
    config taps cache amx
    sfp8 int4
    formats
    few_tokens
    many_tokens
    rmsnorm rope softcap geglu linear sampling conv1d rglru
    attention layernorm
    gqa feedforward griffin siglip ahead
    one_layer
    preview
    step
    decoder
    gemma gemma2 gemma3 recurrentgemma
    safetensors_file
    gguf_file quantize tokenizer config_file tensor_names demo images
    prompt locate
    download
    checkpoint
    random_weights generation scoring convert
    chat
    __init__
    peers
    bench
    cli
    __main__
"""
ROW = {name: row for row, names in enumerate(ROWS.strip().splitlines()) for name in names.split()}
MODULES = sorted((Path(__file__).parents[1] / "minigemma").glob("**/*.py"))


def imported(tree: ast.AST) -> set[str]:
    """Names of the package's modules that a syntax tree imports, wherever in it; the package itself is `__init__`."""
    found = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            found |= {
                f"{alias.name}.__init__".split(".")[1]
                for alias in node.names
                if alias.name.split(".")[0] == "minigemma"
            }
        elif isinstance(node, ast.ImportFrom):
            origin = ".".join(["minigemma"] * node.level + [node.module or ""]).strip(".").split(".")
            if origin[0] == "minigemma":
                found |= {origin[1]} if origin[1:] else {a.name if a.name in ROW else "__init__" for a in node.names}
    return found


@pytest.mark.parametrize("path", MODULES, ids=lambda path: path.stem)
def test_imports_run_downward(path):
    assert path.stem in ROW, f"{path.name} is in no row of this test"
    upward = {name for name in imported(ast.parse(path.read_text())) if ROW.get(name, 99) >= ROW[path.stem]}
    assert not upward, f"{path.name} (row {ROW[path.stem]}) imports {upward} from its own row or below"


@pytest.mark.parametrize(
    "line, names",
    [
        ("import numpy.linalg, os", set()),
        ("import minigemma", {"__init__"}),
        ("import minigemma.rope as r", {"rope"}),
        ("from minigemma.rope import rotate", {"rope"}),
        ("from .rope import rotate", {"rope"}),
        ("from . import rope, load", {"rope", "__init__"}),
        ("def f():\n    from .checkpoint import load", {"checkpoint"}),
        ("if TYPE_CHECKING:\n    from .decoder import Model", {"decoder"}),
    ],
)
def test_every_spelling_of_an_import_is_seen(line, names):
    assert imported(ast.parse(line)) == names
