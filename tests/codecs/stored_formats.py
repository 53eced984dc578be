"""Weights as the libraries of their formats store them, and what those libraries decode; else their published formulas."""

from __future__ import annotations

import json
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

import torch
from packed import awq_words, bits_of

F8 = torch.float8_e4m3fn
Stored = dict[str, torch.Tensor]


@dataclass(frozen=True)
class Format:
    """``encode``: a float32 weight ``[out, in]`` to its tensors, by the last part of their names."""

    encode: Callable[[torch.Tensor], Stored]
    config: dict[str, Any] | None
    dtype: str = "bfloat16"


def blocks(weight: torch.Tensor) -> Stored:
    """transformers' FineGrainedFP8."""
    from transformers.integrations.finegrained_fp8 import Fp8Quantize

    settings = SimpleNamespace(weight_block_size=[128, 128], scale_fmt=None)
    found = Fp8Quantize(SimpleNamespace(quantization_config=settings))._quantize_one("a.weight", weight)
    return {name.removeprefix("a."): tensor for name, tensor in found.items()}


def short_blocks(weight: torch.Tensor) -> Stored:
    """The same of a weight that 128x128 does not divide, block by block; scales in bfloat16, as Qwen3's FP8 has them."""
    rows, columns = weight.shape
    scale = torch.ones(-(-rows // 128), -(-columns // 128), dtype=torch.bfloat16)
    codes = torch.empty(rows, columns, dtype=F8)
    for i in range(scale.shape[0]):
        for j in range(scale.shape[1]):
            part = slice(128 * i, 128 * i + 128), slice(128 * j, 128 * j + 128)
            scale[i, j] = (1 / (448 / weight[part].abs().max())).bfloat16()
            codes[part] = (weight[part] * (1 / scale[i, j].float())).clamp(-448, 448).to(F8)
    return {"weight": codes, "weight_scale_inv": scale, "input_scale": torch.tensor(0.5)}


def per_row(weight: torch.Tensor) -> Stored:
    times = 448 / weight.abs().amax(1, keepdim=True)
    return {"weight": (weight * times).to(F8), "weight_scale": 1 / times}


def per_tensor(weight: torch.Tensor) -> Stored:
    times = 448 / weight.abs().max()
    return {"weight": (weight * times).to(F8), "weight_scale": 1 / times, "input_scale": torch.tensor(0.1)}


def mxfp8(weight: torch.Tensor) -> Stored:
    from transformers.integrations.finegrained_fp8 import Fp8Quantize

    settings = SimpleNamespace(weight_block_size=[1, 32], scale_fmt="ue8m0")
    found = Fp8Quantize(SimpleNamespace(quantization_config=settings))._quantize_one("a.weight", weight)
    return {name.removeprefix("a."): tensor for name, tensor in found.items()}


def modelopt_nvfp4(weight: torch.Tensor, over: torch.Tensor | None = None) -> Stored:
    """ModelOpt, quantization/qtensor/nvfp4_tensor.py: NVFP4QTensor.quantize, with a given scale of the whole tensor."""
    over = torch.tensor(1.0 / 4096) if over is None else over
    groups = weight.view(weight.shape[0], -1, 16)
    scale = (groups.abs().amax(2) / (6.0 * over)).clamp(max=448)
    scale = torch.where(scale.to(F8).float() == 0, 1.0, scale).to(F8)
    codes = e2m1(groups / (scale.float() * over)[:, :, None]).view(weight.shape)
    return {"weight": codes[:, ::2] | codes[:, 1::2] << 4, "weight_scale": scale, "weight_scale_2": over}


def e2m1(values: torch.Tensor) -> torch.Tensor:
    """Nearest of the eight magnitudes, the even code where two are as near, one value after the other."""
    table = torch.tensor([0, 0.5, 1, 1.5, 2, 3, 4, 6])
    off = (values.abs().clamp(max=6)[..., None].double() - table).abs()
    least = off == off.amin(-1, keepdim=True)
    even = torch.tensor([0.0, 1, 0, 1, 0, 1, 0, 1])
    codes = torch.where(least, even, 9.0).argmin(-1).to(torch.uint8)
    return codes | (torch.signbit(values).to(torch.uint8) << 3)


def compressed(format: str, grid: tuple[int, int], **args: Any) -> Format:
    """compressed-tensors' own scales (`calculate_qparams`) and compressors; ``grid`` are rows and columns of a tile."""
    weights = {key: value for key, value in args.items() if key != "scale_dtype"}

    def encode(weight: torch.Tensor) -> Stored:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            from compressed_tensors.compressors import BaseCompressor
            from compressed_tensors.quantization import QuantizationArgs, QuantizationScheme
            from compressed_tensors.quantization.utils import calculate_qparams

            how = QuantizationArgs(**args)
            scheme = QuantizationScheme(targets=["Linear"], weights=how, format=format)
            tall, wide = grid
            tiles = weight.view(weight.shape[0] // tall, tall, weight.shape[1] // wide, wide)
            over = torch.tensor([20000.0]) if format.startswith("nvfp4") else None
            scale, zero = calculate_qparams(tiles.amin((1, 3)), tiles.amax((1, 3)), how, over)
            if format.startswith(("nvfp4", "mx")):
                stored = scale
            else:
                stored = scale.bfloat16()
            if how.strategy == "tensor":
                stored, zero = stored.view(1), zero.view(1)
            state = {"weight": weight, "weight_scale": stored.float() if over is None else stored}
            if over is not None:
                state["weight_global_scale"] = over
            if not how.symmetric:
                state["weight_zero_point"] = zero
            found = BaseCompressor.get_value_from_registry(format).compress(dict(state), scheme)
        if found["weight_scale"].dtype is torch.float32:
            found["weight_scale"] = found["weight_scale"].bfloat16()
        return found

    groups = {"group_0": {"targets": ["Linear"], "weights": weights, "format": format}}
    return Format(
        encode, {"quant_method": "compressed-tensors", "format": format, "config_groups": groups, "ignore": ["lm_head"]}
    )


def bnb4(kind: str, *, double: bool) -> Format:
    def encode(weight: torch.Tensor) -> Stored:
        import bitsandbytes.functional as bnb

        codes, state = bnb.quantize_4bit(weight, quant_type=kind, blocksize=64)
        state.dtype = torch.bfloat16
        if double:
            # As on a GPU, where the nearest value is taken; its CPU kernel takes the other neighbour of some.
            from adapterkit.codecs.blockwise import nest, nested_values

            absmax, largest, offset = nest(state.absmax)
            outer = SimpleNamespace(absmax=largest, code=nested_values(), blocksize=256, dtype=torch.float32)
            said = {
                "quant_type": kind, "blocksize": 64, "dtype": "bfloat16", "shape": list(weight.shape),
                "nested_blocksize": 256, "nested_dtype": "float32", "nested_offset": float(offset),
            }  # fmt: skip
            parts = {
                "absmax": absmax, "quant_map": state.code, "nested_absmax": outer.absmax, "nested_quant_map": outer.code,
                f"quant_state.bitsandbytes__{kind}": torch.tensor(list(json.dumps(said).encode()), dtype=torch.uint8),
            }  # fmt: skip
        else:
            parts = dict(state.as_dict(packed=True))
        return {"weight": codes, **{f"weight.{name}": tensor for name, tensor in parts.items()}}

    config = {"quant_method": "bitsandbytes", "load_in_4bit": True, "bnb_4bit_quant_type": kind}
    return Format(encode, {**config, "bnb_4bit_use_double_quant": double})


def bnb8(weight: torch.Tensor) -> Stored:
    import bitsandbytes.functional as bnb

    codes, scale, _ = bnb.int8_vectorwise_quant(weight.half())
    return {"weight": codes, "SCB": scale, "weight_format": torch.tensor(0, dtype=torch.uint8)}


def gptq(bits: int, *, order: bool, symmetric: bool, version: int = 1, uneven: bool = False) -> Format:
    """AutoGPTQ: quantization/quantizer.py (find_params), nn_modules/qlinear (pack); ``uneven``: groups of any size."""
    size, most = 32, 2**bits - 1

    def encode(weight: torch.Tensor) -> Stored:
        inside = weight.shape[1]
        index = torch.arange(inside) // size
        if order:
            index = index[torch.randperm(inside, generator=torch.Generator().manual_seed(3))]
        groups = int(index.max()) + 1
        if uneven:
            index[(index == 1) | (torch.arange(inside) % 7 == 0)] = 0
        scales, zeros = torch.empty(groups, weight.shape[0]), torch.empty(groups, weight.shape[0])
        for group in range(groups):
            part = weight[:, index == group]
            if not part.numel():
                scales[group], zeros[group] = 1, 2
                continue
            low, high = part.amin(1).clamp(max=0), part.amax(1).clamp(min=0)
            if symmetric:
                high = torch.maximum(-low, high)
                low = -high
            scales[group] = (high - low) / most
            zeros[group] = (most + 1) / 2 if symmetric else torch.round(-low / scales[group])
        scales = scales.half()
        q = (torch.round(weight / scales.float()[index].T) + zeros[index].T).clamp(0, most)
        stored = (zeros.int() - (1 if version == 1 else 0)) % 2**bits
        found = {"qweight": bits_of(q.int(), bits).T.contiguous(), "qzeros": bits_of(stored, bits), "scales": scales}
        return {**found, "g_idx": index.int()}

    config = {"quant_method": "gptq", "bits": bits, "group_size": size, "desc_act": order, "sym": symmetric}
    return Format(encode, {**config, "checkpoint_format": "gptq" if version == 1 else "gptq_v2"}, "float16")


def awq(weight: torch.Tensor) -> Stored:
    """AutoAWQ, quantize/quantizer.py: pseudo_quantize_tensor; modules/linear/gemm.py: from_linear."""
    groups = weight.view(weight.shape[0], -1, 32)
    low, high = groups.amin(2), groups.amax(2)
    scale = (high - low).clamp(min=1e-5) / 15
    zero = (-torch.round(low / scale)).clamp(0, 15)
    scale = scale.half()
    q = (torch.round(groups / scale.float()[:, :, None]) + zero[:, :, None]).clamp(0, 15).view(weight.shape)
    found = {"qweight": awq_words(q.T.int().contiguous()), "qzeros": awq_words(zero.T.int().contiguous())}
    return {**found, "scales": scale.T.contiguous()}


def torchao_int8(weight: torch.Tensor) -> Stored:
    """torchao 0.18, quant_primitives.py: choose_qparams_affine and quantize_affine, symmetric, per row."""
    scale = (weight.abs().amax(1, keepdim=True) / 127.5).clamp(min=torch.finfo(torch.float32).eps)
    codes = torch.round(weight * (1 / scale)).clamp(-128, 127).to(torch.int8)
    zero = torch.zeros_like(scale, dtype=torch.int8)
    return {"_weight_qdata": codes, "_weight_scale": scale, "_weight_zero_point": zero}


def torchao_float8(weight: torch.Tensor) -> Stored:
    """torchao 0.18, quant_primitives.py: choose_scale_float8 and quantize_affine_float8, per row."""
    scale = weight.abs().amax(1, keepdim=True) / 448
    return {"_weight_qdata": (weight / scale).clamp(-448, 448).to(F8), "_weight_scale": scale}


def comfy(weight: torch.Tensor) -> Stored:
    """ComfyUI, quant_ops.py: TensorCoreFP8Layout.quantize."""
    scale = weight.abs().max() / 448
    codes = (weight * (1.0 / scale)).clamp(-448, 448).to(F8)
    said = torch.tensor(list(json.dumps({"format": "float8_e4m3fn"}).encode()), dtype=torch.uint8)
    return {"weight": codes, "weight_scale": scale, "comfy_quant": said}


def old_comfy(weight: torch.Tensor) -> Stored:
    found = comfy(weight)
    return {"weight": found["weight"], "scale_weight": found["weight_scale"], "scale_input": torch.tensor(1.0)}


def mlx(mode: str, bits: int, size: int) -> Format:
    """mlx itself."""

    def encode(weight: torch.Tensor) -> Stored:
        import mlx.core as mx
        import numpy as np

        made = mx.quantize(mx.array(weight.numpy()), group_size=size, bits=bits, mode=mode)
        return {n: torch.from_numpy(np.array(t)) for n, t in zip(("weight", "scales", "biases"), made, strict=False)}

    return Format(encode, {"group_size": size, "bits": bits, "mode": mode})


INT = {"num_bits": 4, "type": "int"}
FORMATS: dict[str, Format] = {
    "fp8 blocks": Format(
        blocks, {"quant_method": "fp8", "weight_block_size": [128, 128], "activation_scheme": "dynamic"}
    ),
    "fp8 short blocks": Format(short_blocks, {"quant_method": "fp8", "weight_block_size": [128, 128]}),
    "fp8 rows": Format(per_row, {"quant_method": "fbgemm_fp8"}),
    "fp8 tensor": Format(per_tensor, {"quant_method": "fp8"}),
    "mxfp8": Format(mxfp8, {"quant_method": "fp8", "weight_block_size": [1, 32], "scale_fmt": "ue8m0"}),
    "modelopt nvfp4": Format(modelopt_nvfp4, {"quant_method": "modelopt", "quant_algo": "NVFP4"}),
    "ct int4": compressed("pack-quantized", (1, 32), **INT, strategy="group", group_size=32),
    "ct int4 asym": compressed("pack-quantized", (1, 32), **INT, strategy="group", group_size=32, symmetric=False),
    "ct int3": compressed("pack-quantized", (1, 32), num_bits=3, type="int", strategy="group", group_size=32),
    "ct int8 rows": compressed("int-quantized", (1, 192), num_bits=8, type="int", strategy="channel"),
    "ct int8 asym": compressed("int-quantized", (1, 192), num_bits=8, type="int", strategy="channel", symmetric=False),
    "ct fp8 rows": compressed("float-quantized", (1, 192), num_bits=8, type="float", strategy="channel"),
    "ct fp8 tensor": compressed("float-quantized", (160, 192), num_bits=8, type="float", strategy="tensor"),
    "ct fp8 blocks": compressed(
        "float-quantized", (16, 32), num_bits=8, type="float", strategy="block", block_structure=[16, 32]
    ),
    "ct nvfp4": compressed(
        "nvfp4-pack-quantized",
        (1, 16),
        num_bits=4,
        type="float",
        strategy="tensor_group",
        group_size=16,
        scale_dtype=F8,
    ),
    "ct mxfp4": compressed(
        "mxfp4-pack-quantized",
        (1, 32),
        num_bits=4,
        type="float",
        strategy="group",
        group_size=32,
        scale_dtype=torch.uint8,
    ),
    "ct mxfp8": compressed(
        "mxfp8-quantized", (1, 32), num_bits=8, type="float", strategy="group", group_size=32, scale_dtype=torch.uint8
    ),
    "nf4": bnb4("nf4", double=False),
    "nf4 double": bnb4("nf4", double=True),
    "fp4": bnb4("fp4", double=False),
    "int8": Format(bnb8, {"quant_method": "bitsandbytes", "load_in_8bit": True}),
    "gptq": gptq(4, order=False, symmetric=True),
    "gptq act order": gptq(4, order=True, symmetric=False),
    "gptq uneven": gptq(4, order=True, symmetric=False, uneven=True),
    "gptq 3 bit v2": gptq(3, order=False, symmetric=False, version=2),
    "awq": Format(
        awq, {"quant_method": "awq", "bits": 4, "group_size": 32, "version": "gemm", "zero_point": True}, "float16"
    ),
    "torchao int8": Format(torchao_int8, {"quant_method": "torchao", "quant_type": {}}),
    "torchao float8": Format(torchao_float8, {"quant_method": "torchao", "quant_type": {}}),
    "comfy": Format(comfy, None),
    "comfy scale_weight": Format(old_comfy, None),
    "mlx": mlx("affine", 4, 64),
    "mlx 3 bit": mlx("affine", 3, 32),
    "mlx 5 bit": mlx("affine", 5, 32),
    "mlx mxfp4": mlx("mxfp4", 4, 32),
    "mlx mxfp8": mlx("mxfp8", 8, 32),
    "mlx nvfp4": mlx("nvfp4", 4, 16),
}
