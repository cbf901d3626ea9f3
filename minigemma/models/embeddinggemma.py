"""EmbeddingGemma (Vera et al. 2025, "EmbeddingGemma: Powerful and Lightweight Text Representations", §2): an encoder.

    h  = Gemma 3's layers without the causal mask: global layers see every token, local ones W / 2 on either side
    e  = mean over tokens of norm(h)
    e  = W₃ W₂ e                             768 → 3,072 → 768, no bias, no activation between them
    e  = e / ‖e‖

Different from Gemma 3: the last position that a token sees, and what follows the last layer, which is laid out in a
folder as sentence-transformers has it: modules.json, 1_Pooling, 2_Dense, 3_Dense, 4_Normalize. A text stands between
<bos> and <eos>, behind a prompt that names the task.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace

import numpy as np

from ..arrays import F32
from ..cache import KeyValueRing, TokenPositions
from ..config import released
from ..formulas.linear import linear
from ..taps import Scope, Taps
from . import gemma3
from .fields import Fields
from .gemma3 import Gemma3, Gemma3Config


@dataclass(frozen=True, kw_only=True)
class EmbeddingGemmaConfig(Gemma3Config):
    """Gemma 3's sizes, and those of the two matrices after it; `window` counts the token and those on one side."""

    context: int = 2048
    window: int = 257
    dense: int = 3072  # P: between the two matrices
    outputs: int = 768  # E: of an embedding
    prompts: Mapping[str, str] = field(default_factory=dict, hash=False)  # name → text; "": where no name is given

    family = "embeddinggemma"

    @property
    def axes(self) -> dict[str, int]:
        """Those of a decoder, and P and E."""
        return super().axes | {"P": self.dense, "E": self.outputs}

    @property
    def non_embedding_parameters(self) -> int:
        """With the two matrices after the last layer."""
        return super().non_embedding_parameters + self.dense * (self.width + self.outputs)


RELEASED = released(
    EmbeddingGemmaConfig, gemma3.COLUMNS, {"embeddinggemma-300m": (768, 24, 3, 1, 256, 1152, 256)}, vocab=262_144
)


class EmbeddingGemma(Gemma3):
    """EmbeddingGemma."""

    config: EmbeddingGemmaConfig
    bidirectional = True

    def block(self, x: F32, layer: int, state: KeyValueRing, tokens: TokenPositions, taps: Scope) -> F32:
        """x [T, D] → [T, D]      Gemma 3's block, in which a token also sees later ones."""
        if tokens.first:
            raise ValueError("tokens see later ones; give the whole text in one call")
        last, window = tokens.positions[-1], self.attention[layer].window
        seen = np.full_like(tokens.positions, last)
        if window is not None:
            seen = np.minimum(tokens.positions + np.int32(window - 1), last)
        return super().block(x, layer, state, replace(tokens, last_visible=seen), taps)

    def head(self, x: F32, taps: Taps | None = None) -> F32:
        """ValueError: there are no logits."""
        raise ValueError("EmbeddingGemma writes no text; mg.embed and `minigemma embed` give its embeddings")

    def embed(self, ids: Sequence[int], taps: Taps | None = None) -> F32:
        """The embedding of one text: ids [T] → [E] float32 of length 1. Errors are those of `hidden_states`."""
        e = self.hidden_states(ids, taps=taps).mean(0, keepdims=True)
        if taps is not None:
            taps.check()
        with self.running():
            for weight in self.weights.dense:
                e = linear(e, weight)
        return e[0] / max(np.linalg.norm(e), np.float32(1e-12))


# ------------------------------------------------------------------------------------------------------------- files

