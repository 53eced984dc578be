"""What a ``config.json`` means that leaves fields out: the defaults of the class, as transformers 5.24 fills them in.

Published models that see or hear say of their text part only what differs from its class (LLaVA 1.5, Pixtral, SmolVLM,
Qwen2-Audio, Voxtral, Gemma 3). Configs of language models are saved whole, but for the rotary base of older ones.
``tests/gguf/test_gguf_published.py`` holds both tables against transformers.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

FIELDS = {
    "layers": "num_hidden_layers",
    "width": "hidden_size",
    "inner": "intermediate_size",
    "heads": "num_attention_heads",
    "groups": "num_key_value_heads",
    "head": "head_dim",
    "context": "max_position_embeddings",
    "rms": "rms_norm_eps",
    "norm": "layer_norm_eps",
    "expert": "moe_intermediate_size",
    "used": "num_experts_per_tok",
}
_ROWS = """
llama layers=32 width=4096 inner=11008 heads=32 context=2048 rms=1e-06
mistral layers=32 width=4096 inner=14336 heads=32 groups=8 context=131072 rms=1e-06
ministral3 layers=34 width=4096 inner=14336 heads=32 groups=8 head=128 context=262144 rms=1e-05
mixtral layers=32 width=4096 inner=14336 heads=32 groups=8 context=131072 rms=1e-05 used=2
qwen2 layers=32 width=4096 inner=22016 heads=32 groups=32 context=32768 rms=1e-06
qwen3 layers=32 width=4096 inner=22016 heads=32 groups=32 head=128 context=32768 rms=1e-06
qwen3_moe layers=24 width=2048 inner=6144 heads=32 groups=4 context=32768 rms=1e-06 expert=768 used=8
gemma layers=28 width=3072 inner=24576 heads=16 groups=16 head=256 context=8192 rms=1e-06
gemma2 layers=26 width=2304 inner=9216 heads=8 groups=4 head=256 context=8192 rms=1e-06
gemma3_text layers=26 width=2304 inner=9216 heads=8 groups=4 head=256 context=131072 rms=1e-06
phi3 layers=32 width=3072 inner=8192 heads=32 context=4096 rms=1e-05
granite layers=32 width=4096 inner=11008 heads=32 context=2048 rms=1e-06
smollm3 layers=36 width=2048 inner=11008 heads=16 groups=4 context=32768 rms=1e-06
lfm2 layers=32 width=2560 inner=12288 heads=32 groups=8 context=128000
lfm2_moe layers=32 width=2048 inner=7168 heads=32 groups=8 context=128000 expert=1792 used=4
llama4_text layers=48 width=5120 inner=8192 heads=40 groups=8 head=128 context=131072 rms=1e-05 used=1
exaone4 layers=32 width=4096 inner=16384 heads=32 groups=32 context=2048 rms=1e-05
ernie4_5 layers=18 width=1024 inner=3072 heads=16 groups=2 head=128 context=131072 rms=1e-05
cohere2 layers=40 width=8192 inner=22528 heads=64 context=8192 norm=1e-05
seed_oss layers=64 width=4096 inner=27648 heads=80 groups=8 head=128 context=524288 rms=1e-06
glm4 layers=40 width=4096 inner=13696 heads=32 groups=2 head=128 context=131072 rms=1.5625e-07
glm4v_text layers=40 width=4096 inner=13696 heads=32 groups=2 context=32768 rms=1e-05
glm4v_moe_text layers=46 width=4096 inner=10944 heads=96 groups=8 context=65536 rms=1e-05 expert=1408 used=8
glm_ocr_text layers=16 width=1024 inner=4096 heads=16 groups=8 context=131072 rms=1e-05
qwen2_vl_text layers=80 width=8192 inner=29568 heads=64 groups=8 context=32768 rms=1e-05
qwen2_5_vl_text layers=80 width=8192 inner=29568 heads=64 groups=8 context=32768 rms=1e-05
qwen3_vl_text layers=32 width=4096 inner=22016 heads=32 groups=32 head=128 context=128000 rms=1e-06
qwen3_vl_moe_text layers=24 width=2048 inner=5632 heads=16 groups=16 context=128000 rms=1e-06 expert=1408 used=4
qwen3_omni_moe_text layers=28 width=2048 inner=18944 heads=28 groups=4 context=32768 rms=1e-06 expert=768 used=8
qwen3_5_text layers=32 width=4096 inner=12288 heads=16 groups=4 head=256 context=32768 rms=1e-06
qwen3_5_moe_text layers=40 width=2048 heads=16 groups=2 head=256 context=32768 rms=1e-06 expert=512 used=8
hunyuan_vl_text layers=32 width=4096 inner=11008 heads=32 context=2048 rms=1e-05
paddleocr_vl_text layers=18 width=1024 inner=3072 heads=16 groups=2 head=128 context=131072 rms=1e-05
deepseek_v2 layers=32 width=4096 inner=11008 heads=32 context=2048 rms=1e-06 expert=1407
deepseek_v3 layers=61 width=7168 inner=18432 heads=128 groups=128 context=4096 rms=1e-06 expert=2048 used=8
minimax_m3_vl_text layers=60 width=6144 inner=3072 heads=64 groups=4 head=128 context=524288 rms=1e-06 used=4
step3p5 layers=45 width=4096 inner=11264 heads=64 groups=8 head=128 context=128000 rms=1e-05 expert=1280 used=8
gemma4_text layers=30 width=2304 inner=9216 heads=8 groups=4 head=256 context=131072 rms=1e-06
"""
THETAS = {
    "apertus": 12_000_000.0,
    "bitnet": 500_000.0,
    "cohere": 500_000.0,
    "ernie4_5": 500_000.0,
    "ernie4_5_moe": 500_000.0,
    "exaone": 500_000.0,
    "gpt_oss": 150_000.0,
    "hy_v3": 11_158_840.0,
    "lfm2": 1_000_000.0,
    "lfm2_moe": 1_000_000.0,
    "llama4_text": 500_000.0,
    "minimax": 1_000_000.0,
    "minimax_m2": 5_000_000.0,
    "minimax_m3_vl_text": 5_000_000.0,
    "mixtral": 1_000_000.0,
    "nomic_bert": 1000,
    "olmo3": 500_000.0,
    "paddleocr_vl_text": 500_000.0,
    "phimoe": 1_000_000.0,
    "qwen2_5_vl_text": 1_000_000.0,
    "qwen2_vl_text": 1_000_000.0,
    "qwen3_omni_moe_text": 1_000_000.0,
    "qwen3_vl_moe_text": 500_000.0,
    "qwen3_vl_text": 500_000.0,
    "sarvam_moe": 8_000_000.0,
    "smollm3": 2_000_000.0,
    "solar_open": 1_000_000.0,
}
"""Rotary bases of model types that are not 10,000."""
_CONTEXTS = ("max_position_embeddings", "n_ctx", "n_positions", "max_length", "model_max_length", "seq_length")
_EPSILONS = ("rms_norm_eps", "norm_eps", "layer_norm_eps", "layer_norm_epsilon", "norm_epsilon")
_THETA_FIELDS = ("rope_theta", "global_rope_theta", "rope_global_theta", "rope_theta_global", "rotary_emb_base")


def of_class(model_type: str) -> dict[str, Any]:
    """The numbers that the text part of a model type has unless it says else."""
    return _TABLE.get(model_type, {})


def completed(config: Mapping[str, Any], inner: Mapping[str, Any]) -> dict[str, Any]:
    """A config with what it leaves out.

    Args:
        config: all of its fields, those of the text part before others.
        inner: the text part, where the model is more than that.
    """
    kind = str(config.get("model_type") or "")
    found = dict(config)
    of_all = of_class(kind)
    if inner:
        found |= {name: value for name, value in of_all.items() if name not in found}
    for names in (_CONTEXTS, _EPSILONS):  # what older configs leave out, and llama.cpp has no default for
        if not any(name in found for name in names):
            found |= {name: of_all[name] for name in names if name in of_all}
    ropes = (config.get("rope_parameters") or {}, config.get("rope_scaling") or {}, config)
    said = any(isinstance(one, Mapping) and any(one.get(name) is not None for name in _THETA_FIELDS) for one in ropes)
    by_kind = any(isinstance(one, Mapping) and "full_attention" in one for one in ropes[:2])
    if kind in THETAS and not said and not by_kind:
        found["rope_theta"] = THETAS[kind]
    return found


def _number(text: str) -> float | int:
    return float(text) if "." in text or "e" in text else int(text)


def _read() -> dict[str, dict[str, Any]]:
    found = {}
    for line in _ROWS.split("\n"):
        name, *words = line.split() or [""]
        if name:
            pairs = (word.split("=") for word in words)
            found[name] = {FIELDS[field]: _number(value) for field, value in pairs}
    return found


_TABLE = _read()
