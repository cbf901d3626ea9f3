"""Runs: what a step does, that resuming goes on bit for bit, what is written, and what is refused."""

import gc
import json
import math
import signal
import subprocess
import sys
import threading

import numpy as np
import pytest
from support.runs import toy, write_text

import minigemma as mg
from minigemma.errors import FileError
from minigemma.train import trainer
from minigemma.train.checkpoint import LOG, SETTINGS, STATE, beginning
from minigemma.train.trainer import Training

SMALL = {"batch_tokens": 128, "seq": 32, "eval_every": 4, "save_every": 100, "seed": 3}


def begin(folder, kind="gemma3", out="run", **more):
    out = folder / out if out else None
    return Training(toy(kind), write_text(folder), out, threads=2, **{"steps": 8} | SMALL | more)


def rows(run):
    return [json.loads(line) for line in (run / LOG).read_text().splitlines()]


def timeless(run):
    """The rows of a log, without how long they took."""
    return [{name: value for name, value in row.items() if "second" not in name} for row in rows(run)]


@pytest.mark.parametrize("kind, qat", [("gemma3", None), ("recurrentgemma", None), ("gemma3", "int4")])
def test_a_run_resumed_half_way_equals_one_that_was_not_stopped(tmp_path, kind, qat):
    whole = begin(tmp_path, kind, "whole", qat=qat)
    list(whole)
    half = begin(tmp_path, kind, "half", qat=qat)
    for _ in range(4):
        half.step()
    half.save()
    for _ in range(2):  # these come after the checkpoint, and are lost
        half.step()
    again = Training.resume(tmp_path / "half")
    assert again.counters.step == 4 and not again.finished
    assert [step.number for step in again] == [5, 6, 7, 8]
    for name in ("weights", "means", "squares"):
        np.testing.assert_array_equal(getattr(again.adam, name), getattr(whole.adam, name))
    assert timeless(tmp_path / "half") == timeless(tmp_path / "whole")
    for file in ("model.safetensors", "best/model.safetensors", STATE):
        assert (tmp_path / "half" / file).read_bytes() == (tmp_path / "whole" / file).read_bytes(), file


def test_the_log_and_the_folder_are_what_was_trained(tmp_path):
    run = begin(tmp_path, sample_every=4, prompt="Jack", lr=0.01)
    steps = list(run)
    found = rows(tmp_path / "run")
    assert [row["step"] for row in found] == list(range(1, 9))
    assert [row["tokens"] for row in found] == np.cumsum(np.diff([0, *(s.tokens for s in steps)])).tolist()
    assert all({"loss", "lr", "norm", "tokens_per_second"} <= row.keys() for row in found)
    assert [("held_out" in row, "sample" in row) for row in found] == [(i % 4 == 0,) * 2 for i in range(1, 9)]
    assert found[-1]["loss"] < found[0]["loss"] and found[-1]["lr"] == pytest.approx(0.001)
    for folder in ("run", "run/best"):
        model = mg.load(tmp_path / folder)
        ids = [model.tokenizer.bos, *model.tokenizer.encode("Jack and Jill")]
        np.testing.assert_allclose(model.forward(ids), run.model.forward(ids), rtol=0, atol=1e-4)
        assert isinstance(mg.generate(model, "Jack", max_new_tokens=5, seed=1), str)
    best = mg.load(tmp_path / "run/best")
    assert run.counters.best == min(row["held_out"] for row in found if "held_out" in row)
    assert best.config.vocab == run.config.vocab


@pytest.mark.parametrize("micro", [16, 48, 128])
def test_micro_batches_add_up_to_the_batch(tmp_path, micro):
    whole, parts = (begin(tmp_path, out=None, seq=16, micro_tokens=size) for size in (128, micro))
    first, second = whole.step(), parts.step()
    assert first.loss == pytest.approx(second.loss, rel=1e-6) and first.norm == pytest.approx(second.norm, rel=1e-5)
    # The first moments, 0.1 of the gradient: Adam's first step is the sign of a gradient, also of one that rounds to 0.
    means = whole.adam.means
    np.testing.assert_allclose(parts.adam.means, means, rtol=0, atol=2e-6 * np.abs(means).max())


def test_every_token_counts_the_same_however_long_its_window_is(tmp_path):
    """A mean of means over micro-batches would weigh tokens of short windows more."""
    path = tmp_path / "text.jsonl"
    path.write_text("".join(json.dumps({"text": "ab" * n}) + "\n" for n in (1, 30, 2, 25, 3, 28)), "utf-8")
    runs = [
        Training(toy(), path, steps=3, seq=60, batch_tokens=170, micro_tokens=size, held_out=0) for size in (60, 170)
    ]
    steps = [run.step() for run in runs]
    assert steps[0].loss == pytest.approx(steps[1].loss, rel=1e-6)
    assert steps[0].norm == pytest.approx(steps[1].norm, rel=1e-5)


