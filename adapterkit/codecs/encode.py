"""Encoders: a weight as the tensors that transformers and bitsandbytes save of it.

An encoder works on ranges of the flattened weight: each gives codes and scales, whatever the other ranges hold. What
needs all scales (double quantization, the JSON with its offset) comes last.
"""

from __future__ import annotations

import json
from abc import ABC, abstractmethod
from math import prod
from typing import TYPE_CHECKING

from adapterkit.codecs.grid import Grid
from adapterkit.dtypes import DTYPES, F32, DType
from adapterkit.errors import UsageError

if TYPE_CHECKING:
    import torch

U8, I8, E4M3 = DTYPES["U8"], DTYPES["I8"], DTYPES["F8_E4M3"]
NESTED = 256
FP8_BLOCK = 128
STATE_BYTES = (
    256  # of the JSON of a 4-bit weight, filled up with spaces: how long its offset prints is not known before
)


class Encoder(ABC):
    """How one weight is written.

    Attributes:
        codes: end of the name, dtype and shape of the codes.
        others: the same of everything else, in order.
        unit: elements; ranges start at multiples of it.
        pack: elements per element of the codes.
        scales: how many there are.
    """

    codes: tuple[str, DType, tuple[int, ...]]
    others: dict[str, tuple[DType, tuple[int, ...]]]
    unit: int
    pack: int
    scales: int

    @abstractmethod
    def encode(self, weights: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """A flat range as flat codes and float32 scales."""

    @abstractmethod
    def scale_at(self, element: int) -> int:
        """Index of the first scale of a range that starts at ``element``; the number of scales at the end."""

    @abstractmethod
    def finish(self, scales: torch.Tensor) -> dict[str, torch.Tensor]:
        """All other tensors, flat, by the end of their names."""


class FourBit(Encoder):
    """NF4 or FP4; ``dtype`` is that of the weight, ``shape`` in the orientation of a linear layer."""

    def __init__(self, shape: tuple[int, ...], grid: Grid, dtype: DType) -> None:
        self._shape, self._grid, self._dtype = shape, grid, dtype
        self._count = prod(shape)
        self.scales = -(-self._count // grid.blocksize)
        self.unit, self.pack = grid.blocksize, 2
        self.codes = "", U8, (-(-self._count // 2), 1)
        self.others = {".absmax": (U8 if grid.double else F32, (self.scales,)), ".quant_map": (F32, (16,))}
        if grid.double:
            self.others[".nested_absmax"] = F32, (-(-self.scales // NESTED),)
            self.others[".nested_quant_map"] = F32, (256,)
        self._state = f".quant_state.bitsandbytes__{grid.kind}"
        size = STATE_BYTES if grid.double else len(self._json({}))
        self.others[self._state] = U8, (size,)

    def encode(self, weights: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        from adapterkit.codecs.blockwise import absmax_of, encode_4bit

        absmax = absmax_of(weights, self._grid.blocksize)
        return encode_4bit(weights, absmax, self._grid.kind, self._grid.blocksize), absmax

    def scale_at(self, element: int) -> int:
        return -(-element // self._grid.blocksize)

    def finish(self, scales: torch.Tensor) -> dict[str, torch.Tensor]:
        import torch

        from adapterkit.codecs import blockwise

        found = {".absmax": scales, ".quant_map": blockwise.values(self._grid.kind)}
        more: dict[str, object] = {}
        if self._grid.double:
            codes, largest, offset = blockwise.nest(scales)
            found |= {".absmax": codes, ".nested_absmax": largest, ".nested_quant_map": blockwise.nested_values()}
            more = {"nested_blocksize": NESTED, "nested_dtype": "float32", "nested_offset": float(offset)}
        text = self._json(more)
        text += b" " * (self.others[self._state][1][0] - len(text))
        found[self._state] = torch.frombuffer(bytearray(text), dtype=torch.uint8)
        return found

    def _json(self, more: dict[str, object]) -> bytes:
        state = {
            "quant_type": self._grid.kind,
            "blocksize": self._grid.blocksize,
            "dtype": self._dtype.torch_name,
            "shape": list(self._shape),
        }
        return json.dumps(state | more).encode()


class Int8(Encoder):
    """LLM.int8 of ``[out, in]``."""

    def __init__(self, shape: tuple[int, ...]) -> None:
        self._columns = shape[-1]
        self.unit, self.pack, self.scales = self._columns, 1, shape[0]
        self.codes = "", I8, shape
        self.others = {"SCB": (F32, (shape[0],)), "weight_format": (U8, ())}

    def encode(self, weights: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        from adapterkit.codecs.blockwise import encode_int8

        codes, largest = encode_int8(weights.view(-1, self._columns))
        return codes.view(-1), largest

    def scale_at(self, element: int) -> int:
        return element // self._columns

    def finish(self, scales: torch.Tensor) -> dict[str, torch.Tensor]:
        import torch

        return {"SCB": scales, "weight_format": torch.zeros(1, dtype=torch.uint8)}


class Float8(Encoder):
    """FP8 (e4m3) in blocks of 128x128, as transformers' FineGrainedFP8 writes it; both sides of the weight divide.

    scale = absmax / 448; a weight is stored as W * (448 / absmax), rounded to nearest even.
    """

    def __init__(self, shape: tuple[int, ...]) -> None:
        if any(size % FP8_BLOCK for size in shape):
            raise UsageError(
                f"a {'x'.join(map(str, shape))} weight is not made of 128x128 blocks", "keep it in 16 bits"
            )
        self._across = shape[1] // FP8_BLOCK
        self.unit, self.pack, self.scales = FP8_BLOCK * shape[1], 1, shape[0] // FP8_BLOCK * self._across
        self.codes = "", E4M3, shape
        self.others = {"weight_scale_inv": (F32, (shape[0] // FP8_BLOCK, self._across))}

    def encode(self, weights: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        import torch

        tiles = weights.float().view(-1, FP8_BLOCK, self._across, FP8_BLOCK)
        largest = tiles.abs().amax((1, 3))
        factor = torch.where(largest > 0, 448.0 / largest, 1.0)
        codes = (tiles * factor[:, None, :, None]).clamp(-448.0, 448.0).to(torch.float8_e4m3fn)
        return codes.view(-1), (1.0 / factor).view(-1)

    def scale_at(self, element: int) -> int:
        return element // self.unit * self._across

    def finish(self, scales: torch.Tensor) -> dict[str, torch.Tensor]:
        return {"weight_scale_inv": scales}


def beside(name: str, end: str) -> str:
    """The name of a companion: ``.absmax`` is added to the weight's name, ``SCB`` takes the place of its last word."""
    return name + end if end.startswith(".") else name.rpartition(".")[0] + "." + end
