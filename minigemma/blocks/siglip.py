"""How Gemma 3 sees: SigLIP's vision transformer, then 4 x 4 pooling to 256 soft tokens (Zhai et al. 2023, "Sigmoid Loss
for Language Image Pre-Training"; Dosovitskiy et al. 2021, §3.1; Gemma Team 2025, "Gemma 3 Technical Report", §2.1).

    x    = W_patch · patch + b + position         4,096 patches of 14 x 14 pixels: a linear map of 588 numbers
    x    = x + W_o · attention(LN(x)) + b         27 blocks; every patch sees all, 16 heads of 72
    x    = x + W_down · gelu(W_up · LN(x) + b) + b
    x    = LN(x)                                  the tower's output
    soft = RMSNorm(mean over 4 x 4 patches of x) · P      a vector of the text model's width per token

There is no class token, no rope and no mask; positions are a learned table. Every image is scaled to 896 x 896
(files/images.py), which makes 64 x 64 patches and 256 tokens. The tower is the same in 4B, 12B and 27B, which were
trained with it frozen. LayerNorm and biases are SigLIP's; the RMSNorm after pooling is Gemma's, gain 1 + w.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from ..arrays import F32
from ..config import VisionConfig
from ..formulas.attention import Mask, attention, attention_probs, attention_scores, weighted_values
from ..formulas.geglu import gelu
from ..formulas.layernorm import layer_norm
from ..formulas.linear import affine, linear
from ..formulas.rmsnorm import rms_norm
from ..layouts.weight import Weight
from ..taps import Scope


@dataclass(frozen=True)
class SiglipBlock:
    """The weights of one layer of the tower."""

    norm1: F32  # [C]
    norm1_bias: F32  # [C]
    q: Weight  # [C, C]
    q_bias: F32  # [C]
    k: Weight  # [C, C]
    k_bias: F32  # [C]
    v: Weight  # [C, C]
    v_bias: F32  # [C]
    o: Weight  # [C, C]
    o_bias: F32  # [C]
    norm2: F32  # [C]
    norm2_bias: F32  # [C]
    up: Weight  # [F, C]
    up_bias: F32  # [F]
    down: Weight  # [C, F]
    down_bias: F32  # [C]


@dataclass(frozen=True)
class VisionWeights:
    """The weights of the tower and of its projection to the text model; C is the tower's width."""

    patch: Weight  # [C, 3 · 14 · 14]
    patch_bias: F32  # [C]
    positions: F32  # [P, C]
    blocks: tuple[SiglipBlock, ...]
    final_norm: F32  # [C]
    final_norm_bias: F32  # [C]
    soft_norm: F32  # [C]
    projection: Weight  # [D, C], the transpose of P


def patches(pixels: F32, side: int) -> F32:
    """Cuts an image into squares of side x side pixels, row by row: pixels [3, h, w] → [P, 3 · side · side]

    A convolution whose stride equals its size is a linear map of these patches (Dosovitskiy et al. 2021 §3.1).
    """
    channels, height, width = pixels.shape
    grid = pixels.reshape(channels, height // side, side, width // side, side)
    return np.ascontiguousarray(grid.transpose(1, 3, 0, 2, 4)).reshape(-1, channels * side * side)


def vision_tower(pixels: F32, w: VisionWeights, config: VisionConfig, taps: Scope) -> F32:
    """pixels [3, side, side] float32 in [-1, 1] → [P, C] float32      [Zhai et al. 2023 §4; Gemma 3 §2.1]"""
    x = affine(taps("patches", patches(pixels, config.patch)), w.patch, w.patch_bias) + w.positions
    x = taps("embedding", x)
    for i, block in enumerate(w.blocks):
        x = siglip_block(x, block, config, taps.within(f"blocks.{i}"))
    return taps("out", layer_norm(x, w.final_norm, w.final_norm_bias, config.eps))


def siglip_block(x: F32, w: SiglipBlock, config: VisionConfig, taps: Scope) -> F32:
    """x [P, C] → [P, C]      A pre-norm block (Dosovitskiy et al. 2021 eqs. 2-3)."""
    heads = len(x), config.heads, config.width // config.heads
    h = layer_norm(x, w.norm1, w.norm1_bias, config.eps)
    q, k, v = (affine(h, m, b).reshape(heads) for m, b in ((w.q, w.q_bias), (w.k, w.k_bias), (w.v, w.v_bias)))
    scale, positions = heads[2] ** -0.5, np.arange(len(x), dtype=np.int32)
    mask = Mask(positions, np.full_like(positions, len(x) - 1), positions, None)  # every patch sees all patches
    if taps.wants("attention.probs"):  # a value that the kernel never forms
        probs = attention_probs(attention_scores(q, k, scale, None), *mask)
        mixed = weighted_values(taps("attention.probs", probs), v)
    else:
        mixed = attention(q, k, v, mask, scale, None)
    mixed = taps("attention.heads", mixed).reshape(len(x), -1)
    x = taps("residual.middle", x + affine(mixed, w.o, w.o_bias))
    h = gelu(affine(layer_norm(x, w.norm2, w.norm2_bias, config.eps), w.up, w.up_bias))
    return taps("residual.out", x + affine(h, w.down, w.down_bias))


def average_pool(x: F32, config: VisionConfig) -> F32:
    """Means over squares of 4 x 4 patches: x [P, C] → [tokens, C]      [Gemma 3 §2.1]"""
    across, size = config.pooled, config.grid // config.pooled
    return x.reshape(across, size, across, size, -1).mean(axis=(1, 3)).reshape(config.tokens, -1)


def soft_tokens(x: F32, w: VisionWeights, config: VisionConfig, taps: Scope) -> F32:
    """Pools and projects the tower's output: x [P, C] → [tokens, D] float32, not scaled by √D      [Gemma 3 §2.1]"""
    pooled = rms_norm(taps("pooled", average_pool(x, config)), w.soft_norm, config.eps)
    return taps("soft_tokens", linear(pooled, w.projection))
