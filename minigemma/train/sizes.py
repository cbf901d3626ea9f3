"""The sizes of the tiny models, one of each later generation, and what the `-m` of `minigemma train` means.

D = 256 has an exact root, so that √D is the same in float32 and bf16, and divides into the blocks of every quantized
format. With 2,048 pieces a model has 2.2 to 2.4 million parameters, at most 5 MB in bf16. The windows are a quarter of
the 256 tokens that each trains on: longer than most sentences, short enough that what local layers forget can be seen.
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

from ..config import TextConfig
from ..files.config_json import config_from_json
from ..files.open import folder_tokenizer
from ..files.resolve import resolve, weights_folders
from ..files.tokenizer import Tokenizer
from ..models.gemma2 import Gemma2Config
from ..models.gemma3 import Gemma3Config
from ..models.recurrentgemma import RecurrentGemmaConfig

VOCABULARY = "tiny-vocabulary"  # the folder under weights/ with the tokenizer of all three
SHARED: dict[str, Any] = {"width": 256, "heads": 4, "vocab": 2048, "context": 1024, "window": 64}
TINY: dict[str, TextConfig] = {
    config.name: config
    for config in (
        Gemma2Config(name="tiny-gemma-2", layers=6, kv_heads=2, head_dim=32, ffn_width=256, **SHARED),
        Gemma3Config(name="tiny-gemma-3", layers=6, kv_heads=1, head_dim=32, ffn_width=256, **SHARED),
        # Two recurrent layers, attention, two recurrent layers: 2B ends so, too.
        RecurrentGemmaConfig(
            name="tiny-recurrentgemma",
            layers=5,
            kv_heads=1,
            head_dim=64,
            ffn_width=192,
            lru_width=256,
            gate_blocks=4,
            **SHARED,
        ),
    )
}


def config_named(name: str | Path, vocabulary: str | Path | None = None) -> tuple[TextConfig, Tokenizer]:
    """The sizes and the tokenizer of a training: of a tiny model by its name, of a CONFIG.json, or of a model's folder.

    vocabulary: a folder with a tokenizer, in place of weights/tiny-vocabulary and of the one beside CONFIG.json; a tiny
    model then has an embedding of as many rows as it has pieces.
    Raises ValueError, or ModelFormatError, for a config without a tokenizer and for one with too few rows for it.
    """
    text = str(name)
    if text in TINY:
        folder = Path(vocabulary) if vocabulary else _tiny_vocabulary()
        tokenizer = _tokenizer(folder)
        return replace(TINY[text], vocab=tokenizer.size), tokenizer
    path = Path(text) if text.endswith(".json") else resolve(name) / "config.json"
    config, _ = config_from_json(path)
    tokenizer = _tokenizer(Path(vocabulary) if vocabulary else path.parent)
    if config.vocab < tokenizer.size:
        told = f"{path}: vocab_size is {config.vocab}, and the tokenizer has {tokenizer.size} pieces"
        raise ValueError(f"{told}; state at least as many rows as there are pieces")
    return replace(config, vision=None), tokenizer


def _tokenizer(folder: Path) -> Tokenizer:
    tokenizer = folder_tokenizer(folder)
    if tokenizer is None:
        problem = "has neither tokenizer.model nor tokenizer.json; name a folder that has one, or make one:"
        raise ValueError(f"{folder}: {problem} minigemma vocab --data TEXT --out FOLDER")
    return tokenizer


def _tiny_vocabulary() -> Path:
    for folder in weights_folders():
        if (folder / VOCABULARY).is_dir():
            return folder / VOCABULARY
    problem = "not found; it comes with the repository, not with the package: work in a clone, or give --vocab FOLDER"
    raise ValueError(f"weights/{VOCABULARY}: {problem}")
