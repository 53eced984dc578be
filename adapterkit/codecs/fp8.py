"""FP8 and MXFP8 weights with scales beside them, as DeepSeek, Qwen, fbgemm and ModelOpt checkpoints have them.

`weight` is float8, `weight_scale_inv` (or `weight_scale`) multiplies it: one value, one per row, one per block of
128x128 (`weight_block_size`), or a power of two per 32 columns (MXFP8). Stacked experts have a leading dimension and
`..._scale_inv`. ModelOpt's NVFP4 packs two e2m1 values per byte, with an FP8 scale per 16 columns and one scale over
all.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from math import prod
from typing import TYPE_CHECKING, Any

from adapterkit.codecs.codec import (
    AGAIN,
    Codec,
    Kind,
    Layers,
    Parts,
    StoredTensor,
    Weight,
    block_size,
    listed,
    setting,
    stems,
    whole,
)
from adapterkit.codecs.encode import Encoder, TensorSpec
from adapterkit.codecs.scaled import ScaledWeight, Written, check_over, grid_of, grid_scales
from adapterkit.dtypes import BF16, DTYPES, F32, DType
from adapterkit.errors import CheckpointError
from adapterkit.foreign import json_value

if TYPE_CHECKING:
    import torch

    from adapterkit.codecs.tiles import Numbers

    # The largest magnitude of each tile and the largest number of the format, to exponents of their scales.
    MxRule = Callable[[torch.Tensor, float], torch.Tensor]

FLOAT8 = ("F8_E4M3", "F8_E5M2", "F8_E4M3FNUZ", "F8_E5M2FNUZ")
# End of a scale's name, and what stands there in the weight's name.
SCALES = (
    ("_scale_inv", ""),
    (".qscale_weight", ".weight"),
    (".scale_weight", ".weight"),
    ("_scale", ""),
    (".scale", ".weight"),
)
COMFY = ("float8_e4m3fn", "float8_e5m2")
MOST_SETTINGS = 4096  # bytes of JSON
# What quantized inference needs beside the weight and a 16-bit checkpoint does not have.
BESIDE = (
    "activation_scale",
    "input_scale",
    "input_scale_ub",
    "input_zero_point",
    "input_global_scale",
    "output_scale",
    "qscale_act",
    "scale_input",
    "comfy_quant",
    "weight_scale_2",
    "weight_global_scale",
    "weight_zero_point",
    "weight_shape",
    "weight_g_idx",
)


def find(parts: Parts, config: Mapping[str, Any]) -> Iterator[Weight]:
    blocks = block_size(config, "weight_block_size")
    powers = setting(config, "scale_fmt", str) == "ue8m0"
    unsaid = not config
    done: set[str] = set()
    more_of = beside if any(name.endswith(BESIDE) for name in parts) else _nothing
    for end, instead in SCALES:
        for stem in stems(parts, end):
            name = stem + instead
            codes = parts.get(name)
            if codes is None or len(codes.shape) < 2:
                continue
            if name in done and codes.dtype.code in FLOAT8:
                raise CheckpointError(f"'{name}' has two scales, of which '{stem + end}' is the second", AGAIN)
            done.add(name)
            if codes.dtype.code in FLOAT8:
                more, scale = more_of(parts, name), parts[stem + end]
                comfy = end == ".scale_weight" or _says_comfy(more)
                if unsaid and scale.dtype.code in EXPONENTS:
                    raise _swizzled(codes)
                yield _float8(codes, scale, blocks, more, powers, comfy=comfy)
            elif codes.dtype.code in ("U8", "I8", "F4"):
                more = more_of(parts, name)
                if _says_comfy(more) or (unsaid and end == "_scale"):
                    raise _swizzled(codes)
                yield _pairs(codes, parts[stem + end], end, more)


EXPONENTS = ("U8", "F8_E8M0")


def _swizzled(codes: StoredTensor) -> CheckpointError:
    """Blocks of scales without a config: ComfyUI's files of NVFP4 and MXFP8 have them in the order of a GPU's matrix units
    (comfy_kitchen, tensor/nvfp4.py and mxfp8.py), which nothing in the file tells from the plain order."""
    return CheckpointError(
        f"'{codes.name}' has scales per block and no quantization_config; files of ComfyUI hold those in the order of a "
        "GPU's matrix units, which adapterkit does not read",
        "give the config.json that was saved with it, or the 16-bit base",
    )


def _nothing(parts: Parts, name: str) -> tuple[StoredTensor, ...]:
    """As `beside` for checkpoints in which nothing has such a name: most, of which a large one has 90,000 tensors."""
    return ()


def beside(parts: Parts, name: str) -> tuple[StoredTensor, ...]:
    """The tensors of the same module that only quantized inference uses."""
    stem = name.rpartition(".")[0]
    return tuple(parts[f"{stem}.{leaf}"] for leaf in BESIDE if f"{stem}.{leaf}" in parts)


def _float8(
    codes: StoredTensor,
    scale: StoredTensor,
    blocks: list[tuple[int, int]],
    more: tuple[StoredTensor, ...],
    powers: bool = False,
    *,
    comfy: bool = False,
) -> Weight:
    from_floats = scale.dtype.is_float and scale.dtype.bits >= 16
    block, grid = grid_of(codes.shape, scale, blocks)

    def numbers() -> Numbers:
        rule = by_reciprocal if comfy else reciprocal
        return rule(codes.dtype, scale.dtype, powers=powers or not from_floats)

    written = float8_written(codes, scale, numbers)
    return ScaledWeight(
        codes.name,
        codes.shape,
        F32 if from_floats else BF16,
        f"{codes.dtype} {describe(block, codes.shape)}",
        codes,
        unpack_floats,
        block,
        grid,
        lambda: grid_scales(scale, grid),
        (codes, scale, *more),
        written=written,
    ).weight()


def _says_comfy(more: tuple[StoredTensor, ...]) -> bool:
    """Whether ComfyUI's settings stand beside a weight.

    Raises:
        CheckpointError: they name a layout that is not known.
    """
    said = next((part for part in more if part.name.endswith(".comfy_quant")), None)
    if said is None:
        return False
    try:
        form = json_value(said.raw().decode("utf-8"))["format"] if prod(said.shape) < MOST_SETTINGS else None
    except (ValueError, KeyError, TypeError):
        form = None
    if form not in COMFY:
        raise CheckpointError(
            f"'{said.name}' names the format {json.dumps(form)}, which is not one that adapterkit reads",
            f"it reads {', '.join(COMFY)}",
        )
    return True


def unpack_floats(rows: torch.Tensor) -> torch.Tensor:
    """8-bit floats or integers as float32."""
    from adapterkit.codecs.bits import floats

    return floats(rows)


def as_bytes(rows: torch.Tensor) -> torch.Tensor:
    import torch

    return rows.view(torch.uint8)


def float8_written(codes: StoredTensor, scale: StoredTensor, numbers: Callable[[], Numbers]) -> Written:
    """How float8 codes are written: one byte each."""
    return Written(numbers, lambda rows: rows.contiguous().view(codes.dtype.torch), as_bytes, scale)


def factors(stored: torch.Tensor) -> torch.Tensor:
    """Stored scales as the float32 that they stand for; e8m0 and bytes are powers of two."""
    import torch

    from adapterkit.codecs.bits import floats, powers

    return powers(stored) if stored.dtype in (torch.uint8, torch.float8_e8m0fnu) else floats(stored)


def reciprocal(codes: DType, scale: DType, *, powers: bool) -> Numbers:
    """float8 as transformers' FineGrainedFP8 writes it: W * (448 / absmax), rounded to nearest even; scale = absmax / 448.

    A tile of zeros has the scale 1. Where scales are stored in 16 bits, or are powers of two (rounded up, ``ue8m0``),
    values are divided by the scale as it is stored.
    """
    import torch

    from adapterkit.codecs.tiles import Numbers

    most = torch.finfo(codes.torch).max

    def choose(low: torch.Tensor, high: torch.Tensor) -> tuple[torch.Tensor, None, torch.Tensor]:
        largest = torch.maximum(-low, high)
        times = torch.where(largest > 0, most / largest, 1.0)
        found = 1.0 / times
        if powers:
            exponents = found.clamp(min=torch.finfo(torch.float32).tiny).log2().ceil()
            found = exponents.exp2()
            if scale.bits == 8:
                return (exponents + 127).to(torch.uint8).view(scale.torch), None, 1.0 / found
        if scale is F32 and not powers:
            return found, None, times
        found = found.to(scale.torch)
        return found, None, 1.0 / found.float()

    def code(
        values: torch.Tensor, scale: torch.Tensor, zero: torch.Tensor | None, times: torch.Tensor | None
    ) -> torch.Tensor:
        assert times is not None
        return (values * times).clamp_(-most, most).to(codes.torch).view(torch.uint8)

    return Numbers(choose, code, partial(float8_values, codes))


def by_reciprocal(codes: DType, scale: DType, *, powers: bool) -> Numbers:
    """float8 as ComfyUI writes it (quant_ops.py): scale = absmax / 448, codes of W times its reciprocal."""
    import torch

    from adapterkit.codecs.tiles import Numbers

    usual, most = reciprocal(codes, scale, powers=False), torch.finfo(codes.torch).max

    def choose(low: torch.Tensor, high: torch.Tensor) -> tuple[torch.Tensor, None, torch.Tensor]:
        largest = torch.maximum(-low, high)
        found = torch.where(largest > 0, largest / most, 1.0).to(scale.torch)
        return found, None, 1.0 / found.float()

    return Numbers(choose, usual.code, usual.value)


def float8_values(dtype: DType, codes: torch.Tensor, scale: torch.Tensor, zero: torch.Tensor | None) -> torch.Tensor:
    """float8 codes times their scales."""
    from adapterkit.codecs.bits import floats

    return floats(codes.contiguous().view(dtype.torch)) * factors(scale)


def _pairs(codes: StoredTensor, scale: StoredTensor, end: str, more: tuple[StoredTensor, ...]) -> Weight:
    """FP4: two values per byte; with `weight_scale_2` it is NVFP4.

    Raises:
        CheckpointError: the scales are those of no such format: bytes may be integers of 8 or 4 bits too.
    """
    shape = (*codes.shape[:-1], codes.shape[-1] * 2)
    block, grid = grid_of(shape, scale, [])
    over = check_over(next((part for part in more if part.name.endswith("weight_scale_2")), None), shape)
    if scale.dtype.code == "F8_E4M3":
        known = over is not None and block == (1, 16)
    elif scale.dtype.code in EXPONENTS:
        known = over is None
    else:  # DeepSeek's and transformers' names; ModelOpt and ComfyUI have integers with `weight_scale`
        known = over is None and end in ("_scale_inv", ".scale") and block[0] == 1
    if not known:
        beside_it = "" if over is None else f" and '{over.name}'"
        raise CheckpointError(
            f"'{codes.name}' ({codes.dtype}) with '{scale.name}' ({scale.dtype}, {describe(block, shape)}){beside_it} is no "
            "layout of 4-bit floats that adapterkit reads",
            "adapterkit reads NVFP4 (FP8 scales of 16 columns and weight_scale_2) and MXFP4; give the 16-bit base",
        )

    def numbers(line: torch.Tensor | None = None) -> Numbers:
        return e2m1_numbers(scale.dtype, scale_over(over, shape, line), multiply=True)

    return ScaledWeight(
        codes.name,
        shape,
        BF16 if over is None else F32,
        f"{'fp4' if over is None else 'nvfp4'} {describe(block, shape)}",
        codes,
        unpack_pairs,
        block,
        grid,
        lambda: grid_scales(scale, grid, over),
        (codes, scale, *more),
        written=pairs_written(codes, scale, numbers, over, multiply=True),
    ).weight()


def unpack_pairs(rows: torch.Tensor) -> torch.Tensor:
    """Two e2m1 values per byte, as float32."""
    from adapterkit.codecs.bits import e2m1

    return e2m1(rows)


def pairs_written(
    codes: StoredTensor,
    scale: StoredTensor,
    numbers: Callable[[torch.Tensor | None], Numbers],
    over: StoredTensor | None,
    *,
    multiply: bool,
) -> Written:
    """How 4-bit floats are written: two to a byte, the first in the low half; ``numbers`` of some rows, or of all."""

    def torchao() -> Numbers:
        assert over is not None
        return torchao_nvfp4(over, multiply=multiply)

    def pack(rows: torch.Tensor) -> torch.Tensor:
        from adapterkit.codecs.bits import pair

        return pair(rows).view(codes.dtype.torch)

    def unpack(rows: torch.Tensor) -> torch.Tensor:
        from adapterkit.codecs.bits import unpair

        return unpair(rows)

    several = over is not None and prod(over.shape) > 1
    others = {"torchao": torchao} if over is not None and not several else {}
    by_line = numbers if several else None
    return Written(partial(numbers, None), pack, unpack, scale, others=others, by_line=by_line)


def scale_over(
    over: StoredTensor | None, shape: tuple[int, ...], line: torch.Tensor | None = None
) -> torch.Tensor | float | None:
    """The scale over those of a weight: one number, or that of each of some rows, of whose matrix it is.

    Args:
        over: as it is stored, one number or one per matrix.
        shape: of the weight.
        line: rows of the matrices, one below the other; all by default.
    """
    if over is None:
        return None
    found = whole(over).float().view(-1)
    if found.numel() == 1:
        return float(found[0])
    each = found.repeat_interleave(shape[-2])
    return each if line is None else each[line]


def torchao_nvfp4(over: StoredTensor, *, multiply: bool) -> Numbers:
    """NVFP4 by torchao's rule (`nvfp4_quantize`, 0.16 to 0.18), which merge-aware training of axolotl puts the sum through.

    scale = absmax / 6 over the scale of the whole tensor, at least 2^-6; values are multiplied by the reciprocals.
    """
    import torch

    from adapterkit.codecs.bits import E2M1, to_e2m1
    from adapterkit.codecs.tiles import Numbers

    found = whole(over).float().view(-1)[0]
    tensor_scale = found if multiply else 1.0 / found
    least = torch.finfo(torch.float8_e4m3fn).tiny

    def choose(low: torch.Tensor, high: torch.Tensor) -> tuple[torch.Tensor, None, None]:
        scale = torch.maximum(-low, high) / 6.0 / tensor_scale
        return scale.clamp(min=least, max=448.0).to(torch.float8_e4m3fn), None, None

    def code(
        values: torch.Tensor, scale: torch.Tensor, zero: torch.Tensor | None, times: torch.Tensor | None
    ) -> torch.Tensor:
        return to_e2m1(values * ((1.0 / tensor_scale) / scale.float()))

    def value(codes: torch.Tensor, scale: torch.Tensor, zero: torch.Tensor | None) -> torch.Tensor:
        return torch.tensor(E2M1).to(codes.device)[codes.int()] * (factors(scale) * tensor_scale)

    return Numbers(choose, code, value)


def e2m1_numbers(
    scale: DType, over: torch.Tensor | float | None, *, multiply: bool, power: MxRule | None = None
) -> Numbers:
    """FP4 (e2m1) with FP8 scales under one over all (NVFP4), or with scales that are powers of two.

    NVFP4: scale = absmax / 6 over the scale of the whole tensor, rounded to FP8; a scale that becomes zero is the smallest
    step that compressed-tensors (0.125) or ModelOpt (1) puts there. The scale of the whole tensor stays as it is stored:
    servers want one for projections that they fuse.

    Args:
        scale: dtype of the scales.
        over: the scale of the whole tensor, or for each tile of a column of them that of its matrix.
        multiply: it is multiplied with the others (ModelOpt), not divided by (compressed-tensors).
        power: absmax to the exponent of a scale, where scales are powers of two; rounded up by default.
    """
    import torch

    from adapterkit.codecs.bits import E2M1, to_e2m1
    from adapterkit.codecs.tiles import Numbers

    def beside(tiles: torch.Tensor) -> torch.Tensor | float:
        """The scale of the whole tensor, broadcast against tiles."""
        assert over is not None
        return over if isinstance(over, float) else over.view(-1, *[1] * (tiles.dim() - 1))

    def meant(stored: torch.Tensor) -> torch.Tensor:
        found = factors(stored)
        if over is None:
            return found
        factor = beside(found)
        return found * factor if multiply else found / torch.as_tensor(factor)

    def choose(low: torch.Tensor, high: torch.Tensor) -> tuple[torch.Tensor, None, None]:
        largest = torch.maximum(-low, high)
        if scale.bits == 8 and over is None and scale.code != "F8_E4M3":
            return exponent_bytes((power or round_up)(largest, 6.0), scale), None, None
        found = largest / 6.0
        if over is not None:
            factor = beside(found)
            found = found / factor if multiply else found * factor
        if scale.bits > 8:
            return torch.where(found > 0, found, 1.0).to(scale.torch), None, None
        rounded = found.clamp(max=448.0).to(torch.float8_e4m3fn).float()
        rounded = torch.where(rounded > 0, rounded, 1.0 if multiply else 0.125)
        return rounded.to(torch.float8_e4m3fn), None, None

    def code(
        values: torch.Tensor, scale: torch.Tensor, zero: torch.Tensor | None, times: torch.Tensor | None
    ) -> torch.Tensor:
        return to_e2m1(values / meant(scale))

    def value(codes: torch.Tensor, scale: torch.Tensor, zero: torch.Tensor | None) -> torch.Tensor:
        return torch.tensor(E2M1).to(codes.device)[codes.int()] * meant(scale)

    return Numbers(choose, code, value)


def round_up(largest: torch.Tensor, most: float) -> torch.Tensor:
    """The exponent of the smallest power of two that keeps ``largest / 2^e`` within ``most``."""
    import torch

    return (largest / most).clamp(min=torch.finfo(torch.float32).tiny).log2().ceil()


def exponent_bytes(exponents: torch.Tensor, dtype: DType) -> torch.Tensor:
    """Exponents as e8m0 bytes."""
    import torch

    return (exponents + 127).clamp(0, 254).to(torch.uint8).view(dtype.torch)


def describe(block: tuple[int, int], shape: tuple[int, ...]) -> str:
    """Which elements share a scale, in a word."""
    if block == tuple(shape[-2:]):
        return "per tensor"
    if block[0] == 1:
        return "per row" if block[1] == shape[-1] else f"per {block[1]}"
    return f"{block[0]}x{block[1]}"


BLOCK = 128
POWERS = (1.0, 0.5, 2.0)  # of new weights with scales that are powers of two: those that are tried


def blocks(name: str, shape: tuple[int, ...], dtype: DType, double: bool) -> Encoder | None:
    """A new weight in blocks of 128x128; None where they do not divide it, which transformers does not quantize."""
    return None if any(size % BLOCK for size in shape) else short_blocks(name, shape, dtype, double)


def short_blocks(name: str, shape: tuple[int, ...], dtype: DType, double: bool) -> Encoder:
    """A new weight in blocks of 128x128, of which the last ones may be short."""
    from adapterkit.codecs.tiles import Shape, Tiles

    rows, columns = shape
    scale = f"{name.rpartition('.')[0]}.weight_scale_inv"
    e4m3 = DTYPES["F8_E4M3"]
    across = -(-columns // BLOCK)
    return Tiles(
        (TensorSpec(name, e4m3, shape), TensorSpec(scale, F32, (-(-rows // BLOCK), across))),
        Shape(rows, columns, rows, (BLOCK, BLOCK), across),
        lambda: reciprocal(e4m3, F32, powers=False),
        lambda found: found.contiguous().view(e4m3.torch),
        lambda found: as_bytes(found.view(-1, columns)),
        lambda held: {scale: held[0].reshape(-1)},
        row_codes=columns,
    )


def _config(layers: Layers) -> dict[str, Any]:
    """``quantization_config`` as transformers 5 writes it."""
    return {
        "activation_scheme": "dynamic",
        "modules_to_not_convert": sorted({*layers.left, *(layers.skip or ())}),
        "quant_method": "fp8",
        "weight_block_size": [BLOCK, BLOCK],
    }


def leave(config: dict[str, Any], names: Sequence[str], plain: Sequence[str]) -> None:
    """transformers' list, and ModelOpt's own one where it is the method. Not tried in a server."""
    if str(config.get("quant_method", "")).startswith("modelopt"):
        inner = config.get("quantization")
        place = inner if isinstance(inner, dict) else config
        listed("exclude_modules" if "exclude_modules" in place else "ignore")(place, names, plain)
        return
    listed("modules_to_not_convert")(config, names, plain)
    if config.get("ignored_layers") is not None:
        listed("ignored_layers")(config, names, plain)


FP8 = Codec(
    "fp8",
    ("fp8", "fbgemm_fp8", "modelopt", "modelopt_fp4", "finegrained_fp8"),
    (
        "weight_scale_inv",
        "_proj_scale_inv",
        ".weight_scale_2",
        ".activation_scale",
        ".input_scale_ub",
        ".scale_weight",
        ".comfy_quant",
    ),
    find,
    True,
    "transformers 5, integrations/finegrained_fp8.py: Fp8Dequantize; NVIDIA ModelOpt's published layout",
    what="FP8 per tensor, row or block (also short last blocks, stacked experts), MXFP8, FP4 pairs; NVFP4 of ModelOpt; "
    "ComfyUI's scaled FP8",
    test="test_scaled.py: transformers; NVFP4 by its published layout",
    leave=leave,
    kinds=(
        Kind(
            "fp8",
            blocks,
            _config,
            8.0,
            ("fp8 128x128",),
            some=short_blocks,
        ),
    ),
)
