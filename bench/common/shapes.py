"""Checkpoints of real shapes, made fast: what the benchmarks run on.

Values are random but cheap: a block of normal numbers, repeated with an offset per tensor. Time and memory of a merge do
not depend on them.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

# Of a measured child: its own high-water mark, in bytes.
HIGH_WATER = """
def high_water():
    line = next(l for l in open("/proc/self/status") if l.startswith("VmHWM:"))
    return int(line.split()[1]) * 1024
"""


@dataclass(frozen=True)
class Shape:
    """A Llama-like model."""

    hidden: int
    ffn: int
    layers: int
    heads: int
    kv_heads: int
    vocab: int
    tied: bool = False
    experts: int = 0  # of each layer, each with matrices of its own; the feed-forward size is that of one
    head: int = 0  # entries of a head; by default the hidden size over the heads


SHAPES = {
    "tiny": Shape(256, 512, 4, 4, 2, 1024),
    "135m": Shape(576, 1536, 30, 9, 3, 49152, tied=True),  # SmolLM2's
    "1b": Shape(2048, 8192, 16, 32, 8, 32000, tied=True),  # 1.04e9 weights
    "3b": Shape(3072, 8192, 28, 24, 8, 32000, tied=True),
    "7b": Shape(4096, 11008, 32, 32, 32, 32000),
    # 18,771 tensors, as Qwen3-30B-A3B has them, at a sixteenth of its width: what a tensor costs beside its bytes.
    "moe": Shape(128, 48, 48, 4, 4, 4096, experts=128, head=32),
}


def linears(shape: Shape) -> dict[str, tuple[int, int]]:
    """(out, in) of one layer's linear modules."""
    head = shape.head or shape.hidden // shape.heads
    feed = [f"mlp.experts.{index}." for index in range(shape.experts)] if shape.experts else ["mlp."]
    mixed = {
        f"{prefix}{name}": size
        for prefix in feed
        for name, size in (
            ("gate_proj", (shape.ffn, shape.hidden)),
            ("up_proj", (shape.ffn, shape.hidden)),
            ("down_proj", (shape.hidden, shape.ffn)),
        )
    }
    return {
        "self_attn.q_proj": (head * shape.heads, shape.hidden),
        "self_attn.k_proj": (head * shape.kv_heads, shape.hidden),
        "self_attn.v_proj": (head * shape.kv_heads, shape.hidden),
        "self_attn.o_proj": (shape.hidden, head * shape.heads),
        **mixed,
    }


@lru_cache(maxsize=4)
def _block(seed: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(1 << 20, generator=generator) * 0.02


def _values(rows: int, columns: int, seed: int, dtype: torch.dtype) -> torch.Tensor:
    block = _block(seed)
    count = rows * columns
    long = block if count <= len(block) else block.repeat(-(-count // len(block)))
    return long[:count].to(dtype, copy=True).view(rows, columns)  # a copy: a small tensor must not keep the block alive


def write_base(folder: Path, shape: Shape, dtype: torch.dtype = torch.bfloat16, shard_layers: int = 4) -> None:
    """A sharded base."""
    folder.mkdir(parents=True)
    config: dict[str, Any] = {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "hidden_size": shape.hidden,
        "intermediate_size": shape.ffn,
        "num_hidden_layers": shape.layers,
        "num_attention_heads": shape.heads,
        "num_key_value_heads": shape.kv_heads,
        "vocab_size": shape.vocab,
        "tie_word_embeddings": shape.tied,
        "torch_dtype": str(dtype).removeprefix("torch."),
    }
    if shape.experts:
        config |= {
            "architectures": ["Qwen3MoeForCausalLM"],
            "model_type": "qwen3_moe",
            "head_dim": shape.head or shape.hidden // shape.heads,
            "num_experts": shape.experts,
            "num_experts_per_tok": 8,
            "moe_intermediate_size": shape.ffn,
        }
    (folder / "config.json").write_text(json.dumps(config, indent=2))
    groups: list[dict[str, torch.Tensor]] = []
    ends = {"model.embed_tokens.weight": _values(shape.vocab, shape.hidden, 1, dtype)}
    ends["model.norm.weight"] = torch.ones(shape.hidden, dtype=dtype)
    if not shape.tied:
        ends["lm_head.weight"] = _values(shape.vocab, shape.hidden, 2, dtype)
    count = -(-shape.layers // shard_layers) + 1
    weight_map: dict[str, str] = {}
    total = 0

    def flush(tensors: dict[str, torch.Tensor], index: int) -> int:
        name = f"model-{index:05d}-of-{count:05d}.safetensors"
        save_file(tensors, folder / name, metadata={"format": "pt"})
        weight_map.update(dict.fromkeys(tensors, name))
        return sum(t.numel() * t.element_size() for t in tensors.values())

    total += flush(ends, 1)
    groups.clear()
    for index in range(2, count + 1):
        tensors: dict[str, torch.Tensor] = {}
        for layer in range((index - 2) * shard_layers, min((index - 1) * shard_layers, shape.layers)):
            prefix = f"model.layers.{layer}."
            for name, (rows, columns) in linears(shape).items():
                tensors[f"{prefix}{name}.weight"] = _values(rows, columns, layer, dtype)
            if shape.experts:
                tensors[f"{prefix}mlp.gate.weight"] = _values(shape.experts, shape.hidden, layer, dtype)
                for name in ("q_norm", "k_norm"):
                    tensors[f"{prefix}self_attn.{name}.weight"] = torch.ones(config["head_dim"], dtype=dtype)
            for name in ("input_layernorm", "post_attention_layernorm"):
                tensors[f"{prefix}{name}.weight"] = torch.ones(shape.hidden, dtype=dtype)
        total += flush(tensors, index)
    index = {"metadata": {"total_size": total}, "weight_map": weight_map}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))


def write_adapter(
    folder: Path, shape: Shape, rank: int = 16, modules: Sequence[str] | None = None, **config: object
) -> None:
    """A LoRA on all linear layers, or on those that are named, as PEFT would save it."""
    folder.mkdir(parents=True)
    tensors = {}
    taken = {name: size for name, size in linears(shape).items() if modules is None or name.split(".")[1] in modules}
    for layer in range(shape.layers):
        for name, (rows, columns) in taken.items():
            key = f"base_model.model.model.layers.{layer}.{name}"
            tensors[f"{key}.lora_A.weight"] = _values(rank, columns, 100 + layer, torch.float32)
            tensors[f"{key}.lora_B.weight"] = _values(rows, rank, 200 + layer, torch.float32)
    save_file(tensors, folder / "adapter_model.safetensors", metadata={"format": "pt"})
    fields = {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "r": rank,
        "lora_alpha": 2 * rank,
        "target_modules": sorted({name.rpartition(".")[2] for name in taken}),
        "bias": "none",
        **config,
    }
    (folder / "adapter_config.json").write_text(json.dumps(fields, indent=2))
