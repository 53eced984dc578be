"""Control LoRAs of Flux take more inputs than their base: its first layer is widened with zeros, as diffusers does."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING

import pytest
import torch
from safetensors.torch import load_file, save_file

from adapterkit import merge, verify
from adapterkit.errors import TargetError

if TYPE_CHECKING:
    from pathlib import Path

D, R, IN = 32, 4, 16
LAYOUTS = {
    "original": ("", "img_in", "double_blocks.0.img_attn.proj"),
    "comfy": ("model.diffusion_model.", "img_in", "double_blocks.0.img_attn.proj"),
    "diffusers": ("", "x_embedder", "transformer_blocks.0.attn.to_out.0"),
}


def model(path: Path, layout: str, **config: object) -> dict[str, torch.Tensor]:
    torch.manual_seed(0)
    lead, first, block = LAYOUTS[layout]
    tensors = {f"{lead}{first}.weight": torch.randn(D, IN), f"{lead}{first}.bias": torch.randn(D)}
    tensors[f"{lead}{block}.weight"] = torch.randn(D, D)
    if config:
        path.mkdir()
        (path / "config.json").write_text(json.dumps(config))
        path /= "diffusion_pytorch_model.safetensors"
    save_file(tensors, path, {"format": "pt"})
    return tensors


def lora(path: Path, layout: str, inputs: int, module: str = "") -> torch.Tensor:
    """A LoRA of the first layer; its delta."""
    first, lead = LAYOUTS[layout][1], "transformer." if layout == "diffusers" else ""
    a, b = torch.randn(R, inputs), torch.randn(D, R) * 0.1
    name = lead + (module or first)
    save_file({f"{name}.lora_A.weight": a, f"{name}.lora_B.weight": b}, path)
    return b @ a


@pytest.mark.parametrize("times", [2, 6])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_the_first_layer_is_widened(tmp_path: Path, layout: str, times: int) -> None:
    base = model(tmp_path / "base.safetensors", layout)
    delta = lora(tmp_path / "lora.safetensors", layout, IN * times)
    merge(tmp_path / "base.safetensors", [tmp_path / "lora.safetensors"], tmp_path / "out")
    (file,) = (tmp_path / "out").glob("*.safetensors")
    found = load_file(file)
    name = LAYOUTS[layout][0] + LAYOUTS[layout][1] + ".weight"
    wanted = torch.cat([base[name], torch.zeros(D, IN * (times - 1))], 1) + delta
    assert found[name].shape == wanted.shape
    assert torch.allclose(found[name], wanted, atol=1e-5)
    assert all(torch.equal(found[other], tensor) for other, tensor in base.items() if other != name)


def test_a_folder_says_so_in_its_config(tmp_path: Path) -> None:
    """diffusers takes the number of outputs from that of inputs where the config does not say it."""
    said = {"_class_name": "FluxTransformer2DModel", "in_channels": IN, "out_channels": None}
    model(tmp_path / "base", "diffusers", **said)
    lora(tmp_path / "lora.safetensors", "diffusers", IN * 2)
    merge(tmp_path / "base", [tmp_path / "lora.safetensors"], tmp_path / "out")
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert (config["in_channels"], config["out_channels"]) == (IN * 2, IN)
    report = verify(tmp_path / "out", base=tmp_path / "base", adapters=[tmp_path / "lora.safetensors"])
    assert report.ok, report


@pytest.mark.parametrize(("inputs", "module"), [(IN + 8, ""), (IN // 2, ""), (D * 2, "double_blocks.0.img_attn.proj")])
def test_another_base_is_still_refused(tmp_path: Path, inputs: int, module: str) -> None:
    model(tmp_path / "base.safetensors", "original")
    lora(tmp_path / "lora.safetensors", "original", inputs, module)
    with pytest.raises(TargetError, match="is made for a weight of"):
        merge(tmp_path / "base.safetensors", [tmp_path / "lora.safetensors"], tmp_path / "out")
    assert not (tmp_path / "out").exists()
