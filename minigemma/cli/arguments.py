"""The flags of all commands. Nothing slow is imported, so that `--help` is instant."""

import argparse
import difflib
import os
import re
import stat
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NoReturn

from .. import __version__
from .training_arguments import add_finetuning, add_teacher, add_training
from .values import SETTINGS, bias, counts, nonempty, number, positions, unicode

DEMO = "gemma-3-270m"
NARROW = ["int8", "int4", "int4-symmetric", "sfp8", "int8-row", "int4-row"]  # fewer than 16 bits per weight
Flags = Callable[[argparse.ArgumentParser], None]
CPU = "leave it out: everything runs on the CPU"
OUTPUT = "write > FILE: the answer alone goes to standard output"
HABITS = {  # commands and flags of other programs, and ours
    "run": "chat, or generate TEXT",
    "pull": "download",
    "ls": "list",
    "rm": "remove",
    "ps": "list",
    "show": "inspect",
    "convert": "export",
    "tokenize": "score -v",
    "version": "--version",
    "q8-0": "int8",
    "q4-0": "int4-symmetric",
    "q4-k": "int4",
    "q4-k-m": "int4",
    "float32": "f32",
    "fp32": "f32",
    "bfloat16": "bf16",
    "n-predict": "-n",
    "num-predict": "-n",
    "max-length": "-n",
    "num-ctx": "-c",
    "max-kv-size": "-c",
    "model-path": "-m",
    "hf": "-m",
    "sys": "--system",
    "system-prompt": "--system",
    "repeat-penalty": "--repetition-penalty",
    "lora": "--adapter",
    "grammar": "--regex, --json-schema or --choice",
    "cnv": "minigemma chat",
    "interactive": "minigemma chat",
    "o": OUTPUT,
    "output": OUTPUT,
    "device": CPU,
    "gpu": CPU,
    "ngl": CPU,
    "n-gpu-layers": CPU,
}


class Parser(argparse.ArgumentParser):
    """An argument parser whose errors are two lines, and which suggests the nearest flag for an unknown one."""

    def parse_known_args(self, args: Any = None, namespace: Any = None) -> Any:
        """Parse the words; of a command, refuse a flag that it has not before its value is taken for something else."""
        flags = self._option_string_actions
        for word in (args or ()) if " " in self.prog else ():
            if word == "--":
                break
            name = word.partition("=")[0]
            if not re.fullmatch(r"-[^\W\d][^\W\d][\w-]*|--[\w-]+", name) or any(
                flag.startswith(name) for flag in flags
            ):
                continue
            if name.startswith("--") or f"-{name}" in flags or name[1:] in HABITS or name[:2] not in flags:
                self.unknown([word])
        return super().parse_known_args(args, namespace)

    def error(self, message: str) -> NoReturn:
        """Print where the flags are listed and what is wrong, and exit with 2."""
        if choice := re.search(r"invalid choice: '(.+?)' \(choose from (.+)\)", message):
            message += self.near(choice[1], re.findall(r"[\w-]+", choice[2]))
        self.exit(2, f"usage: {self.prog} …   (all flags: {self.prog} --help)\n{self.prog}: {message}\n")

    def unknown(self, words: Sequence[str]) -> NoReturn:
        """Refuse words that no flag takes."""
        hint = "; a text with blanks stands in quotes"
        if words[0].startswith("-"):
            hint = self.near(words[0].partition("=")[0], list(self._option_string_actions))
        self.error(f"unknown: {' '.join(words)}{hint}")

    @staticmethod
    def near(word: str, known: Sequence[str]) -> str:
        """What is meant by `word`: what other programs call so, or the nearest of `known`."""
        name, plain = word.lstrip("-").replace("_", "-").lower(), {each.lstrip("-"): each for each in known}
        meant = HABITS.get(name, "")
        if not meant or (word.startswith("-") and meant.startswith("-") and meant.split(",")[0] not in known):
            meant = next((plain[each] for each in difflib.get_close_matches(name, plain, n=1)), "")
        return f"; {meant}" if ":" in meant else f"; did you mean {meant}?" if meant else ""


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    """The command and its flags; exits with 2 on wrong usage."""
    words = list(sys.argv[1:] if argv is None else argv)
    args, unknown = build_parser().parse_known_args([*words[1:2], "--help"] if words[:1] == ["help"] else words)
    if unknown:
        args.parser.unknown(unknown)
    useless = [name for name in ("top_k", "top_p", "min_p") if getattr(args, name, None) is not None]
    if useless and args.temperature == 0:
        args.parser.error(f"--{useless[0].replace('_', '-')} has no effect with --temperature 0")
    if args.command == "inspect" and args.shape and (args.check or args.mmproj or args.model != DEMO):
        args.parser.error("--shape is about no files, and stands without a model, --check and --mmproj")
    if getattr(args, "stream", False) and not args.json:
        args.parser.error("--stream prints JSON lines and goes with --json")
    if getattr(args, "top_logprobs", None) and not args.json:
        args.parser.error("--top-logprobs goes with --json")
    return args


