"""The command line: minigemma generate | chat | score | bench | inspect | quantize | download.

stdout carries the answer and nothing else; timings, progress and warnings go to stderr. No colours are used.
Exit codes: 0 done · 1 failed, with one line that says why · 2 wrong usage · 130 interrupted by Ctrl-C.

Everything that takes time to import is imported inside the function that needs it, so that `--help` is instant.
"""

from __future__ import annotations

import argparse
import atexit
import errno
import gc
import math
import os
import re
import signal
import sys
import threading
import time
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack, closing
from dataclasses import replace
from functools import partial
from itertools import chain, repeat
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .. import __version__

if TYPE_CHECKING:
    from ..config import TextConfig, VisionConfig
    from ..files.load import Description
    from ..models.decoder import Decoder
    from ..text.chat import Chat
    from ..text.generation import Piece, Seen

DEMO = "gemma-3-270m"
NARROW = ["int8", "int4", "sfp8", "int8-row", "int4-row"]  # the formats of fewer than 16 bits a weight
SIZES = ("width", "ffn_width", "heads", "kv_heads", "head_dim", "vocab", "context")
START = time.monotonic()
LONGEST_TEXT = 20_000_000  # bytes, more than any context holds
FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
CHAT_HELP = """\
/reset        forget the conversation        /system TEXT  start anew with this instruction
/save FILE    write the conversation (JSON)  /image FILE   show it with the next message
/exit         leave, as Ctrl-D does          Ctrl-C        stops the answer
/help         this list
A message that begins with a slash of its own needs a space before it."""


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command and return its exit code; only wrong usage leaves by SystemExit, with 2."""
    open_closed_streams()
    # A start makes half a million objects that stay; to look through them for garbage after every 700 takes 0.1 s.
    gc.set_threshold(100_000, 50, 50)
    atexit.register(gc.freeze)  # and to look once more when the process ends, 0.3 s
    warnings.formatwarning = lambda message, *_: f"minigemma: {message}\n"
    args = build_parser().parse_args(argv)
    if args.offline:
        os.environ["HF_HUB_OFFLINE"] = "1"
    Interrupt.watch()
    try:
        # What a terminal cannot show comes out escaped instead of ending the answer.
        sys.stdout.reconfigure(errors="backslashreplace")  # type: ignore[union-attr]
        args.run(args)
        sys.stdout.flush()
    except KeyboardInterrupt:
        print(file=sys.stderr)
        return 130
    except BrokenPipeError:
        # The reader has gone. Python flushes stdout once more on its way out, so that goes nowhere too.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    except Exception as error:
        if args.debug:
            raise
        print(f"minigemma: {one_line(error, args.model)}", file=sys.stderr)
        return 1
    return 0


def open_closed_streams() -> None:
    """Streams that the shell closed (`<&-`), which Python has as None, are empty and go nowhere."""
    for name, mode in (("stdin", "r"), ("stdout", "w"), ("stderr", "w")):
        if getattr(sys, f"__{name}__") is None:
            setattr(sys, name, open(os.devnull, mode))  # noqa: SIM115  for as long as the process lives


class Interrupt:
    """Ctrl-C, remembered: raised where compiled code calls Python back it can get lost, and is raised again here."""

    asked = False

    @classmethod
    def watch(cls) -> None:
        """From now on note every Ctrl-C, and raise it as Python does."""
        cls.asked = False
        if threading.current_thread() is threading.main_thread():
            signal.signal(signal.SIGINT, cls.noted)
            sys.unraisablehook = cls.lost

    @classmethod
    def lost(cls, what: Any) -> None:
        """Say nothing of a Ctrl-C that got lost: it comes again."""
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
        text = f"{model}: {error}"
    elif isinstance(error, MemoryError):
        text = f"{model}: not enough memory; `minigemma inspect` says how much it takes, -c and --dtype lower it"
    else:
        text = f"{model}: {type(error).__name__}: {error}; this is a bug, --debug shows where"
    return " ".join(text.split())


# ---------------------------------------------------------------------------------------------------- arguments


Flags = Callable[[argparse.ArgumentParser], None]


def number(kind: type, low: float, high: float = float("inf"), *, above: bool = False) -> Callable[[str], Any]:
    """An argparse type: a number from `low` (not itself, if `above`) to `high`."""

    def parse(text: str) -> int | float:
        value = kind(text)
        if not (low <= value <= high) or (above and value == low):
            bounds = f"{'above' if above else 'at least'} {low:g} and at most {high:g}"
            raise argparse.ArgumentTypeError(f"{text} is not {bounds.removesuffix(' and at most inf')}")
        return value

    parse.__name__ = kind.__name__  # argparse says "invalid int value"
    return parse


def nonempty(text: str) -> str:
    """An argparse type: any text but none."""
    if not text:
        raise argparse.ArgumentTypeError("the text is empty")
    return text


def build_parser() -> argparse.ArgumentParser:
    """All commands and their flags."""
    parser = argparse.ArgumentParser(prog="minigemma", description="Gemma models on the CPU.")
    parser.add_argument("--version", action="version", version=f"minigemma {__version__}")
    commands = parser.add_subparsers(required=True, metavar="command")

    def command(run: Callable[[argparse.Namespace], None], *flags: Flags) -> argparse.ArgumentParser:
        doc = (run.__doc__ or "").split("\n")[0]
        made = commands.add_parser(run.__name__, help=doc, description=doc)
        for add in (*flags, add_common):
            add(made)
        made.set_defaults(run=run)
        return made

    generating = command(generate, add_text, add_model, add_mmproj, add_machine, add_sampling, add_json)
    chatting = command(chat, add_model, add_mmproj, add_machine, add_sampling)
    command(score, add_text, add_model, add_machine, add_json)
    inspecting = command(inspect, add_model, add_mmproj, add_dtype, add_json)
    inspecting.add_argument("--cpu", action="store_true", help="show which kernels run on this processor, and why")
    inspecting.add_argument("--check", action="store_true", help="read every weight and look for NaN and infinity")
    benching = command(bench, add_model, add_machine, add_bench, add_json)
    benching.set_defaults(new_tokens=32)
    generating.add_argument("--raw", action="store_true", help="continue the text as it is, without the turn format")
    generating.set_defaults(temperature=0.0)
    chatting.set_defaults(temperature=1.0, top_k=64, top_p=0.95)
    quantizing = command(quantize)
    quantizing.add_argument("model", metavar="SRC", help="folder, name or Hugging Face id of safetensors files")
    quantizing.add_argument("target", metavar="DST", help="the folder to write, which must not exist yet")
    quantizing.add_argument("--dtype", choices=NARROW, required=True, help="the format of matrices")
    downloading = command(download)
    downloading.add_argument("model", help="Hugging Face id, such as google/gemma-3-1b-it")
    downloading.add_argument("--revision", help="branch, tag or commit (default: main)")
    return parser


def add_common(to: argparse.ArgumentParser) -> None:
    """Flags of every command."""
    to.add_argument("--offline", action="store_true", help="never ask the network")
    to.add_argument("-q", "--quiet", action="store_true", help="nothing on stderr but errors")
    to.add_argument("--debug", action="store_true", help="show the traceback of an error")


def add_json(to: argparse.ArgumentParser) -> None:
    """For programs that read the output."""
    to.add_argument("--json", action="store_true", help="print one JSON object")


def add_model(to: argparse.ArgumentParser) -> None:
    """Which model, and how much of its context."""
    to.add_argument("-m", "--model", default=DEMO, help="folder, file, name or Hugging Face id (default: %(default)s)")
    to.add_argument(
        "-c", "--ctx-size", type=number(int, 1), metavar="N", help="context in tokens (default: the model's)"
    )


def add_mmproj(to: argparse.ArgumentParser) -> None:
    """Where the other half of a model that sees is."""
    to.add_argument("--mmproj", metavar="FILE", help="the vision tower of a GGUF model, which has a file of its own")


def add_text(to: argparse.ArgumentParser) -> None:
    """Where the text comes from: exactly one of three."""
    source = to.add_mutually_exclusive_group(required=True)
    source.add_argument("text", nargs="?", metavar="TEXT", help="the text; - reads standard input")
    source.add_argument("-p", "--prompt", metavar="TEXT", help="the same as a flag")
    source.add_argument("-f", "--file", type=Path, help="read the text from a file")


def add_machine(to: argparse.ArgumentParser) -> None:
    """How the model is run."""
    to.add_argument("-v", "--verbose", action="store_true", help="show tokens")
    to.add_argument("-t", "--threads", type=number(int, 1), metavar="N", help="(default: all cores)")
    to.add_argument("--force", action="store_true", help="load it even if it does not fit into memory")
    add_dtype(to)


def add_dtype(to: argparse.ArgumentParser) -> None:
    """In which format the weights are held."""
    to.add_argument("--dtype", choices=["f32", "bf16", *NARROW], help="hold the weights so (default: as stored)")


def add_sampling(to: argparse.ArgumentParser) -> None:
    """What is asked of the model, and how its next token is chosen."""
    to.add_argument("--system", metavar="TEXT", help="an instruction that holds for the whole conversation")
    to.add_argument("--image", action="append", default=[], metavar="FILE", help="show the model an image; repeatable")
    to.add_argument("--pan-and-scan", action="store_true", help="show it crops of wide and tall images too")
    flags = ("-n", "--max-new-tokens", "--max-tokens")
    to.add_argument(*flags, type=number(int, 1), default=256, metavar="N", help="(default: %(default)s)")
    to.add_argument("--temperature", "--temp", type=number(float, 0), metavar="X", help="0: always the likeliest token")
    to.add_argument("--top-k", type=number(int, 1), metavar="N", help="choose among the N likeliest")
    to.add_argument("--top-p", type=number(float, 0, 1, above=True), metavar="X", help="… among those that make up X")
    to.add_argument("--min-p", type=number(float, 0, 1), metavar="X", help="… at least X times as likely as the first")
    to.add_argument("-s", "--seed", type=number(int, 0, 2**64 - 1), metavar="N", help="make sampling repeatable")
    to.add_argument("--stop", action="append", default=[], type=nonempty, metavar="TEXT", help="end before; repeatable")


def add_bench(to: argparse.ArgumentParser) -> None:
    """What is measured."""
    whole = number(int, 1)
    to.add_argument("--shape", metavar="NAME", help="random weights of this released size instead of -m")
    to.add_argument(
        "--layers", type=whole, metavar="N", help="only the first so many of them, and of the vision tower's"
    )
    lengths = "one length or more; decoding follows the longest (default: 512; for --plot 8,32,128,512)"
    to.add_argument("--prompt-tokens", type=counts, metavar="N,…", help=lengths)
    to.add_argument("-n", "--new-tokens", type=whole, metavar="N", help="(default: %(default)s)")
    to.add_argument("-r", "--repeat", type=whole, default=3, metavar="N", help="rounds (default: %(default)s)")
    to.add_argument("--positions", type=numbers, default=[], metavar="N,…", help="time of a token after so many others")
    to.add_argument("--image", action="store_true", help="time of an image, for a model that sees")
    to.add_argument("--against", type=names, default=[], metavar="NAME,…", help="other programs, with the same weights")
    to.add_argument("--plot", type=Path, metavar="FILE.png", help="draw the speeds under the roofline of this machine")


def numbers(text: str) -> list[int]:
    """An argparse type: whole numbers from 0, with commas between them."""
    return [number(int, 0)(part) for part in text.split(",")]


def counts(text: str) -> list[int]:
    """An argparse type: whole numbers from 1, with commas between them."""
    return [number(int, 1)(part) for part in text.split(",")]


def names(text: str) -> list[str]:
    """An argparse type: names with commas between them."""
    return [name for name in text.split(",") if name]


def read_text(args: argparse.Namespace) -> str:
    """The text that the command line, a file or standard input gives, which must be Unicode."""
    given = args.text if args.prompt is None else args.prompt
    name = str(args.file or ("standard input" if given == "-" else "the text"))
    try:
        if args.file:
            with args.file.open("rb") as file:
                content = file.read(LONGEST_TEXT + 1)
        else:
            # A command line's stray bytes arrive as lone surrogates, which strict encoding refuses.
            content = sys.stdin.buffer.read(LONGEST_TEXT + 1) if given == "-" else given.encode()
        if len(content) > LONGEST_TEXT:
            raise ValueError(f"{name} has more than {LONGEST_TEXT:,} bytes, and so more than any context; shorten it")
        return content.decode()
    except (UnicodeDecodeError, UnicodeEncodeError) as error:
        raise ValueError(f"{name} is not UTF-8 (near byte {error.start:,}); convert it first") from None


# ------------------------------------------------------------------------------------------------ what takes time


class Progress:
    """Says on stderr what is being waited for, once the wait has lasted a second.

    On a terminal the line goes away when the wait is over. That kernels are being compiled is said anywhere, and stays.
    """

    def __init__(self, quiet: bool) -> None:
        """With `quiet` it says nothing at all."""
        self.quiet = quiet
        self.terminal = sys.stderr.isatty() and os.environ.get("TERM") != "dumb"
        self.doing, self.since, self.shown = "", START, ""
        self.compiling = self.announced = False
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
        """Take back the line on the terminal, if there is one."""
        if self.shown:
            print("\r\x1b[K", end="", file=sys.stderr, flush=True)
            self.shown = ""

    def watch(self) -> None:
        """Look every tenth of a second whether there is something to say."""
        while not self.over.wait(0.1):
            with self.lock:
                if not self.quiet and self.doing and time.monotonic() - self.since > 1:
                    self.say()

    def say(self) -> None:
        """Print what is not on the screen yet."""
        if self.compiling and not self.announced:
            self.erase()
            told = "minigemma: compiling kernels for this processor, once (up to half a minute) …"
            print(told, file=sys.stderr, flush=True)
            self.announced = True
        if self.terminal and self.shown != self.doing:
            self.erase()
            print(f"{self.doing} …", end="", file=sys.stderr, flush=True)
            self.shown = self.doing

    def compile_listener(self) -> AbstractContextManager[None]:
        """Inside this block a kernel that is not found in the cache sets `compiling`."""
        from ..kernels.compiler import when_compiling

        def compiles() -> None:
            self.compiling = True

        return when_compiling(compiles)


def open_model(args: argparse.Namespace, progress: Progress, until: ExitStack, letters: int | None = None) -> Decoder:
    """The model that -m names, as the flags want it. If a prompt is known to follow, of so many letters, a first run
    begins to compile what it needs.
    """
    progress(f"loading {args.model}")
    from ..files.load import load
    from ..kernels.parallel import default_threads

    if args.threads and args.threads > default_threads():
        note(args, f"{args.threads} threads are more than there are cores for; using {default_threads()}")
        args.threads = default_threads()
    until.enter_context(progress.compile_listener())

    def loaded(done: int, total: int) -> None:
        progress.doing = f"loading {args.model}: {100 * done // max(total, 1)} %"

    sees = bool(getattr(args, "image", False)) or args.run is chat  # else there is no use for the vision tower
    mmproj = getattr(args, "mmproj", None)
    more = {"vision": sees, "mmproj": mmproj, "context": args.ctx_size, "force": args.force}
    model = load(args.model, args.dtype, threads=args.threads, progress=loaded, **more)
    if model.tokenizer is None:
        raise ValueError("there is no tokenizer.model; fetch it from where the weights came from")
    model.config = with_context(model.config, args.ctx_size)
    return model


def with_context(config: TextConfig, tokens: int | None) -> TextConfig:
    """The config with the context that -c asks for, which may be shorter than the model's but not longer."""
    if tokens and tokens > config.context:
        raise ValueError(f"the context is {config.context:,} tokens and -c asks for {tokens:,}; ask for less")
    return replace(config, context=tokens or config.context)


