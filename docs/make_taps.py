"""Print docs/taps.md: every named value of a run, its shape and the families that have it.

python docs/make_taps.py > docs/taps.md

Small models with random weights run with every tap on. All their sizes differ, so each size maps to one letter.
"""

from __future__ import annotations

import re

import numpy as np

import minigemma as mg
from minigemma.cli.random_weights import random_model
from minigemma.config import VisionConfig
from minigemma.models.gemma import GemmaConfig
from minigemma.models.gemma2 import Gemma2Config
from minigemma.models.gemma3 import Gemma3Config
from minigemma.models.recurrentgemma import RecurrentGemmaConfig

EYES = VisionConfig(width=44, layers=1, heads=2, ffn_width=46, side=84, patch=14, tokens=9, image_token=301)
SIZES = {"width": 40, "heads": 6, "kv_heads": 3, "head_dim": 32, "ffn_width": 34, "vocab": 302, "context": 64}
MODELS = {
    "Gemma 1": GemmaConfig(**SIZES, layers=1),
    "Gemma 2": Gemma2Config(**SIZES, layers=1),
    "Gemma 3": Gemma3Config(**SIZES, layers=1, vision=EYES),
    "RecurrentGemma": RecurrentGemmaConfig(**SIZES, layers=3, lru_width=48, gate_blocks=4),
}
LETTERS = {20: "T", 40: "D", 6: "N", 3: "K", 32: "H", 34: "F", 302: "V", 48: "E", 44: "C", 36: "P", 588: "3·14·14"}
WHAT = {
    "embedding": "embeddings · √D; at an image's positions, the vision tower's soft tokens",
    "blocks.{i}.attention.q_projected": "queries before QK-norm and rope",
    "blocks.{i}.attention.k_projected": "keys before QK-norm and rope",
    "blocks.{i}.attention.q_before_rope": "queries before rope, after QK-norm in Gemma 3",
    "blocks.{i}.attention.k_before_rope": "keys before rope, after QK-norm in Gemma 3",
    "blocks.{i}.attention.q": "queries after rope",
    "blocks.{i}.attention.k": "keys after rope, as the cache keeps them",
    "blocks.{i}.attention.v": "values",
    "blocks.{i}.attention.scores": "q · k · scale, soft-capped in Gemma 2, before the mask",
    "blocks.{i}.attention.probs": "softmax of the scores of visible keys",
    "blocks.{i}.attention.heads": "each head's weighted mean of values, before W_o",
    "blocks.{i}.attention.out": "attention output, before the post-norm of Gemma 2 and 3",
    "blocks.{i}.residual.middle": "the residual stream between the two branches of a layer",
    "blocks.{i}.ffn.gate": "input of gelu",
    "blocks.{i}.ffn.up": "what the gate multiplies",
    "blocks.{i}.ffn.hidden": "gelu(gate) · up",
    "blocks.{i}.ffn.out": "feed-forward output, before the post-norm of Gemma 2 and 3",
    "blocks.{i}.residual.out": "the residual stream after the layer",
    "blocks.{i}.recurrent.gate": "input of the gelu that gates the memory's output",
    "blocks.{i}.recurrent.x": "input of the convolution",
    "blocks.{i}.recurrent.conv": "output of the convolution, input of the RG-LRU and its gates",
    "blocks.{i}.recurrent.recurrence_gate": "recurrence gate r before its sigmoid",
    "blocks.{i}.recurrent.input_gate": "input gate i before its sigmoid",
    "blocks.{i}.recurrent.decay": "decay a, the fraction of h that is kept",
    "blocks.{i}.recurrent.state": "state h",
    "blocks.{i}.recurrent.gated": "gelu(gate) · state",
    "blocks.{i}.recurrent.out": "output of the recurrent block",
    "final_norm": "the residual stream after the final norm",
    "logits": "scores of all tokens, soft-capped in Gemma 2 and RecurrentGemma",
    "images.{i}.patches": "pixels of each patch of an image",
    "images.{i}.embedding": "patch embeddings plus position embeddings",
    "images.{i}.blocks.{i}.attention.probs": "attention of each patch over all patches, 16 heads",
    "images.{i}.blocks.{i}.attention.heads": "each head's weighted mean of values, before W_o",
    "images.{i}.blocks.{i}.residual.middle": "the tower's residual stream after attention",
    "images.{i}.blocks.{i}.residual.out": "the tower's residual stream after the layer",
    "images.{i}.out": "the tower's output",
    "images.{i}.pooled": "means over squares of patches",
    "images.{i}.soft_tokens": "the vectors that replace embeddings in the text model",
}
HEAD = """# Named values

`model.forward(ids, taps=mg.Taps("blocks.*.attention.probs", "logits"))` keeps every value whose name matches a pattern;
`*` and `?` work as in file names. Values are float32. A pattern that matches no value is an error. Without taps,
naming costs almost nothing. Kernels never form some values (scores, probabilities, decay); for these, the definition
runs in place of the kernel.

`model.forward(ids, taps=mg.Edits({"blocks.5.attention.heads": f}))` changes values: `f(value, name)` gets a copy of
each value that its pattern matches and returns what the model continues with, of the same shape. `mg.Edits({…},
"logits")` also keeps values, after the change. `mg.generate`, `mg.stream_generate` and `mg.score` take `taps=` too.
Keys and values are edited before the cache rounds them to bf16; an edited state is the layer's output and what the
next call starts from. `model.with_weights({"blocks.5.attention.o": array})` is a copy of the model with another weight.

Letters: T tokens, S keys in the layer's cache (without a cache, the T tokens), D model width, N query heads, K
key/value heads, H head dim, F feed-forward width, V vocabulary, E recurrent width. In the image encoder: P
patches, C its width.

`python docs/make_taps.py` makes this table from running models; a test compares them.

| name | shape | in | what |
|--|--|--|--|"""


def table() -> str:
    """The page."""
    found: dict[str, tuple[str, list[str]]] = {}
    for family, config in MODELS.items():
        ids, images = list(range(20)), None
        if config.family == "gemma3":
            ids[4:13] = [EYES.image_token] * EYES.tokens
            images = np.zeros((1, 3, EYES.side, EYES.side), np.float32)
        taps = mg.Taps("*")
        random_model(config, "f32").forward(ids, images=images, taps=taps)
        for name, value in taps.items():
            _, families = found.setdefault(re.sub(r"\.\d+\.", ".{i}.", name), (letters(name, value.shape), []))
            if family not in families:
                families.append(family)
    if set(found) != set(WHAT):
        raise SystemExit(f"explain these values in WHAT, or take them out: {set(found) ^ set(WHAT)}")
    rows = [
        f"| `{name}` | {found[name][0]} | {', '.join(found[name][1]) if len(found[name][1]) < 4 else 'all'} | {what} |"
        for name, what in WHAT.items()
    ]
    return "\n".join([HEAD, *rows]) + "\n"


def letters(name: str, shape: tuple[int, ...]) -> str:
    """The shape in letters: [T, D]."""
    own = {2: "heads", 9: "tokens", 22: "C / heads"} if name.startswith("images.") else {}
    named = [(LETTERS | own).get(size, str(size)) for size in shape]
    if name.endswith((".scores", ".probs")):
        named[-1] = "P" if own else "S"
    return f"[{', '.join(named)}]"


if __name__ == "__main__":
    print(table(), end="")
