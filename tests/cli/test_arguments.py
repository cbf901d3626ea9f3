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
