"""Names of one layout in a checkpoint of another: where the rows of a module lie that the base calls otherwise.

Every family's table goes both ways. A name that is not in the base is looked up as the original of some parts, and as a part of
some original; what is found there may again be a name of another layout (XLabs' names over fused rows). Names that two tables
read differently stand for nothing.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property, lru_cache

from adapterkit.adapters.families import flux, image, stable, video
from adapterkit.adapters.families.row import Pattern, PipelineFamily, SharedRows, keyed
from adapterkit.adapters.layout import Layout, UnmappableError, cat, rearranged, transpose, whole

FAMILIES: tuple[PipelineFamily, ...] = (*flux.FAMILIES, *video.FAMILIES, *image.FAMILIES, *stable.FAMILIES)

# Where a denoiser lies in a checkpoint of one file, or how a trainer leads its names.
DENOISER = ("model.diffusion_model.", "diffusion_model.", "transformer.", "unet.", "net.", "model.")
# Where text encoders lie in a checkpoint of one file, by the part of a pipeline that they are.
ENCODERS: Mapping[str, tuple[str, ...]] = {
    "te1": (
        "conditioner.embedders.0.transformer.",
        "cond_stage_model.transformer.",
        "cond_stage_model.model.",
        "text_encoders.clip_l.transformer.",
    ),
    "te2": (
        "conditioner.embedders.1.model.",
        "conditioner.embedders.0.model.",
        "text_encoders.clip_g.transformer.",
    ),
    "te3": ("text_encoders.t5xxl.transformer.",),
}
LEADS = (*DENOISER, *(lead for leads in ENCODERS.values() for lead in leads))
_LONGEST = tuple(sorted(LEADS, key=len, reverse=True))
LONGEST = 500  # characters; a longer name is of no table
DEPTH = 3  # tables between a name and the base's, at most


@dataclass(frozen=True)
class TableEntry:
    """A place in a table: a row, its part (None: the original), the endings of its parameter, and any path below."""

    family: PipelineFamily
    row: SharedRows
    part: int | None
    leaves: tuple[str, str]
    pattern: Pattern


@lru_cache(maxsize=1)
def index() -> tuple[dict[str, list[TableEntry]], dict[str, list[TableEntry]]]:
    """Every name of every table by its key: whole parameters, and the starts of open ones."""
    exact: dict[str, list[TableEntry]] = {}
    starts: dict[str, list[TableEntry]] = {}
    for family in FAMILIES:
        for row in family.rows:
            for part, text in ((None, row.original), *enumerate(row.parts)):
                pattern = Pattern(text)
                if pattern.open:
                    starts.setdefault(pattern.key, []).append(TableEntry(family, row, part, ("", ""), pattern))
                    continue
                for leaves in row.leaves:
                    name = Pattern(text + leaves[0 if part is None else 1])
                    exact.setdefault(name.key, []).append(TableEntry(family, row, part, leaves, name))
    return exact, starts


def entries(name: str) -> Iterator[tuple[TableEntry, tuple[int, ...], str]]:
    """The places of a parameter in the tables, with its block numbers and the path below an open pattern."""
    if len(name) > LONGEST:
        return
    exact, starts = index()
    key, numbers = keyed(name)
    for entry in exact.get(key, ()):
        captures = entry.pattern.captures(numbers)
        if captures is not None:
            yield entry, captures, ""
    parts = name.split(".")
    for end in range(1, len(parts)):
        head = ".".join(parts[:end])
        key, numbers = keyed(head)
        for entry in starts.get(key, ()):
            captures = entry.pattern.captures(numbers)
            if captures is not None:
                yield entry, captures, name[len(head) :]


def bare(path: str) -> str:
    """A module's path without what leads it in a checkpoint."""
    return path.removeprefix(next((lead for lead in _LONGEST if path.startswith(lead)), ""))


def named(entry: TableEntry, part: int | None, captures: tuple[int, ...], rest: str) -> str:
    """The parameter of a row's original, or of a part, that a place belongs to."""
    text = entry.row.original if part is None else entry.row.parts[part]
    return Pattern(text).fill(captures, rest) + entry.leaves[0 if part is None else 1]


def others(name: str) -> Iterator[str]:
    """What other layouts call a parameter, or what it is a part of, or its parts; aliases of other trainers too."""
    for entry, captures, rest in entries(name):
        if entry.part is None:
            yield from (named(entry, part, captures, rest) for part in range(len(entry.row.parts)))
        else:
            yield named(entry, None, captures, rest)


