"""Small random checkpoints, as transformers writes them, without transformers: what the parity tests run on.

Their shapes are awkward on purpose: heads of 12 or 20, a width that is not heads × head_dim, several key/value heads,
windows of 5 to 7 tokens, soft-caps far below what scores and logits reach, and every gain random, since a part that an
initializer leaves at zero is a part that no comparison sees.

`write` makes a folder as transformers 5 saves it (test_checkpoints.py compares them under `-m oracle`). The other
functions turn such a folder into what earlier years released: other names of tensors, an older config.json, a head
stored with the embedding.
"""

from __future__ import annotations

import json
import zlib
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
from support.tensors import read, save, text_shapes, to_bf16, tower_shapes

DTYPES = {"f32": "float32", "bf16": "bfloat16"}  # ours, and as config.json has them
VOCAB = 127
SEED = 5

# No head_dim is a power of two, no width is heads × head_dim, and √width is far from its bf16 rounding (0.1 to 0.2 %).
GEMMA: dict[str, Any] = {
    "vocab_size": VOCAB,
    "hidden_size": 48,
    "intermediate_size": 74,
    "num_hidden_layers": 3,
    "num_attention_heads": 6,
    "num_key_value_heads": 2,
    "head_dim": 20,
    "max_position_embeddings": 512,
    "rms_norm_eps": 0.02,
    "rope_parameters": {"rope_type": "default", "rope_theta": 2000.0},
}
GEMMA2: dict[str, Any] = {
    "vocab_size": VOCAB,
    "hidden_size": 72,
    "intermediate_size": 90,
    "num_hidden_layers": 4,
    "num_attention_heads": 6,
    "num_key_value_heads": 2,
    "head_dim": 20,
    "max_position_embeddings": 512,
    "sliding_window": 7,
    "query_pre_attn_scalar": 11,
    "attn_logit_softcapping": 6.0,
    "final_logit_softcapping": 5.0,
    "rms_norm_eps": 0.03,
    "rope_parameters": {"rope_type": "default", "rope_theta": 3000.0},
}
# Global layers only, as released, but with the attributes of a local one, which a wrong pattern would show.
VAULTGEMMA: dict[str, Any] = GEMMA2 | {"num_hidden_layers": 3, "layer_types": ["full_attention"] * 3}
GEMMA3: dict[str, Any] = {
    "vocab_size": VOCAB,
    "hidden_size": 56,
    "intermediate_size": 74,
    "num_hidden_layers": 8,  # layer 5 is global
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 12,
    "max_position_embeddings": 512,
    "sliding_window": 5,
    "query_pre_attn_scalar": 7,
    "rms_norm_eps": 0.01,
    "rope_parameters": {
        "full_attention": {"rope_type": "linear", "factor": 8.0, "rope_theta": 40_000.0},
        "sliding_attention": {"rope_type": "default", "rope_theta": 500.0},
    },
}
# What the released 4B file leaves out has the value here that it has there, so that it can be left out here too.
GEMMA3_VISION: dict[str, Any] = {
    "vocab_size": VOCAB,
    "hidden_size": 56,
    "intermediate_size": 90,
    "num_hidden_layers": 7,
    "num_attention_heads": 8,
    "num_key_value_heads": 4,
    "head_dim": 20,
    "max_position_embeddings": 131_072,
    "sliding_window": 6,
    "query_pre_attn_scalar": 256,
    "rope_parameters": {
        "full_attention": {"rope_type": "linear", "factor": 8.0, "rope_theta": 1_000_000.0},
        "sliding_attention": {"rope_type": "default", "rope_theta": 10_000.0},
    },
}
TOWER: dict[str, Any] = {
    "model_type": "siglip_vision_model",
    "hidden_size": 12,
    "intermediate_size": 20,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "image_size": 28,
    "patch_size": 7,
    "vision_use_head": False,
}
RECURRENT: dict[str, Any] = {
    "vocab_size": VOCAB,
    "hidden_size": 48,
    "intermediate_size": 148,  # of both branches
    "num_hidden_layers": 7,
    "num_attention_heads": 4,
    "num_key_value_heads": 1,
    "lru_width": 72,
    "attention_window_size": 7,  # earlier tokens that one sees: 101 tokens are 14 windows
    "logits_soft_cap": 5.0,
    "rms_norm_eps": 0.02,
    "rope_parameters": {"rope_type": "default", "rope_theta": 2000.0, "partial_rotary_factor": 0.5},
}
# Those with a config class of a text model alone, then one with a vision tower.
SIZES = {"gemma": GEMMA, "gemma2": GEMMA2, "vaultgemma": VAULTGEMMA, "gemma3": GEMMA3, "gemma3-vision": GEMMA3_VISION}
FAMILIES = [*SIZES]
# What transformers 5 writes that no size says.
EVERYWHERE: dict[str, Any] = {
    "attention_bias": False,
    "attention_dropout": 0.0,
    "bos_token_id": 2,
    "eos_token_id": 1,
    "initializer_range": 0.02,
    "pad_token_id": 0,
    "use_cache": True,
}
CLASSES: dict[str, str] = {
    "gemma": "GemmaForCausalLM",
    "gemma2": "Gemma2ForCausalLM",
    "vaultgemma": "VaultGemmaForCausalLM",
    "gemma3_text": "Gemma3ForCausalLM",
    "recurrent_gemma": "RecurrentGemmaForCausalLM",
}
TANH = "gelu_pytorch_tanh"
DEFAULTS: dict[str, dict[str, Any]] = {
    "gemma": EVERYWHERE | {"hidden_act": TANH, "use_bidirectional_attention": None},
    "gemma2": EVERYWHERE | {"hidden_activation": TANH, "use_bidirectional_attention": None},
    "vaultgemma": EVERYWHERE | {"hidden_activation": TANH},
    "gemma3_text": EVERYWHERE
    | {"hidden_activation": TANH, "use_bidirectional_attention": False, "_sliding_window_pattern": 6}
    | {"attn_logit_softcapping": None, "final_logit_softcapping": None, "rms_norm_eps": 1e-6},
    "recurrent_gemma": EVERYWHERE
    | {"hidden_activation": TANH, "conv1d_width": 4, "w_init_variance_scale": 0.01}
    | {"block_types": ["recurrent", "recurrent", "attention"]},
}
# What the text_config of the released 4B file leaves to the class.
LEFT_OUT = (
    "num_attention_heads",
    "num_key_value_heads",
    "max_position_embeddings",
    "rope_theta",
    "rope_local_base_freq",
    "sliding_window_pattern",
    "query_pre_attn_scalar",
    "rms_norm_eps",
    "hidden_activation",
    "attention_bias",
    "attention_dropout",
    "attn_logit_softcapping",
    "final_logit_softcapping",
    "initializer_range",
    "use_bidirectional_attention",
    "use_cache",
    "tie_word_embeddings",
    "bos_token_id",
    "eos_token_id",
    "pad_token_id",
)


