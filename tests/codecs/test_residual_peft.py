"""`merge --residual`: PEFT loads what rounding took on the output, and computes base + adapter."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from models import apart, build_base, load_model, logits, make_adapter, read_tensors
from safetensors.torch import save_file
from stored_formats import FORMATS

from adapterkit import convert, merge, verify

EXPERTS = ["experts.gate_up_proj", "experts.down_proj"]


def int8(tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Every matrix of the layers as LLM.int8 stores it."""
    found: dict[str, torch.Tensor] = {}
    for name, tensor in tensors.items():
        if tensor.dim() == 2 and ("experts" in name or "_proj" in name):
            stem = name.removesuffix("weight")
            found |= {f"{stem}{leaf}": part for leaf, part in FORMATS["int8"].encode(tensor.float()).items()}
        else:
            found[name] = tensor
    return found


def mxfp4(tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Stacks of experts as gpt-oss stores them, with random codes."""
    generator = torch.Generator().manual_seed(0)
    found: dict[str, torch.Tensor] = {}
    for name, tensor in tensors.items():
        if tensor.dim() == 3:
            count, inside, out = tensor.shape
            shape = (count, out, inside // 32, 16)
            found[f"{name}_blocks"] = torch.randint(0, 256, shape, generator=generator, dtype=torch.uint8)
            found[f"{name}_scales"] = torch.full(shape[:-1], 122, dtype=torch.uint8)
        else:
            found[name] = tensor
    return found


# How the base is stored, its config's section, and what PEFT trains.
KINDS: dict[str, tuple[Any, dict[str, Any], dict[str, Any]]] = {
    "gpt2": (None, {}, {"target_modules": "all-linear"}),
    "qwen3_moe": (
        int8,
        {"quant_method": "bitsandbytes", "load_in_8bit": True},
        {"target_modules": ["q_proj"], "target_parameters": EXPERTS},
    ),
    "gpt_oss": (mxfp4, {"quant_method": "mxfp4"}, {"target_modules": [], "target_parameters": EXPERTS}),
}


def coarse_of(base: Path, folder: Path, kind: str) -> Path:
    encode, said, _ = KINDS[kind]
    if encode is None:
        convert(base, folder, to="int8")
        return folder
    shutil.copytree(base, folder)
    for file in folder.glob("*.safetensors*"):
        file.unlink()
    tensors = {name: tensor.contiguous() for name, tensor in encode(read_tensors(base)).items()}
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "quantization_config": said}))
    return folder


@pytest.mark.parametrize("kind", KINDS)
def test_peft_computes_the_merge(kind: str, tmp_path: Path) -> None:
    from peft import LoraConfig, PeftModel

    more = {"hidden_size": 64, "intermediate_size": 96} if kind == "gpt_oss" else {}
    base = build_base(tmp_path / "base", kind, **more)
    adapter = make_adapter(tmp_path / "adapter", base, LoraConfig(r=4, lora_alpha=8, **KINDS[kind][2]), scale=0.3)
    coarse = coarse_of(base, tmp_path / "coarse", kind)
    report = merge(coarse, [adapter], tmp_path / "out", quant="keep", residual=1000)
    assert report.residual is not None
    assert not report.residual.notes
    convert(coarse, tmp_path / "before", to="f32")
    convert(tmp_path / "out", tmp_path / "after", to="f32")

    def live(folder: Path, beside: Path | None) -> torch.Tensor:
        model = load_model(folder)
        model = model if beside is None else PeftModel.from_pretrained(model, beside)
        return logits(model.float().eval(), double=False)

    expected = live(tmp_path / "before", adapter)
    alone = apart(expected, live(tmp_path / "after", None))
    assert alone > 1e-3
    assert apart(expected, live(tmp_path / "after", tmp_path / "out-residual")) < alone / 50
    checked = verify(tmp_path / "out", base=coarse, adapters=[adapter], level="tensors")
    assert checked.pair is not None
    assert checked.pair.error < 1e-3
