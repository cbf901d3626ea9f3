"""A first run compiles on two cores: what the other process has compiled is read, and nothing hangs on it."""

import os
import subprocess
import sys
import time
from pathlib import Path

import numba
import pytest

from minigemma import ahead, cli
from minigemma.backend import elsewhere

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="only Linux forks safely here")

BEGIN = """
import os, signal, sys, time
from minigemma.ahead import calls, compile_ahead
from minigemma.backend import elsewhere
begun = time.monotonic()
compile_ahead(1)
assert len(elsewhere) == len(calls(1, False))
"""
SAY = """
for kernel, call in calls(1, False).items():
    call()
    print(kernel.py_func.__name__, len(kernel.signatures), sum(kernel.stats.cache_hits.values()))
print(sorted(kernel.py_func.__name__ for kernel in elsewhere))
"""
KERNELS = ["turn_all", "attend_few", "gated_rows", "log_sums"]


def run(code: str, folder: Path) -> list[str]:
    """What a program prints whose kernels are cached in this folder."""
    there = os.environ | {"NUMBA_CACHE_DIR": str(folder)}
    done = subprocess.run([sys.executable, "-c", code], env=there, capture_output=True, text=True, timeout=300)
    assert not done.returncode, done.stderr
    return done.stdout.splitlines()


def test_what_the_other_process_compiled_is_read(tmp_path):
    assert run(BEGIN + SAY, tmp_path) == [f"{name} 1 1" for name in KERNELS] + ["[]"]
    again = run(BEGIN.replace("== len(calls(1, False))", "== 0") + SAY, tmp_path)  # all is there: nobody is asked
    assert again == [f"{name} 1 1" for name in KERNELS] + ["[]"]


def test_without_the_other_process_all_is_compiled_here(tmp_path):
    kill = """
wait = next(iter(elsewhere.values())).func.__self__
os.kill(wait.process, signal.SIGKILL)
"""
    assert run(BEGIN + kill + SAY, tmp_path) == [f"{name} 1 0" for name in KERNELS] + ["[]"]


def test_the_other_process_ends_with_this_one(tmp_path):
    (number,) = run(BEGIN + "print(next(iter(elsewhere.values())).func.__self__.process)", tmp_path)
    with pytest.raises(ProcessLookupError):
        os.kill(int(number), 0)


def test_a_process_that_says_nothing_is_not_waited_for(tmp_path):
    stop = """
import minigemma.ahead
minigemma.ahead.LONG = 3
os.kill(next(iter(elsewhere.values())).func.__self__.process, signal.SIGSTOP)
for wait in elsewhere.values():
    wait()
assert 3 < time.monotonic() - begun < 6, "it was waited for more than once"
"""
    assert run(BEGIN + stop + SAY, tmp_path) == [f"{name} 1 0" for name in KERNELS] + ["[]"]


def test_a_process_that_has_run_kernels_does_not_fork(monkeypatch):
    def fork():
        raise AssertionError("threads of the pool would not come along")

    monkeypatch.setattr(os, "fork", fork)
    monkeypatch.setattr(ahead, "is_cached", lambda kernel: False)
    numba.get_num_threads()
    ahead.compile_ahead(1)
    assert not elsewhere


def test_a_system_without_room_for_a_process_compiles_alone(monkeypatch):
    def no_room():
        raise BlockingIOError("no more processes")

    monkeypatch.setattr(os, "fork", no_room)
    monkeypatch.setattr(ahead, "is_cached", lambda kernel: False)
    monkeypatch.setattr(ahead, "has_begun", lambda: False)
    ahead.compile_ahead(1)
    assert not elsewhere


def test_the_other_process_ends_when_this_one_is_killed(tmp_path):
    """It finds out when it has compiled a kernel, and leaves it in the cache."""
    code = (
        BEGIN
        + """
print(next(iter(elsewhere.values())).func.__self__.process, flush=True)
time.sleep(600)
"""
    )
    there = os.environ | {"NUMBA_CACHE_DIR": str(tmp_path)}
    with subprocess.Popen([sys.executable, "-c", code], env=there, stdout=subprocess.PIPE) as process:
        other = Path("/proc") / process.stdout.readline().decode().strip()
        process.kill()
    end = time.monotonic() + 60
    while other.exists() and "State:\tZ" not in (other / "status").read_text() and time.monotonic() < end:
        time.sleep(0.1)
    assert time.monotonic() < end
    assert len(list(tmp_path.rglob("*.nbi"))) == 1


@pytest.mark.parametrize("command, letters", (("generate", 9), ("score", 9), ("chat", 0)))
@pytest.mark.parametrize("dtype", ("f32", "bf16"))
def test_the_command_line_begins_it(monkeypatch, tmp_path, command, letters, dtype):
    begun = []
    monkeypatch.setattr(ahead, "compile_ahead", lambda *asked, **how: begun.append((*asked, how)))
    args = [command, "-m", str(tmp_path), "--dtype", dtype, "-t", "2"] + ["x" * letters] * (letters > 0)
    monkeypatch.setattr("minigemma.backend.default_threads", lambda: 2)
    assert cli.main(args) == 1  # there is no model in that folder
    assert begun == [(letters // 4, {"exact": dtype == "f32"})]


GENERATE = """
import sys
from minigemma.ahead import calls
from minigemma.generation import stream_generate
from minigemma.random_weights import random_model
tokens, exact = int(sys.argv[1]), sys.argv[2] == "f32"
asked = calls(tokens, exact)
for call in asked.values():
    call()
model = random_model("gemma-3-270m", "bf16", 1)
model.__dict__["_compiled"] = None  # as in a first run, when the layers are not compiled yet
cache = model.new_cache(tokens + 1, sys.argv[2])
list(stream_generate(model, list(range(2, tokens + 2)), cache=cache, max_new_tokens=1))
for kernel in asked:
    print(kernel.py_func.__name__, len(kernel.signatures))
"""


@pytest.mark.parametrize("tokens, attends", ((3, "attend_few"), (40, "attend_many")))
@pytest.mark.parametrize("kept", ("bf16", "f32"))
def test_what_is_compiled_ahead_is_what_a_prompt_asks_for(tokens, attends, kept):
    """Of no kernel a second version is compiled when a model is used after the calls."""
    asked = [sys.executable, "-c", GENERATE, str(tokens), kept]
    done = subprocess.run(asked, capture_output=True, text=True, timeout=300)
    assert done.stdout.splitlines() == [f"{name} 1" for name in ("turn_all", attends, "gated_rows", "log_sums")], done
