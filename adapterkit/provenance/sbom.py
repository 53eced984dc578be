"""A version as a CycloneDX ML-BOM: its files, what it was made from, and what was measured of it.

    metadata.component        the version, a machine-learning-model with its digest; modelCard: method, data sets, figures
    components                its files with their sha256; every parent, by its Hub address where it has one
    pedigree.ancestors        the parents again, as CycloneDX wants what something descends from
    dependencies              version -> parents

Everything comes from the record, so the same record gives the same bytes; a record without a time states none, and
of one that no verb made the tool is this version of adapterkit.

Format: CycloneDX 1.6 (ECMA-424), https://cyclonedx.org/docs/1.6/json/.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from typing import Any
from uuid import UUID

from adapterkit.checkpoint.hub_ref import parse_hub
from adapterkit.registry.canonical import thaw
from adapterkit.registry.record import UNDATED, Parent, Record

_LICENSES = ("license", "licence")
_DATA = ("dataset", "datasets", "data")


def sbom(record: Record) -> dict[str, Any]:
    """The bill of materials of a registered version, as plain JSON."""
    parents = [(f"parent-{place}", parent) for place, parent in enumerate(record.parents, 1)]
    if not parents and record.base is not None:
        parents = [("parent-1", Parent("base", identity=record.base, label=record.base.label))]
    main = f"sha256:{record.digest}"
    made: dict[str, Any] = {
        "$schema": "http://cyclonedx.org/schema/bom-1.6.schema.json",
        "bomFormat": "CycloneDX",
        "specVersion": "1.6",
        "serialNumber": f"urn:uuid:{UUID(bytes=bytes.fromhex(record.digest)[:16], version=4)}",
        "version": 1,
        "metadata": {
            **({"timestamp": record.created} if record.created != UNDATED else {}),
            "tools": {"components": [_tool(record)]},
            "component": _model(record, main, [_parent(f"{ref}-ancestor", parent) for ref, parent in parents]),
        },
        "components": [
            *(_file(record, place) for place in range(len(record.files))),
            *(_parent(*one) for one in parents),
        ],
        "dependencies": [
            {"ref": main, "dependsOn": [ref for ref, _ in parents]},
            *({"ref": ref} for ref, _ in parents),
        ],
    }
    return made


def _tool(record: Record) -> dict[str, Any]:
    operation = record.operation
    if operation is not None:
        return {"type": "application", "name": operation.tool, "version": operation.tool_version}
    from adapterkit._version import __version__

    return {"type": "application", "name": "adapterkit", "version": __version__}


def _model(record: Record, ref: str, ancestors: list[dict[str, Any]]) -> dict[str, Any]:
    made: dict[str, Any] = {
        "type": "machine-learning-model",
        "bom-ref": ref,
        "name": record.name or record.kind,
        "version": str(record.version) if record.version else record.content[:12],
        "modelCard": _card(record),
        "properties": [*_properties(record)],
    }
    if record.meta.get("description"):
        made["description"] = record.meta["description"]
    if license := next((record.meta[key] for key in _LICENSES if record.meta.get(key)), ""):
        made["licenses"] = [{"license": {"name": license}}]
    if record.origin is not None:
        made["purl"] = _purl(record.origin.repo, record.origin.commit)
    if ancestors:
        made["pedigree"] = {"ancestors": ancestors}
    return made


def _card(record: Record) -> dict[str, Any]:
    parameters: dict[str, Any] = {}
    if record.method:
        parameters["modelArchitecture"] = record.method
    if data := [record.meta[key] for key in _DATA if record.meta.get(key)]:
        parameters["datasets"] = [{"type": "dataset", "name": name} for name in data]
    card: dict[str, Any] = {"modelParameters": parameters} if parameters else {}
    if metrics := [*_metrics(record.evidence)]:
        card["quantitativeAnalysis"] = {"performanceMetrics": metrics}
    return card


def _metrics(evidence: Mapping[str, Any], path: str = "") -> Iterator[dict[str, Any]]:
    """Every figure of the evidence by the way to it: ``fidelity.retention``."""
    for key, value in evidence.items():
        name = f"{path}{key}"
        if isinstance(value, Mapping):
            yield from _metrics(value, f"{name}.")
        elif isinstance(value, (bool, int, float)):
            yield {"type": name, "value": json.dumps(value)}


def _properties(record: Record) -> Iterator[dict[str, str]]:
    rows: list[tuple[str, Any]] = [("kind", record.kind), ("content", record.content)]
    if record.operation is not None:
        rows.append(("operation", record.operation.name))
        rows += [(f"operation:{key}", value) for key, value in thaw(record.operation.parameters).items()]
    rows += [(f"parameter:{key}", value) for key, value in thaw(record.parameters).items()]
    rows += [(f"meta:{key}", value) for key, value in record.meta.items()]
    for key, value in rows:
        yield {"name": f"adapterkit:{key}", "value": value if isinstance(value, str) else json.dumps(value)}


def _file(record: Record, place: int) -> dict[str, Any]:
    file = record.files[place]
    return {
        "type": "file",
        "bom-ref": f"file-{place + 1}",
        "name": file.path,
        "hashes": [{"alg": "SHA-256", "content": file.sha256}],
        "properties": [{"name": "adapterkit:size", "value": str(file.size)}],
    }


def _parent(ref: str, parent: Parent) -> dict[str, Any]:
    identity = parent.identity
    known = identity.id if identity is not None else ""
    made: dict[str, Any] = {
        "type": "machine-learning-model",
        "bom-ref": ref,
        "name": known or parent.label or parent.role,
    }
    if identity is not None and identity.commit:
        made["version"] = identity.commit
    hub = parse_hub(known) if known else None
    if hub is not None and identity is not None:
        made["purl"] = _purl(hub.repo, identity.commit)
    rows: list[tuple[str, str]] = [("role", parent.role), ("content", parent.content), ("record", parent.record)]
    if identity is not None:
        rows += [(f"identity:{level}", identity.level(level)) for level in ("merkle", "sampled", "skeleton")]
        rows += [(f"file:{path}", digest) for path, digest in identity.files]
    rows += [(key, json.dumps(value)) for key, value in thaw(parent.parameters).items()]
    made["properties"] = [{"name": f"adapterkit:{key}", "value": value} for key, value in rows if value]
    return made


def _purl(repo: str, commit: str) -> str:
    return f"pkg:huggingface/{repo}{f'@{commit}' if commit else ''}"
