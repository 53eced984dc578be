"""How strongly each input column of each weight is used: sums of squared activations, gathered while a model runs.

Every multiplication with a parameter is seen, whichever module makes it, so fused projections, experts in a stack and
kernels that are stored on their side need no case of their own. Then the sums follow the weights through the index maps of
the architecture to the names and columns that they have in GGUF.
"""

from __future__ import annotations

from bisect import bisect_right
from dataclasses import dataclass
from math import prod
from typing import TYPE_CHECKING, Any

import torch
from torch.overrides import TorchFunctionMode

if TYPE_CHECKING:
    from collections.abc import Mapping

    from adapterkit.adapters.names import Names
    from adapterkit.gguf.arch.maps import Array, Box, Strided

_LINEAR = frozenset((torch.nn.functional.linear,))
_SUMMED = frozenset((torch.addmm, torch.Tensor.addmm, torch.baddbmm))
_PRODUCTS = frozenset(
    (torch.matmul, torch.Tensor.matmul, torch.Tensor.__matmul__, torch.mm, torch.Tensor.mm, torch.bmm, torch.Tensor.bmm)
)


@dataclass
class ActivationSums:
    """Of one parameter: sums of squares ``[matrices, in]`` in float64, and how many rows of input each matrix saw.

    ``turned``: the inputs meet the parameter's rows, since its columns are the outputs.
    """

    squares: torch.Tensor
    counts: torch.Tensor
    turned: bool


class Activations(TorchFunctionMode):
    """Gathers `ActivationSums` by parameter name of every product with a matrix, or a stack of matrices, of a model.

    Args:
        model: its parameters must stay where they are while this is entered.
    """

    def __init__(self, model: torch.nn.Module) -> None:
        super().__init__()
        self.sums: dict[str, ActivationSums] = {}
        named = [(p.data_ptr(), name, p) for name, p in model.named_parameters() if p.dim() >= 2]
        self._named = sorted(named, key=lambda one: one[0])
        self._starts = [start for start, _, _ in self._named]
        # The input seen last, its version, and the sums of its squares: q, k and v have one input, gate and up too.
        self._last: tuple[torch.Tensor, int, torch.Tensor] | None = None

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if len(args) > 1:
            if func in _LINEAR:
                self._see(args[0], args[1], -1)
            elif func in _PRODUCTS:
                self._see(args[0], args[1], -2)
            elif func in _SUMMED and len(args) > 2:
                self._see(args[1], args[2], -2)
        return func(*args, **(kwargs or {}))

    def _see(self, inputs: Any, weight: Any, axis: int) -> None:
        """A product that sums over ``axis`` of ``weight`` and the last of ``inputs``."""
        if not isinstance(weight, torch.Tensor) or weight.dim() < 2 or not isinstance(inputs, torch.Tensor):
            return
        at = bisect_right(self._starts, weight.data_ptr()) - 1
        if at < 0:
            return
        start, name, parameter = self._named[at]
        size, skipped = parameter[0].numel(), (weight.data_ptr() - start) // parameter.element_size()
        matrices = prod(parameter.shape[:-2])
        each = parameter.numel() // matrices
        first, aside = divmod(skipped, each)
        seen = weight.numel() // each
        if first >= matrices or aside or weight.numel() % each or size == 0 or inputs.shape[-1] != weight.shape[axis]:
            return  # another tensor, or a part of a matrix
        turned = weight.stride(axis) != 1 and weight.shape[axis] > 1
        width = weight.shape[axis]
        found = self.sums.get(name)
        if found is None:
            zeros = torch.zeros(matrices, width, dtype=torch.float64)
            found = self.sums[name] = ActivationSums(zeros, torch.zeros(matrices, dtype=torch.float64), turned)
        with torch.no_grad():
            if seen == 1:
                found.squares[first] += self._summed(inputs)
                found.counts[first] += inputs.numel() // width
            elif inputs.dim() == weight.dim() and inputs.shape[0] == seen:
                rows = _squares(inputs)
                found.squares[first : first + seen] += rows.sum(-2, dtype=torch.float64).cpu()
                # Some experts get every token, those of others as zeros.
                found.counts[first : first + seen] += (rows.amax(-1) > 0).sum(-1).cpu()

    def _summed(self, inputs: torch.Tensor) -> torch.Tensor:
        """The squares of all rows of an input, summed; of the input seen last they are known, if nobody wrote into it."""
        if self._last is None or self._last[0] is not inputs or self._last[1] != inputs._version:
            rows = _squares(inputs)
            found = rows.reshape(-1, rows.shape[-1]).sum(0, dtype=torch.float64).cpu()
            self._last = inputs, inputs._version, found
        return self._last[2]


