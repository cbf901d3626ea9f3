"""config.json to config: what released files state, and that no statement is passed over."""

import json

import pytest

from minigemma.config import VisionConfig
from minigemma.errors import ModelFormatError
from minigemma.files.config_json import check_pictures, config_from_json
from minigemma.models.registry import RELEASED

SIZES = {"hidden_size": 48, "intermediate_size": 64, "num_hidden_layers": 7, "head_dim": 12, "num_attention_heads": 4}
SIZES |= {"num_key_value_heads": 2}
GEMMA = SIZES | {"model_type": "gemma"}
GEMMA2 = SIZES | {"model_type": "gemma2"}
GEMMA3 = SIZES | {"model_type": "gemma3_text", "sliding_window": 6}
GRIFFIN = SIZES | {"model_type": "recurrent_gemma", "lru_width": 48}
TOWER = {"model_type": "siglip_vision_model", "hidden_size": 1152, "intermediate_size": 4304, "image_size": 896}
TOWER |= {"num_attention_heads": 16, "num_hidden_layers": 27, "patch_size": 14, "vision_use_head": False}
SEEING = {"model_type": "gemma3", "text_config": GEMMA3, "vision_config": TOWER}
SAVED = {  # beside the model's own fields in every file that transformers saves
    "architectures": ["AnyForCausalLM"],
    "attention_bias": False,
    "attention_dropout": 0.0,
    "bos_token_id": 2,
    "eos_token_id": [1, 106],
    "pad_token_id": 0,
    "cache_implementation": "hybrid",
    "hidden_activation": "gelu_pytorch_tanh",
    "initializer_range": 0.02,
    "torch_dtype": "bfloat16",
    "transformers_version": "4.50.0.dev0",
    "use_cache": True,
}
FILES = {
    "gemma-2b": SAVED
    | {"model_type": "gemma", "hidden_act": "gelu", "hidden_activation": None, "hidden_size": 2048}
    | {"intermediate_size": 16384, "num_attention_heads": 8, "num_hidden_layers": 18, "num_key_value_heads": 1}
    | {"head_dim": 256, "max_position_embeddings": 8192, "rope_scaling": None, "rope_theta": 10000.0},
    "gemma-2-9b": SAVED
    | {"model_type": "gemma2", "hidden_act": "gelu_pytorch_tanh", "hidden_size": 3584, "intermediate_size": 14336}
    | {"num_attention_heads": 16, "num_hidden_layers": 42, "num_key_value_heads": 8, "query_pre_attn_scalar": 224}
    | {"sliding_window": 4096, "sliding_window_size": 4096, "_attn_implementation": "eager"}
    | {"attn_logit_softcapping": 50.0, "final_logit_softcapping": 30.0, "vocab_size": 256000},
    "gemma-3-270m": SAVED
    | {"model_type": "gemma3_text", "_sliding_window_pattern": 6, "hidden_size": 640, "intermediate_size": 2048}
    | {"layer_types": (["sliding_attention"] * 5 + ["full_attention"]) * 3, "num_hidden_layers": 18}
    | {"num_attention_heads": 4, "num_key_value_heads": 1, "max_position_embeddings": 32768, "rope_scaling": None}
    | {"query_pre_attn_scalar": 256, "rope_local_base_freq": 10000.0, "rope_theta": 1000000.0, "sliding_window": 512}
    | {"attn_logit_softcapping": None, "final_logit_softcapping": None, "use_bidirectional_attention": False}
    | {"vocab_size": 262144},
    "gemma-3-4b": {
        "architectures": ["Gemma3ForConditionalGeneration"],
        "boi_token_index": 255999,
        "eoi_token_index": 256000,
        "eos_token_id": [1, 106],
        "image_token_index": 262144,
        "initializer_range": 0.02,
        "mm_tokens_per_image": 256,
        "model_type": "gemma3",
        "text_config": {"hidden_size": 2560, "intermediate_size": 10240, "model_type": "gemma3_text"}
        | {"num_hidden_layers": 34, "rope_scaling": {"factor": 8.0, "rope_type": "linear"}, "sliding_window": 1024},
        "torch_dtype": "bfloat16",
        "transformers_version": "4.50.0.dev0",
        "vision_config": TOWER,
    },
    "recurrentgemma-2b": SAVED
    | {"model_type": "recurrent_gemma", "_block_types": ["recurrent", "recurrent", "attention"], "vocab_size": 256000}
    | {"attention_window_size": 2048, "block_types": ["recurrent", "recurrent", "attention"], "conv1d_width": 4}
    | {"embeddings_scale_by_sqrt_dim": True, "final_w_init_variance_scale": 0.0769, "head_dim": 256, "lru_width": 2560}
    | {"hidden_size": 2560, "intermediate_size": 15360, "logits_soft_cap": 30.0, "num_attention_heads": 10}
    | {"num_hidden_layers": 26, "num_key_value_heads": 1, "partial_rotary_factor": 0.5, "rms_norm_eps": 1e-06}
    | {"rope_theta": 10000.0, "w_init_variance_scale": 0.01},
}