TENSORS = gemma3.FAMILY.tensors | {
    "dense.0": ("2_Dense/linear.weight", "dense_2.weight", "P D"),
    "dense.1": ("3_Dense/linear.weight", "dense_3.weight", "E P"),
}
RELEASED_PROMPTS = {"query": "task: search result | query: ", "document": "title: none | text: "}
FOLDERS = ("1_Pooling", "2_Dense", "3_Dense")
MODULES = ["Transformer", "1_Pooling Pooling", "2_Dense Dense", "3_Dense Dense", "4_Normalize Normalize"]


def mean_pooling(f: Fields) -> None:
    """ValueError for a 1_Pooling/config.json of anything but the mean over all tokens."""
    for name in f.stated:
        if name.startswith("pooling_mode_"):
            f.expect(name, name == "pooling_mode_mean_tokens", because="EmbeddingGemma takes the mean")
    f.expect("pooling_mode", "mean")
    f.expect("include_prompt", True)
    f.get("word_embedding_dimension", "embedding_dimension", default=None)


def dense_from_json(f: Fields, inputs: int) -> int:
    """The outputs of a Dense module; ValueError for other inputs, a bias or an activation."""
    f.expect("in_features", inputs)
    f.expect("bias", False)
    f.expect("activation_function", "torch.nn.modules.linear.Identity")
    for name in ("module_input_name", "module_output_name"):
        f.expect(name, "sentence_embedding")
    return f.integer("out_features")


def from_json(f: Fields) -> EmbeddingGemmaConfig:
    """The config of a folder, whose sliding_window counts the tokens of both sides."""
    f.expect("use_bidirectional_attention", True)
    fields = gemma3.text_fields(f)
    listed = [m for m in f.get("modules.json") if isinstance(m, dict)]
    modules = [f"{m.get('path')} {str(m.get('type')).rpartition('.')[2]}".strip() for m in listed]
    if modules != MODULES:
        raise ValueError(f"modules.json lists {', '.join(modules)}; minigemma runs {', '.join(MODULES)}")
    mean_pooling(f.inner("1_Pooling/config.json"))
    dense = dense_from_json(f.inner("2_Dense/config.json"), fields["width"])
    outputs = dense_from_json(f.inner("3_Dense/config.json"), dense)
    sentences = dict(f.get("config_sentence_transformers.json"))
    prompts = dict(sentences.get("prompts") or {})
    if (name := sentences.get("default_prompt_name")) is not None:
        prompts[""] = prompts.get(name)
    if not all(isinstance(text, str) for text in prompts.values()):
        raise ValueError(f"prompts are {prompts}; each must be a text")
    fields["window"] = fields["window"] // 2 + 1
    return EmbeddingGemmaConfig(**fields, dense=dense, outputs=outputs, prompts=prompts)


def from_gguf(f: Fields, rows: int) -> EmbeddingGemmaConfig:
    """The config of a GGUF header, written with --sentence-transformers-dense-modules. It states no prompts."""
    fields = gemma3.gguf_fields(f, rows, causal=False)
    f.expect("pooling_type", 1, because="EmbeddingGemma takes the mean, which is 1")
    f.expect("dense_2_feat_in", fields["width"])
    dense, outputs = f.integer("dense_2_feat_out"), f.integer("dense_3_feat_out")
    f.expect("dense_3_feat_in", dense)
    fields["window"] = fields["window"] // 2 + 1
    return EmbeddingGemmaConfig(**fields, dense=dense, outputs=outputs, prompts=RELEASED_PROMPTS)


FAMILY = replace(
    gemma3.FAMILY,
    name="embeddinggemma",
    title="EmbeddingGemma",
    model=EmbeddingGemma,
    released=RELEASED,
    hub_ids="embeddinggemma-300m",
    tensors=TENSORS,
    model_types=("gemma3_text",),
    flags={"use_bidirectional_attention": True},
    json_files=("modules.json", "config_sentence_transformers.json", *(f"{name}/config.json" for name in FOLDERS)),
    from_json=from_json,
    architecture="gemma-embedding",
    from_gguf=from_gguf,
    to_json=None,
    to_gguf=None,
    system_turn=False,
)