# ------------------------------------------------------------------------------------------------------- commands


def generate(args: argparse.Namespace) -> None:
    """Continue a text, or, with an instruction-tuned model, answer it."""
    text = read_text(args)
    with ExitStack() as until:
        progress = until.enter_context(Progress(args.quiet))
        model = open_model(args, progress, until, len(text))
        from ..text.generation import stream_generate

        seen = see(model, args, progress) if args.image else ()
        ids = prompt_ids(model, text, args, seen.crops if seen else ())
        if args.verbose:
            note(args, f"prompt {[(i, piece_text(model, i)) for i in ids]}")
        progress(f"reading the prompt ({len(ids):,} tokens)")
        pieces = stream_generate(model, ids, seen, **settings(args))
        report = show(pieces, progress, silent=args.json)
    if args.json:
        print_json(report)
    elif not args.quiet:
        tell_speed(report)


def see(model: Decoder, args: argparse.Namespace, progress: Progress) -> Seen:
    """The images of --image, run through the vision tower."""
    progress(f"looking at {', '.join(args.image)}")
    from ..files.images import PanAndScan
    from ..text.generation import look_at

    return look_at(model, args.image, PanAndScan() if args.pan_and_scan else None, partial(note, args))


def piece_text(model: Decoder, token: int) -> str:
    """The text of one token; an image's have none."""
    return model.tokenizer.decode([token]) if token < model.tokenizer.size else "<image_soft_token>"


