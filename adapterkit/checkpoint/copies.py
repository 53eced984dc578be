"""A part that only copies: its plan says from which bytes of which files, so nothing else has to be opened for it.

Who executes one such part of a model in 163 files opens one or two of them, and sees that they are those of the plan: on a
disk by their headers, in a store by their ETags. Whether the plan is right is not asked again: whoever finishes the output
makes it anew and compares.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from adapterkit.checkpoint.files import LocalFile, Source
from adapterkit.checkpoint.tensor import Stored
from adapterkit.checkpoint.values import is_planned
from adapterkit.dtypes import DTYPES
from adapterkit.errors import AdapterkitError
from adapterkit.places import address_of

if TYPE_CHECKING:
    from collections.abc import Collection, Iterable, Mapping

    from adapterkit.checkpoint.cut import PlanPart
    from adapterkit.checkpoint.objects import ObjectFolder
    from adapterkit.checkpoint.plan import Plan
    from adapterkit.checkpoint.tensor import Tensor


class SeenFiles:
    """Files by the names that a plan gives them, as far as those say where they lie; each is looked for once.

    Args:
        loose: names of files that the user gave themselves, so that their folders are nobody's.
    """

    def __init__(self, loose: Collection[str] = ()) -> None:
        self._loose = loose
        self._files: dict[str, Source] = {}
        self._folders: dict[str, ObjectFolder] = {}

    def file(self, name: str) -> Source:
        """The file of this name.

        Raises:
            NotFound: there is none.
            AdapterkitError
        """
        if name not in self._files:
            self._files[name] = self._open(name)
        return self._files[name]

    def _open(self, name: str) -> Source:
        address = address_of(name)
        if address is None:
            return LocalFile(Path(name), name, loose=name in self._loose)
        from adapterkit.checkpoint.objects import ObjectFolder

        folder = str(address.parent)
        if folder not in self._folders:
            self._folders[folder] = ObjectFolder(address.parent)
        found = self._folders[folder].open(address.name)
        found.loose = name in self._loose
        return found


def planned_sources(plan: Plan, seen: SeenFiles, used: Iterable[str]) -> list[Source] | None:
    """All files of the plan's inputs, of which those that are used are the plan's; None where one is not, or not here."""
    try:
        sources = {name: seen.file(name) for name in plan.inputs}
        needed = {name for name, source in sources.items() if source.version} | set(used)
        if any(not plan.inputs[name].startswith(f"{source.size}:") for name, source in sources.items()):
            return None
        return list(sources.values()) if all(is_planned(sources[name], plan.inputs[name]) for name in needed) else None
    except AdapterkitError:
        return None  # no file here by that name: whoever opens the inputs as the verb does finds them, or says why not


def copies(plan: Plan, part: PlanPart, seen: SeenFiles) -> tuple[Mapping[str, Tensor], list[Source]] | None:
    """The tensors of a part that only copies, and all files of the plan's inputs; None for another."""
    if any(step.source is None or step.dtype not in DTYPES for step in part.steps):
        return None
    used = {chunk.source for chunk in part.file.head} | {step.source for step in part.steps} | {part.file.verbatim}
    named = {name for name in used if name is not None}
    sources = planned_sources(plan, seen, named) if named <= plan.inputs.keys() else None
    if sources is None:
        return None
    tensors: dict[str, Tensor] = {
        step.tensor: Stored(step.tensor, DTYPES[step.dtype], step.shape, seen.file(step.source), step.source_offset)
        for step in part.steps
        if step.source is not None
    }
    return tensors, sources
