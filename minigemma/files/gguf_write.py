"""A model as a GGUF file, which llama.cpp and `load` read: gguf_file.py has the format.

Matrices are stored as float32, float16 or bf16, or in blocks of 32 as Q8_0 or Q4_0; other tensors as float32. As in
files of llama.cpp's own converter, a norm's weight is stored as 1 + w and a user-defined piece with real blanks. Rows
of the embedding without a piece get an unused one.
"""

from __future__ import annotations

import struct
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

import numpy as np
from numpy.typing import NDArray

from ..arrays import F32, round_bf16
from ..config import TextConfig
from ..layouts import int4, int8
from ..models.fields import Fields
from ..models.registry import FAMILIES, all_names
from .gguf_file import ARRAY, SCALARS, STRING, TYPES, U32
from .safetensors_file import written
from .save import HEAD, check_stated, replacing_files
from .statements import UNSAID, Statements
from .tokenizer import CONTROL, SPACE, UNUSED, USER_DEFINED, Tokenizer

ALIGNMENT = 32
I32_, F32_, BOOL = 5, 6, 7  # metadata types
NUMBERS = {name: number for number, (name, *_) in TYPES.items()}


class Form(NamedTuple):
    """How a matrix is stored: its type, what `general.file_type` says then, and float32 rows → bytes."""

    type: str
    file_type: int
    pack: Callable[[F32], NDArray[Any]]


FORMS = {
    "f32": Form("F32", 0, lambda x: x),
    "f16": Form("F16", 1, lambda x: x.astype(np.float16)),
    "bf16": Form("BF16", 32, round_bf16),
    "int8": Form("Q8_0", 7, int8.pack),
    "int4": Form("Q4_0", 2, int4.quantize_q4_0),
}


def save_gguf(
    path: str | Path,
    config: TextConfig,
    parameters: Mapping[str, F32],
    tokenizer: Tokenizer | None,
    dtype: str = "bf16",
    states: Statements = UNSAID,
) -> None:
    """Write the text model as the file `path`, which appears once it is whole.

    dtype: one of FORMS; the embedding of an int4 model is int8, and rows of incomplete blocks are float16.
    states: what the checkpoint it comes from says of turns, which the file then says too.
    Raises ValueError for a family that llama.cpp lacks and for a config that a header cannot express, OSError if the
    file cannot be written.
    """
    path, family, config = Path(path), FAMILIES[config.family], replace(config, vision=None)
    if family.to_gguf is None or family.from_gguf is None:
        raise ValueError(f"llama.cpp has no {family.title}, so no GGUF file can hold it; write a folder: --to hf")
    fields = family.to_gguf(config)
    check_stated(config, family.from_gguf(Fields(fields), config.vocab), "GGUF header")
    metadata: dict[str, Any] = {
        "general.architecture": family.architecture,
        "general.name": config.name or path.stem.encode("utf-8", "surrogateescape").decode("utf-8", "replace"),
    }
    metadata |= {"general.file_type": FORMS[dtype].file_type, "general.quantization_version": 2}
    metadata |= {f"{family.architecture}.{name}": value for name, value in fields.items()}
    if tokenizer is not None:
        metadata |= vocabulary(tokenizer, config.vocab)
    if states.instruction_tuned:
        turns = {"tokenizer.chat_template": states.template} if states.template else {"general.finetune": "it"}
        metadata |= turns
    names = list(all_names(config, 1))
    if HEAD in parameters:
        names.append((HEAD, "output.weight", (config.vocab, config.width)))
    entries = [(theirs, shape, _form(ours, shape, dtype)) for ours, theirs, shape in names]
    with replacing_files(path.parent) as new, written(new(path.name)) as file:
        write_gguf(file, metadata, entries, (_stored(parameters[ours]) for ours, *_ in names))