def read(at, fields):
    path = at / "config.json"
    path.write_text(json.dumps(fields))
    return config_from_json(path)[0]


@pytest.mark.parametrize("name", FILES)
def test_released_files_are_the_released_sizes(name, tmp_path):
    assert read(tmp_path, FILES[name]) == RELEASED[name]


@pytest.mark.oracle
@pytest.mark.parametrize(
    "kind", ["GemmaConfig", "Gemma2Config", "Gemma3TextConfig", "Gemma3Config", "RecurrentGemmaConfig"]
)
def test_every_field_that_transformers_saves_is_known(kind, tmp_path):
    transformers = pytest.importorskip("transformers")
    sizes = {"intermediate_size": 128, "num_key_value_heads": 1} if kind.startswith("Recurrent") else {}
    if kind == "Gemma3Config":
        sizes = {"vision_config": {"model_type": "siglip_vision_model"} | TOWER}
    read(tmp_path, json.loads(getattr(transformers, kind)(**sizes).to_json_string(use_diff=False)))


REFUSED = {
    # fields of other models, at any nesting
    "another rope": (GEMMA3 | {"local_rope_type": "yarn"}, "local_rope_type"),
    "chunks": (GEMMA3 | {"attention_chunk_size": 4}, "attention_chunk_size"),
    "experts": (GEMMA2 | {"num_experts": 4}, "num_experts"),
    "a multiplier": (GEMMA | {"residual_multiplier": 0.5}, "residual_multiplier"),
    "a switch that is off": (GEMMA3 | {"scale_embeddings": False}, "scale_embeddings"),
    "inside the text model": (
        SEEING | {"text_config": GEMMA3 | {"altup_inputs": 4}},
        "text_config.altup_inputs",
    ),
    "inside the tower": (SEEING | {"vision_config": TOWER | {"spatial_merge": 2}}, "vision_config.spatial_merge"),
    "beside the text model": (SEEING | {"hidden_size": 64}, "hidden_size"),
    "code of its own": (GEMMA3 | {"auto_map": {"AutoModel": "modeling.py"}}, "auto_map"),
    "a cap that Gemma 1 has not": (GEMMA | {"final_logit_softcapping": 30.0}, "final_logit_softcapping"),
    "an encoder": (GEMMA | {"is_encoder_decoder": True}, "is_encoder_decoder"),
    "pruned heads": (GEMMA | {"pruned_heads": {"1": [0]}}, "pruned_heads"),
    # values that other programs compute otherwise
    "exact gelu in Gemma 2": (GEMMA2 | {"hidden_activation": "gelu"}, "hidden_activation"),
    "exact gelu in Gemma 3": (GEMMA3 | {"hidden_activation": "gelu"}, "hidden_activation"),
    "exact gelu by the older name": (GEMMA3 | {"hidden_act": "gelu"}, "hidden_act"),
    "exact gelu in RecurrentGemma": (GRIFFIN | {"hidden_activation": "gelu"}, "hidden_activation"),
    "exact gelu in the tower": (SEEING | {"vision_config": TOWER | {"hidden_act": "gelu"}}, "hidden_act"),
    "silu": (GEMMA | {"hidden_act": "silu"}, "hidden_act"),
    "biases": (GEMMA2 | {"attention_bias": True}, "attention_bias"),
    "both directions": (GEMMA3 | {"use_bidirectional_attention": True}, "use_bidirectional_attention"),
    "a cap on Gemma 3's scores": (GEMMA3 | {"attn_logit_softcapping": 50.0}, "attn_logit_softcapping"),
    "embeddings that are not scaled": (GRIFFIN | {"embeddings_scale_by_sqrt_dim": False}, "embeddings_scale"),
    "two windows": (GEMMA2 | {"sliding_window": 8, "sliding_window_size": 9}, "sliding_window_size"),
    "two names that differ": (SEEING | {"image_token_id": 5, "image_token_index": 6}, "image_token"),
    "another text model": (SEEING | {"text_config": GEMMA3 | {"model_type": "gemma3n_text"}}, "gemma3n_text"),
    "another tower": (SEEING | {"vision_config": TOWER | {"model_type": "clip_vision_model"}}, "clip_vision_model"),
    "layers of another kind": (GEMMA3 | {"layer_types": ["chunked_attention"] * 7}, "chunked_attention"),
    "layers without a period": (GEMMA3 | {"layer_types": ["full_attention"] + ["sliding_attention"] * 6}, "repeat"),
    "a value per layer": (GEMMA3 | {"intermediate_size": [64] * 6 + [32]}, "intermediate_size gives a value per layer"),
    # rope
    "yarn": (GEMMA3 | {"rope_scaling": {"rope_type": "yarn", "factor": 8.0}}, "rope_type is 'yarn'"),
    "newer yarn": (
        GEMMA | {"rope_parameters": {"rope_type": "yarn", "factor": 8.0}},
        "rope_type is 'yarn'",
    ),
    "a scaled Gemma 1": (GEMMA | {"rope_scaling": {"type": "linear", "factor": 2.0}}, "scaled by 2"),
    "a scaled Gemma 2": (GEMMA2 | {"rope_parameters": {"rope_type": "linear", "factor": 2.0}}, "scaled by 2"),
    "a part of each head": (GEMMA2 | {"partial_rotary_factor": 0.5}, "partial_rotary_factor"),
    "a part of Gemma 3's heads": (GEMMA3 | {"partial_rotary_factor": 0.5}, "partial_rotary_factor"),
    "an unknown one": (
        GEMMA | {"rope_parameters": {"rope_theta": 1e4, "attention_factor": 2.0}},
        "attention_factor",
    ),
    "a factor without a type": (GEMMA3 | {"rope_scaling": {"factor": 8.0}}, "only linear rope has a factor"),
    "one scaled rope for both": (GEMMA3 | {"rope_parameters": {"rope_type": "linear", "factor": 8.0}}, "which layers"),
    "one other base for both": (GEMMA3 | {"rope_parameters": {"rope_theta": 5e5}}, "which layers"),
    # what is empty, false or zero is not absent
    "an empty rope": (GEMMA | {"rope_parameters": []}, "rope_parameters is '[]'; it must be an object"),
    "a rope that is false": (GEMMA3 | {"rope_scaling": False}, "rope_scaling is 'False'"),
    "a local rope of zero": (
        GEMMA3 | {"rope_parameters": {"sliding_attention": 0}},
        "rope_parameters.sliding_attention",
    ),
    "an empty type of rope": (GEMMA2 | {"rope_parameters": {"rope_type": ""}}, "rope_parameters.rope_type is ''"),
    "a pattern of zero": (GEMMA3 | {"sliding_window_pattern": 0}, "sliding_window_pattern is '0'"),
    "no kinds of blocks": (GRIFFIN | {"block_types": []}, "block_types is []"),
    "kinds of blocks that are none": (GRIFFIN | {"block_types": 0}, "block_types is '0'; it must be a list"),
    "a factor that is missing": (GEMMA | {"rope_scaling": {"type": "linear"}}, "has no rope_scaling.factor"),
    "scaled local layers": (
        GEMMA3 | {"rope_parameters": {"sliding_attention": {"rope_type": "linear", "factor": 2.0}}},
        "sliding_attention is scaled",
    ),
    # formats of other programs
    "bitsandbytes": (GEMMA3 | {"quantization_config": {"quant_method": "bitsandbytes"}}, "bitsandbytes"),
    "MLX": (GEMMA3 | {"quantization": {"group_size": 64, "bits": 4}}, "MLX"),
}


