"""Flags and texts as users write them, JSON under any locale, and a process that is left as it was found."""

import argparse
import contextlib
import gc
import io
import json
import os
import signal
import sys
import warnings
from pathlib import Path

import pytest

from minigemma.cli import inspect
from minigemma.cli.arguments import parse
from minigemma.cli.main import main
from minigemma.cli.progress import print_json
from minigemma.cli.values import read_text, unicode


@pytest.mark.parametrize(
    "words, told",
    [
        ("generate x --temprature 1", "did you mean --temperature?"),
        ("score x --offlin3", "did you mean --offline?"),
        ("generate -p x --n-predict 3", "unknown: --n-predict; did you mean -n?"),
        ("generate x -ngl 99", "unknown: -ngl; leave it out: everything runs on the CPU"),
        ("generate x --repeat-penalty 1.1", "did you mean --repetition-penalty?"),
        ("generate -temp 0 x", "unknown: -temp; did you mean --temp?"),
        ("generate x -o file", "write > FILE"),
        ("inspect --num-ctx 9", "did you mean -c?"),
        ("inspect --n-predict 9", "unknown: --n-predict\n"),
        ("pull gemma3", "did you mean download?"),
        ("run x", "did you mean chat, or generate TEXT?"),
        ("quantize a b --dtype Q4_K_M", "did you mean int4?"),
        ("chat extra", "unknown: extra; a text with blanks stands in quotes"),
        ("generat x", "did you mean generate?"),
        ("generate x --dtype int44", "did you mean int4?"),
        ("generate x --top-k 5 --temp 0", "--top-k has no effect with --temperature 0"),
        ("generate x --stream", "goes with --json"),
        ("generate x -n 0", "0 is not at least 1"),
    ],
)
def test_wrong_usage_is_two_lines_with_a_way_out(words, told, capsys):
    with pytest.raises(SystemExit) as end:
        parse(words.split())
    err = capsys.readouterr().err
    assert end.value.code == 2 and told in err and err.count("\n") == 2
    assert "--help" in err


def test_inspect_takes_the_model_with_and_without_its_flag():
    assert parse(["inspect", "there"]).model == parse(["inspect", "-m", "there"]).model == "there"
    assert parse(["inspect"]).model == "gemma-3-270m"


@pytest.mark.parametrize(
    "words", [["-p", "-3 degrees"], ["-n5", "x"], ["-vqn5", "x"], ["--max-new", "5", "x"], ["--", "-ngl"]]
)
def test_short_and_shortened_flags_and_texts_with_dashes_are_no_unknown_flags(words):
    assert parse(["generate", *words]).command == "generate"


def test_a_pipe_needs_no_dash_and_an_empty_one_is_refused(monkeypatch, tmp_path):
    for content in ("piped\n", ""):
        (tmp_path / "text").write_text(content)
        with open(tmp_path / "text") as file:
            monkeypatch.setattr(sys, "stdin", file)
            args = parse(["generate"])
            if content:
                assert read_text(args) == content
            else:
                with pytest.raises(ValueError, match="standard input: is empty"):
                    read_text(args)
            assert read_text(parse(["generate", ""])) == ""


def test_help_of_a_command_as_its_flag(capsys):
    with pytest.raises(SystemExit):
        parse(["help", "score"])
    assert capsys.readouterr().out.startswith("usage: minigemma score")


def test_raw_and_turns_are_chosen_or_left_to_the_checkpoint():
    assert [parse(["generate", "x", *flags]).raw for flags in ([], ["--raw"], ["--turns"])] == [None, True, False]


def test_bytes_that_the_locale_cannot_decode_are_utf_8():
    stray = "café".encode().decode("ascii", "surrogateescape")
    assert unicode(stray) == "café" == unicode("café")
    with pytest.raises(argparse.ArgumentTypeError, match="not UTF-8"):
        unicode(b"\xe9t\xe9".decode("ascii", "surrogateescape"))


def test_a_byte_order_mark_is_no_part_of_a_prompt(tmp_path):
    path = tmp_path / "prompt.txt"
    path.write_bytes(b"\xef\xbb\xbfhello")
    assert read_text(parse(["generate", "-f", str(path)])) == "hello"


@pytest.mark.parametrize("encoding", ["utf-8", "ascii", "latin-1"])
def test_json_is_json_under_any_encoding(encoding, monkeypatch):
    out = io.BytesIO()
    monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(out, encoding=encoding, errors="backslashreplace"))
    print_json({"text": "café 😀"})
    sys.stdout.flush()
    assert json.loads(out.getvalue()) == {"text": "café 😀"}


def test_main_called_from_python_leaves_nothing_changed(monkeypatch):
    def state():
        hooks = warnings.formatwarning, sys.unraisablehook, signal.getsignal(signal.SIGINT)
        return *hooks, gc.get_threshold(), sys.stdout.errors, os.environ.get("HF_HUB_OFFLINE")

    monkeypatch.setattr(inspect, "show_cpu", lambda args: print("kernels"))
    before = state()
    assert main(["inspect", "--cpu", "--offline"]) == 0
    assert state() == before
    with contextlib.redirect_stdout(io.StringIO()) as out:
        assert main(["inspect", "--cpu"]) == 0
    assert out.getvalue() == "kernels\n"
    with contextlib.redirect_stderr(io.StringIO()) as err:
        assert main(["inspect", str(Path("no such model"))]) == 1
    assert state() == before and "no such file" in err.getvalue()
