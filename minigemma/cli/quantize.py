"""`minigemma quantize`: a released folder with its matrices in 8 or 4 bits a weight, which `load` maps straight back.

The folder is as Hugging Face's: config.json and the tokenizer are copied, and the tensors keep their names, in one
model.safetensors. A matrix [R, D] becomes the bytes of a layout or stored form (layouts/ says which byte is what).
What is no matrix, and matrices whose rows are no whole blocks, stay as they are. The matrices on which the text depends
most stay int8 in an int4 model: `in_eight_bits` in files/convert.py.
"""

import argparse
import shutil
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from ..errors import ModelFormatError
from ..files.convert import FORMS, NARROW, Stored, converted, form_for, is_matrix, some_rows, widened
from ..files.open import open_files
from ..files.resolve import resolve
from ..files.safetensors_file import write_safetensors
from ..models.registry import FAMILIES
from .inspect import bytes_text
from .progress import Progress, print_json
from .values import check_new

COPIED = (
    *("config.json", "generation_config.json", "preprocessor_config.json", "chat_template.json", "chat_template.jinja"),
    *("tokenizer.model", "tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json"),
)


@dataclass
class Report:
    """What quantizing did: bytes before and after, and how far the weights moved."""

    dtype: str
    bytes_before: int = 0
    bytes_after: int = 0
    squares: dict[str, list[float]] = field(default_factory=dict)  # role → [Σ (difference)², Σ weight²]

    @property
    def errors(self) -> dict[str, float]:
        """Root mean square of the differences over that of the weights, for each role of a matrix."""
        return {role: (missed / max(whole, 1e-30)) ** 0.5 for role, (missed, whole) in self.squares.items()}


def run(args: argparse.Namespace, progress: Progress) -> None:
    """Write the folder and print its size, and for each role of a matrix how far its weights moved."""
    progress(f"quantizing {args.model}")
    progress.watch_compiler()
    report = quantize(args.model, args.target, args.dtype, progress.per_cent(f"quantizing {args.model}"))
    progress("")
    if args.json:
        sizes = {"bytes_before": int(report.bytes_before), "bytes_after": int(report.bytes_after)}
        print_json({"folder": args.target, "dtype": args.dtype, **sizes, "errors": report.errors})
        return
    print(f"{args.target}: {bytes_text(report.bytes_before)} → {bytes_text(report.bytes_after)}")
    for role, error in report.errors.items():
        print(f"{100 * error:7.2f} %  {role}")


def quantize(
    source: str | Path, target: str | Path, dtype: str, progress: Callable[[int, int], None] = lambda done, total: None
) -> Report:
    """Write the folder `target` from the folder or name `source`; it appears when it is complete, or not at all.

    Raises ModelFormatError where the source cannot be used or the target exists, ValueError for another dtype.
    """
    if dtype not in NARROW:
        raise ValueError(f"dtype is {dtype!r}; it must be one of {', '.join(NARROW)}")
    folder, target = resolve(source), Path(target)
    folder = folder.parent if folder.suffix == ".safetensors" else folder
    if not folder.is_dir():
        raise ModelFormatError(folder, "is no folder of safetensors files", "a GGUF file is quantized already")
    check_new(target)
    files = open_files(folder)
    _refuse_quantized(folder, files.tensors, dtype)
    report = Report(dtype)
    entries = [_entry(ours, tensor, dtype) for ours, tensor in files.tensors.items()]
    total, done = sum(t.array.nbytes for t in files.tensors.values()), 0

    def parts() -> Iterator[Iterator[np.ndarray]]:
        nonlocal done
        for ours, tensor in files.tensors.items():
            yield _parts(ours, tensor, dtype, report)
            done += tensor.array.nbytes
            progress(done, total)

    with _appearing(target) as partial:
        write_safetensors(partial / "model.safetensors", entries, parts())
        for name in (*COPIED, *FAMILIES[files.config.family].json_files):
            if (folder / name).exists():
                (partial / name).parent.mkdir(exist_ok=True)
                shutil.copyfile(folder / name, partial / name)
    report.bytes_before = total
    report.bytes_after = sum(np.prod(shape, dtype=int) * _SIZE[kind] for _, kind, shape in entries)
    return report


@contextmanager
def _appearing(target: Path) -> Iterator[Path]:
    """A folder beside `target` to write into, which becomes `target` when all went well and is removed otherwise."""
    partial = target.with_name(f"{target.name}.partial")
    try:
        partial.mkdir()
    except FileExistsError:
        problem = "is there already: another conversion writes it, or one was ended half-way"
        raise ModelFormatError(partial, problem, "delete it if nothing else is running") from None
    try:
        yield partial
        partial.rename(target)
    except BaseException:
        shutil.rmtree(partial, ignore_errors=True)
        raise


def _refuse_quantized(folder: Path, tensors: Mapping[str, Stored], dtype: str) -> None:
    """Raise ModelFormatError for a source that is quantized already: a second rounding would add its own error."""
    if kinds := sorted({t.kind for ours, t in tensors.items() if is_matrix(ours, t)} - set(_SIZE)):
        problem = f"is quantized already ({', '.join(kinds)}), and {dtype} of it would round twice"
        raise ModelFormatError(folder, problem, "quantize the release in bf16 or float32")


_SIZE = {"F32": 4, "F16": 2, "BF16": 2, "U8": 1, "I8": 1}


def _form(ours: str, tensor: Stored, dtype: str) -> str | None:
    """The form that a tensor is written in; None: as it is."""
    if not is_matrix(ours, tensor) or ours == "vision.projection" or tensor.kind not in _SIZE:
        return None
    wanted = form_for(tensor, dtype, ours)
    return wanted if wanted in NARROW else None


def _entry(ours: str, tensor: Stored, dtype: str) -> tuple[str, str, tuple[int, ...]]:
    """(name, dtype, shape) as the header of the new file has them."""
    wanted = _form(ours, tensor, dtype)
    if wanted is None:
        kind = {np.dtype(np.uint8): "U8", np.dtype(np.int8): "I8"}.get(tensor.array.dtype, tensor.kind)
        return tensor.name, kind, tensor.array.shape
    R, D = tensor.shape
    return tensor.name, "I8" if wanted == "int8-row" else "U8", FORMS[wanted].data_shape(R, D)


def _parts(ours: str, tensor: Stored, dtype: str, report: Report) -> Iterator[np.ndarray]:
    """The tensor's bytes in its new form, some rows at a time."""
    wanted = _form(ours, tensor, dtype)
    if wanted is None:
        yield tensor.array
        return
    role = ".".join(part for part in ours.split(".") if not part.isdigit())
    sums = report.squares.setdefault(role, [0.0, 0.0])
    for rows in some_rows(tensor):
        made, wide = converted(tensor.kind, rows, wanted), widened(tensor.kind, rows)
        sums[0] += float(np.square(FORMS[wanted].unpack(made) - wide, dtype=np.float64).sum())
        sums[1] += float(np.square(wide, dtype=np.float64).sum())
        yield made
