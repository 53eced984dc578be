"""What llama.cpp has built in, row by row: the data of `adapterkit.gguf.arch.contract`.

Sources: ``src/models`` of llama.cpp, and ``tools/gguf_contract.py``, which changes every field of every config and compares
the runtime with transformers.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from adapterkit.gguf.arch.builtin import Fixed
from adapterkit.gguf.arch.hyper import rotary_dim

if TYPE_CHECKING:
    from adapterkit.gguf.arch.config import Config


def _activation(name: str, field: str = "hidden_act") -> Fixed:
    return Fixed(field, name, f"computes {name} in this architecture")


def _no_bias(*fields: str) -> tuple[Fixed, ...]:
    return tuple(Fixed(field, False, "has no such biases in this architecture") for field in fields)


def _biased(*fields: str) -> tuple[Fixed, ...]:
    return tuple(Fixed(field, True, "does not load this architecture without them") for field in fields)


def window(config: Config) -> int:
    return int(config.get("sliding_window", default=0))


def windowed(config: Config) -> bool:
    """Whether a layer has a window that is shorter than the context."""
    kinds = config.get("layer_types")
    if not config.get("sliding_window") or (isinstance(kinds, list) and "sliding_attention" not in kinds):
        return False
    return window(config) < config.number("context")


def _qwen_windowed(config: Config) -> bool:
    """Qwen's windows are switched on, and are in the layers from ``max_window_layers`` on."""
    if not config.get("use_sliding_window", default=False) or not windowed(config):
        return False
    return config.get("layer_types") is not None or config.number("layers") > config.get("max_window_layers", default=0)


def _beyond_window(config: Config) -> str:
    return f"texts of more than {window(config)} tokens"


def _no_window(when: Callable[[Config], bool] = windowed) -> Fixed:
    return Fixed("sliding_window", None, "has no window in this architecture", when=when, limit=_beyond_window)


def _by_best(config: Config) -> bool:
    """Whether groups of experts are chosen by the best expert of each, as DeepSeek V2 does it."""
    groups, used = config.get("n_group", default=1), config.get("topk_group", default=1)
    return config.get("topk_method") == "group_limited_greedy" and 1 <= (used or 1) < (groups or 1)


def _head_of_hidden(config: Config) -> int:
    return config.number("hidden") // config.number("heads")


_SPLIT_HEADS = Fixed("head_dim", _head_of_hidden, "has heads of hidden_size / num_attention_heads in this architecture")
_NORMED = Fixed("norm_topk_prob", True, "divides the weights of the chosen experts by their sum", default=False)
_NOT_NORMED = Fixed("norm_topk_prob", False, "takes the weights of the chosen experts as they are", default=False)
_ALL_SPARSE = (
    Fixed("decoder_sparse_step", 1, "has experts in every layer of this architecture"),
    Fixed("mlp_only_layers", [], "has experts in every layer of this architecture"),
)


def _gemma_scale(layers: int) -> Callable[[Config], float]:
    """Queries are scaled by the head size; in the 27B, known by its layers, by hidden_size / num_attention_heads."""

    def built_in(config: Config) -> float:
        if config.number("layers") == layers:
            return config.number("hidden") / config.number("heads")
        return float(config.get("head_dim", default=256))

    return built_in


def _gemma(layers: int) -> tuple[Fixed, ...]:
    does = "scales queries by the head size in this architecture"
    return (
        *_no_bias("attention_bias"),
        _activation("gelu", "hidden_activation"),
        Fixed("query_pre_attn_scalar", _gemma_scale(layers), does, default=256),
        Fixed("use_bidirectional_attention", False, "lets a token see only those before it in this architecture"),
    )


def _three_of_four(config: Config) -> list[int]:
    return [int((i + 1) % 4 != 0) for i in range(config.number("layers"))]


def _few_experts(config: Config) -> bool:
    """Llama 4 Scout has 16 experts and norms of queries and keys, Maverick 128 and none."""
    return config.number("num_local_experts") != 128


