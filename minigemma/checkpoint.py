"""From files to a model: which tensor is which weight, in which format it runs, and `load`.

Weights are used where they lie: a bf16 safetensors file and the Q8_0 and Q4_0 tensors of a GGUF file are mapped into
memory
and never copied. Other GGUF tensors, and every tensor when `dtype` asks for another format, are converted one by one.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from .arrays import read_only, round_bf16
from .backend import most_threads
from .config import RecurrentGemmaConfig, TextConfig
from .config_file import config_from_gguf, config_from_json, read_json
from .decoder import Decoder, DecoderWeights
from .errors import ModelFormatError
from .feedforward import FeedForwardWeights
from .gemma import Gemma, GemmaBlock
from .gemma2 import Gemma2, Gemma2Block
from .gemma3 import Gemma3, Gemma3Block
from .gguf_file import open_gguf
from .gqa import AttentionWeights
from .griffin import RecurrentWeights
from .linear import BLOCK, BLOCK_BYTES, Weight
from .locate import locate
from .prompt import stop_ids
from .quantize import KINDS, dequantise, quantise_int4, to_int8
from .recurrentgemma import RecurrentGemma, RecurrentGemmaBlock
from .rglru import softplus
from .safetensors_file import FOREIGN, open_checkpoint_files, what_is
from .tokenizer import Tokenizer

CONVERTED_TOGETHER = 1 << 24  # weights that are float32 for a moment on their way to another format
READABLE = ("F32", "F16", "BF16", *KINDS)
FORMATS = ("f32", "bf16", "int8", "int4")

# weight: (name in a Hugging Face file, name in a GGUF file, shape). Names of layers follow "layers.{i}." and
# "blk.{i}.".
MODEL_TENSORS = {
    "embedding": ("embed_tokens.weight", "token_embd.weight", "V D"),
    "final_norm": ("norm.weight", "output_norm.weight", "D"),
}
LAYER_TENSORS = {
    "pre_attention_norm": ("input_layernorm.weight", "attn_norm.weight", "D"),
    "attention.q": ("self_attn.q_proj.weight", "attn_q.weight", "NH D"),
    "attention.k": ("self_attn.k_proj.weight", "attn_k.weight", "KH D"),
    "attention.v": ("self_attn.v_proj.weight", "attn_v.weight", "KH D"),
    "attention.o": ("self_attn.o_proj.weight", "attn_output.weight", "D NH"),
    "pre_ffn_norm": ("pre_feedforward_layernorm.weight", "ffn_norm.weight", "D"),
    "ffn.gate": ("mlp.gate_proj.weight", "ffn_gate.weight", "F D"),
    "ffn.up": ("mlp.up_proj.weight", "ffn_up.weight", "F D"),
    "ffn.down": ("mlp.down_proj.weight", "ffn_down.weight", "D F"),
}
POST_NORMS = {
    "post_attention_norm": ("post_attention_layernorm.weight", "post_attention_norm.weight", "D"),
    "post_ffn_norm": ("post_feedforward_layernorm.weight", "post_ffw_norm.weight", "D"),
}
HEAD_NORMS = {
    "attention.q_norm": ("self_attn.q_norm.weight", "attn_q_norm.weight", "H"),
    "attention.k_norm": ("self_attn.k_norm.weight", "attn_k_norm.weight", "H"),
}
RECURRENTGEMMA = {
    "temporal_pre_norm": ("temporal_pre_norm.weight", "", "D"),
    "channel_pre_norm": ("channel_pre_norm.weight", "", "D"),
    **{f"ffn.{part}": (f"mlp_block.{part}_proj.weight", "", "F D") for part in ("gate", "up")},
    **{f"ffn.{part}_bias": (f"mlp_block.{part}_proj.bias", "", "F") for part in ("gate", "up")},
    "ffn.down": ("mlp_block.down_proj.weight", "", "D F"),
    "ffn.down_bias": ("mlp_block.down_proj.bias", "", "D"),
}
RECURRENT = {
    **{f"recurrent.{part}": (f"temporal_block.linear_{part}.weight", "", "E D") for part in ("x", "y")},
    **{f"recurrent.{part}_bias": (f"temporal_block.linear_{part}.bias", "", "E") for part in ("x", "y")},
    "recurrent.out": ("temporal_block.linear_out.weight", "", "D E"),
    "recurrent.out_bias": ("temporal_block.linear_out.bias", "", "D"),
    "recurrent.conv": ("temporal_block.conv_1d.weight", "", "E 1 C"),
    "recurrent.conv_bias": ("temporal_block.conv_1d.bias", "", "E"),
    "recurrent.decay": ("temporal_block.rg_lru.recurrent_param", "", "E"),
    "recurrent.recurrence_gate": ("temporal_block.rg_lru.recurrent_gate_weight", "", "M I I"),
    "recurrent.recurrence_bias": ("temporal_block.rg_lru.recurrent_gate_bias", "", "M I"),
    "recurrent.input_gate": ("temporal_block.rg_lru.input_gate_weight", "", "M I I"),
    "recurrent.input_bias": ("temporal_block.rg_lru.input_gate_bias", "", "M I"),
}
LOCAL_ATTENTION = {
    "attention.q": ("temporal_block.q_proj.weight", "", "NH D"),
    "attention.k": ("temporal_block.k_proj.weight", "", "KH D"),
    "attention.v": ("temporal_block.v_proj.weight", "", "KH D"),
    "attention.o": ("temporal_block.o_proj.weight", "", "D NH"),
    "attention.o_bias": ("temporal_block.o_proj.bias", "", "D"),
}
MODELS: dict[str, tuple[type[Decoder], Callable[..., Any]]] = {
    "gemma": (Gemma, GemmaBlock),
    "gemma2": (Gemma2, Gemma2Block),
    "gemma3": (Gemma3, Gemma3Block),
    "recurrentgemma": (RecurrentGemma, RecurrentGemmaBlock),
}
PARTS: dict[str, Callable[..., Any]] = {
    "attention": AttentionWeights,
    "ffn": FeedForwardWeights,
    "recurrent": RecurrentWeights,
}


def model_tensors(config: TextConfig) -> dict[str, tuple[str, str, str]]:
    """The rows of the table that belong to no layer."""
    if config.family != "recurrentgemma":
        return MODEL_TENSORS
    return MODEL_TENSORS | {"final_norm": ("final_norm.weight", "", "D")}


def layer_tensors(config: TextConfig, layer: int) -> dict[str, tuple[str, str, str]]:
    """The rows of the table that one layer of a model has."""
    if isinstance(config, RecurrentGemmaConfig):
        return RECURRENTGEMMA | (LOCAL_ATTENTION if config.is_attention(layer) else RECURRENT)
    if config.family == "gemma":  # in its files "post_attention_layernorm" is the norm before the feed-forward block
        return LAYER_TENSORS | {"pre_ffn_norm": ("post_attention_layernorm.weight", "ffn_norm.weight", "D")}
    return LAYER_TENSORS | POST_NORMS | (HEAD_NORMS if config.family == "gemma3" else {})


def sizes(config: TextConfig) -> dict[str, int]:
    """What the letters of the table stand for."""
    found = {"V": config.vocab, "D": config.width, "F": config.ffn_width, "H": config.head_dim, "1": 1}
    found |= {"NH": config.heads * config.head_dim, "KH": config.kv_heads * config.head_dim}
    if isinstance(config, RecurrentGemmaConfig):
        found |= {"E": config.lru_width, "C": config.conv_width, "M": config.gate_blocks}
        found["I"] = config.lru_width // config.gate_blocks
    return found


# Text tensors have had three prefixes; the parts of a model with a vision tower that a text model leaves alone have
# had two.
PREFIXES = ("model.", "language_model.model.", "model.language_model.", "language_model.", "")
HEADS = ("lm_head.weight", "language_model.lm_head.weight", "model.lm_head.weight")
NOT_TEXT = re.compile(r"^(model\.)?(vision_tower|multi_modal_projector)\.|\.rotary_emb\.inv_freq$")


@dataclass(frozen=True)
class Stored:
    """A tensor as its file has it: `kind` is the file's name of its type ("BF16", "Q5_0", …), `shape` [R, D] or [D]."""

    name: str
    kind: str
    shape: tuple[int, ...]
    array: NDArray


