"""Old names of modules lead to the new ones, with a warning."""

import importlib
import sys

import pytest

from minigemma.moved import MOVED


@pytest.mark.parametrize("name", MOVED)
def test_an_old_name_is_the_module_that_took_its_place(name, monkeypatch):
    monkeypatch.delitem(sys.modules, f"minigemma.{name}", raising=False)
    moved = importlib.import_module(f"minigemma.{MOVED[name]}")
    with pytest.warns(DeprecationWarning, match=f"minigemma.{MOVED[name]} now"):
        old = importlib.import_module(f"minigemma.{name}")
    assert old is moved and old.__spec__.name == f"minigemma.{MOVED[name]}"


def test_other_names_do_not_exist():
    with pytest.raises(ModuleNotFoundError):
        importlib.import_module("minigemma.crew")
