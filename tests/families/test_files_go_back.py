"""A LoRA in the file that each program loads: what it adds is the same in every style, and the programs load it."""

from __future__ import annotations

import hashlib
import json
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from models import write_checkpoint
from safetensors import safe_open
from safetensors.torch import load_file, save_file

import adapterkit
from adapterkit.adapters.fold import fold
from adapterkit.adapters.load import load_adapter
from adapterkit.checkpoint.open import open_checkpoint
from adapterkit.errors import UnsupportedAdapter, UsageError

WIDE, RANK = 16, 2
Tensors = dict[str, torch.Tensor]

DOUBLE, SINGLE = "transformer_blocks.0", "single_transformer_blocks.0"
FLUX = {
    **{f"{DOUBLE}.attn.{name}": WIDE for name in ("to_q", "to_k", "to_v", "add_k_proj", "to_out.0")},
    **{f"{SINGLE}.attn.{name}": WIDE for name in ("to_q", "to_v")},
    f"{SINGLE}.proj_mlp": 4 * WIDE,
    "norm_out.linear": 2 * WIDE,
    f"{DOUBLE}.norm1.linear": 6 * WIDE,
}
WAN = {f"blocks.0.{side}.{name}": WIDE for side in ("attn1", "attn2") for name in ("to_q", "to_out.0")} | {
    "proj_out": WIDE
}
Z_IMAGE = {f"layers.0.attention.{name}": WIDE for name in ("to_q", "to_v", "to_out.0")} | {
    "layers.0.feed_forward.w1": WIDE
}
LUMINA = {
    "layers.0.attn.to_q": WIDE,
    "layers.0.attn.to_k": 4,
    "layers.0.attn.to_v": 4,
    "layers.0.feed_forward.linear_1": 8,
}
MINIMAX = {"transformer_blocks.0.ff.net.0.proj": 2 * WIDE, "transformer_blocks.0.attn.to_k": WIDE, "proj_in": WIDE} | {
    "transformer_blocks.0.adaln_proj.linear": WIDE
}
SD3 = {f"{DOUBLE}.attn.to_q": WIDE, f"{DOUBLE}.attn.add_q_proj": WIDE, f"{DOUBLE}.norm1_context.linear": 2 * WIDE}
SAID = {"Flux": "flux1", "Z-Image": "zimage"}  # whose names are those of HunyuanVideo and Ideogram 4 too
CASES = {"Flux": FLUX, "Wan": WAN, "Z-Image": Z_IMAGE, "Lumina 2": LUMINA, "MiniMax-H3": MINIMAX, "SD3": SD3}


def drawn(modules: Mapping[str, int], lead: str, scale: float = 1.0) -> tuple[Tensors, Tensors]:
    """A file of diffusers' keys with an alpha of its own for every module, and what it adds to each."""
    torch.manual_seed(0)
    file: Tensors = {}
    deltas: Tensors = {}
    for number, (path, rows) in enumerate(modules.items()):
        a, b = torch.randn(RANK, WIDE), torch.randn(rows, RANK)
        alpha = scale * (1 + number % 2)
        file |= {f"{lead}{path}.lora_A.weight": a, f"{lead}{path}.lora_B.weight": b}
        file[f"{lead}{path}.alpha"] = torch.tensor(alpha)
        deltas[f"{path}.weight"] = alpha / RANK * b.double() @ a.double()
    return file, deltas


def behind_header(file: Path) -> str:
    data = file.read_bytes()
    return hashlib.sha256(data[8 + int.from_bytes(data[:8], "little") :]).hexdigest()


def added(base: Path, file: Path) -> Tensors:
    found = fold(open_checkpoint(base), [load_adapter(file)]).checkpoint
    return {name: tensor.read(0, tensor.numel).view(tensor.shape) for name, tensor in found.tensors.items()}


