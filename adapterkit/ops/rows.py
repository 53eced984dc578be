"""Deltas as something that gives rows: never more than a block of a matrix in memory."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol, runtime_checkable

from adapterkit.errors import AdapterError
from adapterkit.ops.device import BATCH

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence

    import torch
else:
    from adapterkit.ops._torch import torch

TILE = 32
"""Rows per matrix product: always the same products, so no bit depends on the block a caller asks for."""

BLOCK_ELEMENTS = 1 << 20
"""Entries per block of a streamed pass: 4 MiB of float32, so the temporaries of a rule stay in cache."""


@runtime_checkable
class DeltaRows(Protocol):
    """A change of a weight, ``[m, n]``, that gives any of its rows in float32, the same bits each time."""

    @property
    def shape(self) -> tuple[int, int]: ...

    def rows(self, start: int, stop: int) -> torch.Tensor:
        """Rows ``start:stop`` as a float32 tensor ``[stop - start, n]``."""
        ...


@dataclass(frozen=True, eq=False)
class Dense:
    """A matrix in memory, seen as a delta."""

    matrix: torch.Tensor

    @property
    def shape(self) -> tuple[int, int]:
        return self.matrix.shape[0], self.matrix.shape[1]

    @property
    def place(self) -> torch.device:
        return self.matrix.device

    def rows(self, start: int, stop: int) -> torch.Tensor:
        return self.matrix[start:stop].float()


@dataclass(frozen=True, eq=False)
class ScaledRows:
    """``weight * delta``, one rounding per entry."""

    delta: DeltaRows
    weight: float

    @property
    def shape(self) -> tuple[int, int]:
        return self.delta.shape

    @property
    def place(self) -> torch.device:
        return device_of(self.delta)

    def rows(self, start: int, stop: int) -> torch.Tensor:
        return (self.delta.rows(start, stop).double() * self.weight).float()


@dataclass(frozen=True, eq=False)
class ComputedRows:
    """A delta whose rows a function computes when they are asked for: the result of a streamed rule."""

    shape: tuple[int, int]
    block: Callable[[int, int], torch.Tensor]

    def rows(self, start: int, stop: int) -> torch.Tensor:
        return self.block(start, stop)


def device_of(delta: DeltaRows) -> torch.device:
    """Where a delta gives its rows. Those that do not say it give them on the CPU, or where they compute them."""
    known: torch.device | None = getattr(delta, "place", None)
    if known is not None:
        return known
    return delta.rows(0, 1).device if isinstance(delta, ComputedRows) else torch.device("cpu")


def total(deltas: Sequence[DeltaRows]) -> DeltaRows:
    """The sum of deltas, added in float64, rounded once."""

    def block(start: int, stop: int) -> torch.Tensor:
        return add([delta.rows(start, stop) for delta in deltas]).float()

    return ComputedRows(common_shape(deltas), block)


def add(tensors: Sequence[torch.Tensor]) -> torch.Tensor:
    """The sum of same-shaped tensors in float64, in the order given."""
    out = tensors[0].double()
    for tensor in tensors[1:]:
        out = out + tensor
    return out


def scaled(delta: DeltaRows, weight: float) -> DeltaRows:
    """``weight * delta``; a delta that knows a better way (factors) takes it."""
    if weight == 1.0:
        return delta
    own = getattr(delta, "scaled", None)
    return own(weight) if own is not None else ScaledRows(delta, weight)


def elements_on(device: torch.device) -> int:
    """Entries per block of a streamed pass on a device."""
    return BLOCK_ELEMENTS if device.type == "cpu" else BATCH


def blocks(shape: tuple[int, int], elements: int | None = None) -> Iterator[tuple[int, int]]:
    """Row ranges of about so many entries that cover ``shape``, whole tiles where they can be."""
    m, n = shape
    step = max(1, (elements or BLOCK_ELEMENTS) // max(1, n))
    if step > TILE:
        step -= step % TILE
    for start in range(0, m, step):
        yield start, min(m, start + step)


def materialize(delta: DeltaRows) -> torch.Tensor:
    """The whole delta as float32 ``[m, n]``; for matrices known to be small, or on request."""
    where = device_of(delta)
    out = torch.empty(delta.shape, dtype=torch.float32, device=where)
    for start, stop in blocks(delta.shape, elements_on(where)):
        out[start:stop] = delta.rows(start, stop)
    return out


def common_shape(deltas: Sequence[DeltaRows]) -> tuple[int, int]:
    """The shape all deltas share.

    Raises:
        AdapterError: there is none, or they differ.
    """
    shapes = {delta.shape for delta in deltas}
    if not shapes:
        raise AdapterError("there is no delta to work on", "give at least one adapter")
    if len(shapes) > 1:
        listed = ", ".join(str(list(shape)) for shape in sorted(shapes))
        raise AdapterError(f"the deltas of one weight have different shapes ({listed})", "combine adapters of one base")
    return shapes.pop()
