"""Models on this machine: which are listed, which are removed, what a released size takes without files."""

import json
import sys

import pytest
from support.calls import Terminal
from support.folders import CONFIGS, random_weights, write_folder, write_gguf

from minigemma.cli.main import main
from minigemma.files import demo, local, resolve


@pytest.fixture
def places(tmp_path, monkeypatch):
    """A weights folder with a GGUF file, a hub cache with a folder and something else, and the demo."""
    hub, weights = tmp_path / "hub", tmp_path / "weights"
    config = CONFIGS["gemma3"]
    for path in (weights, hub):
        path.mkdir()
    write_gguf(weights / "own.gguf", config, random_weights(config))
    (weights / "README.md").write_text("about weights")
    snapshot = hub / "models--google--small-it" / "snapshots" / "abc"
    snapshot.parent.mkdir(parents=True)
    write_folder(snapshot, config, random_weights(config))
    (hub / "models--bert--base").mkdir()
    (tmp_path / demo.FILE).write_bytes(b"not one")
    monkeypatch.setenv("HF_HUB_CACHE", str(hub))
    monkeypatch.setenv("MINIGEMMA_CACHE", str(tmp_path))
    for module in (resolve, local):
        monkeypatch.setattr(module, "weights_folders", lambda: [weights])
    return tmp_path


def listed(capsys):
    assert main(["list", "--json"]) == 0
    return {found["name"]: found for found in map(json.loads, capsys.readouterr().out.splitlines())}


def test_models_are_listed_with_size_and_kind(places, capsys):
    found = listed(capsys)
    assert list(found) == ["own.gguf", "google/small-it", "gemma-3-270m"]
    assert found["own.gguf"]["kind"] == "gemma3, pretrained only"
    assert found["google/small-it"]["kind"] == "gemma3, instruction-tuned"
    assert found["own.gguf"]["bytes"] == (places / "weights" / "own.gguf").stat().st_size
    assert found["gemma-3-270m"]["kind"].startswith("cannot be used: ")
    assert main(["list"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].split()[0] == "own.gguf" and "MB  gemma3, pretrained only" in lines[0]


@pytest.mark.parametrize(
    "name, gone", [("own.gguf", "own.gguf"), ("small-it", "google/small-it"), (demo.NAME, demo.NAME)]
)
def test_a_model_is_removed_and_the_others_stay(name, gone, places, capsys):
    before = listed(capsys)
    assert main(["remove", name, "--yes"]) == 0
    assert capsys.readouterr().out.startswith(f"removed {gone}, ")
    assert listed(capsys).keys() == before.keys() - {gone}


def test_nothing_is_removed_without_an_answer(places, monkeypatch, capsys):
    before = listed(capsys)
    assert main(["remove", "own.gguf"]) == 1
    assert "--yes removes it" in capsys.readouterr().err
    for answer, left in (("\n", len(before)), ("no\n", len(before)), ("y\n", len(before) - 1)):
        typed = Terminal(answer)
        monkeypatch.setattr(sys, "stdin", typed)
        main(["remove", "own.gguf"])
        assert "? [y/N] " in capsys.readouterr().err
        assert len(listed(capsys)) == left


@pytest.mark.parametrize("name", ["../hub", "/", ".", "README.md", "own", "base"])
def test_only_what_is_listed_can_be_removed(name, places, capsys):
    before = listed(capsys)
    assert main(["remove", name, "-y"]) == 1
    told = "is not the name of a local model; local models: own.gguf, google/small-it"
    assert told in capsys.readouterr().err
    assert listed(capsys) == before


def test_of_a_link_the_link_alone_is_removed(places, capsys):
    elsewhere = places / "elsewhere"
    write_folder(elsewhere, CONFIGS["gemma"], random_weights(CONFIGS["gemma"]))
    (places / "weights" / "linked").symlink_to(elsewhere)
    assert main(["remove", "linked", "-y"]) == 0
    capsys.readouterr()
    assert (elsewhere / "model.safetensors").exists() and "linked" not in listed(capsys)


def test_no_model_says_how_to_get_one(places, capsys):
    for name in listed(capsys):
        main(["remove", name, "-y"])
    capsys.readouterr()
    assert main(["list"]) == 0
    out, err = capsys.readouterr()
    assert out == "" and "minigemma download google/gemma-3-1b-it" in err


# ------------------------------------------------------------------------------------------------------- inspect


def test_memory_of_a_released_size_is_planned_without_files(capsys):
    assert main(["inspect", "--shape", "gemma-2-9b", "--dtype", "int4-symmetric", "-c", "4096", "--json"]) == 0
    report = json.loads(capsys.readouterr().out)
    assert report["parameters"] == 9_241_705_984 and report["files"] == {} and report["kind"] == "a released size"
    assert 0.55 < report["memory"]["weights"] / report["parameters"] < 0.7
    assert main(["inspect", "--shape", "gemma-3-4b"]) == 0
    assert "none: as released" in (out := capsys.readouterr().out) and "vision" in out
    assert main(["inspect", "--shape", "gemma-9"]) == 1
    assert "no released size is named 'gemma-9'" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        main(["inspect", "--shape", "gemma-3-4b", "--check"])


def test_a_check_that_finds_nothing_says_so(places, capsys):
    assert main(["inspect", str(places / "weights" / "own.gguf"), "--check"]) == 0
    assert "tensors are finite" in capsys.readouterr().out
