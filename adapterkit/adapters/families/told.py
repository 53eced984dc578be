"""Which family an adapter is of where no base is given: by its names, and where several families have these, by more.

A LoRA of a few modules often has names that several families share: ``single_transformer_blocks.0.attn.to_q`` is a module of
Flux.1, Flux.3, HunyuanVideo and AuraFlow. Where all of them call it the same in the layout that is asked for, any of them will
do. Else the metadata of the file and the class in PEFT's config decide, or the sizes and the number of blocks of the published
models (``modules.json``, made by ``tools/make_family_modules.py``). What none of these tells is refused.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from importlib.resources import files
from itertools import product
from typing import TYPE_CHECKING

from adapterkit.adapters.families.names import FAMILIES, TableEntry, bare, entries, named
from adapterkit.adapters.families.row import Pattern, keyed

if TYPE_CHECKING:
    from adapterkit.adapters.families.row import PipelineFamily

WEIGHT = ".weight"
CACHED = 1 << 14  # names
Size = tuple[int, int]  # rows and columns

# Where trainers write what they trained: sd-scripts and musubi-tuner, ai-toolkit, Stability's ModelSpec, PEFT.
SAID = ("modelspec.architecture", "ss_base_model_version", "ss_sd_model_name")
_LONGEST = 300  # characters of one that are looked at


@dataclass(frozen=True)
class Published:
    """A module of the published models of a family.

    Attributes:
        blocks: how many there are at most, by the largest number in its name; 0 where it has none.
        sizes: rows and columns in each.
    """

    blocks: int
    sizes: tuple[Size, ...]


@lru_cache(maxsize=1)
def published() -> Mapping[str, Mapping[str, list[tuple[Pattern, Published]]]]:
    """The modules of every family in diffusers' layout, by their keys."""
    text = (files("adapterkit.adapters.families") / "modules.json").read_text(encoding="utf-8")
    found: dict[str, dict[str, list[tuple[Pattern, Published]]]] = {}
    for family, modules in json.loads(text).items():
        known = found.setdefault(family, {})
        for name, (blocks, *sizes) in modules.items():
            pattern = Pattern(name)
            one = Published(blocks, tuple((rows, columns) for rows, columns in sizes))
            known.setdefault(pattern.key, []).append((pattern, one))
    return found


def module_of(family: PipelineFamily, path: str) -> Published | None:
    """The published module of this name in diffusers' layout; None where the family has none."""
    known = published().get(family.name)
    if known is None:
        return None
    key, numbers = _keyed(path)
    return next((one for pattern, one in known.get(key, ()) if pattern.captures(numbers) is not None), None)


# A name is asked about once for every family.
_keyed = lru_cache(maxsize=CACHED)(keyed)


@lru_cache(maxsize=CACHED)
def _entries(path: str) -> tuple[tuple[TableEntry, tuple[int, ...], str], ...]:
    return tuple(entries(path + WEIGHT))


def _places(family: PipelineFamily, path: str) -> list[tuple[TableEntry, tuple[int, ...], str]]:
    """Where a module is in the family's table."""
    return [place for place in _entries(path) if place[0].family is family]


@lru_cache(maxsize=1)
def _marks() -> Mapping[str, Mapping[str, list[Pattern]]]:
    """The names that every family has alone in a layout, by their keys."""
    found: dict[str, dict[str, list[Pattern]]] = {}
    for family in FAMILIES:
        own = found.setdefault(family.name, {})
        for mark in map(Pattern, (*family.original, *family.diffusers)):
            own.setdefault(mark.key, []).append(mark)
    return found


def _is_marked(family: PipelineFamily, path: str) -> bool:
    key, numbers = _keyed(path)
    return any(mark.captures(numbers) is not None for mark in _marks()[family.name].get(key, ()))


def knows(family: PipelineFamily, path: str) -> bool:
    """Whether a family has a module of this name in one of its layouts."""
    return module_of(family, path) is not None or bool(_places(family, path)) or _is_marked(family, path)


def called(family: PipelineFamily, path: str, layout: str) -> tuple[object, ...]:
    """What a module of this family becomes in a layout: its names there, and which of its rows they are."""
    places = _places(family, path)
    to_diffusers = layout == "diffusers"
    fitting = [place for place in places if place[0].part is None and (to_diffusers or place[0].row.alias)]
    if not to_diffusers:
        fitting += [place for place in places if place[0].part is not None and not place[0].row.alias]
    chosen = [place for place in fitting if not place[0].row.alias] or fitting
    if not chosen:
        return ("same", path)
    entry, captures, rest = min(chosen, key=lambda place: len(place[1]))
    row = entry.row
    others = range(len(row.parts)) if entry.part is None else (None,)
    names = tuple(named(entry, part, captures, rest) for part in others)
    if names == (path + WEIGHT,) and not row.swap and not row.turned:
        return ("same", path)
    return names, entry.part, len(row.parts), row.share, row.swap, row.turned


