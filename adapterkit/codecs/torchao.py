"""torchao's plain tensors, as transformers saves them in safetensors: int8 and float8 with scales beside them.

The parameter ``weight`` of a module is stored as `_weight_qdata`, `_weight_scale` and, for integers, `_weight_zero_point`.
Layouts made for one kind of hardware (packed int4, sparse) are refused by name.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, Any

from adapterkit.codecs.codec import Codec, Parts, Weight, companion
from adapterkit.codecs.fp8 import FLOAT8, describe
from adapterkit.codecs.scaled import ScaledWeight, check_like, grid_of, grid_scales
from adapterkit.dtypes import F32
from adapterkit.errors import CheckpointError

if TYPE_CHECKING:
    import torch

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
            _unpack,
            block,
            grid,
            lambda scale=scale, grid=grid: grid_scales(scale, grid),  # type: ignore[misc]
            (codes, scale) if zero is None else (codes, scale, zero),
            None if zero is None else lambda zero=zero, grid=grid: grid_scales(zero, grid),  # type: ignore[misc]
        ).weight()


def _unpack(rows: torch.Tensor) -> torch.Tensor:
    from adapterkit.codecs.bits import floats

    return floats(rows)


TORCHAO = Codec(
    "torchao",
    ("torchao",),
    ("_weight_qdata",),
    find,
    True,
    "torchao 0.18, prototype/safetensors/safetensors_support.py; quantize_/workflows/{int8,float8}",
    what="int8 and float8, plain layouts",
    test="test_torchao.py: torchao where installed, else by its published layout",
)
