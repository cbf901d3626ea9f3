"""Reading messages of a chat: line editing, history between sessions, completion, and texts of several lines."""

from __future__ import annotations

import glob
import os
import sys
from collections.abc import Iterable
from contextlib import suppress
from typing import Any

from .values import unicode

BLOCK = '"""'
LINES_KEPT = 1000
TAKE_FILES = ("/image", "/load", "/save")


class Prompt:
    """Reads messages from standard input; on a terminal with Python's readline, where it is installed.

    A pasted text of several lines is one message, which the terminal marks (bracketed paste). So is what stands between
    \""" and \""". What was typed is kept in the user's cache folder, readable by its owner alone.
    """

    def __init__(self, commands: Iterable[str], settings: Iterable[str]) -> None:
        self.commands, self.settings = tuple(commands), tuple(settings)
        self.terminal = sys.stdin.isatty()
        self.shown = self.terminal and sys.stdout.isatty()
        self.readline: Any = None

    def __enter__(self) -> Prompt:
        """Set up line editing."""
        if self.terminal:
            with suppress(ImportError):
                import readline

                self.readline = readline
        if self.readline:
            from ..environment import cache_folder

            self.history = cache_folder() / "chat_history"
            with suppress(OSError):
                self.readline.read_history_file(self.history)
            self.readline.set_history_length(LINES_KEPT)
            self.kept = self.readline.get_current_history_length()
            self.readline.set_completer_delims(" ")
            self.readline.set_completer(self.complete)
            for setting in ("tab: complete", "set enable-bracketed-paste on"):
                self.readline.parse_and_bind(setting)
        return self

    def __exit__(self, *_: object) -> None:
        """Take line editing back."""
        if self.readline:
            self.readline.set_completer(None)

    def read(self) -> str | None:
        """The next message, or None at the end of input. Raises KeyboardInterrupt at Ctrl-C."""
        line = self.line("> ")
        if line is None or not line.lstrip().startswith(BLOCK):
            return line
        lines = [line.lstrip().removeprefix(BLOCK)]
        while not lines[-1].rstrip().endswith(BLOCK):
            if (line := self.line("… ")) is None:
                break
            lines.append(line)
        return "\n".join(lines).rstrip().removesuffix(BLOCK).strip("\n")

    def line(self, mark: str) -> str | None:
        """One line, or a pasted text, without its end; None at the end of input."""
        try:
            return unicode(input(mark if self.shown else ""))
        except EOFError:
            return None
        finally:
            self.keep()

    def keep(self) -> None:
        """Write what was typed at once: a terminal may be closed, and another chat have its own lines.

        Where that cannot be, the history ends with the session.
        """
        typed = self.readline.get_current_history_length() - self.kept if self.readline else 0
        if typed:
            self.kept += typed
            with suppress(OSError):
                self.history.parent.mkdir(parents=True, exist_ok=True)
                os.close(os.open(self.history, os.O_CREAT, 0o600))
                self.readline.append_history_file(typed, self.history)

    def complete(self, word: str, state: int) -> str | None:
        """For readline: what `word` may become, one by one."""
        before = self.readline.get_line_buffer()[: self.readline.get_begidx()].split()
        if not before:
            found = [f"{command} " for command in self.commands if command.startswith(word)] if word[:1] == "/" else []
        elif before[0] in TAKE_FILES:
            names = glob.glob(glob.escape(os.path.expanduser(word)) + "*")
            found = sorted(name + "/" * os.path.isdir(name) for name in names)
        elif before == ["/set"]:
            found = [f"{name} " for name in self.settings if name.startswith(word)]
        else:
            found = []
        return found[state] if state < len(found) else None
