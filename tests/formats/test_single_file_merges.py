"""A merge of one file into one file: named parts, modules left out on purpose, an output that is a file, and its check."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

import adapterkit
from adapterkit.errors import AdapterError, TargetError, UsageError

WIDE, RANK = 16, 2
NAMES = ("q", "k", "v", "o")


def factors(path: str, flat: bool = False) -> tuple[dict[str, torch.Tensor], torch.Tensor]:
    down, up = torch.randn(RANK, WIDE), torch.randn(WIDE, RANK) * 0.1
    module = "lora_unet_" + path.replace(".", "_") if flat else f"diffusion_model.{path}"
    return {f"{module}.lora_down.weight": down, f"{module}.lora_up.weight": up}, up @ down


@pytest.fixture
def wan(tmp_path: Path) -> Path:
    """Wan 2.2 has no image branch; a file that was trained on 2.1 has adapters for one."""
    torch.manual_seed(0)
    base = {f"blocks.0.cross_attn.{name}.weight": torch.randn(WIDE, WIDE) for name in NAMES}
    metadata = {"modelspec.title": "Wan", "modelspec.hash_sha256": "0x12"}
    save_file(base, tmp_path / "wan.safetensors", metadata)
    for flat in (False, True):
        tensors: dict[str, torch.Tensor] = {}
        for name in (*NAMES, "k_img", "v_img"):
            found, delta = factors(f"blocks.0.cross_attn.{name}", flat)
            tensors |= found
            if name in NAMES:
                save_file({"delta": delta}, tmp_path / f"{'flat' if flat else 'dotted'}_{name}.safetensors")
        save_file(tensors, tmp_path / ("flat.safetensors" if flat else "dotted.safetensors"))
    return tmp_path


@pytest.mark.parametrize("style", ["flat", "dotted"])
@pytest.mark.parametrize("words", [("k_img", "v_img"), ("*_img",), ("blocks.0.cross_attn.?_img",)])
def test_modules_that_the_base_has_not_are_left_out_by_name(style: str, words: tuple[str, ...], wan: Path) -> None:
    file = wan / f"{style}.safetensors"
    with pytest.raises(TargetError, match="k_img"):
        adapterkit.merge(wan / "wan.safetensors", [file], wan / "out")
    report = adapterkit.merge(wan / "wan.safetensors", [file], wan / "out.safetensors", skip=words)
    assert any("left out: 2 modules (skip=" in note for note in report.notes)
    before, after = load_file(wan / "wan.safetensors"), load_file(wan / "out.safetensors")
    for name in NAMES:
        key = f"blocks.0.cross_attn.{name}.weight"
        delta = load_file(wan / f"{style}_{name}.safetensors")["delta"]
        assert torch.allclose(after[key], before[key] + delta, atol=1e-6)
    found = adapterkit.verify(wan / "out.safetensors", base=wan / "wan.safetensors", adapters=[file])
    assert found.ok  # the record beside the file says what was left out
    assert found.record


def test_a_file_comes_out_of_a_file(wan: Path) -> None:
    out = wan / "merged.safetensors"
    adapterkit.merge(wan / "wan.safetensors", [wan / "dotted.safetensors"], out, only="*.q")
    assert out.is_file()
    with safe_open(out, "pt") as opened:
        assert opened.metadata()["modelspec.title"] == "Wan"
        data = out.read_bytes()
        behind = hashlib.sha256(data[8 + int.from_bytes(data[:8], "little") :]).hexdigest()
        assert opened.metadata()["modelspec.hash_sha256"] == f"0x{behind}"
        assert "sshs_model_hash" not in opened.metadata()  # nothing was trained into a file of its own
    assert json.loads((wan / "merged.safetensors.adapterkit.json").read_text())["kind"] == "merged"
    before, after = load_file(wan / "wan.safetensors"), load_file(out)
    assert [name for name in before if not torch.equal(before[name], after[name])] == ["blocks.0.cross_attn.q.weight"]
    with pytest.raises(UsageError, match="one file was asked for"):
        adapterkit.merge(
            wan / "wan.safetensors",
            [wan / "dotted.safetensors"],
            wan / "many.safetensors",
            only="*.q",
            max_shard_size="2KB",
        )


def test_a_right_file_of_another_tool_is_right(wan: Path) -> None:
    before = load_file(wan / "wan.safetensors")
    right = {}
    for key, tensor in before.items():
        right[key] = tensor + load_file(wan / f"dotted_{key.split('.')[-2]}.safetensors")["delta"]
    save_file(right, wan / "comfy.safetensors")
    options = {"base": wan / "wan.safetensors", "adapters": [wan / "dotted.safetensors"], "skip": ("*_img",)}
    assert adapterkit.verify(wan / "comfy.safetensors", **options).ok
    assert not adapterkit.verify(wan / "wan.safetensors", **options).ok


def test_words_that_name_nothing(wan: Path) -> None:
    with pytest.raises(AdapterError, match="has nothing that 'te1' names"):
        adapterkit.plan_merge(wan / "wan.safetensors", [wan / "dotted.safetensors"], only="te1")
    with pytest.raises(AdapterError, match="nothing is left"):
        adapterkit.plan_merge(wan / "wan.safetensors", [wan / "dotted.safetensors"], skip=("diffusion_model",))


def test_sections_of_a_model_of_several_senses(tmp_path: Path) -> None:
    """An adapter of all linear layers of a vision-language model: its text alone."""
    torch.manual_seed(0)
    paths = ("model.language_model.layers.0.self_attn.q_proj", "model.visual.blocks.0.attn.proj")
    (tmp_path / "base").mkdir()
    save_file({f"{path}.weight": torch.randn(WIDE, WIDE) for path in paths}, tmp_path / "base" / "model.safetensors")
    (tmp_path / "base" / "config.json").write_text(json.dumps({"model_type": "llava"}))
    (tmp_path / "adapter").mkdir()
    tensors = {}
    for path in paths:
        tensors[f"base_model.model.{path}.lora_A.weight"] = torch.randn(RANK, WIDE)
        tensors[f"base_model.model.{path}.lora_B.weight"] = torch.randn(WIDE, RANK)
    save_file(tensors, tmp_path / "adapter" / "adapter_model.safetensors")
    config = {"peft_type": "LORA", "r": RANK, "lora_alpha": RANK, "target_modules": ["q_proj", "proj"]}
    (tmp_path / "adapter" / "adapter_config.json").write_text(json.dumps(config))
    for words, kept in (({"only": "text"}, 0), ({"skip": "vision"}, 0), ({"only": ("vision",)}, 1)):
        report = adapterkit.merge(tmp_path / "base", [tmp_path / "adapter"], tmp_path / "out", force=True, **words)
        before, after = (load_file(tmp_path / name / "model.safetensors") for name in ("base", "out"))
        assert [not torch.equal(before[f"{path}.weight"], after[f"{path}.weight"]) for path in paths] == [
            kept == 0,
            kept == 1,
        ]
        assert any("left out: 2 tensors" in note for note in report.notes)


@pytest.mark.parametrize(
    ("keys", "family", "style"),
    [
        (("lora_unet_double_blocks_0_img_attn_qkv",), "Flux.1 (original names)", "kohya style"),
        (
            ("lora_unet_single_blocks_0_linear1", "lora_te1_text_model_encoder_layers_0_mlp_fc1"),
            "Flux.1 (original",
            "kohya",
        ),
        (("lora_unet_input_blocks_4_1_transformer_blocks_0_attn1_to_q",), "Stable Diffusion UNet", "kohya style"),
        (("diffusion_model.blocks.0.self_attn.q",), "Wan (original names)", "ComfyUI style"),
        (("transformer.single_transformer_blocks.0.proj_mlp",), "Flux.1 (diffusers names)", "diffusers style"),
        (("lycoris_single_transformer_blocks_0_proj_out",), "Flux.1 (diffusers names)", "LyCORIS style"),
        (("base_model.model.layers.0.attention.to_q",), "Z-Image (diffusers names)", "PEFT style"),
    ],
)
def test_inspect_names_a_file(keys: tuple[str, ...], family: str, style: str, tmp_path: Path) -> None:
    tensors = {}
    for key in keys:
        ends = ("lora_A.weight", "lora_B.weight") if "." in key else ("lora_down.weight", "lora_up.weight")
        tensors |= {f"{key}.{ends[0]}": torch.randn(RANK, WIDE), f"{key}.{ends[1]}": torch.randn(WIDE, RANK)}
    metadata = {"ss_base_model_version": "flux1", "ss_network_dim": "2", "ss_optimizer": "None"}
    save_file(tensors, tmp_path / "file.safetensors", metadata)
    found = adapterkit.inspect(tmp_path / "file.safetensors")
    assert found.kind == "adapter"
    assert found.details["family"].startswith(family)
    assert found.details["keys"].startswith(style)
    assert found.details["base model"] == "flux1"
    assert "optimizer" not in found.details
    assert found.ranks == {str(RANK): len(keys)}
    save_file(
        {"model.diffusion_model.double_blocks.0.img_attn.qkv.weight": torch.zeros(6, 2)}, tmp_path / "flux.safetensors"
    )
    assert adapterkit.inspect(tmp_path / "flux.safetensors").architecture == "Flux.1 (original layout)"


def test_a_dotted_file_of_whole_differences(wan: Path) -> None:
    """No factors at all: `diff` of a weight alone, under ComfyUI's names."""
    delta = torch.randn(WIDE, WIDE)
    save_file({"diffusion_model.blocks.0.cross_attn.q.diff": delta}, wan / "diff.safetensors")
    adapterkit.merge(wan / "wan.safetensors", [wan / "diff.safetensors"], wan / "out.safetensors")
    key = "blocks.0.cross_attn.q.weight"
    before, after = load_file(wan / "wan.safetensors"), load_file(wan / "out.safetensors")
    assert torch.allclose(after[key], before[key] + delta, atol=1e-6)