def _chunk_limit(config: Config) -> str:
    return f"texts of more than {min(8192, config.number('attention_chunk_size'))} tokens"


def _chunked(config: Config) -> bool:
    kinds = config.get("layer_types")
    return not (isinstance(kinds, list) and set(kinds) == {"full_attention"})


_SILU = _activation("silu")
_GELU = _activation("gelu")
_ENCODER = Fixed("is_decoder", False, "lets every token see all others in this architecture")


def _gelu_or_silu(config: Config) -> str:
    return "silu" if config.get("hidden_activation") in ("silu", "swish") else "gelu"


def _gated(config: Config) -> bool:
    return str(config.get("feed_forward_proj", default="relu")).startswith("gated")


def _t5_feed_forward(config: Config) -> str:
    return "gated-gelu" if _gated(config) else "relu"


_POSITIONS = Fixed("position_embedding_type", "absolute", "adds one embedding per position in this architecture")
_MAMBA = (_SILU, *_no_bias("use_bias"), *_biased("use_conv_bias"))
_LINEAR = (
    Fixed("rms_norm_eps", 1e-6, "has one epsilon for all norms, and those of queries and keys have 1e-6"),
    *_no_bias("attention_bias"),
    _SILU,
    Fixed("linear_value_head_dim", lambda c: c.number("linear_key_head_dim"), "has one head size for keys and values"),
)

