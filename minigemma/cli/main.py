"""The command line: minigemma generate | chat | batch | serve | score | embed | explore | train | distill | finetune |
vocab | export | bench | inspect | quantize | download | list | remove | completion.

stdout carries the answer and nothing else; timings, progress and warnings go to stderr. No colors are used.
Exit codes: 0 done · 1 failed, with one line that says why · 2 wrong usage · 130 interrupted by Ctrl-C.

A command is the file of its name in this folder. It is imported when it runs, so that `--help` is instant.
"""

import atexit
import errno
import gc
import os
import signal
import sys
import threading
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from importlib import import_module
from typing import Any

from ..environment import check_numba
from .arguments import parse
from .progress import Progress

FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command and return its exit code; only wrong usage exits by SystemExit, with 2.

    Without `argv`, the process is the command's own: the garbage collector is told to wait. With it, everything that
    running a command changes (signal handler, hooks, environment) is put back when it ends.
    """
    if argv is None:
        own_process()
    args = parse(argv)
    with process_settings(args.offline):
        try:
            check_numba()
            with Progress(args.quiet) as progress:
                import_module(f".{args.command}", __package__).run(args, progress)
            sys.stdout.flush()
        except KeyboardInterrupt:
            print(file=sys.stderr)
            return 130
        except BrokenPipeError:
            # The reader has gone. Python flushes stdout once more when it exits, so stdout is sent nowhere.
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        except Exception as error:
            if args.debug:
                raise
            print(f"minigemma: {one_line(error, args.model)}", file=sys.stderr)
            return 1
    return 0


def own_process() -> None:
    """Set the process up for one command: no closed streams, no garbage collection that finds nothing.

    Starting makes half a million objects that stay: looking through them after every 700 new ones takes 0.1 s, and
    once more when the process ends 0.3 s. Streams that the shell closed (`<&-`) are None in Python; they are opened on
    the null device.
    """
    if signal.getsignal(signal.SIGINT) is signal.default_int_handler:
        signal.signal(signal.SIGINT, lambda *_: os._exit(130))  # while flags are read there is nothing to put in order
    gc.set_threshold(100_000, 50, 50)
    atexit.register(gc.freeze)
    for name, mode in (("stdin", "r"), ("stdout", "w"), ("stderr", "w")):
        if getattr(sys, f"__{name}__") is None:
            setattr(sys, name, open(os.devnull, mode))  # noqa: SIM115  for as long as the process lives


@contextmanager
def process_settings(offline: bool) -> Iterator[None]:
    """Change what a command needs of the process, then restore it: Ctrl-C, warnings, stdout, HF_HUB_OFFLINE."""
    stdout, hook, format_warning = sys.stdout, sys.unraisablehook, warnings.formatwarning
    errors, environment = getattr(stdout, "errors", None), os.environ.get("HF_HUB_OFFLINE")
    handler = Interrupt.watch()
    warnings.formatwarning = lambda message, *_: f"minigemma: {message}\n"
    if hasattr(stdout, "reconfigure"):
        stdout.reconfigure(errors="backslashreplace")  # what a terminal cannot show is escaped and ends no answer
    if offline:
        os.environ["HF_HUB_OFFLINE"] = "1"
    try:
        yield
    finally:
        sys.unraisablehook, warnings.formatwarning = hook, format_warning
        if handler is not None:
            signal.signal(signal.SIGINT, handler)
        if hasattr(stdout, "reconfigure") and not stdout.closed:
            stdout.reconfigure(errors=errors)
        if offline:
            os.environ.pop("HF_HUB_OFFLINE")
            os.environ.update({"HF_HUB_OFFLINE": environment} if environment is not None else {})


class Interrupt:
    """Remembers Ctrl-C: raised where compiled code calls back into Python it can get lost, and is raised again here."""

    asked = False

    @classmethod
    def watch(cls) -> Any:
        """From now on note every Ctrl-C, and raise it as Python does; returns the handler that was set before."""
        cls.asked = False
        if threading.current_thread() is not threading.main_thread():
            return None
        sys.unraisablehook = cls.lost
        return signal.signal(signal.SIGINT, cls.noted)

    @classmethod
    def lost(cls, what: Any) -> None:
        """Print nothing about a Ctrl-C that got lost: it is raised again."""
        if not isinstance(what.exc_value, KeyboardInterrupt):
            sys.__unraisablehook__(what)

    @classmethod
    def noted(cls, *_: object) -> None:
        """The signal's handler."""
        cls.asked = True
        raise KeyboardInterrupt

    @classmethod
    def check(cls) -> None:
        """Raise a Ctrl-C that got lost."""
        if cls.asked:
            raise KeyboardInterrupt


def one_line(error: Exception, model: str) -> str:
    """What went wrong as `path: problem; remedy`."""
    from ..errors import FileError

    if isinstance(error, FileError):
        text = str(error)
    elif isinstance(error, OSError) and error.errno in FULL:
        place = error.filename2 or error.filename or "standard output"
        text = f"{place}: {error.strerror}; free some space, or write elsewhere"
    elif isinstance(error, RuntimeError) and "no locator available" in str(error):
        text = "Numba: its kernels can be kept nowhere; set NUMBA_CACHE_DIR to a folder that can be written"
    elif isinstance(error, OSError) and error.filename is not None:
        text = f"{error.filename}: {error.strerror}; check the path"
    elif isinstance(error, (ValueError, OSError, ImportError)):
        text = str(error) if not model or model in str(error) else f"{model}: {error}"
    elif isinstance(error, MemoryError):
        text = f"{model}: not enough memory; `minigemma inspect` says how much it takes, -c and --dtype lower it"
    else:
        text = f"{model}: {type(error).__name__}: {error}; this is a bug, --debug shows where"
    return " ".join(text.split()).encode("utf-8", "surrogateescape").decode("utf-8", "replace")  # of a C locale
