"""Fields of config.json and GGUF headers that do not change the logits; all others are used or refused.

Null fields count as absent. Fields that a model's page reads are not listed here.
"""

from __future__ import annotations

from typing import Any

# --------------------------------------------------------------------------------------------------- config.json

THE_FILE = (
    "architectures dtype torch_dtype transformers_version model_type _name_or_path name_or_path _commit_hash "
    "tokenizer_class finetuning_task task_specific_params problem_type id2label label2id num_labels prefix license "
    "transformers.js_config unsloth_fixed unsloth_version"
)
READ_ELSEWHERE = (  # in files/load.py
    "bos_token_id eos_token_id pad_token_id sep_token_id unk_token_id decoder_start_token_id tie_word_embeddings"
)
HOW_IT_RUNS = (
    "use_cache cache_implementation output_attentions output_hidden_states output_scores return_dict "
    "return_dict_in_generate torchscript use_bfloat16 tf_legacy_loss attn_implementation _attn_implementation "
    "_attn_implementation_internal _attn_implementation_autoset _flash_attn_2_enabled experts_implementation "
    "_experts_implementation chunk_size_feed_forward pretraining_tp gradient_checkpointing tie_encoder_decoder "
    "cross_attention_hidden_size is_decoder"
)
TRAINING = (
    "initializer_range initializer_factor attention_dropout hidden_dropout dropout w_init_variance_scale "
    "final_w_init_variance_scale"
)
SAMPLING = (
    "max_length min_length max_new_tokens do_sample early_stopping num_beams num_beam_groups diversity_penalty "
    "temperature top_k top_p typical_p repetition_penalty length_penalty no_repeat_ngram_size "
    "encoder_no_repeat_ngram_size bad_words_ids num_return_sequences forced_bos_token_id forced_eos_token_id "
    "remove_invalid_values exponential_decay_length_penalty suppress_tokens begin_suppress_tokens"
)
JSON = set(f"{THE_FILE} {READ_ELSEWHERE} {HOW_IT_RUNS} {TRAINING} {SAMPLING}".split())

# Fields that are harmless with one of these values only: name → values.
JSON_VALUES: dict[str, tuple[Any, ...]] = {
    "is_encoder_decoder": (False,),
    "add_cross_attention": (False,),
    "pruned_heads": ({}, []),
    "auto_map": ({},),
}

# ---------------------------------------------------------------------------------------------------------- GGUF

# After the architecture's name. "vision." and "mm." are about a tower in the same file, which is not loaded from there.
GGUF = {"vocab_size", "rope.scaling.finetuned", "rope.scaling.original_context_length"}
GGUF_PREFIXES = ("vision.", "mm.")
GGUF_VALUES: dict[str, tuple[Any, ...]] = {"pooling_type": (0,), "expert_count": (0,), "expert_used_count": (0,)}

# After "tokenizer.ggml.": a vocabulary that text is cut by in another way has another value here.
VOCABULARY_VALUES: dict[str, tuple[Any, ...]] = {
    "model": ("llama",),  # SentencePiece with scores
    "add_space_prefix": (False,),
    "remove_extra_whitespaces": (False,),
}

# Of an mmproj file, after "clip.".
CLIP = {"has_vision_encoder", "has_text_encoder", "has_llava_projector", "projector_type", "vision.projector_type"}
CLIP_VALUES: dict[str, tuple[Any, ...]] = {"has_audio_encoder": (False,)}


def changes_results(name: str, value: Any, harmless: set[str], values: dict[str, tuple[Any, ...]]) -> bool:
    """Whether a field that no page has read may change what a model computes."""
    return name not in harmless and value not in values.get(name, ())
