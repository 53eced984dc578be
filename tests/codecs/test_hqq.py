"""HQQ in the layout of hqq 0.2 (core/bitpack.py, core/quantize.py), packed here value by value."""

from __future__ import annotations

import warnings

import pytest
import torch
from codec_reads import check_ranges, values

from adapterkit.checkpoint.decoded import dequantized
from adapterkit.errors import CheckpointError

CONFIG = {"quant_method": "hqq", "quant_config": {"weight_quant_params": {"nbits": 4}}}
PACKINGS = {8: ("8bit_u8", 1), 4: ("4bit_u8", 2), 3: ("3bit_32", 10), 2: ("2bit_u8", 4), 1: ("1bit_u8", 8)}


def text(words: str) -> torch.Tensor:
    return torch.tensor(list(words.encode()), dtype=torch.uint8)


def hqq(bits: int, axis: int, shape: tuple[int, int] = (64, 96), group: int = 32):
    """What is stored, and (q - zero) * scale in bfloat16."""
    generator = torch.Generator().manual_seed(bits)
    groups = shape[0] * shape[1] // group
    size = (groups, group) if axis == 1 else (group, groups)
    q = torch.randint(0, 2**bits, size, generator=generator)
    along = (groups, 1) if axis == 1 else (1, groups)
    scale = (torch.rand(along, generator=generator) * 0.01).bfloat16()
    zero = (torch.rand(along, generator=generator) * 2**bits).bfloat16()
    packing, count = PACKINGS[bits]
    step = -(-size[0] // count)
    dtype = torch.int32 if bits == 3 else torch.uint8
    packed = torch.zeros(step, size[1], dtype=torch.int64)
    for row in range(size[0]):
        packed[row % step] |= q[row] << (bits * (count - 1 - row // step))
    numbers = {"nbits": bits, "group_size": group, "axis": axis}
    tensors = {f"a.{name}": torch.tensor(value, dtype=torch.int32) for name, value in numbers.items()}
    for name in ("view_as_float", "quant_scale", "quant_zero", "offload_meta"):
        tensors[f"a.{name}"] = torch.tensor(0, dtype=torch.uint8)
    tensors |= {
        "a.W_q": packed.to(dtype),
        "a.scale": scale,
        "a.zero": zero,
        "a.shape": torch.tensor(shape),
        "a.packing": text(packing),
        "a.compute_dtype": text("torch.bfloat16"),
        "a.bias": torch.zeros(shape[0]),
    }
    return tensors, ((q.bfloat16() - zero) * scale).reshape(shape)


@pytest.mark.parametrize("bits", PACKINGS)
@pytest.mark.parametrize("axis", [0, 1])
def test_decodes(store, bits: int, axis: int) -> None:
    tensors, wanted = hqq(bits, axis)
    checkpoint = store(tensors, CONFIG)
    assert torch.equal(values(checkpoint, "a.weight"), wanted)
    assert set(dequantized(checkpoint)) == {"a.weight", "a.bias"}
    check_ranges(checkpoint, "a.weight")


def test_as_hqq_itself_stores_it(store) -> None:
    """Where hqq is installed: what it writes is what it decodes."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        quantize = pytest.importorskip("hqq.core.quantize", exc_type=ImportError)
        for bits in PACKINGS:
            for axis in (0, 1):
                how = quantize.BaseQuantizeConfig(nbits=bits, group_size=32, axis=axis)
                plain = torch.nn.Linear(96, 64, bias=False)
                layer = quantize.HQQLinear(plain, how, compute_dtype=torch.bfloat16, device="cpu")
                wanted = layer.dequantize().detach()
                stored = {f"a.{name}": value for name, value in layer.state_dict().items()}
                assert torch.equal(values(store(stored, CONFIG), "a.weight"), wanted), (bits, axis)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda t: t.pop("a.zero"), "'a.zero' is missing"),
        (lambda t: t.pop("a.shape"), "'a.shape' is missing"),
        (lambda t: t.update({"a.packing": text("5bit_u8")}), "packing '5bit_u8'"),
        (lambda t: t.update({"a.quant_scale": torch.tensor(1, dtype=torch.uint8)}), "quantized scales"),
        (lambda t: t.update({"a.W_q": t["a.W_q"][:-1]}), "rows where"),
        (lambda t: t.update({"a.shape": torch.tensor([63, 95])}), "does not fit"),
        (lambda t: t.update({"a.scale": t["a.scale"][:-1]}), "a.scale"),
        (lambda t: t.update({"b.W_q": torch.zeros(2, 2, dtype=torch.uint8)}), "'b.shape' is missing"),
    ],
)
def test_what_does_not_fit(store, change, message: str) -> None:
    tensors, _ = hqq(4, 1)
    change(tensors)
    with pytest.raises(CheckpointError) as error:
        dequantized(store(tensors, CONFIG))
    assert message in str(error.value)