def prompt_ids(model: Decoder, text: str, args: argparse.Namespace, crops: Sequence[int] = ()) -> list[int]:
    """The prompt as token ids: a turn of a conversation where the model knows turns and --raw is not given."""
    from ..text.prompt import conversation_ids, text_ids

    if model.instruction_tuned and not args.raw:
        messages: list[dict[str, Any]] = [{"role": "user", "content": text, "images": crops}]
        if args.system:
            messages.insert(0, {"role": "system", "content": args.system})
        return conversation_ids(model.tokenizer, model.config.family, messages, vision=model.vision)
    if args.system:
        why = "--raw has no turns" if args.raw else f"{model.name} is pretrained only and knows no turns"
        raise ValueError(f"{why}, so --system has no place; put the instruction into the text")
    return text_ids(model.tokenizer, text, model.vision, crops)


def settings(args: argparse.Namespace) -> dict[str, Any]:
    """The flags that `stream_generate` and `Chat.stream` take, as they name them."""
    names = ("max_new_tokens", "temperature", "top_k", "top_p", "min_p", "seed", "stop")
    return {name: getattr(args, name) for name in names}


def show(pieces: Iterator[Piece], progress: Progress, began: float = START, silent: bool = False) -> dict[str, Any]:
    """Print the pieces as they come and return what is known when they end."""
    texts, tokens, first = [], [], 0.0
    for piece in pieces:
        Interrupt.check()
        progress("")
        first = first or time.monotonic() - began
        texts.append(piece.text)
        tokens.append(piece.token)
        if not silent:
            print(piece.text, end="", flush=True)
    text = "".join(texts)
    if not silent and not text.endswith("\n"):
        print(flush=True)
    names = ("finish_reason", "prompt_tokens", "generation_tokens", "prompt_tps", "generation_tps")
    known = {name: getattr(piece, name) for name in names}
    return {"text": text, "tokens": tokens, "seconds_to_first_token": first, **known}


