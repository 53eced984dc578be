"""The contract with the runtime: what llama.cpp computes whatever a config says, and what becomes of a config that says else.

A row of the table states which config fields its keys are read from (`ArchSpec.keys`), and here which the runtime does not
read because it has one value built in (`Fixed`). A config with another value would run, and compute something else; so it is
refused, unless the difference only shows past a limit (texts longer than a window) and the user allows that by name.
"""

from __future__ import annotations

from collections.abc import Collection
from typing import TYPE_CHECKING, Any

from adapterkit.errors import TargetError, UsageError, option

if TYPE_CHECKING:
    from adapterkit.gguf.arch.config import Config
    from adapterkit.gguf.arch.spec import ArchSpec


# Fields that say how a model was trained, stored, saved or is sampled from, and shapes that the tensors say themselves.
_HARMLESS_WORDS = """
_name_or_path name_or_path _sliding_window_pattern architectures model_type auto_map transformers_version torch_dtype dtype
_attn_implementation _attn_implementation_autoset attn_implementation _flash_attn_2_enabled use_flash_attn
use_cache use_cache_quantization use_cache_kernel return_dict output_attentions output_hidden_states torchscript
pruned_heads chunk_size_feed_forward is_encoder_decoder is_decoder cross_attention_hidden_size
add_cross_attention tie_encoder_decoder gradient_checkpointing quantization_config unsloth_version unsloth_fixed
initializer_range initializer_factor initializer_cutoff_factor init_std init_device init_config init_method
attention_dropout attention_probs_dropout_prob hidden_dropout hidden_dropout_prob resid_pdrop embd_pdrop attn_pdrop
residual_dropout embedding_dropout classifier_dropout classifier_dropout_prob dropout dropout_rate emb_dropout
attn_dropout ffn_dropout seq_classif_dropout qa_dropout mlp_dropout deterministic_flash_attn
pad_token_id bos_token_id eos_token_id sep_token_id cls_token_id unk_token_id mask_token_id decoder_start_token_id
forced_bos_token_id forced_eos_token_id begin_suppress_tokens suppress_tokens prefix bad_words_ids
temperature top_k top_p typical_p repetition_penalty length_penalty no_repeat_ngram_size do_sample early_stopping
max_length min_length num_beams num_beam_groups diversity_penalty num_return_sequences remove_invalid_values
exponential_decay_length_penalty output_scores return_dict_in_generate encoder_no_repeat_ngram_size tf_legacy_loss
use_bfloat16 finetuning_task task_specific_params problem_type tokenizer_class id2label label2id num_labels
summary_type summary_use_proj summary_activation summary_proj_to_labels summary_first_dropout
pretraining_tp base_model_tp_plan base_model_pp_plan base_model_ep_plan ep_size
output_router_logits router_aux_loss_coef router_z_loss_coef router_jitter_noise input_jitter_noise aux_loss_alpha
seq_aux moe_router_enable_expert_bias load_balancing_loss rescale_prenorm_residual residual_in_fp32
vocab_size type_vocab_size intermediate_size num_experts_per_tok max_window_layers bos_id eos_id
slow_but_exact masked_softmax_fusion attention_softmax_in_fp32
scale_attention_softmax_in_fp32 reorder_and_upcast_attn sparse_prediction sparse_pred_ignore_index
reference_compile repad_logits_with_grad compile_model mlm_probability mask_token vocab_pad seq_length
gradient_checkpointing_use_reentrant use_mambapy use_falcon_mambapy use_mamba_kernels use_associative_scan
num_nextn_predict_layers mtp_num_hidden_layers pad_head_dim_to_multiple_of
language_model_only mamba_ssm_dtype block_size tie_word_embeddings has_visual_encoder modality
weight_tying qkv_proj_bias mlp_fc1_bias mlp_fc2_bias rescale_every
cache_implementation for_llm_compressor initial_context_length mamba_chunk_size chunk_size use_mrope full_attn_mod
interpolate_factor order_of_interleaved_layers
"""
HARMLESS = frozenset(_HARMLESS_WORDS.split())
LATENT_EPSILON = 1e-6  # of the norms of latent attention in DeepSeek's code and its kin


