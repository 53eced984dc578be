"""Formats by columns, for error feedback: those of `Tiles`, and bitsandbytes' four bits."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING

from adapterkit.codecs.bnb4 import FourBit, FourBitAgain
from adapterkit.codecs.compressed import Nvfp4
from adapterkit.codecs.feedback import ByColumns, Scales
from adapterkit.codecs.tiles import Tiles, take, where
from adapterkit.errors import CheckpointError, option

if TYPE_CHECKING:
    import torch

    from adapterkit.codecs.encode import Encoder


def by_columns(encoder: Encoder, shape: tuple[int, ...]) -> ByColumns | None:
    """The same format by columns; None where its scales do not cover groups of columns of one matrix.

    An encoder that is given here takes its weight as one range from now on.
    """
    if len(shape) != 2:
        return None
    tiles = encoder.tiles if isinstance(encoder, Nvfp4) else encoder
    if isinstance(tiles, Tiles) and tiles.shape.rows == tiles.shape.height and tiles.by_line is None:
        tiles.in_one_range()
        return TilesByColumns(tiles)
    if isinstance(encoder, (FourBit, FourBitAgain)) and shape[1] % encoder.state.blocksize == 0:
        return FourBitByColumns(encoder, (shape[0], shape[1]))
    return None


class TilesByColumns:
    """Codes times scales over tiles of rows and columns."""

    def __init__(self, tiles: Tiles) -> None:
        self._tiles = tiles
        self.group, self.lines = tiles.shape.block[1], tiles.shape.lines
        self._now: Scales | None = None
        self._multiplies: bool | None = None

    @property
    def fixed(self) -> bool:
        return False

    def line_of_row(self) -> torch.Tensor | None:
        if self.lines == self._tiles.shape.rows:
            return None
        return self._tiles.lines_of(0, self._tiles.shape.rows)

    def order(self) -> torch.Tensor | None:
        import torch

        found = None if self._tiles.held is None else self._tiles.before(torch.arange(0))[2]
        if found is None:
            return None
        if found.columns.numel() != self._tiles.shape.columns or bool(found.empty.any()):
            raise CheckpointError(
                f"'{self._tiles.made[0].name}' has groups of different sizes, which are not rounded with feedback",
                f"leave out {option('rounding')}",
            )
        return found.columns

    def stored(self, group: int) -> Scales | None:
        import torch

        if self._tiles.held is None:
            return None
        if self._now is None:
            scale, zero, _ = self._tiles.before(torch.arange(self.lines))
            self._now = Scales(scale, zero)
        scale, zero = self._now.scale[:, group], None if self._now.zero is None else self._now.zero[:, group]
        return Scales(scale, zero, self._times(scale))

    def _times(self, scale: torch.Tensor) -> torch.Tensor | None:
        """What values are multiplied by, where a format multiplies."""
        import torch

        from adapterkit.codecs.fp8 import factors

        if self._multiplies is None:
            self._multiplies = self._tiles.numbers.choose(-torch.ones(1), torch.ones(1))[2] is not None
        if not self._multiplies:
            return None
        found = factors(scale)
        return torch.where(found != 0, 1.0 / torch.where(found != 0, found, 1.0), 0.0)

    def choose(self, low: torch.Tensor, high: torch.Tensor) -> Scales:
        return Scales(*self._tiles.numbers.choose(low, high))

    def rounded(self, values: torch.Tensor, scales: Scales) -> tuple[torch.Tensor, torch.Tensor]:
        numbers = self._tiles.numbers
        codes = numbers.code(values, scales.scale, scales.zero, scales.times)
        return codes, numbers.value(codes, scales.scale, scales.zero)

    def spread(self, scales: Scales) -> Scales:
        line = self.line_of_row()

        def rows(found: torch.Tensor | None) -> torch.Tensor | None:
            return None if found is None else (found if line is None else take(found, line))[:, None]

        scale = rows(scales.scale)
        assert scale is not None
        return Scales(scale, rows(scales.zero), rows(scales.times))

    def mixed(self, which: torch.Tensor, one: Scales, other: Scales) -> Scales:
        return Scales(
            where(which, one.scale, other.scale),
            None if one.zero is None or other.zero is None else where(which, one.zero, other.zero),
            None if one.times is None or other.times is None else where(which, one.times, other.times),
        )

    def encoded(self, codes: torch.Tensor, scales: list[Scales], changed: torch.Tensor) -> tuple[torch.Tensor, ...]:
        import torch

        tiles = self._tiles
        if tiles.held is not None and not bool(changed.all()):
            line, order = self.line_of_row(), self.order()
            kept = tiles.held.codes()(0, tiles.shape.rows)
            which = changed if line is None else changed[line]
            which = which.repeat_interleave(self.group, 1)[:, : tiles.shape.columns]
            codes = torch.where(which if order is None else which[:, torch.argsort(order)], codes, kept)
        scale = _beside([one.scale for one in scales])
        zeros = [one.zero for one in scales if one.zero is not None]
        return tiles.given(codes, scale, _beside(zeros) if zeros else None)


def _beside(columns: list[torch.Tensor]) -> torch.Tensor:
    """Scales of groups as ``[lines, groups]``; torch cannot stack every 8-bit dtype."""
    import torch

    first = columns[0]
    if first.is_floating_point() and first.element_size() == 1:
        return torch.stack([one.view(torch.uint8) for one in columns], 1).view(first.dtype)
    return torch.stack(columns, 1)


class FourBitByColumns:
    """NF4 and FP4 of bitsandbytes, whose blocks lie in the rows.

    Nested scales that are stored stay as they are: written anew they would all change a little once the last is known.
    """

    def __init__(self, encoder: FourBit | FourBitAgain, shape: tuple[int, int]) -> None:
        self._encoder, self._state, self._shape = encoder, encoder.state, shape
        self.group, self.lines = encoder.state.blocksize, shape[0]
        self._now: torch.Tensor | None = None

    @property
    def fixed(self) -> bool:
        return isinstance(self._encoder, FourBitAgain) and self._encoder.nested

    def line_of_row(self) -> torch.Tensor | None:
        return None

    def order(self) -> torch.Tensor | None:
        return None

    def stored(self, group: int) -> Scales | None:
        if not isinstance(self._encoder, FourBitAgain):
            return None
        if self._now is None:
            self._now = self._encoder.scales().view(self.lines, -1)
        return Scales(self._now[:, group])

    def choose(self, low: torch.Tensor, high: torch.Tensor) -> Scales:
        import torch

        return Scales(torch.maximum(-low, high))

    def rounded(self, values: torch.Tensor, scales: Scales) -> tuple[torch.Tensor, torch.Tensor]:
        import torch

        from adapterkit.codecs.blockwise import values as table_of

        table = table_of(self._state.kind)
        order = torch.argsort(table)
        ranked = table[order]
        some = scales.scale > 0
        scaled = torch.where(some, values / torch.where(some, scales.scale, 1.0), 0.0)
        codes = order[torch.bucketize(scaled, (ranked[1:] + ranked[:-1]) / 2)]
        return codes.to(torch.uint8), (table[codes] * scales.scale).to(self._state.dtype.torch).float()

    def spread(self, scales: Scales) -> Scales:
        return Scales(scales.scale[:, None])

    def mixed(self, which: torch.Tensor, one: Scales, other: Scales) -> Scales:
        import torch

        return replace(one, scale=torch.where(which, one.scale, other.scale))

    def encoded(self, codes: torch.Tensor, scales: list[Scales], changed: torch.Tensor) -> tuple[torch.Tensor, ...]:
        import torch

        flat = codes.reshape(-1)
        flat = torch.nn.functional.pad(flat, (0, flat.numel() % 2))
        packed = (flat[0::2] << 4) | flat[1::2]
        absmax = torch.stack([one.scale for one in scales], 1).reshape(-1)
        if isinstance(self._encoder, FourBit):
            return packed, absmax
        packed, moved = self._encoder.packed(packed), changed.reshape(-1)
        if not bool(moved.all()):
            stored = self._encoder.stored(0, codes.numel())
            bytes_ = moved.repeat_interleave(self.group // 2)
            bytes_ = torch.nn.functional.pad(bytes_, (0, packed.view(torch.uint8).numel() - bytes_.numel()))
            packed = torch.where(bytes_, packed.view(torch.uint8), stored).view(packed.dtype)
        return packed, absmax, torch.zeros_like(moved) if self.fixed else moved
