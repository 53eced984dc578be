"""Whole models whose linear weights lie in GPTQ's or AWQ's published layout, packed here bit by bit."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from models import read_tensors
from safetensors.torch import save_file

GROUP = 32
AWQ_ORDER = [0, 2, 4, 6, 1, 3, 5, 7]  # AutoAWQ, modules/linear/gemm.py: nibble i of a word holds this column


def bits_of(numbers: torch.Tensor, bits: int) -> torch.Tensor:
    """Rows of numbers as int32 words, lowest bit first: the layout of AutoGPTQ's qlinear, in the simplest way."""
    rows = []
    for row in numbers.tolist():
        whole = sum(value << (index * bits) for index, value in enumerate(row))
        words = [(whole >> (32 * at)) & 0xFFFFFFFF for at in range(-(-len(row) * bits // 32))]
        rows.append([word - (1 << 32) if word >> 31 else word for word in words])
    return torch.tensor(rows, dtype=torch.int32)


def awq_words(numbers: torch.Tensor) -> torch.Tensor:
    """Rows of nibbles as AutoAWQ's words."""
    return bits_of(numbers.view(-1, 8)[:, AWQ_ORDER], 4).view(numbers.shape[0], -1)


def pack(folder: Path, method: str) -> dict[str, torch.Tensor]:
    """Random 4-bit numbers in the place of every linear weight of a tiny model's layers.

    Returns:
        All of the model's tensors with those weights as floats: scale times (number - zero), in float32.
    """
    generator = torch.Generator().manual_seed(0)
    stored: dict[str, torch.Tensor] = {}
    plain: dict[str, torch.Tensor] = {}
    for name, tensor in read_tensors(folder).items():
        if not name.endswith("_proj.weight"):
            stored[name] = plain[name] = tensor.half()
            continue
        out, inside = tensor.shape
        groups = inside // GROUP
        q = torch.randint(0, 16, (inside, out), generator=generator)
        z = torch.randint(1, 16, (groups, out), generator=generator)
        s = (torch.rand(groups, out, generator=generator) * 0.03).half()
        index = torch.arange(inside) // GROUP
        stem = name.removesuffix("weight")
        if method == "gptq":
            index = index[torch.randperm(inside, generator=generator)]
            stored[f"{stem}qweight"] = bits_of(q.T, 4).T.contiguous()
            stored[f"{stem}qzeros"] = bits_of(z - 1, 4)
            stored[f"{stem}g_idx"] = index.int()
        else:
            stored[f"{stem}qweight"], stored[f"{stem}qzeros"] = awq_words(q), awq_words(z)
        stored[f"{stem}scales"] = s
        plain[name] = (s[index].float() * (q - z[index])).T.contiguous()
    said: dict[str, Any] = {"quant_method": method, "bits": 4, "group_size": GROUP}
    if method == "gptq":
        said |= {"desc_act": True, "sym": False, "checkpoint_format": "gptq"}
    else:
        said |= {"version": "gemm", "zero_point": True}
    save_file(stored, folder / "model.safetensors", metadata={"format": "pt"})
    config = json.loads((folder / "config.json").read_text())
    config.pop("dtype", None)
    (folder / "config.json").write_text(json.dumps({**config, "torch_dtype": "float16", "quantization_config": said}))
    return plain
