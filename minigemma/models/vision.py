"""The files of Gemma 3's vision tower (Gemma 3 §2.1): tensor names, fields of config.json and mmproj."""

from __future__ import annotations

from typing import Any

from ..config import VisionConfig
from .fields import TANH_GELU, Fields, same_for_all

# our name: (name in a folder, name in a GGUF file, shape), its letters those of `vision_axes`
VISION = {
    "patch": ("vision_tower.embeddings.patch_embedding.weight", "v.patch_embd.weight", "C 3 B B"),
    "patch_bias": ("vision_tower.embeddings.patch_embedding.bias", "v.patch_embd.bias", "C"),
    "positions": ("vision_tower.embeddings.position_embedding.weight", "v.position_embd.weight", "P C"),
    "final_norm": ("vision_tower.post_layernorm.weight", "v.post_ln.weight", "C"),
    "final_norm_bias": ("vision_tower.post_layernorm.bias", "v.post_ln.bias", "C"),
    "soft_norm": ("multi_modal_projector.mm_soft_emb_norm.weight", "mm.soft_emb_norm.weight", "C"),
    "projection": ("multi_modal_projector.mm_input_projection_weight", "mm.input_projection.weight", "C D"),
}
VISION_LAYER = {  # after "vision_tower.encoder.layers.{i}." or "v.blk.{i}."
    ours + end: (f"{theirs}{dot}", f"{gguf}{dot}", bias_axes if end else axes)
    for ours, theirs, gguf, axes, bias_axes in (
        ("norm1", "layer_norm1", "ln1", "C", "C"),
        ("q", "self_attn.q_proj", "attn_q", "C C", "C"),
        ("k", "self_attn.k_proj", "attn_k", "C C", "C"),
        ("v", "self_attn.v_proj", "attn_v", "C C", "C"),
        ("o", "self_attn.out_proj", "attn_out", "C C", "C"),
        ("norm2", "layer_norm2", "ln2", "C", "C"),
        ("up", "mlp.fc1", "ffn_up", "F C", "F"),
        ("down", "mlp.fc2", "ffn_down", "C F", "C"),
    )
    for end, dot in (("", ".weight"), ("_bias", ".bias"))
}
SIZES = {  # our field: (in vision_config, in the header of an mmproj file after "clip.vision.")
    "width": ("hidden_size", "embedding_length"),
    "layers": ("num_hidden_layers", "block_count"),
    "heads": ("num_attention_heads", "attention.head_count"),
    "ffn_width": ("intermediate_size", "feed_forward_length"),
    "side": ("image_size", "image_size"),
    "patch": ("patch_size", "patch_size"),
}
TOKENS = {  # our field: its names at the top of config.json
    "tokens": ("mm_tokens_per_image",),
    "image_token": ("image_token_id", "image_token_index"),
    "start_token": ("boi_token_id", "boi_token_index"),
    "end_token": ("eoi_token_id", "eoi_token_index"),
}


def vision_axes(vision: VisionConfig, width: int) -> dict[str, int]:
    """The sizes that the letters of the tables stand for; `width` is the text model's."""
    axes = {"C": vision.width, "F": vision.ffn_width, "B": vision.patch, "P": vision.grid**2, "3": 3}
    return axes | {"D": width}


def vision_from_json(whole: Fields) -> VisionConfig | None:
    """The tower of a config.json with a `vision_config`; sizes that it leaves out are those of the released one."""
    found: dict[str, Any] = {
        ours: whole.integer(*names) for ours, names in TOKENS.items() if whole.get(*names, default=None) is not None
    }
    stated = whole.get("vision_config", default=None)
    if stated is None:
        return None
    tower = whole.inner("vision_config")
    tower.expect("model_type", "siglip_vision_model")
    tower.expect("hidden_act", *TANH_GELU, because="SigLIP's is gelu_pytorch_tanh")
    tower.expect("vision_use_head", False, because="Gemma 3's vision tower has no pooling head")
    tower.expect("num_channels", 3)
    for ours, (theirs, _) in SIZES.items():
        if tower.get(theirs, default=None) is not None:
            found[ours] = tower.integer(theirs)
    return VisionConfig(**found, eps=tower.number("layer_norm_eps", default=VisionConfig.eps))


def pictures_as_here(f: Fields, vision: VisionConfig) -> None:
    """Raises ValueError for a preprocessor_config.json with other settings than those of files/images.py."""
    for name in ("do_resize", "do_rescale", "do_normalize"):
        f.expect(name, True)
    for name in ("image_mean", "image_std"):
        if (value := same_for_all(name, f.get(name, default=0.5))) not in (0.5, None):
            raise ValueError(f"{name} is {value}; Gemma 3's images have mean and deviation 0.5")
    f.expect("resample", 2, "bilinear", because="Gemma 3's is 2, bilinear")
    f.expect("do_pan_and_scan", False, because="crops are cut where a call asks for them: set it to false")
    f.expect("do_center_crop", False)
    f.expect("image_seq_length", vision.tokens)
    f.expect("size", vision.side, {"height": vision.side, "width": vision.side})
    if abs(f.number("rescale_factor", default=1 / 255) * 255 - 1) > 1e-6:
        raise ValueError(f"rescale_factor is {f.number('rescale_factor'):g}; it must be 1 / 255")


def vision_from_gguf(f: Fields, text_width: int) -> VisionConfig:
    """The tower of an mmproj file; `f` are its fields after "clip.", `text_width` is the text model's."""
    found: dict[str, Any] = {ours: f.integer(f"vision.{theirs}") for ours, (_, theirs) in SIZES.items()}
    pooling = f.integer("vision.projector.scale_factor", default=4)
    found["tokens"] = (found["side"] // found["patch"] // pooling) ** 2
    width = f.integer("vision.projection_dim", default=text_width)
    if width != text_width:
        raise ValueError(f"it projects to a width of {width}, and the text model has {text_width}")
    f.expect("use_gelu", True)
    f.expect("use_silu", False)
    for name in ("vision.image_mean", "vision.image_std"):
        if (value := same_for_all(name, f.get(name, default=0.5))) != 0.5:
            raise ValueError(f"{name} is {value}; Gemma 3's images have mean and deviation 0.5")
    eps = round(f.number("vision.attention.layer_norm_epsilon"), 12)  # stored in float32
    return VisionConfig(**found, eps=eps)
