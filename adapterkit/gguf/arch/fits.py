"""Whether what a config says fits the tensors beside it, and is what the runtime needs.

llama.cpp holds the shapes of a file against its metadata when it loads it; a config that contradicts its weights is
refused here instead, before a byte is written.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from adapterkit.errors import CheckpointError

# Keys of every architecture without which llama.cpp loads no file, and the field that they come from.
NEEDED = {"context_length": "max_position_embeddings", "embedding_length": "hidden_size"}
# Keys that a model with such tensors needs, and the field that they come from.
NEEDED_BY = (
    ("attention.head_count", ("attn_q.weight", "attn_qkv.weight"), "num_attention_heads"),
    ("feed_forward_length", ("ffn_down.weight",), "intermediate_size"),
    ("expert_count", ("ffn_down_exps.weight",), "num_experts"),
    ("expert_used_count", ("ffn_down_exps.weight",), "num_experts_per_tok"),
)
# The dense networks of an arctic are as wide as the model; the field of a qwen counts the gate and what it gates.
_OWN_WIDTH = frozenset(("arctic", "qwen"))
_HINT = "give the config.json that belongs to these weights"


def sound(values: Mapping[str, Any], ref: str) -> None:
    """Refuse hyperparameters that are no numbers of their kind.

    Raises:
        CheckpointError: one that is missing, not finite, or negative.
    """
    for name, field in NEEDED.items():
        if values.get(name) is None:
            raise CheckpointError(f"{ref}: its config.json does not say '{field}'", "complete it from the base model")
    if not any(name.endswith("epsilon") for name in values):
        raise CheckpointError(
            f"{ref}: its config.json does not say 'rms_norm_eps', or what its class calls it",
            "complete it from the base model",
        )
    for name, value in values.items():
        if isinstance(value, list) and len({_kind(one) for one in value}) > 1:
            raise CheckpointError(f"{ref}: its config gives values of several kinds for '{name}'", "correct it")
        for one in value if isinstance(value, list) else [value]:
            if isinstance(one, float) and not math.isfinite(one):
                raise CheckpointError(f"{ref}: its config gives {one} for '{name}', which is no number", "correct it")
        size = value if isinstance(value, (int, float)) else 0
        if size < 0 and name.endswith(("epsilon", "freq_base", "freq_base_swa")):
            raise CheckpointError(f"{ref}: its config gives {size:g} for '{name}', which is negative", "correct it")
        if name.endswith(("freq_base", "freq_base_swa", "context_length")) and value == 0:
            raise CheckpointError(f"{ref}: its config gives 0 for '{name}'", "correct it")


def complete(values: Mapping[str, Any], shapes: Mapping[str, tuple[int, ...]], ref: str) -> None:
    """Refuse a config that lacks a number without which llama.cpp loads none of the tensors beside it.

    Args:
        values: the hyperparameters of the file, by their keys without the architecture.
        shapes: of its tensors.
        ref: what the checkpoint is called.

    Raises:
        CheckpointError: the first number that is missing, or 0.
    """
    for key, ends, field in NEEDED_BY:
        value = values.get(key)
        said = any(value) if isinstance(value, list) else value
        if not said and any(name.endswith(tuple(f".{end}" for end in ends)) for name in shapes):
            raise CheckpointError(
                f"{ref}: its config.json does not say '{field}', or what its class calls it",
                "complete it from the base model",
            )


def fits(arch: str, values: Mapping[str, Any], shapes: Mapping[str, tuple[int, ...]], ref: str) -> None:
    """Refuse a config whose sizes are not those of the tensors.

    Args:
        arch: the architecture, as GGUF names it.
        values: the hyperparameters of the file, by their keys without the architecture.
        shapes: of its tensors, rows first.

    Raises:
        CheckpointError: the first tensor that does not fit, with the number that says else.
    """
    width = values["embedding_length"]
    embedding = shapes.get("token_embd.weight")
    if embedding is not None and isinstance(width, int) and embedding[-1] != width:
        raise _wrong(ref, "token_embd.weight", f"{embedding[-1]} columns", "hidden_size", width)
    labels, head = values.get("classifier.output_labels"), shapes.get("cls.output.weight")
    if isinstance(labels, list) and head is not None and head[0] != len(labels):
        raise _wrong(ref, "cls.output.weight", f"{head[0]} rows", "id2label", len(labels))
    for layer in range(_number(values.get("block_count"), 0) or 0):
        _attention(values, shapes, layer, ref)
        inner = None if arch in _OWN_WIDTH else _number(values.get("feed_forward_length"), layer)
        down = shapes.get(f"blk.{layer}.ffn_down.weight")
        if inner and down is not None and down[-1] != inner:
            raise _wrong(ref, f"blk.{layer}.ffn_down.weight", f"{down[-1]} columns", "intermediate_size", inner)


def _attention(values: Mapping[str, Any], shapes: Mapping[str, tuple[int, ...]], layer: int, ref: str) -> None:
    """Heads: of keys and values, where all layers have heads of one size; of queries, which may have as much again."""
    if any("length_swa" in name or name.endswith("_mla") for name in values):
        return
    heads = _number(values.get("attention.head_count"), layer)
    groups = _number(values.get("attention.head_count_kv"), layer)
    groups = heads if groups is None else groups
    if not heads or not groups:
        return
    plain = _number(values.get("embedding_length"), layer) or 0
    keys = _number(values.get("attention.key_length"), layer) or plain // heads
    items = _number(values.get("attention.value_length"), layer) or plain // heads
    found = {name: shapes.get(f"blk.{layer}.attn_{name}.weight") for name in "qkv"}
    if any(one is None or len(one) != 2 for one in found.values()):
        return
    for name, size, field in (
        ("k", groups * keys, "num_key_value_heads"),
        ("v", groups * items, "num_key_value_heads"),
    ):
        shape = found[name]
        if shape is not None and shape[0] != size:
            raise _wrong(ref, f"blk.{layer}.attn_{name}.weight", f"{shape[0]} rows", f"{field} with head_dim", size)
    query = found["q"]
    if query is not None and query[0] not in (heads * keys, 2 * heads * keys):
        name = f"blk.{layer}.attn_q.weight"
        raise _wrong(ref, name, f"{query[0]} rows", "num_attention_heads with head_dim", heads * keys)


def _kind(value: Any) -> type:
    """What a value of a list has to have in common with the others; whole numbers are numbers."""
    return float if isinstance(value, int) and not isinstance(value, bool) else type(value)


def _number(value: Any, layer: int) -> int | None:
    if isinstance(value, list):
        value = value[layer] if layer < len(value) else None
    return value if isinstance(value, int) and not isinstance(value, bool) else None


def _wrong(ref: str, name: str, has: str, field: str, size: int) -> CheckpointError:
    return CheckpointError(f"{ref}: what becomes '{name}' has {has}, and its config.json says {size} ({field})", _HINT)
