"""Names without dots, as kohya's scripts write them, with their dots again: by the families' tables, where no base is given.

``double_blocks_0_img_attn_qkv`` is ``double_blocks.0.img_attn.qkv`` of Flux and ``double_blocks.0.img_attn_qkv`` of
HunyuanVideo. A name is read as a family has it that has all names of the file; of several, as the file's words or sizes say.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from functools import lru_cache

from adapterkit.adapters.families.names import FAMILIES
from adapterkit.adapters.families.row import Pattern, PipelineFamily, SharedRows
from adapterkit.adapters.families.told import Size, has_sizes, is_said, published

_NUMBER = re.compile(r"(?<![^_])\d{1,9}(?![^_])")


def _key(flat: str) -> str:
    return _NUMBER.sub("#", flat)


@lru_cache(maxsize=1)
def _index() -> Mapping[str, Mapping[str, list[tuple[re.Pattern[str], Pattern]]]]:
    """Every module of every family by its name without dots."""
    found: dict[str, dict[str, list[tuple[re.Pattern[str], Pattern]]]] = {}
    for family in FAMILIES:
        texts = [*family.original, *family.diffusers]
        texts += [text for row in family.rows for text in (row.original, *row.parts)]
        trained = [pattern.text for several in published().get(family.name, {}).values() for pattern, _ in several]
        texts += trained + [text for row in family.rows for text in _below(row, trained)]
        own = found.setdefault(family.name, {})
        for pattern in map(Pattern, dict.fromkeys(texts)):
            if not pattern.open:
                flat = re.escape(pattern.text.replace(".", "_")).replace(r"\{\}", r"(\d{1,9})")
                own.setdefault(_key(pattern.fill((0,) * 9, "").replace(".", "_")), []).append(
                    (re.compile(flat), pattern)
                )
    return found


def dotted(
    flat: Mapping[str, Size], said: Iterable[str] = (), fits: Callable[[PipelineFamily], bool] = lambda family: True
) -> dict[str, str] | None:
    """The names of a file's modules with dots; None where no family has all of them, or several have them otherwise.

    Args:
        flat: names, with the rows and columns of each.
        said: what the file says it was trained on.
        fits: families that may be meant.
    """
    found: dict[str, tuple[PipelineFamily, dict[str, str]]] = {}
    for family in filter(fits, FAMILIES):
        names = {name: _one(family, name) for name in flat}
        if all(names.values()):
            found[family.name] = family, {name: path for name, path in names.items() if path}
    evidence: tuple[Callable[[PipelineFamily, dict[str, str]], bool], ...] = (
        lambda family, names: True,
        lambda family, names: any(is_said(family, text) for text in said),
        lambda family, names: has_sizes(family, {names[name]: size for name, size in flat.items()}),
    )
    left = list(found.values())
    for holds in evidence:
        left = [one for one in left if holds(*one)] or left
        if len({tuple(names.items()) for _, names in left}) == 1:
            return left[0][1]
    return None


def _below(row: SharedRows, trained: Iterable[str]) -> Iterator[str]:
    """What the original layout calls modules below the start of an open row."""
    if row.original.endswith(".*"):
        for part in (part.removesuffix("*") for part in row.parts):
            yield from (
                row.original.removesuffix("*") + text.removeprefix(part) for text in trained if text.startswith(part)
            )


def _one(family: PipelineFamily, flat: str) -> str:
    """The one module of a family with this name; empty where it has none, or two."""
    found = set()
    for expression, pattern in _index()[family.name].get(_key(flat), ()):
        match = expression.fullmatch(flat)
        if match is not None:
            found.add(pattern.fill(tuple(map(int, match.groups())), ""))
    return found.pop() if len(found) == 1 else ""
