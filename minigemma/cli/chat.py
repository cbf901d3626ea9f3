"""`minigemma chat`: a conversation, message by message."""

import argparse
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import closing
from difflib import get_close_matches
from typing import Any

from ..errors import FileError
from ..text.chat import Chat, ContextFull
from ..text.generation import sampler_for
from ..text.prompt import conversation_ids
from .generate import print_speed, settings, show
from .main import Interrupt
from .opening import open_draft, open_model, see
from .progress import Progress, note, print_json
from .terminal import Prompt
from .values import SETTINGS

HELP = """\
/reset        forget the conversation          /system TEXT     start again with this instruction
/drop         leave out its oldest half        /image FILE      show it with the next message
/again        another answer to the same       /set NAME VALUE  such as temperature 0.7; alone: list them
/continue     go on with an answer cut short   /save FILE       write the conversation (JSON)
/exit         leave, as Ctrl-D does            /load FILE       go on with one that was saved
/help         this list                        Ctrl-C           stops the answer, or clears the line
A text of several lines is pasted, or stands between two lines of \"""; a message that begins with a slash of its own
needs a space before it."""
COMMANDS = tuple(word for word in HELP.split() if word.startswith("/"))
HABITS = {  # commands of other programs, and ours
    "/bye": "/exit",
    "/quit": "/exit",
    "/clear": "/reset",
    "/new": "/reset",
    "/regenerate": "/again",
    "/regen": "/again",
    "/retry": "/again",
    "/show": "/set",
    "/?": "/help",
}


def run(args: argparse.Namespace, progress: Progress) -> None:
    """Answer each message of standard input until it ends or /exit."""
    model = open_model(args, progress, vision=True)
    args.draft = open_draft(args, progress)
    talk = Talk(Chat(model, system=args.system), args, progress)
    if args.prompt_cache and args.prompt_cache.exists():
        talk.chat.reopen(args.prompt_cache)
        note(args, f"going on with the {len(talk.chat.messages)} messages in {args.prompt_cache}")
    progress("")
    if not model.instruction_tuned:
        why = "it continues text and was never taught to answer; take an -it one"
        note(args, f"{model.name} is pretrained only: {why}")
    note(args, "/help lists the commands, Ctrl-D leaves")
    with Prompt(COMMANDS, SETTINGS) as prompt:
        while True:
            try:
                message = prompt.read()
                if message is None or HABITS.get(message.strip(), message.strip()) == "/exit":
                    return talk.chat.keep(args.prompt_cache) if args.prompt_cache else None
                talk.take(message)
            except argparse.ArgumentTypeError as error:
                talk.fail(f"the message is {error}; it was not sent")
            except KeyboardInterrupt:  # at the prompt, or between two steps: what was said stays
                if not prompt.terminal:
                    raise
                print(file=sys.stderr)


