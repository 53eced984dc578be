"""A checkpoint in the layout of another one: the same model saved under other names, or with experts in another stack."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING

from adapterkit.adapters.merged import StoredWeights
from adapterkit.adapters.names import Names
from adapterkit.adapters.target import Piece, Target
from adapterkit.checkpoint.tensor import BLOCK, Renamed, Tensor

if TYPE_CHECKING:
    from collections.abc import Mapping

    import torch

    from adapterkit.checkpoint.checkpoint import Checkpoint


class Realigned(Tensor):
    """A tensor of one layout, read from the tensors of another: parameter by parameter, row by row.

    Args:
        name, shape: as in the layout that is wanted.
        pieces: for each parameter that lies in the tensor, where it does (its pieces in that tensor) and where its rows
            are in the other layout.
    """

    def __init__(
        self, name: str, shape: tuple[int, ...], pieces: list[tuple[Piece, Target]], tensors: Mapping[str, Tensor]
    ) -> None:
        self.name, self.shape, self._pieces, self._tensors = name, shape, pieces, tensors
        self.dtype = tensors[pieces[0][1].pieces[0].tensor].dtype
        self._columns = pieces[0][1].matrix[1]

    @property
    def block(self) -> int:
        return max(1, BLOCK // self._columns) * self._columns

    @property
    def how(self) -> str:
        return self._tensors[self._pieces[0][1].tensors[0]].how

    @property
    def reads(self) -> int:
        return sum(self._tensors[name].reads for name in {n for _, target in self._pieces for n in target.tensors})

    def read(self, start: int, stop: int) -> torch.Tensor:
        import torch

        columns = self._columns
        low, high = start // columns, -(-stop // columns)
        out = torch.zeros(high - low, columns)
        for piece, target in self._pieces:
            # The rows of the piece that lie in low:high.
            rows = range(
                max(0, -((piece.at - low) // piece.at_step)), min(piece.count, -((piece.at - high) // piece.at_step))
            )
            if not rows:
                continue
            first = piece.row + rows[0] * piece.row_step
            last = piece.row + rows[-1] * piece.row_step
            found = StoredWeights(target, self._tensors).read(first, last + 1)[:: piece.row_step]
            at = piece.at + rows[0] * piece.at_step - low
            out[at : at + (len(rows) - 1) * piece.at_step + 1 : piece.at_step] = found
        return out.view(-1)[start - low * columns : stop - low * columns].to(self.dtype.torch)


def aligned(found: Checkpoint, wanted: Checkpoint) -> Checkpoint:
    """``found`` with the names and stacks of ``wanted``, as far as the rules of the architecture bring them together.

    What cannot be brought together keeps its own name.
    """
    if found.tensors.keys() == wanted.tensors.keys():
        return found
    lacking = [name for name in wanted if name not in found]
    spare = {name for name in found if name not in wanted}
    if not lacking or not spare:
        return found
    mine, theirs = Names(wanted.shapes, wanted.config), Names(found.shapes, found.config)
    places = _places(mine, set(lacking))
    tensors: dict[str, Tensor] = {}
    used: set[str] = set()
    for name, tensor in wanted.items():
        if name in found:
            tensors[name] = found[name]
            continue
        other = _other(name, tensor, places.get(name, []), theirs, found)
        if other is not None:
            tensors[name] = other[0]
            used |= other[1]
    tensors |= {name: found[name] for name in found if name not in tensors and name not in used}
    return replace(found, tensors=tensors)


def _places(names: Names, wanted: set[str]) -> dict[str, list[tuple[str, Target]]]:
    """For each tensor, the parameters that lie in it."""
    found: dict[str, list[tuple[str, Target]]] = {}
    for parameter in names.parameters():
        target = names.find(parameter)
        for tensor in target.tensors if target is not None else ():
            if tensor in wanted and target is not None:
                found.setdefault(tensor, []).append((parameter, target))
    return found


def _other(
    name: str, tensor: Tensor, places: list[tuple[str, Target]], theirs: Names, found: Checkpoint
) -> tuple[Tensor, set[str]] | None:
    """The tensor called ``name`` in the other checkpoint, and the tensors there that hold it."""
    pieces: list[tuple[Piece, Target]] = []
    used: set[str] = set()
    for parameter, target in places or [(name, Target(name, tensor.shape, (Piece(name, 0),)))]:
        other = theirs.find(parameter)
        if other is None or (places and other.matrix != target.matrix):
            return None
        used |= set(other.tensors)
        whole = other.pieces[0]
        if len(other.pieces) == 1 and not whole.transposed and found[whole.tensor].shape == tensor.shape:
            return Renamed(name, found[whole.tensor]), used
        if any(piece.transposed for piece in target.pieces if piece.tensor == name):
            return None
        pieces += [(piece, other) for piece in target.pieces if piece.tensor == name]
    return (Realigned(name, tensor.shape, pieces, found.tensors), used) if places else None