@pytest.mark.parametrize("style", ["diffusers", "kohya", "comfyui", "lycoris"])
@pytest.mark.parametrize("family", CASES)
def test_every_style_adds_the_same(family: str, style: str, tmp_path: Path) -> None:
    tensors, deltas = drawn(CASES[family], "transformer.")
    metadata = {"ss_output_name": "mine", "sshs_model_hash": "1", "ss_base_model_version": SAID.get(family, "")}
    save_file(tensors, tmp_path / "lora.safetensors", metadata)
    zeros = {name: torch.zeros(delta.shape) for name, delta in deltas.items()}
    zeros |= {f"{SINGLE}.attn.to_k.weight": torch.zeros(WIDE, WIDE)} if family == "Flux" else {}
    zeros |= (
        {f"{DOUBLE}.attn.{name}_proj.weight": torch.zeros(WIDE, WIDE) for name in ("add_q", "add_v")}
        if family == "Flux"
        else {}
    )
    if family in ("SD3", "MiniMax-H3", "Z-Image"):
        lead = "layers.0.attention" if family == "Z-Image" else f"{DOUBLE}.attn"
        names = ("to_q", "to_k", "to_v", "add_q_proj", "add_k_proj", "add_v_proj")
        more = {f"{lead}.{name}.weight": torch.zeros(WIDE, WIDE) for name in names[: 6 if family == "SD3" else 3]}
        zeros = {**more, **zeros}
    base = write_checkpoint(tmp_path / "transformer", zeros, {"_class_name": "Transformer2DModel"})
    out = tmp_path / f"{style}.safetensors"
    adapterkit.convert(tmp_path / "lora.safetensors", out, to=style)
    keys = set(load_file(out))
    lead = {"diffusers": "transformer.", "kohya": "lora_unet_", "comfyui": "diffusion_model.", "lycoris": "lycoris_"}[
        style
    ]
    assert all(key.startswith(lead) for key in keys)
    with safe_open(out, "pt") as opened:
        said = opened.metadata()
    assert said["ss_output_name"] == "mine"
    assert said["sshs_model_hash"] == behind_header(out)
    found = added(base, out)
    for name, delta in deltas.items():
        assert (found[name].double() - delta).abs().max() <= 2e-6 * delta.abs().max(), name
    # And from there to diffusers' own names again.
    adapterkit.convert(out, tmp_path / "again.safetensors", to="diffusers", base=base)
    again = added(base, tmp_path / "again.safetensors")
    for name, delta in deltas.items():
        assert (again[name].double() - delta).abs().max() <= 2e-6 * delta.abs().max(), name


def test_rows_that_nobody_knows(tmp_path: Path) -> None:
    """Of Flux's fused rows the adapter has q alone; how wide the rest is, only a base tells."""
    tensors, deltas = drawn({f"{SINGLE}.attn.to_q": WIDE}, "transformer.")
    save_file(tensors, tmp_path / "lora.safetensors", {"modelspec.architecture": "flux-1-dev/lora"})
    with pytest.raises(UnsupportedAdapter, match="proj_mlp, which the adapter leaves alone") as refused:
        adapterkit.convert(tmp_path / "lora.safetensors", tmp_path / "kohya.safetensors", to="kohya")
    assert refused.value.hint == "add base='BASE'"
    names = (f"{SINGLE}.attn.to_q", f"{SINGLE}.attn.to_k", f"{SINGLE}.attn.to_v", f"{SINGLE}.proj_mlp")
    zeros = {f"{name}.weight": torch.zeros(3 * WIDE if "mlp" in name else WIDE, WIDE) for name in names}
    base = write_checkpoint(tmp_path / "transformer", zeros, {})
    adapterkit.convert(tmp_path / "lora.safetensors", tmp_path / "kohya.safetensors", to="kohya", base=base)
    (delta,) = deltas.values()
    found = added(base, tmp_path / "kohya.safetensors")
    assert (found[f"{SINGLE}.attn.to_q.weight"].double() - delta).abs().max() <= 2e-6 * delta.abs().max()
    assert not found[f"{SINGLE}.proj_mlp.weight"].any()


def test_a_folder_is_no_file(tmp_path: Path) -> None:
    tensors, _ = drawn(WAN, "transformer.")
    save_file(tensors, tmp_path / "lora.safetensors")
    with pytest.raises(UsageError, match="peft is a folder"):
        adapterkit.convert(tmp_path / "lora.safetensors", tmp_path / "out.safetensors", to="peft")
    adapterkit.convert(tmp_path / "lora.safetensors", tmp_path / "out", to="diffusers")
    assert (tmp_path / "out" / "pytorch_lora_weights.safetensors").is_file()