# Model type of a row: what is built in.
FIXED: dict[str, tuple[Fixed, ...]] = {
    "llama": (_SILU, _no_window()),
    "ministral3": (_SILU, _no_window()),
    "smollm3": (
        _SILU,
        *_no_bias("attention_bias", "mlp_bias"),
        Fixed("no_rope_layers", _three_of_four, "leaves the positions out in every fourth layer of this architecture"),
        _no_window(_qwen_windowed),
    ),
    "granite": (_SILU,),
    "minicpm": (_SILU,),
    "baichuan": (_SILU,),
    "internlm2": (_SILU,),
    "qwen2": (_SILU, _no_window(_qwen_windowed)),
    "qwen3": (_SILU, *_no_bias("attention_bias"), _no_window(_qwen_windowed)),
    "qwen2_vl": (_SILU, _no_window(_qwen_windowed)),
    "qwen3_vl": (_SILU, *_no_bias("attention_bias")),
    "seed_oss": (_SILU, *_no_bias("attention_out_bias", "mlp_bias")),
    "gemma": (*_no_bias("attention_bias"), _activation("gelu", "hidden_activation"), _activation("gelu")),
    "gemma2": _gemma(46),
    "gemma3_text": _gemma(62),
    "gemma3n_text": (
        *_no_bias("attention_bias"),
        _activation("gelu", "hidden_activation"),
        Fixed("altup_active_idx", 0, "works on the first of the alternating inputs"),
        Fixed("altup_correct_scale", True, "scales what alternating updates correct"),
        Fixed("hidden_size_per_layer_input", 256, "has 256 numbers per layer and token in this architecture"),
        Fixed("laurel_rank", 64, "has a rank of 64 there in this architecture"),
    ),
    "gemma4_text": (*_no_bias("attention_bias"), _activation("gelu", "hidden_activation")),
    "phi": (_GELU, *_no_bias("qk_layernorm")),
    "phi3": (_SILU, _no_window()),
    "starcoder2": (_GELU, *_biased("use_bias"), _no_window()),
    "stablelm": (_SILU,),
    "olmo": (_SILU, *_no_bias("attention_bias")),
    "olmo2": (_SILU, *_no_bias("attention_bias")),
    "cohere": (_SILU, *_no_bias("attention_bias")),
    "cohere2": (_SILU, *_no_bias("attention_bias"), _SPLIT_HEADS),
    "glm4": (_SILU,),
    "glm4v": (_SILU,),
    "exaone": (_activation("silu", "activation_function"),),
    "exaone4": (_SILU, _SPLIT_HEADS),
    "nemotron": (_activation("relu2"), _SPLIT_HEADS, *_no_bias("attention_bias", "mlp_bias")),
    "ernie4_5": (_SILU, *_no_bias("use_bias")),
    "hunyuan_v1_dense": (_SILU, *_no_bias("attention_bias")),
    "arcee": (_activation("relu2"),),
    "xverse": (_SILU,),
    "orion": (_SILU,),
    "mixtral": (_SILU, _no_window()),
    "qwen2_moe": (_SILU, _NOT_NORMED, *_ALL_SPARSE, _no_window(_qwen_windowed)),
    "qwen3_moe": (_SILU, *_no_bias("attention_bias"), _NORMED, *_ALL_SPARSE, _no_window(_qwen_windowed)),
    "qwen3_vl_moe": (
        _SILU,
        *_no_bias("attention_bias"),
        Fixed("norm_topk_prob", True, "divides the weights of the chosen experts by their sum"),
        *_ALL_SPARSE,
    ),
    "phimoe": (_SILU, *_biased("attention_bias", "lm_head_bias"), _no_window()),
    "olmoe": (_SILU, *_no_bias("attention_bias"), _NOT_NORMED),
    "granitemoe": (_SILU,),
    "deepseek_v2": (
        _SILU,
        *_no_bias("attention_bias", "mlp_bias"),
        Fixed("rms_norm_eps", 1e-6, "has one epsilon for all norms, and those of the compressed parts have 1e-6"),
        Fixed("rope_interleave", True, "rotates neighbouring numbers in this architecture"),
        Fixed("moe_layer_freq", 1, "has experts in every layer after the dense ones"),
        Fixed("topk_method", "noaux_tc", "goes by the best two experts of a group, not by the best", when=_by_best),
        Fixed(
            "norm_topk_prob",
            False,
            "divides the weights of the chosen experts by their sum, which transformers' code for this model leaves out",
            when=lambda c: c.model_type == "deepseek_v2",
        ),
    ),
    "glm4_moe": (_SILU,),
    "gpt_oss": (
        _SILU,
        *_biased("attention_bias"),
        Fixed("swiglu_alpha", 1.702, "has 1.702 there"),
        Fixed("swiglu_limit", 7.0, "clips at 7"),
    ),
    "llama4_text": (
        _SILU,
        *_no_bias("attention_bias"),
        Fixed("use_qk_norm", _few_experts, "normalises queries and keys unless there are 128 experts"),
        Fixed("attention_chunk_size", 8192, "attends in chunks of 8192 tokens", when=_chunked, limit=_chunk_limit),
        Fixed("no_rope_layers", _three_of_four, "leaves the positions out in every fourth layer", when=_chunked),
        Fixed("attn_scale", 0.1, "has 0.1 there", when=_chunked, limit=lambda c: "texts of more than 8192 tokens"),
        Fixed("floor_scale", 8192, "has 8192 there", when=_chunked, limit=lambda c: "texts of more than 8192 tokens"),
    ),
    "ernie4_5_moe": (
        _SILU,
        *_no_bias("use_bias"),
        Fixed(
            "moe_layer_end_index",
            lambda c: c.number("layers") - 1,
            "has experts up to the last layer",
            when=lambda c: c.get("moe_layer_end_index") != -1,
        ),
    ),
    "hunyuan_v1_moe": (_SILU, *_no_bias("attention_bias")),
    "deepseek": (_SILU, *_no_bias("attention_bias"), _NOT_NORMED),
    "dots1": (_SILU, *_no_bias("attention_bias")),
    "bailing_moe": (_SILU, *_no_bias("use_bias", "use_qkv_bias")),
    "gpt2": (
        _activation("gelu", "activation_function"),
        Fixed("scale_attn_weights", True, "divides the scores by the root of the head size"),
        Fixed("scale_attn_by_inverse_layer_idx", False, "scales all layers alike"),
    ),
    "gpt_bigcode": (
        _activation("gelu", "activation_function"),
        Fixed("multi_query", True, "has one key and value head in this architecture"),
        Fixed("scale_attn_weights", True, "divides the scores by the root of the head size"),
    ),
    "gpt_neox": (_GELU, *_biased("attention_bias")),
    "bloom": (Fixed("apply_residual_connection_post_layernorm", False, "adds what came before the norm"),),
    "falcon": (
        _activation("gelu", "activation"),
        Fixed("alibi", False, "rotates positions in this architecture"),
        *_no_bias("bias"),
        Fixed("parallel_attn", True, "computes attention and feed-forward beside each other"),
    ),
    "mpt": (Fixed("layer_norm_epsilon", 1e-5, "has 1e-5 there"),),
    "qwen3_next": (*_LINEAR, Fixed("norm_topk_prob", True, _NORMED.does), *_ALL_SPARSE),
    "qwen3_5_text": _LINEAR,
    "qwen3_5_moe_text": _LINEAR,
    "lfm2": _no_bias("conv_bias"),
    "mamba": (
        *_MAMBA,
        Fixed(
            "mixer_rms_eps",
            lambda c: c.get("layer_norm_epsilon", "rms_norm_eps", default=1e-5),
            "has one epsilon for all norms",
            default=1e-6,
            when=lambda c: c.model_type == "falcon_mamba",
            limit=lambda c: "B, C and dt of a size near that epsilon's root",
        ),
    ),
    "mamba2": _MAMBA,
    "jamba": (
        Fixed("mamba_expand", 2, "has mixers of twice the width in this architecture"),
        _SILU,
        *_no_bias("mamba_proj_bias"),
        *_biased("mamba_conv_bias"),
    ),
    "falcon_h1": (_SILU, *_biased("mamba_conv_bias")),
    "granitemoehybrid": (_SILU, *_no_bias("mamba_proj_bias"), *_biased("mamba_conv_bias")),
    "bert": (_GELU, _POSITIONS, _ENCODER),
    "roberta": (_GELU, _POSITIONS, _ENCODER),
    "distilbert": (_activation("gelu", "activation"),),
    "modernbert": (
        *_no_bias("attention_bias", "mlp_bias", "norm_bias"),
        Fixed("hidden_activation", _gelu_or_silu, "computes gelu or silu in this architecture"),
    ),
    "t5": (
        Fixed("feed_forward_proj", _t5_feed_forward, "computes relu, or gated gelu, in this architecture"),
        Fixed("dense_act_fn", lambda c: "gelu" if _gated(c) else "relu", "computes relu, or gated gelu"),
        Fixed("is_gated_act", lambda c: _gated(c), "gates what feed_forward_proj says"),
        Fixed("relative_attention_max_distance", 128, "has 128 there"),
    ),
}
FIXED["jais2"] = (_activation("relu2"), *_biased("attention_bias", "mlp_bias"))
FIXED["bert_classifier"] = FIXED["bert"]
FIXED["modernbert_classifier"] = (*FIXED["modernbert"], *_no_bias("classifier_bias"))
FIXED["gemma3_embedding"] = tuple(one for one in _gemma(62) if one.field != "use_bidirectional_attention")
FIXED["falcon_two_norms"] = FIXED["falcon"]
FIXED["granitehybrid_dense"] = FIXED["granitemoehybrid"]
# Rows of other classes that the runtime computes with the code of these.
for _row, _of in {
    "llama_bidirec": "llama",
    "sarashina2_vision": "llama",
    "lfm2_bidirectional": "lfm2",
    "qwen3_asr": "qwen3_vl",
    "qwen3_omni_moe": "qwen3_vl_moe",
    "glm_ocr": "glm4",
    "glm_ocr_sections": "glm4v",
    "hunyuan_vl_text": "hunyuan_v1_dense",
    "paddleocr_vl_text": "ernie4_5",
    **dict.fromkeys(("t5_relu_scaled", "t5_relu_apart", "t5_gated_scaled", "t5_gated_apart"), "t5"),
}.items():
    FIXED[_row] = FIXED[_of]

