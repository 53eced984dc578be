"""A name that a config claims for its base, held against the weights that have that name here."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from adapterkit.errors import AdapterkitError, NotFound, UsageError

if TYPE_CHECKING:
    from adapterkit.registry.identity import Identity
    from adapterkit.registry.record import Record


def called(name: str, *, home: Path | None = None) -> list[tuple[str, Identity]]:
    """The weights that have a name here, each with words for it: registered bases of that Hub id, versions of that
    registered name, else the folder of that path."""
    found = [
        (f"the {name} that is registered as {one.ref}", one.identity)
        for one in (*(one for one in _bases(home) if one.identity and one.identity.id == name), *_called(name, home))
        if one.identity is not None
    ]
    return found or _in_folder(name)


def contradicted(base: Identity, named: list[tuple[str, Identity]]) -> str:
    """What a base has, in words, where it is proved to be none of ``named``; "" where it is one, or nobody can tell."""
    from adapterkit.registry.identity import compare

    weights = replace(base, id="", commit="")
    found = [(words, compare(weights, replace(one, id="", commit=""))) for words, one in named]
    if not found or any(one.fits is not False for _, one in found):
        return ""
    words, one = next((pair for pair in found if pair[1].verdict == "other"), found[0])
    if one.verdict == "other":
        return f"other weights than {words}"
    return f"other tensors than {words} (so has a quantized copy)"


def _called(name: str, home: Path | None) -> list[Record]:
    """The models that a registered name means: one version, or all where the name says none."""
    from adapterkit.registry.home import open_home

    at = open_home(home)
    if "/" in name or name.startswith("sha256:") or not at.root.is_dir():
        return []
    from adapterkit.registry import resolve, store
    from adapterkit.registry.finder import is_known

    if not is_known(at, name):
        return []
    if "@" not in name:
        hidden = at.hidden_versions(name)
        return [store.load_known(at, name, version) for version in at.versions(name) if version not in hidden]
    try:
        return [resolve.find(at, name)]
    except (NotFound, UsageError):
        return []  # a version that is not here, or no name at all, contradicts nothing


def _in_folder(name: str) -> list[tuple[str, Identity]]:
    """The weights of a folder here; none where it cannot be read."""
    try:
        path = Path(name).expanduser()
        if not path.is_dir():
            return []
        from adapterkit.bases import open_model
        from adapterkit.registry.weights import cheap, identity_of

        opened = open_model(path, headers_only=True)
        return [(f"the folder {name}", identity_of(opened, cheap(opened)))]
    except (AdapterkitError, OSError, RuntimeError):
        return []  # no model: a name alone, which proves nothing


def _bases(home: Path | None) -> list[Record]:
    """The records of registered bases."""
    from adapterkit.registry.home import open_home

    at = open_home(home)
    if not at.root.is_dir():
        return []
    from adapterkit.registry import index, store

    def ask(found: index.Index) -> list[Record]:
        rows = found.rows("kind = ?", ("base",), hidden=False)
        return [store.load_known(found.home, row.name, row.version) for row in rows]

    return index.ask(at, ask)