def text_config(model_type: str, sizes: dict[str, Any], tied: bool = True) -> dict[str, Any]:
    """Of a text model, as transformers completes it."""
    config = DEFAULTS[model_type] | {"model_type": model_type, "tie_word_embeddings": tied} | sizes
    layers, every = config["num_hidden_layers"], {"gemma2": 2, "vaultgemma": 2, "gemma3_text": 6}.get(model_type)
    if every:
        kinds = [f"{'full' if i % every == every - 1 else 'sliding'}_attention" for i in range(layers)]
        config.setdefault("layer_types", kinds)
    if model_type == "recurrent_gemma":
        config.pop("initializer_range")
        config |= {"head_dim": config["hidden_size"] // config["num_attention_heads"]}
        config["final_w_init_variance_scale"] = 2.0 / layers
    return config


def write(
    folder: Path, family: str, dtype: str = "f32", *, shard_size: int = 1 << 30, tied: bool = True, **changes: Any
) -> Path:
    """A random checkpoint of `family` in `folder`, of tensors "f32" or "bf16"; `tied=False` gives it its own head.

    `changes` replace fields of the text config.
    """
    if family != "gemma3-vision":
        model_type = "gemma3_text" if family == "gemma3" else family
        return write_text(folder, model_type, SIZES[family] | changes, dtype, shard_size, tied)
    text = text_config("gemma3_text", GEMMA3_VISION | changes, tied)
    return write_vision(folder, text, TOWER, dtype, tied, mm_tokens_per_image=4, image_token_index=VOCAB - 1)


def write_text(
    folder: Path, model_type: str, sizes: dict[str, Any], dtype: str, shard_size: int = 1 << 30, tied: bool = True
) -> Path:
    config = text_config(model_type, sizes, tied) | {"dtype": DTYPES[dtype], "architectures": [CLASSES[model_type]]}
    shapes = [*text_shapes(config)]
    if not tied:
        shapes.append(("lm_head.weight", (config["vocab_size"], config["hidden_size"])))
    return save_folder(folder, config, shapes, dtype, shard_size)


def write_recurrent(folder: Path, dtype: str = "f32", **changes: Any) -> Path:
    """RecurrentGemma; `changes` replace fields of the config."""
    return write_text(folder, "recurrent_gemma", RECURRENT | changes, dtype)


EMBEDDING: dict[str, Any] = GEMMA3 | {
    "max_position_embeddings": 64,
    "sliding_window": 10,  # of both sides: a token sees 5 on either
    "use_bidirectional_attention": True,
}
PROMPTS = {"query": "task: search result | query: ", "document": "title: none | text: "}


def write_embedding(folder: Path, dtype: str = "f32", **changes: Any) -> Path:
    """EmbeddingGemma as its repository has it, a folder of sentence-transformers; `changes` replace fields."""
    config = text_config("gemma3_text", EMBEDDING | changes)
    config |= {"dtype": DTYPES[dtype], "architectures": ["Gemma3TextModel"]}
    save_folder(folder, config, [*text_shapes(config)], dtype)
    rename_tensors(folder, {"model.": ""})
    kinds = {"": "Transformer", "1_Pooling": "Pooling", "2_Dense": "Dense", "3_Dense": "Dense"}
    kinds |= {"4_Normalize": "Normalize"}
    modules = [
        {"idx": i, "name": str(i), "path": path, "type": f"sentence_transformers.models.{kind}"}
        for i, (path, kind) in enumerate(kinds.items())
    ]
    modes = ("cls_token", "max_tokens", "mean_sqrt_len_tokens", "weightedmean_tokens", "lasttoken")
    pooling = {f"pooling_mode_{mode}": False for mode in modes} | {"pooling_mode_mean_tokens": True}
    pooling |= {"word_embedding_dimension": config["hidden_size"], "include_prompt": True}
    files = {"modules.json": modules, "1_Pooling/config.json": pooling}
    files["config_sentence_transformers.json"] = {"prompts": PROMPTS, "default_prompt_name": None}
    widths = config["hidden_size"], 90, 24
    for i, (inputs, outputs) in enumerate(pairwise(widths), 2):
        dense = {"in_features": inputs, "out_features": outputs, "bias": False}
        dense["activation_function"] = "torch.nn.modules.linear.Identity"
        files[f"{i}_Dense/config.json"] = dense
    for name, content in files.items():
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).write_text(json.dumps(content), "utf-8")
    for i, (inputs, outputs) in enumerate(pairwise(widths), 2):
        values = random_tensor(f"{i}_Dense.linear.weight", (outputs, inputs))
        stored = to_bf16(values) if dtype == "bf16" else values
        save({"linear.weight": stored}, folder / f"{i}_Dense" / "model.safetensors")
    return folder