def tell_speed(report: dict[str, Any]) -> None:
    """One line of timings on stderr."""
    print(
        f"[prompt {report['prompt_tokens']:,} tokens, {report['prompt_tps']:,.0f}/s · "
        f"answer {report['generation_tokens']:,} tokens, {report['generation_tps']:,.1f}/s · "
        f"first after {report['seconds_to_first_token']:.2f} s · ended by {report['finish_reason']}]",
        file=sys.stderr,
    )


def print_json(report: dict[str, Any]) -> None:
    """One JSON object on stdout."""
    import json

    print(json.dumps(report, ensure_ascii=False))


def score(args: argparse.Namespace) -> None:
    """Say how likely a text is: perplexity and, with -v, each token."""
    text = read_text(args)
    with ExitStack() as until:
        progress = until.enter_context(Progress(args.quiet))
        model = open_model(args, progress, until, len(text))
        from ..text.prompt import text_ids
        from ..text.scoring import score as score_ids

        ids = text_ids(model.tokenizer, text)
        progress(f"scoring {len(ids):,} tokens")
        result = score_ids(model, ids)
        if math.isnan(result.perplexity):
            raise ValueError("the model's weights make numbers that are none (NaN); fetch them again")
    pieces = [(model.tokenizer.decode([token]), float(p)) for token, p in zip(ids[1:], result.logprobs, strict=True)]
    if args.json:
        print_json({"perplexity": result.perplexity, "tokens": len(pieces), "logprobs": pieces})
        return
    if args.verbose:
        for piece, logprob in pieces:
            print(f"{logprob:9.4f}  {piece!r}")
    print(f"perplexity {result.perplexity:.4f} over {len(pieces):,} tokens")


