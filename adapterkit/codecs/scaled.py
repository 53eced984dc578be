"""Formats that are codes times a grid of scales: FP8, MXFP8, NVFP4, integers; per tensor, row, group or block.

The stored matrix has the rows of the weight; each row holds its columns, packed or not. A scale covers a block of rows
and columns, given by the shapes, or where those do not divide, by the block size that the config names.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from functools import partial
from math import prod
from typing import TYPE_CHECKING

from adapterkit.codecs.codec import (
    AGAIN,
    StoredTensor,
    Weight,
    check_index,
    check_scales,
    check_shape,
    whole,
    zero_scale,
)
from adapterkit.codecs.encode import TensorSpec
from adapterkit.errors import CheckpointError

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

    import torch

    from adapterkit.codecs.codec import Decode
    from adapterkit.codecs.encode import Encoder
    from adapterkit.codecs.tiles import Numbers
    from adapterkit.dtypes import DType


@dataclass(frozen=True)
class Written:
    """How a weight of codes and scales is written.

    Attributes:
        numbers: what is done with a tile.
        pack: codes ``[k, columns]`` to stored rows.
        unpack: the reverse.
        scale: the stored scales.
        zero: the stored zero points, and what packs them, where they are stored.
        others: what other libraries do with a tile, by their names.
        by_line: as ``numbers``, for the rows that are given, where stacked matrices differ.
    """

    numbers: Callable[[], Numbers]
    pack: Callable[[torch.Tensor], torch.Tensor]
    unpack: Callable[[torch.Tensor], torch.Tensor]
    scale: StoredTensor
    zero: tuple[StoredTensor, Callable[[torch.Tensor], torch.Tensor]] | None = None
    others: Mapping[str, Callable[[], Numbers]] = field(default_factory=dict)
    by_line: Callable[[torch.Tensor], Numbers] | None = None


@dataclass(frozen=True)
class ScaledWeight:
    """How one weight is stored.

    Attributes:
        name, shape, dtype, how: of the `Weight`.
        codes: ``[..., rows, stored columns]``.
        unpack: rows of it ``[k, stored columns]`` to float32 ``[k, columns]``.
        block: rows and columns that share a scale.
        grid: scales per matrix, down and across.
        scales: the scales, float32 ``[leading * down, across]``.
        zeros: what to subtract from codes before they are scaled, on the same grid.
        parts: all stored tensors.
        scale_numel: how many scales there are, for plans.
        groups: for each column the grid column that it belongs to, where that is stored.
        written: how other values are written in this layout, where that is known.
    """

    name: str
    shape: tuple[int, ...]
    dtype: DType
    how: str
    codes: StoredTensor
    unpack: Callable[[torch.Tensor], torch.Tensor]
    block: tuple[int, int]
    grid: tuple[int, int]
    scales: Callable[[], torch.Tensor]
    parts: tuple[StoredTensor, ...]
    zeros: Callable[[], torch.Tensor] | None = None
    groups: StoredTensor | None = None
    written: Written | None = None

    def resolved(self) -> tuple[object, ...]:
        """What decides the values that it is decoded to; see `adapterkit.checkpoint.resolved`."""
        held = (self.codes, self.unpack, self.block, self.grid, self.scales, self.zeros, self.groups)
        return (self.name, self.shape, self.dtype, *held)

    def weight(self) -> Weight:
        rows = prod(self.shape[:-1])
        memory = 4 * (rows + prod(self.shape[:-2]) * prod(self.grid) * (1 if self.zeros is None else 2))
        grain, encoder = self.shape[-1], None if self.written is None else self.encoder
        others = {name: partial(self.encoder, name) for name in (self.written.others if self.written else {})}
        return Weight(
            self.name, self.shape, self.dtype, self.parts, self.how, grain, self.load, memory, encoder, others
        )

    def encoder(self, rule: str | None = None) -> Encoder:
        """What writes other values in this layout, by the format's own rule or that of another library."""
        from adapterkit.codecs.tiles import Held, Shape, Tiles

        written = self.written
        assert written is not None
        scale, zero, codes, across = written.scale, written.zero, self.codes, self.grid[1]
        stored = codes.shape[-1]

        def before(first: int, last: int) -> torch.Tensor:
            return written.unpack(codes.read(first * stored, last * stored).view(-1, stored))

        def order() -> torch.Tensor:
            assert self.groups is not None
            return check_index(self.groups, across)

        def complete(held: tuple[torch.Tensor, ...]) -> dict[str, torch.Tensor]:
            found = {scale.name: held[0].reshape(-1)}
            if zero is not None:
                found[zero[0].name] = zero[1](held[1]).reshape(-1)
            return found

        parts = (codes, scale, *(() if zero is None else zero[:1]))
        rows, columns, height = prod(self.shape[:-1]), self.shape[-1], self.shape[-2]
        return Tiles(
            tuple(TensorSpec(part.name, part.dtype, part.shape) for part in parts),
            Shape(rows, columns, height, self.block, across),
            written.numbers if rule is None else written.others[rule],
            written.pack,
            lambda rows: written.unpack(rows.view(-1, stored)),
            complete,
            Held(
                lambda: before,
                lambda: whole(scale).reshape(-1, across),
                None if self.zeros is None or zero is None else self.zeros,
                None if self.groups is None else order,
            ),
            row_codes=stored,
            by_line=written.by_line,
        )

    def load(self) -> Decode:
        import torch

        columns, height = self.shape[-1], self.shape[-2]
        stored = self.codes.shape[-1]
        scales = check_scales(self.scales(), self.parts[1])
        zeros = None if self.zeros is None else self.zeros()
        empty = bool((scales == 0).any())
        row = torch.arange(prod(self.shape[:-1]))
        line = row // height * self.grid[0] + row % height // self.block[0]
        groups = None if self.groups is None else check_index(self.groups, self.grid[1])

        def spread(grid: torch.Tensor, first: int, last: int) -> torch.Tensor:
            """Rows of a grid, to be combined with ``[rows, across, columns of a block]`` or with whole rows."""
            found = torch.index_select(grid, 0, line[first:last])
            if groups is not None:
                return torch.index_select(found, 1, groups)
            if self.grid[1] * self.block[1] == columns:
                return found[:, :, None]
            return found.repeat_interleave(self.block[1], 1)[:, :columns]

        def decode(start: int, stop: int) -> torch.Tensor:
            first, last = start // columns, stop // columns
            codes = self.codes.read(first * stored, last * stored).view(last - first, stored)
            found = self.unpack(codes)
            factor = spread(scales, first, last)
            found = found.view(last - first, self.grid[1], self.block[1]) if factor.dim() == 3 else found
            if zeros is not None:
                found = found - spread(zeros, first, last)
            if empty and bool(((found != 0) & (factor == 0)).any()):
                raise zero_scale(self.name)
            return (found * factor).view(-1).to(self.dtype.torch)

        return decode