def _squares(inputs: torch.Tensor) -> torch.Tensor:
    rows = inputs.detach().float().square()
    return rows.cpu() if rows.device.type == "mps" else rows  # it has no float64 to sum in


def in_gguf(
    sums: Mapping[str, ActivationSums], names: Names, shapes: Mapping[str, tuple[int, ...]], arrays: Mapping[str, Array]
) -> dict[str, tuple[torch.Tensor, torch.Tensor]]:
    """Sums ``[matrices, columns]`` and counts ``[matrices]`` by GGUF name, for the weights of layers.

    Args:
        sums: by parameter.
        names: of the checkpoint, from parameters to stored tensors.
        shapes: of the stored tensors.
        arrays: the GGUF tensors as arrays of stored ones.
    """
    stored: dict[str, ActivationSums] = {}
    for name, one in sums.items():
        _store(name, one, names, shapes, stored)
    found = {}
    for name, array in arrays.items():
        stacked = len(array.shape) == 3 and "_exps." in name
        if name.startswith("blk.") and name.endswith(".weight") and (len(array.shape) == 2 or stacked):
            gathered = _gather(array, stored, shapes)
            if gathered is not None:
                found[name] = gathered
    return found


def _store(
    name: str,
    one: ActivationSums,
    names: Names,
    shapes: Mapping[str, tuple[int, ...]],
    stored: dict[str, ActivationSums],
) -> None:
    """Hand the sums of a parameter to the tensors that store it."""
    target = names.find(name) or names.find(names.tied(name) or "")
    if target is None:
        return
    matrices, width = one.squares.shape
    per = target.matrix[0] // matrices
    for piece in target.pieces:
        shape = shapes[piece.tensor]
        places = prod(shape[:-2]) if len(shape) > 2 else 1
        first = piece.row // per
        last = (piece.row + (piece.count - 1) * piece.row_step) // per
        turned = one.turned != piece.transposed
        if first == 0 and last == matrices - 1 and places == matrices:
            stored.setdefault(piece.tensor, ActivationSums(one.squares, one.counts, turned))
        elif first == last and not (one.turned and matrices > 1):
            there = stored.setdefault(
                piece.tensor,
                ActivationSums(
                    torch.zeros(places, width, dtype=torch.float64), torch.zeros(places, dtype=torch.float64), turned
                ),
            )
            place = piece.at // shape[-2] if places > 1 else 0
            there.squares[place], there.counts[place] = one.squares[first], one.counts[first]


def _gather(
    array: Array, stored: Mapping[str, ActivationSums], shapes: Mapping[str, tuple[int, ...]]
) -> tuple[torch.Tensor, torch.Tensor] | None:
    """The sums of an array's columns, matrix by matrix, as its first row says; None if nothing was seen of it."""
    matrices = prod(array.shape[:-2])
    squares, counts = [], []
    for matrix in range(matrices):
        box, row = _box_of(array, matrix * array.shape[-2])
        sums = stored.get(box.tensor)
        if sums is None or sums.turned != box.turned:
            return None
        shape = shapes[box.tensor]
        if box.turned:
            rows = _numbers(box.rows)
            place = int(rows[0]) // shape[-2]
            squares.append(sums.squares[place][rows - place * shape[-2]])
        else:
            place = int(_numbers(box.rows)[row]) // shape[-2] if len(shape) > 2 else 0
            squares.append(sums.squares[place][_numbers(box.columns)])
        counts.append(sums.counts[place])
    return torch.stack(squares), torch.stack(counts)


def _box_of(array: Array, row: int) -> tuple[Box, int]:
    """The box that holds a row, and which of the box's rows that is."""
    for box in array.boxes:
        if row < box.height:
            return box, row
        row -= box.height
    raise IndexError(row)


def _numbers(strided: Strided) -> torch.Tensor:
    found = torch.tensor([strided.at])
    for size, stride in zip(strided.sizes, strided.strides, strict=True):
        found = (found[:, None] + torch.arange(size) * stride).reshape(-1)
    return found
