"""torchao's plain tensors, as transformers saves them in safetensors: int8 and float8 with scales beside them.

The parameter ``weight`` of a module is stored as `_weight_qdata`, `_weight_scale` and, for integers, `_weight_zero_point`.
Layouts made for one kind of hardware (packed int4, sparse) are refused by name.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from functools import partial
from typing import TYPE_CHECKING, Any

from adapterkit.codecs.codec import Codec, Parts, StoredTensor, Weight, companion, listed
from adapterkit.codecs.fp8 import FLOAT8, describe, factors, float8_values, float8_written, unpack_floats
from adapterkit.codecs.scaled import ScaledWeight, Written, check_like, grid_of, grid_scales
from adapterkit.dtypes import F32, DType
from adapterkit.errors import CheckpointError

if TYPE_CHECKING:
    import torch

    from adapterkit.codecs.tiles import Numbers

_QDATA = re.compile(r"(?P<module>.*\.|)_(?P<leaf>\w+)_qdata")
_ENDS = ("_scale_and_zero", "_per_tensor_scale", "_act_pre_scale")


def find(parts: Parts, config: Mapping[str, Any]) -> Iterator[Weight]:
    for name in parts:
        found = _QDATA.fullmatch(name)
        if found is None:
            continue
        stem = f"{found['module']}_{found['leaf']}"
        codes = parts[name]
        plain = codes.dtype.code in ("I8", *FLOAT8) and len(codes.shape) >= 2
        if not plain or any(stem + end in parts for end in _ENDS):
            raise CheckpointError(
                f"'{name}' is in a layout of torchao that is made for one kind of hardware",
                "adapterkit reads torchao's int8 and float8; give the 16-bit base",
            )
        scale = companion(parts, f"{stem}_scale", name, "torchao")
        zero = parts.get(f"{stem}_zero_point")
        block, grid = grid_of(codes.shape, scale, [])
        if zero is not None:
            check_like(zero, scale.shape, "a zero point per scale")
        yield ScaledWeight(
            f"{found['module']}{found['leaf']}",
            codes.shape,
            F32,
            f"{codes.dtype} {describe(block, codes.shape)}",
            codes,
            unpack_floats,
            block,
            grid,
            lambda scale=scale, grid=grid: grid_scales(scale, grid),  # type: ignore[misc]
            (codes, scale) if zero is None else (codes, scale, zero),
            None if zero is None else lambda zero=zero, grid=grid: grid_scales(zero, grid),  # type: ignore[misc]
            written=_written(codes, scale, zero),
        ).weight()


def _written(codes: StoredTensor, scale: StoredTensor, zero: StoredTensor | None) -> Written | None:
    if codes.dtype.code != "I8":
        return float8_written(codes, scale, lambda: _float8(codes.dtype, scale.dtype)) if zero is None else None
    return Written(
        lambda: _integers(scale.dtype, None if zero is None else zero),
        lambda rows: rows.to(codes.dtype.torch),
        lambda rows: rows.float(),
        scale,
        None if zero is None else (zero, lambda found: found.to(zero.dtype.torch)),
    )


def _integers(scale: DType, zero: StoredTensor | None) -> Numbers:
    """int8 by torchao's rule (`choose_qparams_affine`): scale = absmax / 127.5 where all zero points are zero, else
    (max - min) / 255; codes are of W times the reciprocal of the scale."""
    import torch

    from adapterkit.codecs.tiles import Numbers

    symmetric = zero is None or not any(zero.raw())
    eps = torch.finfo(torch.float32).eps

    def choose(low: torch.Tensor, high: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor | None, None]:
        low, high = low.clamp(max=0.0), high.clamp(min=0.0)
        found = (torch.maximum(-low, high) / 127.5 if symmetric else (high - low) / 255.0).clamp(min=eps)
        point = torch.zeros_like(found) if symmetric else (-128 - (low / found).round()).clamp(-128, 127)
        return found.to(scale.torch), None if zero is None else point, None

    def code(
        values: torch.Tensor, scale: torch.Tensor, point: torch.Tensor | None, times: torch.Tensor | None
    ) -> torch.Tensor:
        found = (values * (1.0 / scale.float())).round()
        return (found if point is None else found + point).clamp(-128, 127)

    def value(codes: torch.Tensor, scale: torch.Tensor, point: torch.Tensor | None) -> torch.Tensor:
        return (codes.float() if point is None else codes.float() - point) * scale.float()

    return Numbers(choose, code, value)


def _float8(codes: DType, scale: DType) -> Numbers:
    """float8 by torchao's rule (`choose_scale_float8`, `quantize_affine_float8`): scale = absmax / 448."""
    import torch

    from adapterkit.codecs.tiles import Numbers

    most = torch.finfo(codes.torch).max

    def choose(low: torch.Tensor, high: torch.Tensor) -> tuple[torch.Tensor, None, None]:
        found = torch.maximum(-low, high) / most
        return torch.where(found > 0, found, 1.0).to(scale.torch), None, None

    def code(
        values: torch.Tensor, scale: torch.Tensor, zero: torch.Tensor | None, times: torch.Tensor | None
    ) -> torch.Tensor:
        return (values / factors(scale)).clamp_(-most, most).to(codes.torch).view(torch.uint8)

    return Numbers(choose, code, partial(float8_values, codes))


TORCHAO = Codec(
    "torchao",
    ("torchao",),
    ("_weight_qdata",),
    find,
    True,
    "torchao 0.18, prototype/safetensors/safetensors_support.py; quantize_/workflows/{int8,float8}",
    what="int8 and float8, plain layouts",
    test="test_torchao.py: torchao where installed, else by its published layout",
    leave=listed("modules_to_not_convert"),
    fused=True,
)
