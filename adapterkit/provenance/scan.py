"""A scan of an adapter beside the registry's own: the figures of others on the same base, kept so that nobody is read twice.

``scans/<content>`` of a home holds the figures of one artefact; it can be deleted at any time.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

from adapterkit import disk
from adapterkit.adapters.load import load_adapter
from adapterkit.adapters.scan import ModuleFigures, ScanReport, module_figures, scan_adapter
from adapterkit.errors import AdapterkitError
from adapterkit.registry import index
from adapterkit.registry.canonical import canonical, parse
from adapterkit.registry.checkout import checkout
from adapterkit.registry.home import Home, open_home
from adapterkit.registry.names import check_sha256

if TYPE_CHECKING:
    from adapterkit.adapters.adapter import Adapter
    from adapterkit.checkpoint.checkpoint import Checkpoint
    from adapterkit.registry.identity import Identity
    from adapterkit.registry.index import VersionRow
    from adapterkit.registry.record import Record

FORMAT = 1
PEERS = 64  # other adapters that one is held against, the newest first


def scan(
    adapter: Adapter, base: Checkpoint | None = None, *, said: Identity | None = None, home: Path | None = None
) -> ScanReport:
    """Scan an adapter by itself and beside those of the registry that were trained on the same base.

    Args:
        base: for methods whose change depends on it.
        said: the base that the adapter was trained on, where a record says it; else its config's.
    """
    at = open_home(home)
    return scan_adapter(adapter, base, peer_figures(at, adapter, said) if at.exists else ())


def peer_figures(at: Home, adapter: Adapter, said: Identity | None) -> list[Mapping[str, ModuleFigures]]:
    """The figures of registered adapters on the same base, of each name the newest version; those that cannot be read are
    left out."""
    labels = {said.label} if said is not None else set()
    named = said.id if said is not None else str(adapter.config.raw.get("base_model_name_or_path") or "")

    def ask(found: index.Index) -> list[VersionRow]:
        ids = dict(found.db.execute("select digest, base_id from records").fetchall())
        rows = found.rows("kind in ('adapter', 'combined')")
        return [row for row in rows if row.base in labels or (named and ids.get(row.digest) == named)]

    newest: dict[str, VersionRow] = {}
    for row in index.ask(at, ask):
        newest[row.name] = row
    own = _content_of(adapter)
    rows = sorted(newest.values(), key=lambda row: (row.created, row.name), reverse=True)
    found: list[Mapping[str, ModuleFigures]] = []
    for row in rows:
        if row.content == own or len(found) >= PEERS:
            continue
        figures = _kept(at, row)
        if figures:
            found.append({one.parameter: one for one in figures})
    return found


def _content_of(adapter: Adapter) -> str:
    from adapterkit.provenance.record import adapter_parent

    try:
        return adapter_parent(adapter).content
    except AdapterkitError:
        return ""


def _kept(at: Home, row: VersionRow) -> tuple[ModuleFigures, ...]:
    path = at.root / "scans" / check_sha256(row.content, "content")
    try:
        value = parse(path.read_bytes(), str(path))
        if value["format"] == FORMAT:
            return tuple(ModuleFigures(**one) for one in value["figures"])
    except FileNotFoundError:
        pass
    except (AdapterkitError, OSError, TypeError, KeyError):
        path.unlink(missing_ok=True)  # it can be made again
    try:
        adapter = load_adapter(checkout(f"{row.name}@{row.version}", home=at.root))
        figures, _ = module_figures(adapter)
    except AdapterkitError:
        figures = ()  # of a method that needs its base, or without its bytes
    _keep(at, path, {"format": FORMAT, "figures": [asdict(one) for one in figures]})
    return figures


def keep_figures(record: Record, figures: Iterable[ModuleFigures], *, home: Path | None = None) -> None:
    """Keeps the figures of a registered version, for scans of others and for the page that compares versions."""
    at = open_home(home)
    path = at.root / "scans" / check_sha256(record.content, "content")
    _keep(at, path, {"format": FORMAT, "figures": [asdict(one) for one in figures]})


def _keep(at: Home, path: Path, value: Mapping[str, Any]) -> None:
    with disk.writing("the figures of a scan", at.root):
        disk.make_folder(path.parent)
        with disk.staged(at.incoming, canonical(value)) as temporary:
            disk.publish_over(temporary, path)
