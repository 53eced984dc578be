"""Whole pipelines as bases: each part of an adapter into its component, one output folder."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from models import read_bytes
from safetensors.torch import load_file, save_file

from adapterkit.checkpoint.plan import Plan
from adapterkit.errors import CheckpointError, TargetError, UnsafeError, UsageError
from adapterkit.verbs.check import check
from adapterkit.verbs.combine import combine
from adapterkit.verbs.convert import convert
from adapterkit.verbs.evaluate import evaluate
from adapterkit.verbs.execute import OpenPlan
from adapterkit.verbs.merge import merge
from adapterkit.verbs.resize import resize
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


FLUX = "transformer_blocks.0.attn.to_q"
WIDE = "diffusion_pytorch_model.safetensors"


def flux(folder: Path, **config: object) -> None:
    """A pipeline whose transformer has a first layer of 8 inputs."""
    tensors = {"x_embedder.weight": drawn(1, 8, 8), f"{FLUX}.weight": drawn(2, 8, 8)}
    component(folder / "transformer", tensors, {"_class_name": "FluxTransformer2DModel", **config}, WIDE)
    said = {"_class_name": "FluxPipeline", "transformer": ["diffusers", "FluxTransformer2DModel"]}
    (folder / "model_index.json").write_text(json.dumps(said), encoding="utf-8")


def test_a_first_layer_that_is_widened_is_told_by_its_component(tmp_path: Path) -> None:
    """Control LoRAs take twice the inputs. diffusers' default is what a config of its that says nothing means."""
    a, b = drawn(3, 2, 16), drawn(4, 8, 2)
    file = tmp_path / "control.safetensors"
    save_file({"transformer.x_embedder.lora_A.weight": a, "transformer.x_embedder.lora_B.weight": b}, file)
    for name, config in {"said": {"in_channels": 8, "out_channels": None}, "default": {}}.items():
        pipe, out = tmp_path / f"{name}-pipe", tmp_path / name
        flux(pipe, **config)
        merge(pipe, [file], out)
        found = load_file(out / "transformer" / WIDE)["x_embedder.weight"]
        assert close(found, torch.cat([drawn(1, 8, 8), torch.zeros(8, 8)], 1).double() + b.double() @ a.double())
        config = json.loads((out / "transformer" / "config.json").read_text())
        assert (config["in_channels"], config["out_channels"]) == (16, 8)
        assert (out / "model_index.json").read_bytes() == (pipe / "model_index.json").read_bytes()
        assert not (out / "config.json").exists()
        assert verify(out, base=pipe, adapters=[file]).ok
        (out / "transformer" / "config.json").write_bytes((pipe / "transformer" / "config.json").read_bytes())
        report = verify(out, base=pipe, adapters=[file])
        assert not report.ok
        assert any("transformer/config.json says in_channels" in one.text for one in report.findings)
    flux(tmp_path / "other", in_channels=2)
    for base in (tmp_path / "other", tmp_path / "other" / "transformer"):
        with pytest.raises(TargetError, match="says in_channels 2"):
            merge(base, [file], tmp_path / "out")
    save_file(
        {"transformer.x_embedder.lora_A.weight": drawn(3, 2, 12), "transformer.x_embedder.lora_B.weight": b}, file
    )
    with pytest.raises(TargetError, match="is made for a weight of"):
        merge(tmp_path / "other", [file], tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_words_of_a_component_are_changed_in_its_folder_alone(tmp_path: Path) -> None:
    """Rows of an embedding need a tokenizer and a config; T5 keeps its embedding under two names."""
    pipe = tmp_path / "pipe"
    tensors = {"shared.weight": drawn(1, 8, 8), "encoder.embed_tokens.weight": drawn(1, 8, 8)}
    config: dict[str, object] = {"model_type": "t5", "architectures": ["T5EncoderModel"], "vocab_size": 8}
    component(pipe / "text_encoder", tensors, config, "model.safetensors")
    said = {"_class_name": "PixArtAlphaPipeline", "text_encoder": ["transformers", "T5EncoderModel"]}
    (pipe / "model_index.json").write_text(json.dumps(said), encoding="utf-8")
    file = tmp_path / "file.safetensors"
    whole = {"text_encoder.shared.lora_A.weight": drawn(1, 2, 8), "text_encoder.shared.lora_B.weight": drawn(2, 8, 2)}
    save_file(whole, file)
    with pytest.raises(TargetError, match="may share"):
        merge(pipe, [file], tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_verify_compares_what_stands_beside_the_weights(pipe: Path, tmp_path: Path) -> None:
    file, out = tmp_path / "file.safetensors", tmp_path / "out"
    save_file(lora(f"unet.{TO_Q}", 20) | lora(f"text_encoder.{FC1}", 21), file)
    (pipe / "tokenizer").mkdir()
    (pipe / "tokenizer" / "merges.txt").write_text("a b", encoding="utf-8")
    merge(pipe, [file], out, only=["unet"])
    assert verify(out, base=pipe, adapters=[file]).ok  # the record of the pipeline says `only`
    unet = json.loads((out / "unet" / "config.json").read_text())
    more = {**unet, "_diffusers_version": "1", "act_fn": "silu"}  # as diffusers writes it again
    (out / "unet" / "config.json").write_text(json.dumps(more), encoding="utf-8")
    (out / "tokenizer" / "merges.txt").write_text("b a", encoding="utf-8")
    report = verify(out, base=pipe, adapters=[file])
    assert report.ok
    assert [one.severity for one in report.findings if "tokenizer/merges.txt" in one.text] == ["warning"]
    for name, text in (("unet/config.json", '{"_class_name": "Other"}'), ("scheduler/scheduler_config.json", None)):
        before = (out / name).read_bytes()
        (out / name).unlink()
        if text is not None:
            (out / name).write_text(text, encoding="utf-8")
        found = verify(out, base=pipe, adapters=[file])
        assert not found.ok
        assert [name in one.text for one in found.findings if one.severity == "error"] == [True]
        (out / name).write_bytes(before)


def test_notes_of_a_check_stand_under_what_they_are_of(pipe: Path, tmp_path: Path) -> None:
    files = [tmp_path / "one.safetensors", tmp_path / "two.safetensors"]
    for seed, file in enumerate(files):
        save_file(lora(f"unet.{TO_Q}", seed), file)
    found = check(pipe, files).findings
    said = [one for one in found if one.message.startswith("a pipeline of")]
    assert [one.adapter for one in said] == [str(pipe)]


def test_combined_and_resized_with_a_pipeline_as_base(pipe: Path, tmp_path: Path) -> None:
    files = [tmp_path / "one.safetensors", tmp_path / "two.safetensors"]
    save_file(lora(f"unet.{TO_Q}", 20) | lora(f"text_encoder_2.{FC1}", 21), files[0])
    save_file(lora(f"lora_unet_{TO_Q.replace('.', '_')}", 22, 1.0), files[1])
    exact = {"unet": change(20) + change(22, 0.5), "text_encoder_2": change(21)}
    made = [tmp_path / "three.safetensors", tmp_path / "folder", tmp_path / "four.safetensors"]
    for out in made[:2]:
        combine(files, out, base=pipe)
    resize(made[0], made[2], rank=4, base=pipe)
    merge(pipe, files, tmp_path / "both")
    for number, some in enumerate([files, *([one] for one in made)]):
        merge(pipe, some, tmp_path / f"out{number}")
        for folder, name, key in (("unet", FIRST, TO_Q), ("text_encoder_2", "model.safetensors", FC1)):
            found = load_file(tmp_path / f"out{number}" / folder / name)[f"{key}.weight"]
            base = load_file(pipe / folder / name)[f"{key}.weight"].double()
            assert float((found.double() - base - exact[folder]).abs().max()) <= 2e-5


def test_a_plan_of_a_pipeline_is_executed_in_parts(pipe: Path, tmp_path: Path) -> None:
    file = tmp_path / "file.safetensors"
    save_file(lora(f"unet.{TO_Q}", 20) | lora(f"text_encoder.{FC1}", 21), file)
    merge(pipe, [file], tmp_path / "whole")
    merge(pipe, [file], tmp_path / "out", save_plan=tmp_path / "plan.json")
    plan = Plan.from_json((tmp_path / "plan.json").read_text())
    opened = OpenPlan(plan, tmp_path / "out", part_size=plan.nbytes // 3)
    assert len(opened.parts) >= len(plan.files)
    for part in opened.parts:
        opened.execute(part.index, jobs=1)
    opened.finish()
    assert read_bytes(tmp_path / "out") == read_bytes(tmp_path / "whole")


def test_an_interrupted_merge_goes_on(pipe: Path, tmp_path: Path) -> None:
    file = tmp_path / "file.safetensors"
    save_file(lora(f"unet.{TO_Q}", 20) | lora(f"text_encoder.{FC1}", 21), file)
    merge(pipe, [file], tmp_path / "whole")

    def stop(*_: int) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        merge(pipe, [file], tmp_path / "out", resume=True, progress=stop, jobs=1)
    assert not (tmp_path / "out").exists()
    assert merge(pipe, [file], tmp_path / "out", resume=True).reused == 2
    for path in (tmp_path / "whole").rglob("*.safetensors"):
        assert (tmp_path / "out" / path.relative_to(tmp_path / "whole")).read_bytes() == path.read_bytes()


def test_a_pipeline_is_converted_to_floats_alone(pipe: Path, tmp_path: Path) -> None:
    (pipe / "text_encoder" / "config.json").write_text('{"torch_dtype": "float32"}', encoding="utf-8")
    convert(pipe, tmp_path / "half", to="bf16")
    assert load_file(tmp_path / "half" / "unet" / FIRST)[f"{TO_Q}.weight"].dtype is torch.bfloat16
    assert json.loads((tmp_path / "half" / "text_encoder" / "config.json").read_text()) == {"torch_dtype": "bfloat16"}
    for kind in ("nf4", "int8", "gptq"):
        with pytest.raises(UsageError, match="is a pipeline"):
            convert(pipe, tmp_path / "out", to=kind)
    with pytest.raises(UsageError, match=r"is a pipeline, and comfyui .* \(.*unet"):
        convert(pipe, tmp_path / "out.safetensors", to="comfyui")
    with pytest.raises(UsageError, match="is a pipeline of several models"):
        evaluate(pipe, tasks=["arc_easy"])
    assert not (tmp_path / "out").exists()
