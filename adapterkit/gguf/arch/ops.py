"""The operations between the tensors of a Hugging Face checkpoint and those of GGUF, as values for tables.

An operation takes arrays and gives arrays, and knows the shapes that went in from those that came out (``back``), so a
row of a table says both directions at once. Numbers are named (``"heads"``) and looked up in the model's config.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass, replace
from math import prod
from typing import TYPE_CHECKING

from adapterkit.gguf.arch.maps import Array, Box, MapError, Strided, Value

if TYPE_CHECKING:
    from collections.abc import Sequence

    from adapterkit.gguf.arch.config import Config

    Shape = tuple[int, ...]
    Number = int | str


class Op(ABC):
    """One step from stored tensors to tensors of GGUF."""

    @abstractmethod
    def run(self, arrays: Sequence[Array], config: Config) -> list[Array]:
        """The arrays after this step.

        Raises:
            MapError: they do not have the shapes that it expects.
        """

    def back(self, shapes: Sequence[Shape], config: Config) -> list[Shape]:
        """The shapes before this step."""
        return list(shapes)


def _height(array: Array) -> int:
    return array.shape[-2] if len(array.shape) > 1 else array.shape[0]


def _divided(total: int, by: int, what: str) -> int:
    if by < 1 or total % by:
        raise MapError(f"{total} rows are not a multiple of {by} {what}")
    return total // by


@dataclass(frozen=True)
class Interleave(Op):
    """The two halves of each head's rows in turn: rotary pairs side by side, as ggml's "normal" order has them.

    ``rotary``: how many rows of a head are rotated, where the others stay as they are. ``size``: rows of a head, where
    layers have different numbers of heads.
    """

    heads: Number = 0
    rotary: Number | None = None
    size: Number | None = None

    def run(self, arrays: Sequence[Array], config: Config) -> list[Array]:
        found = []
        for array in arrays:
            heads = config.number(self.heads)
            if self.size is not None:
                heads = _divided(array.rows, config.number(self.size), "rows of a head")
            size = _divided(array.rows, heads, "heads")
            rotary = size if self.rotary is None else config.number(self.rotary)
            if rotary > size or rotary % 2:
                raise MapError(f"{rotary} of a head's {size} rows cannot be rotated")
            rows = array.box().rows
            if rotary == size:
                found.append(array.of_rows(array.shape, rows.unfold(heads, 2, size // 2).swapped(1, 2)))
                continue
            parts = []
            for head in range(heads):
                own = (
                    rows.part(0, head * size, size)
                    if len(rows.sizes) == 1
                    else rows.unfold(heads, size).part(0, head, 1)
                )
                turned = own.part(len(own.sizes) - 1, 0, rotary)
                plain = Strided(turned.at, (rotary,), turned.strides[-1:])
                parts += [
                    plain.unfold(2, rotary // 2).swapped(0, 1),
                    own.part(len(own.sizes) - 1, rotary, size - rotary),
                ]
            found.append(array.of_rows(array.shape, *parts))
        return found


@dataclass(frozen=True)
class InterleaveColumns(Op):
    """The same along the columns, of what is stored as one row per head: ``[heads, size]``."""

    def run(self, arrays: Sequence[Array], config: Config) -> list[Array]:
        found = []
        for array in arrays:
            box, half = array.box(), _divided(array.width, 2, "halves")
            found.append(Array(array.shape, (replace(box, columns=box.columns.unfold(2, half).swapped(0, 1)),)))
        return found


@dataclass(frozen=True)
class RotaryHalves(Op):
    """The reverse for the rotary part of each head alone: even rows, then odd ones, then those without a rotation."""

    heads: Number
    rotary: Number  # rows of a head that are rotated

    def run(self, arrays: Sequence[Array], config: Config) -> list[Array]:
        heads, rotary = config.number(self.heads), config.number(self.rotary)
        found = []
        for array in arrays:
            size = _divided(array.rows, heads, "heads")
            rows = array.box().rows.unfold(heads, size)
            parts = []
            for head in range(heads):
                own = rows.part(0, head, 1)
                parts += [own.part(1, first, rotary // 2, 2) for first in (0, 1)]
                parts += [own.part(1, rotary, size - rotary)] if size > rotary else []
            found.append(array.of_rows(array.shape, *parts))
        return found


@dataclass(frozen=True)
class ByHead(Op):
    """q, k, v of each head after the other, to all q, all k, all v."""

    heads: Number

    def run(self, arrays: Sequence[Array], config: Config) -> list[Array]:
        heads = config.number(self.heads)
        found = []
        for array in arrays:
            size = _divided(array.rows, 3 * heads, "heads of q, k and v")
            rows = array.box().rows.unfold(heads, 3, size).swapped(0, 1)
            found.append(array.of_rows(array.shape, rows))
        return found


@dataclass(frozen=True)
class ByGroup(Op):
    """The q of a group, its k, its v, to all q, all k, all v: in one tensor, or ``apart`` in three.

    ``interleave`` does to each head of q and k what `Interleave` does.
    """

    heads: Number
    kv_heads: Number
    apart: bool = False
    interleave: bool = False

    def run(self, arrays: Sequence[Array], config: Config) -> list[Array]:
        (array,) = arrays
        heads, groups = config.number(self.heads), config.number(self.kv_heads)
        each = _divided(heads, groups, "key and value heads")
        size = _divided(array.rows, heads + 2 * groups, "heads of q, k and v")
        rows = array.box().rows.unfold(groups, each + 2, size)
        parts = [rows.part(1, 0, each), rows.part(1, each, 1), rows.part(1, each + 1, 1)]
        if self.interleave:
            parts[:2] = [self._interleaved(part, size) for part in parts[:2]]
        if not self.apart:
            return [array.of_rows(array.shape, *parts)]
        return [array.of_rows(array.with_height(part.count), part) for part in parts]

    @staticmethod
    def _interleaved(rows: Strided, size: int) -> Strided:
        *outer, _ = rows.sizes
        *steps, step = rows.strides
        return Strided(rows.at, (*outer, size // 2, 2), (*steps, step, step * (size // 2)))

    def back(self, shapes: Sequence[Shape], config: Config) -> list[Shape]:
        return [(sum(shape[0] for shape in shapes), *shapes[0][1:])]


@dataclass(frozen=True)
class Split(Op):
    """Rows (the last but one dimension of a stack) cut into parts; without ``sizes``, in ``parts`` equal ones."""

    sizes: tuple[Number, ...] = ()
    parts: int = 2

    def run(self, arrays: Sequence[Array], config: Config) -> list[Array]:
        (array,) = arrays
        height = _height(array)
        sizes = [config.number(size) for size in self.sizes]
        if not sizes:
            sizes = [_divided(height, self.parts, "parts")] * self.parts
        if sum(sizes) != height:
            raise MapError(f"{height} rows are not {' + '.join(map(str, sizes))}")
        rows, found, at = array.box().rows.unfold(array.rows // height, height), [], 0
        for size in sizes:
            found.append(array.of_rows(array.with_height(size), rows.part(1, at, size)))
            at += size
        return found

    def back(self, shapes: Sequence[Shape], config: Config) -> list[Shape]:
        return [_joined(shapes)]


def _joined(shapes: Sequence[Shape]) -> Shape:
    first = shapes[0]
    axis = max(len(first) - 2, 0)
    return (*first[:axis], sum(shape[axis] for shape in shapes), *first[axis + 1 :])


@dataclass(frozen=True)
class Alternate(Op):
    """Every second row, and the others: two arrays. Of a turned stack, its columns before it was turned."""

    def run(self, arrays: Sequence[Array], config: Config) -> list[Array]:
        (array,) = arrays
        height = _height(array)
        half = _divided(height, 2, "alternating halves")
        if any(box.turned for box in array.boxes):
            return [
                Array(
                    array.with_height(half),
                    tuple(replace(box, columns=box.columns.part(0, first, half, 2)) for box in array.boxes),
                )
                for first in (0, 1)
            ]
        rows = array.box().rows.unfold(array.rows // height, height)
        return [array.of_rows(array.with_height(half), rows.part(1, first, half, 2)) for first in (0, 1)]

    def back(self, shapes: Sequence[Shape], config: Config) -> list[Shape]:
        return [_joined(shapes)]


@dataclass(frozen=True)
class AlternateLast(Op):
    """The same along the last dimension: a stack of biases ``[experts, 2 f]``."""

    def run(self, arrays: Sequence[Array], config: Config) -> list[Array]:
        (array,) = arrays
        *outer, last = array.shape
        half = _divided(last, 2, "alternating halves")
        box = array.box()
        return [Array((*outer, half), (replace(box, columns=box.columns.part(0, first, half, 2)),)) for first in (0, 1)]

    def back(self, shapes: Sequence[Shape], config: Config) -> list[Shape]:
        return [(*shapes[0][:-1], sum(shape[-1] for shape in shapes))]


@dataclass(frozen=True)
class TurnedHalves(Op):
    """A turned stack cut into its first and its second half of rows."""

    def run(self, arrays: Sequence[Array], config: Config) -> list[Array]:
        (array,) = arrays
        half = _divided(_height(array), 2, "halves")
        return [
            Array(
                array.with_height(half),
                tuple(replace(box, columns=box.columns.part(0, first * half, half)) for box in array.boxes),
            )
            for first in (0, 1)
        ]

    def back(self, shapes: Sequence[Shape], config: Config) -> list[Shape]:
        return [_joined(shapes)]


@dataclass(frozen=True)
class Stack(Op):
    """Tensors (experts, heads) one after the other in a new first dimension."""

    def run(self, arrays: Sequence[Array], config: Config) -> list[Array]:
        shapes = {array.shape for array in arrays}
        if len(shapes) != 1:
            raise MapError(f"tensors of {len(shapes)} shapes cannot be stacked")
        return [Array((len(arrays), *arrays[0].shape), tuple(box for array in arrays for box in array.boxes))]

    def back(self, shapes: Sequence[Shape], config: Config) -> list[Shape]:
        return [shape[1:] for shape in shapes for _ in range(shape[0])]


@dataclass(frozen=True)
class Join(Op):
    """Tensors of these numbers of rows, one below the other."""

    sizes: tuple[Number, ...]

    def run(self, arrays: Sequence[Array], config: Config) -> list[Array]:
        sizes = [config.number(size) for size in self.sizes]
        if [array.shape[0] for array in arrays] != sizes:
            raise MapError(f"tensors of {[array.shape[0] for array in arrays]} rows are not {sizes}")
        return [Array((sum(sizes), *arrays[0].shape[1:]), tuple(box for array in arrays for box in array.boxes))]

    def back(self, shapes: Sequence[Shape], config: Config) -> list[Shape]:
        return [(config.number(size), *shapes[0][1:]) for size in self.sizes]


@dataclass(frozen=True)
class Seen(Op):
    """The same numbers in the same order with other dimensions, where what was done before is of whole rows.

    ``shape`` in GGUF, ``stored`` in the checkpoint.
    """

    shape: tuple[Number, ...]
    stored: tuple[Number, ...]

    def run(self, arrays: Sequence[Array], config: Config) -> list[Array]:
        shape = tuple(config.number(size) for size in self.shape)
        for array in arrays:
            if prod(shape) != prod(array.shape):
                raise MapError(f"{prod(array.shape)} numbers are not {' x '.join(map(str, shape))}")
        return [Array(shape, array.boxes) for array in arrays]

    def back(self, shapes: Sequence[Shape], config: Config) -> list[Shape]:
        return [tuple(config.number(size) for size in self.stored) for _ in shapes]


@dataclass(frozen=True)
class Unjoin(Op):
    """Matrices that stand one below the other in one, as a stack: ``[count h, w]`` to ``[count, h, w]``."""

    count: Number

    def run(self, arrays: Sequence[Array], config: Config) -> list[Array]:
        count = config.number(self.count)
        return [Array((count, _divided(a.shape[0], count, "matrices"), *a.shape[1:]), a.boxes) for a in arrays]

    def back(self, shapes: Sequence[Shape], config: Config) -> list[Shape]:
        return [(shape[0] * shape[1], *shape[2:]) for shape in shapes]


@dataclass(frozen=True)
class Turn(Op):
    """The last two dimensions swapped."""

    def run(self, arrays: Sequence[Array], config: Config) -> list[Array]:
        return [self._turned(array) for array in arrays]

    @staticmethod
    def _turned(array: Array) -> Array:
        if len(array.shape) < 2:
            return array  # a bias has no sides
        box = array.box()
        *outer, height, width = array.shape
        rows = box.rows
        if len(rows.sizes) == 2 and rows.sizes[1] == height:
            parts = [Strided(rows.at + i * rows.strides[0], (height,), rows.strides[1:]) for i in range(rows.sizes[0])]
        else:
            seen = rows.unfold(array.rows // height, height)
            parts = [Strided(seen.at + i * seen.strides[0], (height,), seen.strides[1:]) for i in range(seen.sizes[0])]
        return Array((*outer, width, height), tuple(replace(box, rows=part, turned=True) for part in parts))

    def back(self, shapes: Sequence[Shape], config: Config) -> list[Shape]:
        return [(*shape[:-2], shape[-1], shape[-2]) if len(shape) > 1 else shape for shape in shapes]


@dataclass(frozen=True)
class EitherSide(Op):
    """A stack that some versions of transformers save on its side: by its shape, one row of operations or another.

    ``rows`` and ``columns`` are those of an upright matrix; one that fits both ways is upright, as it is for transformers.
    """

    rows: Number
    columns: Number
    upright: tuple[Op, ...]
    turned: tuple[Op, ...]

    def run(self, arrays: Sequence[Array], config: Config) -> list[Array]:
        (array,) = arrays
        wanted = (config.number(self.rows), config.number(self.columns))
        if array.shape[-2:] not in (wanted, wanted[::-1]):
            raise MapError(f"matrices of {array.shape[-2:]} are not {wanted} on either side")
        found = [array]
        for op in self.upright if array.shape[-2:] == wanted else self.turned:
            found = op.run(found, config)
        return found

    def back(self, shapes: Sequence[Shape], config: Config) -> list[Shape]:
        found = list(shapes)
        for op in reversed(self.upright):
            found = op.back(found, config)
        return found


@dataclass(frozen=True)
class Copies(Op):
    """The same tensor more than once, where GGUF needs it with other values or under another name too."""

    count: int

    def run(self, arrays: Sequence[Array], config: Config) -> list[Array]:
        (array,) = arrays
        return [array] * self.count

    def back(self, shapes: Sequence[Shape], config: Config) -> list[Shape]:
        return [shapes[0]]


@dataclass(frozen=True)
class Each(Op):
    """Another operation for each array; None leaves one as it is."""

    ops: tuple[Op | None, ...]

    def run(self, arrays: Sequence[Array], config: Config) -> list[Array]:
        pairs = zip(self.ops, arrays, strict=True)
        return [array if op is None else op.run([array], config)[0] for op, array in pairs]

    def back(self, shapes: Sequence[Shape], config: Config) -> list[Shape]:
        pairs = zip(self.ops, shapes, strict=True)
        return [shape if op is None else op.back([shape], config)[0] for op, shape in pairs]


@dataclass(frozen=True)
class HeadSplit(Op):
    """Rows of each head cut into parts, each a stack of heads: ``[h (a + b), c]`` to ``[h, a, c]`` and ``[h, b, c]``."""

    heads: Number
    sizes: tuple[Number, ...]

    def run(self, arrays: Sequence[Array], config: Config) -> list[Array]:
        (array,) = arrays
        heads, sizes = config.number(self.heads), [config.number(size) for size in self.sizes]
        if array.rows != heads * sum(sizes):
            raise MapError(f"{array.rows} rows are not {heads} heads of {' + '.join(map(str, sizes))}")
        rows, found, at = array.box().rows.unfold(heads, sum(sizes)), [], 0
        for size in sizes:
            found.append(array.of_rows((heads, size, *array.shape[1:]), rows.part(1, at, size)))
            at += size
        return found

    def back(self, shapes: Sequence[Shape], config: Config) -> list[Shape]:
        return [(shapes[0][0] * sum(shape[1] for shape in shapes), *shapes[0][2:])]


@dataclass(frozen=True)
class Tile(Op):
    """Heads in groups, to the first head of every group, the second of every group, ...; of rows or of columns.

    The first ``skip`` rows stay. ``size`` is rows (columns) per head.
    """

    groups: Number
    heads: Number
    size: Number
    skip: Number = 0
    columns: bool = False

    def run(self, arrays: Sequence[Array], config: Config) -> list[Array]:
        groups, heads = config.number(self.groups), config.number(self.heads)
        size, skip = config.number(self.size), config.number(self.skip)
        each = _divided(heads, groups, "groups of heads")
        found = []
        for array in arrays:
            box = array.box()
            if self.columns:
                columns = box.columns.unfold(groups, each, size).swapped(0, 1)
                found.append(Array(array.shape, (replace(box, columns=columns),)))
                continue
            if skip + heads * size != array.rows:
                raise MapError(f"{array.rows} rows are not {skip} and {heads} heads of {size}")
            parts = [box.rows.part(0, 0, skip)] if skip else []
            parts.append(box.rows.part(0, skip, heads * size).unfold(groups, each, size).swapped(0, 1))
            found.append(array.of_rows(array.shape, *parts))
        return found


@dataclass(frozen=True)
class GroupSplit(Op):
    """Rows of each group cut into parts, like parts of all groups together, then joined as ``joins`` says.

    ``joins`` numbers the parts of each output: ``((0, 1, 2), (3,))`` makes two arrays of four parts.
    """

    groups: Number
    sizes: tuple[Number, ...]
    joins: tuple[tuple[int, ...], ...]

    def run(self, arrays: Sequence[Array], config: Config) -> list[Array]:
        (array,) = arrays
        groups, sizes = config.number(self.groups), [config.number(size) for size in self.sizes]
        if array.rows != groups * sum(sizes):
            raise MapError(f"{array.rows} rows are not {groups} groups of {' + '.join(map(str, sizes))}")
        rows, parts, at = array.box().rows.unfold(groups, sum(sizes)), [], 0
        for size in sizes:
            parts.append(rows.part(1, at, size))
            at += size
        return [
            array.of_rows(array.with_height(groups * sum(sizes[one] for one in join)), *[parts[one] for one in join])
            for join in self.joins
        ]

    def back(self, shapes: Sequence[Shape], config: Config) -> list[Shape]:
        return [_joined(shapes)]


@dataclass(frozen=True)
class Add(Op):
    """A constant added to every value."""

    number: float

    def run(self, arrays: Sequence[Array], config: Config) -> list[Array]:
        return [array.changed(Value("add", self.number)) for array in arrays]


@dataclass(frozen=True)
class NegExp(Op):
    """``-exp(x)``: the logarithm of a decay, as the decay."""

    def run(self, arrays: Sequence[Array], config: Config) -> list[Array]:
        return [array.changed(Value("negexp")) for array in arrays]


@dataclass(frozen=True)
class Scale(Op):
    """Every value times the product of numbers of the config."""

    factors: tuple[str, ...]

    def run(self, arrays: Sequence[Array], config: Config) -> list[Array]:
        factor = 1.0
        for name in self.factors:
            factor *= config.real(name)
        return list(arrays) if factor == 1 else [array.changed(Value("scale", factor)) for array in arrays]


@dataclass(frozen=True)
class ScaleRows(Op):
    """Runs of rows, each times a number of its own: sizes and factors are numbers of the config."""

    sizes: tuple[Number, ...]
    factors: tuple[str, ...]

    def run(self, arrays: Sequence[Array], config: Config) -> list[Array]:
        (array,) = arrays
        box, sizes = array.box(), [config.number(size) for size in self.sizes]
        if sum(sizes) != array.rows:
            raise MapError(f"{array.rows} rows are not {' + '.join(map(str, sizes))}")
        boxes, at = [], 0
        for size, name in zip(sizes, self.factors, strict=True):
            value = Value("scale", config.real(name))
            boxes.append(replace(box, rows=box.rows.part(0, at, size), values=(*box.values, value)))
            at += size
        return [Array(array.shape, tuple(boxes))]


@dataclass(frozen=True)
class Squeeze(Op):
    """A convolution ``[channels, 1, kernel]`` without its middle dimension."""

    def run(self, arrays: Sequence[Array], config: Config) -> list[Array]:
        return [Array((a.shape[0], a.shape[-1]), a.boxes) if len(a.shape) == 3 else a for a in arrays]

    def back(self, shapes: Sequence[Shape], config: Config) -> list[Shape]:
        return [(shape[0], 1, shape[1]) if len(shape) == 2 else shape for shape in shapes]


@dataclass(frozen=True)
class Shaped(Op):
    """The same elements in the same order with other dimensions: ``shape`` in GGUF, ``stored`` in the checkpoint."""

    shape: tuple[Number, ...]
    stored: tuple[Number, ...]

    def run(self, arrays: Sequence[Array], config: Config) -> list[Array]:
        shape = tuple(config.number(size) for size in self.shape)
        found = []
        for array in arrays:
            if prod(shape) != prod(array.shape):
                raise MapError(f"{prod(array.shape)} numbers are not {' x '.join(map(str, shape))}")
            box, width = array.box(), shape[-1]
            if array.width != width:
                if not (box.rows.is_plain and box.columns.is_plain) or min(array.width, width) != 1:
                    raise MapError(f"rows of {array.width} numbers cannot be seen as rows of {width}")
                box = replace(box, rows=Strided.all(prod(shape) // width), columns=Strided.all(width))
            found.append(Array(shape, (box,)))
        return found

    def back(self, shapes: Sequence[Shape], config: Config) -> list[Shape]:
        return [tuple(config.number(size) for size in self.stored) for _ in shapes]


@dataclass(frozen=True)
class Column(Op):
    """A vector as a matrix of one column."""

    def run(self, arrays: Sequence[Array], config: Config) -> list[Array]:
        return [Array((*array.shape, 1), array.boxes) if len(array.shape) == 1 else array for array in arrays]

    def back(self, shapes: Sequence[Shape], config: Config) -> list[Shape]:
        return [shape[:-1] if len(shape) == 2 else shape for shape in shapes]


@dataclass(frozen=True)
class Grouped(Op):
    """A vector ``[n]`` as ``[groups, n / groups]``."""

    groups: Number

    def run(self, arrays: Sequence[Array], config: Config) -> list[Array]:
        groups = config.number(self.groups)
        return [Array((groups, _divided(a.shape[0], groups, "groups")), a.boxes) for a in arrays]

    def back(self, shapes: Sequence[Shape], config: Config) -> list[Shape]:
        return [(shape[0] * shape[1],) for shape in shapes]


@dataclass(frozen=True)
class Cut(Op):
    """Without the first ``rows``: positions that padding takes."""

    first: Number

    def run(self, arrays: Sequence[Array], config: Config) -> list[Array]:
        first = config.number(self.first)
        return [
            a.of_rows((a.shape[0] - first, *a.shape[1:]), a.box().rows.part(0, first, a.rows - first)) for a in arrays
        ]

    def back(self, shapes: Sequence[Shape], config: Config) -> list[Shape]:
        first = config.number(self.first)
        return [(shape[0] + first, *shape[1:]) for shape in shapes]


@dataclass(frozen=True)
class OneRow(Op):
    """One row of a matrix, as a vector."""

    row: Number

    def run(self, arrays: Sequence[Array], config: Config) -> list[Array]:
        found = []
        for array in arrays:
            row = config.number(self.row)
            if row >= array.rows:
                raise MapError(f"there is no row {row} of {array.rows}")
            found.append(
                Array((array.shape[-1],), (replace(array.box(), rows=Strided.all(array.rows).part(0, row, 1)),))
            )
        return found


@dataclass(frozen=True)
class FirstLast(Op):
    """The first row after the others."""

    def run(self, arrays: Sequence[Array], config: Config) -> list[Array]:
        found = []
        for array in arrays:
            rows = array.box().rows
            found.append(array.of_rows(array.shape, rows.part(0, 1, array.rows - 1), rows.part(0, 0, 1)))
        return found


@dataclass(frozen=True)
class Frames(Op):
    """A convolution over two frames ``[out, in, 2, h, w]`` as one for each, ``[out, in, h, w]``."""

    def run(self, arrays: Sequence[Array], config: Config) -> list[Array]:
        (array,) = arrays
        if len(array.shape) != 5 or array.shape[2] != 2:
            raise MapError(f"a convolution of {array.shape} is not one over two frames")
        out, inner, frames, height, width = array.shape
        rows = array.box().rows.unfold(out * inner, frames, height)
        return [array.of_rows((out, inner, height, width), rows.part(1, frame, 1)) for frame in range(frames)]

    def back(self, shapes: Sequence[Shape], config: Config) -> list[Shape]:
        return [(*shapes[0][:2], len(shapes), *shapes[0][2:])]


@dataclass(frozen=True)
class Pixels(Op):
    """Patches as rows of ``height x width x 3`` numbers, as a convolution ``[out, 3, height, width]``."""

    side: Number

    def run(self, arrays: Sequence[Array], config: Config) -> list[Array]:
        side = config.number(self.side)
        found = []
        for array in arrays:
            colours = _divided(array.width, side * side, "pixels")
            columns = Strided(0, (colours, side, side), (1, side * colours, colours))
            box = replace(array.box(), columns=columns)
            found.append(Array((array.rows, colours, side, side), (box,)))
        return found

    def back(self, shapes: Sequence[Shape], config: Config) -> list[Shape]:
        return [(shape[0], shape[1] * shape[2] * shape[3]) for shape in shapes]


@dataclass(frozen=True)
class Resize(Op):
    """As many rows as the config says: cut at the end, or zeros added."""

    rows: Number

    def run(self, arrays: Sequence[Array], config: Config) -> list[Array]:
        wanted = config.number(self.rows)
        found = []
        for array in arrays:
            box, shape = array.box(), (wanted, *array.shape[1:])
            kept = replace(box, rows=box.rows.part(0, 0, min(wanted, array.rows)))
            more = wanted - array.rows
            zeros = (Box("", Strided.all(more), Strided.all(array.width)),) if more > 0 else ()
            found.append(Array(shape, (kept, *zeros)))
        return found
