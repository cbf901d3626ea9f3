"""Models that cannot be loaded: each case returns the path to pass to -m and the words that the error must contain."""

import json
import struct
from math import prod

CONFIG = {
    "model_type": "gemma3_text",
    "architectures": ["Gemma3ForCausalLM"],
    "vocab_size": 40,
    "hidden_size": 24,
    "intermediate_size": 56,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "head_dim": 8,
    "query_pre_attn_scalar": 8,
    "max_position_embeddings": 64,
    "sliding_window": 16,
    "rms_norm_eps": 1e-6,
    "rope_theta": 1e6,
    "rope_local_base_freq": 1e4,
    "layer_types": ["sliding_attention"],
}
EMBEDDING = "model.embed_tokens.weight"
SHAPES = {EMBEDDING: [40, 24], "model.norm.weight": [24]} | {
    f"model.layers.0.{name}.weight": shape
    for name, shape in {
        "input_layernorm": [24],
        "self_attn.q_proj": [16, 24],
        "self_attn.k_proj": [8, 24],
        "self_attn.v_proj": [8, 24],
        "self_attn.o_proj": [24, 16],
        "self_attn.q_norm": [8],
        "self_attn.k_norm": [8],
        "post_attention_layernorm": [24],
        "pre_feedforward_layernorm": [24],
        "mlp.gate_proj": [56, 24],
        "mlp.up_proj": [56, 24],
        "mlp.down_proj": [24, 56],
        "post_feedforward_layernorm": [24],
    }.items()
}
LFS_POINTER = b"version https://git-lfs.github.com/spec/v1\noid sha256:" + b"0" * 64 + b"\nsize 536223056\n"
HTML_PAGE = (
    b"<!doctype html>\n<html><head><title>Access to model google/gemma-3-1b-it is restricted</title></head></html>\n"
)


def safetensors(names=(EMBEDDING,), missing_bytes=0):
    """A file of float32 zeros with these of the model's tensors, cut short at its end."""
    header, end = {}, 0
    for name in names:
        begin, end = end, end + 4 * prod(SHAPES[name])
        header[name] = {"dtype": "F32", "shape": SHAPES[name], "data_offsets": [begin, end]}
    text = json.dumps(header).encode()
    return (struct.pack("<Q", len(text)) + text + bytes(end))[: -missing_bytes or None]


def checkpoint_folder(path, **files):
    """A checkpoint folder with these contents in place of a good file's; None leaves the file out."""
    path.mkdir()
    whole = {"config.json": json.dumps(CONFIG).encode(), "model.safetensors": safetensors()}
    for name, content in (whole | files).items():
        if content is not None:
            (path / name).write_bytes(content)
    return path


def wrong_path(at):
    return at / "gemma", ["no such"]


def empty_folder(at):
    at.joinpath("gemma").mkdir()
    return at / "gemma", []


def no_config(at):
    return checkpoint_folder(at / "gemma", **{"config.json": None}), ["config.json"]


def config_is_not_json(at):
    return checkpoint_folder(at / "gemma", **{"config.json": b"{"}), ["config.json", "JSON"]


def config_is_an_lfs_pointer(at):
    return checkpoint_folder(at / "gemma", **{"config.json": LFS_POINTER}), ["config.json"]


def unknown_architecture(at):
    config = json.dumps(CONFIG | {"model_type": "llama", "architectures": ["LlamaForCausalLM"]}).encode()
    return checkpoint_folder(at / "gemma", **{"config.json": config}), ["llama"]


def missing_shard(at):
    names = [f"model-0000{i}-of-00002.safetensors" for i in (1, 2)]
    index = json.dumps({"weight_map": {EMBEDDING: names[0], "model.norm.weight": names[1]}}).encode()
    files = {"model.safetensors": None, "model.safetensors.index.json": index, names[0]: safetensors()}
    return checkpoint_folder(at / "gemma", **files), [names[1]]


def truncated_weights(at):
    files = {"model.safetensors": safetensors(missing_bytes=100)}
    return checkpoint_folder(at / "gemma", **files), ["model.safetensors"]


def missing_tensors(at):
    return checkpoint_folder(at / "gemma"), ["lacks"]


def wrong_size(at):
    config = json.dumps(CONFIG | {"intermediate_size": 60}).encode()
    files = {"config.json": config, "model.safetensors": safetensors(SHAPES)}
    return checkpoint_folder(at / "gemma", **files), ["[56, 24]", "[60, 24]"]


def lfs_pointer(at):
    return checkpoint_folder(at / "gemma", **{"model.safetensors": LFS_POINTER}), ["model.safetensors", "LFS"]


def html_page(at):
    return checkpoint_folder(at / "gemma", **{"model.safetensors": HTML_PAGE}), ["model.safetensors", "page"]


def file_of(content, *causes):
    """A case with a single GGUF file of this content."""

    def case(at):
        path = at / "gemma.gguf"
        path.write_bytes(content)
        return path, list(causes)

    return case


BAD_MODELS = {
    "wrong path": wrong_path,
    "empty folder": empty_folder,
    "no config.json": no_config,
    "config.json is not JSON": config_is_not_json,
    "config.json is an LFS pointer": config_is_an_lfs_pointer,
    "unknown architecture": unknown_architecture,
    "missing shard": missing_shard,
    "truncated safetensors": truncated_weights,
    "missing tensors": missing_tensors,
    "weights of another size than the config": wrong_size,
    "LFS pointer as safetensors": lfs_pointer,
    "HTML page as safetensors": html_page,
    "LFS pointer as GGUF": file_of(LFS_POINTER, "LFS"),
    "HTML page as GGUF": file_of(HTML_PAGE, "page"),
    "empty GGUF": file_of(b"", "empty"),
    "GGUF cut in its header": file_of(b"GGUF" + struct.pack("<IQQ", 3, 9, 9)),
    "pickle as GGUF": file_of(b"\x80\x02}q\x00."),
}
