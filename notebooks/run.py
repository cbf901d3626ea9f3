"""Run notebooks and save their outputs: python notebooks/run.py [01 02 …]; without numbers, all of them.

Each notebook stores a fingerprint of its cells and of the definitions that they import by name from the package; a test
compares it with the code, so outputs cannot be older than either. What lies deeper has tests of its own, and does not
count. The first figure is saved small in thumbnails/ for the index.
"""

from __future__ import annotations

import ast
import base64
import hashlib
import io
import os
import sys
import time
from pathlib import Path
from typing import Any

HERE = Path(__file__).parent
WIDTH = 320  # pixels of a thumbnail
LIMIT = 600  # seconds per cell, on a machine with other work, too


def fingerprint(notebook: Any, root: Path = HERE.parent) -> str:
    """Returns a hash of the code cells and of the definitions that they import from the package in `root`."""
    cells = [cell.source for cell in notebook.cells if cell.cell_type == "code"]
    lines = [line for cell in cells for line in cell.splitlines() if not line.startswith(("%", "!"))]
    imports = [node for node in ast.walk(ast.parse("\n".join(lines))) if isinstance(node, ast.ImportFrom)]
    names = {(node.module or "", name.name) for node in imports for name in node.names}
    used = [source(root, *name) for name in sorted(names) if name[0].split(".")[0] == "minigemma"]
    return hashlib.sha256("\0".join([*cells, *used]).encode()).hexdigest()[:16]


def source(root: Path, module: str, name: str) -> str:
    """Returns the code of a module, or of what it defines or imports under this name, without comments, docstrings and
    layout.
    """
    path = root.joinpath(*module.split("."))
    whole = (path / f"{name}.py").exists()
    file = path / f"{name}.py" if whole else path / "__init__.py" if path.is_dir() else path.with_suffix(".py")
    tree = ast.parse(file.read_text("utf-8"))
    for node in ast.walk(tree):
        if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef) and ast.get_docstring(node) is not None:
            node.body = node.body[1:]
    for node in () if whole else tree.body:
        if isinstance(node, ast.ImportFrom) and (
            own := [each for each in node.names if name == (each.asname or each.name)]
        ):
            package = module.split(".") if file.name == "__init__.py" else module.split(".")[:-1]
            home = package[: len(package) + 1 - node.level]
            return source(root, ".".join([*home, node.module] if node.module else home), own[0].name)
    return "\n".join(ast.unparse(node) for node in tree.body if whole or name in bound(node))


def bound(node: ast.stmt) -> list[str]:
    """Returns the names that a statement at the top of a module defines."""
    if isinstance(node, ast.FunctionDef | ast.ClassDef):
        return [node.name]
    targets = node.targets if isinstance(node, ast.Assign) else [node.target] if isinstance(node, ast.AnnAssign) else []
    return [part.id for target in targets for part in ast.walk(target) if isinstance(part, ast.Name)]


def run(path: Path) -> Any:
    """Returns the notebook with outputs of a fresh kernel; raises nbclient's CellExecutionError or CellTimeoutError."""
    import nbformat
    from nbclient import NotebookClient

    notebook = nbformat.read(path, as_version=4)
    os.environ.setdefault("PYTHONHASHSEED", "0")
    NotebookClient(notebook, timeout=LIMIT, resources={"metadata": {"path": str(HERE)}}).execute()
    for cell in notebook.cells:
        cell.metadata.pop("execution", None)  # time stamps, which would only add noise to a diff
    notebook.metadata["minigemma"] = {"source": fingerprint(notebook)}
    return notebook


def thumbnail(notebook: Any, path: Path) -> None:
    """Saves the first image among the outputs, WIDTH pixels wide; does nothing if there is none."""
    from PIL import Image

    outputs = [out for cell in notebook.cells if cell.cell_type == "code" for out in cell.outputs]
    kinds = ("image/png", "image/jpeg")
    pictures = [out.data[kind] for out in outputs for kind in kinds if kind in out.get("data", {})]
    if pictures:
        picture = Image.open(io.BytesIO(base64.b64decode(pictures[0]))).convert("RGB")
        path.parent.mkdir(exist_ok=True)
        small = picture.resize((WIDTH, round(picture.height * WIDTH / picture.width)), Image.Resampling.LANCZOS)
        small.quantize(64).save(path, optimize=True)


def main(numbers: list[str]) -> None:
    """Runs the notebooks whose names begin with one of `numbers`, in place."""
    import nbformat

    for path in sorted(HERE.glob("[0-9][0-9]_*.ipynb")):
        if numbers and path.name[:2] not in numbers:
            continue
        began = time.monotonic()
        notebook = run(path)
        nbformat.write(notebook, path)
        thumbnail(notebook, HERE / "thumbnails" / f"{path.name[:2]}.png")
        print(f"{path.name}  {time.monotonic() - began:.0f} s", flush=True)


if __name__ == "__main__":
    main(sys.argv[1:])
