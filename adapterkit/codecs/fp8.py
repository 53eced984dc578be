"""FP8 and MXFP8 weights with scales beside them, as DeepSeek, Qwen, fbgemm and ModelOpt checkpoints have them.

`weight` is float8, `weight_scale_inv` (or `weight_scale`) multiplies it: one value, one per row, one per block of
128x128 (`weight_block_size`), or a power of two per 32 columns (MXFP8). Stacked experts have a leading dimension and
`..._scale_inv`. ModelOpt's NVFP4 packs two e2m1 values per byte, with an FP8 scale per 16 columns and one scale over
all.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, Any

from adapterkit.codecs.codec import Codec, Parts, StoredTensor, Weight, block_size, stems
from adapterkit.codecs.scaled import ScaledWeight, grid_of, grid_scales
from adapterkit.dtypes import BF16, F32

if TYPE_CHECKING:
    import torch

FLOAT8 = ("F8_E4M3", "F8_E5M2", "F8_E4M3FNUZ", "F8_E5M2FNUZ")
# End of a scale's name, and what stands there in the weight's name.
SCALES = (("_scale_inv", ""), (".qscale_weight", ".weight"), ("_scale", ""), (".scale", ".weight"))
# What quantized inference needs beside the weight and a 16-bit checkpoint does not have.
BESIDE = (
    "activation_scale",
    "input_scale",
    "input_scale_ub",
    "input_zero_point",
    "input_global_scale",
    "output_scale",
    "qscale_act",
    "weight_scale_2",
    "weight_global_scale",
    "weight_zero_point",
    "weight_shape",
    "weight_g_idx",
)


def find(parts: Parts, config: Mapping[str, Any]) -> Iterator[Weight]:
    blocks = block_size(config, "weight_block_size")
    done: set[str] = set()
    for end, instead in SCALES:
        for stem in stems(parts, end):
            name = stem + instead
            codes = parts.get(name)
            if codes is None or name in done or len(codes.shape) < 2:
                continue
            done.add(name)
            if codes.dtype.code in FLOAT8:
                yield _float8(codes, parts[stem + end], blocks, beside(parts, name))
            elif codes.dtype.code in ("U8", "I8", "F4"):
                yield _pairs(codes, parts[stem + end], blocks, beside(parts, name))


def beside(parts: Parts, name: str) -> tuple[StoredTensor, ...]:
    """The tensors of the same module that only quantized inference uses."""
    stem = name.rpartition(".")[0]
    return tuple(parts[f"{stem}.{leaf}"] for leaf in BESIDE if f"{stem}.{leaf}" in parts)


def _float8(
    codes: StoredTensor, scale: StoredTensor, blocks: list[tuple[int, int]], more: tuple[StoredTensor, ...]
) -> Weight:
    from_floats = scale.dtype.is_float and scale.dtype.bits >= 16
    block, grid = grid_of(codes.shape, scale, blocks)

    def unpack(rows: torch.Tensor) -> torch.Tensor:
        from adapterkit.codecs.bits import floats

        return floats(rows)

    return ScaledWeight(
        codes.name,
        codes.shape,
        F32 if from_floats else BF16,
        f"{codes.dtype} {describe(block, codes.shape)}",
        codes,
        unpack,
        block,
        grid,
        lambda: grid_scales(scale, grid),
        (codes, scale, *more),
    ).weight()


def _pairs(
    codes: StoredTensor, scale: StoredTensor, blocks: list[tuple[int, int]], more: tuple[StoredTensor, ...]
) -> Weight:
    """FP4: two values per byte; with `weight_scale_2` it is NVFP4."""
    shape = (*codes.shape[:-1], codes.shape[-1] * 2)
    block, grid = grid_of(shape, scale, [])
    over = next((part for part in more if part.name.endswith("weight_scale_2")), None)

    def unpack(rows: torch.Tensor) -> torch.Tensor:
        from adapterkit.codecs.bits import e2m1

        return e2m1(rows)

    return ScaledWeight(
        codes.name,
        shape,
        BF16 if over is None else F32,
        f"{'fp4' if over is None else 'nvfp4'} {describe(block, shape)}",
        codes,
        unpack,
        block,
        grid,
        lambda: grid_scales(scale, grid, over),
        (codes, scale, *more),
    ).weight()


def describe(block: tuple[int, int], shape: tuple[int, ...]) -> str:
    """Which elements share a scale, in a word."""
    if block == tuple(shape[-2:]):
        return "per tensor"
    if block[0] == 1:
        return "per row" if block[1] == shape[-1] else f"per {block[1]}"
    return f"{block[0]}x{block[1]}"


FP8 = Codec(
    "fp8",
    ("fp8", "fbgemm_fp8", "modelopt", "modelopt_fp4", "finegrained_fp8"),
    ("weight_scale_inv", "_proj_scale_inv", ".weight_scale_2", ".activation_scale", ".input_scale_ub"),
    find,
    True,
    "transformers 5, integrations/finegrained_fp8.py: Fp8Dequantize; NVIDIA ModelOpt, torch/export/quant_utils.py",
    what="FP8 per tensor, row or block (also short last blocks, stacked experts), MXFP8, FP4 pairs; NVFP4 of ModelOpt",
    test="test_scaled.py: transformers; NVFP4 by its published layout",
    writes=("fp8",),
)
