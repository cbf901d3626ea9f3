"""Lines that a Ray cluster answers are those that this process would answer; needs the extra [ray]."""

import json
from importlib.util import find_spec
from pathlib import Path

import pytest

from minigemma import cli

TINY = Path(__file__).parents[2] / "weights" / "tiny-gemma-3"


def answers(tmp_path, *flags):
    (tmp_path / "in.jsonl").write_text(
        "".join(json.dumps({"prompt": f"Day {i}", "id": i} | ({"n": 2} if i == 7 else {})) + "\n" for i in range(30))
    )
    words = ["batch", str(tmp_path / "in.jsonl"), str(tmp_path / "out.jsonl"), "-m", str(TINY), "-t", "1", "-q"]
    code = cli.main([*words, "-n", "5", "--temperature", "0", "--parallel", "2", *flags])
    rows = [json.loads(line) for line in (tmp_path / "out.jsonl").read_text().splitlines()]
    (tmp_path / "out.jsonl").unlink()
    return code, {row.pop("id"): row for row in rows}, len(rows)


@pytest.mark.oracle
@pytest.mark.filterwarnings("ignore")  # of Ray about itself
def test_a_cluster_answers_as_this_process_does(tmp_path):
    pytest.importorskip("ray")
    code, rows, count = answers(tmp_path, "--engine", "ray")
    assert (code, rows, count) == answers(tmp_path)
    assert count == 30 and "n is 2" in rows[7]["error"]


@pytest.mark.skipif(find_spec("ray") is not None, reason="Ray is installed")
def test_without_the_extra_one_sentence(tmp_path, capsys):
    (tmp_path / "in.jsonl").write_text('{"prompt": "a"}\n')
    words = ["batch", str(tmp_path / "in.jsonl"), str(tmp_path / "out.jsonl"), "--engine", "ray"]
    assert cli.main(words) == 1
    assert capsys.readouterr().err.endswith('--engine ray takes Ray: pip install "minigemma[ray]"\n')
    assert not (tmp_path / "out.jsonl").exists()
