"""`minigemma embed`: where texts come from and how rows are printed."""

import json

import numpy as np
import pytest

from minigemma.cli import embed
from minigemma.cli.main import main


@pytest.fixture
def calls(monkeypatch):
    """The texts and prompt of each call, answered with rows of (length of the text, 0.5)."""
    seen = []

    def rows(model, texts, prompt_name):
        seen.append((model, texts, prompt_name))
        return np.array([[len(text), 0.5] for text in texts], np.float32)

    monkeypatch.setattr(embed, "open_model", lambda args, progress: args.model)
    monkeypatch.setattr(embed, "embed", rows)
    return seen


def test_a_line_per_text(calls, capsys):
    assert main(["embed", "-m", "some", "a cow", "two", "--prompt-name", "query"]) == 0
    assert capsys.readouterr().out == "5.000000 0.500000\n3.000000 0.500000\n"
    assert calls == [("some", ["a cow", "two"], "query")]


def test_texts_from_a_file_and_json(calls, capsys, tmp_path):
    (tmp_path / "texts").write_text("a cow\nzwei Kühe\n", "utf-8")
    assert main(["embed", "-f", str(tmp_path / "texts"), "--json"]) == 0
    assert json.loads(capsys.readouterr().out) == {"dimensions": 2, "embeddings": [[5, 0.5], [9, 0.5]]}
    assert calls[0][1:] == (["a cow", "zwei Kühe"], None)


@pytest.mark.parametrize("flags", [[], ["a cow", "-f", "texts"]], ids=["no text", "texts and a file"])
def test_texts_come_from_one_place(flags, capsys):
    with pytest.raises(SystemExit):
        main(["embed", *flags])
    assert "minigemma embed" in capsys.readouterr().err
