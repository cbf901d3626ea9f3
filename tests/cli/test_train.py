"""`minigemma train`: what it prints where, resuming, Ctrl-C, the curves, and one sentence for every bad input."""

import json
import signal
import subprocess
import sys
import time
from importlib.util import find_spec

import pytest
from support.runs import toy, write_text

import minigemma as mg
from minigemma.cli.main import main
from minigemma.cli.train import duration
from minigemma.files.save import save_model
from minigemma.train.initial import initial_parameters

FLAGS = "--batch-tokens 128 --seq 32 --seed 3 --eval-every 4 -t 2"


@pytest.fixture
def given(tmp_path):
    """The flags of a small run: a config.json with its tokenizer beside it, a text, and where to write."""
    config, tokenizer = toy()
    save_model(tmp_path / "shape", config, initial_parameters(config, 0), tokenizer)
    data = write_text(tmp_path)
    return ["train", "-m", str(tmp_path / "shape/config.json"), "--data", str(data), "--out", str(tmp_path / "run")]


def rows(folder):
    return [json.loads(line) for line in (folder / "run/log.jsonl").read_text().splitlines()]


def test_a_run_is_stopped_resumed_and_finished(given, tmp_path, capsys):
    assert main([*given, *FLAGS.split(), "--steps", "8", "--stop-after", "5"]) == 0
    out, err = capsys.readouterr()
    assert out.startswith(f"{tmp_path / 'run'}: step 5") and "--resume --out" in out and out.count("\n") == 1
    assert "minigemma: this takes about" in err and "held-out" in err
    resume = ["train", "--resume", "--out", str(tmp_path / "run")]
    assert main([*resume, "--json"]) == 0
    report = json.loads(capsys.readouterr().out)
    assert report["finished"] and report["step"] == 8 and report["held_out"] < 6.5
    assert [row["step"] for row in rows(tmp_path)] == list(range(1, 9))
    assert main([*resume, "-q"]) == 0
    out, err = capsys.readouterr()
    assert "step 8" in out and "finished" in out and err == ""
    assert mg.load(tmp_path / "run").config.layers == 2


