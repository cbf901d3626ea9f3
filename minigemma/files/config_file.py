"""From a checkpoint's own words to a config: config.json of a Hugging Face folder, or the metadata of a GGUF file.

Released config.json files leave out what their class had as default, nest the text model in `text_config` where there
is a vision tower, and spell rope and the layer pattern in an older and a newer way. All of that ends here: whoever
comes after sees only `TextConfig`. What would change the mathematics and is not known is refused, never passed over.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from ..config import RELEASED, Gemma2Config, Gemma3Config, GemmaConfig, RecurrentGemmaConfig, TextConfig, VisionConfig
from ..errors import ModelFormatError
from .safetensors_file import read_json, short

Json = dict[str, Any]
MAX_PROBLEM = 300  # letters of an error, which may quote what a file says

# What a config.json means by leaving a field out, by model_type.
GEMMA = {
    "vocab_size": 256_000,
    "num_attention_heads": 16,
    "num_key_value_heads": 16,
    "head_dim": 256,
    "max_position_embeddings": 8192,
    "rms_norm_eps": 1e-6,
    "rope_theta": 10_000.0,
    "tie_word_embeddings": True,
}
GEMMA2 = GEMMA | {
    "num_attention_heads": 8,
    "num_key_value_heads": 4,
    "sliding_window": 4096,
    "query_pre_attn_scalar": 256,
    "attn_logit_softcapping": 50.0,
    "final_logit_softcapping": 30.0,
}
GEMMA3 = GEMMA | {
    "vocab_size": 262_208,
    "num_attention_heads": 8,
    "num_key_value_heads": 4,
    "max_position_embeddings": 131_072,
    "rope_theta": 1_000_000.0,
    "rope_local_base_freq": 10_000.0,
    "sliding_window": 4096,
    "query_pre_attn_scalar": 256,
    "attn_logit_softcapping": None,
    "final_logit_softcapping": None,
}
RECURRENT_GEMMA = GEMMA | {
    "num_attention_heads": 10,
    "num_key_value_heads": 1,
    "max_position_embeddings": RecurrentGemmaConfig.context,
    "attention_window_size": 2048,
    "conv1d_width": 4,
    "logits_soft_cap": 30.0,
    "partial_rotary_factor": 0.5,
    "embeddings_scale_by_sqrt_dim": True,
    "lru_width": None,
}
DEFAULTS: dict[str, Json] = {
    "gemma": GEMMA,
    "gemma2": GEMMA2,
    "gemma3_text": GEMMA3,
    "recurrent_gemma": RECURRENT_GEMMA,
}
# VisionConfig's field: its name in vision_config, or at the top of config.json, where it has had two.
TOWER = {
    "width": ("hidden_size",),
    "layers": ("num_hidden_layers",),
    "heads": ("num_attention_heads",),
    "ffn_width": ("intermediate_size",),
    "side": ("image_size",),
    "patch": ("patch_size",),
}
TOP = {
    "tokens": ("mm_tokens_per_image",),
    "image_token": ("image_token_id", "image_token_index"),
    "start_token": ("boi_token_id", "boi_token_index"),
    "end_token": ("eoi_token_id", "eoi_token_index"),
}
ACTIVATIONS = {"gelu_pytorch_tanh", "gelu", "gelu_new", None}  # each means the tanh form here
RUNS = "minigemma runs gemma, gemma2, gemma3 and recurrent_gemma"


def config_from_json(path: Path) -> tuple[TextConfig, Json]:
    """The text model's config of a config.json, and all of its fields (those left out filled in)."""
    whole = read_json(path)
    kind = whole.get("model_type")
    text = whole
    if kind == "gemma3":  # with a vision tower
        text = whole.get("text_config") or {}
        if not isinstance(text, dict):
            raise ModelFormatError(path, "text_config is not an object", "fetch the file again")
        kind = "gemma3_text"
    if not isinstance(kind, str) or kind not in DEFAULTS:
        raise ModelFormatError(path, f"model_type is {short(kind)}", f"{RUNS}: take one of their checkpoints")
    shared = {k: whole[k] for k in ("eos_token_id", "tie_word_embeddings", "name_or_path") if k in whole}
    fields = DEFAULTS[kind] | shared | {k: v for k, v in text.items() if k != "model_type"}
    try:
        config = _named(_from_fields(kind, fields))
        if isinstance(config, Gemma3Config):
            config = replace(config, vision=_vision(whole))
        return config, fields
    except ModelFormatError:
        raise
    except KeyError as error:
        raise ModelFormatError(path, f"has no {error.args[0]}", "fetch the file again") from None
    except (ValueError, TypeError, OverflowError) as error:
        remedy = "take the config.json that was released with these weights"
        raise ModelFormatError(path, str(error)[:MAX_PROBLEM], remedy) from None


