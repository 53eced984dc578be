"""A family is told by what tells it, or not at all: over all pairs of families and both layouts, from the tables themselves.

Names that two families share are built from the published modules (``modules.json``, made from diffusers' classes) and the
tables' rows. Where the two would become other names, sizes that no model has must leave both, a word of the metadata or
diffusers' class must tell the one it names, and the published sizes of one family must never give the other alone.
"""

from __future__ import annotations

import json
import re
from functools import cache
from itertools import combinations
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

import adapterkit
from adapterkit.adapters.families.names import FAMILIES
from adapterkit.adapters.families.row import Pattern, PipelineFamily
from adapterkit.adapters.families.told import called, is_said, knows, published, sharing, told_family
from adapterkit.errors import UnsupportedAdapter

FAMILY = {family.name: family for family in FAMILIES}
ODD = (13, 11)  # a size that no model has, and no ratio of one
LAYOUTS = ("original", "diffusers")
# What trainers write: sd-scripts' ModelSpec architectures and base versions, musubi-tuner, ai-toolkit, Hub ids.
SAID: dict[str, tuple[str, ...]] = {
    "Flux.1": (
        *("flux-1-dev/lora", "flux-1-schnell/lora", "flux1", "Flux.1-dev", "black-forest-labs/FLUX.1-Kontext-dev"),
        *("flux_1_kontext", "black-forest-labs/FLUX.1-Krea-dev", "flux1-dev.safetensors"),
    ),
    "Flux.2": ("black-forest-labs/FLUX.2-dev", "flux2", "flux-2-klein-4b/lora"),
    "Flux.3": ("black-forest-labs/FLUX.3-dev", "flux3"),
    "Chroma": ("chroma/lora", "lodestones/Chroma1-HD"),
    "HunyuanVideo": ("hunyuan-video/lora", "hunyuan_video", "hunyuanvideo-community/HunyuanVideo", "framepack"),
    "Wan": ("Wan2.1-T2V-14B", "wan21:14b", "wan2.2", "Wan-AI/Wan2.2-I2V-A14B-Diffusers"),
    "LTX-Video": ("Lightricks/LTX-Video", "ltxv"),
    "LTX-2": ("Lightricks/LTX-2", "ltx2", "ltxv2"),
    "Mochi": ("genmo/mochi-1-preview",),
    "Cosmos-2 and Anima": ("anima-preview/lora", "nvidia/Cosmos-Predict2-2B-Text2Image"),
    "MiniMax-H3": ("MiniMaxAI/MiniMax-H3",),
    "ACE-Step": ("ACE-Step/ACE-Step-v1-3.5B", "ace_step"),
    "SD3": (
        "stable-diffusion-3-5-large/lora",
        "stable-diffusion-3-m",
        "sd3",
        "stabilityai/stable-diffusion-3.5-medium",
    ),
    "AuraFlow": ("fal/AuraFlow-v0.3", "auraflow"),
    "Z-Image": ("Tongyi-MAI/Z-Image-Turbo", "zimage", "z_image"),
    "Lumina 2": ("lumina-2/lora", "lumina", "Alpha-VLLM/Lumina-Image-2.0"),
    "Ideogram 4": ("ideogram-ai/Ideogram-4", "ideogram4"),
    "Qwen-Image": ("Qwen/Qwen-Image-Edit", "qwen_image"),
    "HiDream": ("HiDream-ai/HiDream-I1-Full", "hidream"),
    "Krea 2": ("krea/Krea-2", "krea2"),
    "Sana": ("Efficient-Large-Model/Sana_1600M_1024px_diffusers", "sana"),
    "Stable Diffusion UNet": (
        *("stable-diffusion-v1/lora", "stable-diffusion-v2-768-v/lora", "stable-diffusion-xl-v1-base/lora", "sd_v1"),
        *("sdxl_base_v1-0", "sd_v2_v", "stabilityai/stable-diffusion-xl-base-1.0", "sd_1.5", "sdxl_1.0"),
    ),
}


