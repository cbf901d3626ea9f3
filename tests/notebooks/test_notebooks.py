"""Every notebook runs on a fresh kernel, in time, and its committed outputs are those of its code."""

import sys
from pathlib import Path

import numpy as np
import pytest

nbformat = pytest.importorskip("nbformat", reason='pip install -e ".[notebooks]"')
pytest.importorskip("nbclient", reason='pip install -e ".[notebooks]"')
plt = pytest.importorskip("matplotlib.pyplot", reason='pip install -e ".[notebooks]"')

HERE = Path(__file__).parents[2] / "notebooks"
sys.path.insert(0, str(HERE))

import figures  # noqa: E402
from run import fingerprint, run, source  # noqa: E402

pytestmark = pytest.mark.oracle  # jupyter and matplotlib are no part of [test]
NOTEBOOKS = sorted(HERE.glob("[0-9][0-9]_*.ipynb"))
HELPER_LINES = 15  # the longest definition in a notebook; what is longer lives in the package or in figures.py


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_outputs_are_those_of_the_code(path):
    notebook = nbformat.read(path, as_version=4)
    code = [cell for cell in notebook.cells if cell.cell_type == "code" and cell.source.strip()]
    message = f"run it again: python notebooks/run.py {path.name[:2]}"
    assert notebook.metadata.get("minigemma", {}).get("source") == fingerprint(notebook), message
    assert [cell.execution_count for cell in code] == list(range(1, len(code) + 1)), message
    assert not [out for cell in code for out in cell.outputs if out.output_type == "error"], message


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_it_says_what_it_follows_and_ends_with_asserts(path):
    cells = nbformat.read(path, as_version=4).cells
    assert cells[0].cell_type == "markdown" and "arXiv" in cells[0].source, "the paper and its section come first"
    last = [cell.source for cell in cells if cell.cell_type == "code"][-1]
    assert last.count("assert ") >= 3
    for cell in cells:
        assert cell.cell_type != "code" or longest_definition(cell.source) <= HELPER_LINES


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_it_runs(path, demo_file):
    run(path)


def test_a_fingerprint_follows_what_a_module_only_passes_on(tmp_path):
    package = tmp_path / "minigemma" / "simd"
    package.mkdir(parents=True)
    (package / "__init__.py").write_text("from .cpu import LANES as WIDTH\nfrom ..arrays import F32\n")
    (package / "cpu.py").write_text("LANES = 8\nROWS = 6\n")
    (tmp_path / "minigemma" / "arrays.py").write_text("F32 = float\n")
    assert source(tmp_path, "minigemma.simd", "WIDTH") == "LANES = 8"
    assert source(tmp_path, "minigemma.simd", "F32") == "F32 = float"
    assert source(tmp_path, "minigemma.simd.cpu", "ROWS") == "ROWS = 6"


def longest_definition(source):
    """Lines of the longest function or class in a cell."""
    import ast

    lines = [line for line in source.splitlines() if not line.startswith(("%", "!"))]
    nodes = (node for node in ast.walk(ast.parse("\n".join(lines))) if isinstance(node, ast.FunctionDef | ast.ClassDef))
    return max((node.end_lineno - node.lineno + 1 for node in nodes), default=0)


def test_the_index_names_every_notebook():
    index = (HERE / "README.md").read_text("utf-8")
    assert NOTEBOOKS
    for path in NOTEBOOKS:
        assert f"({path.name})" in index


@pytest.fixture
def axes():
    drawn, made = figures.figure()
    yield made
    plt.close(drawn)


def test_stacked_bars_end_where_their_parts_add_up_to(axes):
    figures.stacked_bars(axes, ["a", "b"], {"x": [1, 2], "y": [3, 5]}, "MB")
    ends = [bar.get_x() + bar.get_width() for bar in axes.patches]
    assert ends == [1, 2, 4, 7]
    assert axes.yaxis_inverted()


def test_matrix_and_its_labels(axes):
    image = figures.matrix(axes, np.eye(3), "title", "keys", "queries")
    figures.token_labels(axes, ["a", " b", "\n"])
    assert image.get_array().shape == (3, 3)
    assert [label.get_text() for label in axes.get_xticklabels()] == ["a", "␣b", "⏎"]
    assert axes.get_ylabel() == "queries"
