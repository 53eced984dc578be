"""Handles of tensors that are put together from others by an index map, row block by row block."""

from __future__ import annotations

import threading
from dataclasses import dataclass
from itertools import pairwise
from typing import TYPE_CHECKING

from adapterkit.checkpoint.tensor import BLOCK, Renamed, Tensor
from adapterkit.dtypes import F32, DType
from adapterkit.gguf.arch.maps import Strided, Value

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    import torch

    from adapterkit.checkpoint.tensor import Extent
    from adapterkit.gguf.arch.maps import Array

NEAR = 64  # rows: places that are closer are read in one go


@dataclass(frozen=True)
class Part:
    """Elements of ``source``, and which of an output they are: two matrices of the same size, element by element.

    When ``turned``, row j and column k of the output's part are row k and column j of the source's.
    """

    source: Tensor
    width: int  # columns of the whole source
    rows: Strided
    columns: Strided
    out_rows: Strided
    out_columns: Strided
    turned: bool = False
    values: tuple[Value, ...] = ()


class Reshaped(Renamed):
    """Another tensor under a new name and with other dimensions, element for element."""

    def __init__(self, name: str, shape: tuple[int, ...], inner: Tensor) -> None:
        super().__init__(name, inner)
        self.shape = shape

    @property
    def extent(self) -> Extent | None:
        return self.inner.extent

    @property
    def memory(self) -> int:
        return self.inner.memory


class Constant(Tensor):
    """A few numbers that were computed from the config, as a vector unless ``shape`` says otherwise."""

    dtype = F32

    def __init__(self, name: str, values: Sequence[float], shape: tuple[int, ...] | None = None) -> None:
        self.name, self.shape = name, (len(values),) if shape is None else shape
        self._values = tuple(values)

    @property
    def how(self) -> str:
        return "from the config"

    def read(self, start: int, stop: int) -> torch.Tensor:
        import torch

        return torch.tensor(self._values[start:stop], dtype=torch.float32)