def build_parser() -> argparse.ArgumentParser:
    """All commands and their flags."""
    parser = Parser(prog="minigemma", description="Gemma models on the CPU.")
    parser.add_argument("--version", action="version", version=f"minigemma {__version__}")
    commands = parser.add_subparsers(required=True, metavar="command", parser_class=Parser)

    def command(name: str, doc: str, *flags: Flags) -> argparse.ArgumentParser:
        made = commands.add_parser(name, help=doc, description=doc)
        for add in (*flags, add_common):
            add(made)
        made.set_defaults(command=name, parser=made)
        return made

    talking = (add_model, add_mmproj, add_machine, add_talking)
    made = command("generate", "Continue a text; an instruction-tuned model answers it.", add_text, *talking, add_json)
    add_turns(made)
    made.add_argument("--stream", action="store_true", help="with --json: one JSON object per token, then the summary")
    made = command("chat", "Hold a conversation; /help lists the commands.", *talking)
    made.add_argument("--json", action="store_true", help="print one JSON object per answer")
    doc = "Answer each line of a JSONL file; several decode together, and a run that was killed goes on."
    add_turns(command("batch", doc, add_batch, add_model, add_machine, add_sampling, add_parallel))
    doc = "Serve OpenAI's API to programs on this machine (extra [serve])."
    command("serve", doc, add_model, add_mmproj, add_machine, add_serving, add_parallel)
    doc = "Say how likely a text is: perplexity and, with -v, each token."
    made = command("score", doc, add_text, add_model, add_machine, add_json)
    told = "of a text longer than the context, score N tokens at a time, after those before them"
    made.add_argument("--stride", type=number(int, 1), metavar="N", help=told)
    doc = "Print the embedding of each text, for EmbeddingGemma (-m google/embeddinggemma-300m)."
    command("embed", doc, add_texts, add_model, add_machine, add_json)
    doc = "Show a run from inside in the browser: what each layer predicts, attention, gates; silence heads."
    made = command("explore", doc, add_model, add_machine)
    made.add_argument("--port", type=number(int, 0, 65_535), default=8008, help="of 127.0.0.1 (default: %(default)s)")
    doc = "Measure the model's speed and compare it with this machine's limits."
    command("bench", doc, add_model, add_machine, add_bench, add_json)
    doc = "Show sizes, layers, formats and the memory it takes, reading headers only."
    command("inspect", doc, add_inspected, add_model, add_mmproj, add_dtype, add_json)
    _commands_about_files(command)
    return parser


