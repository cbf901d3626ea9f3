"""Checkpoints of a released model's true names, shapes and dtype, with random weights."""

import json

import numpy as np

from minigemma.config import TextConfig
from minigemma.models.registry import all_names


def shapes(config: TextConfig):
    """(name in a Hugging Face file, shape) of every tensor."""
    return [(f"model.{name}", list(shape)) for _, name, shape in all_names(config, 0)]


def config_json(config):
    """The fields of a config.json, as far as released files state them."""
    fields = {
        "model_type": {"gemma3": "gemma3_text"}.get(config.family, config.family),
        "hidden_size": config.width,
        "num_hidden_layers": config.layers,
        "num_attention_heads": config.heads,
        "num_key_value_heads": config.kv_heads,
        "head_dim": config.head_dim,
        "intermediate_size": config.ffn_width,
        "vocab_size": config.vocab,
        "max_position_embeddings": config.context,
    }
    if config.family != "gemma":
        fields |= {"sliding_window": config.window, "query_pre_attn_scalar": config.head_dim}
    return fields


def write_gemma3(folder, config):
    """A folder as released: config.json and model.safetensors in bf16, the weights random. Returns their bytes."""
    fields = config_json(config) | {"eos_token_id": 1}
    (folder / "config.json").write_text(json.dumps(fields))
    header, end = {}, 0
    for name, shape in shapes(config):
        begin, end = end, end + 2 * int(np.prod(shape))
        header[name] = {"dtype": "BF16", "shape": shape, "data_offsets": [begin, end]}
    text = json.dumps(header).encode()
    values = np.random.default_rng(0).standard_normal(1 << 24, np.float32) * 0.02
    chunk = (values.view(np.uint32) >> 16).astype(np.uint16).tobytes()
    with (folder / "model.safetensors").open("wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        for left in range(end, 0, -len(chunk)):
            file.write(chunk[:left])
    return end
