"""`minigemma batch`: a file of prompts in, a file of answers out; several decode together.

A line of the input is {"prompt": "…"}, or a request of OpenAI's batch form, {"custom_id", "url", "body"}. A line of the
output is written when its text ends, and says which line it answers. A run that was killed goes on where it stopped:
with the lines that have no answer yet.
"""

import argparse
import json
import os
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from reprlib import repr as short
from typing import Any, NamedTuple

from ..errors import FileError
from ..models.decoder import Decoder
from ..text.batch import Answer, started, together
from ..text.engine import Request
from ..text.generation import Token
from .main import Interrupt
from .openai_api import SAMPLING, Form, Reply, check_fields, prompt_of, refusal_of, settings_of, wants_logprobs
from .opening import open_model
from .progress import Progress, note, share_done

BEGINNING = b'{"line": '  # of each line of the output


class Line(NamedTuple):
    """A line of the input: its number from 1, and what it says, or why it cannot be read."""

    number: int
    row: dict[str, Any]
    fault: str = ""

    @property
    def openai(self) -> bool:
        """Is it of OpenAI's batch form?"""
        return "body" in self.row


def run(args: argparse.Namespace, progress: Progress) -> None:
    """Answer every line of the input that has no answer in the output yet."""
    lines = read_lines(args.input)
    if args.output.exists() and args.output.samefile(args.input):
        raise FileError(args.output, "is the input", "name another file for the answers")
    done = answered(args.output, lines)
    if done:
        note(args, f"{args.output} has {len(done):,} of {len(lines):,} answers; going on with the others")
    waiting = [line for line in lines if line.number not in done]
    if not waiting:
        return
    args.vision = any("'image_url'" in str(line.row) for line in waiting)
    if args.engine == "ray":
        from .batch_ray import answers_of_cluster

        answers = answers_of_cluster(waiting, args)
    else:
        answers = answers_of(open_model(args, progress, args.vision), waiting, args)
    progress(f"0 of {len(waiting):,} answers")
    with args.output.open("a", encoding="utf-8") as out:
        output = Answers(out, len(waiting), progress)
        failed = sum(output.put(*answer) for answer in answers)
    progress("")
    if failed:
        raise FileError(args.input, f"{failed:,} of its lines could not be answered", f"{args.output} says why")


Answered = tuple[int, dict[str, Any], bool]  # a line's number, its row of the output, and whether that is an error


def answers_of(model: Decoder, lines: Sequence[Line], args: argparse.Namespace) -> Iterator[Answered]:
    """The answer or error of each line, as soon as there is one."""
    texts, refused = dict[int, list[Token]](), list[Answered]()

    def begin(i: int) -> Answer:
        request = asked(model, lines[i], args)
        return started(model, request.ids, request.images, **request.settings)

    def failed(i: int, error: Exception) -> None:
        if isinstance(error, MemoryError):  # the next run may have more
            raise error
        texts.pop(i, None)
        refused.append((lines[i].number, error_row(lines[i], error), True))

    for token in together(model, begin, len(lines), args.parallel, failed):
        Interrupt.check()
        while refused:
            yield refused.pop()
        line, own = lines[token.index], texts.setdefault(token.index, [])
        own.append(token)
        if token.finish_reason:
            yield line.number, answer_row(model, line, texts.pop(token.index)), False
    yield from refused


class Answers:
    """The output while it is written."""

    def __init__(self, out: Any, count: int, progress: Progress) -> None:
        self.out, self.count, self.progress = out, count, progress
        self.began, self.written, self.tokens = time.monotonic(), 0, 0

    def put(self, number: int, row: dict[str, Any], failed: bool) -> bool:
        """Write one line, whole, at once; returns whether it is an error."""
        self.out.write(json.dumps({"line": number, **row}) + "\n")
        self.out.flush()
        self.written += 1
        self.tokens += row.get("generation_tokens", 0)
        speed = self.tokens / max(time.monotonic() - self.began, 1e-9)
        done = share_done(self.written, self.count, self.began)
        self.progress.doing = f"{self.written:,} of {self.count:,} answers, {speed:,.0f} tokens/s, {done}"
        return failed


# ---- the input


