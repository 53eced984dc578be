"""Whole pipelines as bases: each part of an adapter into its component, one output folder."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from adapterkit.errors import CheckpointError, TargetError, UnsafeError, UsageError
from adapterkit.verbs.merge import merge
from adapterkit.verbs.verify import verify

FC1 = "text_model.encoder.layers.0.mlp.fc1"
TO_Q = "down_blocks.0.attentions.0.transformer_blocks.0.attn1.to_q"
FIRST, SECOND = (
    "diffusion_pytorch_model-00001-of-00002.safetensors",
    "diffusion_pytorch_model-00002-of-00002.safetensors",
)


def drawn(seed: int, *shape: int) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def lora(module: str, seed: int, alpha: float | None = None) -> dict[str, torch.Tensor]:
    found = {f"{module}.lora_up.weight": drawn(seed, 8, 2), f"{module}.lora_down.weight": drawn(seed + 50, 2, 8)}
    return found if alpha is None else found | {f"{module}.alpha": torch.tensor(alpha)}


def change(seed: int, scale: float = 1.0) -> torch.Tensor:
    return scale * drawn(seed, 8, 2).double() @ drawn(seed + 50, 2, 8).double()


def component(folder: Path, tensors: dict[str, torch.Tensor], config: dict[str, object], name: str) -> None:
    folder.mkdir(parents=True)
    save_file(tensors, folder / name, {"format": "pt"})
    (folder / "config.json").write_text(json.dumps(config), encoding="utf-8")


@pytest.fixture
def pipe(tmp_path: Path) -> Path:
    """SDXL's components: two text encoders whose tensors have the same names, and a UNet in two shards."""
    folder = tmp_path / "pipe"
    for number, name in enumerate(("text_encoder", "text_encoder_2")):
        tensors = {f"{FC1}.weight": drawn(number, 8, 8), "text_model.final_layer_norm.weight": drawn(9, 8)}
        component(folder / name, tensors, {"model_type": "clip_text_model"}, "model.safetensors")
    component(folder / "unet", {f"{TO_Q}.weight": drawn(2, 8, 8)}, {"_class_name": "UNet2DConditionModel"}, FIRST)
    save_file({"conv_in.weight": drawn(3, 4, 4, 3, 3)}, folder / "unet" / SECOND, {"format": "pt"})
    save_file({f"{TO_Q}.weight": drawn(4, 8, 8)}, folder / "unet" / "diffusion_pytorch_model.fp16.safetensors")
    save_file({"all.weight": drawn(4, 8, 8)}, folder / "sd_xl_base_1.0.safetensors")
    index = {"metadata": {"total_size": 832}, "weight_map": {f"{TO_Q}.weight": FIRST, "conv_in.weight": SECOND}}
    (folder / "unet" / "diffusion_pytorch_model.safetensors.index.json").write_text(json.dumps(index), encoding="utf-8")
    component(folder / "vae", {"decoder.conv_in.weight": drawn(5, 8, 8)}, {"_class_name": "AutoencoderKL"},
              "diffusion_pytorch_model.safetensors")  # fmt: skip
    (folder / "scheduler").mkdir()
    (folder / "scheduler" / "scheduler_config.json").write_text("{}", encoding="utf-8")
    said = {
        "_class_name": "StableDiffusionXLPipeline",
        "text_encoder": ["transformers", "CLIPTextModel"],
        "text_encoder_2": ["transformers", "CLIPTextModelWithProjection"],
        "unet": ["diffusers", "UNet2DConditionModel"],
        "vae": ["diffusers", "AutoencoderKL"],
        "scheduler": ["diffusers", "EulerDiscreteScheduler"],
        "safety_checker": [None, None],
        "force_zeros_for_empty_prompt": True,
    }
    (folder / "model_index.json").write_text(json.dumps(said), encoding="utf-8")
    return folder


def close(found: torch.Tensor, exact: torch.Tensor) -> bool:
    return float((found.double() - exact).abs().max()) <= 2e-6 * float(exact.abs().max())


@pytest.mark.parametrize("style", ["kohya", "diffusers"])
def test_each_part_goes_into_its_component(style: str, pipe: Path, tmp_path: Path) -> None:
    leads = {
        "kohya": ("lora_te1_", "lora_te2_", "lora_unet_"),
        "diffusers": ("text_encoder.", "text_encoder_2.", "unet."),
    }
    modules = [FC1, FC1, TO_Q]
    file, out = tmp_path / "file.safetensors", tmp_path / "out"
    alpha = 1.0 if style == "kohya" else None
    scale = 0.5 if style == "kohya" else 1.0
    tensors: dict[str, torch.Tensor] = {}
    for seed, (lead, module) in enumerate(zip(leads[style], modules, strict=True), start=20):
        tensors |= lora(lead + (module.replace(".", "_") if style == "kohya" else module), seed, alpha)
    save_file(tensors, file)
    report = merge(pipe, [file], out)
    assert report.touched == 3
    for seed, (name, module, weights) in enumerate(
        (
            ("text_encoder", FC1, "model.safetensors"),
            ("text_encoder_2", FC1, "model.safetensors"),
            ("unet", TO_Q, FIRST),
        )
    ):
        merged = load_file(out / name / weights)
        base = load_file(pipe / name / weights)
        assert merged.keys() == base.keys()
        assert close(merged[f"{module}.weight"], base[f"{module}.weight"].double() + change(seed + 20, scale))
    there = {str(path.relative_to(out)) for path in out.rglob("*") if path.is_file()}
    before = {str(path.relative_to(pipe)) for path in pipe.rglob("*") if path.is_file()}
    copies = {"unet/diffusion_pytorch_model.fp16.safetensors", "sd_xl_base_1.0.safetensors"}
    assert there == (before - copies) | {"adapterkit.json"}
    assert any("2 other weight files" in note for note in report.notes)
    for name in (f"unet/{SECOND}", "vae/diffusion_pytorch_model.safetensors", "unet/config.json", "model_index.json"):
        assert (out / name).read_bytes() == (pipe / name).read_bytes()
    index = json.loads((out / "unet" / "diffusion_pytorch_model.safetensors.index.json").read_text())
    assert index["weight_map"] == {f"{TO_Q}.weight": FIRST, "conv_in.weight": SECOND}
    assert verify(out, base=pipe, adapters=[file]).ok
    assert not verify(out, base=pipe, adapters=[f"{file}#unet"]).ok