# Ends of names of weights that are multiplied without looking for a LoRA: in every architecture, and by row.
NEVER_LORA = (
    "position_embd.weight",
    "token_types.weight",
    "per_layer_token_embd.weight",
    "ssm_conv1d.weight",
    "ssm_norm.weight",
    "shortconv.conv.weight",
    "attn_rel_b.weight",
    "cls.weight",
    "cls.output.weight",
)
_LATENT = ("attn_q", "attn_q_a", "attn_q_b", "attn_kv_a_mqa", "attn_kv_b", "attn_k_b", "attn_v_b")
NO_LORA: dict[str, tuple[str, ...]] = {
    "deepseek_v2": (*(f"{name}.weight" for name in _LATENT), "output.weight"),
    "gemma3n_text": (
        *("altup_proj.weight", "altup_unembd_proj.weight", "per_layer_model_proj.weight"),
        *("altup_correct_coef.weight", "altup_router.weight"),
    ),
    # A LoRA on experts' last projection is added after each expert's factor, which transformers multiplies with both.
    "gemma4_text": ("per_layer_model_proj.weight", "ffn_down_exps.weight"),
    "jamba": ("ssm_dt.weight",),
    "minimax_m3_vl_text": ("indexer.q_proj.weight", "indexer.k_proj.weight"),
    "falcon_mamba": ("ssm_dt.weight",),
}