class FamilyNames:
    """The parameters of a checkpoint under the names of other layouts.

    Args:
        shapes: of every tensor by its name.
        said: diffusers' class in the config; empty where it names none.
    """

    def __init__(self, shapes: Mapping[str, tuple[int, ...]], said: str = "") -> None:
        self._shapes = shapes
        self._said = said
        self._families: dict[str, PipelineFamily | None] = {}

    @cached_property
    def leads(self) -> tuple[str, ...]:
        """What stands before the names of the base, as far as these are leads of a model."""
        found = [lead for lead in LEADS if any(name.startswith(lead) for name in self._shapes)]
        return tuple(sorted(found, key=len, reverse=True))

    def lead_of(self, name: str) -> str:
        """The lead of a tensor's name; empty where it has none."""
        return next((lead for lead in self.leads if name.startswith(lead)), "")

    def find(self, parameter: str) -> Layout | None:
        """Where a parameter of another layout is stored; None if nowhere or unclear."""
        own = self.lead_of(parameter)
        places = [(own, parameter.removeprefix(own))] if own else []
        # The names of a model of one part may be led by anything; what is trained is mostly led by its part.
        cores = [parameter, *(parameter.removeprefix(lead) for lead in LEADS if parameter.startswith(lead))]
        places += [(lead, core) for lead in (*self.leads, "") for core in cores]
        found: dict[object, Layout] = {}
        for lead, core in places:
            for layout in self._resolve(lead, core, ()):
                found[layout.pieces] = layout
            if found and lead == own != "":
                break
        return next(iter(found.values())) if len(found) == 1 else None

    def laid(self, lead: str, core: str) -> Layout | None:
        """Where a parameter of another layout is stored under this lead; None if nowhere or unclear."""
        found = self._resolve(lead, core, ())
        return found[0] if len(found) == 1 else None

    def aliases(self) -> Iterator[tuple[str, str]]:
        """Names of modules in other layouts, without a lead, and the same with the lead of the base."""
        done: set[str] = set()
        for name in self._shapes:
            lead = self.lead_of(name)
            core = name.removeprefix(lead)
            for other in (core, *others(core)):
                module = other.rpartition(".")[0]
                if lead + module not in done and module:
                    done.add(lead + module)
                    yield module, lead + module

    def _resolve(self, lead: str, core: str, seen: tuple[str, ...]) -> list[Layout]:
        name = lead + core
        if name in self._shapes:
            shape = self._shapes[name]
            return [whole(name, shape, min(1, len(shape)))]
        if core in seen or len(seen) >= DEPTH:
            return []
        found: dict[object, Layout] = {}
        own: dict[object, Layout] = {}
        for entry, captures, rest in entries(core):
            try:
                layout = self._by(entry, captures, rest, lead, (*seen, core))
            except UnmappableError:
                continue
            if layout is not None:
                (own if entry.family is self._family(lead) else found)[layout.pieces] = layout
        return list((own or found).values())

    def family_at(self, parameter: str) -> PipelineFamily | None:
        """The family of the model that a parameter or module of the base lies in: by its class, or else its names."""
        said = next((family for family in FAMILIES if self._said in family.classes), None)
        return said or self._family(self.lead_of(parameter))

    def _family(self, lead: str) -> PipelineFamily | None:
        """The family of what has this lead: where two tables differ, its own counts."""
        if lead not in self._families:
            names = [name for name in self._shapes if name.startswith(lead)]
            told = family_of(names)
            self._families[lead] = None if told is None else told[0]
        return self._families[lead]

    def _by(
        self, entry: TableEntry, captures: tuple[int, ...], rest: str, lead: str, seen: tuple[str, ...]
    ) -> Layout | None:
        row = entry.row
        if entry.part is None:
            parts = []
            for number in range(len(row.parts)):
                found = self._resolve(lead, named(entry, number, captures, rest), seen)
                if len(found) != 1 or not found[0].shape:
                    return None
                parts.append(found[0])
            joined = parts[0] if len(parts) == 1 else cat(parts, 0)
            return _turned(row, _swapped(row, joined, self._width(row, captures, rest, lead)))
        found = self._resolve(lead, named(entry, None, captures, rest), seen)
        if len(found) != 1 or not found[0].shape:
            return None
        layout = _swapped(row, _turned(row, found[0]), self._width(row, captures, rest, lead))
        if len(row.parts) == 1:
            return layout
        sizes = self._sizes(row, captures, lead, layout)
        start, size = sum(sizes[: entry.part]), sizes[entry.part]
        if size < 1 or min(sizes) < 0 or sum(sizes) != layout.shape[0]:
            raise UnmappableError
        return rearranged((size, *layout.shape[1:]), layout.lead, [(layout, start, 1, size)])

    def _width(self, row: SharedRows, captures: tuple[int, ...], rest: str, lead: str) -> int:
        """The inputs of a row's weight, which are as many as the model is wide; 0 where the base has none."""
        names = (Pattern(text).fill(captures, rest) + ".weight" for text in (row.original, *row.parts))
        shapes = (self._shapes.get(lead + name, ()) for name in names)
        return next((shape[1] for shape in shapes if len(shape) > 1), 0)

    def _sizes(self, row: SharedRows, captures: tuple[int, ...], lead: str, layout: Layout) -> list[int]:
        """How many rows each part of an original has."""
        rows, count = layout.shape[0], len(row.parts)
        if row.share == "equal":
            return [rows // count] * count
        wide = self._shapes.get(lead + Pattern(row.wide + ".weight").fill(captures, "")) if row.wide else None
        own = self._shapes.get(lead + Pattern(row.original + row.leaves[0][0]).fill(captures, ""))
        width = wide[0] if wide else own[1] if own and len(own) > 1 else 0
        if row.share == "width":
            return [width] * (count - 1) + [rows - (count - 1) * width]
        return [width, *[(rows - width) // (count - 1)] * (count - 1)]


def _swapped(row: SharedRows, layout: Layout, width: int) -> Layout:
    """The same rows with the halves changed; ``width`` is that of the model, 0 where it is unknown."""
    if not row.swap:
        return layout
    rows = layout.shape[0]
    if row.swap == "pair" and not width:
        raise UnmappableError
    if row.swap == "pair" and rows != 2 * width:
        return layout
    if rows % 2:
        raise UnmappableError
    half = rows // 2
    return rearranged(layout.shape, layout.lead, [(layout, half, 1, half), (layout, 0, 1, half)])


def _turned(row: SharedRows, layout: Layout) -> Layout:
    return transpose(layout, 0, 1) if row.turned else layout


def family_of(names: Iterable[str]) -> tuple[PipelineFamily, str] | None:
    """The family of a model or an adapter by the names of its parameters or modules, and its layout.

    Returns:
        The family, and ``original`` or ``diffusers``; None where no family's own names are among them. Of several, the
        one whose tables have most of the names.
    """
    cores: dict[str, set[tuple[int, ...]]] = {}
    for name in names:
        if len(name) > LONGEST:
            continue
        lead = next((one for one in _LONGEST if name.startswith(one)), "")
        core = name.removeprefix(lead)
        for text in (core, core.rpartition(".")[0]):
            key, numbers = keyed(text)
            cores.setdefault(key, set()).add(numbers)
    best: tuple[int, PipelineFamily, str] | None = None
    for family, layout, marks, exact, starts in _layouts():
        if not any(_marked(mark, cores) for mark in marks):
            continue
        count = len(cores.keys() & exact) + sum(any(key.startswith(start + ".") for key in cores) for start in starts)
        count += sum(_marked(mark, cores) for mark in marks)
        if best is None or count > best[0]:
            best = (count, family, layout)
    return None if best is None else (best[1], best[2])


@lru_cache(maxsize=1)
def _layouts() -> tuple[tuple[PipelineFamily, str, tuple[Pattern, ...], frozenset[str], frozenset[str]], ...]:
    """Every family's two layouts: the names that only it has, those of its table, and the starts of open ones."""
    found = []
    for family in FAMILIES:
        for layout, marks in (("original", family.original), ("diffusers", family.diffusers)):
            texts = [
                (text, row) for row in family.rows for text in ([row.original] if layout == "original" else row.parts)
            ]
            exact = {Pattern(text).key for text, _ in texts if not Pattern(text).open}
            exact |= {
                Pattern(text + leaves[layout != "original"]).key
                for text, row in texts
                for leaves in row.leaves
                if not Pattern(text).open
            }
            starts = {Pattern(text).key for text, _ in texts if Pattern(text).open}
            own = tuple(Pattern(mark) for mark in marks)
            found.append((family, layout, own, frozenset(exact), frozenset(starts)))
    return tuple(found)


def _marked(pattern: Pattern, cores: Mapping[str, set[tuple[int, ...]]]) -> bool:
    return any(pattern.captures(numbers) is not None for numbers in cores.get(pattern.key, ()))
