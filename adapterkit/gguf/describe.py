"""What a GGUF file says of itself, for `inspect`."""

from __future__ import annotations

from typing import TYPE_CHECKING

from adapterkit.gguf.checkpoint import GGUFCheckpoint
from adapterkit.gguf.filetypes import FILE_TYPES

if TYPE_CHECKING:
    from adapterkit.checkpoint.checkpoint import Checkpoint


def details(checkpoint: Checkpoint) -> dict[str, str]:
    """Rows for a table; nothing for a checkpoint of another format."""
    if not isinstance(checkpoint, GGUFCheckpoint):
        return {}
    header, arch = checkpoint.header, checkpoint.arch
    numbers = {file_type.number: name for name, file_type in FILE_TYPES.items()}
    tokens = header.keys.get("tokenizer.ggml.tokens")
    stated = header.get("general.file_type")
    rows = {
        "format": f"GGUF {header.version}, {checkpoint.kind}",
        "name": header.get("general.name"),
        "file type": numbers.get(stated, stated),
        "layers": header.get(f"{arch}.block_count"),
        "context": header.get(f"{arch}.context_length"),
        "experts": header.get(f"{arch}.expert_count"),
        "tokenizer": header.get("tokenizer.ggml.model"),
        "tokens": tokens.count if tokens is not None else None,
        "adapter": header.get("adapter.type"),
        "alpha": header.get("adapter.lora.alpha"),
        "rank": _ranks(checkpoint),
        "invocation": _numbers(header.get("adapter.alora.invocation_tokens")),
        "base": header.get("general.base_model.0.name"),
    }
    return {name: str(value) for name, value in rows.items() if value not in (None, "")}


def _ranks(checkpoint: GGUFCheckpoint) -> str | None:
    """The ranks of a LoRA file's factors."""
    found = {tensor.shape[-1] for name, tensor in checkpoint.items() if name.endswith(".lora_b") and tensor.shape}
    return None if not found else str(min(found)) if len(found) == 1 else f"{min(found)} to {max(found)}"


def _numbers(values: object) -> str | None:
    return ", ".join(map(str, values)) if isinstance(values, list) and values else None