def _fourths(full: int) -> Callable[[Config], list[str]]:
    """Every fourth layer sees all, from the one with this number on."""

    def built_in(config: Config) -> list[str]:
        layers = range(config.number("layers"))
        return ["full_attention" if i % 4 == full else "sliding_attention" for i in layers]

    return built_in


def _windows_somewhere(config: Config) -> bool:
    return bool(config.get("sliding_window")) and isinstance(config.get("layer_types"), list)


def _coarse(config: Config) -> bool:
    return float(config.get("rms_norm_eps", default=1e-6)) > 2e-5


def _theta_of_windows(config: Config) -> Any:
    local = config.rope_by_kind.get("sliding_attention")
    theta = local.get("rope_theta") if isinstance(local, dict) else None
    return config.rope.get("rope_theta") if theta is None else theta


# Released models say 1e-5 and pass with a note, as in llama.cpp's own converter; in a tiny GLM-4.7-Flash that is 1.3e-4.
_LATENT_EPSILON = Fixed(
    "rms_norm_eps", 1e-6, "has one epsilon for all norms, and those of the compressed parts have 1e-6", when=_coarse
)
_BIASES = _no_bias("attention_bias")
FIXED["glm"] = (_SILU, _SPLIT_HEADS)
FIXED["eurobert"] = (_SILU, *_BIASES, *_no_bias("mlp_bias"), _SPLIT_HEADS)
FIXED["afmoe"] = (
    _SILU,
    *_BIASES,
    Fixed("layer_types", _fourths(3), "leaves positions out in every fourth layer", when=_windows_somewhere),
)
FIXED["laguna"] = (
    _SILU,
    *_BIASES,
    Fixed("moe_router_score_func", "sigmoid", "scores experts by a sigmoid in this architecture"),
    Fixed("moe_router_use_sigmoid", True, "scores experts by a sigmoid in this architecture"),
    Fixed("moe_router_logit_softcapping", 0, "does not cap the scores of experts in this architecture"),
    Fixed("layer_types", _fourths(0), "has no window in the first of every four layers", when=_windows_somewhere),
)
for _row in ("cohere2_moe", "mellum"):
    FIXED[_row] = (_SILU, *_BIASES)
for _row in ("hy_v3", "step3p7"):
    FIXED[_row] = (_SILU, *_BIASES, *_no_bias("mlp_bias"))
FIXED["bitnet"] = _BIASES
_PAIRS = Fixed("rope_interleave", True, "rotates neighbouring numbers in this architecture")
for _row in ("glm4_moe_lite", "youtu", "deepseek_v32"):
    FIXED[_row] = (_SILU, *_BIASES, _LATENT_EPSILON, _PAIRS)
