"""The model for EleutherAI's harness, on a task that lies here; needs lm_eval, which no extra brings."""

import json
from pathlib import Path

import pytest

import minigemma as mg

TINY = Path(__file__).parents[2] / "weights" / "tiny-gemma-3"
ROWS = [
    {"context": "The dog", "choices": [" was", " zzz", " xqw"], "gold": 0},
    {"context": "Once upon a", "choices": [" time", " of", " Paris"], "gold": 0},
    {"context": "He said", "choices": [" qqq zzz", " that"], "gold": 1},
]


@pytest.mark.oracle
@pytest.mark.filterwarnings("ignore")  # of the harness and what it imports
def test_a_local_task(tmp_path, monkeypatch):
    pytest.importorskip("lm_eval")
    monkeypatch.setenv("HF_DATASETS_OFFLINE", "1")
    monkeypatch.setenv("HF_HOME", str(tmp_path))
    from lm_eval import simple_evaluate

    from benchmarks.harness import Harness

    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in ROWS))
    files = {"test": str(tmp_path / "rows.jsonl")}
    task = {"dataset_path": "json", "dataset_kwargs": {"data_files": files}, "test_split": "test"}
    task |= {"task": "local", "output_type": "multiple_choice", "target_delimiter": ""}
    task |= {"doc_to_text": "context", "doc_to_choice": "choices", "doc_to_target": "gold"}
    model = mg.load(TINY)
    report = simple_evaluate(Harness(model), tasks=[task], bootstrap_iters=0, log_samples=True)
    expected = 0
    for row, sample in zip(ROWS, report["samples"]["local"], strict=True):
        sums = []
        for choice, (logprob, _) in zip(row["choices"], sample["filtered_resps"], strict=True):
            ids = [model.tokenizer.bos, *model.tokenizer.encode(row["context"] + choice)]
            new = len(ids) - 1 - len(model.tokenizer.encode(row["context"]))
            sums.append(mg.score(model, ids).logprobs[-new:].sum())
            assert float(logprob) == pytest.approx(sums[-1], abs=0.05)
        expected += sums.index(max(sums)) == row["gold"]
    assert report["results"]["local"]["acc,none"] == pytest.approx(expected / len(ROWS))
