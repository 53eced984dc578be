"""What lies on a coarse grid, told by its values: against grids that other programs wrote."""

from __future__ import annotations

import pytest
import torch

from adapterkit.ops.coarse import is_coarse


def weight(*shape: int) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(0)) * 0.05


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_floats_are_not_coarse(dtype: torch.dtype) -> None:
    assert not is_coarse(weight(64, 256).to(dtype))
    pruned = weight(64, 256).to(dtype)
    pruned[torch.rand(64, 256, generator=torch.Generator().manual_seed(1)) < 0.4] = 0
    assert not is_coarse(pruned)
    assert not is_coarse(torch.zeros(64, 256))
    assert not is_coarse(weight(8, 16))


@pytest.mark.parametrize(
    ("kind", "coarse"), [("Q2_K", True), ("Q4_0", True), ("Q4_1", True), ("Q4_K", True), ("Q8_0", False)]
)
def test_gguf_types(kind: str, coarse: bool) -> None:
    gguf = pytest.importorskip("gguf")
    from adapterkit.gguf.encode import encode

    raw = encode(kind, weight(64, 256))
    values = gguf.quants.dequantize(raw.reshape(64, -1), gguf.GGMLQuantizationType[kind])
    assert is_coarse(torch.from_numpy(values).bfloat16()) is coarse


@pytest.mark.parametrize(("bits", "coarse"), [(2, True), (3, True), (4, True), (8, False)])
def test_integers_with_scales_along_rows_or_columns(bits: int, coarse: bool) -> None:
    w = weight(128, 128).view(128, -1, 32)
    scale = w.abs().amax(2, keepdim=True) / (2 ** (bits - 1) - 0.5)
    values = ((w / scale).round() * scale).view(128, 128).bfloat16()
    assert is_coarse(values) is coarse
    assert is_coarse(values.T) is coarse


@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize(("bits", "coarse"), [(2, True), (3, True), (4, True), (8, False)])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_groups_whose_columns_lie_scattered(bits: int, coarse: bool, symmetric: bool, dtype: torch.dtype) -> None:
    """GPTQ with activation order, by AutoGPTQ's formula: a 16-bit folder does not say which columns share a scale."""
    groups, most = weight(128, 512).view(128, -1, 64), 2**bits - 1
    low, high = groups.amin(2, keepdim=True).clamp(max=0), groups.amax(2, keepdim=True).clamp(min=0)
    if symmetric:
        high = torch.maximum(-low, high)
        low = -high
    scale = (high - low) / most
    zero = torch.full_like(scale, (most + 1) / 2) if symmetric else (-low / scale).round()
    values = (((groups / scale).round() + zero).clamp(0, most) - zero) * scale.half().float()
    scattered = values.view(128, 512)[:, torch.randperm(512, generator=torch.Generator().manual_seed(3))].to(dtype)
    assert is_coarse(scattered) is coarse
    assert is_coarse(scattered.T) is coarse