@cache
def modules(name: str, layout: str) -> dict[str, tuple[tuple[int, int], ...]]:
    """A family's modules in a layout, in its first block, with the published sizes where these are the module's own."""
    family, found = FAMILY[name], {}
    for several in published().get(name, {}).values():
        for pattern, one in several:
            path = pattern.fill((0,) * pattern.text.count("{}"), "")
            if layout == "diffusers":
                found[path] = one.sizes
            else:
                for other in called(family, path, "original")[0:1]:
                    found |= {path: one.sizes} if other == "same" else {}
    for row in family.rows:
        if not Pattern(row.original).open and all(".weight" in pair for pair in zip(*row.leaves, strict=True)):
            texts = (row.original,) if layout == "original" else row.parts
            found |= {path: found.get(path, ()) for text in texts if (path := text.replace("{}", "0"))}
    return found


def shared(one: str, other: str) -> list[str]:
    """Names that both have, in whatever layout each has them."""
    names = [{name for layout in LAYOUTS for name in modules(family, layout)} for family in (one, other)]
    return sorted(names[0] & names[1])


PAIRS = [pair for pair in combinations(FAMILY, 2) if shared(*pair)]


def differs(one: PipelineFamily, other: PipelineFamily, path: str, layout: str) -> bool:
    return called(one, path, layout) != called(other, path, layout)


def test_there_are_pairs_in_question() -> None:
    assert len(PAIRS) > 60
    assert {name for pair in PAIRS for name in pair} >= {
        "Flux.1",
        "HunyuanVideo",
        "AuraFlow",
        "Lumina 2",
        "Z-Image",
        "Wan",
    }


@pytest.mark.parametrize("layout", LAYOUTS)
def test_no_family_is_guessed(layout: str) -> None:
    """Every name that two families share and call otherwise, alone in a file: both are left, until something tells."""
    asked = 0
    for pair in PAIRS:
        one, other = (FAMILY[name] for name in pair)
        for path in shared(*pair):
            if not differs(one, other, path, layout):
                continue
            asked += 1
            found, why = told_family({f"transformer.{path}": ODD}, layout)
            assert {one, other} <= set(found), (pair, path, why)
            for family, rival in ((one, other), (other, one)):
                for text in SAID.get(family.name, ())[:1]:
                    told, why = told_family({path: ODD}, layout, [text])
                    assert told, (pair, path, text)
                    assert not differs(told[0], family, path, layout), (pair, path, text)
                for name in family.classes:
                    told, why = told_family({path: ODD}, layout, (), name)
                    assert told == [family], (pair, path, name)
                    assert why == "the class that it says it was trained on"
                for size in modules(family.name, "diffusers").get(path, ()):
                    told, _ = told_family({path: size}, layout)
                    assert len(told) > 1 or not differs(told[0], family, path, layout), (pair, path, size, rival.name)
    assert asked > 60


@pytest.mark.parametrize("name", [family.name for family in FAMILIES if family.name in published()])
def test_whole_models_are_told(name: str) -> None:
    """An adapter of every module at published sizes, in every block, is of its family, or of one that calls it the same."""
    family = FAMILY[name]
    for at in range(max(len(one.sizes) for several in published()[name].values() for _, one in several)):
        sizes: dict[str, tuple[int, int]] = {}
        for several in published()[name].values():
            for pattern, one in several:
                for block in range(one.blocks or 1):
                    path = pattern.text.replace("{}", str(block), 1).replace("{}", "0")
                    sizes[path] = one.sizes[min(at, len(one.sizes) - 1)]
        for layout in LAYOUTS:
            found, why = told_family(sizes, layout)
            assert len(found) == 1, (layout, [one.name for one in found], why)
            assert all(called(found[0], path, layout) == called(family, path, layout) for path in sizes)


def test_what_trainers_write_names_one_family() -> None:
    for name, texts in SAID.items():
        for text in texts:
            assert [family.name for family in FAMILIES if is_said(family, text)] == [name], text


def test_every_row_of_a_table_is_known() -> None:
    for family in FAMILIES:
        for layout in LAYOUTS:
            for path in modules(family.name, layout):
                assert knows(family, path), (family.name, path)
                assert family in sharing([path])


def lora(file: Path, names: dict[str, tuple[int, int]], metadata: dict[str, str] | None = None) -> Path:
    tensors = {}
    for name, (rows, columns) in names.items():
        tensors[f"transformer.{name}.lora_A.weight"] = torch.ones(2, columns, dtype=torch.bfloat16)
        tensors[f"transformer.{name}.lora_B.weight"] = torch.ones(rows, 2, dtype=torch.bfloat16)
    save_file(tensors, file, metadata)
    return file