def held(spec: ArchSpec, config: Config, approximate: Collection[str] = ()) -> tuple[str, ...]:
    """Whether the runtime computes what a config says; notes on what it does not where that was allowed.

    Args:
        approximate: the fields that may differ past a limit.

    Raises:
        TargetError: it computes something else; the sentence names field, value and what llama.cpp does.
        UsageError: a field of ``approximate`` is not one that may differ.
    """
    notes: list[str] = []
    open_ = set(approximate)
    for one in spec.fixed:
        found = one.differs(config)
        if found is None:
            continue
        said, _ = found
        name = one.field.replace("rope.", "rope_parameters.")
        limit = one.limit(config) if one.limit is not None else ""
        what = f"{config.ref}: '{name}' is {_shown(said)}, and llama.cpp {one.does}"
        if not limit:
            raise TargetError(what, "run it with transformers or vLLM, or merge into a folder")
        if one.field not in open_:
            raise TargetError(
                f"{what}, which computes something else for {limit}",
                f"add {option('allow_approximate', one.field)} to write it all the same",
            )
        open_.discard(one.field)
        notes.append(f"'{name}' is {_shown(said)}, and llama.cpp {one.does}: other results for {limit}")
    may = sorted(one.field for one in spec.fixed if one.limit is not None)
    if open_ - set(may):
        raise UsageError(
            f"{option('allow_approximate')} {min(open_ - set(may))} is no difference that shows only past a limit "
            f"in a {spec.arch}",
            f"it has {', '.join(may)}" if may else "leave it out",
        )
    return tuple(notes)


def left_out_by_transformers(config: Config) -> tuple[str, ...]:
    """Notes on what a class of transformers leaves out of its config, and the runtime does not."""
    from adapterkit.gguf.arch.wholes import WRAPPERS

    head = next((name for name in config.classes if name in WRAPPERS), None)
    for field, neutral in (("logits_scaling", 1.0), ("logit_scale", 1.0), ("final_logit_softcapping", None)):
        value = config.get(field) if head is not None else None
        if value is not None and value != neutral:
            said = (
                f"'{field}' is {_shown(value)}: llama.cpp applies it to the scores of tokens, and transformers' {head}"
            )
            return (f"{said} does not, so probabilities differ and the order of tokens does not",)
    share = config.rope.get("partial_rotary_factor", 1.0)
    turned = config.get("rotary_dim") if "MiniMaxForCausalLM" in config.classes else None
    if "MiniMaxForCausalLM" in config.classes and (share != 1.0 or turned not in (None, config.number("head_dim"))):
        said = f"'rotary_dim' is {turned}" if turned is not None else f"'partial_rotary_factor' is {_shown(share)}"
        return (f"{said}: llama.cpp and the model's own code turn that part of a head, transformers' class all of it",)
    epsilon = config.get("rms_norm_eps")
    if config.get("kv_lora_rank") and isinstance(epsilon, float) and epsilon != LATENT_EPSILON:
        said = f"'rms_norm_eps' is {_shown(epsilon)}: the norms of the compressed parts have it too in llama.cpp, and"
        return (f"{said} {LATENT_EPSILON:g} in the model: small differences",)
    return ()


_WINDOWS = ("sliding_window", "use_sliding_window")


def unread(config: Config) -> tuple[str, ...]:
    """A note on the fields of a config that nothing here has asked for and that are not known to be harmless."""
    strange = sorted(
        name
        for name, value in config.text.items()
        if name not in config.asked
        and name not in HARMLESS
        and not isinstance(value, dict)
        and value not in (None, [], "")
        and not (isinstance(value, bool) and name.endswith("bias"))  # the tensors say it: each is written or refused
        and not (name in _WINDOWS and config.text.get("use_sliding_window") is False)  # as Qwen2.5 is published
        and not (config.has_vision and config.raw.get(name) == value and name not in config.text_part)
    )
    if not strange:
        return ()
    shown = ", ".join(f"{name}={_shown(config.text[name])}" for name in strange[:8])
    more = f" and {len(strange) - 8} more" if len(strange) > 8 else ""
    return (
        f"fields of config.json that GGUF has no place for, and that may change what the model computes: {shown}{more}",
    )


def _shown(value: Any) -> str:
    import json

    text = json.dumps(value) if not isinstance(value, str) else f"'{value}'"
    return text if len(text) <= 60 else f"{text[:57]}..."