FIXED["glm_moe_dsa"] = (
    *FIXED["deepseek_v32"],
    Fixed("rope.rope_type", "default", "scales attention of stretched positions otherwise", when=lambda c: True),
)
FIXED["minicpm3"] = (
    _SILU,
    *_BIASES,
    *_no_bias("mlp_bias"),
    _LATENT_EPSILON,
    Fixed("rope.mscale_all_dim", 0, "does not scale attention by it in this architecture"),
)
FIXED["kimi_linear"] = (_SILU, *_BIASES, _LATENT_EPSILON)
FIXED["mimo_v2_flash"] = (_SILU, *_BIASES)
FIXED["nemotron_h"] = FIXED["nemotron_h_moe"] = (
    _activation("silu", "mamba_hidden_act"),
    *_no_bias("mlp_bias", "use_bias"),
    *_biased("use_conv_bias"),
)
FIXED["minimax_m3_vl_text"] = (
    Fixed(
        "shared_intermediate_size", lambda c: c.number("intermediate_size"), "has shared experts as wide as the others"
    ),
)
FIXED["bamba"] = (_SILU, *_no_bias("mamba_proj_bias"), *_biased("mamba_conv_bias"))
FIXED["lfm2_moe"] = (
    *_no_bias("conv_bias"),
    *_biased("use_expert_bias"),
    Fixed("norm_topk_prob", True, _NORMED.does),
    Fixed("routed_scaling_factor", 1.0, "does not scale what experts give in this architecture"),
)
FIXED["minimax"] = (_no_window(lambda c: bool(c.get("sliding_window")) and window(c) < c.number("context")),)
FIXED["phimoe"] = (
    *FIXED["phimoe"],
    Fixed("rope.partial_rotary_factor", 1.0, "turns whole heads in this architecture"),
)
FIXED["olmo2"] = (
    *FIXED["olmo2"],
    Fixed("rope.rope_theta", _theta_of_windows, "has one rotary base for all layers of this architecture"),
)


def _unrotated(config: Config) -> list[float]:
    """Frequencies that interleaved sections do not cover: their position is 0 in the runtime.

    Source: ``GGML_ROPE_TYPE_IMROPE`` in ggml's ``ggml_mrope_cache_init``.
    """
    sections = config.rope_by_kind.get("mrope_section")
    if not isinstance(sections, list) or len(sections) < 3 or not sum(sections):
        return []
    half, theta = rotary_dim(config) // 2, float(config.rope.get("rope_theta", 10000.0))
    places = ((i, i % sum(sections)) for i in range(half))
    return [theta ** (-i / half) for i, place in places if place >= 3 * sections[place % 3]]


def _turned_before(config: Config) -> int:
    """The tokens until the fastest of these frequencies has turned a quarter of a radian."""
    return int(0.25 / max(_unrotated(config)))


_COVERED = Fixed(
    "rope.mrope_section",
    [],
    "leaves the frequencies unrotated that these interleaved sections do not cover",
    when=lambda c: bool(_unrotated(c)) and _turned_before(c) < c.number("context"),
    limit=lambda c: f"texts of more than {_turned_before(c)} tokens",
)
for _row in ("qwen3_vl", "qwen3_vl_moe", "qwen3_asr", "qwen3_omni_moe", "qwen3_5_text", "qwen3_5_moe_text"):
    FIXED[_row] = (*FIXED[_row], _COVERED)
FIXED["qwen2_vl"] = (
    *FIXED["qwen2_vl"],
    Fixed("rms_norm_eps", 1e-6, "adds no epsilon in the norms of this architecture", when=_coarse),
)
FIXED |= dict.fromkeys(
    (
        "bailing_moe_v2",
        "sarvam_moe",
        "plamo2",
        "exaone_moe",
        "granite_swa",
        "granitemoe_swa",
        "minimax_m2",
        "solar_open",
    ),
    (_SILU,),
)
