"""Lines that a Ray cluster answers are those that this process would answer; needs the extra [ray]."""

import json
import os
import time
from functools import partial
from importlib.util import find_spec
from pathlib import Path

import pytest

from minigemma import cli
from minigemma.cli import batch_ray

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


def mortal(notes):
    """An Actor that leaves a note when it begins; the first to get lines waits for another, and is lost with them."""

    class Mortal(batch_ray.Actor):
        def __init__(self, args):
            super().__init__(args)
            (notes / f"{os.getpid()} has {self.model.threads} threads").touch()

        def __call__(self, batch):
            try:
                (notes / "lost").touch(exist_ok=False)
            except FileExistsError:
                return super().__call__(batch)
            end = time.monotonic() + 60
            while len(list(notes.iterdir())) < 3 and time.monotonic() < end:
                time.sleep(0.05)
            os._exit(1)

    return Mortal


@pytest.mark.oracle
@pytest.mark.filterwarnings("ignore")  # of Ray about itself
def test_two_actors_of_one_thread_of_which_one_is_lost_answer_as_this_process_does(tmp_path, monkeypatch):
    ray, notes = pytest.importorskip("ray"), tmp_path / "notes"
    notes.mkdir()
    monkeypatch.setattr(ray, "init", partial(ray.init, num_cpus=2))
    monkeypatch.setattr(batch_ray, "Actor", mortal(notes))
    code, rows, count = answers(tmp_path, "--engine", "ray")
    ray.shutdown()
    assert (code, rows, count) == answers(tmp_path)
    assert count == 30 and "n is 2" in rows[7]["error"]
    begun = {path.name for path in notes.iterdir()} - {"lost"}
    assert len(begun) >= 3 and all(name.endswith("has 1 threads") for name in begun)  # two, and one more for the lost


@pytest.mark.skipif(find_spec("ray") is not None, reason="Ray is installed")
def test_without_the_extra_one_sentence(tmp_path, capsys):
    (tmp_path / "in.jsonl").write_text('{"prompt": "a"}\n')
    words = ["batch", str(tmp_path / "in.jsonl"), str(tmp_path / "out.jsonl"), "--engine", "ray"]
    assert cli.main(words) == 1
    assert capsys.readouterr().err.endswith('--engine ray takes Ray: pip install "minigemma[ray]"\n')
    assert not (tmp_path / "out.jsonl").exists()
