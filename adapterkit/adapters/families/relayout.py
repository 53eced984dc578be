"""A whole denoiser from diffusers' layout to the one of the model's own code, and back: a view, row by row.

Each tensor of the new layout is looked up in the family's table as an adapter's module is, so one table serves both. What no
row names has one name in both layouts. Every row of every stored tensor is used once, or nothing is converted.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from adapterkit.adapters.families.names import DENOISER, FamilyNames, TableEntry, entries, family_of, named
from adapterkit.adapters.layout import Layout, whole
from adapterkit.adapters.target import Target
from adapterkit.checkpoint.tensor import Renamed, Tensor
from adapterkit.errors import CheckpointError, UsageError

if TYPE_CHECKING:
    import torch

    from adapterkit.adapters.families.row import PipelineFamily
    from adapterkit.checkpoint.checkpoint import Checkpoint

ORIGINAL, DIFFUSERS = "original", "diffusers"


@dataclass(frozen=True)
class Relaid:
    """A denoiser in another layout.

    Attributes:
        family: which it is.
        tensors: by their new names, without a lead.
        left: tensors of the file that are no part of the denoiser.
        dropped: tensors that the other layout does not store.
    """

    family: PipelineFamily
    tensors: Mapping[str, Tensor]
    left: tuple[str, ...] = ()
    dropped: tuple[str, ...] = ()


class Rearranged(Tensor):
    """Rows of stored tensors, put together in another order."""

    def __init__(self, name: str, layout: Layout, stored: Mapping[str, Tensor]) -> None:
        pieces = layout.pieces
        inputs = [stored[piece.tensor] for piece in pieces]
        self.name, self.dtype, self.shape = name, inputs[0].dtype, layout.shape
        self._target = Target(name, layout.shape, pieces)
        self._stored = {piece.tensor: tensor for piece, tensor in zip(pieces, inputs, strict=True)}

    @property
    def reads(self) -> int:
        return self.nbytes

    @property
    def how(self) -> str:
        return "rows in another order"

    def read(self, start: int, stop: int) -> torch.Tensor:
        from adapterkit.adapters.merged import StoredWeights
        from adapterkit.dtypes import F32, F64

        columns = self._target.matrix[1]
        first, last = start // columns, -(-stop // columns)
        weights = StoredWeights(self._target, self._stored)
        # Wide enough for every floating dtype, so nothing is rounded.
        rows = weights.read_as(first, last, F64 if self.dtype is F64 else F32)
        return rows.reshape(-1)[start - first * columns : stop - first * columns].to(self.dtype.torch)

    def release(self) -> None:
        for tensor in self._stored.values():
            tensor.release()


def relaid(model: Checkpoint, to: str, ref: str = "") -> Relaid:
    """The denoiser of a checkpoint in the layout ``to``.

    Args:
        model: floating weights; one component, or a file with several parts of a pipeline.
        to: `ORIGINAL` or `DIFFUSERS`.
        ref: what to call it in errors.

    Raises:
        UsageError: it is of no family that has two layouts, or in this layout already.
        CheckpointError: a module lacks a part, or a row would be used twice or not at all.
    """
    ref = ref or model.ref
    lead = _lead(model.tensors)
    held = {name: tensor for name, tensor in model.tensors.items() if name.startswith(lead)}
    left = tuple(name for name in model.tensors if name not in held)
    told = family_of(held)
    if told is None:
        raise UsageError(
            f"{ref} is of no family whose original and diffusers layouts are known",
            "convert models of images and video",
        )
    family, layout = told
    said = str(model.config.get("_class_name") or family.classes[0])
    if said not in family.classes:
        raise UsageError(f"{ref} is a {said}, whose two layouts are not in a table", "convert models that have one")
    if not family.whole:
        raise UsageError(
            f"{ref} is {family.name}, of which the table has what adapters train and not the whole model",
            "convert its adapters; merges go into either layout",
        )
    cores = [name.removeprefix(lead) for name in held]
    if layout == to and any(_places(core, family, DIFFUSERS if to == ORIGINAL else ORIGINAL) for core in cores):
        raise UsageError(f"{ref} has the {to} layout already ({family.name})", "copy it")
    if to == ORIGINAL and family.only_original:
        raise UsageError(
            f"the original layout of {family.name} also holds {', '.join(family.only_original)}, which diffusers has not",
            "convert from the original to diffusers; merges go into either layout",
        )
    dropped = tuple(lead + name for name in family.only_original if lead + name in held)
    held = {name: tensor for name, tensor in held.items() if name not in dropped}
    shapes = {name: tensor.shape for name, tensor in held.items()}
    names = FamilyNames(shapes)
    found: dict[str, Tensor] = {}
    used: Counter[str] = Counter()
    for name, tensor in held.items():
        core = name.removeprefix(lead)
        for other in _called(core, family, to, cores):
            if other in found:
                continue
            place = whole(name, tensor.shape, min(1, len(tensor.shape))) if other == core else names.laid(lead, other)
            if place is None:
                raise CheckpointError(
                    f"{ref}: '{other}' of {family.name} cannot be put together from '{name}' and what lies beside it",
                    "a part is missing, or has other rows than the family's",
                )
            found[other] = _handle(other, place, held)
            for piece in place.pieces:
                used[piece.tensor] += piece.count * (piece.columns or _columns(place))
    wrong = next((name for name, tensor in held.items() if used[name] != tensor.numel), None)
    if wrong is not None:
        raise CheckpointError(
            f"{ref}: '{wrong}' holds {held[wrong].numel:,} values, of which the {to} layout takes {used[wrong]:,}",
            f"it is no plain {family.name}; report the model",
        )
    return Relaid(family, found, left, dropped)


def _lead(names: Mapping[str, Tensor]) -> str:
    """What stands before the names of the denoiser: the lead with the most tensors of a family."""
    best = ("", -1)
    for lead in ("", *DENOISER):
        own = [name.removeprefix(lead) for name in names if name.startswith(lead)]
        told = family_of(own) if own else None
        plain = sum(1 for name in own if any(True for _ in entries(name)))
        if told is not None and plain > best[1]:
            best = (lead, plain)
    return best[0]


def _places(core: str, family: PipelineFamily, to: str) -> list[tuple[TableEntry, tuple[int, ...], str]]:
    """Where a tensor is in the family's table, as what becomes another in the layout ``to``."""
    places = [one for one in entries(core) if one[0].family is family and (one[0].part is None) == (to == DIFFUSERS)]
    own = [one for one in places if not one[0].row.alias] or places
    # A row for one block counts more than that for all of them.
    fewest = min((len(captures) for _, captures, _ in own), default=0)
    return [one for one in own if one[2] or len(one[1]) == fewest]


