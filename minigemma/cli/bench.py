"""`minigemma bench`: a model's speed on this machine, compared with the machine's limits."""

import argparse
from collections.abc import Callable
from typing import Any

from ..models.decoder import Decoder
from .measure import SCAN_TOKENS, Plan, Program, bench
from .opening import open_model, with_context
from .progress import Progress, print_json
from .random_weights import random_model
from .roofline import plottable, roofline

Others = Callable[[Decoder, Progress], tuple[dict[str, Program], dict[str, str]]]


def run(args: argparse.Namespace, progress: Progress, others: Others = lambda model, progress: ({}, {})) -> None:
    """Measure the model and print the report.

    others: makes other programs with its weights, and names those that are missing.
    """
    if args.plot:
        plottable(args.plot)
    model = _model(args, progress)
    *lengths, longest = sorted(set(args.prompt_tokens or ((8, 32, 128, 512) if args.plot else (512,))))
    plan = Plan(longest, args.new_tokens, args.positions, args.repeat, args.image, lengths)
    programs, missing = others(model, progress)
    report = bench(model, plan, programs, progress)
    report |= {"weights": "random" if args.shape else str(args.model), "missing": missing}
    if args.plot:
        roofline(report, args.plot)
    progress("")
    if args.json:
        print_json(report)
    else:
        print(table(report))


def _model(args: argparse.Namespace, progress: Progress) -> Decoder:
    """The model of -m, or with --shape one of random weights."""
    if not args.shape:
        return open_model(args, progress, vision=args.image)
    args.model = args.shape
    progress(f"making random weights for {args.shape}")
    progress.watch_compiler()
    model = random_model(args.shape, args.dtype or "bf16", args.layers, threads=args.threads, vision=args.image)
    model.config = with_context(model.config, args.ctx_size)
    return model


def table(report: dict[str, Any]) -> str:
    """The report as text: a line per number, with its limit where it has one."""
    r, programs = report, dict(report["programs"])
    ours = programs.pop("minigemma")
    gigabytes = r["weight_bytes"] / 1e9
    reached = 100 * ours["prefill_tps"] * r["flops_per_token"] / r["flops_per_second"]
    lines = [
        f"{r['name']}: {r['parameters']:,} parameters, {r['dtype']}, {gigabytes:,.2f} GB, weights {r['weights']}",
        f"machine     reads {r['read_bytes_per_second'] / 1e9:,.1f} GB/s, multiplies "
        f"{r['flops_per_second'] / 1e9:,.0f} GFLOP/s in {r['multiplies']}; {r['threads']} threads, {r['vectors']}",
        f"prompt      {ours['prefill_tps']:,.1f} tokens/s over {r['prompt_tokens']:,}, the first token after "
        f"{ours['seconds_to_first_token']:,.3g} s, {reached:.0f} % of the arithmetic",
        f"decode      {ours['decode_tps']:,.2f} tokens/s, {100 * ours['decode_tps'] / r['decode_limit_tps']:.0f} % of "
        f"the {r['decode_limit_tps']:,.2f} that reading {r['read_bytes_per_token'] / 1e9:,.2f} GB per token allows",
        f"memory      {r['resident_bytes'] / 1e9:,.2f} GB resident",
    ]
    if "scan_bytes_per_second" in r:
        speed = r["scan_bytes_per_second"]
        share = 100 * speed / r["read_bytes_per_second"]
        lines.append(f"scan        {speed / 1e9:,.1f} GB/s over {SCAN_TOKENS:,} tokens, {share:.0f} % of reading")
    for name, its in programs.items():
        ratios = [ours[kind] / its[kind] for kind in ("prefill_tps", "decode_tps")]
        lines.append(
            f"{name:11} prompt {its['prefill_tps']:,.1f}, decode {its['decode_tps']:,.2f} tokens/s; "
            f"minigemma is {ratios[0]:.1f} and {ratios[1]:.1f} times as fast"
        )
    for length, speeds in r["prefill_tps_of"].items():
        each = ", ".join(f"{name} {tps:,.1f}" for name, tps in speeds.items())
        lines.append(f"a prompt    of {int(length):,} tokens: {each} tokens/s")
    lines += [f"{name:11} not measured: {why}" for name, why in r.get("missing", {}).items()]
    for name, seconds in r.get("image", {}).items():
        lines.append(f"image       {name:24} {seconds:8.2f} s")
    for name, seconds in r.get("tower_seconds", {}).items():
        lines.append(f"tower       {name:24} {seconds:8.2f} s an image")
    for position, milliseconds in r.get("milliseconds_per_token_at", {}).items():
        lines.append(f"a token     at position {int(position):>9,} {milliseconds:8.2f} ms")
    return "\n".join(lines)