def test_one_batch_is_learned_by_heart(tmp_path):
    path = write_text(tmp_path, times=1)
    run = Training(
        toy(),
        path,
        steps=200,
        batch_tokens=64,
        seq=32,
        lr=0.02,
        warmup=0.1,
        held_out=0,
        weight_decay=0.0,
        eval_every=999,
    )
    run.order = trainer.Order(run.order.windows[:2], 0)
    losses = [step.loss for step in run]
    assert losses[0] > 5 and losses[-1] < 0.1


def test_a_length_in_tokens_ends_with_the_step_that_reaches_it(tmp_path):
    run = begin(tmp_path, steps=None, tokens=500)
    steps = list(run)
    assert steps[-2].tokens < 500 <= steps[-1].tokens and steps[-1].lr == pytest.approx(0.0002)


def test_a_step_without_a_finite_loss_is_skipped_and_said(tmp_path, monkeypatch):
    run = begin(tmp_path)
    run.step()
    before, exact = run.adam.weights.copy(), trainer.loss_and_gradients
    monkeypatch.setattr(trainer, "loss_and_gradients", lambda *args: exact(*args) * np.float32(np.nan))
    step = run.step()
    assert step.skipped and math.isnan(step.loss)
    np.testing.assert_array_equal(run.adam.weights, before)
    assert "NaN" not in (tmp_path / "run" / LOG).read_text()
    assert rows(tmp_path / "run")[-1]["loss"] is None and rows(tmp_path / "run")[-1]["skipped"]
    monkeypatch.setattr(trainer, "loss_and_gradients", exact)
    assert not run.step().skipped and run.adam.updates == 2
    monkeypatch.setattr(trainer, "loss_and_gradients", lambda *args: exact(*args) * np.float32(np.inf))
    monkeypatch.setattr(trainer, "GIVE_UP", 3)
    with pytest.raises(ValueError, match="lower learning rate"):
        for _ in range(3):
            run.step()


def test_ctrl_c_waits_for_the_end_of_the_step(tmp_path, monkeypatch):
    run, exact = begin(tmp_path), trainer.loss_and_gradients

    def pressed(*args):
        signal.raise_signal(signal.SIGINT)
        return exact(*args)

    monkeypatch.setattr(trainer, "loss_and_gradients", pressed)
    with pytest.raises(KeyboardInterrupt):
        run.step()
    assert run.counters.step == 1 and len(rows(tmp_path / "run")) == 1
    monkeypatch.setattr(trainer, "loss_and_gradients", lambda *args: (pressed(*args), pressed(*args)))
    with pytest.raises(KeyboardInterrupt):
        run.step()
    assert run.counters.step == 1


def test_a_run_in_another_thread_takes_no_signal(tmp_path):
    found = []
    worker = threading.Thread(target=lambda: found.append(begin(tmp_path, out=None).step()))
    worker.start()
    worker.join()
    assert found[0].number == 1


def test_a_full_disk_leaves_the_last_checkpoint(tmp_path, monkeypatch):
    run = begin(tmp_path)
    for _ in range(3):
        run.step()
    run.save()
    before = {path: path.read_bytes() for path in (tmp_path / "run").rglob("*.safetensors")}

    def full(path, *_):
        path.write_bytes(b"half")
        raise OSError(28, "No space left on device", str(path))

    run.step()
    monkeypatch.setattr("minigemma.train.checkpoint.write_safetensors", full)
    with pytest.raises(OSError, match="No space left"):
        run.save()
    assert {path: path.read_bytes() for path in before} == before
    assert not list((tmp_path / "run").rglob("*.partial"))
    assert Training.resume(tmp_path / "run").counters.step == 3


def test_parameters_of_another_run_are_a_beginning(tmp_path):
    list(first := begin(tmp_path, steps=2))
    second = begin(tmp_path, out=None, init=tmp_path / "run")
    for name, values in first.adam.parameters.items():
        np.testing.assert_array_equal(second.adam.parameters[name], values)
    with pytest.raises(ValueError, match=r"is missing|and this model's is"):
        begin(tmp_path, "recurrentgemma", None, init=tmp_path / "run")