def _called(core: str, family: PipelineFamily, to: str, cores: Sequence[str]) -> list[str]:
    """The names that a tensor, or its parts or its whole, have in the other layout."""
    places = _places(core, family, to)
    found = []
    # A name that a row has exactly is not one of what lies below another.
    for entry, captures, rest in [one for one in places if not one[2]] or places:
        if to == ORIGINAL and entry.row.when:
            start = entry.row.when.removeprefix("-")
            if any(one.startswith(start) for one in cores) == entry.row.when.startswith("-"):
                continue
        parts = range(len(entry.row.parts)) if to == DIFFUSERS else (None,)
        found += [named(entry, part, captures, rest) for part in parts]
    return list(dict.fromkeys(found)) or [core]


def _columns(layout: Layout) -> int:
    count = 1
    for size in layout.shape[layout.lead :]:
        count *= size
    return count


def _handle(name: str, layout: Layout, stored: Mapping[str, Tensor]) -> Tensor:
    """The stored tensor itself where nothing moves, so that its bytes are copied."""
    pieces = layout.pieces
    tensor = stored[pieces[0].tensor]
    first = pieces[0]
    plain = len(pieces) == 1 and (first.at, first.at_step, first.transposed) == (0, 1, False)
    if plain and tensor.shape == layout.shape:
        return Renamed(name, tensor)
    if len({stored[piece.tensor].dtype for piece in pieces}) > 1:
        raise CheckpointError(f"the parts of '{name}' have several dtypes", "convert the model to one dtype first")
    return Rearranged(name, layout, stored)