@pytest.fixture(scope="module")
def unet(tmp_path_factory: pytest.TempPathFactory) -> tuple[Any, Path]:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        from diffusers import UNet2DConditionModel
    folder = tmp_path_factory.mktemp("pipeline") / "unet"
    blocks = {
        "down_block_types": ("CrossAttnDownBlock2D", "DownBlock2D"),
        "up_block_types": ("UpBlock2D", "CrossAttnUpBlock2D"),
    }
    model = UNet2DConditionModel(
        block_out_channels=(8, 16), layers_per_block=2, sample_size=8, cross_attention_dim=8, attention_head_dim=4,
        norm_num_groups=4, **blocks,
    )  # fmt: skip
    model.save_pretrained(folder)
    return model, folder


@pytest.mark.parametrize("style", ["kohya", "peft"])
def test_diffusers_loads_it(style: str, unet: tuple[Any, Path], tmp_path: Path) -> None:
    """Trained elsewhere, written ``--to diffusers``, loaded and fused by diffusers: the merge's own weights."""
    model, folder = unet
    torch.manual_seed(0)
    before = load_file(folder / "diffusion_pytorch_model.safetensors")
    tensors: Tensors = {}
    for key, weight in before.items():
        if key.endswith(("to_q.weight", "to_v.weight", "to_out.0.weight")):
            path = key.removesuffix(".weight")
            a, b = torch.randn(RANK, weight.shape[1]), torch.randn(weight.shape[0], RANK) * 0.1
            if style == "kohya":
                flat = f"lora_unet_{path.replace('.', '_')}"
                tensors |= {
                    f"{flat}.lora_down.weight": a,
                    f"{flat}.lora_up.weight": b,
                    f"{flat}.alpha": torch.tensor(3.0),
                }
            else:
                tensors |= {f"base_model.model.{path}.lora_A.weight": a, f"base_model.model.{path}.lora_B.weight": b}
    source = tmp_path / "lora.safetensors"
    save_file(tensors, source)
    adapterkit.convert(source, tmp_path / "out", to="diffusers", base=folder)
    adapterkit.merge(folder, [source], tmp_path / "merged")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        fresh = type(model).from_pretrained(folder)
        fresh.load_lora_adapter(str(tmp_path / "out"), prefix="unet", weight_name="pytorch_lora_weights.safetensors")
        fresh.fuse_lora()
    after = {key.replace(".base_layer", ""): tensor for key, tensor in fresh.state_dict().items() if "lora_" not in key}
    merged = load_file(tmp_path / "merged" / "diffusion_pytorch_model.safetensors")
    for name, tensor in merged.items():
        assert (after[name] - tensor).abs().max() <= 2e-6 * tensor.abs().max()
    assert sum(not torch.equal(merged[name], before[name]) for name in before) == len(tensors) // (
        3 if style == "kohya" else 2
    )


@pytest.mark.parametrize("verb", ["combine", "resize", "extract"])
@pytest.mark.parametrize("style", ["diffusers", "comfyui"])
def test_other_verbs_write_it_too(verb: str, style: str, tmp_path: Path) -> None:
    """Of a model in diffusers' layout, written for ComfyUI: the same change, in one file."""
    torch.manual_seed(0)
    modules = {f"blocks.0.{side}.{name}": WIDE for side in ("attn1", "attn2") for name in ("to_q", "to_out.0")}
    zeros = {f"{path}.weight": torch.zeros(rows, WIDE) for path, rows in modules.items()}
    base = write_checkpoint(tmp_path / "transformer", zeros, {"_class_name": "WanTransformer3DModel"})
    files = []
    for number in (1, 2):
        tensors, _ = drawn(modules, "transformer.", float(number))
        save_file(tensors, tmp_path / f"{number}.safetensors")
        files.append(tmp_path / f"{number}.safetensors")
    out = tmp_path / "out.safetensors"
    if verb == "combine":
        adapterkit.combine(files, out, base=base, to=style)
        adapterkit.merge(base, files, tmp_path / "merged")
    else:
        adapterkit.merge(base, files[:1], tmp_path / "merged")
        if verb == "resize":
            adapterkit.resize(files[0], out, rank=RANK, to=style)
        else:
            adapterkit.extract(base, tmp_path / "merged", out, rank=RANK, to=style)
    assert out.is_file()
    lead = "transformer.blocks.0.attn1.to_q." if style == "diffusers" else "diffusion_model.blocks.0.self_attn.q."
    assert any(key.startswith(lead) for key in load_file(out))
    wanted = load_file(tmp_path / "merged" / "diffusion_pytorch_model.safetensors")
    found = added(base, out)
    for name, tensor in wanted.items():
        assert (found[name] - tensor).abs().max() <= 5e-6 * tensor.abs().max()


