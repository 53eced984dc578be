"""The grids of bitsandbytes that weights can be put on, and `RoundTrip`: decode(encode(W)) by rows."""

from __future__ import annotations

from dataclasses import dataclass
from math import gcd
from typing import TYPE_CHECKING, Protocol

from adapterkit.errors import UsageError

if TYPE_CHECKING:
    from collections.abc import Iterator

    import torch

    from adapterkit.dtypes import DType

KINDS = ("nf4", "fp4", "int8")
BLOCKSIZES = (32, 64, 128, 256, 512, 1024, 2048, 4096)


@dataclass(frozen=True)
class Grid:
    """How bitsandbytes quantizes a weight.

    Attributes:
        kind: ``nf4``, ``fp4`` or ``int8``.
        double: the scales of 4-bit blocks are quantized too (``bnb_4bit_use_double_quant``).
        dtype: that the weights had when they were quantized, and that 4-bit ones are decoded to: the ``dtype`` of
            ``from_pretrained``; None is that of the checkpoint.
        blocksize: elements per 4-bit block; transformers always takes 64.

    Raises:
        UsageError: there is no such grid.
    """

    kind: str
    double: bool = False
    dtype: DType | None = None
    blocksize: int = 64

    def __post_init__(self) -> None:
        if self.kind not in KINDS:
            raise UsageError(f"'{self.kind}' is no grid of bitsandbytes", f"use {', '.join(KINDS)}")
        if self.double and self.kind == "int8":
            raise UsageError("int8 has no double quantization", "leave it out, or use nf4")
        if self.blocksize not in BLOCKSIZES:
            raise UsageError(
                f"bitsandbytes has no blocks of {self.blocksize}", f"use {', '.join(map(str, BLOCKSIZES))}"
            )

    def __str__(self) -> str:
        return f"{self.kind}{' double' if self.double else ''}"


class Rows(Protocol):
    """A matrix that is read by rows, float32."""

    shape: tuple[int, int]

    def read(self, start: int, stop: int) -> torch.Tensor: ...


def aligned(shape: tuple[int, int], blocksize: int, size: int = 1 << 20) -> Iterator[range]:
    """Ranges of rows of about ``size`` elements, each of whole blocks but for the last."""
    rows, columns = shape
    unit = blocksize // gcd(blocksize, columns)
    step = max(1, size // columns // unit) * unit
    return (range(start, min(start + step, rows)) for start in range(0, rows, step))


class RoundTrip:
    """decode(encode(W)) on a grid.

    With double quantization W is read once before: the scales are quantized around their mean.

    Args:
        weights: W, ``[out, in]``.
        grid: the grid.
        dtype: of W when it was quantized.
    """

    def __init__(self, weights: Rows, grid: Grid, dtype: DType) -> None:
        self._weights, self._grid, self._dtype = weights, grid, dtype
        self._scales: torch.Tensor | None = None
        if grid.double:
            import torch

            from adapterkit.codecs.blockwise import absmax_of, nest, nested_values, unnest

            parts = (self._cast(weights.read(r.start, r.stop)) for r in aligned(weights.shape, grid.blocksize))
            codes, largest, offset = nest(torch.cat([absmax_of(part.view(-1), grid.blocksize) for part in parts]))
            self._scales = unnest(codes, nested_values(), largest, 256, float(offset))

    def rows(self, w: torch.Tensor, first: int) -> torch.Tensor:
        """The rows ``w`` of W, of which the first is ``first``, on the grid: float32 in and out."""
        from adapterkit.codecs import blockwise

        if self._grid.kind == "int8":
            return blockwise.decode_int8(*blockwise.encode_int8(self._cast(w)))
        size, kind = self._grid.blocksize, self._grid.kind
        total, columns = self._weights.shape
        low, high = first * columns, (first + w.shape[0]) * columns
        start, stop = low - low % size, min(-(-high // size) * size, total * columns)
        if (start, stop) == (low, high):
            flat = w.reshape(-1)
        else:
            top = start // columns
            flat = self._weights.read(top, -(-stop // columns)).view(-1)[start - top * columns : stop - top * columns]
        flat = self._cast(flat)
        absmax = blockwise.absmax_of(flat, size)
        codes = blockwise.encode_4bit(flat, absmax, kind, size)
        scales = absmax if self._scales is None else self._scales[start // size : -(-stop // size)]
        found = blockwise.decode_4bit(codes, scales, kind, size, stop - start, self._dtype.torch)
        return found.float()[low - start : high - start].view(w.shape)

    def _cast(self, w: torch.Tensor) -> torch.Tensor:
        return w.to(self._dtype.torch)
