"""`minigemma generate`: continue a text, or, with an instruction-tuned model, answer it."""

import argparse
import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from ..cache import Cache
from ..files.cache_file import load_cache
from ..files.safetensors_file import read_json
from ..models.decoder import Decoder
from ..text.generation import Token, prefill, prompt_ids, stream_generate
from ..text.processors import Steering
from ..text.seeing import Seen
from .main import Interrupt
from .opening import open_draft, open_model, see
from .progress import START, Progress, note, print_json
from .values import read_text

SUMMARY = ("finish_reason", "prompt_tokens", "generation_tokens", "prompt_tps", "generation_tps")


def run(args: argparse.Namespace, progress: Progress) -> None:
    """Print the text that follows the prompt, then a line of timings on stderr; with --json all of it as JSON."""
    text = read_text(args)
    model = open_model(args, progress, vision=bool(args.image))
    seen = see(model, args, progress) if args.image else ()
    turns = {"system": args.system, "raw": args.raw, "control": args.control_tokens}
    ids = prompt_ids(model, text, crops=seen.crops if seen else (), **turns)
    args.draft = open_draft(args, progress)
    if args.verbose:
        note(args, f"prompt {[(i, token_text(model, i)) for i in ids]}")
    progress(f"reading the prompt ({len(ids):,} tokens)")
    shown = progress.watched("reading the prompt")
    more: dict[str, Any] = {}
    held = 0
    if args.prompt_cache:
        more["cache"], held = read_with(model, args.prompt_cache, ids, seen, shown)
        note(args, f"{held:,} of the prompt's {len(ids):,} tokens were in {args.prompt_cache}")
    rest = ids[-1:] if more else ids
    tokens = stream_generate(model, rest, seen, **more, **settings(args), **shown)
    report = show(json_lines(tokens) if args.stream else tokens, progress, silent=args.json)
    report |= {"prompt_tokens": len(ids), "cached_tokens": held} if more else {}
    if args.json:
        print_json(report)
    elif not args.quiet:
        print_speed(report)


def read_with(
    model: Decoder, path: Path, ids: list[int], seen: Seen | Sequence[Any], shown: dict[str, Any]
) -> tuple[Cache, int]:
    """A cache of all of `ids` but the last, and how many of them `path` had; all of them are in `path` afterwards.

    The last token is read in any case: its logits are what an answer begins with. Where the file has another text, as
    much of its beginning is used as a cache can go back to (`Cache.can_copy`).
    """
    if len(seen):
        raise ValueError("--prompt-cache keeps text alone; leave out --image")
    begin = np.array(ids[:-1], np.int32)
    cache = load_cache(model, path) if path.exists() else model.new_cache(model.config.context)
    common = min(len(begin), cache.position)
    same = cache.ids[:common] == begin[:common]
    shared = common if same.all() else int(same.argmin())
    if shared < cache.position:
        cache = cache.copy(shared) if shared and cache.can_copy(shared) else model.new_cache(model.config.context)
    held = cache.position
    if held < len(begin):
        if len(ids) >= model.config.context:
            stream_generate(model, ids)  # says that there is no room
        prefill(model, ids[held:-1], cache, **shown)
        cache.save(path)
    return cache, held


def token_text(model: Decoder, token: int) -> str:
    """The text of one token, or its name if it has none."""
    assert model.tokenizer, "open_model refuses a model without one"
    known = token < model.tokenizer.size
    return model.tokenizer.decode([token]) or model.tokenizer.piece(token) if known else "<image_soft_token>"


def settings(args: argparse.Namespace) -> dict[str, Any]:
    """The flags that `stream_generate` and `Chat.stream` take, as they name them."""
    names = ("max_new_tokens", "temperature", "top_k", "top_p", "min_p", "seed", "stop", "exact_logits")
    return {name: getattr(args, name) for name in names} | steering(args)


def steering(args: argparse.Namespace) -> dict[str, Any]:
    """The flags among `Steering` that are given, --top-logprobs and --draft."""
    found = {name: getattr(args, name, None) for name in (*Steering.__annotations__, "top_logprobs", "draft")}
    found["logit_bias"] = dict(args.logit_bias or ())
    found["json_schema"] = read_json(args.json_schema) if args.json_schema else None
    return {name: value for name, value in found.items() if value}


def json_lines(tokens: Iterator[Token]) -> Iterator[Token]:
    """The same tokens, each printed as a line of JSON on its way."""
    for token in tokens:
        told = {"text": token.text, "token": token.token, "logprob": token.logprob}
        print_json(told | ({"top_logprobs": token.top_logprobs} if token.top_logprobs else {}))
        yield token


def show(tokens: Iterator[Token], progress: Progress, began: float = START, silent: bool = False) -> dict[str, Any]:
    """Print tokens as they come (unless `silent`) and return what is known when they end."""
    seen: list[Token] = []
    first = 0.0
    for token in tokens:
        Interrupt.check()
        progress("")
        first = first or time.monotonic() - began
        seen.append(token)
        if not silent:
            print(token.text, end="", flush=True)
    text = "".join(token.text for token in seen)
    if not silent and not text.endswith("\n"):
        print(flush=True)
    told: dict[str, Any] = {"text": text, "tokens": [t.token for t in seen], "logprobs": [t.logprob for t in seen]}
    if seen[-1].top_logprobs:
        told["top_logprobs"] = [t.top_logprobs for t in seen]
    return told | {"seconds_to_first_token": first} | {name: getattr(seen[-1], name) for name in SUMMARY}


def print_speed(report: dict[str, Any]) -> None:
    """Print one line of timings on stderr."""
    print(
        f"[prompt {report['prompt_tokens']:,} tokens, {report['prompt_tps']:,.0f}/s · "
        f"answer {report['generation_tokens']:,} tokens, {report['generation_tps']:,.1f}/s · "
        f"first after {report['seconds_to_first_token']:.2f} s · ended by {report['finish_reason']}]",
        file=sys.stderr,
    )
