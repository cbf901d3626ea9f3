"""docs/architecture/*.svg are drawn from the configs and are as new as they are."""

from __future__ import annotations

import importlib.util
import xml.etree.ElementTree as ElementTree
from pathlib import Path

import pytest

from minigemma.models.registry import RELEASED

DOCS = Path(__file__).parents[2] / "docs"


@pytest.fixture(scope="module")
def drawing():
    spec = importlib.util.spec_from_file_location("make_pictures", DOCS / "make_pictures.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_the_drawings_are_as_new_as_the_configs(drawing):
    assert drawing.main(check=True) == 0, "python docs/make_pictures.py"


@pytest.mark.parametrize("name", [name for name in RELEASED if not name.startswith("embedding")])
def test_the_parts_add_up_to_the_parameters_of_the_config(drawing, name):
    counts, config = drawing.parameters(RELEASED[name]), RELEASED[name]
    assert counts["embedding"] == config.embedding_parameters
    assert sum(counts.values()) == config.embedding_parameters + config.non_embedding_parameters


def test_drawings_are_well_formed_and_name_their_model(drawing):
    for name, svg in drawing.pictures().items():
        words = " ".join(ElementTree.fromstring(svg).itertext())
        assert (drawing.DRAWN.get(name.removesuffix(".svg")) or "gemma-3-270m") in words