@dataclass(frozen=True)
class Files:
    """What the files of a checkpoint say, before any weight has been read."""

    path: Path
    config: TextConfig
    tensors: dict[str, Stored]  # by our names
    norm_offset: float  # what a stored norm has too much: 1 in a GGUF file
    make_tokenizer: Callable[[], Tokenizer | None]
    eos: tuple[int, ...]
    instruction_tuned: bool


@dataclass(frozen=True)
class Description:
    """What `minigemma inspect` prints: all of it from headers, no weight is read."""

    config: TextConfig
    files: tuple[Path, ...]
    tensors: dict[str, tuple[str, tuple[int, ...], int]]  # name → (type in the file, shape, bytes)
    weight_bytes: int  # of all of them as they are held in memory once loaded
    instruction_tuned: bool


def load(
    name: str | Path,
    dtype: str | None = None,
    backend: str = "numba",
    threads: int | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> Decoder:
    """The model in a folder or file, by a name in weights/ or the Hugging Face cache, or "gemma-3-270m", the demo.

    dtype    None: as stored; "f32": the exact mode; or "bf16", "int8", "int4" (whose embedding is int8)
    backend  "numba": kernels; "numpy": the definitions alone, which a debugger can step through
    threads  how many cores a kernel uses; None: all that this process may use
    progress is called with (bytes done, bytes in all) after each tensor

    Raises ModelFormatError for files that cannot be used, ValueError for arguments that cannot.
    """
    if dtype not in (None, *FORMATS):
        raise ValueError(f"dtype is {dtype!r}; it must be one of {', '.join(FORMATS)}, or None for as stored")
    if backend not in ("numba", "numpy"):
        raise ValueError(f"backend is {backend!r}; it must be 'numba' or 'numpy'")
    if threads is not None and not 1 <= threads <= most_threads():
        raise ValueError(f"threads is {threads}; this machine offers 1 … {most_threads()}")
    files = open_files(locate(name))
    with ThreadPoolExecutor(1) as side:  # the tokenizer is Python's work, the weights are not: they go side by side
        making = side.submit(files.make_tokenizer)
        weights = _weights(files, dtype, progress)
        tokenizer = making.result()
    stored = files.tensors["embedding"].kind
    if tokenizer and tokenizer.size > files.config.vocab:
        raise ModelFormatError(
            files.path,
            f"its tokenizer has {tokenizer.size} pieces, its embedding {files.config.vocab} rows",
            "take the tokenizer.model that was released with these weights",
        )
    return MODELS[files.config.family][0](
        files.config,
        assembled(files.config, weights),
        tokenizer=tokenizer,
        exact=dtype == "f32" or (dtype is None and stored == "F32"),
        round_scale=stored != "F32" or files.config.family == "recurrentgemma",
        backend=backend,
        threads=threads,
        eos=stop_ids(tokenizer, files.eos, files.instruction_tuned) if tokenizer else files.eos,
        instruction_tuned=files.instruction_tuned,
    )


def _weights(files: Files, dtype: str | None, progress: Callable[[int, int], None] | None) -> dict[str, Any]:
    """Every tensor in the format that it runs in, by our names."""
    total, done = sum(t.array.nbytes for t in files.tensors.values()), 0
    weights = {}
    for ours, tensor in files.tensors.items():
        weights[ours] = _weight(ours, tensor, dtype, files.norm_offset)
        done += tensor.array.nbytes
        if progress:
            progress(done, total)
    return weights


def describe(name: str | Path, dtype: str | None = None) -> Description:
    """What a checkpoint is, read from its headers alone, and how much memory `load` with this dtype would hold."""
    files = open_files(locate(name))
    tensors = {ours: (t.kind, t.shape, t.array.nbytes) for ours, t in files.tensors.items()}
    held = sum(_held_bytes(ours, t, dtype) for ours, t in files.tensors.items())
    parts = (files.path,) if files.path.is_file() else tuple(sorted(files.path.glob("*.safetensors")))
    return Description(files.config, parts, tensors, held, files.instruction_tuned)


def _held_bytes(ours: str, tensor: Stored, dtype: str | None) -> int:
    weights = int(np.prod(tensor.shape))
    if not _is_matrix(ours, tensor):
        as_stored = ours.endswith("_gate") and tensor.kind == "BF16" and dtype != "f32"
        return (2 if as_stored else 4) * weights
    form = _format(tensor, dtype, ours)
    return weights // BLOCK * BLOCK_BYTES[form] if form in BLOCK_BYTES else weights * {"f32": 4, "bf16": 2}[form]


def open_files(path: Path) -> Files:
    """The headers of a checkpoint, every tensor found, named and of the right shape; else ModelFormatError."""
    kind = "" if path.is_dir() else what_is(path)
    if kind not in ("", "safetensors", "gguf"):
        raise ModelFormatError(path, *FOREIGN[kind])
    folder = path.parent if kind == "safetensors" else path
    files = _open_folder(folder) if folder.is_dir() else _open_gguf(path)
    config, letters = files.config, sizes(files.config)
    for ours, tensor in files.tensors.items():
        _, layer, name = re.match(r"(blocks\.(\d+)\.)?(.*)", ours).groups()  # type: ignore[union-attr]
        table = layer_tensors(config, int(layer)) if layer else model_tensors(config)
        axes = table.get(name, ("", "", "V D"))[2]
        expected = tuple(letters[axis] for axis in axes.split())
        if tensor.shape != expected:
            raise ModelFormatError(
                path,
                f"{tensor.name} is {list(tensor.shape)}, the config implies {list(expected)} ({axes})",
                "weights and config are of different models: take both from one release",
            )
    return files


def _open_folder(folder: Path) -> Files:
    config, fields = config_from_json(folder / "config.json")
    stored = open_checkpoint_files(folder)
    prefix = next((p for p in PREFIXES if f"{p}embed_tokens.weight" in stored), None)
    if prefix is None and any(name.startswith(("embedder.", "params/")) for name in stored):
        problem = "holds the tensors under DeepMind's own names (Kaggle's flax or torch files)"
        raise ModelFormatError(folder, problem, "take the Hugging Face release: minigemma download google/<model>")
    if prefix is None:
        raise ModelFormatError(folder, "its files hold no embed_tokens.weight", "these are not the weights of a Gemma")
    named = {ours: f"{prefix}{theirs}" for ours, theirs in _names(config, 0, "layers.")}
    head = next((name for name in HEADS if name in stored), None)
    if head and not fields["tie_word_embeddings"]:
        named["head"] = head
    ignored = {name for name in stored if NOT_TEXT.search(name)} | set(HEADS)
    _report(folder, set(named.values()) - set(stored), set(stored) - set(named.values()) - ignored)
    tensors = {
        ours: Stored(name, stored[name].dtype, stored[name].array.shape, stored[name].array)
        for ours, name in named.items()
    }
    _check_kinds(folder, tensors)
    eos, chatty = _folder_eos(folder, fields)
    return Files(folder, config, tensors, 0.0, partial(_folder_tokenizer, folder), eos, chatty)


def _open_gguf(path: Path) -> Files:
    gguf = open_gguf(path)
    embedding = gguf.tensors.get("token_embd.weight")
    config = config_from_gguf(path, gguf.metadata, embedding.shape[0] if embedding else 1)
    named = dict(_names(config, 1, "blk."))
    if "output.weight" in gguf.tensors:
        named["head"] = "output.weight"
    _report(
        path,
        set(named.values()) - set(gguf.tensors),
        {n for n in gguf.tensors if n not in named.values() and n != "rope_freqs.weight"},
    )
    tensors = {
        ours: Stored(name, gguf.tensors[name].type, gguf.tensors[name].shape, gguf.tensors[name].blocks)
        for ours, name in named.items()
    }
    for tensor in tensors.values():
        if tensor.kind not in READABLE:
            remedy = f"take a file of {', '.join(READABLE)}"
            raise ModelFormatError(path, f"{tensor.name} is of type {tensor.kind}, which has no reader here", remedy)
    eos = gguf.metadata.get("tokenizer.ggml.eos_token_id", 1)
    name = f"{gguf.metadata.get('general.name', '')} {path.name}"
    chatty = "tokenizer.chat_template" in gguf.metadata or bool(re.search(r"\bit\b", name))

    def make_tokenizer() -> Tokenizer | None:
        return (
            Tokenizer.from_vocabulary(*gguf.vocabulary, path=path) if "tokenizer.ggml.tokens" in gguf.metadata else None
        )

    return Files(path, config, tensors, 1.0, make_tokenizer, (int(eos),), chatty)


def _names(config: TextConfig, column: int, layer_prefix: str) -> Iterator[tuple[str, str]]:
    """(our name, the file's name) of every tensor that a model of this config has."""
    for ours, theirs in model_tensors(config).items():
        yield ours, theirs[column]
    for i in range(config.layers):
        for ours, theirs in layer_tensors(config, i).items():
            yield f"blocks.{i}.{ours}", f"{layer_prefix}{i}.{theirs[column]}"


def _report(path: Path, missing: set[str], unexpected: set[str]) -> None:
    for what, names in (("lacks", missing), ("has beside a Gemma's", unexpected)):
        if names:
            first = ", ".join(sorted(names)[:5]) + (" …" if len(names) > 5 else "")
            raise ModelFormatError(
                path, f"{what} {len(names)} tensors: {first}", "config and weights are of different models"
            )


def _check_kinds(path: Path, tensors: dict[str, Stored]) -> None:
    for tensor in tensors.values():
        if tensor.kind not in ("F32", "F16", "BF16"):
            raise ModelFormatError(
                path, f"{tensor.name} is of type {tensor.kind}", "take the released bf16 or float32 file"
            )


def _weight(ours: str, tensor: Stored, dtype: str | None, norm_offset: float) -> Any:
    """A tensor as the models want it: matrices in their format, gates as stored, all that is small in float32."""
    if _is_matrix(ours, tensor):
        return _matrix(tensor, dtype, ours)
    if len(tensor.shape) == 3 and ours.endswith("_gate") and tensor.kind == "BF16" and dtype != "f32":
        return read_only(tensor.array)
    wide = np.array(dequantise(tensor.kind, tensor.array), np.float32)
    if ours.endswith("recurrent.conv"):
        wide = np.ascontiguousarray(wide[:, 0].T)
    if ours.endswith("recurrent.decay"):
        return read_only(softplus(wide))
    return read_only(wide - np.float32(norm_offset))


def _is_matrix(ours: str, tensor: Stored) -> bool:
    return len(tensor.shape) == 2 and not ours.endswith("_bias")


def _format(tensor: Stored, dtype: str | None, ours: str) -> str:
    """The format that a matrix runs in: what `dtype` asks for, or the nearest of ours to the stored one."""
    wanted = dtype or {"F32": "f32", "BF16": "bf16", "F16": "bf16", "Q4_0": "int4"}.get(tensor.kind, "int8")
    if wanted == "int4" and ours in ("embedding", "head") and tensor.kind != "Q4_0":
        wanted = "int8"
    if wanted in BLOCK_BYTES and tensor.shape[1] % BLOCK:
        return "f32" if tensor.kind == "F32" else "bf16"  # rows that do not divide into blocks
    return wanted


def _matrix(tensor: Stored, dtype: str | None, ours: str) -> Weight:
    """The matrix in its format: where it lies if it is stored in that one, else converted."""
    kind, array, wanted = tensor.kind, tensor.array, _format(tensor, dtype, ours)
    if {"F32": "f32", "BF16": "bf16", "Q8_0": "int8", "Q4_0": "int4"}.get(kind) == wanted:
        return read_only(array)
    step = max(1, CONVERTED_TOGETHER // tensor.shape[1])
    rows = range(0, tensor.shape[0], step)
    if len(rows) == 1:
        return read_only(_converted(kind, array, wanted))
    one = _converted(kind, array[:1], wanted)
    out = np.empty((tensor.shape[0], *one.shape[1:]), one.dtype)
    for r in rows:
        out[r : r + step] = _converted(kind, array[r : r + step], wanted)
    return read_only(out)


def _converted(kind: str, rows: NDArray, wanted: str) -> Weight:
    if wanted == "int8":
        return to_int8(kind, rows)
    wide = dequantise(kind, rows)
    return wide if wanted == "f32" else round_bf16(wide) if wanted == "bf16" else quantise_int4(wide)


def assembled(config: TextConfig, weights: dict[str, Any]) -> DecoderWeights:
    """The flat names as the dataclasses that the models read."""
    blocks = []
    for i in range(config.layers):
        parts: dict[str, dict[str, Any]] = {"": {}}
        for name in layer_tensors(config, i):
            part, _, field = name.rpartition(".")
            parts.setdefault(part, {})[field] = weights[f"blocks.{i}.{name}"]
        own = parts.pop("")
        blocks.append(MODELS[config.family][1](**own, **{part: PARTS[part](**w) for part, w in parts.items()}))
    return DecoderWeights(weights["embedding"], tuple(blocks), weights["final_norm"], weights.get("head"))


def _folder_tokenizer(folder: Path) -> Tokenizer | None:
    path = folder / "tokenizer.model"
    return Tokenizer.from_model_file(path) if path.exists() else None


def _folder_eos(folder: Path, fields: dict[str, Any]) -> tuple[tuple[int, ...], bool]:
    """Ids that end a text, from everywhere they may be stated, and whether the model was tuned to instructions."""
    generation = folder / "generation_config.json"
    stated = [fields.get("eos_token_id", 1), read_json(generation).get("eos_token_id", 1) if generation.exists() else 1]
    ids = {i for value in stated for i in (value if isinstance(value, list) else [value]) if isinstance(i, int)}
    chatty = any((folder / name).exists() for name in ("chat_template.json", "chat_template.jinja"))
    described = folder / "tokenizer_config.json"
    chatty = chatty or (described.exists() and "chat_template" in read_json(described))
    chatty = chatty or len(ids) > 1 or bool(re.search(r"\bit\b", folder.name))
    return tuple(sorted(ids)), chatty
