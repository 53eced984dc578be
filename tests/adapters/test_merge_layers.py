"""LoRA on layers that are no plain linears, in modules that are no transformers models, against PEFT in float64."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import pytest
import torch
from models import assert_merged, make_adapter, peft_merged, randomize, save_module
from torch import nn

import adapterkit
from adapterkit.errors import TargetError

if TYPE_CHECKING:
    from pathlib import Path


class Attention(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.attn = nn.MultiheadAttention(16, 4)
        self.lin = nn.Linear(16, 16)


class Layers(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.emb = nn.Embedding(30, 16)
        self.lin = nn.Linear(16, 12)
        self.conv1 = nn.Conv1d(6, 10, 3)
        self.conv2 = nn.Conv2d(6, 10, (3, 2))
        self.conv3 = nn.Conv3d(4, 8, (1, 3, 2))
        self.pointwise = nn.Conv1d(12, 12, 1)
        self.grouped = nn.Conv2d(8, 8, 3, groups=2)


def make(kind: type[nn.Module], dtype: torch.dtype) -> Any:
    def build() -> nn.Module:
        torch.manual_seed(0)
        module = kind()
        randomize(module)
        return module.to(dtype)

    return build


def check(kind: type[nn.Module], tmp_path: Path, dtype: torch.dtype, **fields: Any) -> None:
    from peft import LoraConfig

    build = make(kind, dtype)
    base = save_module(tmp_path / "base", build())
    adapter = make_adapter(tmp_path / "adapter", build, LoraConfig(**{"r": 4, "lora_alpha": 6, **fields}))
    exact = peft_merged(build, adapter, tmp_path).exact
    adapterkit.merge(base, [adapter], tmp_path / "out")
    assert_merged(base, tmp_path / "out", exact)


DTYPES = [torch.float32, torch.bfloat16]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("dora", [False, True], ids=["lora", "dora"])
@pytest.mark.parametrize("layer", ["emb", "lin", "conv1", "conv2", "conv3", "pointwise"])
def test_layer(layer: str, dora: bool, dtype: torch.dtype, tmp_path: Path) -> None:
    check(Layers, tmp_path, dtype, target_modules=[layer], use_dora=dora, use_rslora=True)


@pytest.mark.parametrize("layer", ["conv1", "conv2", "conv3"])
def test_convolution_with_biases(layer: str, tmp_path: Path) -> None:
    check(Layers, tmp_path, torch.float32, target_modules=[layer], lora_bias=True)
    check(Layers, tmp_path / "all", torch.float32, target_modules=[layer], bias="all")


def test_grouped_convolution_is_refused(tmp_path: Path) -> None:
    """A spans all input channels of a grouped convolution; PEFT raises too."""
    from peft import LoraConfig

    build = make(Layers, torch.float32)
    base = save_module(tmp_path / "base", build())
    adapter = make_adapter(tmp_path / "adapter", build, LoraConfig(r=4, target_modules=["grouped"]))
    with pytest.raises(TargetError, match="grouped"):
        adapterkit.merge(base, [adapter], tmp_path / "out")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("fields", [{}, {"use_rslora": True}, {"target_modules": ["attn", "lin"]}], ids=str)
def test_multihead_attention(fields: dict[str, Any], dtype: torch.dtype, tmp_path: Path) -> None:
    check(Attention, tmp_path, dtype, **{"target_modules": ["attn"], **fields})