def test_a_name_that_is_a_file_is_a_file_of_the_first_style(tmp_path: Path) -> None:
    """combine, resize and extract write ``OUT.safetensors`` as one file: keys and metadata as those of the first input."""
    tensors, deltas = drawn(FLUX, "transformer.")
    save_file(tensors, tmp_path / "lora.safetensors", {"ss_output_name": "mine", "sshs_model_hash": "1"})
    zeros = {name: torch.zeros(delta.shape) for name, delta in deltas.items()}
    zeros |= {f"{SINGLE}.attn.to_k.weight": torch.zeros(WIDE, WIDE)}
    zeros |= {f"{DOUBLE}.attn.{name}_proj.weight": torch.zeros(WIDE, WIDE) for name in ("add_q", "add_v")}
    base = write_checkpoint(tmp_path / "transformer", zeros, {"_class_name": "FluxTransformer2DModel"})
    adapterkit.convert(tmp_path / "lora.safetensors", tmp_path / "kohya.safetensors", to="kohya", base=base)
    for first, lead in (("lora", "transformer."), ("kohya", "lora_unet_")):
        file = tmp_path / f"{first}.safetensors"
        outs = [tmp_path / f"{first}-{verb}.safetensors" for verb in ("combined", "resized")]
        adapterkit.combine([file, tmp_path / "lora.safetensors"], outs[0], base=base, weights=[0.25, 0.75])
        # Fused modules of kohya's names: rows that nobody trained come from the base.
        adapterkit.resize(file, outs[1], rank=8, base=base)
        for out in outs:
            assert all(key.startswith(lead) for key in load_file(out))
            with safe_open(out, "pt") as opened:
                said = opened.metadata()
            assert (said["ss_output_name"], said["sshs_model_hash"]) == ("mine", behind_header(out))
            found = added(base, out)
            for name, delta in deltas.items():
                assert (found[name].double() - delta).abs().max() <= 1e-5 * delta.abs().max(), name
    with pytest.raises(UsageError, match="in two layouts, and ties compares them by name"):
        both = [tmp_path / "kohya.safetensors", tmp_path / "lora.safetensors"]
        adapterkit.combine(both, tmp_path / "ties", base=base, method="ties", parameters={"density": 0.5}, rank=2)
    for to in ("peft", "mlx"):
        with pytest.raises(UsageError, match=f"{to} is a folder"):
            adapterkit.resize(tmp_path / "lora.safetensors", tmp_path / "x.safetensors", rank=1, base=base, to=to)
    adapterkit.resize(tmp_path / "lora.safetensors", tmp_path / "mlx", rank=8, base=base, to="mlx")
    found = {
        name: tensor.read(0, tensor.numel).view(tensor.shape)
        for name, tensor in fold(open_checkpoint(base), [load_adapter(tmp_path / "mlx")]).checkpoint.tensors.items()
    }
    assert all((found[name].double() - delta).abs().max() <= 1e-5 * delta.abs().max() for name, delta in deltas.items())


def test_names_of_several_families(tmp_path: Path) -> None:
    """The attention of SD3, Flux, Krea 2 and others has one name in diffusers: the base says what to call it elsewhere."""
    names = [f"{DOUBLE}.attn.{name}" for name in ("to_q", "to_k", "to_v", "to_out.0")]
    tensors, deltas = drawn(dict.fromkeys(names, WIDE), "transformer.")
    source = tmp_path / "lora.safetensors"
    save_file(tensors, source)
    with pytest.raises(UnsupportedAdapter, match=r"attn.to_.' may be of Flux.1, .* or Qwen-Image") as refused:
        adapterkit.convert(source, tmp_path / "x.safetensors", to="comfyui")
    assert refused.value.hint == "add base='BASE'"
    zeros = {name: torch.zeros(delta.shape) for name, delta in deltas.items()}
    wanted = {
        "SD3Transformer2DModel": "joint_blocks.0.x_block.attn.qkv",
        "FluxTransformer2DModel": "double_blocks.0.img_attn.qkv",
        "MiniMaxH3Transformer3DModel": "blocks.0.attn.qkv_proj",
    }
    for said, module in wanted.items():
        base = write_checkpoint(tmp_path / said, zeros, {"_class_name": said})
        out = tmp_path / f"{said}.safetensors"
        adapterkit.convert(source, out, to="comfyui", base=base)
        found = load_file(out)
        a, b, alpha = (found[f"diffusion_model.{module}.{x}"] for x in ("lora_down.weight", "lora_up.weight", "alpha"))
        delta = alpha.double() / len(a) * b.double() @ a.double()
        stacked = torch.cat([deltas[f"{name}.weight"] for name in names[:3]])
        assert (delta - stacked).abs().max() <= 2e-6 * stacked.abs().max()


