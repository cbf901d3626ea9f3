"""The recorded runs of notebooks 18 and 19 say what the documentation says, and their tasks ask what they claim."""

import json
import sys
from pathlib import Path

import numpy as np
import pytest

ROOT = Path(__file__).parents[2]
sys.path.insert(0, str(ROOT / "notebooks"))

from runs import distillation, recall  # noqa: E402


def test_distilled_students_predict_better_with_every_seed():
    record = json.loads(distillation.RECORD.read_text("utf-8"))
    for seed in distillation.SEEDS:
        soft, hard = (record[distillation.Run(targets, 72, seed).name]["course"] for targets in distillation.PAIR)
        assert all(with_teacher[2] < alone[2] for with_teacher, alone in zip(soft, hard, strict=True))
    told = (ROOT / "docs/training.md").read_text("utf-8")
    for row in distillation.table(record).splitlines()[:6]:
        assert row in told


def test_recorded_recall_is_the_trained_models():
    record = json.loads(recall.RECORD.read_text("utf-8"))
    assert set(record) == {f"{task}, {model}" for task in recall.TASKS for model in recall.MODELS}
    assert recall.table(record).count("\n") == 1 + len(record)


@pytest.mark.parametrize("name", recall.TASKS)
def test_every_answer_stands_as_far_back_as_it_is_said_to(name):
    ids, answers, distance = recall.TASKS[name](np.random.default_rng(0), 20, 40)
    rows, columns = np.nonzero(answers >= 0)
    assert (ids[rows, columns - distance[rows, columns]] == answers[rows, columns]).all()
    assert (ids[rows, columns] == recall.SPECIAL).all() and len(rows) == 20 * (1 if name == "induction" else 4)
    assert (distance[rows, columns] > 0).all()
