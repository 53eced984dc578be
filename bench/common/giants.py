"""Models too large for this machine, as sparse files: real headers, configs and shapes, no data on the disk.

What is read from a sparse file is zeros, so plans, parts, sizes and times of headers are real, and values are not.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

Shape = tuple[int, ...]
Tensors = dict[str, tuple[str, Shape]]  # name: dtype code, shape

WIDTH = {"F32": 4, "BF16": 2, "F16": 2, "F8_E4M3": 1}
SHARD = 5_000_000_000  # bytes of a file, at most
RANK = 16


def sparse(path: Path, tensors: Tensors) -> None:
    """A safetensors file of zeros that takes no room."""
    entries: dict[str, object] = {"__metadata__": {"format": "pt"}}
    position = 0
    for name, (code, shape) in tensors.items():
        end = position + nbytes(code, shape)
        entries[name] = {"dtype": code, "shape": list(shape), "data_offsets": [position, end]}
        position = end
    header = json.dumps(entries, separators=(",", ":")).encode()
    header += b" " * (-len(header) % 8)
    with open(path, "wb") as file:
        file.write(len(header).to_bytes(8, "little") + header)
        file.truncate(8 + len(header) + position)


def nbytes(code: str, shape: Shape) -> int:
    """Bytes of a tensor."""
    found = WIDTH[code]
    for size in shape:
        found *= size
    return found


def llama_405b() -> tuple[dict[str, Any], Tensors, dict[str, Shape]]:
    """Llama-3.1-405B in bfloat16: config, tensors, and the (out, in) of what a LoRA on all linear layers adapts."""
    layers, hidden, ffn, heads, kv_heads, vocab = 126, 16384, 53248, 128, 8, 128256
    kv = hidden // heads * kv_heads
    linear = {
        "self_attn.q_proj": (hidden, hidden),
        "self_attn.k_proj": (kv, hidden),
        "self_attn.v_proj": (kv, hidden),
        "self_attn.o_proj": (hidden, hidden),
        "mlp.gate_proj": (ffn, hidden),
        "mlp.up_proj": (ffn, hidden),
        "mlp.down_proj": (hidden, ffn),
    }
    tensors: Tensors = {"model.embed_tokens.weight": ("BF16", (vocab, hidden))}
    adapted: dict[str, Shape] = {}
    for layer in range(layers):
        for name, shape in linear.items():
            tensors[f"model.layers.{layer}.{name}.weight"] = ("BF16", shape)
            adapted[f"model.layers.{layer}.{name}"] = shape
        for name in ("input_layernorm", "post_attention_layernorm"):
            tensors[f"model.layers.{layer}.{name}.weight"] = ("BF16", (hidden,))
    tensors |= {"model.norm.weight": ("BF16", (hidden,)), "lm_head.weight": ("BF16", (vocab, hidden))}
    config = {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "hidden_size": hidden,
        "intermediate_size": ffn,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "num_key_value_heads": kv_heads,
        "vocab_size": vocab,
        "tie_word_embeddings": False,
        "torch_dtype": "bfloat16",
    }
    return config, tensors, adapted


def deepseek_v3(experts_too: bool = False) -> tuple[dict[str, Any], Tensors, dict[str, Shape]]:
    """DeepSeek-V3 as it is published: FP8 with scales of 128 x 128 blocks, and the layer that predicts two tokens ahead.

    Args:
        experts_too: adapt every expert, not attention alone.
    """
    layers, hidden, dense, ffn, vocab, experts = 61, 7168, 18432, 2048, 129280, 256
    heads, q_rank, kv_rank, nope, rope, value = 128, 1536, 512, 128, 64, 128
    tensors: Tensors = {"model.embed_tokens.weight": ("BF16", (vocab, hidden))}
    adapted: dict[str, Shape] = {}

    def linear(name: str, rows: int, columns: int, adapt: bool = False) -> None:
        tensors[f"{name}.weight"] = ("F8_E4M3", (rows, columns))
        tensors[f"{name}.weight_scale_inv"] = ("F32", (-(-rows // 128), -(-columns // 128)))
        if adapt:
            adapted[name] = (rows, columns)

    def mlp(name: str, inner: int, adapt: bool = False) -> None:
        linear(f"{name}.gate_proj", inner, hidden, adapt)
        linear(f"{name}.up_proj", inner, hidden, adapt)
        linear(f"{name}.down_proj", hidden, inner, adapt)

    for layer in range(layers + 1):
        at, ahead = f"model.layers.{layer}", layer == layers
        if ahead:
            tensors[f"{at}.embed_tokens.weight"] = ("BF16", (vocab, hidden))
            tensors[f"{at}.enorm.weight"] = tensors[f"{at}.hnorm.weight"] = ("BF16", (hidden,))
            tensors[f"{at}.eh_proj.weight"] = ("BF16", (hidden, 2 * hidden))
        tensors[f"{at}.input_layernorm.weight"] = ("BF16", (hidden,))
        linear(f"{at}.self_attn.q_a_proj", q_rank, hidden, not ahead)
        tensors[f"{at}.self_attn.q_a_layernorm.weight"] = ("BF16", (q_rank,))
        linear(f"{at}.self_attn.q_b_proj", heads * (nope + rope), q_rank, not ahead)
        linear(f"{at}.self_attn.kv_a_proj_with_mqa", kv_rank + rope, hidden, not ahead)
        tensors[f"{at}.self_attn.kv_a_layernorm.weight"] = ("BF16", (kv_rank,))
        linear(f"{at}.self_attn.kv_b_proj", heads * (nope + value), kv_rank, not ahead)
        linear(f"{at}.self_attn.o_proj", hidden, heads * value, not ahead)
        tensors[f"{at}.post_attention_layernorm.weight"] = ("BF16", (hidden,))
        if layer < 3:
            mlp(f"{at}.mlp", dense)
        else:
            tensors[f"{at}.mlp.gate.weight"] = ("BF16", (experts, hidden))
            tensors[f"{at}.mlp.gate.e_score_correction_bias"] = ("F32", (experts,))
            mlp(f"{at}.mlp.shared_experts", ffn)
            for expert in range(experts):
                mlp(f"{at}.mlp.experts.{expert}", ffn, experts_too and not ahead)
        if ahead:
            tensors[f"{at}.shared_head.norm.weight"] = ("BF16", (hidden,))
            tensors[f"{at}.shared_head.head.weight"] = ("BF16", (vocab, hidden))
    tensors |= {"model.norm.weight": ("BF16", (hidden,)), "lm_head.weight": ("BF16", (vocab, hidden))}
    config = {
        "architectures": ["DeepseekV3ForCausalLM"],
        "model_type": "deepseek_v3",
        "hidden_size": hidden,
        "intermediate_size": dense,
        "moe_intermediate_size": ffn,
        "num_hidden_layers": layers,
        "num_nextn_predict_layers": 1,
        "first_k_dense_replace": 3,
        "n_routed_experts": experts,
        "n_shared_experts": 1,
        "num_experts_per_tok": 8,
        "num_attention_heads": heads,
        "num_key_value_heads": heads,
        "q_lora_rank": q_rank,
        "kv_lora_rank": kv_rank,
        "qk_nope_head_dim": nope,
        "qk_rope_head_dim": rope,
        "v_head_dim": value,
        "vocab_size": vocab,
        "tie_word_embeddings": False,
        "torch_dtype": "bfloat16",
        "quantization_config": {
            "activation_scheme": "dynamic",
            "fmt": "e4m3",
            "quant_method": "fp8",
            "weight_block_size": [128, 128],
        },
    }
    return config, tensors, adapted


GIANTS: dict[str, Callable[[], tuple[dict[str, Any], Tensors, dict[str, Shape]]]] = {
    "llama-405b": llama_405b,
    "deepseek-v3": deepseek_v3,
    "deepseek-v3-experts": lambda: deepseek_v3(experts_too=True),
}


def make(root: Path, giant: str, shard: int = SHARD) -> None:
    """``root/base`` and ``root/adapter``, a LoRA of rank 16."""
    config, tensors, adapted = GIANTS[giant]()
    groups = list(_shards(tensors, shard))
    (root / "base").mkdir(parents=True)
    (root / "adapter").mkdir()
    weight_map: dict[str, str] = {}
    for index, group in enumerate(groups, 1):
        file = f"model-{index:05d}-of-{len(groups):06d}.safetensors"
        sparse(root / "base" / file, group)
        weight_map |= dict.fromkeys(group, file)
    (root / "base" / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    (root / "base" / "config.json").write_text(json.dumps(config))
    factors: Tensors = {}
    for name, (rows, columns) in adapted.items():
        factors[f"base_model.model.{name}.lora_A.weight"] = ("F32", (RANK, columns))
        factors[f"base_model.model.{name}.lora_B.weight"] = ("F32", (rows, RANK))
    sparse(root / "adapter" / "adapter_model.safetensors", factors)
    targets = sorted({name.rsplit(".", 1)[-1] for name in adapted})
    fields = {"peft_type": "LORA", "r": RANK, "lora_alpha": RANK, "target_modules": targets}
    (root / "adapter" / "adapter_config.json").write_text(json.dumps({**fields, "base_model_name_or_path": "base"}))


def _shards(tensors: Tensors, limit: int) -> Iterator[Tensors]:
    group: Tensors = {}
    filled = 0
    for name, (code, shape) in tensors.items():
        size = nbytes(code, shape)
        if group and filled + size > limit:
            yield group
            group, filled = {}, 0
        group[name] = (code, shape)
        filled += size
    yield group
