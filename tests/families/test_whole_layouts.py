"""Whole models from layout to layout: diffusers' own conversions give back what went in, name by name and value by value."""

from __future__ import annotations

import inspect
import json
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from test_checkpoint_conversions import CONVERSIONS

import adapterkit
from adapterkit.adapters.families.names import FAMILIES, FamilyNames
from adapterkit.adapters.families.relayout import relaid
from adapterkit.checkpoint.checkpoint import Checkpoint
from adapterkit.checkpoint.tensor import Tensor
from adapterkit.dtypes import BF16
from adapterkit.errors import CheckpointError, TargetError, UsageError

WHOLE = [(family.name, name) for family in FAMILIES if family.whole for name in family.classes]
# What a class does not say by default.
CONFIGS = {
    "HiDreamImageTransformer2DModel": {
        "patch_size": 2,
        "in_channels": 16,
        "out_channels": 16,
        "caption_channels": [64, 64],
        "text_emb_dim": 64,
        "num_attention_heads": 2,
        "num_routed_experts": 2,
    },
}
FEWER = ("num_layers", "num_single_layers", "num_dit_layers", "num_single_dit_layers", "num_mmdit_layers", "n_layers")
SMALL = {"attention_head_dim": 8, "num_attention_heads": 2, "num_layers": 1, "num_single_layers": 1}


class Sized(Tensor):
    """A tensor of which only the size is known."""

    def __init__(self, name: str, shape: tuple[int, ...]) -> None:
        self.name, self.dtype, self.shape = name, BF16, shape

    @property
    def how(self) -> str:
        return "copy"

    def read(self, start: int, stop: int) -> torch.Tensor:
        raise AssertionError("no value is needed")


def sized(shapes: dict[str, tuple[int, ...]]) -> Checkpoint:
    return Checkpoint("model", {name: Sized(name, shape) for name, shape in shapes.items()})


def converter(family: str) -> Any:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        from diffusers.loaders import single_file_utils
    if family == "Stable Diffusion UNet":
        return single_file_utils.convert_ldm_unet_checkpoint
    if family == "HiDream":
        return single_file_utils.convert_hidream_transformer_to_diffusers
    return getattr(single_file_utils, CONVERSIONS[family][0])


def model_class(name: str) -> Any:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        import diffusers
    return getattr(diffusers, name)


SAME = ("HiDream", "Qwen-Image")  # whose two layouts have the same names


def _original(shapes: dict[str, tuple[int, ...]], family: str) -> dict[str, tuple[int, ...]]:
    """The original layout, with what diffusers computes."""
    if family != "Sana":
        return {key: tensor.shape for key, tensor in relaid(sized(shapes), "original").tensors.items()}
    names = FamilyNames(shapes)
    found: dict[str, tuple[int, ...]] = {"pos_embed": (1, 4, 4), "y_embedder.y_embedding": (4, 4)}
    for row in next(one.rows for one in FAMILIES if one.name == family):
        for leaf in {pair[0] for pair in row.leaves}:
            for block in range(2 if "{}" in row.original else 1):
                layout = names.find(row.original.format(block) + leaf)
                if layout is not None:
                    found[row.original.format(block) + leaf] = layout.shape
    return found


@pytest.mark.parametrize(("family", "name"), WHOLE)
def test_every_name_of_the_class_goes_and_comes_back(family: str, name: str) -> None:
    """At the class's own sizes, with few layers: shapes alone, on the meta device."""
    kind = model_class(name)
    known = inspect.signature(kind.__init__).parameters
    config = {key: 2 for key in FEWER if key in known and family != "Mochi"}  # whose last block is another
    with warnings.catch_warnings(), torch.device("meta"):
        warnings.simplefilter("ignore")
        more = CONFIGS.get(name, {}) | ({"vace_layers": [0]} if "vace_layers" in known else {})
        model = kind(**more, **config)
    shapes = {key: tuple(tensor.shape) for key, tensor in model.state_dict().items()}
    missing = next(one.only_original for one in FAMILIES if one.name == family)
    if missing:
        with pytest.raises(UsageError, match=f"also holds {missing[0]}, "):
            relaid(sized(shapes), "original")
    original = _original(shapes, family)
    back = {key: tensor.shape for key, tensor in relaid(sized(original), "diffusers").tensors.items()}
    assert back == shapes
    if family in SAME:
        assert original == shapes
    given = {key: torch.empty(shape, device="meta") for key, shape in original.items()}
    if family == "Stable Diffusion UNet":
        found = converter(family)(
            {f"model.diffusion_model.{key}": one for key, one in given.items()}, config=model.config
        )
    else:
        found = converter(family)(given, **({"config": {}} if family == "MiniMax-H3" else {}))
    assert {key: tuple(one.shape) for key, one in found.items() if one is not None} == shapes