def _commands_about_files(command: Callable[..., argparse.ArgumentParser]) -> None:
    """Those that run no model, and the completion of all."""
    made = command("quantize", "Write a folder with smaller weights, which loads at once.", add_json)
    made.add_argument("model", metavar="SRC", help="folder, name or Hugging Face id of safetensors files")
    made.add_argument("target", metavar="DST", help="the folder to write, which must not exist yet")
    made.add_argument("--dtype", choices=NARROW, required=True, help="the format of matrices")
    made = command("vocab", "Make a small vocabulary: of a text alone, or of the pieces of a model's own.", add_json)
    made.add_argument("--data", nargs="+", required=True, metavar="FILE", help="plain text or jsonl, also .gz and .xz")
    made.add_argument("--out", required=True, metavar="FOLDER", help="the folder to write the tokenizer's files into")
    made.add_argument("--size", type=number(int, 512), default=4096, metavar="N", help="pieces (default: %(default)s)")
    made.add_argument("--from", dest="model", default="", metavar="MODEL", help="cut this model's vocabulary")
    doc = "Write a model as a folder for transformers, or as a GGUF file for llama.cpp (Gemma 1, 2 and 3)."
    made = command("export", doc, add_json)
    made.add_argument("model", metavar="MODEL", help="folder, file, name or Hugging Face id")
    made.add_argument("target", metavar="OUT", help="what to write, which must not exist yet")
    add_adapter(made)  # which is merged
    made.add_argument("--to", choices=["hf", "gguf"], help="default: gguf where OUT ends in .gguf, else hf, a folder")
    doc = "of matrices; f16, int8 (Q8_0) and int4 (Q4_0) in GGUF alone (default: bf16, or f32 where stored so)"
    made.add_argument("--dtype", choices=["f32", "bf16", "f16", "int8", "int4"], help=doc)
    made = command("download", "Fetch a model from the Hugging Face hub into its cache (extra [hub]).", add_json)
    made.add_argument("model", help="Hugging Face id, such as google/gemma-3-1b-it")
    made.add_argument("--revision", help="branch, tag or commit (default: main)")
    doc = "Train a small model on a text; Ctrl-C saves, --resume goes on."
    command("train", doc, add_training, add_json)
    doc = "Train a small model to predict what a larger one does; flags as of train."
    command("distill", doc, add_training, add_teacher, add_json)
    doc = "Change a model by prompts and answers, or a text: trains a LoRA adapter, as peft reads it, or all of it."
    add_turns(command("finetune", doc, add_finetuning, add_json))
    command("list", "List the models on this machine: name, size, kind.", add_json).set_defaults(model="list")
    made = command("remove", "Delete a model that `minigemma list` shows.")
    made.add_argument("model", metavar="NAME", help="its name in that list")
    made.add_argument("-y", "--yes", action="store_true", help="do not ask")
    made = command("completion", "Print a script that completes commands and flags in a shell.")
    made.add_argument("shell", choices=["bash", "zsh", "fish"], help='as in eval "$(minigemma completion bash)"')
    made.set_defaults(model="completion")


# ---- groups of flags


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
    context = number(int, 1)
    to.add_argument("-c", "--ctx-size", type=context, metavar="N", help="context in tokens (default: the model's)")


def add_mmproj(to: argparse.ArgumentParser) -> None:
    """Where the vision tower of a GGUF model is."""
    to.add_argument("--mmproj", metavar="FILE", help="the vision tower of a GGUF model, which has a file of its own")


def add_inspected(to: argparse.ArgumentParser) -> None:
    """What `inspect` shows; the model may stand without -m."""
    to.add_argument("model", nargs="?", default=argparse.SUPPRESS, metavar="MODEL", help="the same as -m")
    to.add_argument("--shape", metavar="NAME", help="a released size instead: what it takes, without any file")
    to.add_argument("--cpu", action="store_true", help="show which kernels run on this processor, and why")
    to.add_argument("--check", action="store_true", help="read every weight and look for NaN and infinity")


def piped() -> bool:
    """Whether a pipe or a file is on standard input; a terminal and /dev/null are none."""
    try:
        mode = os.fstat(sys.stdin.fileno()).st_mode
    except (AttributeError, OSError, ValueError):  # closed, or replaced by a program
        return False
    return stat.S_ISFIFO(mode) or stat.S_ISREG(mode) or stat.S_ISSOCK(mode)