# One module, what else is said, the word for `--to`, and the module that comes out, or the families that it may be of.
FILES = {
    "sizes of no model": ("single_transformer_blocks.3.attn.to_q", ODD, None, "comfyui", "Flux.1, Flux.3, .* AuraFlow"),
    "a word of the trainer": (
        *("single_transformer_blocks.3.attn.to_q", (16, 16), {"ss_base_model_version": "auraflow"}, "comfyui"),
        "single_layers.3.attn.w1q",
    ),
    "more blocks than the others have": (
        *("single_transformer_blocks.30.attn.to_out.0", (3072, 3072), None, "comfyui", "single_layers.30.attn.w1o"),
    ),
    "Lumina 2 by its groups": ("layers.4.attention.out", (2304, 2304), None, "diffusers", "layers.4.attn.to_out.0"),
    "Z-Image by its width": ("layers.4.attention.out", (3840, 3840), None, "diffusers", "layers.4.attention.to_out.0"),
    "Flux.2 by its rows": (
        "double_blocks.1.img_mlp.0",
        (36864, 6144),
        None,
        "diffusers",
        "transformer_blocks.1.ff.linear_in",
    ),
    "Flux.1 by its rows": (
        "double_blocks.1.img_mlp.0",
        (12288, 3072),
        None,
        "diffusers",
        "transformer_blocks.1.ff.net.0.proj",
    ),
    "Flux.1 or Flux.2": ("double_blocks.1.img_mlp.2", ODD, None, "diffusers", "Flux.1, Flux.2 or Chroma"),
    "Wan": ("blocks.3.attn1.to_q", ODD, None, "comfyui", "blocks.3.self_attn.q"),
}


@pytest.mark.parametrize("case", FILES)
def test_a_file_alone(case: str, tmp_path: Path) -> None:
    path, size, said, to, wanted = FILES[case]
    file = lora(tmp_path / "lora.safetensors", {path: size}, said)
    out = tmp_path / "out.safetensors"
    family = adapterkit.inspect(file).details["family"]
    if " or " in wanted or "," in wanted:
        assert re.match(wanted, family)
        with pytest.raises(UnsupportedAdapter, match=f"may be of {wanted}"):
            adapterkit.convert(file, out, to=to)
        assert not out.exists()
        return
    report = adapterkit.convert(file, out, to=to)
    assert " or " not in family
    lead = {"comfyui": "diffusion_model.", "diffusers": "transformer."}[to]
    assert {key.rpartition(".lora_")[0] or key.removesuffix(".alpha") for key in load_file(out)} == {lead + wanted}
    assert any("is read as" in note for note in report.notes) == (case != "Wan")


def test_pefts_config_names_the_class(tmp_path: Path) -> None:
    """As a PEFT folder of a model of diffusers says it."""
    from models import write_adapter

    names = {f"single_transformer_blocks.0.attn.to_{x}": (16, 16) for x in "qkv"}
    tensors = {
        f"{name}.lora_{side}.weight": torch.ones(*((2, 16) if side == "A" else (16, 2)))
        for name in names
        for side in "AB"
    }
    config = {
        "auto_mapping": {"base_model_class": "AuraFlowTransformer2DModel", "parent_library": "diffusers"},
        "target_modules": ["to_q", "to_k", "to_v"],
    }
    folder = write_adapter(tmp_path / "ad", tensors, r=2, lora_alpha=2, **config)
    assert json.loads((folder / "adapter_config.json").read_text(encoding="utf-8"))["auto_mapping"]
    adapterkit.convert(folder, tmp_path / "out.safetensors", to="comfyui")
    found = {key.partition(".lora_")[0].removesuffix(".alpha") for key in load_file(tmp_path / "out.safetensors")}
    assert found == {f"diffusion_model.single_layers.0.attn.w1{x}" for x in "qkv"}


def test_a_file_of_a_language_model_is_of_no_family(tmp_path: Path) -> None:
    """Loose PEFT keys, whose names ACE-Step has too."""
    names = [f"base_model.model.model.layers.0.self_attn.{x}_proj" for x in "qkvo"]
    tensors = {f"{name}.lora_A.weight": torch.ones(2, 16) for name in names}
    save_file(tensors | {f"{name}.lora_B.weight": torch.ones(16, 2) for name in names}, tmp_path / "lora.safetensors")
    assert "family" not in adapterkit.inspect(tmp_path / "lora.safetensors").details