def _from_fields(kind: str, f: Json) -> TextConfig:
    if f.get("attention_bias") or f.get("use_bidirectional_attention"):
        raise ValueError("attention_bias or use_bidirectional_attention is set; no Gemma text model has either")
    activation = f.get("hidden_activation", f.get("hidden_act"))
    if activation not in ACTIVATIONS:
        raise ValueError(f"hidden_activation is {activation!r}; Gemma's is gelu_pytorch_tanh")
    common: Json = {
        "width": _whole(f, "hidden_size"),
        "layers": _whole(f, "num_hidden_layers"),
        "heads": _whole(f, "num_attention_heads"),
        "kv_heads": _whole(f, "num_key_value_heads"),
        "head_dim": _whole(f, "head_dim"),
        "ffn_width": _whole(f, "intermediate_size"),
        "vocab": _whole(f, "vocab_size"),
        "context": _whole(f, "max_position_embeddings"),
        "eps": float(f["rms_norm_eps"]),
    }
    if kind == "recurrent_gemma":
        return _recurrent_gemma(f, common)
    if kind == "gemma":
        return GemmaConfig(**common, rope_base=_plain_rope(f))
    common["query_pre_attn_scalar"] = float(f["query_pre_attn_scalar"])
    common["window"] = _whole(f, "sliding_window")
    if kind == "gemma2":
        if _pattern(f, common["layers"], 2) != 2:
            raise ValueError("layer_types or sliding_window_pattern differ from Gemma 2's: local and global in turn")
        if (common["width"], common["layers"]) == (3584, 42):  # 9B was first released with 224; it was trained with 256
            common["query_pre_attn_scalar"] = 256.0
        return Gemma2Config(
            **common,
            attention_cap=_cap(f, "attn_logit_softcapping"),
            logit_cap=_cap(f, "final_logit_softcapping"),
            rope_base=_plain_rope(f),
        )
    if f["attn_logit_softcapping"] is not None:
        raise ValueError(f"attn_logit_softcapping is {f['attn_logit_softcapping']}; Gemma 3 has no cap on scores")
    base, scale = _rope(f, "full_attention")
    local, local_scale = _rope(f, "sliding_attention")
    if local_scale != 1:
        raise ValueError(f"rope of sliding_attention is scaled by {local_scale}; Gemma 3 scales global layers only")
    return Gemma3Config(
        **common,
        rope_base=base,
        rope_base_local=local,
        rope_scale=scale,
        pattern=_pattern(f, common["layers"], 6),
        logit_cap=_cap(f, "final_logit_softcapping"),
    )


def _vision(whole: Json) -> VisionConfig | None:
    """The vision tower of a config.json that speaks of one; what it leaves out is SigLIP's as released."""
    tower = whole.get("vision_config")
    if tower is None:
        return None
    if not isinstance(tower, dict):
        raise ValueError("vision_config is not an object")
    if tower.get("hidden_act", "gelu_pytorch_tanh") not in ACTIVATIONS:
        raise ValueError(f"hidden_act of vision_config is {tower['hidden_act']!r}; SigLIP's is gelu_pytorch_tanh")
    if tower.get("vision_use_head"):
        raise ValueError("vision_use_head is set; Gemma 3's vision tower has no pooling head")
    found: Json = {"eps": float(tower.get("layer_norm_eps", VisionConfig.eps))}
    for names, stated in ((TOWER, tower), (TOP, whole)):
        for ours, theirs in names.items():
            for name in theirs:
                if stated.get(name) is not None:
                    found[ours] = _whole(stated, name)
    return VisionConfig(**found)


