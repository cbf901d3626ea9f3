"""Which tensor of a file is which weight: the names that released files use, and the shape that a config implies.

Each row is   our name: (name in a Hugging Face file, name in a GGUF file, shape)   and the letters of shapes are those
of `sizes`. Names of layers follow "layers.{i}." and "blk.{i}."; those of the vision tower's,
"vision_tower.encoder.layers.{i}." and "v.blk.{i}.".
"""

from __future__ import annotations

from collections.abc import Iterator

from ..config import RecurrentGemmaConfig, TextConfig, VisionConfig

Table = dict[str, tuple[str, str, str]]

MODEL_TENSORS = {
    "embedding": ("embed_tokens.weight", "token_embd.weight", "V D"),
    "final_norm": ("norm.weight", "output_norm.weight", "D"),
}
LAYER_TENSORS = {
    "pre_attention_norm": ("input_layernorm.weight", "attn_norm.weight", "D"),
    "attention.q": ("self_attn.q_proj.weight", "attn_q.weight", "NH D"),
    "attention.k": ("self_attn.k_proj.weight", "attn_k.weight", "KH D"),
    "attention.v": ("self_attn.v_proj.weight", "attn_v.weight", "KH D"),
    "attention.o": ("self_attn.o_proj.weight", "attn_output.weight", "D NH"),
    "pre_ffn_norm": ("pre_feedforward_layernorm.weight", "ffn_norm.weight", "D"),
    "ffn.gate": ("mlp.gate_proj.weight", "ffn_gate.weight", "F D"),
    "ffn.up": ("mlp.up_proj.weight", "ffn_up.weight", "F D"),
    "ffn.down": ("mlp.down_proj.weight", "ffn_down.weight", "D F"),
}
POST_NORMS = {
    "post_attention_norm": ("post_attention_layernorm.weight", "post_attention_norm.weight", "D"),
    "post_ffn_norm": ("post_feedforward_layernorm.weight", "post_ffw_norm.weight", "D"),
}
HEAD_NORMS = {
    "attention.q_norm": ("self_attn.q_norm.weight", "attn_q_norm.weight", "H"),
    "attention.k_norm": ("self_attn.k_norm.weight", "attn_k_norm.weight", "H"),
}
RECURRENTGEMMA = {
    "temporal_pre_norm": ("temporal_pre_norm.weight", "", "D"),
    "channel_pre_norm": ("channel_pre_norm.weight", "", "D"),
    **{f"ffn.{part}": (f"mlp_block.{part}_proj.weight", "", "F D") for part in ("gate", "up")},
    **{f"ffn.{part}_bias": (f"mlp_block.{part}_proj.bias", "", "F") for part in ("gate", "up")},
    "ffn.down": ("mlp_block.down_proj.weight", "", "D F"),
    "ffn.down_bias": ("mlp_block.down_proj.bias", "", "D"),
}
RECURRENT = {
    **{f"recurrent.{part}": (f"temporal_block.linear_{part}.weight", "", "E D") for part in ("x", "y")},
    **{f"recurrent.{part}_bias": (f"temporal_block.linear_{part}.bias", "", "E") for part in ("x", "y")},
    "recurrent.out": ("temporal_block.linear_out.weight", "", "D E"),
    "recurrent.out_bias": ("temporal_block.linear_out.bias", "", "D"),
    "recurrent.conv": ("temporal_block.conv_1d.weight", "", "E 1 C"),
    "recurrent.conv_bias": ("temporal_block.conv_1d.bias", "", "E"),
    "recurrent.decay": ("temporal_block.rg_lru.recurrent_param", "", "E"),
    "recurrent.recurrence_gate": ("temporal_block.rg_lru.recurrent_gate_weight", "", "M I I"),
    "recurrent.recurrence_bias": ("temporal_block.rg_lru.recurrent_gate_bias", "", "M I"),
    "recurrent.input_gate": ("temporal_block.rg_lru.input_gate_weight", "", "M I I"),
    "recurrent.input_bias": ("temporal_block.rg_lru.input_gate_bias", "", "M I"),
}
LOCAL_ATTENTION = {
    "attention.q": ("temporal_block.q_proj.weight", "", "NH D"),
    "attention.k": ("temporal_block.k_proj.weight", "", "KH D"),
    "attention.v": ("temporal_block.v_proj.weight", "", "KH D"),
    "attention.o": ("temporal_block.o_proj.weight", "", "D NH"),
    "attention.o_bias": ("temporal_block.o_proj.bias", "", "D"),
}
VISION = {
    "patch": ("vision_tower.embeddings.patch_embedding.weight", "v.patch_embd.weight", "C 3 B B"),
    "patch_bias": ("vision_tower.embeddings.patch_embedding.bias", "v.patch_embd.bias", "C"),
    "positions": ("vision_tower.embeddings.position_embedding.weight", "v.position_embd.weight", "P C"),
    "final_norm": ("vision_tower.post_layernorm.weight", "v.post_ln.weight", "C"),
    "final_norm_bias": ("vision_tower.post_layernorm.bias", "v.post_ln.bias", "C"),
    "soft_norm": ("multi_modal_projector.mm_soft_emb_norm.weight", "mm.soft_emb_norm.weight", "C"),
    "projection": ("multi_modal_projector.mm_input_projection_weight", "mm.input_projection.weight", "C D"),
}
VISION_LAYER = {
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


def model_tensors(config: TextConfig) -> Table:
    """The rows of the table that belong to no layer."""
    if config.family != "recurrentgemma":
        return MODEL_TENSORS
    return MODEL_TENSORS | {"final_norm": ("final_norm.weight", "", "D")}


def layer_tensors(config: TextConfig, layer: int) -> Table:
    """The rows of the table that one layer of a model has."""
    if isinstance(config, RecurrentGemmaConfig):
        return RECURRENTGEMMA | (LOCAL_ATTENTION if config.is_attention(layer) else RECURRENT)
    if config.family == "gemma":  # in its files "post_attention_layernorm" is the norm before the feed-forward block
        return LAYER_TENSORS | {"pre_ffn_norm": ("post_attention_layernorm.weight", "ffn_norm.weight", "D")}
    return LAYER_TENSORS | POST_NORMS | (HEAD_NORMS if config.family == "gemma3" else {})


def sizes(config: TextConfig) -> dict[str, int]:
    """What the letters of the text model's tables stand for."""
    found = {"V": config.vocab, "D": config.width, "F": config.ffn_width, "H": config.head_dim, "1": 1}
    found |= {"NH": config.heads * config.head_dim, "KH": config.kv_heads * config.head_dim}
    if isinstance(config, RecurrentGemmaConfig):
        found |= {"E": config.lru_width, "C": config.conv_width, "M": config.gate_blocks}
        found["I"] = config.lru_width // config.gate_blocks
    return found


def vision_sizes(vision: VisionConfig, width: int) -> dict[str, int]:
    """What the letters of the vision tower's tables stand for; `width` is the text model's."""
    found = {"C": vision.width, "F": vision.ffn_width, "B": vision.patch, "P": vision.grid**2, "3": 3}
    return found | {"D": width}


def all_names(config: TextConfig, column: int) -> Iterator[tuple[str, str, tuple[int, ...]]]:
    """(our name, the file's name, shape) of every tensor that a model of this config has.

    column: 0 for the names of a Hugging Face file, whose text tensors are given without a prefix; 1 for GGUF's.
    """
    text = [("", "", model_tensors(config))]
    prefix = ("layers.", "blk.")[column]
    text += [(f"blocks.{i}.", f"{prefix}{i}.", layer_tensors(config, i)) for i in range(config.layers)]
    yield from _named(text, column, sizes(config))
    vision: VisionConfig | None = getattr(config, "vision", None)
    if vision:
        prefix = ("vision_tower.encoder.layers.", "v.blk.")[column]
        tower = [("vision.", "", VISION)]
        tower += [(f"vision.blocks.{i}.", f"{prefix}{i}.", VISION_LAYER) for i in range(vision.layers)]
        yield from _named(tower, column, vision_sizes(vision, config.width))


def _named(
    tables: list[tuple[str, str, Table]], column: int, letters: dict[str, int]
) -> Iterator[tuple[str, str, tuple[int, ...]]]:
    for ours, theirs, table in tables:
        for name, row in table.items():
            yield ours + name, theirs + row[column], tuple(letters[axis] for axis in row[2].split())
