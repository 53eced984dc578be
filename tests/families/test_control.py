"""A control LoRA of Flux that takes more inputs than the base: what diffusers loads is the live adapter on a widened model."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

import adapterkit

WIDTH = 32
SAID: dict[str, Any] = {
    "patch_size": 1,
    "num_layers": 1,
    "num_single_layers": 1,
    "attention_head_dim": 16,
    "num_attention_heads": 2,
    "joint_attention_dim": 32,
    "pooled_projection_dim": 16,
    "guidance_embeds": False,
    "axes_dims_rope": (4, 4, 8),
}


def test_diffusers_loads_the_widened_model(tmp_path: Path) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        from diffusers import FluxTransformer2DModel
    torch.manual_seed(0)
    base = FluxTransformer2DModel(**SAID, in_channels=16).eval()
    base.save_pretrained(tmp_path / "base")
    shapes = {
        "x_embedder": (WIDTH, 32),
        "transformer_blocks.0.attn.to_q": (WIDTH, WIDTH),
        "norm_out.linear": (2 * WIDTH, WIDTH),
        "proj_out": (16, WIDTH),
    }
    factors = {}
    for name, (rows, columns) in shapes.items():
        factors[f"transformer.{name}.lora_A.weight"] = 0.3 * torch.randn(4, columns)
        factors[f"transformer.{name}.lora_B.weight"] = 0.3 * torch.randn(rows, 4)
    save_file(factors, tmp_path / "control.safetensors")
    adapterkit.merge(tmp_path / "base", [tmp_path / "control.safetensors"], tmp_path / "out")
    merged = FluxTransformer2DModel.from_pretrained(tmp_path / "out").eval()
    assert (merged.config.in_channels, merged.config.out_channels) == (32, 16)

    live = FluxTransformer2DModel(**SAID, in_channels=32, out_channels=16).eval()
    weights = base.state_dict()
    weights["x_embedder.weight"] = torch.nn.functional.pad(weights["x_embedder.weight"], (0, 16))
    live.load_state_dict(weights)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        live.load_lora_adapter(factors, prefix="transformer")
    inputs = {
        "hidden_states": torch.randn(1, 4, 32),
        "encoder_hidden_states": torch.randn(1, 3, 32),
        "pooled_projections": torch.randn(1, 16),
        "timestep": torch.tensor([0.5]),
        "img_ids": torch.zeros(4, 3),
        "txt_ids": torch.zeros(3, 3),
    }
    with torch.no_grad():
        ours, theirs = merged(**inputs).sample, live(**inputs).sample
    assert float((ours - theirs).abs().max()) <= 2e-6 * max(1.0, float(theirs.abs().max()))
