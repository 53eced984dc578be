"""NaN and infinities in tensors that nothing computes with: found in their bytes.

A tensor that is copied goes from file to file inside the kernel and is never read. `sampled` looks at 16 KiB of each, spread
from its first byte to its last, which costs a seek; whoever reads all bytes anyway counts in all of them.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING

from adapterkit.checkpoint.tensor import Cast

if TYPE_CHECKING:
    import torch

    from adapterkit.checkpoint.tensor import Tensor
    from adapterkit.dtypes import DType

WINDOW, WINDOWS = 4096, 4  # bytes of one look, and looks at one tensor
# dtype code: torch's integer of the same width, the bits that are looked at, and what they are in NaN and infinities.
# IEEE 754 for the first four; Micikevicius et al. 2022 (arXiv:2209.05433) for float8; OCP MX 1.0 for e8m0. The fnuz types
# have one NaN, where others have -0.
_BITS = {
    "F64": ("int64", 0x7FF << 52, 0x7FF << 52),
    "F32": ("int32", 0x7F800000, 0x7F800000),
    "F16": ("int16", 0x7C00, 0x7C00),
    "BF16": ("int16", 0x7F80, 0x7F80),
    "F8_E4M3": ("uint8", 0x7F, 0x7F),
    "F8_E5M2": ("uint8", 0x7C, 0x7C),
    "F8_E8M0": ("uint8", 0xFF, 0xFF),
    "F8_E4M3FNUZ": ("uint8", 0xFF, 0x80),
    "F8_E5M2FNUZ": ("uint8", 0xFF, 0x80),
}


def count(data: bytes, dtype: DType) -> int:
    """How many values in the bytes of a tensor are NaN or infinite; 0 for dtypes that have no such values."""
    import numpy as np

    if dtype.code not in _BITS or dtype.block != 1:
        return 0
    name, mask, odd = _BITS[dtype.code]
    return int(((np.frombuffer(data, dtype=name) & mask) == odd).sum())


def count_in(values: torch.Tensor, dtype: DType) -> int:
    """As `count`, in elements of ``dtype`` or their bytes."""
    import torch

    if dtype.code not in _BITS or dtype.block != 1:
        return 0
    name, mask, odd = _BITS[dtype.code]
    return int(((values.view(getattr(torch, name)) & mask) == odd).sum())


def sampled(tensors: Iterable[Tensor]) -> dict[str, int]:
    """By name, how many of the values that were looked at are NaN or infinite, of tensors that are copied or only rounded."""
    found = {}
    for tensor in tensors:
        stored = tensor.inner if type(tensor) is Cast else tensor
        extent = stored.extent
        if extent is None or stored.dtype.code not in _BITS or extent.source.path is None:
            continue
        looks = [extent.source.read(extent.offset + at, size) for at, size in _windows(extent.nbytes)]
        if odd := sum(count(data, stored.dtype) for data in looks):
            found[tensor.name] = odd
    return found


def said(found: dict[str, int]) -> tuple[str, ...]:
    """A note on what `sampled` found, if it found anything."""
    if not found:
        return ()
    first = next(iter(found))
    more = f" and {len(found) - 1} more tensors" if len(found) > 1 else ""
    text = f"{sum(found.values()):,} input values are not finite (NaN or infinite), in {first}{more}, which is copied"
    return (f"{text}; 16 KiB of each such tensor were looked at, verify looks at all",)


def _windows(nbytes: int) -> list[tuple[int, int]]:
    """(offset, length) of what is looked at: whole elements of any dtype."""
    if nbytes <= WINDOW * WINDOWS:
        return [(0, nbytes)] if nbytes else []
    return [(index * (nbytes - WINDOW) // (WINDOWS - 1) // 8 * 8, WINDOW) for index in range(WINDOWS)]
