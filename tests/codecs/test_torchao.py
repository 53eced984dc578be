"""torchao's layout, as `flatten_tensor_state_dict` of torchao 0.18 writes it, and its formula."""

from __future__ import annotations

import pytest
import torch
from codec_reads import check_ranges, values, wide

from adapterkit.checkpoint.decoded import dequantized
from adapterkit.errors import CheckpointError

CONFIG = {"quant_method": "torchao", "quant_type": {"default": {"_type": "Int8WeightOnlyConfig"}}}


def tensors(shape: tuple[int, int], dtype: torch.dtype) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    data = torch.randn(shape, generator=generator) * 50
    scale = torch.rand(shape[0], 1, generator=generator) * 0.01
    found = {"a._weight_qdata": data.to(dtype), "a._weight_scale": scale, "a.bias": torch.zeros(shape[0])}
    if dtype is torch.int8:
        found["a._weight_zero_point"] = torch.randint(-3, 4, (shape[0], 1), generator=generator, dtype=torch.int8)
    return found


@pytest.mark.parametrize("dtype", [torch.int8, torch.float8_e4m3fn])
def test_by_the_formula(store, dtype: torch.dtype) -> None:
    """(qdata - zero_point) * scale: torchao/quantization/quant_primitives.py, `_dequantize_affine`."""
    stored = tensors((24, 48), dtype)
    wanted = stored["a._weight_qdata"].float()
    if dtype is torch.int8:
        wanted = wanted - stored["a._weight_zero_point"].float()
    wanted = wanted * stored["a._weight_scale"]
    for config in (CONFIG, None):
        checkpoint = store(stored, config)
        assert torch.equal(wide(checkpoint, "a.weight"), wanted)
        assert torch.equal(values(checkpoint, "a.weight"), wanted.bfloat16())
        assert set(dequantized(checkpoint)) == {"a.weight", "a.bias"}
        check_ranges(checkpoint, "a.weight")


def test_as_torchao_itself_stores_it(store) -> None:
    """Where torchao is installed: what it writes is what it decodes."""
    quantization = pytest.importorskip("torchao.quantization")
    support = pytest.importorskip("torchao.prototype.safetensors.safetensors_support")
    for config in (quantization.Int8WeightOnlyConfig(), quantization.Float8WeightOnlyConfig()):
        model = torch.nn.Sequential(torch.nn.Linear(64, 96)).to(torch.bfloat16)
        quantization.quantize_(model, config)
        flat, _ = support.flatten_tensor_state_dict(model.state_dict())
        assert torch.equal(values(store(flat, CONFIG), "0.weight"), model[0].weight.dequantize())


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda t: t.pop("a._weight_scale"), "'a._weight_scale' is missing"),
        (lambda t: t.update({"a._weight_qdata": t["a._weight_qdata"].int()}), "made for one kind of hardware"),
        (lambda t: t.update({"a._weight_scale_and_zero": torch.zeros(2)}), "made for one kind of hardware"),
        (lambda t: t.update({"a._weight_scale": torch.ones(3, 5)}), "equal blocks"),
    ],
)
def test_what_does_not_fit(store, change, message: str) -> None:
    stored = tensors((24, 48), torch.int8)
    change(stored)
    with pytest.raises(CheckpointError) as error:
        dequantized(store(stored, CONFIG))
    assert message in str(error.value)