class Gathered(Tensor):
    """A tensor whose rows are rows (or columns) of others; what no part covers is zero.

    Args:
        name, shape: of the result.
        width: its columns, when it is seen as a matrix.
        parts: where its elements are.
        dtype: of the result.
    """

    def __init__(
        self, name: str, shape: tuple[int, ...], width: int, parts: Sequence[Part], dtype: DType, *, wide: bool = True
    ) -> None:
        self.name, self.shape, self.dtype = name, shape, dtype
        self.width, self.parts, self.wide = width, tuple(parts), wide
        self._lock = threading.Lock()
        self._index: dict[int, tuple[torch.Tensor, torch.Tensor]] = {}
        self._turned: dict[int, torch.Tensor] = {}

    @property
    def block(self) -> int:
        return max(1, BLOCK // self.width) * self.width

    @property
    def reads(self) -> int:
        return sum({id(part.source): part.source.reads for part in self.parts}.values())

    @property
    def memory(self) -> int:
        turned = max((8 * part.rows.count * part.width for part in self.parts if part.turned), default=0)
        return turned + max((part.source.memory for part in self.parts), default=0)

    @property
    def how(self) -> str:
        hows = dict.fromkeys(part.source.how for part in self.parts)
        words = [how for how in hows if how != "copy"]
        return " + ".join(words) or "rearranged"

    def read(self, start: int, stop: int) -> torch.Tensor:
        return self._read(start, stop).to(self.dtype.torch)

    def read_wide(self, start: int, stop: int) -> torch.Tensor:
        return self._read(start, stop)

    def release(self) -> None:
        with self._lock:
            self._index.clear()
            self._turned.clear()
        for source in {id(part.source): part.source for part in self.parts}.values():
            source.release()

    def _read(self, start: int, stop: int) -> torch.Tensor:
        import torch

        first, last = start // self.width, -(-stop // self.width)
        kind = torch.float32 if self.wide else self.dtype.torch
        out = torch.zeros(last - first, self.width, dtype=kind)
        for number, part in enumerate(self.parts):
            if part.turned:
                self._put_turned(out, number, part, first, last)
            else:
                self._put(out, number, part, first, last)
        return out.view(-1)[start - first * self.width : stop - first * self.width]

    def _put(self, out: torch.Tensor, number: int, part: Part, first: int, last: int) -> None:
        """The rows of ``part`` that lie in ``first:last`` of the output."""
        import torch

        if part.out_rows.is_plain and part.rows.is_plain:
            low, high = max(first, part.out_rows.at), min(last, part.out_rows.at + part.out_rows.count)
            if low >= high:
                return
            at = part.rows.at + low - part.out_rows.at
            rows = self._rows(part, at, at + high - low)
            self._place(out, part, slice(low - first, high - first), rows)
            return
        targets, sources = self._indices(number, part)
        low, high = (int(at) for at in torch.searchsorted(targets, torch.tensor([first, last])))
        if low >= high:
            return
        wanted = sources[low:high]
        self._place(out, part, targets[low:high] - first, self._collected(part, wanted))

    def _collected(self, part: Part, wanted: torch.Tensor) -> torch.Tensor:
        """Rows of the source in any order; rows that are near each other are read in one go."""
        import torch

        ordered, back = torch.unique(wanted, sorted=True, return_inverse=True)
        gaps = torch.nonzero(ordered[1:] - ordered[:-1] > NEAR).view(-1) + 1
        bounds = [0, *gaps.tolist(), len(ordered)]
        found = []
        for low, high in pairwise(bounds):
            start, stop = int(ordered[low]), int(ordered[high - 1]) + 1
            rows = self._rows(part, start, stop)
            found.append(rows if stop - start == high - low else rows[ordered[low:high] - start])
        return (found[0] if len(found) == 1 else torch.cat(found))[back]

    def _rows(self, part: Part, start: int, stop: int) -> torch.Tensor:
        """Rows ``start:stop`` of the source, with the part's columns and values."""
        read = part.source.read_wide if self.wide else part.source.read
        rows = read(start * part.width, stop * part.width).view(-1, part.width)
        if not (part.columns.is_plain and part.columns.count == part.width):
            rows = rows[:, numbers(part.columns)]
        return computed(rows.float() if self.wide else rows, part.values)

    def _place(self, out: torch.Tensor, part: Part, where: slice | torch.Tensor, rows: torch.Tensor) -> None:
        if part.out_columns.is_plain and part.out_columns.count == self.width:
            out[where] = rows
            return
        columns = numbers(part.out_columns)
        if isinstance(where, slice):
            out[where, columns] = rows
        else:
            out[where[:, None], columns] = rows

    def _indices(self, number: int, part: Part) -> tuple[torch.Tensor, torch.Tensor]:
        """Output rows of a part in order, and the source's rows beside them."""
        with self._lock:
            if number not in self._index:
                targets, sources = numbers(part.out_rows), numbers(part.rows)
                if not part.out_rows.is_plain:
                    targets, order = targets.sort()
                    sources = sources[order]
                self._index[number] = targets, sources
            return self._index[number]

    def _put_turned(self, out: torch.Tensor, number: int, part: Part, first: int, last: int) -> None:
        """The same for a part on its side, which is held whole until another one is read."""
        low, high = max(first, part.out_rows.at), min(last, part.out_rows.at + part.out_rows.count)
        if low >= high:
            return
        with self._lock:
            if number not in self._turned:
                self._turned = {key: value for key, value in self._turned.items() if key == number - 1}
                self._turned[number] = self._block_of(part).T.contiguous()
            block = self._turned[number]
        rows = block[low - part.out_rows.at : high - part.out_rows.at]
        self._place(out, part, slice(low - first, high - first), rows)

    def _block_of(self, part: Part) -> torch.Tensor:
        import torch

        if part.rows.is_plain:
            return self._rows(part, part.rows.at, part.rows.at + part.rows.count)
        return self._collected(part, torch.as_tensor(numbers(part.rows)))


def numbers(which: Strided) -> torch.Tensor:
    """All numbers of a `Strided`, in order."""
    import torch

    found = torch.tensor([which.at])
    for size, stride in zip(which.sizes, which.strides, strict=True):
        found = (found[:, None] + stride * torch.arange(size)).view(-1)
    return found


def computed(rows: torch.Tensor, values: Sequence[Value]) -> torch.Tensor:
    """``rows`` after functions of their values."""
    for value in values:
        if value.kind == "add":
            rows = rows + value.number
        elif value.kind == "scale":
            rows = rows * value.number
        elif value.kind == "log":
            rows = _log(-rows)
        else:
            rows = -rows.double().exp().float()
    return rows


def _log(rows: torch.Tensor) -> torch.Tensor:
    """The float32 numbers whose exponentials round to ``rows``: of those around the logarithm, the one that does."""
    import torch

    near = rows.double().log().float()
    best = near
    for up in (True, False):
        tried, limit = near, torch.full_like(near, float("inf") if up else float("-inf"))
        for _ in range(4):
            tried = torch.nextafter(tried, limit)
            wrong = best.double().exp().float() != rows
            best = torch.where(wrong & (tried.double().exp().float() == rows), tried, best)
    return best


def inverted(values: Sequence[Value]) -> tuple[Value, ...]:
    """What undoes functions of values."""
    undo = {
        "add": lambda v: Value("add", -v.number),
        "scale": lambda v: Value("scale", 1 / v.number),
        "negexp": lambda v: Value("log"),
        "log": lambda v: Value("negexp"),
    }
    return tuple(undo[value.kind](value) for value in reversed(values))


def gathered(name: str, array: Array, tensors: Mapping[str, Tensor]) -> Tensor:
    """The handle of an array of stored tensors."""
    whole = array.whole
    if whole is not None and tensors[whole].numel == _count(array):
        return Reshaped(name, array.shape, tensors[whole])
    parts, at = [], 0
    for box in array.boxes:
        if box.tensor:
            source = tensors[box.tensor]
            out = Strided(at, (box.height,), (1,))
            all_columns = Strided.all(array.width)
            parts.append(
                Part(source, width_of(source), box.rows, box.columns, out, all_columns, box.turned, box.values)
            )
        at += box.height
    return Gathered(name, array.shape, array.width, parts, _dtype(parts), wide=_is_wide(parts))


def scattered(name: str, shape: tuple[int, ...], arrays: Mapping[str, Array], tensors: Mapping[str, Tensor]) -> Tensor:
    """The handle of a stored tensor, from the arrays that hold its elements (the other direction)."""
    parts: list[Part] = []
    width = shape[-1] if len(shape) > 1 else 1
    for other, array in arrays.items():
        at = 0
        for box in array.boxes:
            if box.tensor == name:
                source = tensors[other]
                if len(array.boxes) == 1 and array.whole == name and source.numel == _product(shape):
                    return Reshaped(name, shape, source)
                held = Strided(at, (box.height,), (1,))
                columns = Strided.all(array.width)
                undone = inverted(box.values)
                if box.turned:
                    parts += _upright(source, array.width, held, box.rows, box.columns, undone)
                else:
                    parts.append(Part(source, array.width, held, columns, box.rows, box.columns, False, undone))
            at += box.height
    return Gathered(name, shape, width, parts, _dtype(parts), wide=_is_wide(parts))


def _upright(
    source: Tensor, width: int, held: Strided, rows: Strided, columns: Strided, values: tuple[Value, ...]
) -> list[Part]:
    """A turned box seen from the stored tensor: its rows are columns of the source."""
    return [Part(source, width, held, Strided.all(width), rows, columns, True, values)]


def reordered(tensor: Tensor, columns: Strided, *, undo: bool = False) -> Tensor:
    """A matrix with its columns in the order of ``columns``, or back from it."""
    width = width_of(tensor)
    rows = Strided.all(_product(tensor.shape) // width)
    every = Strided.all(width)
    part = Part(tensor, width, rows, every, rows, columns) if undo else Part(tensor, width, rows, columns, rows, every)
    return Gathered(tensor.name, tensor.shape, width, [part], F32)


def width_of(tensor: Tensor) -> int:
    return tensor.shape[-1] if len(tensor.shape) > 1 else 1


def _count(array: Array) -> int:
    return _product(array.shape)


def _product(shape: Sequence[int]) -> int:
    found = 1
    for size in shape:
        found *= size
    return found


def _is_wide(parts: Sequence[Part]) -> bool:
    """Whether anything is computed, so that float32 is needed on the way."""
    return any(part.values or part.source.extent is None for part in parts) or len(_dtypes(parts)) != 1


def _dtype(parts: Sequence[Part]) -> DType:
    return F32 if _is_wide(parts) or not parts else next(iter(_dtypes(parts)))


def _dtypes(parts: Sequence[Part]) -> set[DType]:
    return {part.source.dtype for part in parts}