def write_vision(
    folder: Path, text: dict[str, Any], tower: dict[str, Any], dtype: str, tied: bool = True, **fields: Any
) -> Path:
    """Gemma 3 with a vision tower; `fields` are those of the whole."""
    eyes = {"attention_dropout": 0.0, "hidden_act": TANH, "layer_norm_eps": 1e-6, "num_channels": 3} | tower
    config = {"architectures": ["Gemma3ForConditionalGeneration"], "model_type": "gemma3", "dtype": DTYPES[dtype]}
    config |= {"boi_token_index": 255_999, "eoi_token_index": 256_000, "initializer_range": 0.02}
    config |= {"tie_word_embeddings": tied, "text_config": text, "vision_config": eyes} | fields
    shapes = [(name.replace("model.", "language_model.model.", 1), shape) for name, shape in text_shapes(text)]
    shapes += tower_shapes(eyes, text["hidden_size"])
    if not tied:
        shapes.append(("language_model.lm_head.weight", (text["vocab_size"], text["hidden_size"])))
    return save_folder(folder, config, shapes, dtype)


def save_folder(
    folder: Path, config: dict[str, Any], shapes: list[tuple[str, Any]], dtype: str, shard_size: int = 1 << 30
) -> Path:
    """config.json, and random tensors in one file or in several of about `shard_size` bytes and an index."""
    folder.mkdir(exist_ok=True)
    text = json.dumps(config | {"transformers_version": "5.23.0"}, indent=2, sort_keys=True)
    (folder / "config.json").write_text(text + "\n", "utf-8")
    shards: list[dict[str, np.ndarray]] = [{}]
    for name, shape in sorted(shapes):
        values = random_tensor(name, shape)
        stored = to_bf16(values) if dtype == "bf16" else values
        if shards[-1] and sum(held.nbytes for held in shards[-1].values()) + stored.nbytes > shard_size:
            shards.append({})
        shards[-1][name] = stored
    if len(shards) == 1:
        save(shards[0], folder / "model.safetensors")
        return folder
    files = [f"model-{i:05}-of-{len(shards):05}.safetensors" for i in range(1, len(shards) + 1)]
    places = {}
    for file, shard in zip(files, shards, strict=True):
        save(shard, folder / file)
        places |= dict.fromkeys(shard, file)
    size = sum(values.nbytes for shard in shards for values in shard.values())
    index = {"metadata": {"total_size": size}, "weight_map": places}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index, indent=2), "utf-8")
    return folder