@pytest.mark.parametrize(
    "settings, said",
    [
        ({"steps": 0}, "steps is 0; it must be at least 1"),
        ({"steps": None}, "neither steps nor tokens"),
        ({"tokens": 5}, "both steps and tokens"),
        ({"steps": None, "tokens": -1}, "tokens is -1"),
        ({"seed": -1}, "seed is -1"),
        ({"lr": 0.0}, "lr is 0; it must be above 0"),
        ({"lr": math.nan}, "lr is nan"),
        ({"clip": -1.0}, "clip is -1"),
        ({"warmup": 1.5}, "warmup is 1.5; it is a share"),
        ({"weight_decay": -0.1}, "weight_decay is -0.1"),
        ({"seq": 65}, "longer than the model's context of 64"),
        ({"seq": 300}, "longer than a batch of 128"),
        (
            {"batch_tokens": 10**6},
            r"text.txt: has 1,... tokens to train on, fewer than a batch; give more text, or .* below 1,000,000",
        ),
    ],
)
def test_settings_that_do_not_fit_are_refused_and_nothing_is_written(tmp_path, settings, said):
    with pytest.raises(ValueError, match=said) as error:
        begin(tmp_path, **settings)
    assert "\n" not in str(error.value) and not (tmp_path / "run").exists()


def test_a_folder_that_is_there_is_refused(tmp_path):
    (tmp_path / "run").mkdir()
    (tmp_path / "run/mine.txt").write_text("mine")
    with pytest.raises(FileError, match="exists already and is no run"):
        begin(tmp_path)
    assert [path.name for path in (tmp_path / "run").iterdir()] == ["mine.txt"]
    begin(tmp_path, out="second")
    with pytest.raises(FileError, match="holds another run; resume it"):
        begin(tmp_path, out="second")


def test_a_folder_in_which_another_process_trains_is_refused(tmp_path):
    begin(tmp_path)
    gc.collect()  # nothing of this process holds it
    run, code = tmp_path / "run", "import fcntl, sys; file = open(sys.argv[1], 'a'); fcntl.lockf(file, fcntl.LOCK_EX); "
    command = [sys.executable, "-c", code + "print(flush=True); input()", str(run / "run/lock")]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as other:
        other.stdout.readline()
        with pytest.raises(FileError, match="is being trained in by another process; wait for its end"):
            Training.resume(run)
        other.communicate(b"\n")
    first = Training.resume(run)
    assert Training.resume(run).counters == first.counters  # one process may open it twice


def test_two_runs_that_begin_at_once_leave_one_of_them(tmp_path):
    (tmp_path / "run/run").mkdir(parents=True)  # by the other one, after the folder was found to be free
    with pytest.raises(FileError, match="exists already"), beginning(tmp_path / "run"):
        pass
    assert (tmp_path / "run/run").is_dir()


@pytest.mark.parametrize(
    "changed", [{"threads": "two"}, {"threads": None}, {"trained": -3}, {"trained": "x"}, {"settings": {"steps": "x"}}]
)
def test_settings_that_no_run_has_written_are_refused(tmp_path, changed):
    begin(tmp_path)
    path = tmp_path / "run" / SETTINGS
    path.write_text(json.dumps(json.loads(path.read_text()) | changed))
    with pytest.raises(FileError, match=r"settings.json: is damaged \(.*\); start a new run"):
        Training.resume(tmp_path / "run")


def test_what_cannot_be_resumed_is_refused(tmp_path):
    with pytest.raises(FileError, match="holds no run that could be resumed"):
        Training.resume(tmp_path)
    begin(tmp_path)
    run = tmp_path / "run"
    other = tmp_path / "other.txt"
    other.write_text("another text")
    with pytest.raises(FileError, match=r"other.txt: is not the text that .*run was begun with"):
        Training.resume(run, other)
    Training.resume(run, tmp_path / "text.txt")
    whole = (run / STATE).read_bytes()
    spoilt = bytearray(whole)
    spoilt[len(whole) // 2] ^= 1
    for content, said in ((bytes(spoilt), "its checksum is another"), (whole[:-9], "bytes"), (b"", ""), (None, "")):
        if content is None:
            (run / STATE).unlink()
        else:
            (run / STATE).write_bytes(content)
        with pytest.raises(FileError, match=f"state.safetensors: .*{said}.*; its run cannot go on") as error:
            Training.resume(run)
        assert "\n" not in str(error.value)
    (run / STATE).write_bytes(whole)
    ids = np.load(run / "run/ids.npy")
    ids[5] ^= 1
    np.save(run / "run/ids.npy", ids)
    with pytest.raises(FileError, match="holds other ids"):
        Training.resume(run)


def test_a_model_too_large_for_the_machine_is_refused(tmp_path, monkeypatch):
    monkeypatch.setattr("minigemma.files.memory.memory_limit", lambda: 10**6)
    with pytest.raises(ValueError, match="weights, gradients and two moments, and there are"):
        begin(tmp_path)
