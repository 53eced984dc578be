"""Where a module's parameter lives in a checkpoint.

A module tree and the files that store it need not agree: experts are stacked in memory and separate on disk, a fused
projection on disk is three modules in memory, some kernels are stored transposed. All of these are *index maps on rows*.
A parameter is seen as a matrix, and a `Target` lists the pieces of that matrix and the tensor rows that hold them, so
that one rule carries weights, low-rank factors and their inverses alike.
"""

from __future__ import annotations

from functools import cached_property
from math import prod
from typing import TYPE_CHECKING

from adapterkit.values import dataclass

if TYPE_CHECKING:
    from collections.abc import Sequence


def as_matrix(shape: Sequence[int], stacked: bool = False) -> tuple[int, int]:
    """The ``(rows, columns)`` under which a stored tensor is seen.

    A vector ``[n]`` is ``(n, 1)``; a matrix is itself; a convolution ``[out, in, *kernel]`` is ``(out, in*kernel)``, as in
    every adapter method; a ``stacked`` tensor ``[experts, out, in]`` is ``(experts*out, in)``.
    """
    if len(shape) <= 1:
        return (prod(shape), 1)
    if stacked:
        return (prod(shape[:-1]), shape[-1])
    return (shape[0], prod(shape[1:]))


@dataclass(frozen=True)
class Piece:
    """``count`` rows of a parameter, and the tensor rows that store them.

    Parameter rows ``row, row + row_step, ...`` are tensor rows ``at, at + at_step, ...``. When ``transposed``, tensor
    rows from ``at`` hold the parameter's columns instead, and its rows are tensor columns starting at ``row_at`` (the
    tensor's matrix then has the parameter's rows as columns). Those are all of its columns, or ``columns`` of them:
    ``column, column + column_step, ...``.
    """

    tensor: str
    count: int
    row: int = 0
    row_step: int = 1
    at: int = 0
    at_step: int = 1
    transposed: bool = False
    row_at: int = 0
    column: int = 0
    column_step: int = 1
    columns: int | None = None

    def held_columns(self, width: int) -> slice:
        """Which of a parameter's ``width`` columns a transposed piece holds."""
        if self.columns is None:
            return slice(0, width)
        return slice(self.column, self.column + (self.columns - 1) * self.column_step + 1, self.column_step)


@dataclass(frozen=True)
class Target:
    """A parameter of the module tree, its matrix shape, and the pieces that store it.

    ``matrix`` is ``(rows, columns)`` in the module's own orientation; ``stacked`` says that the leading dimensions were
    flattened (experts), otherwise everything after the first dimension was (convolutions).
    """

    parameter: str
    shape: tuple[int, ...]
    pieces: tuple[Piece, ...]
    stacked: bool = False

    @cached_property
    def matrix(self) -> tuple[int, int]:
        return as_matrix(self.shape, self.stacked)

    @cached_property
    def tensors(self) -> tuple[str, ...]:
        """The checkpoint tensors touched, in order, each once."""
        return tuple(dict.fromkeys(piece.tensor for piece in self.pieces))


def transposed(target: Target) -> Target:
    """The same storage seen by a module whose weight is stored the other way round (``fan_in_fan_out``)."""
    rows, columns = target.matrix
    (piece,) = target.pieces
    turned = Piece(piece.tensor, columns, at=piece.at, transposed=not piece.transposed, row_at=piece.row_at)
    return Target(target.parameter, (columns, rows), (turned,))


def as_stack(target: Target) -> Target:
    """A parameter of three dimensions seen as a stack of matrices, where it was seen as a convolution."""
    if target.stacked or len(target.shape) != 3:
        return target
    (piece,) = target.pieces
    return Target(target.parameter, target.shape, (Piece(piece.tensor, prod(target.shape[:2])),), stacked=True)