def add_text(to: argparse.ArgumentParser) -> None:
    """Where the text comes from: exactly one of three, or a pipe."""
    source = to.add_mutually_exclusive_group(required=not piped())
    source.add_argument("text", nargs="?", metavar="TEXT", help="the text; -, or nothing after a pipe: standard input")
    source.add_argument("-p", "--prompt", metavar="TEXT", help="the same as a flag")
    source.add_argument("-f", "--file", type=Path, help="read it from a file, with the end of its last line")
    to.add_argument("--control-tokens", action="store_true", help="names of control tokens in the text become tokens")


def add_turns(to: argparse.ArgumentParser) -> None:
    """Whether a text becomes the user's turn of a conversation."""
    turns = to.add_mutually_exclusive_group()
    turns.add_argument("--raw", action="store_true", default=None, help="continue the text as it is, without turns")
    turns.add_argument("--turns", action="store_false", dest="raw", help="Gemma's turns, whatever the chat template")


def add_texts(to: argparse.ArgumentParser) -> None:
    """The texts to embed, and for which task."""
    source = to.add_mutually_exclusive_group(required=not piped())
    source.add_argument("texts", nargs="*", default=[], type=unicode, metavar="TEXT", help="one text or more")
    source.add_argument("-f", "--file", type=Path, help="read the texts from a file, one per line")
    to.add_argument("--prompt-name", metavar="NAME", help="the checkpoint's prompt for a task, such as query, document")
    to.set_defaults(prompt=None, text=None)


def add_machine(to: argparse.ArgumentParser) -> None:
    """How the model is run."""
    to.add_argument("-v", "--verbose", action="store_true", help="show tokens")
    to.add_argument("-t", "--threads", type=number(int, 1), metavar="N", help="(default: all cores)")
    to.add_argument("--force", action="store_true", help="load it even if it does not fit into memory")
    add_dtype(to)
    add_adapter(to)


def add_adapter(to: argparse.ArgumentParser) -> None:
    """What changes the model."""
    doc = "a LoRA adapter, as peft writes it; repeatable"
    to.add_argument("--adapter", action="append", default=[], metavar="DIR", help=doc)


def add_dtype(to: argparse.ArgumentParser) -> None:
    """In which format the weights are held."""
    to.add_argument("--dtype", choices=["f32", "bf16", *NARROW], help="hold the weights so (default: as stored)")


def add_talking(to: argparse.ArgumentParser) -> None:
    """What the model is told and shown, and how it answers."""
    to.add_argument("--system", type=unicode, metavar="TEXT", help="an instruction for the whole conversation")
    to.add_argument("--image", action="append", default=[], metavar="FILE", help="show the model an image; repeatable")
    to.add_argument("--pan-and-scan", action="store_true", help="show it crops of wide and tall images too")
    told = "keep the cache of the text in FILE: what it has of the text is not read again"
    to.add_argument("--prompt-cache", type=Path, metavar="FILE", help=told)
    told = "guess tokens, which are checked several at once: prompt looks them up in the text; or a smaller model"
    to.add_argument("--draft", metavar="prompt|MODEL", help=told)
    told = "with --json: the N likeliest tokens with each token, and their log-probabilities"
    to.add_argument("--top-logprobs", type=number(int, 1), metavar="N", help=told)
    to.add_argument("--exact-logits", action="store_true", help="no shortcut for the logits of unlikely tokens")
    add_sampling(to)
    add_steering(to)


def add_sampling(to: argparse.ArgumentParser) -> None:
    """How the next token is chosen, and where the text ends."""
    kinds = {name: kind for name, (kind, _) in SETTINGS.items()}
    flags, most = ("-n", "--max-new-tokens", "--max-tokens"), SETTINGS["max_new_tokens"]
    to.add_argument(*flags, type=most[0], default=most[1], metavar="N", help="(default: %(default)s)")
    likeliest = "0: always the likeliest token"
    to.add_argument("--temperature", "--temp", type=kinds["temperature"], metavar="X", help=likeliest)
    to.add_argument("--top-k", type=kinds["top_k"], metavar="N", help="choose among the N likeliest")
    to.add_argument("--top-p", type=kinds["top_p"], metavar="X", help="… among those that make up X")
    to.add_argument("--min-p", type=kinds["min_p"], metavar="X", help="… at least X times as likely as the first")
    to.add_argument("-s", "--seed", type=kinds["seed"], metavar="N", help="make sampling repeatable")
    to.add_argument("--stop", action="append", default=[], type=nonempty, metavar="TEXT", help="end before; repeatable")


