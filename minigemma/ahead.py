"""The first run of all compiles its kernels on two cores.

Numba's compiler is Python: one core, one function after the other, more than ten seconds until a first token. Half of
that depends on how the weights are stored, which is known when they have been opened. The other half is known before;
a second process, a fork of this one, compiles it meanwhile and leaves it in Numba's cache on disk. When this one comes
to such a kernel, it waits for it and reads it from there. Should the other end early, or say nothing for LONG, this one
compiles what is missing.
"""

from __future__ import annotations

import atexit
import os
import signal
import sys
import warnings
from collections.abc import Callable
from contextlib import suppress
from functools import partial
from typing import Any, NoReturn

import numpy as np

from .arrays import read_only
from .attention import are_few, attend_few, attend_many, attention
from .backend import elsewhere, has_begun, is_cached, threads
from .few_tokens import FEW
from .geglu import gated_gelu, gated_rows
from .rope import rope, turn_all
from .sampling import log_sum_exp, log_sums

SIZE = 64  # of a head; kernels are the same for all
LONG = 30  # seconds, several times what one kernel takes


def calls(tokens: int, exact: bool) -> dict[Any, Callable[[], Any]]:
    """The kernels that a prompt of so many tokens needs besides products with weights and norms, in the order in which
    it needs them; and for each a call that has it compiled, for the types that it is given then.
    """
    tokens = 2 if tokens <= 2 * FEW else 2 * FEW
    x, at = np.zeros((tokens, 1, SIZE), np.float32), np.arange(tokens, dtype=np.int32)
    rows, kept, places = x[:, 0], x if exact else x.astype(np.uint16), read_only(at.copy())
    attend = attend_few if are_few(tokens, 0) else attend_many
    return {
        turn_all: lambda: rope(x, at, 10_000.0, 1.0, SIZE),
        attend: lambda: attention(x, kept, kept, at, at, places, None, 1.0, None),
        gated_rows: lambda: gated_gelu(rows, rows),
        log_sums: lambda: log_sum_exp(rows),
    }


def compile_ahead(tokens: int, exact: bool = False) -> None:
    """Begin, for a prompt of about so many tokens, unless earlier runs have compiled all. In the exact mode keys are
    float32. A process whose threads have begun to share out kernels is no first run, and would fork without them.
    """
    if sys.platform != "linux" or has_begun():
        return
    missing = {kernel: call for kernel, call in calls(tokens, exact).items() if not is_cached(kernel)}
    if not missing:
        return
    done, say = os.pipe()
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", DeprecationWarning)  # that other threads are not in the fork: it needs none
            process = os.fork()
    except OSError:  # no room for another process: then all is compiled here
        os.close(done)
    else:
        if process == 0:
            os.close(done)
            _compile(list(missing.values()), say)
        other = _Other(process, done, len(missing))
        elsewhere.update({kernel: partial(other.wait, i) for i, kernel in enumerate(missing)})
    os.close(say)


def _compile(calls: list[Callable[[], Any]], say: int) -> NoReturn:
    """Make the calls, and say after each that it has been made; when nobody listens any more, that fails."""
    try:
        signal.signal(signal.SIGINT, signal.SIG_DFL)
        nothing = os.open(os.devnull, os.O_RDWR)
        for stream in range(3):  # who reads what this program prints shall not wait for this process
            os.dup2(nothing, stream)
        with threads(1):
            for call in calls:
                call()
                os.write(say, b".")
    finally:
        os._exit(0)


class _Other:
    """The other process, as far as this one knows it."""

    def __init__(self, process: int, done: int, kernels: int) -> None:
        self.process, self.done, self.kernels, self.compiled, self.ended = process, done, kernels, 0, False
        atexit.register(self.end)

    def wait(self, kernel: int) -> None:
        """Until it has compiled this one of its kernels, or has ended."""
        from select import poll  # which only some systems have

        ready = poll()
        if not self.ended:
            ready.register(self.done)
        while not self.ended and self.compiled <= kernel:
            said = ready.poll(LONG * 1000) and os.read(self.done, 1)
            self.compiled += bool(said)
            if not said or self.compiled == self.kernels:
                self.end()

    def end(self) -> None:
        """Nobody waits any more for what it has not compiled by now."""
        if not self.ended:
            self.ended = True
            atexit.unregister(self.end)
            os.close(self.done)
            with suppress(ProcessLookupError, ChildProcessError):
                os.kill(self.process, signal.SIGKILL)
                os.waitpid(self.process, 0)