class Talk:
    """A conversation, the flags for its answers, and the message that found no room in the context."""

    def __init__(self, chat: Chat, args: argparse.Namespace, progress: Progress) -> None:
        self.chat, self.args, self.progress = chat, args, progress
        self.refused = ""

    def take(self, line: str) -> None:
        """Answer a message, or carry out a command, and say on stderr what was done."""
        if not line.startswith("/"):
            if line.strip():
                self.send(line)
            return
        name, _, rest = line.strip().partition(" ")
        name = HABITS.get(name, name)
        act = getattr(self, f"do_{name[1:]}", None)
        near = "".join(f"; did you mean {each}?" for each in get_close_matches(name, COMMANDS, 1))
        told = act(rest.strip()) if act else f"{line.strip()!r} is no command{near}; /help lists them"
        if told:
            print(told, file=sys.stderr)

    def send(self, text: str) -> None:
        """Answer one message."""

        def begin() -> Iterator[Any]:
            seen = see(self.chat.model, self.args, self.progress) if self.args.image else ()
            return self.chat.stream(text, seen, **settings(self.args), **self.progress.watched("reading"))

        self.refused = text
        if not self.answer(begin):
            self.refused, self.args.image = "", []  # shown once

    def answer(self, begin: Callable[[], Iterator[Any]]) -> bool:
        """Print the answer that `begin` begins; Ctrl-C stops it, and what was said stays. True: the context is full."""
        args = self.args
        self.progress("reading")
        began, Interrupt.asked = time.monotonic(), False
        try:
            tokens: Any = begin()
            with closing(tokens):  # at once, so that Ctrl-C leaves the conversation in order
                report = show(tokens, self.progress, began, silent=args.json)
            if args.json:
                print_json(report)
            elif args.verbose:
                print_speed(report)
            if report["finish_reason"] == "length":
                cut = report["generation_tokens"] >= args.max_new_tokens
                why = f"the answer was cut at {args.max_new_tokens:,} tokens (-n): /continue goes on"
                note(args, why if cut else "the context is full: /drop leaves out the oldest turns, /reset all")
        except KeyboardInterrupt:
            print(flush=True)
        except ContextFull as error:
            return self.too_long(f"{error}".partition(";")[0])
        except ValueError as error:  # the conversation goes on without this message
            self.fail(str(error))
        finally:
            self.progress("")
        return False

    def too_long(self, problem: str) -> bool:
        """Say what to do about a full context; True if the message has room once the conversation is left out."""
        larger, model = "a larger context (-c) holds more", self.chat.model
        alone = [message for message in self.chat.messages if message["role"] == "system"]
        assert model.tokenizer, "open_model refuses a model without one"
        ids = conversation_ids(
            model.tokenizer, model.config.family, [*alone, {"role": "user", "content": self.refused}]
        )
        fits = len(ids) < model.config.context
        out = f"shorten the message; {larger}" + ", and /reset drops an instruction" * bool(alone)
        if fits:
            out = f"/drop leaves out the oldest turns and answers, /reset forgets all, {larger}"
        self.fail(f"{problem}: {out}")
        return fits

    def fail(self, problem: str) -> None:
        """Say why there is no answer; with --json as JSON too."""
        if self.args.json:
            print_json({"error": problem})
        print(f"minigemma: {problem}", file=sys.stderr, flush=True)

    # Each command is a method of its name; what it returns is printed on stderr.

    def do_help(self, _: str) -> str:
        """/help."""
        return HELP

    def do_reset(self, _: str) -> str:
        """/reset: the instruction stays."""
        chat = self.chat
        chat.reset(next((m["content"] for m in chat.messages if m["role"] == "system"), None))
        return "forgotten, but for the instruction" if chat.messages else "forgotten"

    def do_system(self, text: str) -> str:
        """/system TEXT."""
        if not text:
            return "give the instruction: /system TEXT"
        try:
            self.chat.reset(system=text)
        except ValueError as error:
            return f"{error}"
        return "started again with this instruction"

    def do_drop(self, _: str) -> str:
        """/drop; a message that found no room is answered then."""
        model = self.chat.model
        waiting = len(model.tokenizer.encode(self.refused)) if model.tokenizer else 0
        dropped = self.chat.drop_oldest(max(model.config.context // 2 - waiting, 0))
        print(f"left out the {dropped} oldest messages, {len(self.chat.messages)} are kept", file=sys.stderr)
        if self.refused:
            self.send(self.refused)
        return ""

    def do_again(self, _: str) -> str:
        """/again: with a seed the next one, as the same would give the same answer."""
        if self.args.temperature == 0:
            return "at temperature 0 the answer is always the same; /set temperature 1 first"
        if self.args.seed is not None:
            self.args.seed = (self.args.seed + 1) % 2**64
        self.answer(lambda: self.chat.again(**settings(self.args)))
        return ""

    def do_continue(self, _: str) -> str:
        """/continue."""
        self.answer(lambda: self.chat.go_on(**settings(self.args)))
        return ""

    def do_set(self, text: str) -> str:
        """/set NAME VALUE; "default" takes a value back."""
        name, _, value = text.removeprefix("parameter ").replace("=", " ").partition(" ")
        name, value = name.lstrip("-").replace("-", "_"), value.strip()
        named = [each for each in SETTINGS if name and each.startswith(name)]
        if not name:
            return "\n".join(f"{each:18} {_shown(each, getattr(self.args, each))}" for each in SETTINGS)
        if len(named) != 1 or not value:
            return f"/set NAME VALUE; the names are {', '.join(SETTINGS)}"
        [name] = named
        before = getattr(self.args, name)
        try:
            kind, usual = SETTINGS[name]
            setattr(self.args, name, usual if value == "default" else kind(value))
            choice = ("temperature", "top_k", "top_p", "min_p")
            sampler_for(self.chat.model, **{each: getattr(self.args, each) for each in choice})
        except (ValueError, argparse.ArgumentTypeError) as error:
            setattr(self.args, name, before)
            return f"{name} stays {_shown(name, before)}: {error}"
        return f"{name} is {_shown(name, getattr(self.args, name))}"

    def do_image(self, name: str) -> str:
        """/image FILE: keep it for the next message; says its size, or what is wrong with it."""
        from ..files.images import open_image

        if not name:
            return "give the picture: /image FILE"
        try:
            size = open_image(name).size
        except ValueError as error:
            return f"{error}"
        self.args.image = [*self.args.image, name]
        return f"{name}, {size[0]} x {size[1]} pixels, goes with your next message"

    def do_save(self, name: str) -> str:
        """/save FILE."""
        if not name:
            return "give a name: /save FILE"
        try:
            self.chat.save(name)
        except (OSError, ValueError) as error:  # ValueError: "." and "/" are no names of files
            return f"{name}: {getattr(error, 'strerror', error)}; nothing was saved"
        return f"saved {len(self.chat.messages)} messages in {name}"

    def do_load(self, name: str) -> str:
        """/load FILE."""
        if not name:
            return "give a name: /load FILE"
        try:
            images = self.chat.load(name)
        except ValueError as error:
            problem = f"{name}: {error.problem}" if isinstance(error, FileError) else error
            return f"{problem}; the conversation stays as it was"
        without = f", without their {images} images, which are not saved" if images else ""
        return f"loaded {len(self.chat.messages)} messages from {name}{without}"


def _shown(name: str, value: Any) -> str:
    return ("another each time" if name == "seed" else "the model's own") if value is None else str(value)
