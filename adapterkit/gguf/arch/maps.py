"""Index maps: which elements of stored tensors are which elements of another layout of the same model.

An `Array` is a tensor of the new layout, seen as a matrix. Its rows come from `Box`es, one after the other; a box names a
stored tensor and says which of its rows and columns are meant, as strided numbers. Nothing is read: permuting heads,
splitting, stacking and transposing are arithmetic on a few numbers, whatever the size of the tensor, and because a box
is a bijection the same map can be followed in both directions.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from math import prod
from typing import TYPE_CHECKING

from adapterkit.errors import AdapterkitError

if TYPE_CHECKING:
    from collections.abc import Sequence


class MapError(AdapterkitError):
    """A tensor does not have the shape that its architecture's map expects."""


@dataclass(frozen=True)
class Strided:
    """The numbers ``at + sum(i_k * strides_k)`` for all indices below ``sizes``, the last one moving fastest."""

    at: int
    sizes: tuple[int, ...]
    strides: tuple[int, ...]

    @classmethod
    def all(cls, count: int) -> Strided:
        return cls(0, (count,), (1,))

    @property
    def count(self) -> int:
        return prod(self.sizes)

    @property
    def is_plain(self) -> bool:
        """Whether these are ``at, at + 1, ...``."""
        expected = 1
        for size, stride in zip(reversed(self.sizes), reversed(self.strides), strict=True):
            if size != 1 and stride != expected:
                return False
            expected *= size
        return True

    def unfold(self, *sizes: int) -> Strided:
        """The same numbers seen in more dimensions.

        Raises:
            MapError: their count is another, or these are not evenly spaced.
        """
        if prod(sizes) != self.count or (len(self.sizes) != 1 and not self.is_plain):
            raise MapError(f"{self.count} rows cannot be seen as {' x '.join(map(str, sizes))}")
        step = self.strides[-1] if len(self.sizes) == 1 else 1
        strides = []
        for size in reversed(sizes):
            strides.append(step)
            step *= size
        return Strided(self.at, sizes, tuple(reversed(strides)))

    def swapped(self, a: int, b: int) -> Strided:
        sizes, strides = list(self.sizes), list(self.strides)
        sizes[a], sizes[b] = sizes[b], sizes[a]
        strides[a], strides[b] = strides[b], strides[a]
        return Strided(self.at, tuple(sizes), tuple(strides))

    def part(self, axis: int, start: int, count: int, step: int = 1) -> Strided:
        """``count`` indices of one dimension: ``start, start + step, ...``."""
        sizes, strides = list(self.sizes), list(self.strides)
        at = self.at + start * strides[axis]
        sizes[axis], strides[axis] = count, strides[axis] * step
        return Strided(at, tuple(sizes), tuple(strides))


@dataclass(frozen=True)
class Value:
    """A function of each value: ``add`` or ``scale`` by ``number``, or ``negexp``, which is ``-exp(x)``."""

    kind: str
    number: float = 0.0


@dataclass(frozen=True)
class Box:
    """Elements of a stored tensor, seen as a matrix.

    Attributes:
        tensor: its name; empty for zeros.
        rows: which of its rows, in order.
        columns: which of its columns, in order.
        turned: its columns are the rows of the array, and its rows the columns.
        values: what is done to the values on the way, in order.
    """

    tensor: str
    rows: Strided
    columns: Strided
    turned: bool = False
    values: tuple[Value, ...] = ()

    @property
    def height(self) -> int:
        """Rows of the array."""
        return (self.columns if self.turned else self.rows).count

    @property
    def width(self) -> int:
        """Columns of the array."""
        return (self.rows if self.turned else self.columns).count


@dataclass(frozen=True)
class Array:
    """A tensor of the new layout: boxes of one width, one below the other."""

    shape: tuple[int, ...]
    boxes: tuple[Box, ...]

    @classmethod
    def stored(cls, name: str, shape: Sequence[int]) -> Array:
        """A tensor as it is; a vector is a column."""
        width = shape[-1] if len(shape) > 1 else 1
        return cls(tuple(shape), (Box(name, Strided.all(prod(shape) // max(width, 1)), Strided.all(width)),))

    @property
    def width(self) -> int:
        return self.boxes[0].width

    @property
    def rows(self) -> int:
        return sum(box.height for box in self.boxes)

    def box(self) -> Box:
        """The only box of an array that is one stored tensor, upright."""
        if len(self.boxes) != 1 or self.boxes[0].turned:
            raise MapError("a tensor that is already put together is to be taken apart")
        return self.boxes[0]

    def of_rows(self, shape: Sequence[int], *rows: Strided) -> Array:
        """An array of ``shape`` with these rows of the only box."""
        box = self.box()
        return Array(tuple(shape), tuple(replace(box, rows=one) for one in rows))

    def with_height(self, height: int) -> tuple[int, ...]:
        """The shape with another number of rows in place of the last row dimension."""
        return (*self.shape[:-2], height, self.shape[-1]) if len(self.shape) > 1 else (height,)

    def changed(self, value: Value) -> Array:
        return Array(self.shape, tuple(replace(box, values=(*box.values, value)) for box in self.boxes))

    @property
    def whole(self) -> str | None:
        """The stored tensor that this is, element for element, when it is one."""
        if len(self.boxes) != 1:
            return None
        box = self.boxes[0]
        plain = box.rows.is_plain and box.columns.is_plain and not (box.rows.at or box.columns.at)
        return box.tensor if plain and not box.turned and not box.values else None