def described(folder: Path) -> tuple[dict[str, Any], dict[str, tuple[str, tuple[int, ...]]]]:
    """config.json, and the dtype and shape of every tensor."""
    config = json.loads((folder / "config.json").read_text("utf-8"))
    tensors = {}
    for file in folder.glob("*.safetensors"):
        tensors |= {name: (str(values.dtype), values.shape) for name, values in read(file).items()}
    return config, tensors


def random_tensor(name: str, shape: tuple[int, ...]) -> np.ndarray:
    """So large that each part shows in the logits; the same on every machine, for a seed of its own by its name.

    Matrices have 1/√inputs, which keeps sizes, but those of queries and keys are larger, so that scores pass the cap;
    gains, which count from 1, spread by 0.4 about 0, and those of the last norm by more, so that logits pass theirs.
    softplus(Λ) goes from 0.003 to 1.3. In the vision tower a LayerNorm's gain counts from 0 and so is about 1.
    """
    random = np.random.default_rng([SEED, zlib.crc32(name.encode())])
    if "recurrent_param" in name:
        return random.random(shape, np.float32) * np.float32(7) - np.float32(6)
    noise = (random.random(shape, np.float32) - np.float32(0.5)) * np.float32(12**0.5)
    tower = name.startswith(("vision_tower.", "multi_modal_projector."))
    if len(shape) == 1 or name.endswith("bias"):
        if tower:
            gain = "norm" in name and name.endswith("weight") and "soft_emb" not in name
            return noise * np.float32(0.4) + np.float32(gain)
        last = {"model.norm.weight": 2.0, "model.final_norm.weight": 1.5}
        return noise * np.float32(next((size for end, size in last.items() if name.endswith(end)), 0.4))
    if "position_embedding" in name:
        return noise * np.float32(0.5)
    inputs = shape[0] if "projection_weight" in name else int(np.prod(shape[1:])) if tower else shape[-1]
    louder = 1.8 if "q_proj" in name or "k_proj" in name else 1.0
    return noise * np.float32(louder * inputs**-0.5)


def rename_tensors(folder: Path, prefixes: dict[str, str]) -> None:
    """Give the tensors of a single-file checkpoint other prefixes, each of them one of `prefixes`."""
    renamed = {}
    for name, tensor in read(folder / "model.safetensors").items():
        old = next(prefix for prefix in prefixes if name.startswith(prefix))
        renamed[prefixes[old] + name.removeprefix(old)] = tensor
    save(renamed, folder / "model.safetensors")


def store_head(folder: Path, name: str = "lm_head.weight") -> None:
    """Store the tied head with the embedding, as some conversions do."""
    tensors = read(folder / "model.safetensors")
    embedding = next(tensor for key, tensor in tensors.items() if key.endswith("embed_tokens.weight"))
    save(tensors | {name: embedding}, folder / "model.safetensors")


def older_config(folder: Path, leave_out: tuple[str, ...] = ()) -> None:
    """Rewrite config.json as it was when these models were released, without the fields of `leave_out`.

    Rope was three fields then (rope_theta, rope_local_base_freq, rope_scaling), the layers' kinds one number
    (sliding_window_pattern) or unsaid, and dtype was torch_dtype.
    """
    path = folder / "config.json"
    config = json.loads(path.read_text("utf-8"))
    config["torch_dtype"] = config.pop("dtype")
    config["transformers_version"] = "4.50.0.dev0"
    text = config.get("text_config", config)
    _older_rope(text)
    if text["model_type"] != "gemma":
        text.pop("layer_types")
    for name in (*leave_out, "_sliding_window_pattern", "dtype"):
        text.pop(name, None)
    path.write_text(json.dumps(config, indent=2), "utf-8")


def _older_rope(text: dict[str, Any]) -> None:
    rope = text.pop("rope_parameters")
    if text["model_type"] != "gemma3_text":
        text["rope_theta"] = rope["rope_theta"]
        return
    everywhere = rope["full_attention"]
    text["rope_theta"] = everywhere["rope_theta"]
    text["rope_local_base_freq"] = rope["sliding_attention"]["rope_theta"]
    text["rope_scaling"] = {"factor": everywhere["factor"], "rope_type": everywhere["rope_type"]}
    text["sliding_window_pattern"] = text["layer_types"].index("full_attention") + 1
