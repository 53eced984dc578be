"""Checkpoints of real shapes, made fast: what the benchmarks run on.

Values are random but cheap: a block of normal numbers, repeated with an offset per tensor. Time and memory of a merge do
not depend on them.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

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


SHAPES = {
    "tiny": Shape(256, 512, 4, 4, 2, 1024),
    "1b": Shape(2048, 8192, 16, 32, 8, 32000, tied=True),  # 1.04e9 weights
    "3b": Shape(3072, 8192, 28, 24, 8, 32000, tied=True),
    "7b": Shape(4096, 11008, 32, 32, 32, 32000),
}


def linears(shape: Shape) -> dict[str, tuple[int, int]]:
    """(out, in) of one layer's linear modules."""
    head = shape.hidden // shape.heads
    return {
        "self_attn.q_proj": (shape.hidden, shape.hidden),
        "self_attn.k_proj": (head * shape.kv_heads, shape.hidden),
        "self_attn.v_proj": (head * shape.kv_heads, shape.hidden),
        "self_attn.o_proj": (shape.hidden, shape.hidden),
        "mlp.gate_proj": (shape.ffn, shape.hidden),
        "mlp.up_proj": (shape.ffn, shape.hidden),
        "mlp.down_proj": (shape.hidden, shape.ffn),
    }


def _values(rows: int, columns: int, seed: int, dtype: torch.dtype) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    block = torch.randn(1 << 20, generator=generator) * 0.02
    count = rows * columns
    return block.repeat(-(-count // len(block)))[:count].to(dtype).view(rows, columns).contiguous()


def write_base(folder: Path, shape: Shape, dtype: torch.dtype = torch.bfloat16, shard_layers: int = 4) -> None:
    """A sharded base."""
    folder.mkdir(parents=True)
    config = {
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