def told_family(
    modules: Mapping[str, Size], layout: str, said: Iterable[str] = (), class_name: str = ""
) -> tuple[list[PipelineFamily], str]:
    """The families that an adapter may be of.

    Args:
        modules: paths without flat names, with the rows and columns of each.
        layout: ``original`` or ``diffusers``: what it is to become. Families that call every module the same there are one.
        said: what its metadata say it was trained on.
        class_name: diffusers' class, as PEFT's config names it.

    Returns:
        One family, or the several among which nothing decides, none where no family has these names; and what decided,
        empty where the names did.
    """
    sizes = {bare(path): size for path, size in modules.items()}
    found = sharing(sizes)
    evidence: tuple[tuple[Callable[[PipelineFamily], bool], str], ...] = (
        (lambda one: class_name in one.classes, "the class that it says it was trained on"),
        (lambda one: any(is_said(one, text) for text in said), "what it says it was trained on"),
        (lambda one: has_sizes(one, sizes), "its sizes"),
        (lambda one: has_sizes(one, sizes) and _is_complete(one, sizes), "its sizes and the number of its blocks"),
        (lambda one: all(_fits(one, path, _alike(size)) for path, size in sizes.items()), "the shapes of its modules"),
    )
    if _agree(found, sizes, layout):
        return found[:1], ""
    for holds, why in evidence:
        left = [one for one in found if holds(one)]
        if left and _agree(left, sizes, layout):
            return left[:1], why
        found = left or found
    return found, ""


def has_sizes(family: PipelineFamily, sizes: Mapping[str, Size]) -> bool:
    """Whether the family's published models have modules of these names and sizes."""
    return all(_fits(family, path, _same(size)) for path, size in sizes.items())


def sharing(modules: Iterable[str]) -> list[PipelineFamily]:
    """The families that have most of these modules, whose paths have no lead."""
    paths = list(modules)
    counts = {family.name: sum(knows(family, path) for path in paths) for family in FAMILIES}
    most = max(counts.values(), default=0)
    return [family for family in FAMILIES if most and counts[family.name] == most]


def is_said(family: PipelineFamily, text: str) -> bool:
    """Whether what a file says it was trained on is a model of this family."""
    return bool(family.said) and re.search(family.said, text[:_LONGEST], re.IGNORECASE) is not None


def _agree(found: Sequence[PipelineFamily], paths: Iterable[str], layout: str) -> bool:
    names = list(paths)
    return len({tuple(called(family, path, layout) for path in names) for family in found}) <= 1


def _same(size: Size) -> Callable[[Size], bool]:
    return lambda other: other == size


def _alike(size: Size) -> Callable[[Size], bool]:
    """Whether rows and columns stand to each other as in a published model: of one that is smaller or larger."""
    return lambda other: other[0] * size[1] == other[1] * size[0]


def _fits(family: PipelineFamily, path: str, fits: Callable[[Size], bool]) -> bool:
    """Whether a published model of the family has a module of this name, of a size that fits."""
    known = _known(family, path)
    last = max(_keyed(path)[1], default=0)
    return known is not None and (not known.blocks or last < known.blocks) and any(map(fits, known.sizes))


def _known(family: PipelineFamily, path: str) -> Published | None:
    """The published module of this name in either layout."""
    own = module_of(family, path)
    if own is not None:
        return own
    for entry, captures, rest in _places(family, path):
        if entry.part is not None:
            continue
        parts = [
            module_of(family, named(entry, part, captures, rest).removesuffix(WEIGHT))
            for part in range(len(entry.row.parts))
        ]
        known = [part for part in parts if part is not None]
        if len(known) == len(parts):
            together = [one for one in product(*(part.sizes for part in known)) if len({size[1] for size in one}) == 1]
            return Published(known[0].blocks, tuple((sum(rows for rows, _ in one), one[0][1]) for one in together))
    return None


def _is_complete(family: PipelineFamily, paths: Iterable[str]) -> bool:
    """Whether an adapter has every block of a published model, in each list of blocks that it trains at all."""
    held: dict[str, set[int]] = {}
    count: dict[str, int] = {}
    for path in paths:
        known, numbers = _known(family, path), _keyed(path)[1]
        if known is not None and known.blocks and numbers:
            lead = _keyed(path)[0].partition("#")[0]
            held.setdefault(lead, set()).add(numbers[0])
            count[lead] = max(count.get(lead, 0), known.blocks)
    return bool(held) and all(held[lead] == set(range(count[lead])) for lead in held)


def names_of(found: Sequence[PipelineFamily]) -> str:
    """Families in a sentence."""
    words = [family.name for family in found]
    return words[0] if len(words) == 1 else f"{', '.join(words[:-1])} or {words[-1]}"
