"""`adapterkit list`, `adapterkit show`, `adapterkit lineage`"""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING, Any

import click

from adapterkit.cli.output import note, say, show_json, size

if TYPE_CHECKING:
    from collections.abc import Mapping

    from adapterkit.registry.identity import Identity
    from adapterkit.registry.verbs import Shown


@click.command(name="list", short_help="List what is registered.")
@click.argument("name", default="", metavar="[NAME]")
@click.option("--base", default="", help="Only what was made on this base: a Hub id (with * and ?), digest or name.")
@click.option("--fits", metavar="BASE", help="Only what was made on a base with the same weights as this one.")
@click.option("--method", default="", help="Only this method, like lora or dora.")
@click.option("--kind", default="", help="Only this kind: adapter, merged, combined, quantized, converted or base.")
@click.option("--tag", default="", help="Only what this alias points to.")
@click.option("--evidence", default="", help="Only what carries this evidence: fidelity, verification (held).")
@click.option("--latest", is_flag=True, help="Only the newest version of each name.")
@click.option("--all", "hidden", is_flag=True, help="Removed versions too.")
@click.option("--json", "as_json", is_flag=True, help="Print the rows as JSON.")
def list_(
    name: str,
    base: str,
    fits: str | None,
    method: str,
    kind: str,
    tag: str,
    evidence: str,
    latest: bool,
    hidden: bool,
    as_json: bool,
) -> int:
    """List versions, of NAME (which may hold * and ?) or of all.

    Exits with 1 when a record cannot be read; the others are listed.

    \b
    Example:
      adapterkit list
      adapterkit list --base "meta-llama/*" --tag prod --json
    """
    from adapterkit.registry.listing import listing

    found = listing(
        name=name,
        base=base,
        method=method,
        kind=kind,
        alias=tag,
        evidence=evidence,
        fits=None if fits is None else _identity(fits),
        latest=latest,
        hidden=hidden,
    )
    if as_json:
        rows = [
            {"ref": f"{row.name}@{row.version}", **row._asdict(), "base_name": found.bases.get(row.base, "")}
            for row in found.rows
        ]
        show_json({"rows": rows, "unreadable": [item._asdict() for item in found.unreadable]})
    else:
        _table(found.rows, found.bases)
        for item in found.unreadable:
            note(f"error: {item.name}@{item.version} cannot be read: {item.why}; run fsck")
    return 1 if found.unreadable else 0


def _identity(ref: str) -> Identity:
    from adapterkit.provenance.register import identify_base

    return identify_base(ref)


def _nothing() -> str:
    """What there is to do where no row is shown: the registry is empty, or the filters leave nothing."""
    from adapterkit.registry.home import open_home

    home = open_home()
    if next(home.names(), None) is None:
        return f"the registry {home.root} is empty; add an adapter: adapterkit register ./my-adapter --name my-adapter"
    return "nothing that is registered fits these filters; adapterkit list shows everything"


def _table(rows: Any, bases: Mapping[str, str]) -> None:
    if not rows:
        note(_nothing())
        return
    cells = [("VERSION", "KIND", "METHOD", "BASE", "SIZE", "ALIASES", "EVIDENCE")]
    for row in rows:
        removed = " (removed)" if row.hidden else ""
        ref = f"{row.name}@{row.version}{removed}"
        cells.append(
            (
                *(ref, row.kind, row.method, bases.get(row.base, row.base)),
                *(size(row.size), ",".join(row.aliases), ",".join(row.evidence)),
            )
        )
    widths = [max(len(cell) for cell in column) for column in zip(*cells, strict=True)]
    for line in cells:
        say("  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)).rstrip())


@click.command(name="show", short_help="Show one version: its files, base, parents and evidence.")
@click.argument("ref")
@click.option("--json", "as_json", is_flag=True, help="Print the record as JSON.")
@click.option("--sbom", "as_sbom", is_flag=True, help="Print a CycloneDX ML-BOM: files, parents, figures.")
def show(ref: str, as_json: bool, as_sbom: bool) -> int:
    """Show what REF (name, name@3, name@prod, sha256:...) is and where it came from.

    Exits with 1 when bytes of it are missing.

    \b
    Example:
      adapterkit show my-adapter@prod
      adapterkit show my-adapter@prod --sbom > bom.cdx.json
    """
    from adapterkit.registry.verbs import show as verb

    if as_json and as_sbom:
        raise click.UsageError("--json and --sbom are two forms of the same; give one.")
    found = verb(ref)
    record = found.record
    if as_sbom:
        from adapterkit.provenance.sbom import sbom

        show_json(sbom(record))
    elif as_json:
        show_json(
            {
                "ref": record.ref,
                "aliases": list(found.aliases),
                "versions": list(found.versions),
                "base": found.base,
                "hidden": found.hidden,
                "missing": list(found.missing),
                "content": record.content,
                "record": record.to_json(),
            }
        )
    else:
        _show(found)
    return 1 if found.missing else 0


def _show(found: Shown) -> None:
    from adapterkit.registry.verification import lines

    record = found.record
    operation = record.operation
    rows = [
        ("version", f"{record.ref}{' (removed)' if found.hidden else ''}, one of {len(found.versions)}"),
        ("aliases", ", ".join(found.aliases)),
        ("kind", " ".join(part for part in (record.kind, record.method) if part)),
        ("base", found.base),
        ("", f"known by {', '.join(record.base.known)}" if record.base and record.base.known else ""),
        ("made by", f"{operation.name} ({operation.tool} {operation.tool_version})" if operation else ""),
        *(("from", f"{p.role}: {p.label or p.content[:12]}") for p in record.parents),
        ("origin", f"{record.origin.repo}@{record.origin.commit}" if record.origin else ""),
        *((key, str(value)) for key, value in record.meta.items()),
        *lines(record.evidence),
        ("created", record.created),
        ("content", f"sha256:{record.content}"),
        ("record", f"sha256:{record.digest}"),
    ]
    width = max(len(name) for name, value in rows if value)
    for name, value in rows:
        if value:
            say(f"{name:<{width}}  {value}")
    say()
    for file in record.files:
        state = "  <- its bytes are missing" if file.path in found.missing else ""
        say(f"{file.sha256[:12]}  {size(file.size):>10}  {file.path}{state}")


@click.command(name="lineage", short_help="Show what a version was made from, and what was made of it.")
@click.argument("ref")
@click.option("--up", "only", flag_value="up", help="Only what it was made from.")
@click.option("--down", "only", flag_value="down", help="Only what was made of it.")
@click.option("--mermaid", "as_mermaid", is_flag=True, help="Print a Mermaid flowchart.")
@click.option("--json", "as_json", is_flag=True, help="Print nodes and edges as JSON.")
def lineage(ref: str, only: str | None, as_mermaid: bool, as_json: bool) -> None:
    """Show the lineage of REF, joined by content digests.

    \b
    Example:
      adapterkit lineage my-merge@prod
      adapterkit lineage my-merge@prod --mermaid > lineage.mmd
    """
    from adapterkit.registry.lineage import lineage as verb
    from adapterkit.registry.lineage import mermaid, tree_text

    if as_mermaid and as_json:
        raise click.UsageError("--mermaid and --json are two forms of the same; give one.")
    found = verb(ref, up=only != "down", down=only != "up")
    if as_json:
        show_json(found.to_json())
    elif as_mermaid:
        say(mermaid(found).rstrip("\n"), lines=True)
    else:
        encoding = (getattr(sys.stdout, "encoding", None) or "ascii").lower()
        say(tree_text(found, ascii_only=not encoding.startswith("utf")).rstrip("\n"), lines=True)
