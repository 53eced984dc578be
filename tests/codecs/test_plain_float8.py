"""float8 without scales: the numbers themselves, which every 16-bit float holds."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from codec_reads import check_ranges, wide
from safetensors.torch import load_file, save_file
from test_keep import OTHER, TOUCHED, adapter_of, weight

from adapterkit import merge, verify
from adapterkit.checkpoint.decoded import dequantized
from adapterkit.errors import CheckpointError

KINDS = [torch.float8_e4m3fn, torch.float8_e5m2]


def numbers(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("kind", KINDS)
def test_every_number_is_widened_as_it_is(store, kind: torch.dtype) -> None:
    codes = torch.arange(256, dtype=torch.uint8).view(kind)
    codes = codes[codes.float().isfinite()].repeat(4)
    tensors = {"a.weight": codes.view(-1, 4), "a.bias": codes.clone(), "n.scale": numbers(8).to(kind)}
    checkpoint = store({**tensors, "n.weight": torch.ones(8, dtype=torch.bfloat16)})
    found = dequantized(checkpoint)
    for name, stored in tensors.items():
        assert found[name].dtype.torch is torch.bfloat16
        got = found[name].read(0, found[name].numel).view(found[name].shape)
        assert torch.equal(got.float(), stored.float()), name
    assert torch.equal(wide(checkpoint, "a.weight"), codes.view(-1, 4).float())
    check_ranges(checkpoint, "a.weight")


def test_conv1d_stays_in_its_own_orientation(store) -> None:
    """A quantizer turns GPT-2's matrices; a cast does not."""
    codes = numbers(4, 12).to(KINDS[0])
    found = dequantized(store({"h.0.attn.c_attn.weight": codes}, model_type="gpt2"))["h.0.attn.c_attn.weight"]
    assert found.shape == (4, 12)
    assert torch.equal(found.read(0, 48).float().view(4, 12), codes.float())


def test_scales_without_a_config_are_used(store) -> None:
    """`.weight_scale` alone, without ComfyUI's settings or a quantization_config."""
    codes, scale = numbers(8, 16).to(KINDS[0]), torch.tensor(0.01)
    checkpoint = store({"a.weight": codes, "a.weight_scale": scale})
    assert torch.equal(wide(checkpoint, "a.weight"), codes.float() * scale)


SCALES = ["a.scale_w", "a.weight.scales", "a.weight_scaling_scale", "a.input_scale", "e.up_projs_scales"]


@pytest.mark.parametrize("name", SCALES)
def test_a_scale_of_an_unknown_kind_is_refused(store, name: str) -> None:
    codes = numbers(8, 16).to(KINDS[0])
    with pytest.raises(CheckpointError, match=name.replace(".", r"\.")):
        dequantized(store({"a.weight": codes, "e.up_projs": codes.clone(), name: torch.tensor(0.01)}))


def test_parameters_that_are_called_scale_are_numbers(store) -> None:
    """LTX-2 has tables of scale and shift beside each other in every block."""
    names = ("b.0.scale_shift_table", "b.0.audio_scale_shift_table", "b.0.proj.weight")
    tensors = {name: numbers(6, 8, seed=seed).to(KINDS[0]) for seed, name in enumerate(names)}
    tensors["b.0.prompt_scale_shift_table"] = numbers(2, 8)
    found = dequantized(store(tensors))
    assert all(torch.equal(wide(found, name), codes.float()) for name, codes in tensors.items())


def test_one_weight_that_lost_its_scale_is_refused(store) -> None:
    codes = numbers(8, 16).to(KINDS[0])
    for more in (
        {"b.weight_scale": torch.tensor(0.1), "b.weight": codes.clone()},
        {"scaled_fp8": torch.zeros(2).to(KINDS[0])},
    ):
        with pytest.raises(CheckpointError, match=r"'a\.weight'"):
            dequantized(store({"a.weight": codes, **more}))


@pytest.mark.parametrize("kind", KINDS)
def test_keep_rounds_to_the_nearest_number(store, tmp_path: Path, kind: torch.dtype) -> None:
    codes, other, bias = (numbers(*shape).to(kind) for shape in ((32, 16), (8, 16), (32,)))
    base = store({"m.q.weight": codes, "m.q.bias": bias, "m.k.weight": other})
    a, b = numbers(4, 16, seed=2), numbers(32, 4, seed=3)
    save_file({"m.q.lora_A.weight": a, "m.q.lora_B.weight": b}, tmp_path / "lora.safetensors")
    merge(base.ref, [tmp_path / "lora.safetensors"], tmp_path / "out", quant="keep")
    found = load_file(tmp_path / "out" / "model.safetensors")
    assert {name: tensor.dtype for name, tensor in found.items()} == dict.fromkeys(base, kind)
    assert torch.equal(found["m.q.weight"].view(torch.uint8), (codes.float() + b @ a).to(kind).view(torch.uint8))
    assert torch.equal(found["m.k.weight"].view(torch.uint8), other.view(torch.uint8))
    assert torch.equal(found["m.q.bias"].view(torch.uint8), bias.view(torch.uint8))


def test_keep_refuses_what_float8_cannot_hold(store, tmp_path: Path) -> None:
    base = store({"m.q.weight": numbers(32, 16).to(KINDS[0])})
    factors = {"m.q.lora_A.weight": torch.full((4, 16), 20.0), "m.q.lora_B.weight": torch.full((32, 4), 20.0)}
    save_file(factors, tmp_path / "lora.safetensors")
    with pytest.raises(CheckpointError, match=r"1[56]\d\d.*, more than"):
        merge(base.ref, [tmp_path / "lora.safetensors"], tmp_path / "out", quant="keep")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("quant", ["keep", "fp8-block"])
def test_a_merge_of_it_is_verified(tmp_path: Path, quant: str) -> None:
    """A weight of one tensor, without a scale; and FP8 blocks made of it are no weights of the base's own."""
    (tmp_path / "base").mkdir()
    shape = (160, 256)
    tensors = {
        f"{TOUCHED}.weight": weight(0, shape),
        f"{OTHER}.weight": weight(1, shape),
        f"{TOUCHED}.bias": weight(2)[:, 0],
    }
    plain = {"model.embed_tokens.weight": weight(3, (32, 256)).bfloat16(), "model.norm.weight": torch.ones(256)}
    tensors = {name: tensor.to(KINDS[0]).contiguous() for name, tensor in tensors.items()}
    save_file({**tensors, **plain}, tmp_path / "base/model.safetensors", metadata={"format": "pt"})
    (tmp_path / "base/config.json").write_text('{"model_type": "llama", "torch_dtype": "bfloat16"}')
    tuned = adapter_of(tmp_path, torch.randn(160, 4, generator=torch.Generator().manual_seed(1)) * 0.05, 256)
    merge(tmp_path / "base", [tuned], tmp_path / "out", quant=quant, yes_lossy=True)
    assert verify(tmp_path / "out", base=tmp_path / "base", adapters=[tuned], level="tensors").ok