def bench(args: argparse.Namespace) -> None:
    """Measure the model beside what this machine can do, and beside other programs."""
    with ExitStack() as until:
        progress = until.enter_context(Progress(args.quiet))
        if args.plot:
            from .bench import plottable

            plottable(args.plot)
        if args.shape:
            args.model = args.shape
            progress(f"making random weights for {args.shape}")
            from .random_weights import random_model

            until.enter_context(progress.compile_listener())
            model = random_model(args.shape, args.dtype or "bf16", args.layers, threads=args.threads, vision=args.image)
            model.config = with_context(model.config, args.ctx_size)
        else:
            model = open_model(args, progress, until)
        from .bench import bench as measure
        from .bench import roofline, table

        *lengths, longest = sorted(set(args.prompt_tokens or ((8, 32, 128, 512) if args.plot else (512,))))
        asked = (longest, args.new_tokens, args.positions, args.against, args.repeat, args.image, lengths)
        report = measure(model, *asked, progress)
        report["weights"] = "random" if args.shape else str(args.model)
        if args.plot:
            roofline(report, args.plot)
    if args.json:
        print_json(report)
    else:
        print(table(report))


def inspect(args: argparse.Namespace) -> None:
    """Show sizes, layers, formats and the memory it takes, reading headers only."""
    if args.cpu:
        show_cpu(args)
        return
    from ..files.load import describe
    from ..files.resolve import resolve

    about = describe(resolve(args.model), args.dtype, mmproj=args.mmproj)
    if args.check:
        check_weights(args, about.files[0])
    report = summary(about, with_context(about.config, args.ctx_size))
    if args.json:
        print_json(report)
        return
    memory = report["memory"]
    print(f"{report['name']}: {report['family']}, {report['kind']}")
    files = [f"{name}  {bytes_text(size)}" for name, size in report["files"].items()]
    print("files       " + "\n            ".join(files))
    print(f"parameters  {report['parameters']:,}, {report['embedding_parameters']:,} of them the embedding")
    print("sizes       " + ", ".join(f"{name} {size:,}" for name, size in report["sizes"].items()))
    meanings = {"l": f"sees {report['window'] or 0:,} tokens", "g": "sees all", "r": "recurrent"}
    meaning = f"({', '.join(f'{letter}: {m}' for letter, m in meanings.items() if letter in report['pattern'])})"
    print(f"layers      {report['layers']}: {report['pattern']}  {meaning}")
    for label, row in zip(chain(["tensors"], repeat("")), report["tensors"], strict=False):
        size, shape = bytes_text(row["bytes"]), str(row["shape"])
        print(f"{label:12}{row['count']:3} × {row['format']:8} {shape:16} {size:>9}  {row['name']}")
    if report["vision"]:
        v = report["vision"]
        print(
            f"vision      {v['parameters']:,} parameters, {v['layers']} layers: {v['side']} x {v['side']} pixels → "
            f"{v['patches']:,} patches → {v['tokens']} tokens an image"
        )
    print(
        f"memory      weights {bytes_text(memory['weights'])} + cache of {report['sizes']['context']:,} tokens "
        f"{bytes_text(memory['cache'])} = {bytes_text(memory['total'])}"
    )


