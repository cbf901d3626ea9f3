"""docs/api.md has every public name and is as new as the docstrings."""

from __future__ import annotations

import importlib.util
from pathlib import Path

import minigemma as mg

DOCS = Path(__file__).parents[2] / "docs"


def test_the_page_is_made_from_the_docstrings_and_has_every_public_name():
    spec = importlib.util.spec_from_file_location("make_api", DOCS / "make_api.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    page = (DOCS / "api.md").read_text("utf-8")
    assert all(f"### `mg.{name}`\n" in page for name in mg.__all__)
    assert module.main(check=True) == 0, "python docs/make_api.py"
