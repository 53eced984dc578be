"""`quantized`: a 16-bit view as transformers and bitsandbytes would save it quantized."""

from __future__ import annotations

import json
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from adapterkit.adapters.as_trained import quantized_targets
from adapterkit.checkpoint.checkpoint import SideFile
from adapterkit.checkpoint.encoded import encoded
from adapterkit.checkpoint.files import BytesFile
from adapterkit.checkpoint.tensor import Transposed
from adapterkit.codecs.conv1d import is_conv1d
from adapterkit.codecs.encode import FP8_BLOCK, Float8, FourBit, Int8
from adapterkit.codecs.grid import Grid
from adapterkit.codecs.table import quantization
from adapterkit.errors import UsageError

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping

    from adapterkit.adapters.target import Target
    from adapterkit.checkpoint.checkpoint import Checkpoint
    from adapterkit.checkpoint.tensor import Tensor
    from adapterkit.codecs.conv1d import is_conv1d
from adapterkit.codecs.encode import Encoder

KINDS = ("nf4", "fp4", "int8", "fp8")
CONFIG = "config.json"


def quantized(
    checkpoint: Checkpoint, kind: str, *, double_quant: bool = False, skip: Iterable[str] | None = None
) -> Checkpoint:
    """A view in which the linear layers are quantized, and the config says so.

    Args:
        checkpoint: a view of floating weights.
        kind: ``nf4``, ``fp4``, ``int8`` (bitsandbytes) or ``fp8`` (transformers' FineGrainedFP8, 128x128 blocks).
        double_quant: for 4-bit kinds.
        skip: modules to keep in 16 bits, in the place of the output layer; names or patterns, as ``llm_int8_skip_modules``.

    Raises:
        UsageError: there is no such kind, the view is quantized, or a layer is stored in pieces.
    """
    if kind not in KINDS:
        raise UsageError(f"'{kind}' is no format that adapterkit writes here", f"use {', '.join(KINDS)}")
    if quantization(checkpoint.config) is not None:
        raise UsageError(f"{checkpoint.ref} is quantized already", "dequantize it first")
    if kind == "fp8" and double_quant:
        raise UsageError("fp8 has no double quantization", "leave it out, or use nf4")
    grid = Grid(kind, double_quant) if kind != "fp8" else None
    targets = quantized_targets(checkpoint, skip)
    whole = {target.pieces[0].tensor: target for target in targets if _is_whole(target, checkpoint)}
    split = next((t.parameter for t in targets if t.pieces[0].tensor not in whole), None)
    if split is not None:
        raise UsageError(f"'{split}' is stored in pieces, which {kind} cannot be", "write 16 bits")
    kept: list[str] = []
    tensors: dict[str, Tensor] = {}
    shards: dict[str, str] = {}
    for name, tensor in checkpoint.tensors.items():
        linear = Transposed(tensor) if is_conv1d(name, checkpoint.config) else tensor
        encoder = _encoder(kind, grid, linear) if name in whole else None
        if name in whole and encoder is None:
            kept.append(whole[name].parameter.removesuffix(".weight"))
        for made in [tensor] if encoder is None else encoded(linear, encoder):
            tensors[made.name] = made
            shards[made.name] = checkpoint.shards.get(name, "model.safetensors")
    if not any(name in tensors and tensors[name] is not checkpoint[name] for name in whole):
        raise UsageError(f"{checkpoint.ref} has no linear layer that {kind} fits", "write 16 bits")
    dtype = next(iter(checkpoint[name] for name in whole)).dtype.torch_name
    modules = {target.parameter.removesuffix(".weight") for target in targets}
    config = {**checkpoint.config, "quantization_config": _config(kind, grid, dtype, skip, kept, checkpoint, modules)}
    text = json.dumps(config, indent=2, ensure_ascii=False) + "\n"
    side_files = tuple(file for file in checkpoint.side_files if file.name != CONFIG)
    return replace(
        checkpoint,
        tensors=tensors,
        shards=shards,
        config=config,
        side_files=(*side_files, SideFile(CONFIG, BytesFile(CONFIG, text.encode()))),
        notes=(*checkpoint.notes, f"{len(whole) - len(kept)} linear layers written in {grid or kind}"),
    )


def _is_whole(target: Target, checkpoint: Checkpoint) -> bool:
    piece = target.pieces[0]
    return len(target.pieces) == 1 and not piece.transposed and checkpoint[piece.tensor].shape == target.shape


def _encoder(kind: str, grid: Grid | None, tensor: Tensor) -> Encoder | None:
    shape = tensor.shape
    if grid is None:
        return None if any(size % FP8_BLOCK for size in shape) else Float8(shape)
    return Int8(shape) if kind == "int8" else FourBit(shape, grid, tensor.dtype)


def _config(
    kind: str,
    grid: Grid | None,
    dtype: str,
    skip: Iterable[str] | None,
    kept: list[str],
    checkpoint: Checkpoint,
    modules: set[str],
) -> dict[str, Any]:
    """``quantization_config`` as transformers 5 writes it."""
    if grid is None:
        return {
            "activation_scheme": "dynamic",
            "modules_to_not_convert": sorted({*kept, *_left(checkpoint, modules), *(skip or ())}),
            "quant_method": "fp8",
            "weight_block_size": [FP8_BLOCK, FP8_BLOCK],
        }
    four = kind != "int8"
    return {
        "_load_in_4bit": four,
        "_load_in_8bit": not four,
        "bnb_4bit_compute_dtype": dtype if four else "float32",
        "bnb_4bit_quant_storage": "uint8",
        "bnb_4bit_quant_type": kind if four else "fp4",
        "bnb_4bit_use_double_quant": grid.double,
        "llm_int8_enable_fp32_cpu_offload": False,
        "llm_int8_has_fp16_weight": False,
        "llm_int8_skip_modules": None if skip is None else list(skip),
        "llm_int8_threshold": 6.0,
        "load_in_4bit": four,
        "load_in_8bit": not four,
        "quant_method": "bitsandbytes",
    }


def _left(checkpoint: Checkpoint, modules: set[str]) -> set[str]:
    """Linear layers and stacks of experts that stay in 16 bits: a list given to transformers replaces its own."""
    from adapterkit.adapters.linear import linear_modules
    from adapterkit.adapters.names import Names

    names = Names(checkpoint.shapes, checkpoint.config)
    shapes: Mapping[str, tuple[int, ...]] = {
        name: target.shape for name in names.parameters() if (target := names.find(name)) is not None
    }
    left = {module for module in linear_modules(shapes, checkpoint.config) if module not in modules}
    experts = {name.rpartition(".")[0] for name, shape in shapes.items() if len(shape) == 3 and ".experts." in name}
    return left | experts