@pytest.mark.parametrize("fields, says", REFUSED.values(), ids=REFUSED)
def test_statements_that_change_the_results_are_refused_by_name(fields, says, tmp_path):
    with pytest.raises(ModelFormatError) as refused:
        read(tmp_path, fields)
    assert says in refused.value.problem


HARMLESS = {
    "a null": GEMMA3 | {"num_experts": None},
    "what a trainer adds": GEMMA3 | {"unsloth_version": "2025.3", "use_cache": False, "_name_or_path": "x"},
    "sampling": GEMMA3 | {"temperature": 0.7, "max_length": 20, "do_sample": True},
    "the global layers' rope, repeated": GEMMA3 | {"rope_parameters": {"rope_type": "default", "rope_theta": 1e6}},
    "the same value in each layer": GEMMA3 | {"intermediate_size": [64] * 7},
}


@pytest.mark.parametrize("fields", HARMLESS.values(), ids=HARMLESS)
def test_harmless_statements_change_nothing(fields, tmp_path):
    assert read(tmp_path, fields) == read(tmp_path, GEMMA3)


def test_a_field_may_be_repeated_beside_the_text_model(tmp_path):
    assert read(tmp_path, SEEING | {"hidden_size": 48}) == read(tmp_path, SEEING)


def test_rope_scaling_beside_the_newer_form_scales_global_layers(tmp_path):
    """As transformers reads it: rope_scaling updates full_attention."""
    newer = {"full_attention": {"rope_type": "default", "rope_theta": 5e5}, "sliding_attention": {"rope_theta": 300.0}}
    older = {"rope_type": "linear", "factor": 4.0}
    config = read(tmp_path, GEMMA3 | {"rope_parameters": newer, "rope_scaling": older})
    assert (config.rope_base, config.rope_scale, config.rope_base_local) == (5e5, 4.0, 300.0)