def grid_of(
    shape: tuple[int, ...], scale: StoredTensor, blocks: list[tuple[int, int]]
) -> tuple[tuple[int, int], tuple[int, int]]:
    """The block and the grid of a scale tensor: one scale, one per row, per group of columns, or per block.

    Args:
        shape: of the decoded weight.
        scale: its scales.
        blocks: block sizes that the config names.

    Raises:
        CheckpointError: the shapes do not fit.
    """
    rows, columns = shape[-2:]
    lead = prod(shape[:-2])
    count = prod(scale.shape)
    if count == lead:
        return (rows, columns), (1, 1)
    down, across = scale.shape[-2:] if len(scale.shape) >= 2 else (count, 1)
    named = [block for block in blocks if (down, across) == (-(-rows // block[0]), -(-columns // block[1]))]
    # Of a square weight too: nothing runs a scale per column. A list of few wide blocks may have as many scales as there are
    # rows, and then the config says so.
    if len(scale.shape) > 1 and down == 1 and across == rows and not named:
        down, across = rows, 1
    flat = len(scale.shape) < 2 and count != rows  # one number is above, and a list has one for each row
    if count and lead * down * across == count and not flat:
        if named:
            return named[0], (down, across)
        height, width = rows // down, columns // across
        # Blocks are powers of two, or whole rows or columns: nobody has chosen others. They are parts of rows, or squares of
        # which the last may be short; and where the config names squares, those: other scales lie the other way round.
        even = (down == 1 or height & (height - 1) == 0) and (across == 1 or width & (width - 1) == 0)
        square = height == width or (down == 1 and height < width) or (across == 1 and width < height)
        known = height == 1 or (square and not any(min(block) > 1 for block in blocks))
        if rows % down == 0 and columns % across == 0 and even and known:
            return (height, width), (down, across)
    raise CheckpointError(
        f"'{scale.name}' is {list(scale.shape)}, which covers no {'x'.join(map(str, shape))} weight in equal blocks",
        AGAIN,
    )


def grid_scales(
    scale: StoredTensor, grid: tuple[int, int], over: StoredTensor | None = None, *, divide: bool = False
) -> torch.Tensor:
    """Scales as float32 ``[leading * down, across]``; e8m0 and bytes are powers of two.

    ``over`` is one more scale for the whole tensor (or one per leading index), multiplied, or divided by.
    """
    from adapterkit.codecs.bits import floats, powers

    stored = whole(scale)
    found = powers(stored) if scale.dtype.code in ("U8", "F8_E8M0") else floats(stored)
    found = found.reshape(-1, grid[1])
    if over is not None:
        factor = whole(over).float().view(-1, 1)
        factor = factor.repeat_interleave(found.shape[0] // factor.shape[0], 0)
        found = found / factor if divide else found * factor
    return found


def check_over(over: StoredTensor | None, shape: tuple[int, ...]) -> StoredTensor | None:
    """A scale over others, one for all of a weight or one for each matrix that is stacked in it.

    Raises:
        CheckpointError: there are others.
    """
    if over is not None and prod(over.shape) not in (1, prod(shape[:-2])):
        raise CheckpointError(
            f"'{over.name}' is {list(over.shape)} for a weight of {'x'.join(map(str, shape))}, which has one or one per matrix",
            AGAIN,
        )
    return over


def check_like(part: StoredTensor, shape: tuple[int, ...], what: str) -> StoredTensor:
    """``part``, which must have ``shape`` up to dimensions of 1."""
    wanted = tuple(size for size in shape if size != 1)
    if tuple(size for size in part.shape if size != 1) != wanted:
        check_shape(part, shape, what)
    return part
