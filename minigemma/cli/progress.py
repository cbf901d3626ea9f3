"""What a command shows on stderr while it works: what is being waited for, remarks; and JSON on stdout."""

from __future__ import annotations

import argparse
import os
import sys
import threading
import time
from typing import Any

START = time.monotonic()
COMPILED = 130  # functions that Numba compiles, about, until the first text of a model, where no kernel is on disk


class Progress:
    """Says on stderr what is being waited for, once the wait has lasted a second.

    On a terminal the line disappears when the wait is over. That kernels are being compiled is printed anywhere, and
    stays.
    """

    def __init__(self, quiet: bool) -> None:
        """With `quiet` it says nothing at all."""
        self.quiet = quiet
        self.terminal = sys.stderr.isatty() and os.environ.get("TERM") != "dumb"
        self.doing, self.since, self.shown = "", START, ""
        self.compilations: Any = None  # kernels/compiler.py's, once a command watches the compiler
        self.before, self.announced = (0, 0.0), False
        self.over = threading.Event()
        self.lock = threading.Lock()

    def __enter__(self) -> Progress:
        """Begin to watch the clock."""
        self.watcher = threading.Thread(target=self.watch, daemon=True)
        self.watcher.start()
        return self

    def __exit__(self, *_: object) -> None:
        """Leave a clean line."""
        self.over.set()
        self.watcher.join()
        self("")

    def __call__(self, doing: str) -> None:
        """From now on this is waited for; with "" nothing is."""
        with self.lock:
            self.erase()
            self.doing, self.since = doing, time.monotonic()

    def erase(self) -> None:
        """Erase the line on the terminal, if there is one."""
        if self.shown:
            print("\r\x1b[K", end="", file=sys.stderr, flush=True)
            self.shown = ""

    def watch(self) -> None:
        """Check every tenth of a second whether there is something to say."""
        while not self.over.wait(0.1):
            with self.lock:
                if not self.quiet and self.doing and time.monotonic() - self.since > 1:
                    self.say()

    def say(self) -> None:
        """Print what is not on the screen yet."""
        told, (count, seconds) = self.doing, self.compiled()
        if count and not self.announced:
            self.erase()
            first = "minigemma: compiling kernels for this processor, once (up to half a minute) …"
            print(first, file=sys.stderr, flush=True)
            self.announced = True
        if count and time.perf_counter() - self.compilations.latest < 10:
            told += f" (kernels: {share_done(count, COMPILED, time.monotonic() - seconds)})"
        if self.terminal and self.shown != told:
            self.erase()
            print(f"{told} …", end="", file=sys.stderr, flush=True)
            self.shown = told

    def watch_compiler(self) -> None:
        """Notice from now on when Numba compiles a kernel, which it does where none was found on disk."""
        from ..kernels.compiler import compilations

        self.compilations, self.before = compilations, (compilations.count, compilations.duration)

    def compiled(self) -> tuple[int, float]:
        """How many functions Numba has compiled since then, and for how many seconds."""
        now, (count, seconds) = self.compilations, self.before
        return (now.count - count, now.duration - seconds) if now else (0, 0.0)

    def per_cent(self, doing: str) -> Any:
        """A callback (done, total) that shows how far `doing` has come, and how long the rest will take."""
        began = time.monotonic()

        def show(done: int, total: int) -> None:
            self.doing = f"{doing}: {share_done(done, total, began)}"

        return show

    def watched(self, doing: str) -> dict[str, Any]:
        """The argument `progress` of a function that is slower with one: empty unless a terminal shows it."""
        return {"progress": self.per_cent(doing)} if self.terminal and not self.quiet else {}


def share_done(done: int, total: int, began: float) -> str:
    """How much of a task that began at a time is done, and about how long the rest takes: "40 %, 12 s left"."""
    part, spent = min(done / max(total, 1), 0.99 if done != total else 1.0), time.monotonic() - began
    left = spent * (1 - part) / part if part and spent > 1 else 0.0
    told = "" if left < 1 else f", {left:.0f} s left" if left < 100 else f", {left / 60:.0f} min left"
    return f"{100 * part:.0f} %{told}"


def note(args: argparse.Namespace, text: str) -> None:
    """Print a remark on stderr, but not with -q."""
    if not args.quiet:
        print(f"minigemma: {text}", file=sys.stderr, flush=True)


def print_json(report: dict[str, Any]) -> None:
    """Print one JSON object on stdout, in ASCII alone where stdout's encoding is not UTF-8."""
    import json

    encoding = (getattr(sys.stdout, "encoding", None) or "utf-8").lower().replace("-", "")
    print(json.dumps(report, ensure_ascii=encoding != "utf8"), flush=True)