def test_spellings_of_the_pattern(tmp_path):
    kinds = {"layer_types": (["sliding_attention"] * 2 + ["full_attention"]) * 2 + ["sliding_attention"]}
    for spelled in ({"sliding_window_pattern": 3}, {"_sliding_window_pattern": 3}, kinds):
        assert read(tmp_path, GEMMA3 | spelled).pattern == 3


def test_only_the_wrong_scale_that_9b_was_released_with_is_corrected(tmp_path):
    sizes = FILES["gemma-2-9b"]
    assert read(tmp_path, sizes).query_pre_attn_scalar == 256
    assert read(tmp_path, sizes | {"query_pre_attn_scalar": 144}).query_pre_attn_scalar == 144


def test_an_adapter_is_named_with_its_base_model(tmp_path):
    (tmp_path / "adapter_config.json").write_text(json.dumps({"base_model_name_or_path": "google/gemma-3-1b-it"}))
    (tmp_path / "adapter_model.safetensors").write_bytes(b"")
    with pytest.raises(ModelFormatError, match=r"LoRA adapter .*; merge the adapter into .*google/gemma-3-1b-it"):
        read(tmp_path, GEMMA3)
    (tmp_path / "model.safetensors").write_bytes(b"")  # a merged model beside its adapter
    read(tmp_path, GEMMA3)


PICTURES = {  # as released
    "do_convert_rgb": None,
    "do_normalize": True,
    "do_pan_and_scan": None,
    "do_rescale": True,
    "do_resize": True,
    "image_mean": [0.5, 0.5, 0.5],
    "image_std": [0.5, 0.5, 0.5],
    "image_seq_length": 256,
    "resample": 2,
    "rescale_factor": 0.00392156862745098,
    "size": {"height": 896, "width": 896},
}
OTHER_PICTURES = [
    ({"image_mean": [0.48, 0.46, 0.41]}, "image_mean"),
    ({"image_std": [0.27, 0.26, 0.28]}, "image_std"),
    ({"size": {"height": 448, "width": 448}}, "size is"),
    ({"resample": 3}, "resample is 3"),
    ({"rescale_factor": 1.0}, "rescale_factor is 1"),
    ({"do_normalize": False}, "do_normalize"),
    ({"do_pan_and_scan": True}, "do_pan_and_scan"),
    ({"image_seq_length": 64}, "image_seq_length"),
]


@pytest.mark.parametrize("nested", [False, True])
@pytest.mark.parametrize("change, says", OTHER_PICTURES)
def test_pictures_that_are_made_otherwise_are_refused(change, says, nested, tmp_path):
    path = tmp_path / ("processor_config.json" if nested else "preprocessor_config.json")
    for stated in (PICTURES, PICTURES | change):
        path.write_text(json.dumps({"image_processor": stated} if nested else stated))
        if stated == PICTURES:
            check_pictures(tmp_path, VisionConfig())
            continue
        with pytest.raises(ModelFormatError) as refused:
            check_pictures(tmp_path, VisionConfig())
        assert says in refused.value.problem
