"""The command `bench`."""

import json
from dataclasses import replace

import pytest

from minigemma.cli.main import main
from minigemma.models.registry import RELEASED


@pytest.fixture(autouse=True)
def small(monkeypatch, small_machine):
    """A 270M whose vocabulary is small."""
    monkeypatch.setitem(RELEASED, "gemma-3-270m", replace(RELEASED["gemma-3-270m"], vocab=4096))


def test_command_line(capsys):
    arguments = ["--prompt-tokens", "9", "-n", "2", "-r", "1", "--positions", "100,30000", "--json", "-q"]
    assert main(["bench", "--shape", "gemma-3-270m", "--dtype", "int4", *arguments]) == 0
    report = json.loads(capsys.readouterr().out)
    assert (report["name"], report["dtype"], report["weights"]) == ("gemma-3-270m", "int4", "random")
    assert main(["bench", "--shape", "gemma-9"]) == 1
    assert capsys.readouterr().err.startswith("minigemma: no released model is named 'gemma-9'")


@pytest.mark.oracle
def test_plot_on_the_command_line(tmp_path, capsys, monkeypatch):
    pytest.importorskip("matplotlib")
    path = tmp_path / "roof.svg"
    sizes = ["--shape", "gemma-3-270m", "--layers", "1", "--dtype", "int4", "-n", "1", "-r", "1", "-q"]
    assert main(["bench", *sizes, "--prompt-tokens", "5,2", "--plot", str(path)]) == 0
    assert "a prompt    of 2 tokens: minigemma" in capsys.readouterr().out
    assert path.read_text().startswith("<?xml")
    assert main(["bench", *sizes, "--plot", "roof.docx"]) == 1
    assert "use .png, or one of" in capsys.readouterr().err
    assert main(["bench", *sizes, "--plot", str(tmp_path / "no" / "roof.png")]) == 1
    assert "No such folder" in capsys.readouterr().err
    monkeypatch.setattr("minigemma.cli.roofline.find_spec", lambda name: None)
    assert main(["bench", *sizes, "--plot", str(path)]) == 1
    assert capsys.readouterr().err.endswith("pip install matplotlib\n")
