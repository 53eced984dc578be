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
    check_scales,
    check_shape,
    companion,
    listed,
    stems,
    whole,
    zero_scale,
)
from adapterkit.codecs.encode import Encoder, TensorSpec
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

    def flag(leaf: str, otherwise: bool) -> bool:
        part = parts.get(f"{stem}.{leaf}")
        return otherwise if part is None else bool(_number(part))

    def encoder() -> Encoder:
        # What HQQ's BaseQuantizeConfig takes where a file does not say.
        search, rounded = flag("optimize", True), flag("round_zero", bits == 4)
        return Hqq(packed, scale, zero, bits, count, axis, search=search, round_zero=rounded)

    how = f"hqq {bits} bit"
    memory = 2 * scale.dtype.nbytes(scale.shape)
    used = (packed, scale, zero, *used)
    return Weight(f"{stem}.weight", shape, dtype, used, how, columns, load, memory, encoder)


def _decoder(
    packed: StoredTensor, scale: StoredTensor, zero: StoredTensor, dtype: DType, bits: int, count: int, axis: int
) -> Decode:
    import torch

    scales, zeros = (check_scales(whole(part), part).to(dtype.torch) for part in (scale, zero))
    empty = bool((scales == 0).any())
    columns = packed.shape[1]

    def decode(start: int, stop: int) -> torch.Tensor:
        first, last = start // columns, stop // columns
        part = slice(first, last) if axis == 1 else slice(None)
        codes = torch.cat(list(_numbers(packed, bits, count, first, last))).to(dtype.torch)
        codes -= zeros[part]
        if empty and bool(((codes != 0) & (scales[part] == 0)).any()):
            raise zero_scale(packed.name)
        return (codes * scales[part]).view(-1)

    return decode


def _numbers(packed: StoredTensor, bits: int, count: int, first: int, last: int) -> Iterator[torch.Tensor]:
    """The stored numbers of some rows, slab by slab."""
    height, columns = packed.shape
    while first < last:
        slab, low = divmod(first, height)
        high = min(height, low + last - first)
        codes = packed.read(low * columns, high * columns).view(-1, columns)
        yield (codes >> ((count - 1 - slab) * bits)) & ((1 << bits) - 1)
        first += high - low


class Hqq(Encoder):
    """A stored HQQ weight, written again: half-quadratic search of the zero points, as ``hqq`` runs it on a CPU.

    The search ends when the mean error of the whole weight grows, so the whole weight is held.

    Source: hqq 0.2, core/quantize.py: Quantizer.quantize; core/optimize.py: optimize_weights_proximal_legacy (Apache-2.0).
    """

    streams = False
    P, BETA, KAPPA, STEPS = 0.7, 10.0, 1.01, 20

    def __init__(
        self,
        packed: StoredTensor,
        scale: StoredTensor,
        zero: StoredTensor,
        bits: int,
        count: int,
        axis: int,
        *,
        search: bool,
        round_zero: bool,
    ) -> None:
        self._packed, self._scale, self._zero = packed, scale, zero
        self._bits, self._count, self._axis, self._search, self._round = bits, count, axis, search, round_zero
        self._columns = packed.shape[1]
        self.made = tuple(TensorSpec(part.name, part.dtype, part.shape) for part in (packed, scale, zero))
        self.unit = prod(packed.shape) * count
        self.memory = 28 * self.unit

    def encode(self, start: int, new: torch.Tensor, old: torch.Tensor | None) -> tuple[torch.Tensor, ...]:
        import torch

        axis, most = self._axis, (1 << self._bits) - 1
        w = new.float().view(-1, self._columns)
        low, high = w.amin(axis, keepdim=True), w.amax(axis, keepdim=True)
        times = torch.where((high - low).abs() <= 1e-4, 1.0, most / (high - low)).clamp(max=2e4)
        zero = -low * times
        if self._round:
            zero = zero.round()
        if self._search:
            zero = self._searched(w, times, zero, most)
        codes = (w * times + zero).round().clamp(0, most).to(torch.int32)
        scale, zero = (1.0 / times).to(self._scale.dtype.torch), zero.to(self._zero.dtype.torch)
        if old is not None:
            changed = (new != old).view(w.shape).any(axis, keepdim=True)
            if not bool(changed.all()):
                stored = torch.cat(list(_numbers(self._packed, self._bits, self._count, 0, w.shape[0])))
                codes = torch.where(changed, codes, stored.int())
                scale = torch.where(changed, scale, whole(self._scale))
                zero = torch.where(changed, zero, whole(self._zero))
        return codes, scale, zero

    def _searched(self, w: torch.Tensor, times: torch.Tensor, zero: torch.Tensor, most: int) -> torch.Tensor:
        import torch

        beta, least = self.BETA, torch.tensor(torch.inf)
        for _ in range(self.STEPS):
            codes = (w * times + zero).round().clamp_(0, most)
            off = w - (codes - zero) / times
            size = off.abs()
            error = size.mean()
            shrunk = (size - (1.0 / beta) * size.pow(self.P - 1)).clamp_min_(0.0) * torch.sign(off)
            zero = torch.mean(codes - (w - shrunk) * times, self._axis, keepdim=True)
            beta *= self.KAPPA
            if not error < least:
                break
            least = error
        return zero

    def finish(self, held: tuple[torch.Tensor, ...]) -> dict[str, torch.Tensor]:
        import torch

        codes, scale, zero = held
        height = self._packed.shape[0]
        short = height * self._count - codes.shape[0]
        slabs = torch.nn.functional.pad(codes.long(), (0, 0, 0, short)).view(self._count, height, self._columns)
        packed = torch.zeros_like(slabs[0])
        for index in range(self._count):
            packed |= slabs[index] << ((self._count - 1 - index) * self._bits)
        return {
            self._packed.name: packed.to(self._packed.dtype.torch).view(-1),
            self._scale.name: scale.view(-1),
            self._zero.name: zero.view(-1),
        }

    def values(self, start: int, encoded: tuple[torch.Tensor, ...]) -> torch.Tensor:
        codes, scale, zero = encoded
        dtype = scale.dtype
        return ((codes.to(dtype) - zero.to(dtype)) * scale).float().view(-1)


HQQ = Codec(
    "HQQ",
    ("hqq",),
    (".W_q",),
    find,
    True,
    "hqq 0.2, core/quantize.py: HQQLinear.state_dict, Quantizer.dequantize; core/bitpack.py",
    what="1, 2, 3, 4 and 8 bits on either axis, plain scales",
    test="test_hqq.py: hqq where installed, else by its published layout",
    leave=listed("skip_modules"),
)
