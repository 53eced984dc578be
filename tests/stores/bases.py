"""Bases of the tests with stores."""

from __future__ import annotations

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent.parent / "gguf"))


def gguf_base(folder: Path) -> Path:
    """A small GGUF model."""
    from gguf_files import write_gguf
    from test_gguf_outputs import HEADS, OTHERS, tensors

    return write_gguf(folder / "base.gguf", tensors(), metadata={**HEADS, **OTHERS})


def gguf_adapter(folder: Path) -> Path:
    """An adapter for `gguf_base`."""
    from models import random_tensors, write_adapter

    key = "base_model.model.model.layers.0.self_attn.q_proj"
    shapes = {f"{key}.lora_A.weight": (4, 64), f"{key}.lora_B.weight": (64, 4)}
    return write_adapter(folder / "gguf-adapter", random_tensors(shapes, seed=3))


def wide_base(folder: Path) -> Path:
    """A base whose untouched tensors are large enough for a store to copy them: 32 MB in two files."""
    from models import plain_base

    base = plain_base(folder / "base", layers=2, width=1408, shards=2)
    (base / "tokenizer.json").write_text('{"model": {}}')
    return base
