"""`minigemma export`: a model, with adapters merged, as a folder for transformers or a GGUF file for llama.cpp."""

import argparse
from collections.abc import Mapping, Sequence
from pathlib import Path

from ..arrays import F32
from ..files.adapter import Merged, read_adapter
from ..files.gguf_write import save_gguf
from ..files.open import open_files
from ..files.resolve import resolve
from ..files.save import Parameters, save_model
from .inspect import bytes_text
from .progress import Progress, print_json
from .values import check_new


def run(args: argparse.Namespace, progress: Progress) -> None:
    """Write the folder or file, and print its size."""
    target = Path(args.target)
    check_new(target)
    progress(f"writing {target}")
    kind, dtype = write_model(args.model, target, args.to, args.dtype, args.adapter)
    progress("")
    size = sum(path.stat().st_size for path in (target.iterdir() if target.is_dir() else [target]))
    if args.json:
        print_json({"path": args.target, "to": kind, "dtype": dtype, "bytes": size})
    else:
        print(f"{target}: {bytes_text(size)}, {dtype}")


def write_model(
    model: str, target: Path, kind: str | None, dtype: str | None, adapters: Sequence[str]
) -> tuple[str, str]:
    """Write a model with adapters merged; returns what was written, "hf" or "gguf", and its dtype."""
    kind = kind or ("gguf" if target.suffix == ".gguf" else "hf")
    files = open_files(resolve(model), vision=False)
    dtype = dtype or ("f32" if files.tensors["embedding"].kind == "F32" else "bf16")
    if kind == "hf" and dtype not in ("f32", "bf16"):
        raise ValueError(f"transformers' folders hold f32 or bf16, not {dtype}; --to gguf, or `minigemma quantize`")
    tokenizer = files.make_tokenizer()
    if tokenizer is not None:
        tokenizer.add(files.states.added, files.config.vocab)
    parameters: Mapping[str, F32] = Parameters(files)
    if adapters:
        parameters = Merged(parameters, [read_adapter(folder, files.config) for folder in adapters])
    write = save_gguf if kind == "gguf" else save_model
    write(target, files.config, parameters, tokenizer, dtype, files.states)
    return kind, dtype