def add_steering(to: argparse.ArgumentParser) -> None:
    """What changes the logits before a token is chosen: the settings of text/processors.py."""
    for name, told in (
        ("repetition", "lower logits of tokens in prompt and answer: divide by X (default: the checkpoint's, else 1)"),
        ("frequency", "lower them by X for each time that a token is in the answer"),
        ("presence", "lower them by X for each token that is in the answer"),
    ):
        to.add_argument(f"--{name}-penalty", type=SETTINGS[f"{name}_penalty"][0], metavar="X", help=told)
    told = "add to a token's logit, as 1234-2.5 or 1234+1; -inf forbids it; repeatable"
    to.add_argument("--logit-bias", action="append", type=bias, metavar="ID±X", help=told)
    form = to.add_mutually_exclusive_group()
    form.add_argument("--json-schema", type=Path, metavar="FILE", help="the answer is JSON of this schema [structured]")
    form.add_argument("--regex", type=nonempty, metavar="PATTERN", help="the answer as a whole matches it [structured]")
    told = "the answer is one of these texts; repeatable [structured]"
    form.add_argument("--choice", action="append", type=nonempty, dest="choices", metavar="TEXT", help=told)


def add_batch(to: argparse.ArgumentParser) -> None:
    """The files of `minigemma batch`."""
    to.add_argument("input", type=Path, metavar="IN.jsonl", help='lines {"prompt": "…"}, or of OpenAI\'s batch form')
    to.add_argument("output", type=Path, metavar="OUT.jsonl", help="a line per answer; what it has already stays")
    to.add_argument("--engine", choices=["here", "ray"], default="here", help="ray: on many machines (docs/scale.md)")
    to.add_argument("--address", metavar="ADDRESS", help="of the Ray cluster (default: one that begins and ends here)")


def add_parallel(to: argparse.ArgumentParser) -> None:
    """How many texts share the model."""
    together = "texts that decode together (default: %(default)s)"
    to.add_argument("--parallel", type=number(int, 1, 256), default=16, metavar="N", help=together)


def add_serving(to: argparse.ArgumentParser) -> None:
    """Adds the address, the port, the key and the limits of the server."""
    to.add_argument("--host", default="127.0.0.1", help="the address; another than this machine's takes --api-key")
    to.add_argument("--port", type=number(int, 0, 65_535), default=8080, help="(default: %(default)s)")
    waiting = "requests that may wait; more are refused (default: %(default)s)"
    to.add_argument("--queue", type=number(int, 0, 100_000), default=64, metavar="N", help=waiting)
    to.add_argument("--api-key", type=nonempty, metavar="KEY", help="what clients must show; @FILE: it stands there")


def add_bench(to: argparse.ArgumentParser) -> None:
    """What is measured."""
    whole = number(int, 1)
    to.add_argument("--shape", metavar="NAME", help="random weights of this released size instead of -m")
    to.add_argument("--layers", type=whole, metavar="N", help="only the first N of them, and of the vision tower's")
    lengths = "one length or more; decoding follows the longest (default: 512; for --plot 8,32,128,512)"
    to.add_argument("--prompt-tokens", type=counts, metavar="N,…", help=lengths)
    to.add_argument("-n", "--new-tokens", type=whole, default=32, metavar="N", help="(default: %(default)s)")
    to.add_argument("-r", "--repeat", type=whole, default=3, metavar="N", help="rounds (default: %(default)s)")
    to.add_argument("--positions", type=positions, default=[], metavar="N,…", help="time per token at these positions")
    to.add_argument("--image", action="store_true", help="time of an image, for a model with a vision tower")
    to.add_argument("--plot", type=Path, metavar="FILE.png", help="draw the speeds under the roofline of this machine")