def test_sd_scripts_names_of_each_stable_diffusion(tmp_path: Path) -> None:
    """sd-scripts looks for ``lora_te_`` in SD 1 and 2 alone, and names the UNet of SDXL in the original layout."""
    torch.manual_seed(0)
    block, layer = "down_blocks.1.attentions.0.transformer_blocks", "text_model.encoder.layers.0.self_attn.q_proj"
    inside = {"unet": f"{block}.0.attn2.to_v", "text_encoder": layer, "text_encoder_2": layer}
    flat = "lora_unet_{}_1_attentions_0_transformer_blocks_{}_attn2_to_v".format
    old, sdxl = flat("down_blocks", 0), "lora_unet_input_blocks_4_1_transformer_blocks_0_attn2_to_v"
    te = "_text_model_encoder_layers_0_self_attn_q_proj"

    def base(*components: str) -> Path:
        folder = tmp_path / f"pipeline{len(components)}"
        for name in components:
            write_checkpoint(folder / name, {f"{inside[name]}.weight": torch.zeros(WIDE, WIDE)}, {})
        index = {name: ["diffusers", "Any"] for name in components}
        (folder / "model_index.json").write_text(json.dumps({"_class_name": "StableDiffusionPipeline", **index}))
        return folder

    def drawn_for(width: int, **modules: str) -> Tensors:
        return {
            f"{lead}.{path}.lora_{half}.weight": torch.randn(*shape)
            for lead, path in modules.items()
            for half, shape in (("A", (RANK, width)), ("B", (WIDE, RANK)))
        }

    both, first = base(*inside), base("unet", "text_encoder")
    encoder = {"text_encoder": layer}
    cases: list[tuple[Tensors, Path | None, set[str]]] = [
        (drawn_for(WIDE, **encoder), first, {f"lora_te{te}"}),
        (drawn_for(WIDE, **encoder), both, {f"lora_te1{te}"}),
        (drawn_for(WIDE, unet=inside["unet"], **encoder), first, {old, f"lora_te{te}"}),
        (drawn_for(WIDE, unet=inside["unet"], **encoder), both, {sdxl, f"lora_te1{te}"}),
        # Without a base the shapes tell, and the other parts of the file.
        (drawn_for(768, unet=inside["unet"], **encoder), None, {old, f"lora_te{te}"}),
        (drawn_for(2048, unet=inside["unet"], **encoder), None, {sdxl, f"lora_te1{te}"}),
        (drawn_for(WIDE, **encoder, text_encoder_2=layer), None, {f"lora_te1{te}", f"lora_te2{te}"}),
        (drawn_for(WIDE, transformer=f"{SINGLE}.proj_out", **encoder), None, {
            "lora_unet_single_blocks_0_linear2", f"lora_te1{te}"}),
    ]  # fmt: skip
    for number, (tensors, pipeline, wanted) in enumerate(cases):
        source, out = tmp_path / f"{number}.safetensors", tmp_path / f"kohya{number}.safetensors"
        save_file(tensors, source)
        adapterkit.convert(source, out, to="kohya", base=pipeline)
        assert {key.partition(".")[0] for key in load_file(out)} == wanted, number
    adapterkit.combine([tmp_path / "1.safetensors", tmp_path / "3.safetensors"], tmp_path / "sum.safetensors",
                       base=both, to="kohya")  # fmt: skip
    assert {key.partition(".")[0] for key in load_file(tmp_path / "sum.safetensors")} == {sdxl, f"lora_te1{te}"}
    # What looks at the text alone is known as a UNet's too.
    adapterkit.convert(tmp_path / "5.safetensors", tmp_path / "back.safetensors", to="diffusers")
    assert {key.partition(".")[0] for key in load_file(tmp_path / "back.safetensors")} == {"unet", "text_encoder"}
    with pytest.raises(UnsupportedAdapter, match=r"2 models \(denoiser, te1\)") as refused:
        adapterkit.convert(tmp_path / "3.safetensors", tmp_path / "x.safetensors", to="lycoris", base=both)
    assert refused.value.hint == "name one part: only='PART'"