def _form(ours: str, shape: tuple[int, ...], dtype: str) -> Form:
    if len(shape) == 1:
        return FORMS["f32"]
    if dtype == "int4" and ours in ("embedding", HEAD):
        dtype = "int8"
    return FORMS["f16" if shape[-1] % TYPES[NUMBERS[FORMS[dtype].type]][1] else dtype]


def _stored(values: F32) -> F32:
    """Adds 1 to a norm's weight; norms are the only vectors of the families that llama.cpp has."""
    return values + np.float32(1) if values.ndim == 1 else values


def vocabulary(tokenizer: Tokenizer, rows: int) -> dict[str, Any]:
    """The fields of a header that hold a tokenizer, with as many pieces as the embedding has rows."""
    pieces, scores, kinds = tokenizer.vocabulary
    spelled = [p.replace(SPACE, " ") if kind == USER_DEFINED else p for p, kind in zip(pieces, kinds, strict=True)]
    missing = rows - len(pieces)
    spelled += [f"<unused piece {i}>" for i in range(missing)]
    scores, kinds = [*scores, *[-1e4] * missing], [*kinds, *[UNUSED] * missing]
    for token in tokenizer.added:
        spelled[token.id], kinds[token.id] = token.text, CONTROL if token.special else USER_DEFINED
    names = {"bos": tokenizer.bos, "eos": tokenizer.eos, "unknown": tokenizer.unknown, "padding": tokenizer.pad}
    fields: dict[str, Any] = {f"{name}_token_id": number for name, number in names.items()}
    if (end := tokenizer.id_of("<end_of_turn>")) is not None:
        fields["eot_token_id"] = end
    fields |= {"model": "llama", "pre": "default", "add_space_prefix": False}
    fields |= {"add_bos_token": True, "add_eos_token": False, "tokens": spelled}
    fields |= {"scores": np.array(scores, np.float32), "token_type": np.array(kinds, np.int32)}
    return {f"tokenizer.ggml.{name}": value for name, value in fields.items()}


def write_gguf(
    file: BinaryIO,
    metadata: Mapping[str, Any],
    entries: Sequence[tuple[str, tuple[int, ...], Form]],
    values: Iterable[F32],
) -> None:
    """Write a GGUF file of version 3: metadata, then tensors (name, shape, form), whose float32 values come one by one.

    Metadata may be bools, integers, floats, strings, lists of strings, and arrays of int32 or float32.
    """
    file.write(b"GGUF" + struct.pack("<IQQ", 3, len(entries), len(metadata)))
    for key, value in metadata.items():
        file.write(_text(key) + _value(value))
    place = 0
    for name, shape, form in entries:
        number = NUMBERS[form.type]
        _, block, size = TYPES[number]
        file.write(_text(name) + struct.pack(f"<I{len(shape)}QIQ", len(shape), *shape[::-1], number, place))
        place += _padded(int(np.prod(shape)) // block * size)
    _pad(file)
    for (_, _, form), array in zip(entries, values, strict=True):
        file.write(np.ascontiguousarray(form.pack(array)).data)
        _pad(file)


def _padded(size: int) -> int:
    return -(-size // ALIGNMENT) * ALIGNMENT


def _pad(file: BinaryIO) -> None:
    file.write(bytes(_padded(file.tell()) - file.tell()))


def _text(text: str) -> bytes:
    written = text.encode()
    return struct.pack("<Q", len(written)) + written


def _value(value: Any) -> bytes:
    """A value of the metadata with its type before it."""
    if isinstance(value, str):
        return struct.pack("<I", STRING) + _text(value)
    if isinstance(value, list):
        return struct.pack("<IIQ", ARRAY, STRING, len(value)) + b"".join(map(_text, value))
    if isinstance(value, np.ndarray):
        kind = F32_ if value.dtype == np.float32 else I32_
        return struct.pack("<IIQ", ARRAY, kind, len(value)) + value.tobytes()
    kind = BOOL if isinstance(value, bool) else U32 if isinstance(value, int) else F32_
    return struct.pack(f"<I{SCALARS[kind]}", kind, value)
