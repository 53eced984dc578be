"""More tiny models for `arch_zoo`: the families of `adapterkit.gguf.arch.decoders` and of the rows after it."""

from __future__ import annotations

from typing import Any

VOCAB = 288
_BASE: dict[str, Any] = {
    "vocab_size": VOCAB,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 128,
    "tie_word_embeddings": False,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
_HALF = {**_BASE, "head_dim": 16}
_MOE = {**_HALF, "num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 32, "norm_topk_prob": True}
_ROUTED = {**_HALF, "n_routed_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 32}
_MLA = {
    **_BASE,
    "num_key_value_heads": 4,
    "q_lora_rank": 24,
    "kv_lora_rank": 32,
    "qk_nope_head_dim": 16,
    "qk_rope_head_dim": 8,
    "v_head_dim": 16,
    "rms_norm_eps": 1e-6,
}
_GROUPS = {"n_group": 1, "topk_group": 1, "routed_scaling_factor": 1.5, "norm_topk_prob": True}
_INDEXED = {
    "n_routed_experts": 4,
    "num_experts_per_tok": 2,
    "n_shared_experts": 1,
    "moe_intermediate_size": 32,
    "index_topk": 64,
    "index_head_dim": 64,
    "index_n_heads": 2,
}
_SSM = {"mamba_n_heads": 8, "mamba_d_head": 16, "mamba_n_groups": 1, "mamba_d_state": 16, "mamba_expand": 2}
_FOUR = {"num_hidden_layers": 4, "sliding_window": 64}
_LINES = ["q_proj", "k_proj", "v_proj", "o_proj"]
_EXPERTS = ("mlp.experts.gate_up_proj", "mlp.experts.down_proj")
_MLA_LINES = ["q_a_proj", "q_b_proj", "kv_a_proj_with_mqa", "kv_b_proj", "o_proj"]
_TWO_ROPES = {
    "full_attention": {"rope_type": "default", "rope_theta": 500000.0, "partial_rotary_factor": 0.5},
    "sliding_attention": {"rope_type": "default", "rope_theta": 10000.0, "partial_rotary_factor": 0.5},
}
_SCALES = {
    "attention_multiplier": 0.2,
    "embedding_multiplier": 1.5,
    "residual_multiplier": 0.7,
    "logits_scaling": 2.0,
}

# kind: (class, config, other fields of `arch_zoo.Tiny`)
MODELS: dict[str, tuple[str, dict[str, Any], dict[str, Any]]] = {
    "afmoe": (
        "AfmoeForCausalLM",
        {**_MOE, **_FOUR, "num_shared_experts": 1, "num_dense_layers": 1, "route_scale": 1.5, "mup_enabled": True},
        {"lora": _LINES, "parameters": _EXPERTS},
    ),
    "apertus": ("ApertusForCausalLM", _BASE, {}),
    "bamba": ("BambaForCausalLM", {**_BASE, **_SSM, "attn_layer_indices": [1]}, {"lora": [*_LINES, "in_proj"]}),
    "cohere2_moe": (
        "Cohere2MoeForCausalLM",
        {**_MOE, **_FOUR, "num_shared_experts": 1, "first_k_dense_replace": 1},
        {"lora": _LINES, "parameters": _EXPERTS},
    ),
    "dbrx": (
        "DbrxForCausalLM",
        {
            "vocab_size": VOCAB,
            "d_model": 64,
            "n_heads": 4,
            "n_layers": 2,
            "max_seq_len": 128,
            "attn_config": {"kv_n_heads": 2, "clip_qkv": 8, "rope_theta": 10000.0},
            "ffn_config": {"moe_num_experts": 4, "moe_top_k": 2, "ffn_hidden_size": 96},
        },
        {"lora": ["Wqkv", "out_proj"]},
    ),
    "exaone_moe": (
        "ExaoneMoeForCausalLM",
        {**_MOE, **_FOUR, **_GROUPS, "first_k_dense_replace": 1, "num_shared_experts": 1},
        {"lora": _LINES, "parameters": _EXPERTS},
    ),
    "glm": ("GlmForCausalLM", _HALF, {}),
    "glm4_moe_lite": (
        "Glm4MoeLiteForCausalLM",
        {
            **_MLA,
            **_GROUPS,
            "n_routed_experts": 4,
            "num_experts_per_tok": 2,
            "n_shared_experts": 1,
            "moe_intermediate_size": 32,
            "mlp_layer_types": ["dense", "sparse"],
        },
        {"lora": _MLA_LINES, "parameters": _EXPERTS},
    ),
    "granite_swa": ("GraniteSWAForCausalLM", {**_BASE, **_FOUR, **_SCALES}, {}),
    "granitemoe_swa": (
        "GraniteMoeSWAForCausalLM",
        {**_BASE, **_FOUR, **_SCALES, "num_local_experts": 4, "num_experts_per_tok": 2},
        {"lora": _LINES},
    ),
    "granitemoe_swa_shared": (
        "GraniteMoeSWAForCausalLM",
        {**_BASE, **_FOUR, "num_local_experts": 4, "num_experts_per_tok": 2, "shared_intermediate_size": 48},
        {"lora": _LINES},
    ),
    "jais2": ("Jais2ForCausalLM", _HALF, {}),
    "lfm2_moe": (
        "Lfm2MoeForCausalLM",
        {
            **{k: v for k, v in _MOE.items() if k != "head_dim"},
            "layer_types": ["conv", "full_attention"],
            "num_dense_layers": 1,
        },
        {"lora": ["q_proj", "out_proj", "in_proj"]},
    ),
    "hy_v3": (
        "HYV3ForCausalLM",
        {**_MOE, "num_shared_experts": 1, "router_scaling_factor": 1.5, "mlp_layer_types": ["dense", "sparse"]},
        {"lora": _LINES, "parameters": _EXPERTS},
    ),
    "mellum": (
        "MellumForCausalLM",
        {
            **_MOE,
            "num_local_experts": 4,
            "sliding_window": 64,
            "num_hidden_layers": 4,
            "layer_types": [*["sliding_attention"] * 3, "full_attention"],
            "rope_parameters": {
                "full_attention": {"rope_type": "default", "rope_theta": 500000.0},
                "sliding_attention": {"rope_type": "default", "rope_theta": 500000.0},
            },
        },
        {"lora": _LINES, "parameters": _EXPERTS},
    ),
    "laguna": (
        "LagunaForCausalLM",
        {
            **_MOE,
            **_FOUR,
            "layer_types": ["full_attention", *["sliding_attention"] * 3],
            "mlp_layer_types": ["dense", *["sparse"] * 3],
            "shared_expert_intermediate_size": 32,
            "moe_routed_scaling_factor": 1.5,
        },
        {"lora": _LINES, "parameters": _EXPERTS},
    ),
    "minicpm3": (
        "MiniCPM3ForCausalLM",
        {**_MLA, "scale_emb": 12, "scale_depth": 1.4, "dim_model_base": 256, "head_dim": 8},
        {"lora": _MLA_LINES},
    ),
    "minimax_m2": (
        "MiniMaxM2ForCausalLM",
        {**_HALF, "num_local_experts": 4, "num_experts_per_tok": 2},
        {"lora": _LINES},
    ),
    "minimax": (
        "MiniMaxForCausalLM",
        {
            **_HALF,
            "num_local_experts": 4,
            "num_experts_per_tok": 2,
            "layer_types": ["linear_attention", "full_attention"],
            "rms_norm_eps": 1e-6,
            **dict.fromkeys(("full_attn_alpha_factor", "linear_attn_alpha_factor", "mlp_alpha_factor"), 1.5),
        },
        {"lora": _LINES},
    ),
    "mimo_v2_flash": (
        "MiMoV2FlashForCausalLM",
        {
            **_ROUTED,
            **_GROUPS,
            "v_head_dim": 8,
            "sliding_window": 64,
            "routed_scaling_factor": 1.0,
            "rope_parameters": _TWO_ROPES,
        },
        {"lora": _LINES, "parameters": _EXPERTS},
    ),
    "nemotron_h": (
        "NemotronHForCausalLM",
        {
            **{k: v for k, v in _HALF.items() if k != "num_hidden_layers"},
            "layers_block_type": ["linear_attention", "mlp", "full_attention", "mlp"],
            "mamba_num_heads": 8,
            "mamba_head_dim": 16,
            "ssm_state_size": 16,
            "n_groups": 2,
            "use_mamba_kernels": False,
        },
        {"lora": [*_LINES, "in_proj", "up_proj", "down_proj"]},
    ),
    "nemotron_h_moe": (
        "NemotronHForCausalLM",
        {
            **{k: v for k, v in _ROUTED.items() if k != "num_hidden_layers"},
            **_GROUPS,
            "layers_block_type": ["linear_attention", "moe", "full_attention", "moe"],
            "mamba_num_heads": 8,
            "mamba_head_dim": 16,
            "ssm_state_size": 16,
            "n_groups": 2,
            "moe_shared_expert_intermediate_size": 48,
            "use_mamba_kernels": False,
        },
        {"lora": [*_LINES, "in_proj"]},
    ),
    "solar_open": (
        "SolarOpenForCausalLM",
        {**_ROUTED, **_GROUPS, "n_shared_experts": 1},
        {"lora": _LINES, "parameters": _EXPERTS},
    ),
    "youtu": ("YoutuForCausalLM", _MLA, {"lora": _MLA_LINES}),
    "kimi_linear": (
        "KimiLinearForCausalLM",
        {
            **_MLA,
            "q_lora_rank": None,
            "num_experts": 4,
            "num_experts_per_token": 2,
            "num_shared_experts": 1,
            "moe_intermediate_size": 32,
            "routed_scaling_factor": 1.5,
            "linear_head_dim": 16,
            "linear_num_heads": 4,
            "layer_types": ["linear_attention", "full_attention"],
            "mlp_layer_types": ["dense", "sparse"],
        },
        {"lora": ["q_proj", "o_proj"]},
    ),
    "bitnet": ("BitNetForCausalLM", {**_BASE, "hidden_act": "silu", "tie_word_embeddings": True}, {}),
    "deepseek_v32": (
        "DeepseekV32ForCausalLM",
        {**_MLA, **_GROUPS, **_INDEXED, "first_k_dense_replace": 1},
        {"lora": _MLA_LINES, "parameters": _EXPERTS},
    ),
    "glm_moe_dsa": (
        "GlmMoeDsaForCausalLM",
        {**_MLA, **_GROUPS, **_INDEXED, "first_k_dense_replace": 1},
        {"lora": _MLA_LINES, "parameters": _EXPERTS},
    ),
}
