"""Small random Gemma 3 checkpoints that see: what the tests of images run on.

As in checkpoints.py, nothing is round: heads of 12 and 20, widths that are no powers of two, every gain and every bias
random, ε so large that its place shows, and a window of a few tokens more than an image has, so that a prompt soon
passes it. The three tokens around and of an image lie inside the vocabulary.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from support import checkpoints

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
# What the tensors' names began with, by how they begin in what `write_vision` writes.
GENERATIONS: dict[str, dict[str, str]] = {
    "released": {
        "language_model.model.": "language_model.model.",
        "vision_tower.": "vision_tower.vision_model.",
        "multi_modal_projector.": "multi_modal_projector.",
    },
    "4.52 to 4.57": {
        "language_model.model.": "model.language_model.",
        "vision_tower.": "model.vision_tower.vision_model.",
        "multi_modal_projector.": "model.multi_modal_projector.",
    },
    "the modules of 5.23": {
        "language_model.model.": "model.language_model.",
        "vision_tower.": "model.vision_tower.",
        "multi_modal_projector.": "model.multi_modal_projector.",
    },
}


def write_vision(
    folder: Path,
    tokens: int = 4,
    dtype: str = "f32",
    *,
    tower: dict[str, Any] | None = None,
    text: dict[str, Any] | None = None,
    **changes: Any,
) -> Path:
    """A random checkpoint in `folder` whose images are `tokens` tokens.

    `tower` and `text` replace fields of these two configs, `changes` those of the whole.
    """
    reader = TEXT | {"sliding_window": WINDOWS[tokens]} | (text or {})
    eyes = {"model_type": "siglip_vision_model", "vision_use_head": False} | TOWERS[tokens] | (tower or {})
    whole = {
        "mm_tokens_per_image": tokens,
        "image_token_index": IMAGE,
        "boi_token_index": START,
        "eoi_token_index": END,
    }
    config = checkpoints.text_config("gemma3_text", reader)
    return checkpoints.write_vision(folder, config, eyes, dtype, **(whole | changes))


def pixels(tokens: int, count: int, seed: int = 3) -> np.ndarray:
    """`count` images of noise, each with another brightness and another stripe: float32 [count, 3, side, side].

    A stripe is a triangle's, not a sine's, whose last digit differs from one library of mathematics to another.
    """
    side, random = TOWERS[tokens]["image_size"], np.random.default_rng(seed)
    stripes = np.abs((np.arange(side) * random.uniform(0.03, 0.3, (count, 3, 1, 1))) % 2 - 1) * 2 - 1
    noise = random.uniform(-1, 1, (count, 3, side, side))
    return np.clip(0.5 * noise + 0.4 * stripes + random.uniform(-0.3, 0.3, (count, 3, 1, 1)), -1, 1).astype(np.float32)


def prompt(tokens: int, layout: Sequence[int | str], seed: int = 13, image: int = IMAGE) -> np.ndarray:
    """Token ids of a layout: a number of text tokens, "image" with its two markers, or "soft" without them."""
    random, places = np.random.default_rng(seed), [image] * tokens
    ids: list[int] = []
    for part in layout:
        if isinstance(part, int):
            ids += random.integers(3, START, part).tolist()
        else:
            ids += [START, *places, END] if part == "image" else places
    return np.array(ids)
