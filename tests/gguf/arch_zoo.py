"""Tiny random models of every architecture of the table, made by transformers, with the numbers that llama.cpp needs."""

from __future__ import annotations

import json
from dataclasses import dataclass, field
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
        mlm: the sentence embedding is compared, not the next token.
    """

    cls: str
    config: dict[str, Any]
    tolerance: float = 1e-5
    why: str = ""
    lora: Any = "all-linear"
    parameters: tuple[str, ...] = ()
    scale: float = 0.15
    encoder: bool = False
    reads: bool = False
    extra: dict[str, Any] = field(default_factory=dict)


_EXPERTS = ("mlp.experts.gate_up_proj", "mlp.experts.down_proj")
_ATTENTION = ["q_proj", "k_proj", "v_proj", "o_proj"]

ZOO: dict[str, Tiny] = {
    "llama": Tiny("LlamaForCausalLM", _BASE, reads=True),
    "llama_tied": Tiny("LlamaForCausalLM", {**_BASE, "tie_word_embeddings": True}),
    "llama_bias": Tiny("LlamaForCausalLM", {**_BASE, "attention_bias": True, "mlp_bias": True}),
    "llama3": Tiny("LlamaForCausalLM", {**_BASE, "rope_parameters": LLAMA3}),
    "llama_linear": Tiny(
        "LlamaForCausalLM",
        {**_BASE, "rope_parameters": {"rope_type": "linear", "factor": 4.0, "rope_theta": 10000.0}},
    ),
    "mistral": Tiny("MistralForCausalLM", {**_BASE, "sliding_window": None}, reads=True),
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
    "qwen2": Tiny("Qwen2ForCausalLM", _BASE, reads=True),
    "qwen3": Tiny("Qwen3ForCausalLM", _HALF, reads=True),
    "seed_oss": Tiny("SeedOssForCausalLM", {**_HALF, "attention_bias": True, "attention_out_bias": False}),
    "gemma": Tiny("GemmaForCausalLM", {**_HALF, "tie_word_embeddings": True}, GELU, "GELU"),
    "gemma2": Tiny("Gemma2ForCausalLM", _GEMMA, GELU, "GELU", reads=True),
    "gemma3": Tiny("Gemma3ForCausalLM", _GEMMA, GELU, "GELU", reads=True),
    "phi2": Tiny("PhiForCausalLM", {**_BASE, "num_key_value_heads": 4, "partial_rotary_factor": 0.5}, GELU, "GELU"),
    "phi3": Tiny("Phi3ForCausalLM", {**_BASE, "num_key_value_heads": 4, "sliding_window": None}, reads=True),
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
    "starcoder2": Tiny("Starcoder2ForCausalLM", {**_BASE, "sliding_window": None}, GELU, "GELU", reads=True),
    "stablelm": Tiny("StableLmForCausalLM", _BASE, reads=True),
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
    "nemotron": Tiny("NemotronForCausalLM", {**_HALF, "partial_rotary_factor": 0.5}, reads=True),
    "ernie4_5": Tiny("Ernie4_5ForCausalLM", _HALF),
    "hunyuan_dense": Tiny("HunYuanDenseV1ForCausalLM", _HALF),
}


def build(folder: Path, kind: str) -> Any:
    """A random model saved in ``folder``, in float32."""
    import torch
    import transformers
    from models import randomize

    tiny = ZOO[kind]
    cls = getattr(transformers, tiny.cls)
    torch.manual_seed(0)
    model = cls(cls.config_class(**tiny.config)).float().eval()
    randomize(model, scale=tiny.scale)
    model.save_pretrained(folder)
    return model


def fake_vocab() -> None:
    """A vocabulary for models without a tokenizer, where the real reader is not wanted."""
    import sys
    import types

    from adapterkit.gguf.metadata import array, text, u32
    from adapterkit.gguf.reader import F32, I32, STRING

    def read_vocab(files: Any, config: Any, *, kind: str, rows: int, pre: str | None = None) -> Any:
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
        return types.SimpleNamespace(entries=entries, size=rows, notes=())

    module = types.ModuleType("adapterkit.gguf.vocab")
    module.read_vocab = read_vocab  # type: ignore[attr-defined]
    sys.modules["adapterkit.gguf.vocab"] = module


__all__ = ["ZOO", "Tiny", "build", "json"]