def test_ctrl_c_saves_and_ends_with_130(given, tmp_path):
    command = [sys.executable, "-m", "minigemma", *given, *FLAGS.split(), "--steps", "100000"]
    process = subprocess.Popen(command, stderr=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    log = tmp_path / "run/log.jsonl"
    while process.poll() is None and not (log.exists() and log.read_text().count("\n") > 2):
        time.sleep(0.05)
    process.send_signal(signal.SIGINT)
    out, err = process.communicate(timeout=60)
    assert process.returncode == 130 and out == "" and "Traceback" not in err
    done = len(rows(tmp_path))
    assert f"stopped after step {done}; minigemma train --resume" in err
    assert main(["train", "--resume", "--out", str(tmp_path / "run"), "--stop-after", "1", "-q"]) == 0
    assert len(rows(tmp_path)) == done + 1


@pytest.mark.parametrize("limit, name", [(100_000, "state.safetensors"), (300, "ids.npy")])
def test_a_full_disk_is_one_sentence(given, tmp_path, limit, name):
    """A limit on the size of files ends writing as a full disk does."""
    code = f"import resource, sys; resource.setrlimit(resource.RLIMIT_FSIZE, ({limit}, {limit})); "
    code += "from minigemma.cli.main import main; sys.exit(main())"
    command = [sys.executable, "-c", code, *given, *FLAGS.split(), "--steps", "5"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert done.returncode == 1 and done.stdout == ""
    last = done.stderr.splitlines()[-1]
    assert name in last and last.endswith("free some space, or write elsewhere")
    assert "Traceback" not in done.stderr and not (tmp_path / "run").exists()


@pytest.mark.skipif(find_spec("matplotlib") is None, reason="matplotlib is not installed")
def test_the_curves_are_drawn(given, tmp_path, capsys):
    figure = tmp_path / "curves.png"
    assert main([*given, *FLAGS.split(), "--tokens", "0.5k", "--plot", str(figure)]) == 0
    assert figure.read_bytes().startswith(b"\x89PNG")
    assert "of 500 tokens, finished" in capsys.readouterr().out


def without(flags, *names):
    """The flags, those of these names and their values left out."""
    at = [flags.index(name) for name in names]
    return [flag for i, flag in enumerate(flags) if i not in at and i - 1 not in at]


@pytest.mark.parametrize(
    "more, said",
    [
        ("", "neither steps nor tokens is given; one of them says how long the training is"),
        ("--steps 0", "steps is 0; it must be at least 1"),
        ("--steps -3", "steps is -3; it must be at least 1"),
        ("--tokens=-1k", "tokens is -1000; it must be at least 1"),
        ("--steps 3 --tokens 500", "both steps and tokens are given; one of them says how long the training is"),
        ("--steps 3 --lr 0", "lr is 0; it must be above 0 and at most 10"),
        ("--steps 3 --warmup 200%", "warmup is 2; it is a share, from 0 to 1"),
        (
            "--steps 3 --batch-tokens 100k",
            "tokens to train on, fewer than a batch; give more text, or a batch_",
        ),
        ("--steps 3 --batch-tokens 128 --init nowhere", "nowhere"),
    ],
)
def test_wrong_settings_are_one_sentence(given, tmp_path, capsys, more, said):
    assert main([*given, *more.split()]) == 1
    out, err = capsys.readouterr()
    assert out == "" and said in err and err.count("\n") == 1 and err.startswith("minigemma: ")
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("flag, said", [("-m", "-m is missing"), ("--data", "--data is mi"), ("--out", "--out is mi")])
def test_what_a_run_needs_is_named(given, capsys, flag, said):
    with pytest.raises(SystemExit, match="2"):
        main([*without(given, flag), "--steps", "3"])
    assert said in capsys.readouterr().err


def test_a_model_without_a_tokenizer_is_refused(given, tmp_path, capsys):
    for name in ("tokenizer.model", "tokenizer.json"):
        (tmp_path / "shape" / name).unlink()
    assert main([*given, "--steps", "3"]) == 1
    assert "neither tokenizer.model nor tokenizer.json" in capsys.readouterr().err


@pytest.mark.parametrize(
    "fields, said",
    [
        ({"num_key_value_heads": 3}, "2 query heads cannot share 3 key/value heads"),
        ({"vocab_size": 100}, "vocab_size is 100, and the tokenizer has"),
        ({"hidden_size": 10**8}, "weights, gradients and two moments, and there are"),
        ({"hidden_size": 0}, "width is 0"),
    ],
)
def test_a_config_whose_sizes_do_not_fit_is_refused(given, tmp_path, capsys, fields, said):
    path = tmp_path / "shape/config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | fields))
    assert main([*given, "--steps", "3"]) == 1
    err = capsys.readouterr().err
    assert said in err and err.count("\n") == 1


def test_what_resume_cannot_do_is_refused(given, tmp_path, capsys):
    out = ["--out", str(tmp_path / "run")]
    assert main(["train", "--resume", *out]) == 1
    assert "holds no run that could be resumed; begin one without --resume" in capsys.readouterr().err
    assert main([*given, *FLAGS.split(), "--steps", "3", "--stop-after", "1", "-q"]) == 0
    capsys.readouterr()
    for flags, said in (
        ([], "--out is missing: --resume goes on"),
        ([*out, "--lr", "1"], "--lr cannot change: --resume goes on"),
    ):
        with pytest.raises(SystemExit, match="2"):
            main(["train", "--resume", *flags])
        assert said in capsys.readouterr().err
    for flags, said in (
        (given[1:], "holds another run; resume it with --resume"),
        (["--resume", *out, "--data", __file__], "is not the text that"),
    ):
        assert main(["train", *flags, *(["--steps", "3"] if "-m" in flags else [])]) == 1
        err = capsys.readouterr().err
        assert said in err and err.count("\n") == 1


def test_a_distilled_run_shows_its_divergence_and_goes_on(given, tmp_path, capsys):
    command = ["distill", *given[1:], *FLAGS.split(), "--steps", "6", "--draws", "16", "--soft", "50%"]
    with pytest.raises(SystemExit, match="2"):
        main(command)
    assert "--teacher is missing" in capsys.readouterr().err
    assert main([*command, "--teacher", str(tmp_path / "shape"), "--stop-after", "4"]) == 0
    assert "  KL " in capsys.readouterr().err
    assert main(["train", "--resume", "--out", str(tmp_path / "run"), "-q"]) == 0
    assert len(found := rows(tmp_path)) == 6 and all(0 < row["kl"] < row["loss"] for row in found)
    capsys.readouterr()
    with pytest.raises(SystemExit, match="2"):
        main(["distill", "--resume", "--out", str(tmp_path / "run"), "--draws", "32"])
    assert "--draws cannot change" in capsys.readouterr().err


def test_no_matplotlib_is_said_before_anything_is_trained(given, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr("minigemma.cli.roofline.find_spec", lambda name: None)
    assert main([*given, "--steps", "3", "--plot", str(tmp_path / "x.png")]) == 1
    assert "matplotlib, which is not installed" in capsys.readouterr().err
    assert not (tmp_path / "run").exists()


def test_durations():
    assert [duration(s) for s in (4.4, 99, 150, 7300)] == ["4 s", "99 s", "2.5 min", "2.0 h"]
