"""Small random checkpoints, written by transformers itself: the truth that the parity tests compare with.

Their shapes are awkward on purpose: heads of 12 or 20, a width that is not heads × head_dim, several key/value heads,
windows of 5 to 7 tokens, soft-caps far below what scores and logits reach, and every gain random, since a part that an
initialiser leaves at zero is a part that no comparison sees.

`write` makes a folder as transformers 5 saves it. The other functions turn such a folder into what earlier years
released: other names of tensors, an older config.json, a head stored beside the embedding.
"""

from __future__ import annotations

import json
import warnings
from pathlib import Path
from typing import Any

with warnings.catch_warnings():
    warnings.simplefilter("ignore")  # what other people's packages deprecate is not ours to mend
    import torch
    import transformers
    from safetensors.torch import load_file, save_file
    from transformers import (
        Gemma2Config,
        Gemma2ForCausalLM,
        Gemma3Config,
        Gemma3ForCausalLM,
        Gemma3ForConditionalGeneration,
        Gemma3TextConfig,
        GemmaConfig,
        GemmaForCausalLM,
    )

transformers.logging.set_verbosity_error()
transformers.logging.disable_progress_bar()

DTYPES = {"f32": torch.float32, "bf16": torch.bfloat16}
VOCAB = 307

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
FAMILIES: dict[str, tuple[type, type, dict[str, Any]]] = {
    "gemma": (GemmaForCausalLM, GemmaConfig, GEMMA),
    "gemma2": (Gemma2ForCausalLM, Gemma2Config, GEMMA2),
    "gemma3": (Gemma3ForCausalLM, Gemma3TextConfig, GEMMA3),
    "gemma3-vision": (Gemma3ForConditionalGeneration, Gemma3TextConfig, GEMMA3_VISION),
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


def write(
    folder: Path, family: str, dtype: str = "f32", *, shard_size: str = "1GB", tied: bool = True, **changes: Any
) -> Path:
    """A random checkpoint of `family` in `folder`, of tensors "f32" or "bf16"; `tied=False` gives it its own head.

    `changes` replace fields of the text config.
    """
    model_class, text_class, sizes = FAMILIES[family]
    config = text_class(**(sizes | changes), tie_word_embeddings=tied)
    if family == "gemma3-vision":
        config = Gemma3Config(
            text_config=config.to_dict(),
            vision_config=TOWER,
            mm_tokens_per_image=4,
            image_token_index=VOCAB - 1,
            tie_word_embeddings=tied,
        )
    model = model_class(config)
    randomise(model)
    model.to(DTYPES[dtype]).save_pretrained(folder, max_shard_size=shard_size)
    return folder


def randomise(model: torch.nn.Module, seed: int = 5) -> None:
    """Every parameter anew, so large that each part shows in the logits.

    Matrices have 1/√inputs, which keeps sizes, but those of queries and keys are larger, so that scores pass the cap;
    gains, which count from 1, spread by 0.4 about 0, and those of the last norm by more, so that logits pass theirs.
    """
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            noise = torch.randn(parameter.shape, generator=generator)
            if parameter.ndim == 1:
                parameter.copy_(noise * (2.0 if name.endswith(("model.norm.weight", "layers.norm.weight")) else 0.4))
            else:
                gain = 1.8 if "q_proj" in name or "k_proj" in name else 1.0
                parameter.copy_(noise * gain * parameter.shape[-1] ** -0.5)


def reference(folder: Path, **changes: Any) -> torch.nn.Module:
    """transformers' model of a folder in float32 with its plainest attention; `changes` replace fields of its config.

    DeepMind ran everything in bf16 and so with √width rounded to bf16; minigemma rounds it wherever the embedding is
    stored in bf16. transformers keeps it as a float32 buffer, which it casts to the dtype of the weights at each use:
    unrounded once they are float32. So the buffer of a bf16 file is set to the rounded value here.
    """
    config = transformers.AutoConfig.from_pretrained(folder)
    stored_bf16 = config.dtype == torch.bfloat16
    text = config.get_text_config()
    for name, value in changes.items():
        setattr(text, name, value)
    model_class = next(c for c, *_ in FAMILIES.values() if c.__name__ == config.architectures[0])
    model, report = model_class.from_pretrained(
        folder, config=config, dtype=torch.float32, attn_implementation="eager", output_loading_info=True
    )
    left = {key: report[key] for key in ("missing_keys", "unexpected_keys", "mismatched_keys") if report[key]}
    assert not left, f"transformers did not find its own tensors: {left}"
    if stored_bf16:
        round_embedding_scale(model)
    return model.eval()


def round_embedding_scale(model: torch.nn.Module) -> None:
    """√width as bf16 has it, in a model that runs in float32."""
    scale = model.get_input_embeddings().embed_scale
    scale.copy_(scale.to(torch.bfloat16).to(torch.float32))


def rename_tensors(folder: Path, prefixes: dict[str, str]) -> None:
    """Give the tensors of a single-file checkpoint other prefixes, each of them one of `prefixes`."""
    tensors = load_file(folder / "model.safetensors")
    renamed = {}
    for name, tensor in tensors.items():
        old = next(prefix for prefix in prefixes if name.startswith(prefix))
        renamed[prefixes[old] + name.removeprefix(old)] = tensor
    save_file(renamed, folder / "model.safetensors", metadata={"format": "pt"})


def store_head(folder: Path, name: str = "lm_head.weight") -> None:
    """Store the tied head beside the embedding, as some conversions do."""
    tensors = load_file(folder / "model.safetensors")
    embedding = next(tensor for key, tensor in tensors.items() if key.endswith("embed_tokens.weight"))
    save_file(tensors | {name: embedding.clone()}, folder / "model.safetensors", metadata={"format": "pt"})


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
