"""A model as a folder in Hugging Face's layout, which `load`, transformers and llama.cpp's converter read.

`save_model` and `read_parameters` are inverses. Parameters have our names, are float32 and have the shapes of a model's
weights, with two exceptions: "recurrent.decay" is Λ, which a model holds as softplus(Λ), and "recurrent.conv" is
[C, E], which a file stores as [E, 1, C].
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ..arrays import F32, round_bf16
from ..config import TextConfig
from ..models.fields import Fields, Json
from ..models.registry import FAMILIES, all_names
from .convert import unfolded, widened
from .open import Files, open_files
from .resolve import resolve
from .safetensors_file import write_safetensors
from .statements import UNSAID, Statements
from .tokenizer import Tokenizer, stop_ids
from .tokenizer_json import tokenizer_json

DTYPES = {"f32": ("F32", "float32"), "bf16": ("BF16", "bfloat16")}  # ours: (safetensors', transformers')
HEAD = "head"  # of a model whose head is not tied to its embedding


def save_model(
    folder: str | Path,
    config: TextConfig,
    parameters: Mapping[str, F32],
    tokenizer: Tokenizer | None,
    dtype: str = "bf16",
    states: Statements = UNSAID,
) -> None:
    """Write the text model as `folder`. Existing files there are replaced once all new ones are written.

    parameters: by our names (models/registry.py); each is read once, when it is written
    dtype: "bf16" or "f32"
    states: what the checkpoint it comes from says of turns, ends and sampling, which the folder then says too
    Raises ValueError for a config that config.json cannot express, OSError if a file cannot be written.
    """
    folder, (stored, _) = Path(folder), DTYPES[dtype]
    described = config_json(config, dtype, tied=HEAD not in parameters)
    names = [(ours, f"model.{theirs}", shape) for ours, theirs, shape in all_names(replace(config, vision=None), 0)]
    if HEAD in parameters:
        names.append((HEAD, "lm_head.weight", (config.vocab, config.width)))
    entries = [(theirs, stored, shape) for _, theirs, shape in names]
    with replacing_files(folder) as new:
        parts = (_in_file(ours, parameters[ours], stored) for ours, *_ in names)
        write_safetensors(new("model.safetensors"), entries, parts)
        if tokenizer is not None:
            _write_tokenizer(new, tokenizer)
            if states.template:
                new("chat_template.jinja").write_text(states.template, "utf-8")
        _write_json(new("generation_config.json"), generation_json(states, tokenizer))
        _write_json(new("config.json"), described)


def generation_json(states: Statements, tokenizer: Tokenizer | None) -> Json:
    """The fields of generation_config.json: all tokens that end an answer, and sampling as the checkpoint states it."""
    ends = list(stop_ids(tokenizer, states.ends, states.instruction_tuned)) if tokenizer else [1]
    released = {"do_sample": True, "top_k": 64, "top_p": 0.95}  # of Gemma 3
    sampling = released if states is UNSAID else states.sampling
    return {"bos_token_id": 2, "eos_token_id": ends if ends[1:] else ends[0], "pad_token_id": 0, **sampling}


def config_json(config: TextConfig, dtype: str, tied: bool = True) -> Json:
    """The fields of config.json. ValueError for a config that reading them back would change."""
    family, config = FAMILIES[config.family], replace(config, vision=None)
    if family.to_json is None:
        raise ValueError(f"{family.title} cannot be written as a folder of its own")
    fields = family.to_json(config) | {"dtype": DTYPES[dtype][1], "tie_word_embeddings": tied}
    check_stated(config, family.from_json(Fields(fields, family.json_defaults)), "config.json")
    return fields


def check_stated(config: TextConfig, read: TextConfig, where: str) -> None:
    """Raises ValueError with the first field that differs between a config and the one read back from its file."""
    for name, value in vars(config).items():
        found = getattr(read, name)
        if name == "query_pre_attn_scalar":
            value, found = config.query_scale, read.query_scale
        if name != "name" and found != value:
            raise ValueError(f"{name} is {value}, which a {config.family}'s {where} cannot state: it would be {found}")


def save_tokenizer(folder: str | Path, tokenizer: Tokenizer) -> None:
    """Write tokenizer.model, tokenizer.json and tokenizer_config.json into `folder`."""
    with replacing_files(Path(folder)) as new:
        _write_tokenizer(new, tokenizer)


def _write_tokenizer(new: Any, tokenizer: Tokenizer) -> None:
    new("tokenizer.model").write_bytes(tokenizer.model_bytes)
    _write_json(new("tokenizer.json"), tokenizer_json(tokenizer), indent=None)
    special = {"pad_token": "<pad>", "eos_token": "<eos>", "bos_token": "<bos>", "unk_token": "<unk>"}
    settings = {"tokenizer_class": "GemmaTokenizer", "add_bos_token": True, "add_eos_token": False}
    _write_json(new("tokenizer_config.json"), special | settings | {"clean_up_tokenization_spaces": False})


def read_parameters(name: str | Path) -> tuple[TextConfig, dict[str, F32], Tokenizer | None]:
    """The config, the parameters as float32, writable and exact, and the tokenizer of any checkpoint's text model."""
    files = open_files(resolve(name), vision=False)
    return files.config, dict(Parameters(files)), files.make_tokenizer()


class Parameters(Mapping[str, F32]):
    """The parameters of an open checkpoint, each read and widened when it is asked for."""

    def __init__(self, files: Files) -> None:
        self.files = files

    def __iter__(self) -> Iterator[str]:
        return iter(self.files.tensors)

    def __len__(self) -> int:
        return len(self.files.tensors)

    def __getitem__(self, ours: str) -> F32:
        tensor = self.files.tensors[ours]
        wide = unfolded(ours, np.array(widened(tensor.kind, tensor.array), np.float32).reshape(tensor.shape))
        return wide - np.float32(self.files.norm_offset) if wide.ndim == 1 else wide


def _in_file(ours: str, values: F32, stored: str) -> Iterator[NDArray[Any]]:
    """A parameter as its tensor in the file."""
    if ours.endswith("recurrent.conv"):
        values = values.T[:, None]
    yield round_bf16(values) if stored == "BF16" else np.ascontiguousarray(values, np.float32)


def _write_json(path: Path, content: Json, indent: int | None = 2) -> None:
    path.write_text(json.dumps(content, indent=indent, ensure_ascii=False) + "\n", "utf-8")


@contextmanager
def replacing_files(folder: Path) -> Iterator[Any]:
    """Yields a function from a file's name to a temporary path; at the end all are renamed into place, or none.

    The folder is made where it is not there; it does not stay if nothing was written.
    """
    names, found = list[str](), folder.exists()
    folder.mkdir(parents=True, exist_ok=True)

    def new(name: str) -> Path:
        names.append(name)
        return folder / f"{name}.partial"

    try:
        yield new
        for name in names:
            os.replace(folder / f"{name}.partial", folder / name)
    finally:
        for name in names:
            (folder / f"{name}.partial").unlink(missing_ok=True)
        if not found and not any(folder.iterdir()):
            folder.rmdir()
