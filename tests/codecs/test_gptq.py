"""GPTQ and AWQ, packed here as their published loops do it (integers, bit by bit) and decoded by the formula."""

from __future__ import annotations

import importlib.util
import os
import runpy
import subprocess
from pathlib import Path

import pytest
import torch
from codec_reads import check_ranges, values
from packed import awq_words, bits_of
from safetensors.torch import load_file

from adapterkit.checkpoint.decoded import dequantized
from adapterkit.errors import CheckpointError


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

    tensors = {"a.qweight": awq_words(q), "a.qzeros": awq_words(z), "a.scales": s}
    config = {"quant_method": "awq", "bits": 4, "group_size": group, "version": "gemm", "zero_point": True}
    index = torch.arange(inside) // group
    checkpoint = store(tensors, config)
    assert torch.equal(values(checkpoint, "a.weight"), ((q - z[index]).half() * s[index]).T)
    check_ranges(checkpoint, "a.weight")
    with pytest.raises(CheckpointError, match="AWQ 'gemv'"):
        dequantized(store(tensors, {**config, "version": "gemv"}))


def test_awq_as_autoawq_itself_decodes_it(store) -> None:
    """Where AutoAWQ is installed: any words, decoded by its own loop (of one file; the package wants old libraries)."""
    found = importlib.util.find_spec("awq")
    if found is None or found.origin is None:
        pytest.skip("AutoAWQ is not installed")
    utils = runpy.run_path(str(Path(found.origin).parent / "utils/packing_utils.py"))
    generator = torch.Generator().manual_seed(0)
    words = torch.randint(-(2**31), 2**31, (96 + 3, 8), generator=generator).int()
    scales = (torch.rand(3, 64, generator=generator) * 0.01).half()
    tensors = {"a.qweight": words[:96].clone(), "a.qzeros": words[96:].clone(), "a.scales": scales}
    wanted = utils["dequantize_gemm"](tensors["a.qweight"], tensors["a.qzeros"], scales, 4, 32).T
    config = {"quant_method": "awq", "bits": 4, "group_size": 32, "version": "gemm", "zero_point": True}
    assert torch.equal(values(store(tensors, config), "a.weight"), wanted)


PACK = """
import sys, torch
from auto_round_extension.torch.qlinear_torch_zp import QuantLinear
from safetensors.torch import save_file
torch.manual_seed(0)
found = {}
for bits in (2, 3, 4, 8):
    linear = torch.nn.Linear(96, 64, bias=False)
    scales = torch.rand(64, 3).mul(0.01).add(0.001).half().float()
    zeros = torch.randint(1, 2**bits, (64, 3)).float()  # its version 1 cannot hold a zero point of 0
    grid = scales.repeat_interleave(32, 1), zeros.repeat_interleave(32, 1)
    codes = torch.randint(0, 2**bits, (64, 96)).float()
    linear.weight.data = (codes - grid[1]) * grid[0]
    layer = QuantLinear(bits, 32, 96, 64, bias=False)
    layer.pack(linear, scales, zeros, device="cpu")
    found |= {f"{bits}.{name}": value.contiguous() for name, value in layer.state_dict().items()}
    found[f"{bits}.wanted"] = layer(torch.eye(96)).T.contiguous()
save_file(found, sys.argv[1])
"""


@pytest.mark.slow
def test_gptq_as_auto_round_packs_and_decodes_it(store, tmp_path: Path) -> None:
    """auto-round comes with llm-compressor: its packing, and its layer's answer to the unit matrix."""
    program = os.environ.get("ADAPTERKIT_LLMCOMPRESSOR")
    if not program:
        pytest.skip("ADAPTERKIT_LLMCOMPRESSOR names no Python that has llm-compressor")
    subprocess.run([program, "-W", "ignore", "-c", PACK, tmp_path / "packed.safetensors"], check=True)
    stored = load_file(tmp_path / "packed.safetensors")
    for bits in (2, 3, 4, 8):
        own = {name.partition(".")[2]: value for name, value in stored.items() if name.startswith(f"{bits}.")}
        wanted = own.pop("wanted")
        config = {"quant_method": "auto-round", "bits": bits, "group_size": 32}
        got = values(store({f"a.{name}": value for name, value in own.items()}, config), "a.weight")
        assert torch.equal(got, wanted.half()), bits


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
