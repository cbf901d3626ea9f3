"""The comparison of a training step: the same weights give the same loss in torch."""

import sys

import pytest
from support.small_models import SMALL

from benchmarks import training
from minigemma.models.gemma3 import Gemma3Config
from minigemma.models.recurrentgemma import RecurrentGemmaConfig

SMALL_MINIS = {
    "gemma3": Gemma3Config(**SMALL, window=8, context=24),
    "recurrentgemma": RecurrentGemmaConfig(**SMALL, window=8, context=24, lru_width=64, gate_blocks=2),
}


def printed(monkeypatch, capsys, *words):
    monkeypatch.setattr(training, "MINIS", SMALL_MINIS)
    monkeypatch.setattr(training, "LENGTH", 24)
    monkeypatch.setattr(sys, "argv", ["training", *words, "--rounds", "1"])
    training.main()
    rows = [line.split(" | ") for line in capsys.readouterr().out.splitlines() if line.startswith("| ")]
    return {row[0].strip("| "): row for row in rows[1:]}


def test_a_step_is_measured(monkeypatch, capsys):
    assert set(printed(monkeypatch, capsys, "gemma3", "--alone")) == {"minigemma"}


@pytest.mark.oracle
@pytest.mark.parametrize("family", SMALL_MINIS)
def test_torch_begins_with_the_same_loss(family, monkeypatch, capsys):
    pytest.importorskip("torch")
    rows = printed(monkeypatch, capsys, family)
    assert float(rows["minigemma"][1]) == pytest.approx(float(rows["torch"][1]), abs=2e-5)
