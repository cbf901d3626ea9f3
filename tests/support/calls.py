"""Calls that many tests make: the command line as a process or at a terminal, and a call that must be refused."""

from __future__ import annotations

import io
import subprocess
import sys
import time

import pytest

from minigemma.cli.main import main
from minigemma.errors import ModelFormatError


def run(*words, **settings):
    """A real process."""
    command = [sys.executable, "-m", "minigemma", *words]
    return subprocess.run(command, capture_output=True, text=True, timeout=60, check=False, **settings)


def refused(call, *args):
    """The message of the ModelFormatError that `call` must raise: one short line, quickly."""
    start = time.process_time()
    with pytest.raises(ModelFormatError) as caught:
        call(*args)
    assert time.process_time() - start < 2
    message = str(caught.value)
    assert message.isprintable() and len(message.removeprefix(caught.value.path)) < 400 and caught.value.remedy
    return message


def failure(capsys, path, *words):
    """The one line of a command that must fail because of `path`."""
    assert main([*words]) == 1
    out, err = capsys.readouterr()
    assert out == "" and "Traceback" not in err
    assert err.count("\n") == 1 and err.startswith("minigemma: ")
    assert str(path) in err, "the path is not named"
    assert "; " in err, "no remedy"
    return err


class Terminal(io.StringIO):
    """A stderr that says it is a terminal."""

    def isatty(self):
        return True
