"""GPTQ and AWQ, packed here as their published loops do it (integers, bit by bit) and decoded by the formula."""

from __future__ import annotations

import pytest
import torch
from codec_reads import check_ranges, values

from adapterkit.checkpoint.decoded import dequantized
from adapterkit.errors import CheckpointError


def bits_of(numbers: torch.Tensor, bits: int) -> torch.Tensor:
    """Rows of numbers as int32 words, lowest bit first: the layout of AutoGPTQ's qlinear, in the simplest way."""
    rows = []
    for row in numbers.tolist():
        whole = sum(value << (index * bits) for index, value in enumerate(row))
        words = [(whole >> (32 * at)) & 0xFFFFFFFF for at in range(-(-len(row) * bits // 32))]
        rows.append([word - (1 << 32) if word >> 31 else word for word in words])
    return torch.tensor(rows, dtype=torch.int32)


def gptq(bits: int, version: int, group: int, order: bool, out: int = 64, inside: int = 96, seed: int = 0):
    generator = torch.Generator().manual_seed(seed)
    groups = -(-inside // group) if group > 0 else 1
    q = torch.randint(0, 2**bits, (inside, out), generator=generator)
    z = torch.randint(0, 2**bits, (groups, out), generator=generator)
    s = (torch.rand(groups, out, generator=generator) * 0.01).half()
    index = torch.arange(inside) // (group if group > 0 else inside)
    if order:
        index = index[torch.randperm(inside, generator=generator)]
    tensors = {
        "a.qweight": bits_of(q.T, bits).T.contiguous(),
        "a.qzeros": bits_of((z - 1) % 2**bits if version == 1 else z, bits),
        "a.scales": s,
        "a.g_idx": index.int(),
    }
    config = {"quant_method": "gptq", "bits": bits, "group_size": group, "desc_act": order}
    config["checkpoint_format"] = "gptq" if version == 1 else "gptq_v2"
    return tensors, config, (s[index] * (q - z[index]).half()).T


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
@pytest.mark.parametrize("version", [1, 2])
@pytest.mark.parametrize(("group", "order"), [(32, False), (32, True), (-1, False)])
def test_gptq(store, bits: int, version: int, group: int, order: bool) -> None:
    tensors, config, wanted = gptq(bits, version, group, order, seed=bits)
    if not order:
        del tensors["a.g_idx"]
    checkpoint = store({**tensors, "a.bias": torch.zeros(64)}, config)
    got = values(checkpoint, "a.weight")
    assert got.dtype is torch.float16
    assert torch.equal(got, wanted)
    check_ranges(checkpoint, "a.weight")
    assert set(dequantized(checkpoint)) == {"a.weight", "a.bias"}


def test_awq(store) -> None:
    """AutoAWQ, modules/linear/gemm.py: nibble i of a word holds column [0, 2, 4, 6, 1, 3, 5, 7][i]."""
    generator = torch.Generator().manual_seed(0)
    out, inside, group = 64, 96, 32
    q = torch.randint(0, 16, (inside, out), generator=generator)
    z = torch.randint(0, 16, (inside // group, out), generator=generator)
    s = (torch.rand(inside // group, out, generator=generator) * 0.01).half()

    def pack(numbers: torch.Tensor) -> torch.Tensor:
        order = [0, 2, 4, 6, 1, 3, 5, 7]
        return bits_of(numbers.view(-1, 8)[:, order], 4).view(numbers.shape[0], -1)

    tensors = {"a.qweight": pack(q), "a.qzeros": pack(z), "a.scales": s}
    config = {"quant_method": "awq", "bits": 4, "group_size": group, "version": "gemm", "zero_point": True}
    index = torch.arange(inside) // group
    checkpoint = store(tensors, config)
    assert torch.equal(values(checkpoint, "a.weight"), ((q - z[index]).half() * s[index]).T)
    check_ranges(checkpoint, "a.weight")
    with pytest.raises(CheckpointError, match="AWQ 'gemv'"):
        dequantized(store(tensors, {**config, "version": "gemv"}))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda t, q: t.pop("a.scales"), "'a.scales' is missing"),
        (lambda t, q: t.pop("a.qzeros"), "'a.qzeros' is missing"),
        (lambda t, q: t.pop("a.qweight"), "only partly GPTQ"),
        (lambda t, q: q.update(group_size=48), "3 groups where 96 inputs in groups of 48 have 2"),
        (lambda t, q: q.update(bits=5), "of 5 bits"),
        (lambda t, q: t.update({"a.g_idx": t["a.g_idx"][:-1]}), "a.g_idx"),
        (lambda t, q: t.update({"a.g_idx": t["a.g_idx"] + 1}), "group 3"),
        (lambda t, q: t.update({"a.scales": t["a.scales"][:, :-1]}), "a.scales"),
    ],
)
def test_gptq_that_does_not_fit(store, change, message: str) -> None:
    tensors, config, _ = gptq(4, 1, 32, True)
    change(tensors, config)
    with pytest.raises(CheckpointError) as error:
        values(store(tensors, config), "a.weight")
    assert message in str(error.value)


def test_gptq_without_a_config(store) -> None:
    with pytest.raises(CheckpointError, match=r"'a\.(qweight|qzeros|g_idx)', a part of"):
        dequantized(store(gptq(4, 1, 32, True)[0]))
