"""VaultGemma (Sinha et al. 2025, "VaultGemma: A Differentially Private Gemma Model"): Gemma 2 trained with DP-SGD.

    h = x + attention(norm(x))               every layer sees every earlier token, scores capped at 50
    y = h + feed_forward(norm(h))

Different from Gemma 2: no norm after a branch, and no local layers, as its sequences have 1,024 tokens. The training
adds noise to clipped gradients, which changes the weights and not the model.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

from ..config import AttentionConfig, released
from . import gemma, gemma2
from .fields import Fields, Json, period_from_json, plain_rope
from .gemma2 import Gemma2, Gemma2Config


@dataclass(frozen=True, kw_only=True)
class VaultGemmaConfig(Gemma2Config):
    """VaultGemma: Gemma 2's soft-caps; the released model has global layers only."""

    context: int = 1024
    pattern: int = 1  # every so many layers one is global

    family = "vaultgemma"
    norms_per_block = 2

    def attention(self, layer: int) -> AttentionConfig:
        """The last layer of each pattern is global: all of them where the pattern is 1."""
        window = self.window if layer % self.pattern < self.pattern - 1 else None
        return self.attention_config(window=window, rope_base=self.rope_base, soft_cap=self.attention_cap)


RELEASED = released(
    VaultGemmaConfig,
    "width layers heads kv_heads head_dim ffn_width query_pre_attn_scalar",
    {"vaultgemma-1b": (1152, 26, 4, 4, 256, 6912, 256)},
    vocab=256_000,
)


class VaultGemma(Gemma2):
    """VaultGemma: Gemma 2's block, whose weights have no norms after the branches."""


# ------------------------------------------------------------------------------------------------------------- files

LAYER = gemma.LAYER | {"ffn.pre_norm": ("pre_feedforward_layernorm.weight", "", "D")}


def from_json(f: Fields) -> VaultGemmaConfig:
    """The config of a VaultGemma's config.json; a class default, local and global in turn, where it states no kinds."""
    gemma2.check_activation(f)
    gemma.causal(f)
    sizes = gemma.sizes_from_json(f)
    pattern, local = period_from_json(f, sizes["layers"], 2), {}
    if pattern > 1 or f.get("sliding_window") is not None:
        local = {"window": f.integer("sliding_window")}
    return VaultGemmaConfig(
        **sizes | local,
        pattern=pattern,
        query_pre_attn_scalar=f.number("query_pre_attn_scalar"),
        attention_cap=f.cap("attn_logit_softcapping"),
        logit_cap=f.cap("final_logit_softcapping"),
        rope_base=plain_rope(f),
    )


def to_json(config: VaultGemmaConfig) -> Json:
    """The config.json that transformers reads, and `from_json`."""
    return gemma2.to_json(config) | {"architectures": ["VaultGemmaForCausalLM"], "model_type": "vaultgemma"}


FAMILY = replace(
    gemma2.FAMILY,
    name="vaultgemma",
    title="VaultGemma",
    model=VaultGemma,
    released=RELEASED,
    hub_ids="vaultgemma-1b",
    layer_tensors=lambda config, layer: LAYER,
    model_types=("vaultgemma",),
    from_json=from_json,
    architecture="",
    from_gguf=None,
    to_json=to_json,
    to_gguf=None,
)
