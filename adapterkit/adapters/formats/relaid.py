"""LoRA factors of one layout under the names of the other: rows of B cut, joined, or with halves changed.

``delta = s B A``. A module that is cut into parts gives each the same A and its own rows of B. Parts that become one module
stand side by side: their A below each other, their B on a block diagonal, so that the rank is the sum of theirs and the
product is the same, bit for bit.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from adapterkit.adapters.families.names import TableEntry, bare, entries, named
from adapterkit.adapters.families.told import called, names_of, told_family
from adapterkit.adapters.formats.plain import PlainFactors
from adapterkit.adapters.formats.views import FunctionTensor
from adapterkit.dtypes import F32
from adapterkit.errors import UnsupportedAdapter, option

if TYPE_CHECKING:
    import torch

    from adapterkit.adapters.families.row import PipelineFamily, SharedRows
    from adapterkit.checkpoint.tensor import Tensor

Rows = Callable[[str], int | None]
END = ".weight"


@dataclass(frozen=True)
class TrainedOn:
    """What an adapter says of the model that it was trained on.

    Attributes:
        ref: what to call it in an error.
        said: names of the model or its architecture.
        class_name: diffusers' class.
    """

    ref: str = "the adapter"
    said: tuple[str, ...] = ()
    class_name: str = ""


def family_for(factors: Sequence[PlainFactors], layout: str, origin: TrainedOn) -> tuple[PipelineFamily | None, str]:
    """The family of an adapter without a base, and a sentence where its names alone did not tell.

    Raises:
        UnsupportedAdapter: several families have these names, call the modules otherwise in this layout, and nothing says
            which it is.
    """
    modules = {one.path: (one.stored[1].shape[0], one.stored[0].shape[1]) for one in factors}
    found, why = told_family(modules, layout, origin.said, origin.class_name)
    if len(found) > 1:
        odd = next(path for path in map(bare, modules) if len({called(family, path, layout) for family in found}) > 1)
        raise UnsupportedAdapter(
            f"{origin.ref}: '{odd}' may be of {names_of(found)}, whose {layout} layouts call it differently",
            f"add {option('base', 'BASE')}",
        )
    if not found:
        return None, ""
    return found[0], f"{origin.ref} is read as {found[0].name} by {why}" if why else ""


def relaid(
    factors: Sequence[PlainFactors],
    layout: str,
    family: PipelineFamily | None,
    rows_of: Rows = lambda path: None,
) -> list[PlainFactors]:
    """The factors under the names of a layout, without leads.

    Args:
        layout: ``original`` or ``diffusers``.
        family: whose names they have; None where they are of no family, and keep them.
        rows_of: how many rows a module of the base has; None where no base is known.

    Raises:
        UnsupportedAdapter: modules become one, and nothing says how many rows those have that the adapter leaves alone.
    """
    plain = [replace(one, path=bare(one.path)) for one in factors]
    if family is None:
        return plain
    held = {one.path: one for one in plain}
    found: list[PlainFactors] = []
    for one in plain:
        entry = _entry(one.path, family, lambda entry: entry.part is None)
        wanted = entry is not None and (layout == "diffusers" or entry[0].row.alias)
        found += _cut(one, *entry, held) if wanted and entry is not None else [one]
    return _stacked(found if layout == "diffusers" else _joined(found, family, rows_of))


def _entry(
    path: str, family: PipelineFamily, fits: Callable[[TableEntry], bool]
) -> tuple[TableEntry, tuple[int, ...], str] | None:
    places = [place for place in entries(path + END) if fits(place[0]) and place[0].family is family]
    own = [place for place in places if not place[0].row.alias]
    return min(own or places, key=lambda place: len(place[1]), default=None)


def _path(entry: TableEntry, part: int | None, captures: tuple[int, ...], rest: str) -> str:
    return named(entry, part, captures, rest).removesuffix(END)


def _cut(
    one: PlainFactors, entry: TableEntry, captures: tuple[int, ...], rest: str, held: dict[str, PlainFactors]
) -> list[PlainFactors]:
    """One module of the original layout as its parts."""
    row, (a, b) = entry.row, one.stored
    if one.embedding or row.turned:
        raise UnsupportedAdapter(f"{one.path} has another shape in the other layout", "merge it, and convert the model")
    if len(row.parts) == 1:
        return [_made(one, _path(entry, 0, captures, rest), a, _turned_halves(row, one), b)]
    _check_matrices([one])
    sizes = _sizes(row, captures, b.shape[0], a.shape[1], held)
    found, start = [], 0
    for part, size in enumerate(sizes):
        if size:
            whole = (start, size) == (0, b.shape[0])
            cut = None if whole else _slice(start, start + size)
            found.append(_made(one, _path(entry, part, captures, rest), a, cut, b, size))
        start += size
    return found


def _check_matrices(several: Sequence[PlainFactors]) -> None:
    """
    Raises:
        UnsupportedAdapter: a convolution becomes several modules, or a part of one.
    """
    deep = next((one.path for one in several if len(one.stored[0].shape) > 2), None)
    if deep is not None:
        raise UnsupportedAdapter(
            f"{deep} is a convolution, whose rows lie elsewhere in the other layout", "merge it, and convert the model"
        )


def _sizes(
    row: SharedRows, captures: tuple[int, ...], rows: int, columns: int, held: dict[str, PlainFactors]
) -> list[int]:
    count = len(row.parts)
    if row.share == "equal":
        sizes = [rows // count] * count
    else:
        beside = held.get(row.wide.format(*captures)) if row.wide else None
        width = columns if beside is None else beside.stored[1].shape[0]
        rest = rows - width * (count - 1 if row.share == "width" else 1)
        sizes = (
            [width] * (count - 1) + [rest] if row.share == "width" else [width, *[rest // (count - 1)] * (count - 1)]
        )
    if sum(sizes) != rows or min(sizes) < 0:
        raise UnsupportedAdapter(
            f"{row.original.format(*captures)} of {rows} rows cannot be shared by {count} modules",
            "merge it, and convert the model",
        )
    return sizes


def _slice(start: int, stop: int) -> Callable[[torch.Tensor], torch.Tensor]:
    return lambda b: b[start:stop]


def _turned_halves(row: SharedRows, one: PlainFactors) -> Callable[[torch.Tensor], torch.Tensor] | None:
    rows, columns = one.stored[1].shape[0], one.stored[0].shape[1]
    if not row.swap or (row.swap == "pair" and rows != 2 * columns):
        return None
    return lambda b: b.roll(rows // 2, 0)


def _made(
    one: PlainFactors,
    path: str,
    a: Tensor,
    change: Callable[[torch.Tensor], torch.Tensor] | None,
    b: Tensor,
    rows: int | None = None,
) -> PlainFactors:
    if change is None:
        return replace(one, path=path)
    shape = (b.shape[0] if rows is None else rows, *b.shape[1:])

    def make() -> torch.Tensor:
        return change(_read(b)).contiguous()

    return _factors(path, one.rank, one.scale, a, FunctionTensor(b.name, b.dtype, shape, make, "rows of B", b.nbytes))


def _read(tensor: Tensor) -> torch.Tensor:
    return tensor.read(0, tensor.numel).view(tensor.shape)


def _factors(path: str, rank: int, scale: float, a: Tensor, b: Tensor) -> PlainFactors:
    return PlainFactors(path, rank, scale, lambda: (_read(a), _read(b)), (a, b))


def _joined(factors: Sequence[PlainFactors], family: PipelineFamily, rows_of: Rows) -> list[PlainFactors]:
    """Parts of diffusers as modules of the original layout."""
    found: list[PlainFactors] = []
    groups: dict[str, tuple[TableEntry, tuple[int, ...], str, dict[int, PlainFactors]]] = {}
    for one in factors:
        place = _entry(one.path, family, lambda entry: entry.part is not None and not entry.row.alias)
        if place is None:
            found.append(one)
            continue
        entry, captures, rest = place
        name = _path(entry, None, captures, rest)
        if len(entry.row.parts) == 1:
            found.append(_made(one, name, one.stored[0], _turned_halves(entry.row, one), one.stored[1]))
            continue
        parts = groups.setdefault(name, (entry, captures, rest, {}))[3]
        number = entry.part or 0
        parts[number] = _together([parts[number], one]) if number in parts else one
    return [*found, *(_fused(name, *one, rows_of) for name, one in groups.items())]


def _stacked(factors: Sequence[PlainFactors]) -> list[PlainFactors]:
    """One for each module: what several adapters add to it under names of both layouts is added up."""
    found: dict[str, list[PlainFactors]] = {}
    for one in factors:
        found.setdefault(one.path, []).append(one)
    return [_together(several) for several in found.values()]


def _together(several: Sequence[PlainFactors]) -> PlainFactors:
    """The sum of factors of one module: their A below each other, their B side by side with the scale in it."""
    first, *others = several
    if not others:
        return first
    if any(one.embedding or one.turned for one in several):
        raise UnsupportedAdapter(
            f"{first.path} is named twice, in two layouts", "convert one adapter first, then combine"
        )
    a, b = first.stored
    rank = sum(one.rank for one in several)

    def make_a() -> torch.Tensor:
        import torch

        return torch.cat([_read(one.stored[0]).float() for one in several])

    def make_b() -> torch.Tensor:
        import torch

        return torch.cat([_read(one.stored[1]).float() * one.scale for one in several], 1)

    nbytes = sum(tensor.nbytes for one in several for tensor in one.stored)
    made_a = FunctionTensor(a.name, F32, (rank, *a.shape[1:]), make_a, "A of several", nbytes)
    made_b = FunctionTensor(b.name, F32, (b.shape[0], rank, *b.shape[2:]), make_b, "B of several", nbytes)
    return _factors(first.path, rank, 1.0, made_a, made_b)


def _fused(
    name: str,
    entry: TableEntry,
    captures: tuple[int, ...],
    rest: str,
    parts: dict[int, PlainFactors],
    rows_of: Rows,
) -> PlainFactors:
    row, first = entry.row, next(iter(parts.values()))
    _check_matrices(list(parts.values()))
    columns = first.stored[0].shape[1]
    rows = []
    for number in range(len(row.parts)):
        size: int | None
        if number in parts:
            size = parts[number].stored[1].shape[0]
        elif row.share == "equal":
            size = first.stored[1].shape[0]
        elif number == 0 or (row.share == "width" and number < len(row.parts) - 1):
            size = columns
        elif row.share == "grouped" and {1, 2} & parts.keys():
            size = parts[next(iter({1, 2} & parts.keys()))].stored[1].shape[0]
        else:
            size = rows_of(_path(entry, number, captures, rest))
        if size is None:
            part = _path(entry, number, captures, rest)
            raise UnsupportedAdapter(
                f"{name} also holds {part}, which the adapter leaves alone, so its rows are not known",
                f"add {option('base', 'BASE')}",
            )
        rows.append(size)
    rank = sum(one.rank for one in parts.values())
    same = len({one.scale for one in parts.values()}) == 1
    kind = first.stored[0].dtype if len({one.stored[0].dtype for one in parts.values()}) == 1 else F32
    kind_b = first.stored[1].dtype if same and kind is first.stored[0].dtype else F32

    def make_a() -> torch.Tensor:
        import torch

        return torch.cat([_read(parts[number].stored[0]).to(kind.torch) for number in sorted(parts)])

    def make_b() -> torch.Tensor:
        import torch

        out = torch.zeros(sum(rows), rank, dtype=kind_b.torch)
        at = 0
        for number in sorted(parts):
            one = parts[number]
            b = _read(one.stored[1])
            start = sum(rows[:number])
            out[start : start + len(b), at : at + one.rank] = b if same else b.float() * one.scale
            at += one.rank
        return out

    nbytes = sum(tensor.nbytes for one in parts.values() for tensor in one.stored)
    a = FunctionTensor(first.stored[0].name, kind, (rank, columns), make_a, "A of parts", nbytes)
    b = FunctionTensor(first.stored[1].name, kind_b, (sum(rows), rank), make_b, "B of parts", nbytes)
    return _factors(name, rank, first.scale if same else 1.0, a, b)
