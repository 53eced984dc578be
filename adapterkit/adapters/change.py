"""What an adapter does to one parameter, as a value for planning and a kernel for computing.

A `Change` is made from headers: it knows the matrix it fits and what it will read. Its kernel is loaded when the first
block is computed and maps rows of W to rows of W' in float32. Most methods add a low-rank product; those say so, and then
their factors can be transposed, sliced and summed without ever forming the delta.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from bisect import bisect_left
from typing import TYPE_CHECKING, Final, Literal

from adapterkit.checkpoint.tensor import Renamed
from adapterkit.dtypes import F32, F64
from adapterkit.errors import AdapterError
from adapterkit.values import dataclass

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    import torch

    from adapterkit.adapters.target import Target
    from adapterkit.checkpoint.tensor import Tensor
    from adapterkit.dtypes import DType
    from adapterkit.ops.device import Device


class Weights(ABC):
    """A parameter's unmerged matrix, in the module's own orientation."""

    shape: tuple[int, int]
    dtype: DType

    @abstractmethod
    def read(self, start: int, stop: int) -> torch.Tensor:
        """Rows ``start:stop`` in float32."""

    @abstractmethod
    def other(self, target: Target) -> Weights:
        """Another parameter of the same base, unmerged too."""

    def whole(self) -> torch.Tensor:
        """All of it, in float32."""
        return self.read(0, self.shape[0])

    def blocks(self) -> Iterator[tuple[int, torch.Tensor]]:
        """All rows, block by block: first row and float32 matrix."""
        rows, columns = self.shape
        step = max(1, (1 << 20) // max(columns, 1))
        for start in range(0, rows, step):
            yield start, self.read(start, min(start + step, rows))


class Kernel(ABC):
    """A change that is ready to compute; used by several threads at once, never modified.

    Attributes:
        wide: rows of W may be float64 too, and then W' is. Others get float32, and their change is added in float64.
        anywhere: `new` takes rows of W on any device, and gives W' there.
    """

    wide: bool = False
    anywhere: bool = False

    def parts(self, rows: range) -> Iterator[tuple[slice, torch.Tensor, torch.Tensor, float]] | None:
        """The delta of ``rows`` as low-rank parts ``(where in rows, left [k, r], right [r, columns], scale)``, or None
        when the change is not a low-rank addition. Float32, or float64 where `wide` and W is."""
        return None

    @abstractmethod
    def new(self, w: torch.Tensor, rows: range) -> torch.Tensor:
        """W' for ``rows``, given those rows of W; float32 ``[len(rows), columns]`` in and out."""

    def on(self, w: torch.Tensor, v: torch.Tensor, rows: range) -> torch.Tensor:
        """What the change makes of ``v``, to which other adapters brought ``w``; see `adapterkit.adapters.composed`."""
        return v + (self.new(w, rows) - w)


Composition = Literal["sum", "after", "before", "scaled", "alone"]
SUM: Final = "sum"
AFTER: Final = "after"
BEFORE: Final = "before"
SCALED: Final = "scaled"
ALONE: Final = "alone"


@dataclass(frozen=True)
class Change:
    """One adapter's change of one parameter.

    Attributes:
        how: a few words, as ``lora r=16``.
        load: makes the kernel; reads the adapter's tensors, and W where the method needs more than its rows.
        reads: bytes of the adapter's tensors.
        memory: bytes that the kernel holds.
        replaced: the tensor that takes the place of W, when that is all that the change does.
        stored: the one tensor of the adapter that holds the change, when one does.
        some_rows: whether rows of ``stored`` take the place of some rows of W, and that is all that the change does.
        factors: for a plain low-rank change its two factors as stored, each with whether it is stored transposed,
            and ``scale``.
        composes: how it goes together with another adapter's change of the same parameter; see
            `adapterkit.adapters.composed`.
    """

    how: str
    load: Callable[[Weights], Kernel]
    reads: int
    memory: int
    replaced: Tensor | None = None
    stored: Tensor | None = None
    some_rows: bool = False
    factors: tuple[tuple[Tensor, bool], ...] = ()
    scale: float = 1.0
    composes: Composition = SUM


class RowMap(Kernel):
    """W' by a function of ``(rows of W, which rows)``."""

    def __init__(self, function: Callable[[torch.Tensor, range], torch.Tensor]) -> None:
        self._function = function

    def new(self, w: torch.Tensor, rows: range) -> torch.Tensor:
        return self._function(w, rows)


class LowRank(Kernel):
    """W + scale * left @ right; left ``[rows, r]``, right ``[r, columns]``, float32 or float64."""

    wide = anywhere = True

    def __init__(self, left: torch.Tensor, right: torch.Tensor, scale: float) -> None:
        self.left, self.right, self.scale = left, right, scale

    def parts(self, rows: range) -> Iterator[tuple[slice, torch.Tensor, torch.Tensor, float]]:
        yield slice(None), self.left[rows.start : rows.stop : rows.step], self.right, self.scale

    def new(self, w: torch.Tensor, rows: range) -> torch.Tensor:
        import torch

        left, right = (one.to(w.device, w.dtype) for one in (self.left[rows.start : rows.stop : rows.step], self.right))
        return torch.addmm(w, left, right, alpha=self.scale)