def read_lines(path: Path) -> list[Line]:
    """The lines of the input. Raises FileError for a file that has none; a line that is wrong has a `fault`."""
    try:
        content = path.read_bytes().decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise FileError(path, f"is not UTF-8 (near byte {error.start:,})", "convert it first") from None
    lines = [_line(number, text) for number, text in enumerate(content.split("\n"), 1) if text.strip()]
    if not lines:
        raise FileError(path, "has no lines", 'give it one {"prompt": "…"} per line')
    return lines


def _line(number: int, text: str) -> Line:
    try:
        row = json.loads(text)
    except (ValueError, RecursionError) as error:
        return Line(number, {}, f"is not JSON ({error})")
    if not isinstance(row, dict) or not isinstance(row.get("body", {}), dict):
        return Line(number, {}, 'is no object {"prompt": "…"}, nor a request with a body')
    return Line(number, row, _misaddressed(row) if "body" in row else "")


def _misaddressed(row: dict[str, Any]) -> str:
    """What is wrong around the body of a request; "" if nothing is."""
    if beside := sorted(row.keys() - {"id", "custom_id", "method", "url", "body"}):
        return f"has {short(beside[0])} beside its body; put it inside"
    forms = {"/v1/completions": "prompt", "/v1/chat/completions": "messages"}
    if row.get("method", "POST") != "POST" or ("url" in row and forms.get(str(row["url"])) not in row["body"]):
        return "is no POST of a prompt to /v1/completions, nor of messages to /v1/chat/completions"
    return ""


def asked(model: Decoder, line: Line, args: argparse.Namespace) -> Request:
    """The prompt, images and settings of a line, those of the flags where it says none. Raises ValueError."""
    if line.fault:
        raise ValueError(f"line {line.number} {line.fault}")
    body: Mapping[str, Any] = line.row.get("body", line.row)
    check_fields(body)
    if wants_logprobs(body) and not line.openai:
        raise ValueError("logprobs are shown in OpenAI's batch form alone")
    flags = {name: getattr(args, name) for name in (*SAMPLING, "max_new_tokens", "seed", "stop")}
    settings = settings_of(body, flags) | {"exact_logits": True}
    return prompt_of(model, body, args.raw)._replace(settings=settings)


# ---- the output


def answered(path: Path, lines: Sequence[Line]) -> set[int]:
    """The numbers of the lines that have an answer in the output. A last line that was cut off is removed from it.

    Raises FileError for an output of another input, and for a file that no run has written.
    """
    if not path.exists() and path != Path("-"):
        return set()
    if not path.is_file():
        raise FileError(path, "is no file", "answers go into one, so that a run that was stopped can go on")
    content = path.read_bytes()
    whole = content[: content.rfind(b"\n") + 1]
    rows = {line.number: line.row for line in lines}
    done, rest = set(), content[len(whole) :]
    texts = whole.splitlines() if rest.startswith(BEGINNING[: len(rest)]) else content.splitlines()
    for number, text in enumerate(texts, 1):
        try:
            row = json.loads(text)
            fits = all(row.get(name) == rows[row["line"]].get(name) for name in ("id", "custom_id"))
        except (ValueError, KeyError, TypeError, AttributeError):
            fits = False
        if not fits:
            raise FileError(path, f"line {number:,} answers no line of this input", "name another file for the answers")
        done.add(row["line"])
    if rest:
        os.truncate(path, len(whole))
    return done


def _named(line: Line) -> dict[str, Any]:
    """What the input calls the line."""
    return {name: line.row[name] for name in ("id", "custom_id") if line.row.get(name) is not None}


def error_row(line: Line, error: Exception) -> dict[str, Any]:
    """The answer to a line that cannot be answered."""
    body, status = refusal_of(error)
    if not line.openai:
        return _named(line) | {"error": body["error"]["message"]}
    return _named(line) | {"response": {"status_code": status, "body": body}, "error": None}


def answer_row(model: Decoder, line: Line, tokens: Sequence[Token]) -> dict[str, Any]:
    """The answer to a line, in the line's own form."""
    last, text = tokens[-1], "".join(token.text for token in tokens)
    counts = {"prompt_tokens": last.prompt_tokens, "generation_tokens": last.generation_tokens}
    if not line.openai:
        return _named(line) | {"text": text, "finish_reason": last.finish_reason, **counts}
    asked = line.row["body"]
    body = Reply(model, Form("messages" in asked, logprobs=wants_logprobs(asked)), model.name).whole(tokens)
    return _named(line) | {"response": {"status_code": 200, "body": body}, "error": None, **counts}
