"""LDM's module names against the conversion of whole checkpoints in diffusers."""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from models import write_checkpoint
from safetensors.torch import save_file

from adapterkit.adapters.families.names import others
from adapterkit.adapters.fold import fold
from adapterkit.adapters.load import load_adapter
from adapterkit.checkpoint.open import open_checkpoint

RESNET = ("in_layers.0", "in_layers.2", "emb_layers.1", "out_layers.0", "out_layers.3", "skip_connection")
ATTENTION = ("norm", "proj_in", "proj_out", "transformer_blocks.0.attn1.to_q", "transformer_blocks.0.ff.net.0.proj")


def ldm_modules() -> Iterator[str]:
    """The UNet of SDXL as its authors name it: three levels of two layers, attention in the lower two."""
    yield from ("input_blocks.0.0", "time_embed.0", "time_embed.2", "label_emb.0.0", "label_emb.0.2", "out.0", "out.2")
    for index in range(1, 9):
        if index % 3 == 0:
            yield f"input_blocks.{index}.0.op"
            continue
        yield from (f"input_blocks.{index}.0.{name}" for name in RESNET)
        if index > 3:
            yield from (f"input_blocks.{index}.1.{name}" for name in ATTENTION)
    for index, names in enumerate((RESNET, ATTENTION, RESNET)):
        yield from (f"middle_block.{index}.{name}" for name in names)
    for index in range(9):
        yield from (f"output_blocks.{index}.0.{name}" for name in RESNET)
        if index < 6:
            yield from (f"output_blocks.{index}.1.{name}" for name in ATTENTION)
    yield from ("output_blocks.2.2.conv", "output_blocks.5.2.conv")


@pytest.fixture(scope="module")
def converted() -> dict[str, str]:
    """LDM's module names and what diffusers makes of them."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        from diffusers.loaders.single_file_utils import convert_ldm_unet_checkpoint
    modules = list(ldm_modules())
    numbers = {name: torch.tensor(index) for index, name in enumerate(modules)}
    weights = {f"model.diffusion_model.{name}.{leaf}": n for name, n in numbers.items() for leaf in ("weight", "bias")}
    found = convert_ldm_unet_checkpoint(weights, {"layers_per_block": 2, "addition_embed_type": "text_time"})
    return {
        modules[int(index)]: name.removesuffix(".weight") for name, index in found.items() if name.endswith(".weight")
    }


def test_as_diffusers_converts_a_checkpoint(converted: dict[str, str]) -> None:
    assert len(converted) == len(list(ldm_modules()))
    for ldm, diffusers in converted.items():
        assert f"{diffusers}.weight" in set(others(f"{ldm}.weight"))
        assert f"{ldm}.weight" in set(others(f"{diffusers}.weight"))


OTHERS = ["middle_block.3.norm", "input_blocks.1.0.x", "out.1", "output_blocks.1.4.norm", "input_blocks.99.0.op"]


@pytest.mark.parametrize("other", OTHERS)
def test_other_names_have_no_other_form(other: str) -> None:
    assert list(others(f"{other}.weight")) == []


def test_a_file_of_sdxl_finds_its_modules(converted: dict[str, str], tmp_path: Path) -> None:
    weights = {f"{name}.weight": torch.randn(4, 4) for name in converted.values() if "norm" not in name}
    base = write_checkpoint(tmp_path / "unet", weights, {"_class_name": "UNet2DConditionModel"})
    wanted, tensors = dict(weights), {}
    for ldm, name in converted.items():
        if "to_q" in ldm or ("conv" in name and "norm" not in name):
            up, down = torch.randn(4, 2), torch.randn(2, 4)
            flat = "lora_unet_" + ldm.replace(".", "_")
            tensors |= {
                f"{flat}.lora_up.weight": up,
                f"{flat}.lora_down.weight": down,
                f"{flat}.alpha": torch.tensor(2.0),
            }
            wanted[f"{name}.weight"] = weights[f"{name}.weight"] + (up.double() @ down.double()).float()
    save_file(tensors, tmp_path / "sdxl.safetensors")
    found = fold(open_checkpoint(base), [load_adapter(tmp_path / "sdxl.safetensors")]).checkpoint
    assert sum(not torch.equal(wanted[name], weights[name]) for name in weights) > 20
    for name, tensor in wanted.items():
        assert torch.allclose(found[name].read(0, 16).view(4, 4), tensor, atol=1e-5)
