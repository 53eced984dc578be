"""`Tiles`: an encoder for formats that are codes times scales over tiles of rows and columns.

A tile is what shares a scale: a tensor, a row, a group of columns or a block. `Numbers` says what a format does with one
tile; the rest (short tiles at the edges, activation order, packing, what did not change) is the same for all.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from adapterkit.codecs.encode import LARGE, Encoder, TensorSpec

if TYPE_CHECKING:
    import torch

    # (lowest, highest value of each tile) to: stored scales, stored zero points, what values are multiplied by
    Choose = Callable[[torch.Tensor, torch.Tensor], tuple[torch.Tensor, torch.Tensor | None, torch.Tensor | None]]
    # (values, stored scales, stored zero points, what they are multiplied by) to codes
    Code = Callable[[torch.Tensor, torch.Tensor, torch.Tensor | None, torch.Tensor | None], torch.Tensor]
    # (codes, stored scales, stored zero points) to values
    Value = Callable[[torch.Tensor, torch.Tensor, torch.Tensor | None], torch.Tensor]


FEW = 4  # values of a tile that are looked at first


@dataclass(frozen=True)
class Numbers:
    """What a format does with a tile; scales and zero points are broadcast against values and codes.

    Attributes:
        choose: the scale and the zero point of a tile, as they are stored.
        code: values to codes, before they are packed.
        value: codes to what they are decoded to, float32.
        search: of a new weight, factors of a tile's extremes; the scale of that with the least squared error is taken.
        finer: what is then added to the best of them, to look once more.
    """

    choose: Choose
    code: Code
    value: Value
    search: tuple[float, ...] = ()
    finer: tuple[float, ...] = ()


@dataclass(frozen=True)
class Held:
    """The stored form of a weight that is written again.

    Attributes:
        codes: opens the stored codes, and gives what reads those of the rows from the first up to the last one given,
            ``[k, columns]``, before they are packed.
        scales: all stored scales, ``[lines, across]``.
        zeros: all stored zero points, ``[lines, across]``, as `Numbers` has them.
        order: for each column its group, where groups of columns do not lie together. They may be of different sizes.
    """

    codes: Callable[[], Callable[[int, int], torch.Tensor]]
    scales: Callable[[], torch.Tensor]
    zeros: Callable[[], torch.Tensor] | None = None
    order: Callable[[], torch.Tensor] | None = None


@dataclass(frozen=True)
class Shape:
    """How a weight is cut into tiles.

    Attributes:
        rows, columns: of the weight as one matrix.
        height: rows of each of the matrices that are stacked in it (all rows, when there is one).
        block: rows and columns of a tile.
        across: tiles side by side; the last may be short.
    """

    rows: int
    columns: int
    height: int
    block: tuple[int, int]
    across: int

    @property
    def lines(self) -> int:
        """Rows of tiles."""
        return self.rows // self.height * -(-self.height // self.block[0])


@dataclass(frozen=True)
class _Order:
    """Groups of columns, put side by side; short ones repeat their last column, and one without columns the first of all.

    Attributes:
        columns: for each place the column that stands there, ``[across * wide]``.
        places: for each column its place.
        empty: the groups that have no column.
    """

    columns: torch.Tensor
    places: torch.Tensor
    empty: torch.Tensor

    @classmethod
    def of(cls, groups: torch.Tensor, across: int) -> _Order:
        """From the group of each column."""
        import torch

        sizes = groups.bincount(minlength=across)
        wide = int(sizes.max())
        order = groups.argsort(stable=True)
        first = sizes.cumsum(0) - sizes
        within = torch.arange(wide)[None, :].minimum((sizes - 1).clamp(min=0)[:, None])
        columns = order[(first.clamp(max=order.numel() - 1)[:, None] + within).view(-1)]
        sorted_groups = groups[order]
        places = torch.empty_like(order)
        places[order] = sorted_groups * wide + torch.arange(order.numel()) - first[sorted_groups]
        return cls(columns, places, sizes == 0)


@dataclass
class Tiles(Encoder):
    """Encodes rows of a weight whose scales cover tiles.

    Attributes:
        made: see `Encoder`.
        shape: how it is cut.
        number: gives what is done with a tile, when that is needed: a plan needs no numbers.
        by_line: as ``number``, for the tiles of some lines, where those differ.
        pack: codes ``[k, columns]`` to their stored rows.
        unpack: the reverse.
        complete: all tensors but streamed codes, from (held codes,) scales and zero points of all lines.
        held: the stored form, where the weight is written again.
        step: rows of codes that are packed together, where they are packed down a column.
        row_codes: elements of the stored codes per row, where they stream.
    """

    made: tuple[TensorSpec, ...]
    shape: Shape
    number: Callable[[], Numbers]
    pack: Callable[[torch.Tensor], torch.Tensor]
    unpack: Callable[[torch.Tensor], torch.Tensor]
    complete: Callable[[tuple[torch.Tensor, ...]], dict[str, torch.Tensor]]
    held: Held | None = None
    step: int = 1
    row_codes: int = 0
    streams: bool = True
    by_line: Callable[[torch.Tensor], Numbers] | None = None
    _settled: tuple[torch.Tensor, ...] = field(default=(), init=False, repr=False)
    _stored: tuple[torch.Tensor, torch.Tensor | None, _Order | None] | None = field(
        default=None, init=False, repr=False
    )

    _numbers: Numbers | None = field(default=None, init=False, repr=False)
    _codes: Callable[[int, int], torch.Tensor] | None = field(default=None, init=False, repr=False)

    def __post_init__(self) -> None:
        shape = self.shape
        tall = min(shape.block[0], shape.height)
        if shape.rows > shape.height and shape.height % tall:
            tall = shape.height  # tiles begin anew with every matrix
        self.twice = tall * shape.columns > LARGE
        rows = 1 if self.twice else tall
        self._tall = 1 if self.twice else min(shape.block[0], shape.height)
        rows = -(-rows // self.step) * self.step
        self.unit, self.unit_codes = rows * shape.columns, rows * self.row_codes
        self.memory = 16 * shape.lines * shape.across
        if not self.streams:
            self.memory += sum(one.dtype.nbytes(one.shape) for one in self.made[:1])

    def in_one_range(self) -> None:
        """Take the whole weight as one range from now on; a tile that is too large to be held is held then."""
        shape = self.shape
        self._tall = min(shape.block[0], shape.height)
        self.twice = False
        self.unit, self.unit_codes = shape.rows * shape.columns, shape.rows * self.row_codes

    @property
    def numbers(self) -> Numbers:
        """What is done with a tile."""
        if self._numbers is None:
            self._numbers = self.number()
        return self._numbers

    def look(self, start: int, new: torch.Tensor, old: torch.Tensor | None) -> torch.Tensor:
        import torch

        tiles = self._tiles(new)
        changed = torch.ones_like(tiles[:, 0, :, 0]) if old is None else self._changed(new, old).float()
        return torch.stack([tiles.amin((1, 3)), tiles.amax((1, 3)), changed], 1)

    def settle(self, seen: list[torch.Tensor]) -> None:
        import torch

        rows = torch.cat(seen)
        line = self.lines_of(0, rows.shape[0])
        shape = (self.shape.lines, self.shape.across)
        spots = line[:, None].expand(-1, self.shape.across)
        low = torch.full(shape, torch.inf).scatter_reduce(0, spots, rows[:, 0], "amin")
        high = torch.full(shape, -torch.inf).scatter_reduce(0, spots, rows[:, 1], "amax")
        changed = torch.zeros(shape).scatter_reduce(0, spots, rows[:, 2], "amax")
        self._settled = low, high, changed

    def encode(self, start: int, new: torch.Tensor, old: torch.Tensor | None) -> tuple[torch.Tensor, ...]:
        import torch

        first = start // self.shape.columns
        rows = new.numel() // self.shape.columns
        again = self.held is not None and old is not None
        bounds: tuple[torch.Tensor, torch.Tensor] | None = None
        if self._settled:
            line = self.lines_of(first, first + rows)
            low, high, moved = (one[line].to(new.device) for one in self._settled)
            bounds = low, high
            changed = moved > 0 if again else None
        else:
            line = (
                self.lines_of(first, first + rows)[:: self._tall]
                if self._tall > 1
                else self.lines_of(first, first + rows)
            )
            changed = self._changed(new, old) if again and old is not None else None
        kept: torch.Tensor | None = None
        if changed is not None and not bool(changed.all()):
            assert self.held is not None
            if self._codes is None:
                self._codes = self.held.codes()
            kept = self._codes(first, first + rows).to(new.device)
            if not bool(changed.any()):
                scale, zero = self._before_on(line, new.device)
                return self.given(kept, scale, zero)
        tiles, numbers = self._tiles(new), self._of(line)
        if numbers.search and self.held is None and bounds is None:
            scale, zero, times = self._searched(tiles)
        else:
            scale, zero, times = numbers.choose(*(bounds or (tiles.amin((1, 3)), tiles.amax((1, 3)))))
        if kept is not None and changed is not None:
            old_scale, old_zero = self._before_on(line, new.device)
            scale = where(changed, scale, old_scale)
            zero = None if zero is None or old_zero is None else where(changed, zero, old_zero)
        codes = numbers.code(tiles, _spread(scale), _spread_or_none(zero), _spread_or_none(times))
        found = self._rows(codes, rows)
        if kept is not None and changed is not None:
            found = torch.where(self._rows(_spread(changed).expand(codes.shape), rows), found, kept)
        return self.given(found, scale, zero)

    def finish(self, held: tuple[torch.Tensor, ...]) -> dict[str, torch.Tensor]:
        if self._settled:
            import torch

            low, high, moved = self._settled
            line = torch.arange(low.shape[0])
            scale, zero, _ = self._of(line).choose(low, high)
            if self.held is not None:
                old_scale, old_zero, _ = self.before(line)
                scale = where(moved > 0, scale, old_scale)
                zero = None if zero is None or old_zero is None else where(moved > 0, zero, old_zero)
            scales = (scale,) if zero is None else (scale, zero)
            held = (*held[: 0 if self.streams else 1], *scales)
        return self.complete(held)

    def values(self, start: int, encoded: tuple[torch.Tensor, ...]) -> torch.Tensor:
        rows = encoded[0].numel() * self.unit // self.unit_codes // self.shape.columns if self.streams else None
        stored = encoded[0] if rows is None else encoded[0].view(rows, -1)
        codes = self.unpack(stored)
        zero = encoded[2] if len(encoded) > 2 else None
        first = start // self.shape.columns
        line = self.lines_of(first, first + codes.shape[0])[:: self._tall]
        found = self._of(line).value(self._tiles(codes), _spread(encoded[1]), _spread_or_none(zero))
        return self._rows(found, codes.shape[0]).reshape(-1)

    def end(self) -> None:
        self._settled, self._stored, self._codes = (), None, None

    def _of(self, line: torch.Tensor) -> Numbers:
        """What is done with the tiles of some lines."""
        return self.numbers if self.by_line is None else self.by_line(line)

    def _searched(self, tiles: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor | None, torch.Tensor | None]:
        """The scale of each tile that gives the least squared error among those that are tried."""
        import torch

        numbers = self.numbers
        low, high = tiles.amin((1, 3)), tiles.amax((1, 3))
        factor = torch.ones_like(low)
        least = torch.full_like(low, torch.inf)
        for steps, finer in ((numbers.search, False), (numbers.finer, True)):
            around = factor.clone() if finer else torch.zeros_like(low)
            for step in steps:
                tried = around + step
                scale, zero, times = numbers.choose(low * tried, high * tried)
                codes = numbers.code(tiles, _spread(scale), _spread_or_none(zero), _spread_or_none(times))
                off = numbers.value(codes, _spread(scale), _spread_or_none(zero)).sub_(tiles).square_().sum((1, 3))
                better = off < least
                factor, least = torch.where(better, tried, factor), torch.where(better, off, least)
        return numbers.choose(low * factor, high * factor)

    def given(self, codes: torch.Tensor, scale: torch.Tensor, zero: torch.Tensor | None) -> tuple[torch.Tensor, ...]:
        packed = self.pack(codes)
        return (packed.reshape(-1) if self.streams else packed, scale, *(() if zero is None else (zero,)))

    def lines_of(self, first: int, last: int) -> torch.Tensor:
        """For each row the line of tiles that it is in."""
        import torch

        row = torch.arange(first, last)
        down = -(-self.shape.height // self.shape.block[0])
        return row // self.shape.height * down + row % self.shape.height // self.shape.block[0]

    def before(self, line: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor | None, _Order | None]:
        """Stored scales and zero points of some lines, and the order of the columns."""
        scale, zero, order = self._all()
        return take(scale, line), None if zero is None else take(zero, line), order

    def _before_on(self, line: torch.Tensor, device: torch.device) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Stored scales and zero points of some lines, where the values are."""
        scale, zero, _ = self.before(line)
        return scale.to(device), None if zero is None else zero.to(device)

    def _all(self) -> tuple[torch.Tensor, torch.Tensor | None, _Order | None]:
        held = self.held
        if held is None:
            import torch

            return torch.empty(0), None, None
        if self._stored is None:
            zeros = None if held.zeros is None else held.zeros()
            order = None if held.order is None else _Order.of(held.order(), self.shape.across)
            self._stored = held.scales(), zeros, order
        return self._stored

    def _tiles(self, flat: torch.Tensor) -> torch.Tensor:
        """Rows as ``[lines, rows of a tile, across, columns of a tile]``; short tiles repeat their last row and column."""
        import torch

        rows = flat.reshape(-1, self.shape.columns)
        if rows.is_floating_point():
            rows = rows.float()
        order = self._all()[2]
        tall, wide = self._tall, self.shape.block[1]
        if order is not None:
            rows, wide = rows[:, order.columns], order.columns.numel() // self.shape.across
        more = self.shape.across * wide - rows.shape[1]
        if more:
            rows = torch.cat([rows, rows[:, -1:].expand(-1, more)], 1)
        height = self.shape.height
        if tall > 1 and height % tall:
            # every matrix ends with a short tile; a range holds whole ones, or the rest of the only one
            size = min(height, rows.shape[0])
            short = -size % tall
            whole = rows.view(-1, size, rows.shape[1])
            rows = torch.cat([whole, whole[:, -1:].expand(-1, short, -1)], 1).view(-1, rows.shape[1])
        return rows.view(-1, tall, self.shape.across, wide)

    def _rows(self, tiles: torch.Tensor, count: int) -> torch.Tensor:
        """The reverse of `_tiles`."""
        tall = self._tall
        found = tiles.reshape(tiles.shape[0] * tall, -1)
        height = self.shape.height
        if tall > 1 and height % tall:
            size = min(height, count)
            found = found.view(count // size, -1, found.shape[1])[:, :size].reshape(count, -1)
        order = self._all()[2]
        return found[:, : self.shape.columns] if order is None else found[:, order.places]

    def _changed(self, new: torch.Tensor, old: torch.Tensor) -> torch.Tensor:
        shape = self.shape
        plain = shape.columns == shape.across * shape.block[1] and not (self._tall > 1 and shape.height % self._tall)
        if plain and self._all()[2] is None:
            # A change of low rank moves every tile: a few values of each mostly show it.
            found = (self._tiles(new)[:, 0, :, :FEW] != self._tiles(old)[:, 0, :, :FEW]).any(2)
            if bool(found.all()):
                return found
        found = self._tiles(new != old).any(3).any(1)
        order = self._all()[2]
        return found if order is None else found & ~order.empty.to(found.device)


def _spread(scale: torch.Tensor) -> torch.Tensor:
    return scale[:, None, :, None]


def _spread_or_none(scale: torch.Tensor | None) -> torch.Tensor | None:
    return None if scale is None else scale[:, None, :, None]


def take(stored: torch.Tensor, line: torch.Tensor) -> torch.Tensor:
    """Some lines; torch cannot index every 8-bit dtype."""
    if stored.is_floating_point() and stored.element_size() == 1:
        import torch

        return stored.view(torch.uint8)[line].view(stored.dtype)
    return stored[line]


def where(which: torch.Tensor, one: torch.Tensor, other: torch.Tensor) -> torch.Tensor:
    import torch

    if one.is_floating_point() and one.element_size() == 1:
        return torch.where(which, one.view(torch.uint8), other.view(torch.uint8)).view(one.dtype)
    return torch.where(which, one, other)
