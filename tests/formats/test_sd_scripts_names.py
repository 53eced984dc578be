"""Names of modules in files for kohya's sd-scripts, held against the prefixes and names that its networks make and load.

By data, from kohya-ss/sd-scripts (48d368fa, ``networks/lora*.py``): the prefixes of each network, and for each kind of model
a module as its ``create_modules`` names it: prefix, path in the model's own code, dots as underscores.
"""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

import adapterkit
from adapterkit.errors import UnsupportedAdapter

WIDE, RANK = 16, 2
CLIP = "text_model.encoder.layers.0.self_attn.q_proj"
T5, LLM = "encoder.block.0.layer.0.SelfAttention.q", "layers.0.self_attn.q_proj"
UNET = "down_blocks.1.attentions.0.transformer_blocks.0.attn2.to_k"
CLIP_FLAT, T5_FLAT, LLM_FLAT = (name.replace(".", "_") for name in (CLIP, T5, LLM))

# What diffusers calls the modules; what the file says it was trained on; what sd-scripts calls them; and what ComfyUI does.
MODELS: dict[str, tuple[dict[str, int], str, set[str], set[str]]] = {
    "lora.py, SD 1": (
        {f"unet.{UNET}": 768, f"text_encoder.{CLIP}": WIDE},
        "sd_v1",
        {f"lora_unet_{UNET.replace('.', '_')}", f"lora_te_{CLIP_FLAT}"},
        {
            "diffusion_model.input_blocks.4.1.transformer_blocks.0.attn2.to_k",
            f"text_encoders.clip_l.transformer.{CLIP}",
        },
    ),
    "lora.py, SDXL": (
        {f"unet.{UNET}": 2048, f"text_encoder.{CLIP}": WIDE, f"text_encoder_2.{CLIP}": WIDE},
        "sdxl_base_v1-0",
        {
            "lora_unet_input_blocks_4_1_transformer_blocks_0_attn2_to_k",
            *(f"lora_te{number}_{CLIP_FLAT}" for number in (1, 2)),
        },
        {
            "diffusion_model.input_blocks.4.1.transformer_blocks.0.attn2.to_k",
            *(f"text_encoders.clip_{letter}.transformer.{CLIP}" for letter in "lg"),
        },
    ),
    "lora_flux.py": (
        {
            "transformer.transformer_blocks.0.attn.to_out.0": WIDE,
            f"text_encoder.{CLIP}": WIDE,
            f"text_encoder_2.{T5}": WIDE,
        },
        "flux1",
        {"lora_unet_double_blocks_0_img_attn_proj", f"lora_te1_{CLIP_FLAT}", f"lora_te3_{T5_FLAT}"},
        {
            "diffusion_model.double_blocks.0.img_attn.proj",
            f"text_encoders.clip_l.transformer.{CLIP}",
            f"text_encoders.t5xxl.transformer.{T5}",
        },
    ),
    "lora_sd3.py": (
        {
            "transformer.transformer_blocks.0.attn.to_out.0": WIDE,
            **{f"text_encoder{number}.{CLIP}": WIDE for number in ("", "_2")},
            f"text_encoder_3.{T5}": WIDE,
        },
        "sd3",
        {
            "lora_unet_joint_blocks_0_x_block_attn_proj",
            *(f"lora_te{number}_{CLIP_FLAT}" for number in (1, 2)),
            f"lora_te3_{T5_FLAT}",
        },
        {
            "diffusion_model.joint_blocks.0.x_block.attn.proj",
            *(f"text_encoders.clip_{letter}.transformer.{CLIP}" for letter in "lg"),
            f"text_encoders.t5xxl.transformer.{T5}",
        },
    ),
    "lora_lumina.py": (
        {"transformer.layers.0.attn.to_out.0": WIDE, f"text_encoder.{LLM}": WIDE},
        "lumina",
        {"lora_unet_layers_0_attention_out", f"lora_te_{LLM_FLAT}"},
        {"diffusion_model.layers.0.attention.out", f"text_encoders.gemma2_2b.transformer.model.{LLM}"},
    ),
    "lora_anima.py": (
        {"transformer.transformer_blocks.0.attn2.to_q": WIDE, f"text_encoder.{LLM}": WIDE},
        "anima",
        {"lora_unet_blocks_0_cross_attn_q_proj", f"lora_te_{LLM_FLAT}"},
        {"diffusion_model.blocks.0.cross_attn.q_proj", f"text_encoders.qwen3_06b.transformer.model.{LLM}"},
    ),
}


def written(names: dict[str, int], said: str, folder: Path) -> Path:
    tensors = {f"{name}.lora_A.weight": torch.ones(RANK, columns) for name, columns in names.items()}
    tensors |= {f"{name}.lora_B.weight": torch.ones(WIDE, RANK) for name in names}
    save_file(tensors, folder / "lora.safetensors", {"ss_base_model_version": said} if said else None)
    return folder / "lora.safetensors"


def modules(file: Path) -> set[str]:
    return {key.partition(".lora_")[0].removesuffix(".alpha") for key in load_file(file)}


@pytest.mark.parametrize("network", MODELS)
def test_every_network_finds_its_modules(network: str, tmp_path: Path) -> None:
    names, said, kohya, comfyui = MODELS[network]
    file = written(names, said, tmp_path)
    for to, wanted in (("kohya", kohya), ("comfyui", comfyui)):
        adapterkit.convert(file, tmp_path / f"{to}.safetensors", to=to)
        assert modules(tmp_path / f"{to}.safetensors") == wanted
    adapterkit.convert(tmp_path / "comfyui.safetensors", tmp_path / "back.safetensors", to="diffusers")
    assert {name.replace(".model.layers.", ".layers.") for name in modules(tmp_path / "back.safetensors")} == set(names)


def test_a_text_encoder_that_nothing_names(tmp_path: Path) -> None:
    file = written({f"text_encoder.{LLM}": WIDE}, "", tmp_path)
    for to in ("kohya", "comfyui"):
        with pytest.raises(UnsupportedAdapter, match=f"nothing says what {to} calls the text encoder"):
            adapterkit.convert(file, tmp_path / "out.safetensors", to=to)
    file = written({f"text_encoders.t5xxl.transformer.{T5}": WIDE}, "", tmp_path)
    with pytest.raises(UnsupportedAdapter, match="text_encoder_2 of Flux and text_encoder_3 of SD3"):
        adapterkit.convert(file, tmp_path / "out.safetensors", to="diffusers")
