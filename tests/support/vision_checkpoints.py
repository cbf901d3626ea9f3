"""Small random Gemma 3 checkpoints that see, written by transformers itself: the truth for images.

As in checkpoints.py, nothing is round: heads of 12 and 20, widths that are no powers of two, every gain and every bias
random, ε so large that its place shows, and a window of a few tokens more than an image has, so that a prompt soon
passes it. The three tokens around and of an image lie inside the vocabulary.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import save_file
from support import checkpoints
from transformers import Gemma3Config, Gemma3ForConditionalGeneration, Gemma3TextConfig

VOCAB = checkpoints.VOCAB
IMAGE, START, END = VOCAB - 3, VOCAB - 5, VOCAB - 2
TEXT: dict[str, Any] = checkpoints.GEMMA3 | {"num_hidden_layers": 7}  # layer 5 is global
# By the number of tokens that an image becomes: the tower, and the window of the text model behind it.
TOWERS: dict[int, dict[str, Any]] = {
    4: {  # 4 x 4 patches, 2 x 2 to a token
        "hidden_size": 60,
        "num_attention_heads": 5,
        "intermediate_size": 74,
        "num_hidden_layers": 3,
        "image_size": 56,
        "patch_size": 14,
        "layer_norm_eps": 0.03,
    },
    9: {  # 12 x 12 patches, 4 x 4 to a token
        "hidden_size": 60,
        "num_attention_heads": 3,
        "intermediate_size": 101,
        "num_hidden_layers": 2,
        "image_size": 84,
        "patch_size": 7,
        "layer_norm_eps": 0.02,
    },
    16: {  # 12 x 12 patches, 3 x 3 to a token
        "hidden_size": 84,
        "num_attention_heads": 7,
        "intermediate_size": 90,
        "num_hidden_layers": 2,
        "image_size": 84,
        "patch_size": 7,
        "layer_norm_eps": 0.05,
    },
    256: {  # the released one: 64 x 64 patches, 4 x 4 to a token
        "hidden_size": 1152,
        "num_attention_heads": 16,
        "intermediate_size": 4304,
        "num_hidden_layers": 27,
        "image_size": 896,
        "patch_size": 14,
    },
}
SMALL = (4, 9, 16)
WINDOWS = {4: 6, 9: 11, 16: 17, 256: 300}
# What the tensors' names began with, by what transformers 5.23 calls them in its own modules.
GENERATIONS: dict[str, dict[str, str]] = {
    "released": {
        "model.language_model.": "language_model.model.",
        "model.vision_tower.": "vision_tower.vision_model.",
        "model.multi_modal_projector.": "multi_modal_projector.",
    },
    "4.52 to 4.57": {
        "model.language_model.": "model.language_model.",
        "model.vision_tower.": "model.vision_tower.vision_model.",
        "model.multi_modal_projector.": "model.multi_modal_projector.",
    },
    "the modules of 5.23": {"model.": "model."},
}


def write_vision(
    folder: Path,
    tokens: int = 4,
    dtype: str = "f32",
    *,
    attention: str = "eager",
    tower: dict[str, Any] | None = None,
    text: dict[str, Any] | None = None,
    **changes: Any,
) -> tuple[Gemma3ForConditionalGeneration, Gemma3Config]:
    """A random checkpoint in `folder` whose images are `tokens` tokens, and transformers' model and config of it.

    `tower` and `text` replace fields of these two configs, `changes` those of the whole. The model is
    in float32.
    """
    reader = Gemma3TextConfig(**(TEXT | {"sliding_window": WINDOWS[tokens]} | (text or {})))
    eyes = {"model_type": "siglip_vision_model", "vision_use_head": False} | TOWERS[tokens] | (tower or {})
    whole = {
        "mm_tokens_per_image": tokens,
        "image_token_index": IMAGE,
        "boi_token_index": START,
        "eoi_token_index": END,
    }
    config = Gemma3Config(text_config=reader.to_dict(), vision_config=eyes, **(whole | changes))
    model = Gemma3ForConditionalGeneration(config)
    checkpoints.randomise(model)
    randomise_tower(model)
    model.to(checkpoints.DTYPES[dtype]).save_pretrained(folder)
    del model
    return read_vision(folder, attention), config


def read_vision(folder: Path, attention: str = "eager") -> Gemma3ForConditionalGeneration:
    """transformers' model of a folder, in float32."""
    model, report = Gemma3ForConditionalGeneration.from_pretrained(
        folder, dtype=torch.float32, attn_implementation=attention, output_loading_info=True
    )
    left = {key: report[key] for key in ("missing_keys", "unexpected_keys", "mismatched_keys") if report[key]}
    assert not left, f"transformers did not find its own tensors: {left}"
    return model.eval()


