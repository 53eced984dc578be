"""Quantized weights that look like a known layout and are another, and numbers that no weight can have: refused by name."""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any

import pytest
import torch
from stored_formats import FORMATS, Stored, gptq, modelopt_nvfp4, mxfp8, per_tensor

from adapterkit.checkpoint.decoded import dequantized
from adapterkit.errors import CheckpointError

F8 = torch.float8_e4m3fn
SIDE = 256
W = torch.randn(SIDE, SIDE, generator=torch.Generator().manual_seed(0)) * 0.05
MODELOPT = {"quant_method": "modelopt"}


def numbers(*shape: int, dtype: torch.dtype = torch.uint8) -> torch.Tensor:
    return torch.randint(1, 120, shape, generator=torch.Generator().manual_seed(1)).to(dtype)


def text(said: dict[str, str]) -> torch.Tensor:
    return torch.tensor(list(json.dumps(said).encode()), dtype=torch.uint8)


def of(
    name: str, change: Callable[[Stored], Stored] = lambda found: found, said: dict[str, Any] | None = None
) -> tuple[Stored, dict[str, Any]]:
    return change(FORMATS[name].encode(W)), {**(FORMATS[name].config or {}), **(said or {})}


def filled(part: str, value: float) -> Callable[[Stored], Stored]:
    return lambda found: {**found, part: torch.full_like(found[part].float(), value).to(found[part].dtype)}


def without(part: str) -> Callable[[Stored], Stored]:
    return lambda found: {name: tensor for name, tensor in found.items() if name != part}