def flux(folder: Path, dtype: torch.dtype = torch.bfloat16) -> Path:
    torch.manual_seed(0)
    sizes = {"in_channels": 4, "joint_attention_dim": 16, "pooled_projection_dim": 8, "axes_dims_rope": [2, 2, 4]}
    model_class("FluxTransformer2DModel")(**SMALL, **sizes, guidance_embeds=True).to(dtype).save_pretrained(folder)
    return folder


def unet(folder: Path) -> Path:
    torch.manual_seed(0)
    model_class("UNet2DConditionModel")(
        sample_size=8,
        layers_per_block=2,
        block_out_channels=(8, 16, 16),
        norm_num_groups=4,
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
        cross_attention_dim=16,
        attention_head_dim=4,
    ).save_pretrained(folder)
    return folder


def weights(folder: Path) -> dict[str, torch.Tensor]:
    return load_file(folder / "diffusion_pytorch_model.safetensors")


@pytest.mark.parametrize("make", [flux, unet], ids=["Flux.1", "UNet"])
def test_values_by_diffusers_conversion_and_back(make: Any, tmp_path: Path) -> None:
    folder = make(tmp_path / "transformer")
    report = adapterkit.convert(folder, to="comfyui", out=tmp_path / "model.safetensors")
    assert report.notes
    original = load_file(tmp_path / "model.safetensors")
    before = weights(folder)
    if make is unet:
        led = {f"model.diffusion_model.{key}": tensor for key, tensor in original.items()}
        config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
        found = converter("Stable Diffusion UNet")(led, config=config)
    else:
        # diffusers' function knows one width alone, 3072, at which it cuts the fused rows: here they are cut by ours.
        found = None
    if found is not None:
        assert found.keys() == before.keys()
        assert all(torch.equal(found[key], before[key]) for key in before)
    adapterkit.convert(tmp_path / "model.safetensors", to="diffusers", base=folder, out=tmp_path / "back")
    after = weights(tmp_path / "back")
    assert after.keys() == before.keys()
    assert all(torch.equal(after[key], before[key]) and after[key].dtype == before[key].dtype for key in before)
    assert (tmp_path / "back" / "config.json").read_bytes() == (folder / "config.json").read_bytes()
    kind = model_class("FluxTransformer2DModel" if make is flux else "UNet2DConditionModel")
    loaded = kind.from_pretrained(tmp_path / "back").state_dict()
    assert all(torch.equal(loaded[key].float(), before[key].float()) for key in before)


def test_rows_of_flux_lie_where_its_code_reads_them(tmp_path: Path) -> None:
    """q, k, v and the MLP's rows of a single block one after the other; scale and shift of the last norm change places."""
    folder = flux(tmp_path / "transformer")
    adapterkit.convert(folder, to="comfyui", out=tmp_path / "model.safetensors")
    original, before = load_file(tmp_path / "model.safetensors"), weights(folder)
    lead = "single_transformer_blocks.0"
    fused = [before[f"{lead}.{name}.weight"] for name in ("attn.to_q", "attn.to_k", "attn.to_v", "proj_mlp")]
    assert torch.equal(original["single_blocks.0.linear1.weight"], torch.cat(fused))
    scale, shift = before["norm_out.linear.weight"].chunk(2)
    assert torch.equal(original["final_layer.adaLN_modulation.1.weight"], torch.cat([shift, scale]))


