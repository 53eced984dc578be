"""`--quant keep` of checkpoints that hold several formats at once: each weight keeps its own."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from stored_formats import F8, FORMATS, bnb4, compressed, e2m1, short_blocks
from test_keep import adapter_of, raw, same, stored

from adapterkit import check, convert, merge, verify
from adapterkit.checkpoint.decoded import dequantized
from adapterkit.checkpoint.open import open_checkpoint

LAYER = "model.layers.0."
Encode = Any


def experts(weight: torch.Tensor) -> dict[str, torch.Tensor]:
    """MXFP4 pairs with powers of two beside them, as experts of FP8 checkpoints have them: the smallest that keeps 32 values
    within 6 (OCP Microscaling Formats 1.0)."""
    groups = weight.view(weight.shape[0], -1, 32)
    exponent = torch.ceil(torch.log2(groups.abs().amax(2) / 6))
    codes = e2m1(groups * torch.exp2(-exponent)[:, :, None]).view(weight.shape)
    scale = (exponent + 127).to(torch.uint8).view(torch.float8_e8m0fnu)
    return {"weight": codes[:, ::2] | codes[:, 1::2] << 4, "weight_scale": scale}


def plain(weight: torch.Tensor) -> dict[str, torch.Tensor]:
    return {"weight": weight.bfloat16()}


def groups(*names: str) -> dict[str, Any]:
    """A config of compressed-tensors in which each module has the group of its own format."""
    found = {}
    for number, (name, module) in enumerate(zip(names, ("q_proj", "k_proj", "v_proj"), strict=False)):
        group = json.loads(json.dumps(FORMATS[name].config["config_groups"]["group_0"], default=str))
        found[f"group_{number}"] = {**group, "targets": [f"re:.*{module}$"]}
    return {
        "quant_method": "compressed-tensors",
        "format": "mixed-precision",
        "config_groups": found,
        "ignore": ["lm_head"],
    }


def packed(bits: int, target: str) -> dict[str, Any]:
    weights = {"num_bits": bits, "type": "int", "group_size": 32}
    return {"targets": [target], "weights": weights, "format": "pack-quantized"}


MIXED: dict[str, tuple[dict[str, Any], dict[str, Encode]]] = {
    "compressed-tensors": (
        groups("ct int4", "ct fp8 rows", "ct nvfp4"),
        {
            "self_attn.q_proj": FORMATS["ct int4"].encode,
            "self_attn.k_proj": FORMATS["ct fp8 rows"].encode,
            "self_attn.v_proj": FORMATS["ct nvfp4"].encode,
            "self_attn.o_proj": plain,
        },
    ),
    "compressed-tensors, 4 and 8 bits": (
        {
            **groups("ct int4", "ct int4"),
            "config_groups": {
                "a": packed(4, "Linear"),
                "b": packed(8, "re:.*k_proj"),
            },
        },
        {
            "self_attn.q_proj": FORMATS["ct int4"].encode,
            "self_attn.k_proj": compressed(
                "pack-quantized", (1, 32), num_bits=8, type="int", strategy="group", group_size=32
            ).encode,
        },
    ),
    "bitsandbytes": (
        {"quant_method": "bitsandbytes", "load_in_4bit": True, "bnb_4bit_quant_type": "nf4",
         "llm_int8_skip_modules": ["lm_head", "o_proj"]},
        {"self_attn.q_proj": bnb4("nf4", double=False).encode, "self_attn.o_proj": plain},
    ),
    "fp8 with experts in fp4": (
        {"quant_method": "fp8", "weight_block_size": [128, 128]},
        {
            "self_attn.q_proj": short_blocks,
            "self_attn.o_proj": plain,
            "mlp.experts.0.down_proj": experts,
            "mlp.experts.1.down_proj": experts,
        },
    ),
}  # fmt: skip


def base_of(folder: Path, name: str) -> Path:
    config, modules = MIXED[name]
    tensors = {"model.norm.weight": torch.ones(192, dtype=torch.bfloat16)}
    for number, (module, encode) in enumerate(modules.items()):
        w = torch.randn(160, 192, generator=torch.Generator().manual_seed(number)) * 0.05
        tensors.update({f"{LAYER}{module}.{leaf}": tensor.contiguous() for leaf, tensor in encode(w).items()})
    base = folder / "base"
    base.mkdir()
    save_file(tensors, base / "model.safetensors", metadata={"format": "pt"})
    said = {"model_type": "llama", "dtype": "bfloat16", "quantization_config": config}
    (base / "config.json").write_text(json.dumps(said, default=str))
    return base


def adapter(folder: Path, modules: Sequence[str], size: float) -> Path:
    folder.mkdir()
    made = adapter_of(folder, torch.zeros(160, 4), 192)
    tensors = {}
    for number, module in enumerate(modules):
        generator = torch.Generator().manual_seed(50 + number)
        key = f"base_model.model.{LAYER}{module}.lora_"
        tensors[f"{key}A.weight"] = torch.randn(4, 192, generator=generator)
        tensors[f"{key}B.weight"] = torch.randn(160, 4, generator=generator) * size
    save_file(tensors, made / "adapter_model.safetensors")
    said = json.loads((made / "adapter_config.json").read_text())
    targets = sorted({module.rpartition(".")[2] for module in modules})
    (made / "adapter_config.json").write_text(json.dumps({**said, "target_modules": targets}))
    return made


@pytest.mark.parametrize("name", MIXED)
def test_each_keeps_its_own(tmp_path: Path, name: str) -> None:
    base, (_, modules) = base_of(tmp_path, name), MIXED[name]
    nothing = adapter(tmp_path / "nothing", list(modules), 0.0)
    merge(base, [nothing], tmp_path / "same", quant="keep", yes_lossy=True)
    assert raw(tmp_path / "same") == raw(base)

    first = next(iter(modules))
    one = adapter(tmp_path / "one", [first], 0.02)
    merge(base, [one], tmp_path / "first", quant="keep", yes_lossy=True)
    before, after = stored(base), stored(tmp_path / "first")
    assert all(same(after[key], tensor) for key, tensor in before.items() if f"{LAYER}{first}." not in key)
    assert not all(same(after[key], tensor) for key, tensor in before.items())

    every = adapter(tmp_path / "every", list(modules), 0.02)
    planned = merge(base, [every], tmp_path / "all", quant="keep", yes_lossy=True, dry_run=True)
    merge(base, [every], tmp_path / "all", quant="keep", yes_lossy=True)
    assert planned.nbytes == (tmp_path / "all/model.safetensors").stat().st_size
    view, factors = dequantized(open_checkpoint(base)), load_file(every / "adapter_model.safetensors")
    after = stored(tmp_path / "all")
    for module, encode in modules.items():
        handle = view[f"{LAYER}{module}.weight"]
        w = handle.read_wide(0, handle.numel).view(160, 192).float()
        a, b = (factors[f"base_model.model.{LAYER}{module}.lora_{side}.weight"] for side in "AB")
        for leaf, tensor in encode(torch.addmm(w, b, a)).items():
            if "quant_state" not in leaf:
                assert same(after[f"{LAYER}{module}.{leaf}"], tensor), (module, leaf)
    assert (tmp_path / "all/config.json").read_bytes() == (base / "config.json").read_bytes()
    found = verify(tmp_path / "all", base=base, adapters=[every], level="tensors", min_retention=0)
    assert found.ok, found.findings
    assert check(base, [every], quant="keep", yes_lossy=True).ok
    convert(base, tmp_path / "wide", to="bf16")
    assert {t.dtype for t in stored(tmp_path / "wide").values()} == {torch.bfloat16}
    assert F8 not in {t.dtype for t in stored(tmp_path / "wide").values()}