int8 = numbers(SIDE, SIDE, dtype=torch.int8)
experts = "b.experts.gate_up_proj"
# what stands in module `a`, the quantization_config, what is said; whole names are those of other tensors
OTHER: dict[str, tuple[Stored, dict[str, Any] | None, str]] = {
    "ModelOpt's int8": ({"weight": int8, "weight_scale": torch.rand(SIDE)}, MODELOPT, "no layout of 4-bit floats"),
    "int8, one scale": (
        {"weight": int8, "weight_scale_inv": torch.tensor(0.1)},
        {"quant_method": "fp8"},
        "no layout of 4",
    ),
    "ModelOpt's int4": (
        {"weight": numbers(256, 128), "weight_scale": torch.rand(256, 2)},
        MODELOPT,
        "no layout of 4-bit",
    ),
    "ComfyUI's NVFP4": ({**modelopt_nvfp4(W), "comfy_quant": text({"format": "nvfp4"})}, None, 'the format "nvfp4"'),
    "NVFP4 of nobody": (modelopt_nvfp4(W), None, "in the order of a GPU's matrix units"),
    "MXFP8 of nobody": (mxfp8(W), None, "in the order of a GPU's matrix units"),
    "NVFP4 of AWQ": (
        {**modelopt_nvfp4(W), "pre_quant_scale": torch.rand(SIDE)},
        MODELOPT,
        "is applied beside 'a.weight'",
    ),
    "SVDQuant": (
        {**modelopt_nvfp4(W), "svdquant_lora_a": torch.rand(4, SIDE)},
        MODELOPT,
        "is applied beside 'a.weight'",
    ),
    "rotated": (*of("ct int4", said={"transform_config": {"u": {}}}), "are rotated"),
    "rotated by auto-round": (*of("gptq", said={"rotation_config": {"a": 1}}), "are rotated"),
    "marlin": (*of("gptq", said={"checkpoint_format": "marlin"}), "the layout 'marlin' is not known"),
    "old marlin": (*of("gptq", said={"is_marlin_format": True}), "the layout 'marlin' is not known"),
    "planes": (*of("gptq", said={"checkpoint_format": "gptq_p"}), "the layout 'gptq_p' is not known"),
    "GPTQ without its order": (*of("gptq act order", without("g_idx")), "has no g_idx"),
    "gemv": (
        *of("awq")[:1],
        {"quant_method": "awq", "bits": 4, "group_size": 32, "checkpoint_format": "gemv"},
        "'gemv'",
    ),
    "AWQ of an activation": (
        {**of("awq")[0], "b.mlp.act.scales": torch.rand(SIDE)},
        of("awq")[1],
        "'b.mlp.act.scales' divides what",
    ),
    "experts of Llama 4 in FP8": (
        {**per_tensor(W), experts: numbers(2, 64, 32).float().to(F8), f"{experts}_weight_scale": torch.ones(2)},
        MODELOPT,
        f"only partly fp8: '{experts}'",
    ),
    "experts of Llama 4 in NVFP4": (
        {**modelopt_nvfp4(W), experts: numbers(2, 64, 32), f"{experts}_weight_scale": torch.ones(2, 64, 4).to(F8)},
        MODELOPT,
        f"only partly fp8: '{experts}'",
    ),
    "NVFP4 without its second scale": (
        without("weight_scale_2")(modelopt_nvfp4(W)),
        MODELOPT,
        "no layout of 4-bit floats",
    ),
    "the same of compressed-tensors": (
        *of("ct nvfp4", without("weight_global_scale")),
        "without a weight_global_scale",
    ),
    "MXFP4 with one": (
        *of("ct mxfp4", lambda found: {**found, "weight_global_scale": torch.tensor([2.0])}),
        "with a weight_global_scale",
    ),
    "three scales over one weight": (
        *of("ct nvfp4", lambda found: {**found, "weight_global_scale": torch.ones(3)}),
        "which has one or one per matrix",
    ),
    "NaN in MX scales": (*of("ct mxfp8", filled("weight_scale", 255)), "NaN or infinite"),
    "NaN in MLX's MX scales": (*of("mlx mxfp4", filled("scales", 255)), "NaN or infinite"),
    "NaN in MLX's FP8 scales": (*of("mlx nvfp4", filled("scales", 127)), "NaN or infinite"),
    "NaN in MLX's biases": (
        *of("mlx", filled("biases", torch.nan)),
        "'a.biases' holds scales that are NaN or infinite",
    ),
    "a second scale of NaN": (
        {**modelopt_nvfp4(W), "weight_scale_2": torch.tensor(torch.nan)},
        MODELOPT,
        "NaN or infinite",
    ),
    "a global scale of zero": (*of("ct nvfp4", filled("weight_global_scale", 0.0)), "NaN or infinite"),
    "NaN in experts of gpt-oss": (
        {
            "weight": W.bfloat16(),
            "b.experts.down_proj_blocks": numbers(2, 64, 2, 16),
            "b.experts.down_proj_scales": torch.full((2, 64, 2), 255, dtype=torch.uint8),
        },
        {"quant_method": "mxfp4"},
        "'b.experts.down_proj_scales' holds scales that are NaN",
    ),
    "zero in absmax": (*of("nf4", filled("weight.absmax", 0.0)), "is zero where its numbers are not"),
    "zero in SCB": (*of("int8", filled("SCB", 0.0)), "is zero where its numbers are not"),
    "zero in GPTQ": (*of("gptq", filled("scales", 0.0)), "is zero where its numbers are not"),
    "zero in AWQ": (*of("awq", filled("scales", 0.0)), "is zero where its numbers are not"),
    "zero beside zero points": (*of("ct int4 asym", filled("weight_scale", 0.0)), "is zero where its numbers are not"),
    "zero in torchao": (*of("torchao int8", filled("_weight_scale", 0.0)), "is zero where its numbers are not"),
    "two scales": (
        {**per_tensor(W), "weight_scale_inv": torch.tensor(2.0)},
        {"quant_method": "fp8"},
        "'a.weight' has two scales",
    ),
    "blocks the other way round": (
        {"weight": numbers(300, 500).float().to(F8), "weight_scale_inv": torch.rand(4, 3)},
        {"quant_method": "fp8", "weight_block_size": [128, 128]},
        "covers no 300x500 weight in equal blocks",
    ),
    "the same of one block": (
        {"weight": numbers(256, 128).float().to(F8), "weight_scale_inv": torch.rand(1, 2)},
        {"quant_method": "fp8"},
        "covers no 256x128 weight in equal blocks",
    ),
    "a weight that is there twice": (
        *of("gptq", lambda found: {**found, "weight": W}),
        "holds 'a.weight' twice: as it is, and in gptq",
    ),
    "int8 experts of nobody": (
        {**per_tensor(W), "b.experts.w": numbers(2, 8, 8, dtype=torch.int8)},
        {"quant_method": "fp8"},
        "only partly fp8: 'b.experts.w'",
    ),
    "a norm with a scale": (
        {**per_tensor(W), "b.norm.weight": torch.ones(8).to(F8), "b.norm.weight_scale": torch.ones(1)},
        {"quant_method": "fp8"},
        "only partly fp8: 'b.norm.weight'",
    ),
    "another map of NF4": (*of("nf4", filled("weight.quant_map", 0.5)), "holds other values than those of nf4"),
}


