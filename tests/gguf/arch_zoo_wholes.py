"""Tiny models that see or hear, for `arch_zoo`: their text part is what GGUF holds."""

from __future__ import annotations

from typing import Any

from arch_zoo_more import _BASE, _HALF, _MOE, VOCAB

_LINEAR = {
    **_HALF,
    "linear_num_key_heads": 2,
    "linear_num_value_heads": 4,
    "linear_key_head_dim": 16,
    "linear_value_head_dim": 16,
    "layer_types": ["linear_attention", "full_attention"],
    "rope_parameters": {
        "rope_type": "default",
        "rope_theta": 10000.0,
        "partial_rotary_factor": 0.5,
        "mrope_section": [2, 1, 1],
    },
}
_EYE = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "image_size": 28,
    "patch_size": 14,
}
_EYE_QWEN = {
    "depth": 1,
    "embed_dim": 32,
    "hidden_size": 64,
    "num_heads": 2,
    "out_hidden_size": 64,
    "intermediate_size": 48,
    "patch_size": 14,
    "num_key_value_heads": 1,
}
_EAR = {"d_model": 32, "encoder_layers": 1, "encoder_attention_heads": 2, "encoder_ffn_dim": 48, "num_mel_bins": 16}
_EAR_LLAMA = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "num_key_value_heads": 2,
    "num_mel_bins": 16,
}
_CONFORMER = {
    "num_layers": 1,
    "hidden_dim": 32,
    "feedforward_mult": 2,
    "num_heads": 2,
    "dim_head": 16,
    "output_dim": 12,
    "input_dim": 16,
    "conv_kernel_size": 3,
    "context_size": 8,
    "max_pos_emb": 8,
}
_TEXT_LORA = r".*language_model.*\.(q_proj|k_proj|v_proj|o_proj|down_proj)"
_SECTIONS = {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": [4, 2, 2]}
_SPEECH = {"num_hidden_layers": 1, "hidden_size": 32, "num_attention_heads": 2, "intermediate_size": 48}
_SCALES = {"attention_multiplier": 0.2, "embedding_multiplier": 1.5, "residual_multiplier": 0.7, "logits_scaling": 1.0}


def _text(kind: str, **fields: Any) -> dict[str, Any]:
    return {"model_type": kind, **_BASE, **fields}


MODELS: dict[str, tuple[str, dict[str, Any], dict[str, Any]]] = {
    "llava": (
        "LlavaForConditionalGeneration",
        {"text_config": _text("llama"), "vision_config": {"model_type": "clip_vision_model", **_EYE}},
        {"lora": _TEXT_LORA},
    ),
    "voxtral": (
        "VoxtralForConditionalGeneration",
        {"text_config": _text("llama"), "audio_config": {"model_type": "voxtral_encoder", **_EAR_LLAMA}},
        {"lora": _TEXT_LORA},
    ),
    "audioflamingo3": (
        "AudioFlamingo3ForConditionalGeneration",
        {"text_config": _text("qwen2"), "audio_config": {"model_type": "audioflamingo3_encoder", **_EAR_LLAMA}},
        {"lora": _TEXT_LORA},
    ),
    "qwen2_audio": (
        "Qwen2AudioForConditionalGeneration",
        {"text_config": _text("qwen2"), "audio_config": {"model_type": "qwen2_audio_encoder", **_EAR}},
        {"lora": _TEXT_LORA},
    ),
    "granite_speech": (
        "GraniteSpeechForConditionalGeneration",
        {
            "text_config": _text("granite", **_SCALES),
            "encoder_config": _CONFORMER,
            "projector_config": {"model_type": "blip_2_qformer", **_SPEECH, "encoder_hidden_size": 32},
            "has_lora_adapter": False,
            "window_size": 15,
            "downsample_rate": 5,
        },
        {"lora": _TEXT_LORA},
    ),
    "granite_speech_plus": (
        "GraniteSpeechPlusForConditionalGeneration",
        {
            "text_config": _text("granite", **_SCALES),
            "encoder_config": _CONFORMER,
            "projector_config": {"model_type": "blip_2_qformer", **_SPEECH, "encoder_hidden_size": 32},
            "has_lora_adapter": False,
            "window_size": 15,
            "downsample_rate": 5,
        },
        {"lora": _TEXT_LORA},
    ),
    "janus": (
        "JanusForConditionalGeneration",
        {
            "text_config": _text("llama"),
            "vision_config": {**_EYE, "projection_dim": 64, "depth": 2},
            "vq_config": {
                "embed_dim": 8,
                "num_embeddings": 16,
                "latent_channels": 32,
                "base_channels": 32,
                "channel_multiplier": [1],
                "num_res_blocks": 1,
                "projection_dim": 64,
            },
        },
        {"lora": _TEXT_LORA},
    ),
    "minicpmv4_6": (
        "MiniCPMV4_6ForConditionalGeneration",
        {"text_config": {"model_type": "qwen3_5_text", **_LINEAR}, "vision_config": {**_EYE, "insert_layer_id": 0}},
        {"lora": _TEXT_LORA},
    ),
    "exaone4_5": (
        "Exaone4_5_ForConditionalGeneration",
        {
            "text_config": _text("exaone4", sliding_window=None, layer_types=["full_attention"] * 2),
            "vision_config": _EYE_QWEN,
        },
        {"lora": _TEXT_LORA},
    ),
    "qwen3_asr": (
        "Qwen3ASRForConditionalGeneration",
        {
            "text_config": {
                "model_type": "qwen3",
                **_HALF,
                "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": [4, 2, 2]},
            },
            "audio_config": {**_EAR, "output_dim": 64, "n_window": 4, "downsample_hidden_size": 16},
        },
        {"lora": _TEXT_LORA},
    ),
    "qwen3_omni_moe": (
        "Qwen3OmniMoeThinkerForConditionalGeneration",
        {
            "text_config": {**_MOE, "rope_parameters": {"rope_type": "default", "mrope_section": [4, 2, 2]}},
            "vision_config": {**_EYE_QWEN, "deepstack_visual_indexes": [0], "num_position_embeddings": 16},
            "audio_config": {**_EAR, "output_dim": 64, "n_window": 4, "downsample_hidden_size": 16},
        },
        {"lora": ["o_proj"]},  # of the text alone: the ear has out_proj
    ),
    "glm_ocr": (
        "GlmOcrForConditionalGeneration",
        {
            "text_config": {
                **_HALF,
                "rope_parameters": {
                    "rope_type": "default",
                    "rope_theta": 10000.0,
                    "partial_rotary_factor": 1.0,
                    "mrope_section": [2, 3, 3],
                },
            },
            "vision_config": _EYE_QWEN,
        },
        {"lora": _TEXT_LORA},
    ),
    "hunyuan_vl": (
        "HunYuanVLForConditionalGeneration",
        {
            "text_config": {
                **_HALF,
                "rope_parameters": {
                    "rope_type": "dynamic",
                    "rope_theta": 10000.0,
                    "factor": 1.0,
                    "alpha": 50.0,
                    "mrope_section": [2, 3, 3],
                },
            },
            "tie_word_embeddings": False,
            "vision_config": {**_EYE, "out_hidden_size": 64, "text_hidden_size": 64, "max_image_size": 56},
        },
        {"lora": _TEXT_LORA},
    ),
    "paddleocr_vl": (
        "PaddleOCRVLForConditionalGeneration",
        {
            "text_config": {
                **_HALF,
                "rope_parameters": {"rope_type": "default", "rope_theta": 500000.0, "mrope_section": [4, 2, 2]},
            },
            "vision_config": _EYE,
            "tie_word_embeddings": False,
        },
        {"lora": _TEXT_LORA},
    ),
    "gemma4_unified": (
        "Gemma4UnifiedForConditionalGeneration",
        {
            "text_config": {
                **_HALF,
                "num_hidden_layers": 4,
                "sliding_window": 64,
                "tie_word_embeddings": True,
                "layer_types": ["sliding_attention", "full_attention"] * 2,
                "per_layer_config": {"1": {"head_dim": 32}, "3": {"head_dim": 32}},
            },
        },
        {"lora": _TEXT_LORA, "tolerance": 5e-3, "why": "GELU"},
    ),
    "qwen2_vl": (
        "Qwen2VLForConditionalGeneration",
        {
            "text_config": {
                **_BASE,
                "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": [4, 2, 2]},
            },
            "vision_config": _EYE_QWEN,
        },
        {"lora": _TEXT_LORA, "tolerance": 1e-4, "why": "epsilon"},
    ),
    "qwen3_vl": (
        "Qwen3VLForConditionalGeneration",
        {
            "text_config": {**_HALF, "rope_parameters": _SECTIONS},
            "vision_config": {**_EYE_QWEN, "deepstack_visual_indexes": [0], "num_position_embeddings": 16},
        },
        {"lora": _TEXT_LORA},
    ),
    "qwen3_vl_moe": (
        "Qwen3VLMoeForConditionalGeneration",
        {
            "text_config": {**_MOE, "rope_parameters": _SECTIONS},
            "vision_config": {**_EYE_QWEN, "deepstack_visual_indexes": [0], "num_position_embeddings": 16},
        },
        {"lora": _TEXT_LORA},
    ),
    "minimax_m3": (
        "MiniMaxM3SparseForConditionalGeneration",
        {
            "text_config": {
                **_HALF,
                "intermediate_size": 32,
                "dense_intermediate_size": 96,
                "shared_intermediate_size": 32,
                "rotary_dim": 8,
                "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0, "partial_rotary_factor": 0.5},
                "num_local_experts": 4,
                "num_experts_per_tok": 2,
                "index_head_dim": 16,
                "index_n_heads": 2,
                "mlp_layer_types": ["dense", "sparse"],
                "layer_types": ["full_attention", "minimax_m3_sparse"],
            },
            "vision_config": {
                "hidden_size": 32,
                "num_hidden_layers": 1,
                "num_attention_heads": 2,
                "intermediate_size": 48,
            },
        },
        {"lora": r".*language_model.*self_attn\.(q_proj|k_proj|v_proj|o_proj)", "alone": False},
    ),
    "step3p7": (
        "Step3p7ForConditionalGeneration",
        {
            "text_config": {
                **_HALF,
                "n_routed_experts": 4,
                "num_experts_per_tok": 2,
                "moe_intermediate_size": 32,
                "share_expert_dim": 48,
                "sliding_window": 64,
                "num_sliding_attention_heads": 6,
                "mlp_layer_types": ["dense", "sparse"],
                "layer_types": ["full_attention", "sliding_attention"],
                "query_pre_attn_scalar": 16,
                "rope_parameters": {
                    "full_attention": {"rope_type": "default", "rope_theta": 50000.0, "partial_rotary_factor": 0.5},
                    "sliding_attention": {"rope_type": "default", "rope_theta": 10000.0, "partial_rotary_factor": 1.0},
                },
            },
            "vision_config": _EYE,
        },
        {"lora": r".*language_model.*self_attn\.(q_proj|k_proj|v_proj|o_proj)", "alone": False},
    ),
}
assert VOCAB == 288