def check_weights(args: argparse.Namespace, path: Path) -> None:
    """Raise ModelFormatError if any weight is NaN or infinite."""
    from ..errors import ModelFormatError
    from ..files.load import not_finite

    if wrong := not_finite(args.model, args.mmproj):
        first = ", ".join(f"{count:,} of {name}" for name, count in list(wrong.items())[:5])
        more = " …" if len(wrong) > 5 else ""
        raise ModelFormatError(path, f"NaN or infinite are {first}{more}", "fetch the weights again")


def show_cpu(args: argparse.Namespace) -> None:
    """Which kernels run here, and how many threads share them."""
    from ..kernels.amx import choice
    from ..kernels.parallel import default_threads, most_threads, threading_layer
    from ..kernels.simd import paths

    unit, why = choice()
    told = {
        **paths(),
        "matrix unit (AMX)": f"{'not used' if unit == 'vectors' else unit}: {why}",
        "threads": f"{default_threads()} of at most {most_threads()}",
        "regions": threading_layer(),
    }
    if args.json:
        print_json(told)
        return
    for name, text in told.items():
        print(f"{name:26}{text}")


def summary(about: Description, config: TextConfig) -> dict[str, Any]:
    """What `inspect` tells, as plain numbers and texts."""
    kinds = [config.kind(layer) for layer in range(config.layers)]
    cache = config.cache_bytes(config.context)
    return {
        "name": config.name or about.files[0].stem,
        "family": config.family,
        "kind": "instruction-tuned" if about.instruction_tuned else "pretrained only",
        "files": {str(file): file.stat().st_size for file in about.files},
        "parameters": config.embedding_parameters + config.non_embedding_parameters,
        "embedding_parameters": config.embedding_parameters,
        "sizes": {name: getattr(config, name) for name in SIZES},
        "layers": config.layers,
        "pattern": "".join(kind[0] for kind in kinds),
        "window": config.attention(kinds.index("local")).window if "local" in kinds else None,
        "vision": vision_summary(config.vision),
        "tensors": tensor_kinds(about.tensors),
        "memory": {"weights": about.weight_bytes, "cache": cache, "total": about.weight_bytes + cache},
    }


