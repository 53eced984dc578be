"""A merge into every stored format is the float64 formula on its decoded weights, rounded once."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from test_quantized_bad_input import SOURCES

from adapterkit import merge
from adapterkit.checkpoint.decoded import dequantized
from adapterkit.checkpoint.open import open_checkpoint

MODULE = "model.layers.0.self_attn.q_proj"
UNIT = {torch.bfloat16: 7, torch.float16: 10}  # bits of the mantissa


@pytest.mark.parametrize("source", [name for name in SOURCES if name != "mxfp4"])
def test_equals_the_formula(tmp_path: Path, source: str) -> None:
    tensors, settings = SOURCES[source]()
    base = tmp_path / "base"
    base.mkdir()
    named = {name.replace("a.", f"{MODULE}.", 1): tensor.contiguous() for name, tensor in tensors.items()}
    save_file(named, base / "model.safetensors")
    config = {"model_type": "llama", "dtype": "bfloat16", "quantization_config": settings}
    (base / "config.json").write_text(json.dumps(config))
    view = dequantized(open_checkpoint(base))
    handle = view[f"{MODULE}.weight"]
    w = handle.read_wide(0, handle.numel).view(handle.shape).double()
    generator = torch.Generator().manual_seed(0)
    a, b = (torch.randn(*shape, generator=generator) for shape in ((4, w.shape[1]), (w.shape[0], 4)))
    b *= 0.05 * w.abs().mean().item()
    (tmp_path / "adapter").mkdir()
    key = f"base_model.model.{MODULE}.lora_"
    save_file({f"{key}A.weight": a, f"{key}B.weight": b}, tmp_path / "adapter/adapter_model.safetensors")
    how = {"peft_type": "LORA", "r": 4, "lora_alpha": 8, "target_modules": ["q_proj"]}
    (tmp_path / "adapter/adapter_config.json").write_text(json.dumps(how))
    report = merge(base, [tmp_path / "adapter"], tmp_path / "out")
    assert report.base_values == "decoded"
    got = load_file(tmp_path / "out/model.safetensors")
    assert set(got) == set(view)
    merged = got[f"{MODULE}.weight"]
    assert merged.dtype is handle.dtype.torch
    delta = 2 * b.double() @ a.double()
    exact = w + delta
    unit = torch.exp2(torch.floor(torch.log2(exact.abs().clamp(min=2.0**-14))) - UNIT[merged.dtype])
    # Half a unit of the dtype, and what a float32 sum of the two terms may be off.
    assert ((merged.double() - exact).abs() <= unit / 2 + (w.abs() + delta.abs()) * 2.0**-21).all()
    assert (merged.double() != w).float().mean() > 0.5
    for name in set(got) - {f"{MODULE}.weight"}:
        assert torch.equal(got[name], named[name])
    assert "quantization_config" not in (tmp_path / "out/config.json").read_text()
