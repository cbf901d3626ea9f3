"""Fields of config.json and GGUF headers that do not change the logits; all others are used or refused. Fields of
generation_config.json that do not change the choice of a token; all others are used or named in a warning.

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
    **dict.fromkeys(("quantization_config", "quantization", "compression_config"), ({},)),
}

# ---------------------------------------------------------------------------------------------------------- GGUF

# After the architecture's name. "vision." and "mm." are about a tower in the same file, which is not loaded from there.
GGUF = {"vocab_size", "rope.scaling.finetuned", "rope.scaling.original_context_length"}
GGUF_PREFIXES = ("vision.", "mm.")
GGUF_VALUES: dict[str, tuple[Any, ...]] = {"pooling_type": (0,), "expert_count": (0,), "expert_used_count": (0,)}

# After "tokenizer.ggml.". Other fields and other values belong to vocabularies that split text differently.
READ_FROM_VOCABULARY = (  # in gguf_file.py and statements.py
    "tokens scores token_type eos_token_id eot_token_id eom_token_id eos_token_ids add_bos_token add_eos_token"
)
NAMES_OF_TOKENS = (
    "padding_token_id mask_token_id cls_token_id seperator_token_id separator_token_id prefix_token_id "
    "suffix_token_id middle_token_id fim_pre_token_id fim_suf_token_id fim_mid_token_id fim_pad_token_id "
    "fim_rep_token_id fim_sep_token_id add_padding_token add_mask_token add_unknown_token token_type_count"
)
OF_OTHER_KINDS = "pre merges"  # not used by the vocabulary kind "llama"
VOCABULARY = set(f"{READ_FROM_VOCABULARY} {NAMES_OF_TOKENS} {OF_OTHER_KINDS}".split())
VOCABULARY_VALUES: dict[str, tuple[Any, ...]] = {
    "model": ("llama",),  # SentencePiece with scores
    "add_space_prefix": (False,),
    "remove_extra_whitespaces": (False,),
    "escape_whitespaces": (True,),
    "add_sep_token": (False,),
    "bos_token_id": (2,),
    "unknown_token_id": (3,),
}

# Of an mmproj file, after "clip.".
CLIP = {"has_vision_encoder", "has_text_encoder", "has_llava_projector", "projector_type", "vision.projector_type"}
CLIP_VALUES: dict[str, tuple[Any, ...]] = {"has_audio_encoder": (False,)}

# -------------------------------------------------------------------------------------- generation_config.json

IDS_AND_ORIGIN = (
    "bos_token_id eos_token_id pad_token_id decoder_start_token_id _from_model_config _commit_hash "
    "transformers_version trust_remote_code"
)
GENERATED_HOW = (
    "cache_implementation cache_config use_cache low_memory compile_config disable_compile max_cache_len use_mtp "
    "continuous_batching_config prefill_chunk_size num_assistant_tokens num_assistant_tokens_schedule speculation_type "
    "assistant_confidence_threshold assistant_early_exit assistant_lookbehind assistant_ensemble_weight is_assistant "
    "target_lookbehind prompt_lookup_num_tokens max_matching_ngram_size renormalize_logits remove_invalid_values"
)
RETURNED = (  # and lengths, which each call sets
    "return_dict_in_generate output_attentions output_hidden_states output_scores output_logits num_return_sequences "
    "max_length max_new_tokens max_time"
)
OF_UNUSED_SETTINGS = (  # without effect on their own
    "length_penalty early_stopping diversity_penalty num_beam_groups mirostat_tau mirostat_eta penalty_last_n "
    "xtc_threshold"
)
GENERATION = set(f"{IDS_AND_ORIGIN} {GENERATED_HOW} {RETURNED} {OF_UNUSED_SETTINGS}".split())
GENERATION_VALUES: dict[str, tuple[Any, ...]] = {
    **dict.fromkeys(("encoder_repetition_penalty", "penalty_repeat", "typical_p", "num_beams", "guidance_scale"), (1,)),
    **dict.fromkeys(("no_repeat_ngram_size", "encoder_no_repeat_ngram_size", "min_length", "min_new_tokens"), (0,)),
    **dict.fromkeys(("epsilon_cutoff", "eta_cutoff", "penalty_alpha", "xtc_probability", "mirostat"), (0,)),
    **dict.fromkeys(("bad_words_ids", "suppress_tokens", "begin_suppress_tokens", "sequence_bias"), ([], {})),
    "token_healing": (False,),
}


def changes_results(name: str, value: Any, harmless: set[str], values: dict[str, tuple[Any, ...]]) -> bool:
    """Whether a field that no page has read may change what a model computes."""
    return name not in harmless and value not in values.get(name, ())