def vision_summary(vision: VisionConfig | None) -> dict[str, int] | None:
    """What `inspect` tells of the vision tower, if there is one."""
    if vision is None:
        return None
    told = {name: getattr(vision, name) for name in ("parameters", "layers", "side", "patch", "tokens")}
    return told | {"patches": vision.grid**2}


def tensor_kinds(tensors: Mapping[str, tuple[str, tuple[int, ...], int]]) -> list[dict[str, Any]]:
    """One row for all layers' tensors of one role, format and shape."""
    rows: dict[tuple, dict[str, Any]] = {}
    for name, (form, shape, size) in tensors.items():
        role = re.sub(r"\.\d+\.", ".*.", name)
        row = rows.setdefault(
            (role, form, shape), {"name": role, "format": form, "shape": list(shape), "count": 0, "bytes": 0}
        )
        row["count"] += 1
        row["bytes"] += size
    return list(rows.values())


def bytes_text(size: float) -> str:
    """A number of bytes for people: 4.6 kB, 253.1 MB, 5.4 GB."""
    unit, name = next((u, n) for u, n in ((1e9, "GB"), (1e6, "MB"), (1e3, "kB")) if size >= u or n == "kB")
    return f"{size / unit:,.1f} {name}"


def quantize(args: argparse.Namespace) -> None:
    """Write a folder with smaller weights, which loads at once."""
    with ExitStack() as until:
        progress = until.enter_context(Progress(args.quiet))
        progress(f"quantizing {args.model}")
        from .quantize import quantize as convert

        def written(done: int, total: int) -> None:
            progress.doing = f"quantizing {args.model}: {100 * done // max(total, 1)} %"

        until.enter_context(progress.compile_listener())
        report = convert(args.model, args.target, args.dtype, written)
    print(f"{args.target}: {bytes_text(report.bytes_before)} → {bytes_text(report.bytes_after)}")
    for role, error in report.errors.items():
        print(f"{100 * error:7.2f} %  {role}")


