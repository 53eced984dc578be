"""FP8, MXFP and compressed-tensors against the libraries that define them."""

from __future__ import annotations

import warnings

import pytest
import torch
from codec_reads import check_ranges, values, wide

from adapterkit.checkpoint.decoded import dequantized
from adapterkit.errors import CheckpointError

F8 = torch.float8_e4m3fn


def weight(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)) * 0.05


def fp8_oracle(codes: torch.Tensor, scale: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    from transformers.integrations.finegrained_fp8 import Fp8Dequantize

    return Fp8Dequantize(None)._dequantize_one(codes, scale, output_dtype=dtype)


BLOCKS = {"quant_method": "fp8", "weight_block_size": [128, 128]}


@pytest.mark.parametrize(
    ("shape", "grid"), [((256, 384), (2, 3)), ((128, 64), (128, 1)), ((48, 96), (1, 1)), ((3, 256, 128), (2, 1))]
)
def test_axolotl_3771_fp8_equals_transformers(store, shape: tuple[int, ...], grid: tuple[int, int]) -> None:
    codes = weight(*shape).mul(100).to(F8)
    scale = torch.rand(*shape[:-2], *grid, generator=torch.Generator().manual_seed(1)) * 0.01
    name = "a.weight" if len(shape) == 2 else "mlp.experts.gate_up_proj"
    checkpoint = store({name: codes, f"{name}_scale_inv": scale, "a.activation_scale": torch.ones(1)}, BLOCKS)
    if len(shape) == 3:
        with pytest.raises(CheckpointError, match=r"a\.activation_scale"):
            dequantized(checkpoint)  # it belongs to no weight
        checkpoint = store({name: codes, f"{name}_scale_inv": scale}, BLOCKS)
    assert torch.equal(values(checkpoint, name), fp8_oracle(codes, scale, torch.bfloat16))
    assert torch.equal(wide(checkpoint, name), fp8_oracle(codes, scale, torch.float32))
    check_ranges(checkpoint, name)


def test_fp8_blocks_that_do_not_divide(store) -> None:
    """DeepSeek's kv_a_proj_with_mqa has 576 rows in blocks of 128; the last block is short."""
    codes = weight(576, 200).mul(100).to(F8)
    scale = torch.rand(5, 2, generator=torch.Generator().manual_seed(1)) * 0.01
    checkpoint = store({"a.weight": codes, "a.weight_scale_inv": scale}, BLOCKS)
    row, column = torch.arange(576) // 128, torch.arange(200) // 128
    assert torch.equal(wide(checkpoint, "a.weight"), codes.float() * scale[row][:, column])
    check_ranges(checkpoint, "a.weight")
    with pytest.raises(CheckpointError, match="equal blocks"):
        dequantized(store({"a.weight": codes, "a.weight_scale_inv": scale[:4]}, BLOCKS))


@pytest.mark.parametrize("stored", [torch.uint8, torch.float8_e8m0fnu])
def test_mxfp8_and_packed_fp4_equal_transformers(store, stored: torch.dtype) -> None:
    generator = torch.Generator().manual_seed(2)
    exponents = torch.randint(110, 130, (32, 4), generator=generator, dtype=torch.uint8).view(stored)
    codes = weight(32, 128).mul(100).to(F8)
    checkpoint = store({"a.weight": codes, "a.weight_scale_inv": exponents}, {"quant_method": "fp8"})
    assert torch.equal(values(checkpoint, "a.weight"), fp8_oracle(codes, exponents, torch.bfloat16))
    pairs = torch.randint(0, 256, (32, 64), generator=generator, dtype=torch.uint8).view(torch.int8)
    checkpoint = store({"a.weight": pairs, "a.weight_scale_inv": exponents}, {"quant_method": "fp8"})
    assert torch.equal(values(checkpoint, "a.weight"), fp8_oracle(pairs, exponents, torch.bfloat16))
    check_ranges(checkpoint, "a.weight")


def test_axolotl_3773_modelopt_nvfp4(store) -> None:
    """value = e2m1 * (fp8 scale of 16 columns * weight_scale_2); ModelOpt, quantization/qtensor/nvfp4_tensor.py."""
    generator = torch.Generator().manual_seed(3)
    pairs = torch.randint(0, 256, (8, 32), generator=generator, dtype=torch.uint8)
    scale = (torch.rand(8, 4, generator=generator) * 400).to(F8)
    tensors = {"a.weight": pairs, "a.weight_scale": scale, "a.weight_scale_2": torch.tensor(0.003)}
    checkpoint = store({**tensors, "a.input_scale": torch.tensor(1.0)}, {"quant_method": "modelopt"})
    table = torch.tensor([0, 0.5, 1, 1.5, 2, 3, 4, 6])
    codes = torch.stack([pairs & 15, pairs >> 4], -1).view(8, 64).long()
    exact = table[codes & 7] * torch.where(codes > 7, -1.0, 1.0)
    wanted = exact * (scale.float() * 0.003).repeat_interleave(16, 1)
    assert torch.equal(wide(checkpoint, "a.weight"), wanted)


def test_tinker_cookbook_590_mxfp4_experts_equal_transformers(store) -> None:
    from transformers.integrations.mxfp4 import convert_moe_packed_tensors

    generator = torch.Generator().manual_seed(4)
    blocks = torch.randint(0, 256, (3, 40, 4, 16), generator=generator, dtype=torch.uint8)
    scales = torch.randint(100, 135, (3, 40, 4), generator=generator, dtype=torch.uint8)
    name = "model.layers.0.mlp.experts.gate_up_proj"
    tensors = {f"{name}_blocks": blocks, f"{name}_scales": scales}
    for config in ({"quant_method": "mxfp4"}, None):
        checkpoint = store(tensors, config)
        assert torch.equal(values(checkpoint, name), convert_moe_packed_tensors(blocks, scales, dtype=torch.bfloat16))
        check_ranges(checkpoint, name)
    with pytest.raises(CheckpointError, match=r"gate_up_proj_scales' is missing"):
        dequantized(store({f"{name}_blocks": blocks}, {"quant_method": "mxfp4"}))
    with pytest.raises(CheckpointError, match="only partly"):
        dequantized(store({**tensors, "b.down_proj_scales": scales.clone()}, {"quant_method": "mxfp4"}))


def compress(scheme, w: torch.Tensor, scale: torch.Tensor, zero: torch.Tensor | None = None, **more: torch.Tensor):
    """What compressed-tensors stores of a weight, and what it decompresses that to."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        from compressed_tensors.compressors import BaseCompressor

        state = {"weight": w, "weight_scale": scale, **more}
        if zero is not None:
            state["weight_zero_point"] = zero
        compressor = BaseCompressor.get_value_from_registry(scheme.format)
        stored = compressor.compress(dict(state), scheme)
        return stored, compressor.decompress(dict(stored), scheme)["weight"]


def scheme(format: str, **args: object):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        from compressed_tensors.quantization import QuantizationArgs, QuantizationScheme

        return QuantizationScheme(targets=["Linear"], weights=QuantizationArgs(**args), format=format)


def quantization(format: str, args: dict) -> dict:
    return {
        "quant_method": "compressed-tensors",
        "format": format,
        "config_groups": {"group_0": {"targets": ["Linear"], "weights": args}},
    }


CASES = {
    "w4a16 groups": ("pack-quantized", {"num_bits": 4, "type": "int", "strategy": "group", "group_size": 32}, (24, 3)),
    "w4a16 asym": (
        "pack-quantized",
        {"num_bits": 4, "type": "int", "strategy": "group", "group_size": 32, "symmetric": False},
        (24, 3),
    ),
    "w8a16 rows": ("pack-quantized", {"num_bits": 8, "type": "int", "strategy": "channel"}, (24, 1)),
    "w3a16 groups": ("pack-quantized", {"num_bits": 3, "type": "int", "strategy": "group", "group_size": 32}, (24, 3)),
    "w2a16 rows": ("pack-quantized", {"num_bits": 2, "type": "int", "strategy": "channel"}, (24, 1)),
    "w8a8 rows": ("int-quantized", {"num_bits": 8, "type": "int", "strategy": "channel"}, (24, 1)),
    "w8a8 asym": ("int-quantized", {"num_bits": 8, "type": "int", "strategy": "channel", "symmetric": False}, (24, 1)),
    "w8a8 tensor": ("int-quantized", {"num_bits": 8, "type": "int", "strategy": "tensor"}, (1,)),
    "fp8 rows": ("float-quantized", {"num_bits": 8, "type": "float", "strategy": "channel"}, (24, 1)),
    "fp8 tensor": ("float-quantized", {"num_bits": 8, "type": "float", "strategy": "tensor"}, (1,)),
    "fp8 blocks": (
        "float-quantized",
        {"num_bits": 8, "type": "float", "strategy": "block", "block_structure": [16, 32]},
        (2, 3),
    ),
}


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_compressed_tensors_decompresses_to_the_same_bits(store, case: str, dtype: torch.dtype) -> None:
    format, args, grid = CASES[case]
    w = weight(24, 96, seed=5)
    generator = torch.Generator().manual_seed(6)
    top = 448 if args["type"] == "float" else 2 ** (args["num_bits"] - 1)
    scale = ((0.5 + torch.rand(grid, generator=generator)) * 0.15 / top).to(dtype)
    zero = None
    if args.get("symmetric") is False:
        zero = torch.randint(-3, 4, grid, generator=generator, dtype=torch.int8)
    stored, wanted = compress(scheme(format, **args), w.to(dtype), scale, zero)
    tensors = {f"a.{key}": value for key, value in stored.items()}
    checkpoint = store(tensors, quantization(format, args))
    assert torch.equal(wide(checkpoint, "a.weight"), wanted)
    check_ranges(checkpoint, "a.weight")
    assert set(dequantized(checkpoint)) == {"a.weight"}


@pytest.mark.parametrize("format", ["nvfp4-pack-quantized", "mxfp4-pack-quantized", "mxfp8-quantized"])
def test_compressed_tensors_micro_scaled(store, format: str) -> None:
    w = weight(24, 96, seed=7).to(torch.bfloat16)
    generator = torch.Generator().manual_seed(8)
    more = {}
    if format.startswith("nvfp4"):
        args = {"num_bits": 4, "type": "float", "strategy": "tensor_group", "group_size": 16}
        scale = (torch.rand(24, 6, generator=generator) * 400 + 1).to(F8).to(torch.bfloat16)
        more["weight_global_scale"] = torch.tensor([9000.0])
    else:
        bits = 4 if "mxfp4" in format else 8
        args = {"num_bits": bits, "type": "float", "strategy": "group", "group_size": 32, "scale_dtype": torch.uint8}
        scale = torch.exp2(torch.randint(-8, -3, (24, 3), generator=generator).float()).to(torch.bfloat16)
    stored, wanted = compress(scheme(format, **args), w, scale, **more)
    checkpoint = store({f"a.{key}": value for key, value in stored.items()}, quantization(format, {"num_bits": 4}))
    assert torch.equal(values(checkpoint, "a.weight"), wanted)
    check_ranges(checkpoint, "a.weight")


def test_group_indices_of_activation_order(store) -> None:
    """Column c belongs to group g_idx[c]; compressed-tensors 0.9 to 0.14 wrote them for actorder=group."""
    format, args, grid = CASES["w4a16 groups"]
    scale = torch.rand(grid, generator=torch.Generator().manual_seed(1)) * 0.02
    stored, plain = compress(scheme(format, **args), weight(24, 96), scale)
    order = torch.randperm(96, generator=torch.Generator().manual_seed(2))
    groups = (torch.arange(96) // 32)[order]
    tensors = {f"a.{key}": value for key, value in stored.items()}
    codes = plain / scale.repeat_interleave(32, 1)
    checkpoint = store({**tensors, "a.weight_g_idx": groups.int()}, quantization(format, args))
    assert torch.allclose(wide(checkpoint, "a.weight"), codes.round() * scale[:, groups], rtol=1e-6)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda t, q: q.update(format="marlin-24"), "'marlin-24' is not one that adapterkit reads; it reads dense"),
        (lambda t, q: t.pop("a.weight_shape"), "no weight_shape beside it"),
        (lambda t, q: t.pop("a.weight_scale"), "'a.weight_scale' is missing"),
        (lambda t, q: t.update({"a.weight_scale": torch.ones(24, 5)}), "equal blocks"),
        (lambda t, q: q["config_groups"]["group_0"]["weights"].update(num_bits=8), "of 8 bits"),
        (lambda t, q: t.update({"a.weight_packed": t["a.weight_packed"][:, :-1]}), "is no 24x96 weight of 4 bits"),
        (lambda t, q: t.update({"b.weight_shape": torch.tensor([1, 1])}), "only partly compressed-tensors"),
    ],
)
def test_compressed_tensors_that_do_not_fit(store, change, message: str) -> None:
    format, args, grid = CASES["w4a16 groups"]
    stored, _ = compress(scheme(format, **args), weight(24, 96), torch.rand(grid) * 0.02)
    tensors, config = {f"a.{key}": value for key, value in stored.items()}, quantization(format, dict(args))
    change(tensors, config)
    with pytest.raises(CheckpointError) as error:
        dequantized(store(tensors, config))
    assert message in str(error.value)


def test_packed_tensors_without_a_config(store) -> None:
    format, args, grid = CASES["w4a16 groups"]
    stored, _ = compress(scheme(format, **args), weight(24, 96), torch.rand(grid) * 0.02)
    with pytest.raises(CheckpointError, match=r"a\.weight_(packed|shape)', a part of compressed-tensors weights"):
        dequantized(store({f"a.{key}": value for key, value in stored.items()}))
