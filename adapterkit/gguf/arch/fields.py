"""What the ``config.json`` of one model type says beyond what most share, from the metadata and tensors of a GGUF file."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from statistics import NormalDist
from typing import TYPE_CHECKING, Any

from adapterkit.gguf.arch.config import single
from adapterkit.gguf.arch.pooling import POOLING

if TYPE_CHECKING:
    Values = Mapping[str, Any]

NULL = object()  # a field that is to say null, where None leaves it out


def shortest(value: Any) -> Any:
    """A float32 as the shortest number that it is: 1e-05, not 9.999999747378752e-06."""
    if isinstance(value, list):
        return [shortest(one) for one in value]
    if not isinstance(value, float):
        return value
    return next((brief for digits in range(1, 10) if single(brief := float(f"{value:.{digits}g}")) == value), value)


def floats(tensor: Any) -> list[float]:
    import struct

    data = tensor.raw()
    return list(struct.unpack(f"<{len(data) // 4}f", data))


def _mixtral(values: Values, config: Values, base: Any) -> dict[str, Any]:
    return {"num_local_experts": values.get("expert_count"), "num_experts": None, "sliding_window": NULL}


def _layer_kinds(values: Values, key: str, yes: str, no: str) -> list[str] | None:
    found = values.get(key)
    return [yes if one else no for one in found] if isinstance(found, list) else None


def _every(values: Values, every: int) -> list[str]:
    """Kinds of layers: those that the file says, or a window in all but each ``every``-th."""
    found = _layer_kinds(values, "attention.sliding_window_pattern", "sliding_attention", "full_attention")
    built_in = ["sliding_attention" if (i + 1) % every else "full_attention" for i in range(values["block_count"])]
    return found or built_in


def _windows(values: Values, config: Values, base: Any) -> dict[str, Any]:
    return {
        "layer_types": _layer_kinds(values, "attention.sliding_window_pattern", "sliding_attention", "full_attention"),
        "sliding_window": values.get("attention.sliding_window", NULL),
    }


def _granite(values: Values, config: Values, base: Any) -> dict[str, Any]:
    heads = values.get("attention.head_count", 1)
    width = config["hidden_size"] // heads if isinstance(heads, int) else 64
    shared = "expert_shared_feed_forward_length" in values and config["model_type"] == "granitemoe"
    moved = {"model_type": "granitemoeshared", "architectures": ["GraniteMoeSharedForCausalLM"]} if shared else {}
    return {
        **moved,
        "attention_multiplier": values.get("attention.scale", width**-0.5),
        "shared_intermediate_size": values.get("expert_shared_feed_forward_length"),
        "num_local_experts": values.get("expert_count"),
        "num_experts_per_tok": values.get("expert_used_count"),
        "num_experts": None,
    }


def _granite_hybrid(values: Values, config: Values, base: Any) -> dict[str, Any]:
    inner, heads = values["ssm.inner_size"], values["ssm.time_step_rank"]
    kinds = ["attention" if one else "mamba" for one in values["attention.head_count_kv"]]
    nope = not values.get("rope.scaling.finetuned", True)
    return {
        **_granite(values, config, base),
        "num_local_experts": values.get("expert_count", 0),
        "num_experts_per_tok": values.get("expert_used_count", 0),
        "layer_types": kinds,
        "mamba_n_groups": values["ssm.group_count"],
        "mamba_d_head": inner // heads,
        "mamba_expand": inner // config["hidden_size"],
        "position_embedding_type": "nope" if nope else "rope",
        "shared_intermediate_size": values.get("expert_shared_feed_forward_length", values.get("feed_forward_length")),
    }


def _deepseek(values: Values, config: Values, base: Any) -> dict[str, Any]:
    rope, kv = values["rope.dimension_count"], values["attention.kv_lora_rank"]
    v3 = f"blk.{values.get('leading_dense_block_count', 0)}.exp_probs_b.bias" in base
    found = {
        "num_key_value_heads": values["attention.head_count"],
        "qk_rope_head_dim": rope,
        "kv_lora_rank": kv,
        "qk_nope_head_dim": values["attention.key_length_mla"] - rope,
        "v_head_dim": values["attention.value_length_mla"],
        "head_dim": rope,
        "n_routed_experts": values.get("expert_count"),
        "num_experts": None,
        "norm_topk_prob": bool(values.get("expert_weights_norm", False)),
        "q_lora_rank": values.get("attention.q_lora_rank", NULL),
    }
    if v3:
        found |= {"model_type": "deepseek_v3", "architectures": ["DeepseekV3ForCausalLM"], "scoring_func": None}
    else:
        found |= {"topk_method": "greedy", "scoring_func": None if "expert_gating_func" not in values else "softmax"}
    return found


def _gpt_oss(values: Values, config: Values, base: Any) -> dict[str, Any]:
    return {
        "num_local_experts": values.get("expert_count"),
        "num_experts": None,
        "attention_bias": True,
        "intermediate_size": values["expert_feed_forward_length"],
        "layer_types": _every(values, 2) if "attention.sliding_window_pattern" in values else None,
    }


def _llama4(values: Values, config: Values, base: Any) -> dict[str, Any]:
    return {
        "intermediate_size_mlp": values["feed_forward_length"],
        "intermediate_size": values["expert_feed_forward_length"],
        "num_local_experts": values.get("expert_count"),
        "num_experts": None,
        "use_qk_norm": values.get("expert_count") != 128,
        "head_dim": values.get("attention.key_length", values.get("rope.dimension_count")),
    }


def _ernie_moe(values: Values, config: Values, base: Any) -> dict[str, Any]:
    layers, step = values["block_count"], values.get("interleave_moe_layer_step", 1)
    return {
        "moe_num_experts": values.get("expert_count"),
        "num_experts": None,
        "moe_k": values.get("expert_used_count"),
        "num_experts_per_tok": None,
        "moe_layer_end_index": layers - 1 - (layers - 1 - values["leading_dense_block_count"]) % step,
        "scoring_func": None,
    }


def _falcon(values: Values, config: Values, base: Any) -> dict[str, Any]:
    heads, kv = values["attention.head_count"], values["attention.head_count_kv"]
    new = "blk.0.attn_norm_2.weight" in base
    return {
        "num_kv_heads": kv,
        "num_key_value_heads": None,
        "new_decoder_architecture": new or kv not in (1, heads),
        "multi_query": kv == 1,
        "num_ln_in_parallel_attn": 2 if new else 1,
        "bias": "blk.0.attn_qkv.bias" in base,
        "alibi": False,
        "parallel_attn": True,
        "ffn_hidden_size": values["feed_forward_length"],
        "intermediate_size": None,
        "max_position_embeddings": 2048,
        "layer_norm_epsilon": values["attention.layer_norm_epsilon"],
    }


def _gpt2(values: Values, config: Values, base: Any) -> dict[str, Any]:
    return {
        "n_layer": values["block_count"],
        "n_inner": values["feed_forward_length"],
        "intermediate_size": None,
        "num_hidden_layers": None,
        "max_position_embeddings": None,
        "num_key_value_heads": None,
        "multi_query": values.get("attention.head_count_kv", 0) == 1 or None,
    }


def _bloom(values: Values, config: Values, base: Any) -> dict[str, Any]:
    return {"n_layer": values["block_count"], "num_hidden_layers": None, "seq_length": values["context_length"]}


def _mpt(values: Values, config: Values, base: Any) -> dict[str, Any]:
    bias = values.get("attention.max_alibi_bias", 0.0)
    attention = {
        "alibi": bias > 0,
        "alibi_bias_max": int(bias) or 8,
        "clip_qkv": values.get("attention.clamp_kqv"),
        "kv_n_heads": values.get("attention.head_count_kv"),
    }
    return {
        "n_layers": values["block_count"],
        "num_hidden_layers": None,
        "expansion_ratio": values["feed_forward_length"] // values["embedding_length"],
        "attn_config": {k: v for k, v in attention.items() if v is not None},
    }


def _neox(values: Values, config: Values, base: Any) -> dict[str, Any]:
    return {"attention_bias": "blk.0.attn_qkv.bias" in base}


def _phi(values: Values, config: Values, base: Any) -> dict[str, Any]:
    rope = dict(config.get("rope_parameters", {}))
    original = values.get("rope.scaling.original_context_length")
    window = values.get("attention.sliding_window")
    found: dict[str, Any] = {"sliding_window": window or NULL, "original_max_position_embeddings": original}
    if rope.get("rope_type") == "longrope":
        rope["original_max_position_embeddings"] = original
    found["rope_parameters"] = rope
    if "expert_count" in values:
        found |= {
            "num_local_experts": values["expert_count"],
            "num_experts": None,
            "lm_head_bias": "output.bias" in base,
        }
    return found


def _linear(values: Values, config: Values, base: Any) -> dict[str, Any]:
    heads = values["ssm.time_step_rank"]
    found = {
        "linear_value_head_dim": values["ssm.inner_size"] // heads,
        "layer_types": _layer_kinds(values, "attention.recurrent_layers", "linear_attention", "full_attention"),
        "attn_output_gate": True,
    }
    rope = dict(config.get("rope_parameters", {}))
    rope.setdefault("partial_rotary_factor", values["rope.dimension_count"] / config["head_dim"])
    return {**found, "rope_parameters": rope}


def _lfm2(values: Values, config: Values, base: Any) -> dict[str, Any]:
    return {
        "layer_types": ["full_attention" if one else "conv" for one in values["attention.head_count_kv"]],
        "block_auto_adjust_ff_dim": False,
        "block_ff_dim": None,
    }


def _mamba(values: Values, config: Values, base: Any) -> dict[str, Any]:
    conv = "blk.0.ssm_conv1d.bias" in base
    found: dict[str, Any] = {
        "expand": values["ssm.inner_size"] // values["embedding_length"],
        "use_conv_bias": conv,
        "use_bias": "blk.0.ssm_in.bias" in base,
        "num_attention_heads": None,
        "max_position_embeddings": None,
        "layer_norm_epsilon": values["attention.layer_norm_rms_epsilon"],
    }
    if values.get("ssm.dt_b_c_rms"):
        epsilon = values["attention.layer_norm_rms_epsilon"]
        return {
            **found,
            "model_type": "falcon_mamba",
            "architectures": ["FalconMambaForCausalLM"],
            "mixer_rms_eps": epsilon,
        }
    return found


def _mamba2(values: Values, config: Values, base: Any) -> dict[str, Any]:
    heads = values["ssm.time_step_rank"]
    return {
        **_mamba(values, config, base),
        "num_heads": heads,
        "head_dim": values["ssm.inner_size"] // heads,
        "intermediate_size": None,
    }


def _jamba(values: Values, config: Values, base: Any) -> dict[str, Any]:
    kinds = ["attention" if one else "mamba" for one in values["attention.head_count_kv"]]
    sparse = [i for i in range(values["block_count"]) if f"blk.{i}.ffn_gate_exps.weight" in base]
    attends = [i for i, kind in enumerate(kinds) if kind == "attention"] or [0]
    return {
        "attn_layer_offset": attends[0],
        "attn_layer_period": attends[1] - attends[0]
        if len(attends) > 1
        else max(len(kinds) - attends[0], attends[0] + 1),
        "expert_layer_offset": sparse[0] if sparse else 0,
        "expert_layer_period": sparse[1] - sparse[0] if len(sparse) > 1 else values["block_count"],
        "mamba_expand": values["ssm.inner_size"] // values["embedding_length"],
        "mamba_dt_rank": values["ssm.time_step_rank"],
        "use_mamba_kernels": False,
        "rope_parameters": None,
    }


def _bert(values: Values, config: Values, base: Any) -> dict[str, Any]:
    types = base.get("token_types.weight")
    return {"type_vocab_size": types.shape[0] if types is not None else 0}


def _roberta(values: Values, config: Values, base: Any) -> dict[str, Any]:
    pad = config.get("pad_token_id")
    return {
        **_bert(values, config, base),
        "max_position_embeddings": values["context_length"] + (1 + pad if isinstance(pad, int) else 0),
    }


def _modernbert(values: Values, config: Values, base: Any) -> dict[str, Any]:
    words = {number: word for word, number in POOLING.items()}
    return {"classifier_pooling": words.get(values.get("classifier.pooling_type", -1))}


def _distilbert(values: Values, config: Values, base: Any) -> dict[str, Any]:
    return {
        "dim": values["embedding_length"],
        "hidden_dim": values["feed_forward_length"],
        "n_heads": values["attention.head_count"],
        "n_layers": values["block_count"],
        **dict.fromkeys(("hidden_size", "intermediate_size", "num_attention_heads", "num_hidden_layers")),
    }


def _cohere(values: Values, config: Values, base: Any) -> dict[str, Any]:
    kinds = None
    if config["model_type"] == "cohere2":
        kinds = _every(values, 4)
    return {"tie_word_embeddings": True, "layer_types": kinds}


def _glm_moe(values: Values, config: Values, base: Any) -> dict[str, Any]:
    return {
        "n_routed_experts": values.get("expert_count"),
        "num_experts": None,
        "use_qk_norm": "blk.0.attn_q_norm.weight" in base,
        "scoring_func": None,
    }


def _hunyuan_moe(values: Values, config: Values, base: Any) -> dict[str, Any]:
    return {
        "moe_topk": values.get("expert_used_count"),
        "moe_intermediate_size": values.get("expert_feed_forward_length"),
        "num_shared_expert": values.get("expert_shared_count"),
        "num_experts_per_tok": None,
    }


def _stable(values: Values, config: Values, base: Any) -> dict[str, Any]:
    return {"qk_layernorm": "blk.0.attn_q_norm.weight" in base, "use_qkv_bias": "blk.0.attn_q.bias" in base}


def _ministral(values: Values, config: Values, base: Any) -> dict[str, Any]:
    rope = dict(config.get("rope_parameters", {}))
    rope |= {
        "mscale_all_dim": values.get("rope.scaling.yarn_log_multiplier"),
        "llama_4_scaling_beta": values.get("attention.temperature_scale"),
    }
    if "rope.scaling.yarn_log_multiplier" in values:
        return {"rope_parameters": {**rope, "mscale": 1.0}, "sliding_window": NULL}
    return {"model_type": "mistral", "architectures": ["MistralForCausalLM"], "sliding_window": NULL}


def _olmo2(values: Values, config: Values, base: Any) -> dict[str, Any]:
    if "attention.sliding_window" not in values:
        return {}
    return {**_windows(values, config, base), "model_type": "olmo3", "architectures": ["Olmo3ForCausalLM"]}


def _exaone4(values: Values, config: Values, base: Any) -> dict[str, Any]:
    found = _windows(values, config, base)
    kinds = found["layer_types"] or ["full_attention"] * values["block_count"]
    return {**found, "layer_types": kinds}


def _gemma3(values: Values, config: Values, base: Any) -> dict[str, Any]:
    return {"layer_types": _every(values, 6), "query_pre_attn_scalar": values["attention.key_length"]}


def _gemma2(values: Values, config: Values, base: Any) -> dict[str, Any]:
    return {"layer_types": _every(values, 2), "query_pre_attn_scalar": values["attention.key_length"]}


def _minicpm(values: Values, config: Values, base: Any) -> dict[str, Any]:
    return {
        "scale_depth": shortest(values["residual_scale"] * values["block_count"] ** 0.5),
        "dim_model_base": shortest(values["embedding_length"] / values["logit_scale"]),
    }


def _falcon_h1(values: Values, config: Values, base: Any) -> dict[str, Any]:
    """The multipliers are in the weights already."""
    inner, heads = values["ssm.inner_size"], values["ssm.time_step_rank"]
    ones = ("attention_in_multiplier", "attention_out_multiplier", "key_multiplier", "ssm_in_multiplier")
    more = ("ssm_out_multiplier", "lm_head_multiplier", "embedding_multiplier")
    return {
        **dict.fromkeys((*ones, *more), 1.0),
        "mlp_multipliers": [1.0, 1.0],
        "ssm_multipliers": [1.0] * 5,
        "mamba_d_ssm": inner,
        "mamba_n_heads": heads,
        "mamba_d_head": inner // heads,
        "mamba_n_groups": values["ssm.group_count"],
        "mamba_rms_norm": "blk.0.ssm_norm.weight" in base,
        "mamba_norm_before_gate": False,
        "projectors_bias": False,
        "mamba_conv_bias": "blk.0.ssm_conv1d.bias" in base,
    }


def _gemma3n(values: Values, config: Values, base: Any) -> dict[str, Any]:
    shares = [NormalDist().cdf(one) if one > float("-inf") else 0.0 for one in values["activation_sparsity_scale"]]
    table = base.get("per_layer_token_embd.weight")
    rank = base.get("blk.0.laurel_l.weight")
    return {
        "activation_sparsity_pattern": [round(one, 6) for one in shares],
        "vocab_size_per_layer_input": table.shape[0] if table is not None else None,
        "laurel_rank": rank.shape[0] if rank is not None else None,
        "layer_types": _windows(values, config, base)["layer_types"],
        # These are read where they are 0 too.
        "num_kv_shared_layers": values["attention.shared_kv_layers"],
        "altup_active_idx": values["altup.active_idx"],
    }


def _gemma4(values: Values, config: Values, base: Any) -> dict[str, Any]:
    kinds = _windows(values, config, base)["layer_types"] or []
    table = base.get("per_layer_token_embd.weight")
    found: dict[str, Any] = {
        "layer_types": kinds,
        "global_head_dim": values["attention.key_length"],
        "head_dim": values["attention.key_length_swa"],
        "num_kv_shared_layers": values["attention.shared_kv_layers"],
        "hidden_size_per_layer_input": values["embedding_length_per_layer_input"],
        "vocab_size_per_layer_input": table.shape[0] if table is not None else None,
        "enable_moe_block": "expert_count" in values,
        # Layers that see all take their keys for values where they have no projection of their own.
        "attention_k_eq_v": any(
            kind == "full_attention"
            and f"blk.{layer}.attn_k.weight" in base
            and f"blk.{layer}.attn_v.weight" not in base
            for layer, kind in enumerate(kinds)
        ),
    }
    if "expert_count" in values:
        found |= {
            "moe_intermediate_size": values["expert_feed_forward_length"],
            "expert_intermediate_size": None,
            "top_k_experts": values["expert_used_count"],
            "num_experts_per_tok": None,
        }
    heads = values["attention.head_count_kv"]
    if isinstance(heads, list):
        local = [one for one, kind in zip(heads, kinds, strict=True) if kind != "full_attention"]
        full = [one for one, kind in zip(heads, kinds, strict=True) if kind == "full_attention"]
        found |= {"num_key_value_heads": (local or full)[0], "num_global_key_value_heads": (full or local)[0]}
    widths = values["feed_forward_length"]
    if isinstance(widths, list):
        found |= {"intermediate_size": min(widths), "use_double_wide_mlp": max(widths) > min(widths)}
    rope = dict(config.get("rope_parameters", {}))
    full_rope = dict(rope.get("full_attention", {}))
    freqs = base.get("rope_freqs.weight")
    turning = sum(1 for one in floats(freqs) if one == 1.0) if freqs is not None else 0
    full_rope |= {"rope_type": "proportional", "partial_rotary_factor": 2 * turning / values["attention.key_length"]}
    rope["full_attention"] = full_rope
    return {**found, "rope_parameters": rope}


MORE: dict[str, Callable[[Values, Values, Any], dict[str, Any]]] = {
    "mixtral": _mixtral,
    "ministral3": _ministral,
    "granite": _granite,
    "granitemoe": _granite,
    "granitemoehybrid": _granite_hybrid,
    "granitehybrid_dense": _granite_hybrid,
    "deepseek_v2": _deepseek,
    "gpt_oss": _gpt_oss,
    "llama4_text": _llama4,
    "ernie4_5_moe": _ernie_moe,
    "falcon": _falcon,
    "falcon_two_norms": _falcon,
    "falcon_h1": _falcon_h1,
    "gpt2": _gpt2,
    "gpt_bigcode": _gpt2,
    "bloom": _bloom,
    "mpt": _mpt,
    "gpt_neox": _neox,
    "phi3": _phi,
    "phimoe": _phi,
    "qwen3_next": _linear,
    "qwen3_5_text": _linear,
    "qwen3_5_moe_text": _linear,
    "lfm2": _lfm2,
    "mamba": _mamba,
    "mamba2": _mamba2,
    "jamba": _jamba,
    "bert": _bert,
    "bert_classifier": _bert,
    "distilbert": _distilbert,
    "modernbert": _modernbert,
    "modernbert_classifier": _modernbert,
    "roberta": _roberta,
    "cohere": _cohere,
    "cohere2": _cohere,
    "glm4_moe": _glm_moe,
    "hunyuan_v1_moe": _hunyuan_moe,
    "stablelm": _stable,
    "olmo2": _olmo2,
    "exaone4": _exaone4,
    "gemma2": _gemma2,
    "gemma3_text": _gemma3,
    "gemma3n_text": _gemma3n,
    "gemma4_text": _gemma4,
    "minicpm": _minicpm,
}
