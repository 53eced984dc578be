"""Tiny random models of every architecture of the table, made by transformers, with the numbers that llama.cpp needs."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

VOCAB = 288
GELU = 5e-3  # ggml computes GELU by a table in half precision

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
_GEMMA = {**_HALF, "query_pre_attn_scalar": 16, "sliding_window": 64, "tie_word_embeddings": True}
_MOE = {**_HALF, "num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 32, "norm_topk_prob": True}
LLAMA3 = {
    "rope_type": "llama3",
    "rope_theta": 10000.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,
}


def as_llama_cpp_has_phimoe(model: Any) -> None:
    """The two largest of a softmax in the place of the sparse mixer, and RMS norms in the place of layer norms."""
    import torch

    def route(self: Any, hidden: Any) -> Any:
        logits = torch.nn.functional.linear(hidden, self.weight)
        weights, chosen = logits.softmax(-1).topk(self.top_k, -1)
        return logits, weights / weights.sum(-1, keepdim=True), chosen

    def norm(self: Any, x: Any) -> Any:
        return torch.nn.functional.rms_norm(x, self.normalized_shape, self.weight, self.eps) + self.bias

    for module in model.modules():
        if type(module).__name__ == "PhimoeTopKRouter":
            module.forward = route.__get__(module)
        elif isinstance(module, torch.nn.LayerNorm):
            module.forward = norm.__get__(module)


@dataclass(frozen=True)
class Tiny:
    """One model of the sweep.

    Attributes:
        cls: of transformers.
        config: what differs from its config's defaults.
        tolerance: of log-probabilities.
        why: what is different when more than rounding is.
        lora: module leaves (or ``all-linear``) that an adapter changes.
        parameters: ``target_parameters`` beside them.
        scale: of the random weights.
        alone: whether transformers has a class for the text part by itself.
        reads: what of the config is at its default for transformers' GGUF reader; none if it knows no such architecture.
    """

    cls: str
    config: dict[str, Any]
    tolerance: float = 1e-5
    why: str = ""
    lora: Any = "all-linear"
    parameters: tuple[str, ...] = ()
    scale: float = 0.15
    encoder: bool = False
    reads: dict[str, Any] | None = None
    patch: Any = None
    alone: bool = True


_EXPERTS = ("mlp.experts.gate_up_proj", "mlp.experts.down_proj")
_ATTENTION = ["q_proj", "k_proj", "v_proj", "o_proj"]

_MLA = {
    **{k: v for k, v in _BASE.items() if k != "num_key_value_heads"},
    "num_key_value_heads": 4,
    "q_lora_rank": 24,
    "kv_lora_rank": 32,
    "qk_nope_head_dim": 16,
    "qk_rope_head_dim": 8,
    "v_head_dim": 16,
    "n_routed_experts": 4,
    "num_experts_per_tok": 2,
    "n_shared_experts": 1,
    "moe_intermediate_size": 32,
    "first_k_dense_replace": 1,
    "routed_scaling_factor": 1.5,
    "norm_topk_prob": True,
}
_MLA_LORA = ["q_a_proj", "q_b_proj", "kv_a_proj_with_mqa", "kv_b_proj", "o_proj"]
_NO_KV = {k: v for k, v in _BASE.items() if k != "num_key_value_heads"}
_GPT2 = {"n_embd": 64, "n_head": 4, "n_layer": 2, "vocab_size": VOCAB, "n_positions": 128, "bos_token_id": 1}
_FALCON = {
    "vocab_size": VOCAB,
    "hidden_size": 64,
    "num_attention_heads": 4,
    "num_hidden_layers": 2,
    "alibi": False,
    "bias": False,
    "parallel_attn": True,
}

_LINEAR = {
    **_HALF,
    "linear_num_key_heads": 2,
    "linear_num_value_heads": 4,
    "linear_key_head_dim": 16,
    "linear_value_head_dim": 16,
    "layer_types": ["linear_attention", "full_attention"],
}
_MROPE = {
    "rope_parameters": {
        "rope_type": "default",
        "rope_theta": 10000.0,
        "partial_rotary_factor": 0.5,
        "mrope_section": [2, 1, 1],
    }
}
_NEXT_MOE = {
    "num_experts": 4,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 32,
    "shared_expert_intermediate_size": 32,
}
_LINEAR_LORA = [*_ATTENTION, "in_proj_qkvz", "in_proj_qkv", "in_proj_z", "in_proj_a", "in_proj_ba", "out_proj"]
_SSM = {"mamba_n_heads": 8, "mamba_d_head": 16, "mamba_n_groups": 1, "mamba_d_state": 16, "mamba_expand": 2}

ZOO: dict[str, Tiny] = {
    "llama": Tiny("LlamaForCausalLM", _BASE, reads={}),
    "llama_tied": Tiny("LlamaForCausalLM", {**_BASE, "tie_word_embeddings": True}),
    "llama_bias": Tiny("LlamaForCausalLM", {**_BASE, "attention_bias": True, "mlp_bias": True}),
    "llama3": Tiny("LlamaForCausalLM", {**_BASE, "rope_parameters": LLAMA3}),
    "llama_linear": Tiny(
        "LlamaForCausalLM",
        {**_BASE, "rope_parameters": {"rope_type": "linear", "factor": 4.0, "rope_theta": 10000.0}},
    ),
    "mistral": Tiny("MistralForCausalLM", {**_BASE, "sliding_window": None}, reads={}),
    "ministral3": Tiny(
        "Ministral3ForCausalLM",
        {
            **_HALF,
            "sliding_window": None,
            "rope_parameters": {
                "rope_type": "yarn",
                "rope_theta": 1e6,
                "factor": 4.0,
                "original_max_position_embeddings": 32,
                "beta_fast": 32.0,
                "beta_slow": 1.0,
                "mscale": 1.0,
                "mscale_all_dim": 1.0,
                "llama_4_scaling_beta": 0.1,
            },
        },
    ),
    "smollm3": Tiny("SmolLM3ForCausalLM", _BASE),
    "granite": Tiny(
        "GraniteForCausalLM",
        {
            **_BASE,
            "attention_multiplier": 0.2,
            "embedding_multiplier": 1.5,
            "residual_multiplier": 0.7,
            "logits_scaling": 2.0,
        },
    ),
    "qwen2": Tiny("Qwen2ForCausalLM", _BASE, reads={}),
    "qwen3": Tiny("Qwen3ForCausalLM", _HALF, reads={"head_dim": 128}),
    "seed_oss": Tiny("SeedOssForCausalLM", {**_HALF, "attention_bias": True, "attention_out_bias": False}),
    "gemma": Tiny("GemmaForCausalLM", {**_HALF, "tie_word_embeddings": True}, GELU, "GELU"),
    "gemma2": Tiny("Gemma2ForCausalLM", _GEMMA, GELU, "GELU", reads={"query_pre_attn_scalar": 256, "head_dim": 256}),
    "gemma3": Tiny("Gemma3ForCausalLM", _GEMMA, GELU, "GELU", reads={"query_pre_attn_scalar": 256, "head_dim": 256}),
    "gemma3n": Tiny(
        "Gemma3nForCausalLM",
        {
            **_GEMMA,
            "num_hidden_layers": 5,
            "vocab_size_per_layer_input": VOCAB,
            "hidden_size_per_layer_input": 256,
            "num_kv_shared_layers": 0,
            "laurel_rank": 64,
            "layer_types": ["sliding_attention"] * 4 + ["full_attention"],
            "activation_sparsity_pattern": [0.95] * 5,
        },
        GELU,
        "GELU",
        scale=0.1,
        lora=["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"],
    ),
    "gemma4": Tiny(
        "Gemma4ForCausalLM",
        {
            **_GEMMA,
            "num_hidden_layers": 6,
            "global_head_dim": 32,
            "vocab_size_per_layer_input": VOCAB,
            "hidden_size_per_layer_input": 16,
            "num_kv_shared_layers": 2,
            "layer_types": ["sliding_attention", "full_attention"] * 3,
        },
        GELU,
        "GELU",
        lora=["q_proj", "o_proj", "gate_proj", "up_proj", "down_proj"],
        reads={},
    ),
    "gemma4_moe": Tiny(
        "Gemma4ForCausalLM",
        {
            **_GEMMA,
            "num_hidden_layers": 4,
            "global_head_dim": 32,
            "num_global_key_value_heads": 1,
            "attention_k_eq_v": True,
            "vocab_size_per_layer_input": VOCAB,
            "hidden_size_per_layer_input": 0,
            "num_kv_shared_layers": 0,
            "enable_moe_block": True,
            "num_experts": 4,
            "top_k_experts": 2,
            "moe_intermediate_size": 32,
            "layer_types": ["sliding_attention", "sliding_attention", "sliding_attention", "full_attention"],
        },
        GELU,
        "GELU",
        lora=["q_proj", "o_proj", "gate_proj", "up_proj", "down_proj"],
        parameters=("experts.gate_up_proj", "experts.down_proj"),
        reads={},
    ),
    "phi2": Tiny("PhiForCausalLM", {**_BASE, "num_key_value_heads": 4, "partial_rotary_factor": 0.5}, GELU, "GELU"),
    "phi3": Tiny(
        "Phi3ForCausalLM", {**_BASE, "num_key_value_heads": 4, "sliding_window": None}, reads={"vocab_size": 32064}
    ),
    "phi3_longrope": Tiny(
        "Phi3ForCausalLM",
        {
            **_BASE,
            "num_key_value_heads": 4,
            "sliding_window": None,
            "max_position_embeddings": 1024,
            "original_max_position_embeddings": 256,
            "rope_parameters": {
                "rope_type": "longrope",
                "rope_theta": 10000.0,
                "original_max_position_embeddings": 256,
                "short_factor": [1.0 + i / 16 for i in range(8)],
                "long_factor": [2.0 + i for i in range(8)],
            },
        },
    ),
    "starcoder2": Tiny("Starcoder2ForCausalLM", {**_BASE, "sliding_window": None}, GELU, "GELU", reads={}),
    "stablelm": Tiny("StableLmForCausalLM", _BASE, reads={}),
    "stablelm2": Tiny(
        "StableLmForCausalLM", {**_BASE, "qk_layernorm": True, "use_parallel_residual": True, "use_qkv_bias": True}
    ),
    "olmo": Tiny("OlmoForCausalLM", {**_BASE, "clip_qkv": 8.0}),
    "olmo2": Tiny("Olmo2ForCausalLM", _BASE),
    "olmo3": Tiny("Olmo3ForCausalLM", {**_BASE, "num_hidden_layers": 4, "sliding_window": 64}),
    "cohere": Tiny("CohereForCausalLM", {**_BASE, "tie_word_embeddings": True, "use_qk_norm": False}),
    "cohere2": Tiny(
        "Cohere2ForCausalLM", {**_HALF, "num_hidden_layers": 4, "tie_word_embeddings": True, "sliding_window": 64}
    ),
    "glm4": Tiny("Glm4ForCausalLM", _HALF),
    "exaone4": Tiny("Exaone4ForCausalLM", {**_HALF, "sliding_window": None, "layer_types": ["full_attention"] * 2}),
    "nemotron": Tiny("NemotronForCausalLM", {**_HALF, "partial_rotary_factor": 0.5}, reads={}),
    "ernie4_5": Tiny("Ernie4_5ForCausalLM", _HALF),
    "hunyuan_dense": Tiny("HunYuanDenseV1ForCausalLM", _HALF),
    "mixtral": Tiny(
        "MixtralForCausalLM",
        {**_BASE, "num_local_experts": 4, "num_experts_per_tok": 2},
        lora=_ATTENTION,
        parameters=_EXPERTS,
    ),
    "qwen2_moe": Tiny(
        "Qwen2MoeForCausalLM",
        {
            **_BASE,
            "num_experts": 4,
            "num_experts_per_tok": 2,
            "moe_intermediate_size": 32,
            "shared_expert_intermediate_size": 48,
        },
        lora=_ATTENTION,
        parameters=_EXPERTS,
        reads={"moe_intermediate_size": 1408, "shared_expert_intermediate_size": 5632},
    ),
    "qwen3_moe": Tiny(
        "Qwen3MoeForCausalLM", _MOE, lora=_ATTENTION, parameters=_EXPERTS, reads={"moe_intermediate_size": 768}
    ),
    "phimoe": Tiny(
        "PhimoeForCausalLM",
        {**_BASE, "num_local_experts": 4, "num_experts_per_tok": 2, "attention_bias": True, "lm_head_bias": True},
        why="llama.cpp has a softmax for the sparse mixer and RMS norms for layer norms; compared with that",
        lora=_ATTENTION,
        parameters=_EXPERTS,
        patch=as_llama_cpp_has_phimoe,
    ),
    "olmoe": Tiny(
        "OlmoeForCausalLM",
        {**_BASE, "num_experts": 4, "num_experts_per_tok": 2, "num_key_value_heads": 4},
        lora=_ATTENTION,
        parameters=_EXPERTS,
    ),
    "granitemoe": Tiny(
        "GraniteMoeForCausalLM",
        {**_BASE, "num_local_experts": 4, "num_experts_per_tok": 2, "attention_multiplier": 0.2},
        lora=_ATTENTION,
    ),
    "granitemoeshared": Tiny(
        "GraniteMoeSharedForCausalLM",
        {
            **_BASE,
            "num_local_experts": 4,
            "num_experts_per_tok": 2,
            "attention_multiplier": 0.2,
            "shared_intermediate_size": 48,
        },
        lora=_ATTENTION,
    ),
    "deepseek_v2": Tiny(
        "DeepseekV2ForCausalLM",
        {**_MLA, "topk_method": "greedy", "norm_topk_prob": False},
        lora=_MLA_LORA,
        parameters=_EXPERTS,
    ),
    "deepseek_v2_lite": Tiny(
        "DeepseekV2ForCausalLM",
        {**_MLA, "topk_method": "greedy", "norm_topk_prob": False, "q_lora_rank": None, "num_hidden_layers": 26},
        lora=["q_proj", "kv_a_proj_with_mqa", "kv_b_proj", "o_proj"],
        parameters=_EXPERTS,
    ),
    "deepseek_v3": Tiny(
        "DeepseekV3ForCausalLM",
        {**_MLA, "n_group": 2, "topk_group": 1, "n_routed_experts": 8},
        lora=_MLA_LORA,
        parameters=_EXPERTS,
    ),
    "glm4_moe": Tiny(
        "Glm4MoeForCausalLM",
        {
            **_HALF,
            "n_routed_experts": 4,
            "num_experts_per_tok": 2,
            "moe_intermediate_size": 32,
            "n_shared_experts": 1,
            "first_k_dense_replace": 1,
            "n_group": 1,
            "topk_group": 1,
            "use_qk_norm": True,
        },
        lora=_ATTENTION,
        parameters=_EXPERTS,
    ),
    "gpt_oss": Tiny(
        "GptOssForCausalLM",
        {**_HALF, "num_local_experts": 4, "num_experts_per_tok": 2, "sliding_window": 64},
        lora=_ATTENTION,
        parameters=_EXPERTS,
        scale=0.1,
        reads={},
    ),
    "llama4": Tiny(
        "Llama4ForCausalLM",
        {
            **_HALF,
            "intermediate_size_mlp": 128,
            "num_local_experts": 4,
            "num_experts_per_tok": 1,
            "interleave_moe_layer_step": 2,
            "num_hidden_layers": 4,
            "attention_chunk_size": 8192,
        },
        lora=_ATTENTION,
        parameters=("feed_forward.experts.gate_up_proj", "feed_forward.experts.down_proj"),
    ),
    "ernie4_5_moe": Tiny(
        "Ernie4_5_MoeForCausalLM",
        {
            **_HALF,
            "moe_num_experts": 4,
            "moe_k": 2,
            "moe_intermediate_size": 32,
            "moe_num_shared_experts": 1,
            "moe_layer_start_index": 1,
            "moe_layer_end_index": 1,
            "moe_layer_interval": 1,
        },
        lora=_ATTENTION,
        parameters=_EXPERTS,
    ),
    "hunyuan_moe": Tiny(
        "HunYuanMoEV1ForCausalLM",
        {**_HALF, "num_experts": 4, "moe_topk": 2},
        lora=_ATTENTION,
        parameters=_EXPERTS,
    ),
    "gpt2": Tiny("GPT2LMHeadModel", _GPT2, GELU, "GELU", reads={"n_positions": 1024}),
    "starcoder": Tiny("GPTBigCodeForCausalLM", {**_GPT2, "multi_query": True}, GELU, "GELU"),
    "gpt_neox": Tiny("GPTNeoXForCausalLM", {**_NO_KV, "use_parallel_residual": True}, GELU, "GELU"),
    "gpt_neox_serial": Tiny("GPTNeoXForCausalLM", {**_NO_KV, "use_parallel_residual": False}, GELU, "GELU"),
    "bloom": Tiny(
        "BloomForCausalLM", {"vocab_size": VOCAB, "hidden_size": 64, "n_head": 4, "n_layer": 2}, GELU, "GELU", reads={}
    ),
    "falcon": Tiny(
        "FalconForCausalLM",
        {**_FALCON, "multi_query": True, "new_decoder_architecture": False},
        GELU,
        "GELU",
        reads={},
    ),
    "falcon40b": Tiny(
        "FalconForCausalLM", {**_FALCON, "new_decoder_architecture": True, "num_kv_heads": 2}, GELU, "GELU"
    ),
    "mpt": Tiny(
        "MptForCausalLM",
        {"vocab_size": VOCAB, "d_model": 64, "n_heads": 4, "n_layers": 2, "max_seq_len": 128},
        GELU,
        "GELU",
    ),
    "qwen3_next": Tiny(
        "Qwen3NextForCausalLM", {**_LINEAR, **_NEXT_MOE}, lora=_LINEAR_LORA, parameters=_EXPERTS, scale=0.1
    ),
    "qwen3_5": Tiny("Qwen3_5ForCausalLM", {**_LINEAR, **_MROPE}, lora=_LINEAR_LORA),
    "qwen3_5_moe": Tiny(
        "Qwen3_5MoeForCausalLM", {**_LINEAR, **_MROPE, **_NEXT_MOE}, lora=_LINEAR_LORA, parameters=_EXPERTS
    ),
    "lfm2": Tiny(
        "Lfm2ForCausalLM",
        {**_BASE, "layer_types": ["conv", "full_attention"], "block_auto_adjust_ff_dim": False},
        reads={},
    ),
    "mamba": Tiny(
        "MambaForCausalLM",
        {"vocab_size": VOCAB, "hidden_size": 64, "num_hidden_layers": 2, "state_size": 8},
        lora=["in_proj", "x_proj"],
        scale=0.4,
        reads={},
    ),
    # Its B, C and dt are normalised with an epsilon of their own, for which llama.cpp takes that of the layers.
    "falcon_mamba": Tiny(
        "FalconMambaForCausalLM",
        {"vocab_size": VOCAB, "hidden_size": 64, "num_hidden_layers": 2, "state_size": 8, "mixer_rms_eps": 1e-5},
        lora=["in_proj", "x_proj"],
    ),
    "mamba2": Tiny(
        "Mamba2ForCausalLM",
        {
            "vocab_size": VOCAB,
            "hidden_size": 64,
            "num_hidden_layers": 2,
            "state_size": 16,
            "num_heads": 8,
            "head_dim": 16,
            "n_groups": 2,
            "expand": 2,
        },
        lora=["in_proj"],
    ),
    "jamba": Tiny(
        "JambaForCausalLM",
        {
            **_BASE,
            "attn_layer_period": 2,
            "attn_layer_offset": 1,
            "expert_layer_period": 2,
            "expert_layer_offset": 1,
            "num_experts": 2,
            "mamba_d_state": 8,
            "use_mamba_kernels": False,
        },
        lora=[*_ATTENTION, "in_proj", "x_proj"],
    ),
    "falcon_h1": Tiny(
        "FalconH1ForCausalLM",
        {
            **_HALF,
            **_SSM,
            "mamba_d_ssm": 128,
            "mamba_rms_norm": True,
            "mamba_norm_before_gate": False,
            "attention_in_multiplier": 0.8,
            "attention_out_multiplier": 1.2,
            "key_multiplier": 0.7,
            "ssm_in_multiplier": 1.1,
            "ssm_out_multiplier": 0.9,
            "mlp_multipliers": [1.3, 0.6],
            "ssm_multipliers": [0.9, 1.1, 0.8, 1.2, 1.05],
            "lm_head_multiplier": 0.5,
            "embedding_multiplier": 1.5,
        },
        lora=[*_ATTENTION, "in_proj", "gate_proj", "up_proj", "down_proj"],
    ),
    "granite_hybrid": Tiny(
        "GraniteMoeHybridForCausalLM",
        {
            **_BASE,
            **_SSM,
            "layer_types": ["mamba", "attention"],
            "num_local_experts": 4,
            "num_experts_per_tok": 2,
            "shared_intermediate_size": 48,
            "attention_multiplier": 0.2,
            "position_embedding_type": "nope",
        },
        lora=[*_ATTENTION, "in_proj"],
    ),
    "granite_hybrid_dense": Tiny(
        "GraniteMoeHybridForCausalLM",
        {
            **_BASE,
            **_SSM,
            "layer_types": ["mamba", "attention"],
            "num_local_experts": 0,
            "num_experts_per_tok": 0,
            "shared_intermediate_size": 96,
            "attention_multiplier": 0.2,
            "position_embedding_type": "nope",
        },
        lora=[*_ATTENTION, "in_proj", "input_linear", "output_linear"],
    ),
    "granite4_micro": Tiny(
        "GraniteMoeHybridForCausalLM",
        {
            **_BASE,
            **_SSM,
            "layer_types": ["attention", "attention"],
            "num_local_experts": 0,
            "num_experts_per_tok": 0,
            "shared_intermediate_size": 96,
            "attention_multiplier": 0.2,
            "position_embedding_type": "rope",
        },
        lora=[*_ATTENTION, "input_linear", "output_linear"],
    ),
}


def _more() -> dict[str, Tiny]:
    import arch_zoo_more
    import arch_zoo_wholes

    models = arch_zoo_more.MODELS | arch_zoo_wholes.MODELS
    return {kind: Tiny(cls, config, **fields) for kind, (cls, config, fields) in models.items()}


ZOO |= _more()


# Encoders: hidden states of all tokens, pooled by their mean, are compared.
ENCODERS: dict[str, Tiny] = {
    "bert": Tiny("BertModel", _NO_KV, GELU, "GELU", lora=r".*(query|value|intermediate\.dense)"),
    "roberta": Tiny("RobertaModel", {**_NO_KV, "max_position_embeddings": 130}, GELU, "GELU", lora=["query", "value"]),
    "xlm_roberta": Tiny(
        "XLMRobertaModel", {**_NO_KV, "max_position_embeddings": 130}, GELU, "GELU", lora=r".*(key|output\.dense)"
    ),
    "distilbert": Tiny(
        "DistilBertModel",
        {"vocab_size": VOCAB, "dim": 64, "n_heads": 4, "n_layers": 2, "hidden_dim": 96, "max_position_embeddings": 128},
        GELU,
        "GELU",
        lora=["q_lin", "v_lin"],
    ),
    "modernbert": Tiny(
        "ModernBertModel",
        {
            **_NO_KV,
            "local_attention": 64,
            "global_attn_every_n_layers": 3,
            "num_hidden_layers": 3,
            "cls_token_id": 1,
            "sep_token_id": 2,
        },
        GELU,
        "GELU",
        lora=["Wqkv", "Wo"],
    ),
    "nomic_bert": Tiny(
        "NomicBertModel",
        {
            **{k: v for k, v in _BASE.items() if k not in ("num_key_value_heads", "tie_word_embeddings")},
            "head_dim": 16,
        },
        lora=["q_proj", "down_proj"],
    ),
    "eurobert": Tiny("EuroBertModel", _HALF, lora=["q_proj", "down_proj"]),
    "t5_encoder": Tiny(
        "T5EncoderModel",
        {"vocab_size": VOCAB, "d_model": 64, "d_kv": 16, "d_ff": 96, "num_layers": 2, "num_heads": 4},
        lora=["q", "v", "wo"],
    ),
}


def build(folder: Path, kind: str) -> Any:
    """A random model saved in ``folder``, in float32."""
    import torch
    import transformers
    from models import randomize

    tiny = (ZOO | ENCODERS | ZOO_HIDDEN)[kind]
    cls = getattr(transformers, tiny.cls)
    torch.manual_seed(0)
    model = cls(cls.config_class(**tiny.config)).float().eval()
    randomize(model, scale=tiny.scale)
    model.save_pretrained(folder)
    if tiny.patch is not None:
        tiny.patch(model)
    return model


def read_vocab(files: Any, config: Any, *, kind: str, rows: int, pre: str | None = None) -> Any:
    """A vocabulary of numbered tokens in the place of `adapterkit.gguf.vocab.read_vocab`: these models have none."""
    from adapterkit.gguf.metadata import array, text, u32
    from adapterkit.gguf.reader import F32, I32, STRING
    from adapterkit.gguf.vocab import Vocab

    tokens = ["<unk>", "<s>", "</s>"] + [f"t{number}" for number in range(rows - 3)]
    entries = (
        text("tokenizer.ggml.model", "llama"),
        array("tokenizer.ggml.tokens", STRING, tokens),
        array("tokenizer.ggml.scores", F32, [float(-number) for number in range(rows)]),
        array("tokenizer.ggml.token_type", I32, [2, 3, 3] + [1] * (rows - 3)),
        u32("tokenizer.ggml.unknown_token_id", 0),
        u32("tokenizer.ggml.bos_token_id", 1),
        u32("tokenizer.ggml.eos_token_id", 2),
    )
    types = config.get("type_vocab_size")
    more = (u32("tokenizer.ggml.token_type_count", types or 1),) if "bert" in str(config.get("model_type")) else ()
    return Vocab((*entries, *more), rows)


# ------------------------------------------------------------------ architectures that only their own code can run


def disguise(kind: str, folder: Path) -> Any:
    """A checkpoint of an architecture without a class in transformers, that computes what a known one computes.

    The tensors of a model that transformers has are given the names and the layout of the other's module tree.
    """
    import json

    import torch
    from models import read_tensors
    from safetensors.torch import save_file

    base, change, given = DISGUISES[kind]
    config = dict(given)
    model = build(folder, base)
    found: dict[str, Any] = {}
    layers: dict[str, dict[str, Any]] = {}
    for name, tensor in read_tensors(folder).items():
        if ".layers." in name:
            layer, _, stem = name.removeprefix("model.layers.").partition(".")
            layers.setdefault(layer, {})[stem] = tensor
        else:
            found[name] = tensor
    for layer, tensors in layers.items():
        found |= {name.replace("{i}", layer): tensor for name, tensor in change(tensors, torch).items()}
    renamed = {"model.embed_tokens.weight": config.pop("embed", None), "model.norm.weight": config.pop("norm", None)}
    renamed["lm_head.weight"] = config.pop("head", None)
    stored = {renamed.get(name) or name: tensor.contiguous() for name, tensor in found.items()}
    (folder / "model.safetensors").unlink()
    save_file(stored, folder / "model.safetensors", metadata={"format": "pt"})
    said = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**said, **config}))
    return model


def _baichuan(tensors: dict[str, Any], torch: Any) -> dict[str, Any]:
    parts = [tensors.pop(f"self_attn.{one}_proj.weight") for one in "qkv"]
    return {f"model.layers.{{i}}.{k}": v for k, v in {**tensors, "self_attn.W_pack.weight": torch.cat(parts)}.items()}


def _internlm2(tensors: dict[str, Any], torch: Any) -> dict[str, Any]:
    q, k, v = (tensors.pop(f"self_attn.{one}_proj.weight").view(-1, 16, 64) for one in "qkv")
    groups = [torch.cat((q[2 * g : 2 * g + 2], k[g : g + 1], v[g : g + 1])) for g in range(2)]
    names = {
        "input_layernorm": "attention_norm",
        "post_attention_layernorm": "ffn_norm",
        "self_attn.o_proj": "attention.wo",
        "mlp.gate_proj": "feed_forward.w1",
        "mlp.up_proj": "feed_forward.w3",
        "mlp.down_proj": "feed_forward.w2",
    }
    found = {f"model.layers.{{i}}.{names[k.removesuffix('.weight')]}.weight": v for k, v in tensors.items()}
    return {**found, "model.layers.{i}.attention.wqkv.weight": torch.cat(groups).reshape(-1, 64)}


def _exaone(tensors: dict[str, Any], torch: Any) -> dict[str, Any]:
    names = {
        "input_layernorm": "ln_1",
        "post_attention_layernorm": "ln_2",
        "self_attn.q_proj": "attn.attention.q_proj",
        "self_attn.k_proj": "attn.attention.k_proj",
        "self_attn.v_proj": "attn.attention.v_proj",
        "self_attn.o_proj": "attn.attention.out_proj",
        "mlp.gate_proj": "mlp.c_fc_0",
        "mlp.up_proj": "mlp.c_fc_1",
        "mlp.down_proj": "mlp.c_proj",
    }
    return {f"transformer.h.{{i}}.{names[k.removesuffix('.weight')]}.weight": v for k, v in tensors.items()}


def _same(tensors: dict[str, Any], torch: Any) -> dict[str, Any]:
    return {f"model.layers.{{i}}.{name}": tensor for name, tensor in tensors.items()}


def _ernie_fused(tensors: dict[str, Any], torch: Any) -> dict[str, Any]:
    parts = [tensors.pop(f"self_attn.{one}_proj.weight") for one in "qkv"]
    both = [tensors.pop(f"mlp.{one}_proj.weight") for one in ("gate", "up")]
    fused = {"self_attn.qkv_proj.weight": torch.cat(parts), "mlp.up_gate_proj.weight": torch.cat(both)}
    return _same({**tensors, **fused}, torch)


def _renamed(names: dict[str, str], at: str, fused: dict[str, tuple[str, ...]]) -> Any:
    """Layers under other names (``at``), several tensors of one layer below each other in one (``fused``)."""

    def change(tensors: dict[str, Any], torch: Any) -> dict[str, Any]:
        found = {}
        for new, olds in fused.items():
            for end in ("weight", "bias"):
                if f"{olds[0]}.{end}" in tensors:
                    found[f"{at}{new}.{end}"] = torch.cat([tensors.pop(f"{old}.{end}") for old in olds])
        for name, tensor in tensors.items():
            stem, _, end = name.rpartition(".")
            new = names.get(stem, names.get(name))
            found[at + (f"{new}.{end}" if stem in names else new or name)] = tensor
        return found

    return change


_QKV = ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj")
ZOO_HIDDEN = {
    "llama_attention_bias": Tiny("LlamaForCausalLM", {**_BASE, "attention_bias": True}),
    "qwen2_mha": Tiny("Qwen2ForCausalLM", {**_BASE, "num_key_value_heads": 4}),
    # llama.cpp tells Baichuan 7B by its 32 layers.
    "llama_mha": Tiny("LlamaForCausalLM", {**_BASE, "num_key_value_heads": 4, "num_hidden_layers": 32}),
    "granite_as_minicpm": Tiny(
        "GraniteForCausalLM",
        {
            **_BASE,
            "attention_multiplier": 0.25,
            "embedding_multiplier": 12.0,
            "residual_multiplier": 1.4 / 2**0.5,
            "logits_scaling": 4.0,
        },
    ),
}
DISGUISES: dict[str, tuple[str, Any, dict[str, Any]]] = {
    "baichuan": ("llama_mha", _baichuan, {"architectures": ["BaichuanForCausalLM"], "model_type": "baichuan"}),
    "internlm2": (
        "llama",
        _internlm2,
        {
            "architectures": ["InternLM2ForCausalLM"],
            "model_type": "internlm2",
            "embed": "model.tok_embeddings.weight",
            "head": "output.weight",
        },
    ),
    "internlm3": ("llama", _same, {"architectures": ["InternLM3ForCausalLM"], "model_type": "internlm3"}),
    "exaone": (
        "llama",
        _exaone,
        {
            "architectures": ["ExaoneForCausalLM"],
            "model_type": "exaone",
            "embed": "transformer.wte.weight",
            "norm": "transformer.ln_f.weight",
        },
    ),
    "minicpm": (
        "granite_as_minicpm",
        _same,
        {
            "architectures": ["MiniCPMForCausalLM"],
            "model_type": "minicpm",
            "scale_emb": 12,
            "scale_depth": 1.4,
            "dim_model_base": 16,
        },
    ),
    "ernie4_5_fused": ("ernie4_5", _ernie_fused, {}),
    "chatglm": (
        "glm",
        _renamed(
            {
                "self_attn.o_proj": "self_attention.dense",
                "mlp.gate_up_proj": "mlp.dense_h_to_4h",
                "mlp.down_proj": "mlp.dense_4h_to_h",
            },
            "transformer.encoder.layers.{i}.",
            {"self_attention.query_key_value": _QKV},
        ),
        {
            "architectures": ["ChatGLMModel"],
            "model_type": "chatglm",
            "embed": "transformer.embedding.word_embeddings.weight",
            "norm": "transformer.encoder.final_layernorm.weight",
            "head": "transformer.output_layer.weight",
            "multi_query_attention": True,
            "multi_query_group_num": 2,
            "layernorm_epsilon": 1.5625e-07,
            "ffn_hidden_size": 96,
            "kv_channels": 16,
        },
    ),
    "qwen": (
        "qwen2_mha",
        _renamed(
            {
                "input_layernorm": "ln_1",
                "post_attention_layernorm": "ln_2",
                "self_attn.o_proj": "attn.c_proj",
                "mlp.up_proj": "mlp.w1",
                "mlp.gate_proj": "mlp.w2",
                "mlp.down_proj": "mlp.c_proj",
            },
            "transformer.h.{i}.",
            {"attn.c_attn": _QKV},
        ),
        {
            "architectures": ["QWenLMHeadModel"],
            "model_type": "qwen",
            "embed": "transformer.wte.weight",
            "norm": "transformer.ln_f.weight",
            "intermediate_size": 192,  # of both halves together
            "layer_norm_epsilon": 1e-6,
        },
    ),
    "bailing_moe_v2": (
        "glm4_moe",
        _renamed(
            {
                "self_attn.o_proj": "attention.dense",
                "self_attn.q_norm": "attention.query_layernorm",
                "self_attn.k_norm": "attention.key_layernorm",
                "mlp.gate.e_score_correction_bias": "mlp.gate.expert_bias",
            },
            "model.layers.{i}.",
            {"attention.query_key_value": _QKV},
        ),
        {
            "architectures": ["BailingMoeV2ForCausalLM"],
            "model_type": "bailing_moe_v2",
            "embed": "model.word_embeddings.weight",
            "num_shared_experts": 1,
            "num_experts": 4,
            "score_function": "sigmoid",
        },
    ),
    "deci": (
        "llama",
        _same,
        {
            "architectures": ["DeciLMForCausalLM"],
            "model_type": "nemotron-nas",
            "block_configs": [
                {
                    "attention": {"n_heads_in_group": 2, "replace_with_linear": False, "no_op": False},
                    "ffn": {"intermediate_size": 96},
                }
            ]
            * 2,
        },
    ),
    "minimax_text_01": (
        "minimax",
        _same,
        {
            "architectures": ["MiniMaxText01ForCausalLM"],
            "model_type": "minimax_text_01",
            "attn_type_list": [0, 1],
            "layer_types": None,
            "rotary_dim": 16,
            "postnorm": True,
            **{f"layernorm_{one}_alpha": 1.5 for one in ("full_attention", "linear_attention", "mlp")},
            **{f"layernorm_{one}_beta": 1.0 for one in ("full_attention", "linear_attention", "mlp")},
            **dict.fromkeys(("full_attn_alpha_factor", "linear_attn_alpha_factor", "mlp_alpha_factor")),
        },
    ),
    "iquest": ("llama", _same, {"architectures": ["IQuestCoderForCausalLM"], "model_type": "iquestcoder"}),
    "pangu": (
        "llama_attention_bias",
        _same,
        {"architectures": ["PanguEmbeddedForCausalLM"], "model_type": "PanguEmbedded"},
    ),
}
