"""What most commands begin with: the model that the flags name, and what they show it."""

from __future__ import annotations

import argparse
from dataclasses import replace
from functools import partial
from typing import TYPE_CHECKING

from ..config import TextConfig
from ..files.load import load
from ..kernels.parallel import default_threads
from ..models.decoder import Decoder
from ..text.seeing import Seen, look_at
from .progress import Progress, note

if TYPE_CHECKING:
    from ..files.images import PanAndScan


def open_model(args: argparse.Namespace, progress: Progress, vision: bool = False) -> Decoder:
    """The model that -m names, loaded as the flags say; `vision`: with its vision tower."""
    progress(f"loading {args.model}")
    if args.threads and args.threads > default_threads():
        note(args, f"{args.threads} threads are more than there are cores for; using {default_threads()}")
        args.threads = default_threads()
    progress.watch_compiler()
    more = {"vision": vision, "mmproj": getattr(args, "mmproj", None), "context": args.ctx_size, "force": args.force}
    more["adapter"] = args.adapter
    shown = progress.per_cent(f"loading {args.model}")
    model = load(args.model, args.dtype, threads=args.threads, progress=shown, **more)
    if model.tokenizer is None:
        raise ValueError("there is no tokenizer.model or tokenizer.json; fetch one from where the weights came from")
    model.config = with_context(model.config, args.ctx_size)
    return model


def open_draft(args: argparse.Namespace, progress: Progress) -> Decoder | str | None:
    """What --draft names: "prompt", or a model."""
    if args.draft in (None, "prompt"):
        return args.draft
    progress(f"loading {args.draft}")
    return load(args.draft, threads=args.threads, vision=False, force=args.force)


def with_context(config: TextConfig, tokens: int | None) -> TextConfig:
    """The config with the context of -c, which may be shorter than the model's but not longer."""
    if tokens and tokens > config.context:
        raise ValueError(f"the context is {config.context:,} tokens and -c asks for {tokens:,}; ask for less")
    return replace(config, context=tokens or config.context)


def see(model: Decoder, args: argparse.Namespace, progress: Progress) -> Seen:
    """The images of --image, run through the vision tower."""
    progress(f"looking at {', '.join(args.image)}")
    crops: PanAndScan | None = None
    if args.pan_and_scan:
        from ..files.images import PanAndScan  # and with it Pillow, which text does not need

        crops = PanAndScan()
    return look_at(model, args.image, crops, partial(note, args))
