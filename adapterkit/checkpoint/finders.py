"""Names that are neither a path nor a Hub id, such as those of the registry: who knows them is handed in."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from adapterkit.values import dataclass

if TYPE_CHECKING:
    from pathlib import Path


@dataclass(frozen=True)
class Found:
    """What a finder says of a name.

    Attributes:
        shown: what to call it, such as ``name@version``.
        folder: its files, or None where only its Hub id is known.
        file: the one weight file, where a single file is meant.
        hub: ``org/name@commit`` of a name without files; else empty.
    """

    shown: str
    folder: Path | None = None
    file: Path | None = None
    hub: str = ""


Finder = Callable[[str], Found | None]
_FINDERS: list[Finder] = []


def add_finder(finder: Finder) -> None:
    """Ask ``finder`` about every name that is no path; it answers None for a name that it does not know."""
    if finder not in _FINDERS:
        _FINDERS.append(finder)


Maker = Callable[[Any, Any, "Path", Any], "Path"]
"""``make(home, record, folder, base)`` carries out a record's operation inside a folder and gives what it made."""
_MAKER: list[Maker] = []


def set_maker(made: Maker) -> None:
    """Hands in who makes a version again that is kept as its recipe."""
    _MAKER[:] = [made]


def maker() -> Maker | None:
    """Who was handed in."""
    return _MAKER[-1] if _MAKER else None


@dataclass(frozen=True)
class Place:
    """A path, or a Hub id as text, and what to call it; ``file`` when a registry name means a single file."""

    place: str | Path
    shown: str
    file: Path | None = None


def place_of(ref: str | Path) -> Place:
    """A path if there is one, else what a finder says, else the reference as it is.

    Raises:
        NotFound: a registered name without that version or alias.
    """
    from pathlib import Path

    text = str(ref)
    if isinstance(ref, Path) or "/" in text or Path(text).expanduser().exists():
        return Place(ref, text)
    for finder in _FINDERS:
        found = finder(text)
        if found is not None:
            return Place(found.folder or found.hub, found.shown if found.folder else found.hub, found.file)
    return Place(ref, text)
