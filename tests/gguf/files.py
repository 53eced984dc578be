"""Small GGUF files made by the gguf package, for tests."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Mapping
    from pathlib import Path

    import numpy as np


def write_gguf(
    path: Path,
    tensors: Mapping[str, np.ndarray],
    *,
    arch: str = "llama",
    metadata: Mapping[str, Any] | None = None,
    types: Mapping[str, str] | None = None,
    alignment: int | None = None,
    split: int = 0,
) -> Path:
    """A GGUF file by gguf's own writer; ``types`` names the type of tensors that gguf shall quantize."""
    import gguf

    writer = gguf.GGUFWriter(path, arch, split_max_tensors=split)
    if alignment:
        writer.add_custom_alignment(alignment)
    for key, value in (metadata or {}).items():
        add_value(writer, key, value)
    for name, tensor in tensors.items():
        kind = (types or {}).get(name)
        if kind is None:
            writer.add_tensor(name, tensor)
        else:
            wanted = gguf.GGMLQuantizationType[kind]
            writer.add_tensor(name, gguf.quantize(tensor, wanted), raw_dtype=wanted)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def add_value(writer: Any, key: str, value: Any) -> None:
    """A key-value of the GGUF type that converters use for such a value."""
    import gguf

    kinds = gguf.GGUFValueType
    simple = {bool: kinds.BOOL, int: kinds.UINT32, float: kinds.FLOAT32, str: kinds.STRING}
    if isinstance(value, list):
        item = kinds.INT32 if isinstance(value[0], int) and not isinstance(value[0], bool) else simple[type(value[0])]
        writer.add_key_value(key, value, kinds.ARRAY, sub_type=item)
    else:
        writer.add_key_value(key, value, simple[type(value)])


def random_array(*shape: int, seed: int = 0, dtype: str = "float32") -> np.ndarray:
    import numpy as np

    return np.random.default_rng(seed).standard_normal(shape).astype(dtype)


def sample(path: Path) -> Path:
    """A file with every kind of value, and tensors of plain and quantized types."""
    metadata = {
        "general.name": "sample",
        "llama.block_count": 1,
        "llama.context_length": 64,
        "llama.rope.freq_base": 10000.0,
        "tokenizer.ggml.tokens": ["<unk>", "a", "ä", "x" * 40],
        "tokenizer.ggml.scores": [0.0, -1.0, -2.5, 3.0],
        "tokenizer.ggml.token_type": [2, 1, 1, 1],
        "tokenizer.ggml.add_bos_token": True,
    }
    tensors = {
        "token_embd.weight": random_array(4, 64),
        "blk.0.attn_q.weight": random_array(64, 64, seed=1),
        "blk.0.attn_k.weight": random_array(32, 64, seed=2, dtype="float16"),
        "blk.0.ffn_down_exps.weight": random_array(2, 8, 64, seed=3),
        "output_norm.weight": random_array(64, seed=4),
    }
    types = {"blk.0.attn_q.weight": "Q8_0", "blk.0.ffn_down_exps.weight": "Q4_0"}
    return write_gguf(path, tensors, metadata=metadata, types=types)