def test_a_peft_folder_is_of_the_denoiser(pipe: Path, tmp_path: Path) -> None:
    folder = tmp_path / "adapter"
    folder.mkdir()
    config = {"peft_type": "LORA", "r": 2, "lora_alpha": 2, "target_modules": ["to_q"]}
    (folder / "adapter_config.json").write_text(json.dumps(config), encoding="utf-8")
    tensors = {
        f"base_model.model.{TO_Q}.lora_A.weight": drawn(70, 2, 8),
        f"base_model.model.{TO_Q}.lora_B.weight": drawn(20, 8, 2),
    }
    save_file(tensors, folder / "adapter_model.safetensors")
    merge(pipe, [folder], tmp_path / "out")
    merged = load_file(tmp_path / "out" / "unet" / FIRST)[f"{TO_Q}.weight"]
    assert close(merged, drawn(2, 8, 8).double() + change(20))


def test_the_third_text_encoder_of_flux_is_the_second_of_its_pipeline(tmp_path: Path) -> None:
    """sd-scripts counts CLIP-L, CLIP-G and T5, and Flux has no CLIP-G."""
    pipe, module = tmp_path / "pipe", "encoder.block.0.layer.0.SelfAttention.q"
    component(pipe / "text_encoder_2", {f"{module}.weight": drawn(1, 8, 8)}, {"model_type": "t5"}, "model.safetensors")
    said = {"_class_name": "FluxPipeline", "text_encoder_2": ["transformers", "T5EncoderModel"]}
    (pipe / "model_index.json").write_text(json.dumps(said), encoding="utf-8")
    save_file(lora("lora_te3_" + module.replace(".", "_"), 30), tmp_path / "file.safetensors")
    merge(pipe, [tmp_path / "file.safetensors"], tmp_path / "out")
    merged = load_file(tmp_path / "out" / "text_encoder_2" / "model.safetensors")
    assert close(merged[f"{module}.weight"], drawn(1, 8, 8).double() + change(30))


def test_two_transformers(tmp_path: Path) -> None:
    """Wan 2.2 has one for high noise and one for low; a file that names none is for the first, and that is said."""
    pipe, module = tmp_path / "pipe", "blocks.0.attn1.to_q"
    for seed, name in enumerate(("transformer", "transformer_2")):
        component(pipe / name, {f"{module}.weight": drawn(seed, 8, 8)}, {"_class_name": "WanTransformer3DModel"},
                  "diffusion_pytorch_model.safetensors")  # fmt: skip
    said = {
        "_class_name": "WanPipeline",
        **{name: ["diffusers", "WanTransformer3DModel"] for name in ("transformer", "transformer_2")},
    }
    (pipe / "model_index.json").write_text(json.dumps(said), encoding="utf-8")
    for file, keys, changed in (
        ("one", "diffusion_model.blocks.0.self_attn.q", "transformer"),
        ("two", f"transformer_2.{module}", "transformer_2"),
    ):
        save_file(lora(keys, 30), tmp_path / f"{file}.safetensors")
        report = merge(pipe, [tmp_path / f"{file}.safetensors"], tmp_path / file)
        for seed, name in enumerate(("transformer", "transformer_2")):
            merged = load_file(tmp_path / file / name / "diffusion_pytorch_model.safetensors")[f"{module}.weight"]
            assert close(merged, drawn(seed, 8, 8).double() + (change(30) if name == changed else 0))
        assert any("transformer_2 stays as it is" in note for note in report.notes) == (file == "one")


def test_what_a_pipeline_is_not(pipe: Path, tmp_path: Path) -> None:
    file = tmp_path / "file.safetensors"
    save_file(lora("controlnet.mid_block.to_q", 20), file)
    with pytest.raises(TargetError, match="no place for 'controlnet'"):
        merge(pipe, [file], tmp_path / "out")
    save_file(lora(f"unet.{TO_Q}", 20), file)
    for options in (
        {"quant": "nf4"},
        {"dtype": "bf16"},
        {"max_shard_size": "1GB"},
        {"save_plan": tmp_path / "plan.json"},
    ):
        with pytest.raises(UsageError, match="is a pipeline"):
            merge(pipe, [file], tmp_path / "out", **options)
    for name in ("out.safetensors", "out.gguf"):
        with pytest.raises(UsageError, match="becomes a folder"):
            merge(pipe, [file], tmp_path / name)
    assert not (tmp_path / "out").exists()
    quantized = pipe / "unet" / "config.json"
    quantized.write_text(json.dumps({"quantization_config": {"quant_method": "bitsandbytes"}}), encoding="utf-8")
    with pytest.raises(CheckpointError, match="is quantized"):
        merge(pipe, [file], tmp_path / "out")
    quantized.write_text("{}", encoding="utf-8")
    (pipe / "vae" / "diffusion_pytorch_model.safetensors").rename(pipe / "vae" / "diffusion_pytorch_model.bin")
    with pytest.raises(UnsafeError, match="vae"):
        merge(pipe, [file], tmp_path / "out")
