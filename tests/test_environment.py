"""Settings in the environment are used, or refused in a sentence."""

import os
import subprocess
import sys

import pytest


@pytest.mark.parametrize(
    "name, value, told",
    [
        ("MINIGEMMA_CPU", "avx", "is none of vectors, dots, generic, emulated"),
        ("MINIGEMMA_COMPILER", "fast", "is none of plain"),
        ("NUMBA_NUM_THREADS", "0", "must be a whole number, 1 or more"),
        ("NUMBA_NUM_THREADS", "all", "must be a whole number, 1 or more"),
        ("NUMBA_OPT", "fast", "is none of 0, 1, 2, 3, max"),
        ("NUMBA_THREADING_LAYER", "pthreads", "is none of default, safe"),
    ],
)
def test_a_setting_without_a_meaning_is_refused(name, value, told):
    command = [sys.executable, "-m", "minigemma", "generate", "-m", "tiny-gemma-3", "Once"]
    done = subprocess.run(command, env={**os.environ, name: value}, capture_output=True, text=True, check=False)
    assert done.returncode == 1 and done.stdout == ""
    assert done.stderr.startswith(f"minigemma: {name}={value}: ") and told in done.stderr
    assert done.stderr.count("\n") == 1