def test_a_file_for_several_parts_is_combined_and_resized_without_a_base(tmp_path: Path) -> None:
    """As sd-scripts trains SD 1.5: the UNet, a convolution of it, and the text encoder, in one file and one rank."""
    torch.manual_seed(0)
    lead = "lora_unet_down_blocks_0_attentions_0_transformer_blocks_0"
    shapes: dict[str, tuple[int, ...]] = {f"{lead}_attn1_to_q": (8, 8), f"{lead}_attn2_to_k": (8, 768)}
    shapes |= {"lora_unet_down_blocks_0_resnets_0_conv2": (8, 8, 3, 3)}
    shapes |= {"lora_te_text_model_encoder_layers_0_self_attn_q_proj": (16, 16)}
    tensors: Tensors = {}
    deltas: Tensors = {}
    for name, (rows, columns, *kernel) in shapes.items():
        a, b = torch.randn(4, columns, *kernel), torch.randn(rows, 4, *(1 for _ in kernel))
        tensors |= {f"{name}.lora_down.weight": a, f"{name}.lora_up.weight": b, f"{name}.alpha": torch.tensor(2.0)}
        deltas[name] = 0.5 * b.flatten(1).double() @ a.flatten(1).double()
    file, out = tmp_path / "style.safetensors", tmp_path / "out.safetensors"
    save_file(tensors, file, {"ss_base_model_version": "sd_v1", "ss_network_module": "networks.lora"})

    def written() -> Tensors:
        found = load_file(out)
        made = {}
        for name in deltas:
            a, b = (found[f"{name}.{leaf}.weight"] for leaf in ("lora_down", "lora_up"))
            assert (a.ndim, b.ndim) == (len(shapes[name]), len(shapes[name]))
            made[name] = found[f"{name}.alpha"].double() / a.shape[0] * b.flatten(1).double() @ a.flatten(1).double()
        assert len(found) == 3 * len(deltas)
        return made

    for call in (
        lambda: adapterkit.resize(file, out, rank=4, force=True),
        lambda: adapterkit.combine([file, file], out, weights=[0.25, 0.75], force=True),
    ):
        call()
        assert all(torch.allclose(one, deltas[name], atol=1e-5) for name, one in written().items())
    with pytest.raises(UsageError, match=r"is for several parts of a pipeline \(te, unet\)"):
        adapterkit.resize(file, tmp_path / "peft", rank=2)


def test_a_weight_of_comfyui_takes_the_place_of_the_bases(tmp_path: Path) -> None:
    """`MODULE.set_weight` (comfy/lora.py), under the original name, into both layouts."""
    new = torch.randn(WIDE, 4)
    file = tmp_path / "set.safetensors"
    block = "diffusion_model.double_blocks.0.img_attn.proj"
    lora = {f"{block}.lora_down.weight": torch.randn(2, WIDE), f"{block}.lora_up.weight": torch.randn(WIDE, 2)}
    save_file({**lora, "diffusion_model.img_in.set_weight": new}, file)
    for name, other in (("img_in", "double_blocks.0.img_attn.proj"), ("x_embedder", f"{DOUBLE}.attn.to_out.0")):
        tensors = {f"{name}.weight": torch.zeros(WIDE, 4), f"{other}.weight": torch.zeros(WIDE, WIDE)}
        base = write_checkpoint(tmp_path / name, tensors, {"_class_name": "FluxTransformer2DModel"})
        merged = added(base, file)
        assert torch.equal(merged[f"{name}.weight"], new)
        assert torch.allclose(
            merged[f"{other}.weight"], lora[f"{block}.lora_up.weight"] @ lora[f"{block}.lora_down.weight"]
        )
