"""A LoRA of every module that a family's published model has: into the original layout and back, with the same products."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

import adapterkit
from adapterkit.adapters.families.flat import dotted
from adapterkit.adapters.families.names import FAMILIES
from adapterkit.adapters.families.told import published
from adapterkit.adapters.formats.plain import PlainFactors
from adapterkit.adapters.formats.relaid import relaid
from adapterkit.adapters.formats.views import FunctionTensor
from adapterkit.dtypes import F32
from adapterkit.errors import UsageError

SMALLER, RANK = 64, 2  # how many times smaller than the published model; of each module


def stored(name: str, tensor: torch.Tensor) -> FunctionTensor:
    return FunctionTensor(name, F32, tuple(tensor.shape), lambda: tensor, "drawn", 0)


def drawn(path: str, rows: int, columns: int, scale: float) -> PlainFactors:
    pair = stored("A", torch.randn(RANK, columns)), stored("B", torch.randn(rows, RANK))
    return PlainFactors(path, RANK, scale, lambda: (torch.empty(0), torch.empty(0)), pair)


def product(one: PlainFactors) -> torch.Tensor:
    a, b = (tensor.read(0, tensor.numel).view(tensor.shape).double() for tensor in one.stored)
    return one.scale * b @ a


@pytest.mark.parametrize("name", list(published()))
def test_a_lora_of_every_module_goes_and_comes_back(name: str) -> None:
    """Fused rows keep their order, halves that change places change back, and nothing is left out or named twice."""
    torch.manual_seed(0)
    family = next(one for one in FAMILIES if one.name == name)
    before: dict[str, PlainFactors] = {}
    for several in published()[name].values():
        for pattern, one in several:
            path = pattern.text.replace("{}", "1" if one.blocks > 1 else "0", 1).replace("{}", "0")
            rows, columns = (max(1, size // SMALLER) for size in one.sizes[0])
            before[path] = drawn(path, rows, columns, 1.0 + len(before) % 3)
    there = relaid(list(before.values()), "original", family)
    assert len({one.path for one in there}) == len(there) <= len(before)
    back = {one.path: one for one in relaid(there, "diffusers", family)}
    assert back.keys() == before.keys()
    for path, one in before.items():
        wanted = product(one)
        assert (product(back[path]) - wanted).abs().max() <= 2e-6 * wanted.abs().max(), path
    if any(not row.alias for row in family.rows) and name != "Qwen-Image":
        assert {one.path for one in there} != before.keys()
    for names in (before, {one.path: one for one in there}):
        flat = {path.replace(".", "_"): one for path, one in names.items()}
        sizes = {path: (one.stored[1].shape[0], one.stored[0].shape[1]) for path, one in flat.items()}
        assert dotted(sizes) == {path: one.path for path, one in flat.items()}


def kohya(
    file: Path, modules: dict[str, tuple[int, int]], metadata: dict[str, str] | None = None
) -> dict[str, torch.Tensor]:
    """A file as sd-scripts saves it; what it adds to each module."""
    tensors, deltas = {}, {}
    for number, (name, (rows, columns)) in enumerate(modules.items()):
        a, b, alpha = torch.randn(RANK, columns), torch.randn(rows, RANK), torch.tensor(1.0 + number)
        tensors |= {f"{name}.lora_down.weight": a, f"{name}.lora_up.weight": b, f"{name}.alpha": alpha}
        deltas[name] = alpha.double() / RANK * b.double() @ a.double()
    save_file(tensors, file, metadata)
    return deltas


def products(file: Path) -> dict[str, torch.Tensor]:
    held, found = {key: tensor.double() for key, tensor in load_file(file).items()}, {}
    for key in held:
        module, _, leaf = key.partition(".lora_")
        if leaf in ("down.weight", "A.weight"):
            b = held[f"{module}.lora_{'up' if leaf[0] == 'd' else 'B'}.weight"]
            found[module] = (
                held.get(f"{module}.alpha", torch.tensor(float(len(held[key])))) / len(held[key]) * b @ held[key]
            )
    return found


def near(one: torch.Tensor, other: torch.Tensor) -> bool:
    return bool((one - other).abs().max() <= 1e-5 * other.abs().max())


FLUX = {"lora_unet_double_blocks_0_img_attn_qkv": (48, 16), "lora_unet_double_blocks_0_img_mlp_0": (64, 16)}


def test_kohya_files_are_combined_without_a_base(tmp_path: Path) -> None:
    torch.manual_seed(1)
    files = [tmp_path / f"{name}.safetensors" for name in "ab"]
    deltas = [kohya(file, FLUX, {"ss_base_model_version": "flux1"}) for file in files]
    adapterkit.combine(files, out=tmp_path / "out.safetensors", weights=[0.5, 2.0])
    found = products(tmp_path / "out.safetensors")
    assert found.keys() == FLUX.keys()
    assert all(near(found[name], 0.5 * deltas[0][name] + 2.0 * deltas[1][name]) for name in FLUX)
    adapterkit.resize(files[0], tmp_path / "small.safetensors", rank=1)
    assert products(tmp_path / "small.safetensors").keys() == FLUX.keys()
    adapterkit.convert(files[0], tmp_path / "diffusers.safetensors", to="diffusers")
    there = products(tmp_path / "diffusers.safetensors")
    rows = torch.cat([there[f"transformer.transformer_blocks.0.attn.to_{x}"] for x in "qkv"])
    assert near(rows, deltas[0]["lora_unet_double_blocks_0_img_attn_qkv"])
    assert near(
        there["transformer.transformer_blocks.0.ff.net.0.proj"], deltas[0]["lora_unet_double_blocks_0_img_mlp_0"]
    )


def test_a_name_that_two_families_write_with_other_dots(tmp_path: Path) -> None:
    file = tmp_path / "lora.safetensors"
    kohya(file, {"lora_unet_double_blocks_0_img_attn_qkv": (48, 16)})
    with pytest.raises(UsageError, match="names modules without dots, which only a base can tell"):
        adapterkit.convert(file, tmp_path / "out.safetensors", to="diffusers")
    kohya(file, {"lora_unet_double_blocks_0_img_attn_qkv": (48, 16)}, {"ss_base_model_version": "hunyuan_video"})
    adapterkit.convert(file, tmp_path / "out.safetensors", to="comfyui")
    assert set(products(tmp_path / "out.safetensors")) == {"diffusion_model.double_blocks.0.img_attn_qkv"}


def test_all_parts_of_sdxl_without_a_base(tmp_path: Path) -> None:
    torch.manual_seed(2)
    layer = "text_model_encoder_layers_0_self_attn_q_proj"
    block = "input_blocks_4_1_transformer_blocks_0_attn2_to_k"
    names = {f"lora_unet_{block}": (16, 2048), f"lora_te1_{layer}": (16, 16), f"lora_te2_{layer}": (16, 16)}
    deltas = kohya(tmp_path / "lora.safetensors", names)
    adapterkit.convert(tmp_path / "lora.safetensors", tmp_path / "out.safetensors", to="diffusers")
    found = products(tmp_path / "out.safetensors")
    path = "text_model.encoder.layers.0.self_attn.q_proj"
    wanted = {
        f"lora_unet_{block}": "unet.down_blocks.1.attentions.0.transformer_blocks.0.attn2.to_k",
        f"lora_te1_{layer}": f"text_encoder.{path}",
        f"lora_te2_{layer}": f"text_encoder_2.{path}",
    }
    assert set(found) == set(wanted.values())
    assert all(near(found[there], deltas[here]) for here, there in wanted.items())
