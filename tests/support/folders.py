"""Small checkpoints with random weights, as folders and as GGUF files; a model in Hugging Face's cache."""

import json

import numpy as np
from support import gguf_files
from support.synthetic import config_json, shapes

from minigemma.models.gemma import GemmaConfig
from minigemma.models.gemma2 import Gemma2Config
from minigemma.models.gemma3 import Gemma3Config
from minigemma.models.registry import FAMILIES, layer_tensors

SIZES = {"width": 256, "layers": 2, "heads": 4, "kv_heads": 2, "head_dim": 64, "ffn_width": 512, "vocab": 96}
CONFIGS = {
    "gemma": GemmaConfig(**SIZES),
    "gemma2": Gemma2Config(**SIZES, window=7, query_pre_attn_scalar=64),
    "gemma3": Gemma3Config(**SIZES | {"layers": 7}, window=7, context=640),
}
ids = np.random.default_rng(5).integers(0, 96, 40)


def random_weights(config):
    """Every tensor by its name in a Hugging Face file, float32."""
    rng = np.random.default_rng(0)
    sizes = shapes(config)
    return {name: rng.standard_normal(shape, np.float32) * (0.1 if shape[1:] else 0.5) for name, shape in sizes}


def write_folder(folder, config, weights):
    from safetensors.numpy import save_file

    folder.mkdir(exist_ok=True)
    (folder / "config.json").write_text(json.dumps(config_json(config)))
    save_file(weights, folder / "model.safetensors")
    return folder


def write_gguf(path, config, weights, kind="F32", more=()):
    """As llama.cpp's converter does it: other names, 1 + w for norms, float32 norms; matrices of the type `kind`.

    more: float32 tensors by their names in the file.
    """
    sizes = {
        "context_length": config.context,
        "embedding_length": config.width,
        "block_count": config.layers,
        "feed_forward_length": config.ffn_width,
        "attention.head_count": config.heads,
        "attention.head_count_kv": config.kv_heads,
        "attention.key_length": config.head_dim,
        "attention.layer_norm_rms_epsilon": config.eps,
    }
    if config.family != "gemma":
        sizes["attention.sliding_window"] = config.window
    names = {f"model.{hf}": theirs for hf, theirs, _ in FAMILIES[config.family].tensors.values()}
    for i in range(config.layers):
        for hf, theirs, _ in layer_tensors(config, i).values():
            names[f"model.layers.{i}.{hf}"] = f"blk.{i}.{theirs}"
    tensors = {}
    for name, values in weights.items():
        wanted = "F32" if values.ndim == 1 else kind
        tensors[names[name]] = (wanted, gguf_files.quantize(values + (values.ndim == 1), wanted))
    tensors |= {name: ("F32", values.astype(np.float32)) for name, values in dict(more).items()}
    fields = {f"{config.family}.{name}": value for name, value in sizes.items()}
    return gguf_files.write(path, config.family, fields, tensors)


def cached(home, id="google/gemma-3-1b-it", names=("config.json", "model.safetensors"), commit="4d7a"):
    """A model in Hugging Face's cache, laid out as huggingface_hub does it."""
    folder = home / ".cache/huggingface/hub" / f"models--{id.replace('/', '--')}"
    for part in ("refs", "blobs", f"snapshots/{commit}"):
        (folder / part).mkdir(parents=True, exist_ok=True)
    (folder / "refs/main").write_text(commit)
    for name in names:
        (folder / "blobs" / f"sha-of-{name}").touch()
        (folder / "snapshots" / commit / name).symlink_to(f"../../blobs/sha-of-{name}")
    return folder / "snapshots" / commit