def download(args: argparse.Namespace) -> None:
    """Fetch a model from the Hugging Face hub into its cache (needs minigemma[hub])."""
    from ..files.download import download as fetch

    print(fetch(args.model, args.revision))


def chat(args: argparse.Namespace) -> None:
    """Converse; /help lists the commands."""
    with ExitStack() as until:
        progress = until.enter_context(Progress(args.quiet))
        model = open_model(args, progress, until, 0)
        from ..text.chat import Chat

        talk = Chat(model, system=args.system)
        progress("")
        if not model.instruction_tuned:
            note(
                args,
                f"{model.name} is pretrained only: it continues text and was never taught to answer; take an -it one",
            )
        note(args, "/help lists the commands, Ctrl-D leaves")
        while (line := read_line()) is not None and line.strip() != "/exit":
            if line.startswith("/"):
                print(chat_command(talk, line, args), file=sys.stderr)
            elif line.strip():
                answer(talk, line, args, progress)


def note(args: argparse.Namespace, text: str) -> None:
    """A remark on stderr, but for -q."""
    if not args.quiet:
        print(f"minigemma: {text}", file=sys.stderr, flush=True)


def read_line() -> str | None:
    """What the user types next, with line editing; None at the end of input. Ctrl-C here leaves."""
    if sys.stdin.isatty():
        import readline  # noqa: F401  input() edits lines once this is imported
    try:
        return input("> " if sys.stdin.isatty() and sys.stdout.isatty() else "")
    except EOFError:
        return None


def answer(talk: Chat, text: str, args: argparse.Namespace, progress: Progress) -> None:
    """Show the model's answer to one message; Ctrl-C stops it and what was said stays said."""
    progress("reading")
    began, Interrupt.asked = time.monotonic(), False
    try:
        seen = see(talk.model, args, progress) if args.image else ()
        pieces: Any = talk.stream(text, seen, **settings(args))
        with closing(pieces):  # at once, so that Ctrl-C leaves the conversation in order
            report = show(pieces, progress, began)
        if args.verbose:
            tell_speed(report)
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
        return "begun anew with this instruction"
    if name == "/image" and rest:
        from ..files.images import open_image

        try:
            size = open_image(rest).size
        except ValueError as error:
            return f"{error}"
        args.image = [*args.image, rest]
        return f"{rest}, {size[0]} x {size[1]} pixels, goes with your next message"
    if name == "/save" and rest:
        try:
            talk.save(rest)
        except (OSError, ValueError) as error:  # ValueError: "." and "/" are no names of files
            return f"{rest}: {getattr(error, 'strerror', error)}; nothing was saved"
        return f"saved {len(talk.messages)} messages in {rest}"
    return CHAT_HELP if name == "/help" else f"{line.strip()!r} is no command\n{CHAT_HELP}"
