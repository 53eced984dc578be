"""HQQ, as ``HQQLinear.state_dict`` writes it: `W_q` packed, `scale` and `zero` per group, and settings as small tensors.

The weight is seen as a matrix whose rows (``axis`` 1) or columns (``axis`` 0) are groups, in the order of its elements.
An element of `W_q` holds values of as many rows, a whole slab of rows apart, the first in the highest bits.
W = (q - zero) * scale, each step rounded to the compute dtype.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from math import prod
from typing import TYPE_CHECKING, Any

from adapterkit.codecs.codec import (
    AGAIN,
    FLOATS,
    Codec,
    Parts,
    StoredTensor,
    Weight,
    check_dtype,
    check_shape,
    companion,
    stems,
    whole,
)
from adapterkit.dtypes import BF16, F16, F32, DType
from adapterkit.errors import CheckpointError

if TYPE_CHECKING:
    import torch

    from adapterkit.codecs.codec import Decode

# packing -> bits of a value, values per stored element
PACKINGS = {"8bit_u8": (8, 1), "4bit_u8": (4, 2), "3bit_32": (3, 10), "2bit_u8": (2, 4), "1bit_u8": (1, 8)}
COMPUTE = {f"torch.{dtype.torch_name}": dtype for dtype in (BF16, F16, F32)}
SETTINGS = (
    "nbits",
    "group_size",
    "shape",
    "axis",
    "packing",
    "unpack_view_dtype",
    "view_as_float",
    "quant_scale",
    "quant_zero",
    "compute_dtype",
    "offload_meta",
    "encoded_state_dict",
    "stores_quant_config",
    "channel_wise",
    "optimize",
    "round_zero",
)


def find(parts: Parts, config: Mapping[str, Any]) -> Iterator[Weight]:
    for stem in stems(parts, ".W_q"):
        yield _weight(parts, stem)


def _number(part: StoredTensor) -> int:
    return int.from_bytes(part.raw(), "little", signed=part.dtype.code.startswith("I"))


def _weight(parts: Parts, stem: str) -> Weight:
    packed = check_shape(parts[f"{stem}.W_q"], (-1, -1), "HQQ")
    found = {leaf: companion(parts, f"{stem}.{leaf}", packed.name, "HQQ") for leaf in ("shape", "axis", "packing")}
    scale = companion(parts, f"{stem}.scale", packed.name, "HQQ")
    zero = companion(parts, f"{stem}.zero", packed.name, "HQQ")
    raw = found["shape"].raw()
    shape = tuple(int.from_bytes(raw[at : at + 8], "little", signed=True) for at in range(0, len(raw), 8))
    packing, axis = found["packing"].raw().decode("utf-8", "replace"), _number(found["axis"])
    compute = parts.get(f"{stem}.compute_dtype")
    dtype = scale.dtype if compute is None else COMPUTE.get(compute.raw().decode("utf-8", "replace"))
    nested = [leaf for leaf in ("quant_scale", "quant_zero", "view_as_float") if f"{stem}.{leaf}" in parts]
    if any(_number(parts[f"{stem}.{leaf}"]) for leaf in nested) or packing not in PACKINGS or dtype is None:
        raise CheckpointError(
            f"'{packed.name}' is HQQ with packing '{packing}' or quantized scales, which is not known here",
            f"adapterkit reads {', '.join(PACKINGS)} with plain scales",
        )
    bits, count = PACKINGS[packing]
    check_dtype(packed, ("I32",) if packing.endswith("_32") else ("U8",), "HQQ")
    for part in (scale, zero):
        check_dtype(part, FLOATS, "HQQ")
    columns = packed.shape[1]
    if len(shape) != 2 or min(shape) <= 0 or axis not in (0, 1) or prod(shape) % columns:
        raise CheckpointError(f"the shape of '{packed.name}' does not fit its weight", AGAIN)
    rows = prod(shape) // columns
    if packed.shape[0] != -(-rows // count):
        raise CheckpointError(f"'{packed.name}' has {packed.shape[0]} rows where {-(-rows // count)} are needed", AGAIN)
    for part in (scale, zero):
        check_shape(part, (rows, 1) if axis == 1 else (1, columns), "HQQ")
    used = tuple(parts[name] for leaf in SETTINGS if (name := f"{stem}.{leaf}") in parts)

    def load() -> Decode:
        return _decoder(packed, scale, zero, dtype, bits, count, axis)

    how = f"hqq {bits} bit"
    memory = 2 * scale.dtype.nbytes(scale.shape)
    return Weight(f"{stem}.weight", shape, dtype, (packed, scale, zero, *used), how, columns, load, memory)


def _decoder(
    packed: StoredTensor, scale: StoredTensor, zero: StoredTensor, dtype: DType, bits: int, count: int, axis: int
) -> Decode:
    import torch

    scales, zeros = whole(scale).to(dtype.torch), whole(zero).to(dtype.torch)
    height, columns = packed.shape

    def decode(start: int, stop: int) -> torch.Tensor:
        first, last = start // columns, stop // columns
        slabs = []
        while first < last:
            slab, low = divmod(first, height)
            high = min(height, low + last - first)
            codes = packed.read(low * columns, high * columns).view(-1, columns)
            shift = (count - 1 - slab) * bits
            values = ((codes >> shift) & ((1 << bits) - 1)).to(dtype.torch)
            part = slice(first, first + high - low) if axis == 1 else slice(None)
            slabs.append((values - zeros[part]) * scales[part])
            first += high - low
        return torch.cat(slabs).view(-1)

    return decode


HQQ = Codec(
    "HQQ",
    ("hqq",),
    (".W_q",),
    find,
    True,
    "hqq 0.2, core/quantize.py: HQQLinear.state_dict, Quantizer.dequantize; core/bitpack.py",
    what="1, 2, 3, 4 and 8 bits on either axis, plain scales",
    test="test_hqq.py: hqq where installed, else by its published layout",
)