def randomise_tower(model: torch.nn.Module, seed: int = 7) -> None:
    """Every parameter of tower and projection anew, so large that each part shows.

    A LayerNorm's gain counts from 0 and so is about 1 here; the RMSNorm's after pooling counts from 1.
    """
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "vision_tower" not in name and "multi_modal_projector" not in name:
                continue
            noise = torch.randn(parameter.shape, generator=generator)
            if parameter.ndim == 1:
                gain = "norm" in name and name.endswith("weight") and "soft_emb" not in name
                parameter.copy_(noise.mul_(0.4).add_(1.0 if gain else 0.0))
            elif "position_embedding" in name:
                parameter.copy_(noise.mul_(0.5))
            else:
                inputs = parameter.shape[0] if "projection_weight" in name else parameter[0].numel()
                louder = 1.8 if "q_proj" in name or "k_proj" in name else 1.0
                parameter.copy_(noise.mul_(louder * inputs**-0.5))


def write_names_of(folder: Path, model: torch.nn.Module, generation: str) -> None:
    """Replace the tensors of a folder by those of `model`, named as one of GENERATIONS named them."""
    prefixes = GENERATIONS[generation]
    tensors = {}
    for name, tensor in model.state_dict().items():
        old = next((prefix for prefix in prefixes if name.startswith(prefix)), None)
        if old is not None:  # the tied head is the embedding and is not stored
            tensors[prefixes[old] + name.removeprefix(old)] = tensor.contiguous()
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})


def pixels(config: Gemma3Config, count: int, seed: int = 3) -> np.ndarray:
    """`count` images of noise, each with another brightness and another stripe: float32 [count, 3, side, side]."""
    side, random = config.vision_config.image_size, np.random.default_rng(seed)
    stripes = np.sin(np.arange(side) * random.uniform(0.1, 0.9, (count, 3, 1, 1)))
    noise = random.uniform(-1, 1, (count, 3, side, side))
    return np.clip(0.5 * noise + 0.4 * stripes + random.uniform(-0.3, 0.3, (count, 3, 1, 1)), -1, 1).astype(np.float32)


def prompt(config: Gemma3Config, layout: Sequence[int | str], seed: int = 13) -> np.ndarray:
    """Token ids of a layout: so many of text, "image" with its two markers, or "soft" without them."""
    random, places = np.random.default_rng(seed), [config.image_token_id] * config.mm_tokens_per_image
    ids: list[int] = []
    for part in layout:
        if isinstance(part, int):
            ids += random.integers(3, START, part).tolist()
        else:
            ids += [START, *places, END] if part == "image" else places
    return np.array(ids)


def logits_of(
    model: Gemma3ForConditionalGeneration, ids: np.ndarray, images: np.ndarray | None = None, blocks: bool = True
) -> np.ndarray:
    """What transformers gives for all of ids at once; without `blocks` an image's tokens see as those of text do."""
    tokens = torch.tensor(np.asarray(ids))[None]
    types = (tokens == model.config.image_token_id).long() if blocks else None
    seen = None if images is None or not len(images) else torch.tensor(images)
    with torch.no_grad():
        return model(tokens, pixel_values=seen, token_type_ids=types, use_cache=False).logits[0].numpy()


def features_of(model: Gemma3ForConditionalGeneration, images: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """(the tower's last hidden states [n, P, C], soft tokens [n, tokens, D]) as transformers has them."""
    with torch.no_grad():
        found = model.get_image_features(torch.tensor(images), return_dict=True)
    return found.last_hidden_state.numpy(), found.pooler_output.numpy()