class StackedLowRank(Kernel):
    """One low-rank delta per expert on a stack ``[experts * rows, columns]``; left ``[e, rows, r]``, right ``[e, r, c]``."""

    wide = anywhere = True

    def __init__(self, left: torch.Tensor, right: torch.Tensor, scale: float) -> None:
        self.left, self.right, self.scale = left, right, scale

    def parts(self, rows: range) -> Iterator[tuple[slice, torch.Tensor, torch.Tensor, float]]:
        height = self.left.shape[1]
        done = 0
        while done < len(rows):
            expert, first = divmod(rows[done], height)
            count = min(len(rows) - done, -((first - height) // rows.step))
            last = first + (count - 1) * rows.step + 1
            yield slice(done, done + count), self.left[expert, first : last : rows.step], self.right[expert], self.scale
            done += count

    def new(self, w: torch.Tensor, rows: range) -> torch.Tensor:
        import torch

        out = torch.empty_like(w)
        for where, left, right, scale in self.parts(rows):
            there = (one.to(w.device, w.dtype) for one in (left, right))
            out[where] = torch.addmm(w[where], *there, alpha=scale)
        return out


class Replacement(Kernel):
    """W' is a tensor of the adapter's own."""

    wide = True

    def __init__(self, tensor: Tensor, columns: int) -> None:
        self._tensor, self._columns = tensor, columns

    def new(self, w: torch.Tensor, rows: range) -> torch.Tensor:
        start, stop = rows.start, rows[-1] + 1
        found = self._tensor.read(start * self._columns, stop * self._columns).view(-1, self._columns)
        found = found[:: rows.step].to(w.dtype)
        if found.isnan().any():
            raise _broken(self._tensor, "NaN")
        return found


class RowReplacement(Kernel):
    """Some rows of W are taken from the adapter: trained tokens of an embedding."""

    wide = True

    def __init__(self, indices: list[int], values: torch.Tensor) -> None:
        self._values = values
        self._at = sorted((index, position) for position, index in enumerate(indices))

    def new(self, w: torch.Tensor, rows: range) -> torch.Tensor:
        out = w.clone()
        low, high = (bisect_left(self._at, (end, 0)) for end in (rows.start, rows.stop))
        for index, position in self._at[low:high]:
            if index in rows:
                out[rows.index(index)] = self._values[position]
        return out


def replace(tensor: Tensor, how: str = "replaced by the adapter's own") -> Change:
    """The change that puts ``tensor`` in the place of a parameter."""
    return Change(how, lambda weights: Replacement(tensor, weights.shape[1]), tensor.nbytes, 0, tensor, tensor)


def matrix(tensor: Tensor, beside: DType = F32) -> torch.Tensor:
    """A whole tensor of the adapter in float32, in its own shape; in float64 where the weights ``beside`` it are.

    Raises:
        AdapterError: it holds NaN or infinite values, which would spread over every weight it touches.
    """
    import torch

    return finite(raw(tensor).to(torch.float64 if beside is F64 else torch.float32), tensor)


def finite(values: torch.Tensor, tensor: Tensor) -> torch.Tensor:
    """Values of a tensor of the adapter, once none is NaN or infinite.

    Raises:
        AdapterError: one is.
    """
    # A sum is one pass and mostly the answer; one that overflows says nothing, so values are looked at then.
    if not math.isfinite(float(values.sum())) and not values.isfinite().all():
        raise _broken(tensor, "NaN or infinite values")
    return values


def _broken(tensor: Tensor, what: str) -> AdapterError:
    return AdapterError(
        f"the adapter's '{tensor.name}' holds {what}", "its training diverged; take an earlier checkpoint"
    )


class Checked(Renamed):
    """A tensor of an adapter's own that takes the place of a base's. It may be infinite (masks are), but not NaN."""

    @property
    def extent(self) -> None:
        return None  # not copied by the kernel: every value is looked at

    @property
    def how(self) -> str:
        return "replaced by the adapter's own"

    def read(self, start: int, stop: int) -> torch.Tensor:
        found = self.inner.read(start, stop)
        if found.is_floating_point() and found.isnan().any():
            raise _broken(self.inner, "NaN")
        return found

    def read_wide(self, start: int, stop: int) -> torch.Tensor:
        return self.read(start, stop)

    def read_on(self, device: Device, start: int, stop: int) -> torch.Tensor:
        return device.gather(self.read, start, stop, self.block)


def raw(tensor: Tensor) -> torch.Tensor:
    """A whole tensor of the adapter as it is stored, in its own shape."""
    return tensor.read(0, tensor.numel).view(tensor.shape)
