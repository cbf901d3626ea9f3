"""`minigemma chat`: a conversation, line by line."""

from __future__ import annotations

import argparse
import sys
import time
from contextlib import closing
from typing import Any

from ..text.chat import Chat
from .arguments import unicode
from .generate import print_speed, settings, show
from .main import Interrupt
from .opening import open_model, see
from .progress import Progress, note

HELP = """\
/reset        forget the conversation        /system TEXT  start again with this instruction
/save FILE    write the conversation (JSON)  /image FILE   show it with the next message
/exit         leave, as Ctrl-D does          Ctrl-C        stops the answer
/help         this list
A message that begins with a slash of its own needs a space before it."""


def run(args: argparse.Namespace, progress: Progress) -> None:
    """Answer each line of standard input until it ends or /exit."""
    model = open_model(args, progress, vision=True)
    talk = Chat(model, system=args.system)
    progress("")
    if not model.instruction_tuned:
        why = "it continues text and was never taught to answer; take an -it one"
        note(args, f"{model.name} is pretrained only: {why}")
    note(args, "/help lists the commands, Ctrl-D leaves")
    while (line := read_line()) is not None and line.strip() != "/exit":
        if line.startswith("/"):
            print(chat_command(talk, line, args), file=sys.stderr)
        elif line.strip():
            answer(talk, line, args, progress)


def read_line() -> str | None:
    """The next line that the user types, with line editing; None at the end of input. Ctrl-C here leaves."""
    if sys.stdin.isatty():
        import readline  # noqa: F401  input() edits lines once this is imported
    try:
        return unicode(input("> " if sys.stdin.isatty() and sys.stdout.isatty() else ""))
    except EOFError:
        return None


def answer(talk: Chat, text: str, args: argparse.Namespace, progress: Progress) -> None:
    """Print the model's answer to one message; Ctrl-C stops it, and what was said stays in the conversation."""
    progress("reading")
    began, Interrupt.asked = time.monotonic(), False
    try:
        seen = see(talk.model, args, progress) if args.image else ()
        tokens: Any = talk.stream(text, seen, **settings(args))
        with closing(tokens):  # at once, so that Ctrl-C leaves the conversation in order
            report = show(tokens, progress, began)
        if args.verbose:
            print_speed(report)
    except KeyboardInterrupt:
        print(flush=True)
    except ValueError as error:  # too long, say: the conversation goes on without this message
        note(args, str(error))
    finally:
        progress("")
        args.image = []  # shown once


def chat_command(talk: Chat, line: str, args: argparse.Namespace) -> str:
    """Carry out /reset, /system TEXT, /image FILE, /save FILE or /help, and say what was done."""
    name, _, rest = line.strip().partition(" ")
    rest = rest.strip()
    if name == "/reset":
        talk.reset(next((m["content"] for m in talk.messages if m["role"] == "system"), None))
        return "forgotten, but for the instruction" if talk.messages else "forgotten"
    if name == "/system" and rest:
        talk.reset(system=rest)
        return "started again with this instruction"
    if name == "/image" and rest:
        return _image(rest, args)
    if name == "/save" and rest:
        try:
            talk.save(rest)
        except (OSError, ValueError) as error:  # ValueError: "." and "/" are no names of files
            return f"{rest}: {getattr(error, 'strerror', error)}; nothing was saved"
        return f"saved {len(talk.messages)} messages in {rest}"
    return HELP if name == "/help" else f"{line.strip()!r} is no command\n{HELP}"


def _image(name: str, args: argparse.Namespace) -> str:
    """Keep an image for the next message; says its size, or what is wrong with it."""
    from ..files.images import open_image

    try:
        size = open_image(name).size
    except ValueError as error:
        return f"{error}"
    args.image = [*args.image, name]
    return f"{name}, {size[0]} x {size[1]} pixels, goes with your next message"