def _recurrent_gemma(f: Json, common: Json) -> RecurrentGemmaConfig:
    """Its own fields; `intermediate_size` is of both branches, and 2B and 9B name the block types differently."""
    kinds = f.get("block_types", f.get("_block_types")) or ["recurrent", "recurrent", "attention"]
    names = {"linear_attention": "recurrent", "sliding_attention": "attention"}  # as transformers 5 writes them
    if common["ffn_width"] % 2:
        raise ValueError(f"intermediate_size is {common['ffn_width']}; it counts two branches of one width")
    if not f["embeddings_scale_by_sqrt_dim"]:
        raise ValueError("embeddings_scale_by_sqrt_dim is false; RecurrentGemma scales its embeddings")
    rope = f.get("rope_parameters") or {}
    if not isinstance(rope, dict):
        raise ValueError(f"rope settings are {rope!r}; they must be an object")
    fraction: Any = rope.get("partial_rotary_factor", f["partial_rotary_factor"])
    return RecurrentGemmaConfig(
        **common | {"ffn_width": common["ffn_width"] // 2},
        window=_whole(f, "attention_window_size"),
        lru_width=common["width"] if f["lru_width"] is None else _whole(f, "lru_width"),
        gate_blocks=common["heads"],
        conv_width=_whole(f, "conv1d_width"),
        pattern=tuple(names.get(kind, kind) for kind in kinds),
        logit_cap=_cap(f, "logits_soft_cap"),
        rope_base=_plain_rope(f),
        rope_fraction=float(fraction),
    )


def _cap(fields: Json, name: str) -> float | None:
    return None if fields[name] is None else float(fields[name])


def _plain_rope(fields: Json) -> float:
    """The base, where all layers have the same and none is scaled."""
    base, scale = _rope(fields, "full_attention")
    if scale != 1:
        raise ValueError(f"rope is scaled by {scale}; only Gemma 3's global layers are")
    return base


def _whole(fields: Json, name: str) -> int:
    value = fields[name]
    if isinstance(value, bool) or not isinstance(value, int):
        raise ValueError(f"{name} is {value!r}; it must be a whole number")
    return value


def _rope(f: Json, kind: str) -> tuple[float, float]:
    """(base, scale) of global ("full_attention") or local ("sliding_attention") layers, in either spelling."""
    base: float = f["rope_theta"] if kind == "full_attention" else f["rope_local_base_freq"]
    both = f.get("rope_parameters")
    stated = both.get(kind, both) if isinstance(both, dict) else both
    if both is None and kind == "full_attention":
        stated = f.get("rope_scaling")
    if stated is None:
        return float(base), 1.0
    if not isinstance(stated, dict):
        raise ValueError(f"rope settings are {stated!r}; they must be an object")
    base = stated.get("rope_theta", base)
    form = stated.get("rope_type", stated.get("type", "default"))
    if form == "linear" and not isinstance(stated.get("factor"), (int, float)):
        raise ValueError(f"the factor of linear rope is {stated.get('factor')!r}; it must be a number")
    if form not in ("default", "linear"):
        raise ValueError(f"rope_type is {form!r}; Gemma's is default or linear")
    return float(base), float(stated["factor"]) if form == "linear" else 1.0


def _pattern(f: Json, layers: int, usual: int) -> int:
    """Every how many layers one is global: stated as a number, as the list of all layers, or not at all."""
    name = "sliding_window_pattern"
    period = _whole({name: f.get(name, f.get(f"_{name}")) or usual}, name)
    kinds = f.get("layer_types")
    if kinds is None:
        return period
    if not isinstance(kinds, list) or len(kinds) != layers:
        raise ValueError(f"layer_types is {short(kinds)}; it must be a list of {layers} kinds of layers")
    first = kinds.index("full_attention") if "full_attention" in kinds else layers
    for candidate in (period, first + 1):
        if kinds == [("full" if i % candidate == candidate - 1 else "sliding") + "_attention" for i in range(layers)]:
            return candidate
    raise ValueError(f"layer_types {kinds} do not repeat with one full_attention layer at the end of each period")


def _named(config: TextConfig) -> TextConfig:
    """The config with the name of the released model that has these sizes, if one has."""

    def sizes(c: TextConfig) -> tuple:
        return c.family, c.width, c.layers, c.heads, c.kv_heads, c.head_dim, c.ffn_width

    return next((replace(config, name=r.name) for r in RELEASED.values() if sizes(r) == sizes(config)), config)


def config_from_gguf(path: Path, metadata: Mapping[str, Any], rows: int) -> TextConfig:
    """The config of a GGUF file; `rows` is how many the embedding has, since files differ in that.

    A GGUF does not say: the layer pattern, the local rope base, and the attention scale of the 27Bs; and older ones
    leave out the factor 8 of the large Gemma 3's. llama.cpp has these as constants, and so has this function.
    """
    family = metadata.get("general.architecture")
    if family not in ("gemma", "gemma2", "gemma3"):
        if family == "clip":
            remedy = "give it as --mmproj (mmproj=…) beside the file of the text model"
            raise ModelFormatError(path, "is the vision tower of a model (mmproj)", remedy)
        problem = f"is a GGUF of architecture {short(family)}"
        raise ModelFormatError(path, problem, f"{RUNS}: take one of their checkpoints")

    def get(key: str, *default: Any) -> Any:
        value = metadata.get(f"{family}.{key}", *default)
        if value is None and not default:
            raise ModelFormatError(path, f"has no {family}.{key}", "convert the model again with a current llama.cpp")
        return value

    try:
        config = _from_gguf(family, get, rows)
    except (TypeError, ValueError) as error:
        if isinstance(error, ModelFormatError):
            raise
        remedy = "convert the model again with a current llama.cpp"
        raise ModelFormatError(path, str(error)[:MAX_PROBLEM], remedy) from None
    return _named(config)


def _from_gguf(family: str, get: Any, rows: int) -> TextConfig:
    def whole(key: str, *default: int) -> int:
        return _whole({key: get(key, *default)}, key)

    heads, width, layers = get("attention.head_count"), get("embedding_length"), get("block_count")
    common: Json = {
        "width": width,
        "layers": layers,
        "heads": heads,
        "kv_heads": get("attention.head_count_kv", heads),
        "head_dim": get("attention.key_length", 256),
        "ffn_width": get("feed_forward_length"),
        "vocab": rows,
        "context": get("context_length"),
        "eps": round(float(get("attention.layer_norm_rms_epsilon")), 12),  # stored in float32
    }
    for name, value in common.items():
        if name != "eps":
            _whole({name: value}, name)
    if family == "gemma":
        return GemmaConfig(**common, rope_base=float(get("rope.freq_base", 10_000.0)))
    twenty_seven = layers == (46 if family == "gemma2" else 62)
    common["query_pre_attn_scalar"] = width / heads if twenty_seven else float(common["head_dim"])
    if family == "gemma2":
        return Gemma2Config(
            **common,
            window=whole("attention.sliding_window", 4096),
            attention_cap=float(get("attn_logit_softcapping", 50.0)),
            logit_cap=float(get("final_logit_softcapping", 30.0)),
            rope_base=float(get("rope.freq_base", 10_000.0)),
        )
    return Gemma3Config(
        **common,
        window=whole("attention.sliding_window"),
        rope_base=float(get("rope.freq_base", 1_000_000.0)),
        rope_base_local=float(get("rope.freq_base_swa", 10_000.0)),
        rope_scale=float(get("rope.scaling.factor", 8.0 if layers in (34, 48, 62) else 1.0)),
        pattern=whole("attention.sliding_window_pattern", 6),
    )


def vision_from_gguf(path: Path, metadata: Mapping[str, Any], text: TextConfig) -> Gemma3Config:
    """The config of a text model with that of the vision tower in an mmproj file; ModelFormatError for another's."""
    kind = metadata.get("clip.vision.projector_type", metadata.get("clip.projector_type"))
    if metadata.get("general.architecture") != "clip" or kind != "gemma3" or not isinstance(text, Gemma3Config):
        architecture = short(metadata.get("general.architecture"))
        what = f"is a GGUF file of architecture {architecture} and projector type {short(kind)}"
        raise ModelFormatError(path, f"{what}, for a model of {text.family}", "take the mmproj file of a Gemma 3")
    names = {
        "width": "embedding_length",
        "layers": "block_count",
        "heads": "attention.head_count",
        "ffn_width": "feed_forward_length",
        "side": "image_size",
        "patch": "patch_size",
    }
    try:
        found: Json = {ours: _whole(dict(metadata), f"clip.vision.{theirs}") for ours, theirs in names.items()}
        found["eps"] = round(float(metadata["clip.vision.attention.layer_norm_epsilon"]), 12)  # stored in float32
        pooling = _whole({"scale_factor": metadata.get("clip.vision.projector.scale_factor", 4)}, "scale_factor")
        found["tokens"] = (found["side"] // found["patch"] // pooling) ** 2
        width = metadata.get("clip.vision.projection_dim", text.width)
        if width != text.width:
            raise ValueError(f"it projects to a width of {width}, and the text model has {text.width}")
        return replace(text, vision=VisionConfig(**found))
    except KeyError as error:
        raise ModelFormatError(path, f"has no {error.args[0]}", "take the mmproj file of this model") from None
    except (TypeError, ValueError, ZeroDivisionError) as error:
        raise ModelFormatError(path, str(error)[:MAX_PROBLEM], "take the mmproj file of this model") from None