def test_a_file_with_other_parts_needs_the_denoiser_named(tmp_path: Path) -> None:
    folder = unet(tmp_path / "unet")
    adapterkit.convert(folder, to="comfyui", out=tmp_path / "unet.safetensors")
    file = tmp_path / "all.safetensors"
    tensors = {
        f"model.diffusion_model.{key}": tensor for key, tensor in load_file(tmp_path / "unet.safetensors").items()
    }
    save_file({**tensors, "first_stage_model.encoder.conv_in.weight": torch.zeros(2, 2)}, file)
    with pytest.raises(UsageError, match=r"holds 1 tensor of other parts too, as 'first_stage_model"):
        adapterkit.convert(file, to="diffusers", base=folder, out=tmp_path / "back")
    report = adapterkit.convert(f"{file}#unet", to="diffusers", base=folder, out=tmp_path / "back")
    assert any("1 tensor of other parts is left out" in note for note in report.notes)
    before, after = weights(folder), weights(tmp_path / "back")
    assert all(torch.equal(after[key], before[key]) for key in before)


def test_float8_keeps_its_bytes(tmp_path: Path) -> None:
    folder = flux(tmp_path / "transformer")
    low = {key: t.to(torch.float8_e4m3fn) if t.dim() > 1 else t for key, t in weights(folder).items()}
    save_file(low, folder / "diffusion_pytorch_model.safetensors", metadata={"format": "pt"})
    adapterkit.convert(folder, to="comfyui", out=tmp_path / "model.safetensors")
    adapterkit.convert(tmp_path / "model.safetensors", to="diffusers", base=folder, out=tmp_path / "back")
    after = weights(tmp_path / "back")
    assert all(torch.equal(after[key].view(torch.uint8), low[key].view(torch.uint8)) for key in low)


def test_what_is_refused(tmp_path: Path) -> None:
    folder = flux(tmp_path / "transformer")
    adapterkit.convert(folder, to="comfyui", out=tmp_path / "model.safetensors")
    file = tmp_path / "model.safetensors"
    with pytest.raises(UsageError, match=r"diffusers' config.json says sizes that a file does not"):
        adapterkit.convert(file, to="diffusers", out=tmp_path / "out")
    with pytest.raises(UsageError, match="has the original layout already"):
        adapterkit.convert(file, to="comfyui", out=tmp_path / "out.safetensors")
    with pytest.raises(UsageError, match="is a whole model, and kohya is a format of adapters"):
        adapterkit.convert(folder, to="kohya", out=tmp_path / "out.safetensors")
    with pytest.raises(TargetError, match="UNet2DConditionModel, and this is Flux"):
        adapterkit.convert(file, to="diffusers", base=unet(tmp_path / "unet"), out=tmp_path / "out")
    tensors = load_file(file)
    short = dict(tensors)
    short["single_blocks.0.linear1.weight"] = short["single_blocks.0.linear1.weight"][:-1].contiguous()
    save_file(short, tmp_path / "short.safetensors")
    with pytest.raises(TargetError, match=r"is another model: 'single_transformer_blocks.0.proj_mlp.weight'"):
        adapterkit.convert(tmp_path / "short.safetensors", to="diffusers", base=folder, out=tmp_path / "out")
    lacking = weights(folder)
    del lacking["transformer_blocks.0.attn.to_k.weight"]
    save_file(lacking, folder / "diffusion_pytorch_model.safetensors", metadata={"format": "pt"})
    with pytest.raises(
        CheckpointError, match=r"'double_blocks.0.img_attn.qkv.weight' of Flux.1 cannot be put together"
    ):
        adapterkit.convert(folder, to="comfyui", out=tmp_path / "out.safetensors")
    save_file({"model.layers.0.weight": torch.zeros(2, 2)}, tmp_path / "other.safetensors")
    with pytest.raises(UsageError, match="of no family whose original and diffusers layouts are known"):
        adapterkit.convert(tmp_path / "other.safetensors", to="diffusers", base=folder, out=tmp_path / "out")
