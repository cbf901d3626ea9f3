"""`minigemma inspect`: what a checkpoint is and what it takes, from its headers."""

from __future__ import annotations

import argparse
import re
from itertools import chain, repeat
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..config import TextConfig, VisionConfig
from ..errors import ModelFormatError
from ..files.load import describe, not_finite, planned
from ..files.resolve import model_name, resolve
from .opening import with_context
from .progress import Progress, print_json

if TYPE_CHECKING:
    from ..files.load import Description

KINDS = {True: "instruction-tuned", False: "pretrained only", None: "a released size"}
SIZES = ("width", "ffn_width", "heads", "kv_heads", "head_dim", "vocab", "context")


def run(args: argparse.Namespace, progress: Progress) -> None:
    """Print sizes, layers, formats and memory; with --cpu, which kernels run here."""
    if args.cpu:
        show_cpu(args)
        return
    if args.shape:
        about = planned(args.shape, args.dtype or "bf16")
    else:
        about = describe(resolve(args.model), args.dtype, mmproj=args.mmproj)
    report = summary(about, with_context(about.config, args.ctx_size))
    if args.check:
        check_weights(args, about.files[0], progress)
        report["check"] = f"all values of {len(about.tensors):,} tensors are finite"
    if args.json:
        print_json(report)
    else:
        print(table(report))


def table(report: dict[str, Any]) -> str:
    """The report for people."""
    memory = report["memory"]
    files = [f"{name}  {bytes_text(size)}" for name, size in report["files"].items()] or ["none: as released"]
    meanings = {"l": f"sees {report['window'] or 0:,} tokens", "g": "sees all", "r": "recurrent"}
    meaning = ", ".join(f"{letter}: {m}" for letter, m in meanings.items() if letter in report["pattern"])
    lines = [
        f"{report['name']}: {report['family']}, {report['kind']}",
        "files       " + "\n            ".join(files),
        f"parameters  {report['parameters']:,}, {report['embedding_parameters']:,} of them the embedding",
        "sizes       " + ", ".join(f"{name} {size:,}" for name, size in report["sizes"].items()),
        f"layers      {report['layers']}: {report['pattern']}  ({meaning})",
    ]
    if "check" in report:
        lines.append(f"check       {report['check']}")
    for label, row in zip(chain(["tensors"], repeat("")), report["tensors"], strict=False):
        size, shape = bytes_text(row["bytes"]), str(row["shape"])
        runs = f"{row['runs_as']:14} {bytes_text(row['memory']):>9}"
        lines.append(f"{label:12}{row['count']:3} × {row['format']:8} {shape:16} {size:>9} → {runs}  {row['name']}")
    if v := report["vision"]:
        lines.append(
            f"vision      {v['parameters']:,} parameters, {v['layers']} layers: {v['side']} x {v['side']} pixels → "
            f"{v['patches']:,} patches → {v['tokens']} tokens per image"
        )
    lines.append(
        f"memory      weights {bytes_text(memory['weights'])} + cache of {report['sizes']['context']:,} tokens "
        f"{bytes_text(memory['cache'])} = {bytes_text(memory['total'])}"
    )
    return "\n".join(lines)


def check_weights(args: argparse.Namespace, path: Path, progress: Progress) -> None:
    """Raise ModelFormatError if any weight is NaN or infinite."""
    progress("reading all weights")
    wrong = not_finite(args.model, args.mmproj, progress.per_cent("reading all weights"))
    progress("")
    if wrong:
        first = ", ".join(f"{count:,} of {name}" for name, count in list(wrong.items())[:5])
        more = " …" if len(wrong) > 5 else ""
        raise ModelFormatError(path, f"NaN or infinite are {first}{more}", "fetch the weights again")


def show_cpu(args: argparse.Namespace) -> None:
    """Print which kernels run here, how many threads share them, and the measured peak of each multiply instruction."""
    from ..kernels.amx import choice
    from ..kernels.dispatch import rows
    from ..kernels.parallel import default_threads, most_threads, threading_layer
    from ..kernels.peaks import PEAKS
    from ..kernels.simd.cpu import paths

    chosen, why = choice()
    told = {
        **paths(),
        "AMX": f"{ {'vectors': 'not used', 'AMX': 'used'}.get(chosen, chosen) }: {why}",
        "threads": f"{default_threads()} of at most {most_threads()}",
        "regions": threading_layer(),
    }
    told |= {f"{layout}, {work} tokens": f"x in {path.form}; {path.multiplies}" for layout, work, path in rows()}
    used = dict.fromkeys(path.multiplies for *_, path in rows())
    told |= {f"peak, {name}": f"{PEAKS[name]() / 1e9:,.0f} GFLOP/s from registers, all threads" for name in used}
    if args.json:
        print_json(told)
        return
    for name, text in told.items():
        print(f"{name:28}{text}")


def summary(about: Description, config: TextConfig) -> dict[str, Any]:
    """What `inspect` prints, as plain numbers and texts."""
    kinds = [config.kind(layer) for layer in range(config.layers)]
    cache = config.cache_bytes(config.context)
    return {
        "name": config.name or model_name(about.files[0]),
        "family": config.family,
        "kind": KINDS[about.instruction_tuned],
        "files": {str(file): file.stat().st_size for file in about.files},
        "parameters": config.embedding_parameters + config.non_embedding_parameters,
        "embedding_parameters": config.embedding_parameters,
        "sizes": {name: getattr(config, name) for name in SIZES},
        "layers": config.layers,
        "pattern": "".join(kind[0] for kind in kinds),
        "window": config.attention(kinds.index("local")).window if "local" in kinds else None,
        "vision": vision_summary(config.vision),
        "tensors": tensor_kinds(about),
        "memory": {"weights": about.weight_bytes, "cache": cache, "total": about.weight_bytes + cache},
    }


def vision_summary(vision: VisionConfig | None) -> dict[str, int] | None:
    """What `inspect` prints about the vision tower, if there is one."""
    if vision is None:
        return None
    told = {name: getattr(vision, name) for name in ("parameters", "layers", "side", "patch", "tokens")}
    return told | {"patches": vision.grid**2}


def tensor_kinds(about: Description) -> list[dict[str, Any]]:
    """One row for all layers' tensors of one role, format and shape: bytes in the file, layout and bytes in memory."""
    rows: dict[tuple, dict[str, Any]] = {}
    for name, (form, shape, size) in about.tensors.items():
        role, (runs, held) = re.sub(r"\.\d+\.", ".*.", name), about.held[name]
        new = {"name": role, "format": form, "shape": list(shape), "count": 0, "bytes": 0, "runs_as": runs, "memory": 0}
        row = rows.setdefault((role, form, shape), new)
        row["count"] += 1
        row["bytes"] += size
        row["memory"] += held
    return list(rows.values())


def bytes_text(size: float) -> str:
    """A number of bytes for people: 4.6 kB, 253.1 MB, 5.4 GB."""
    unit, name = next((u, n) for u, n in ((1e9, "GB"), (1e6, "MB"), (1e3, "kB")) if size >= u or n == "kB")
    return f"{size / unit:,.1f} {name}"