@pytest.mark.parametrize("case", OTHER)
def test_refused_by_name(store, case: str) -> None:
    tensors, config, said = OTHER[case]
    named = {name if name.startswith("b.") else f"a.{name}": tensor for name, tensor in tensors.items()}
    with pytest.raises(CheckpointError) as refused:
        for handle in dequantized(store(named, config)).values():
            handle.read(0, handle.numel)
    assert said in str(refused.value)


@pytest.mark.parametrize(("rows", "columns"), [(16, 2048), (2, 256), (300, 500), (3, 384)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_blocks_of_any_size(store, rows: int, columns: int, dtype: torch.dtype) -> None:
    """A weight that is one block high may have as many blocks as rows; those are no scales of its rows."""
    codes = torch.randn(rows, columns, generator=torch.Generator().manual_seed(2)).to(F8)
    scale = torch.rand(-(-rows // 128), -(-columns // 128), generator=torch.Generator().manual_seed(3)).to(dtype)
    said = {"quant_method": "fp8", "weight_block_size": [128, 128]}
    handle = dequantized(store({"a.weight": codes, "a.weight_scale_inv": scale}, said))["a.weight"]
    wanted = codes.float() * scale.float().repeat_interleave(128, 0).repeat_interleave(128, 1)[:rows, :columns]
    assert torch.equal(handle.read(0, handle.numel).view(rows, columns).float(), wanted.to(handle.dtype.torch).float())


@pytest.mark.parametrize("rows", [SIDE, 64])
def test_a_scale_per_row_may_lie_on_its_side(store, rows: int) -> None:
    """Of a square weight too: no server can run a scale per column."""
    codes, scale = W[:rows].to(F8), torch.rand(rows)
    for shape in ((rows, 1), (1, rows), (rows,)):
        handle = dequantized(store({"a.weight": codes, "a.weight_scale": scale.view(shape)}, {"quant_method": "fp8"}))
        got = handle["a.weight"].read_wide(0, codes.numel()).view(codes.shape).float()
        assert torch.allclose(got, codes.float() * scale[:, None], rtol=1e-2)


def test_a_bias_in_float8_is_its_numbers(store) -> None:
    """Files that were cast whole hold such; they have no scale, and no 16-bit output keeps them narrow."""
    bias = torch.randn(SIDE).to(F8)
    found = dequantized(
        store({"a.weight": per_tensor(W)["weight"], "a.weight_scale": torch.tensor(0.5), "a.bias": bias}, {})
    )
    assert torch.equal(found["a.bias"].read_wide(0, SIDE).float(), bias.float())
    assert found["a.bias"].dtype.bits >= 16


@pytest.mark.parametrize("kind", ["nf4", "fp4"])
def test_blocks_of_zeros_are_read(store, bnb, kind: str) -> None:
    """Their scale is zero; the CPU's kernel gives them the code of zero, a GPU's the first one."""
    weight = W.clone()
    weight[3] = 0
    for code in (None, 0):
        found = FORMATS[kind].encode(weight)
        if code is not None:
            found["weight"].view(SIDE, -1)[3] = code
        handle = dequantized(store({f"a.{name}": tensor for name, tensor in found.items()}, FORMATS[kind].config))[
            "a.weight"
        ]
        assert not handle.read(3 * SIDE, 4 * SIDE).any()


def test_single_modules_in_other_sizes(store) -> None:
    """GPTQModel's `dynamic` and auto-round's `extra_config`: each module has the bits and groups that fit its shapes."""
    four, eight = gptq(4, order=False, symmetric=True), gptq(8, order=False, symmetric=False)
    tensors = {f"a.{name}": tensor for name, tensor in four.encode(W).items()}
    tensors |= {f"b.{name}": tensor for name, tensor in eight.encode(W).items() if name != "g_idx"}
    for key, name in (("dynamic", "+:^b$"), ("extra_config", "b")):
        config = {**(four.config or {}), key: {name: {"bits": 8, "sym": False, "group_size": 32}, "-:x": {}}}
        checkpoint = dequantized(store(tensors, config))
        for module, bits in (("a", 4), ("b", 8)):
            handle = checkpoint[f"{module}.weight"]
            off = handle.read_wide(0, handle.numel).view(SIDE, SIDE).float() - W
            assert off.norm() < W.norm() * (0.2 if bits == 4 else 0.01)
    with pytest.raises(CheckpointError, match="is no GPTQ of 4 bits"):
        dequantized(store(tensors, four.config))
    with pytest.raises(CheckpointError, match="GPTQ weights of 5 bits are not known"):
        dequantized(store(tensors, {**(four.config or {}), "dynamic": {"b": {"bits": 5}}}))
