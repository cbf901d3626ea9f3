"""Names and shapes of a released model's tensors, by its config.json; and safetensors files of them, bf16 too."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

Shapes = Iterator[tuple[str, tuple[int, ...]]]
DTYPES = {"F32": np.dtype(np.float32), "BF16": np.dtype(np.uint16)}  # as NumPy holds them here


def layer_shapes(config: dict[str, Any], i: int) -> Shapes:
    """(name, shape) of the tensors of one layer of a text model in a Hugging Face file."""
    D, F, H = config["hidden_size"], config["intermediate_size"], config["head_dim"]
    NH, KH = config["num_attention_heads"] * H, config["num_key_value_heads"] * H
    family, at = config["model_type"], f"model.layers.{i}."
    if family == "recurrent_gemma":
        E, M, own = config["lru_width"], config["num_attention_heads"], f"{at}temporal_block."
        pattern = config.get("block_types", ["recurrent", "recurrent", "attention"])
        yield from ((f"{at}temporal_pre_norm.weight", (D,)), (f"{at}channel_pre_norm.weight", (D,)))
        for part, rows, columns in (("gate", F // 2, D), ("up", F // 2, D), ("down", D, F // 2)):
            yield from (
                (f"{at}mlp_block.{part}_proj.weight", (rows, columns)),
                (f"{at}mlp_block.{part}_proj.bias", (rows,)),
            )
        if pattern[i % len(pattern)] == "attention":
            for part, rows, columns in (("q", NH, D), ("k", KH, D), ("v", KH, D), ("o", D, NH)):
                yield f"{own}{part}_proj.weight", (rows, columns)
            yield f"{own}o_proj.bias", (D,)
            return
        for part, rows, columns in (("x", E, D), ("y", E, D), ("out", D, E)):
            yield from ((f"{own}linear_{part}.weight", (rows, columns)), (f"{own}linear_{part}.bias", (rows,)))
        yield from ((f"{own}conv_1d.weight", (E, 1, config["conv1d_width"])), (f"{own}conv_1d.bias", (E,)))
        yield f"{own}rg_lru.recurrent_param", (E,)
        for gate in ("recurrent_gate", "input_gate"):
            yield from ((f"{own}rg_lru.{gate}_weight", (M, E // M, E // M)), (f"{own}rg_lru.{gate}_bias", (M, E // M)))
        return
    norms = ["input_layernorm", "post_attention_layernorm"]
    norms += ["pre_feedforward_layernorm", "post_feedforward_layernorm"] if family != "gemma" else []
    norms = [norm for norm in norms if family != "vaultgemma" or not norm.startswith("post_")]
    yield from ((f"{at}{norm}.weight", (D,)) for norm in norms)
    for part, rows, columns in (("q", NH, D), ("k", KH, D), ("v", KH, D), ("o", D, NH)):
        yield f"{at}self_attn.{part}_proj.weight", (rows, columns)
    for part, rows, columns in (("gate", F, D), ("up", F, D), ("down", D, F)):
        yield f"{at}mlp.{part}_proj.weight", (rows, columns)
    if family == "gemma3_text":
        yield from ((f"{at}self_attn.{part}_norm.weight", (H,)) for part in "qk")


def text_shapes(config: dict[str, Any]) -> Shapes:
    """Of a whole text model, its head tied to the embedding."""
    last = "final_norm" if config["model_type"] == "recurrent_gemma" else "norm"
    yield "model.embed_tokens.weight", (config["vocab_size"], config["hidden_size"])
    yield f"model.{last}.weight", (config["hidden_size"],)
    for i in range(config["num_hidden_layers"]):
        yield from layer_shapes(config, i)


def tower_shapes(tower: dict[str, Any], text_width: int) -> Shapes:
    """Of Gemma 3's vision tower and its projection to the text model."""
    C, F, patch = tower["hidden_size"], tower["intermediate_size"], tower["patch_size"]
    yield "multi_modal_projector.mm_input_projection_weight", (C, text_width)
    yield "multi_modal_projector.mm_soft_emb_norm.weight", (C,)
    at = "vision_tower.embeddings."
    yield f"{at}patch_embedding.weight", (C, 3, patch, patch)
    yield f"{at}patch_embedding.bias", (C,)
    yield f"{at}position_embedding.weight", ((tower["image_size"] // patch) ** 2, C)
    for i in range(tower["num_hidden_layers"]):
        at = f"vision_tower.encoder.layers.{i}."
        for part in ("layer_norm1", "layer_norm2"):
            yield from ((f"{at}{part}.weight", (C,)), (f"{at}{part}.bias", (C,)))
        linear = {f"self_attn.{part}_proj": (C, C) for part in ("q", "k", "v", "out")}
        for part, shape in (linear | {"mlp.fc1": (F, C), "mlp.fc2": (C, F)}).items():
            yield from ((f"{at}{part}.weight", shape), (f"{at}{part}.bias", shape[:1]))
    yield from (("vision_tower.post_layernorm.weight", (C,)), ("vision_tower.post_layernorm.bias", (C,)))


def to_bf16(x: np.ndarray) -> np.ndarray:
    """Round float32 to the nearest bf16, ties to even: uint16."""
    bits = x.view(np.uint32)
    return ((bits + 0x7FFF + ((bits >> 16) & 1)) >> 16).astype(np.uint16)


def encoded(tensors: dict[str, np.ndarray]) -> bytes:
    """A safetensors file of float32 arrays, and of uint16 ones, which are bf16."""
    names = {dtype: name for name, dtype in DTYPES.items()}
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    end = 0
    for name, values in tensors.items():
        begin, end = end, end + values.nbytes
        header[name] = {"dtype": names[values.dtype], "shape": values.shape, "data_offsets": [begin, end]}
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    data = b"".join(np.ascontiguousarray(values).tobytes() for values in tensors.values())
    return len(text).to_bytes(8, "little") + text + data


def save(tensors: dict[str, np.ndarray], path: Path) -> None:
    """Write such a file."""
    path.write_bytes(encoded(tensors))


def read(path: Path) -> dict[str, np.ndarray]:
    """What `save` wrote."""
    content = path.read_bytes()
    begin = 8 + int.from_bytes(content[:8], "little")
    header = json.loads(content[8:begin])
    header.pop("__metadata__", None)
    return {
        name: np.frombuffer(content, DTYPES[entry["dtype"]], int(np.prod(entry["shape"])), begin + at).reshape(
            entry["shape"]
        )
        for name, entry in header.items()
        for at in entry["data_offsets"][:1]
    }
