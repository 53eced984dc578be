"""Figures by name, out of evidence: from evaluations, verifications and fidelity."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

from adapterkit.registry import evaluation, verification
from adapterkit.registry.canonical import thaw
from adapterkit.registry.record import Record

HELD, FAILED = "held", "failed"


@dataclass(frozen=True)
class Figure:
    """One figure.

    Attributes:
        name: where it stands: ``tickets/acc``, ``tickets[lang=de]/acc``, ``verification.model.kl``, ``fidelity.retention``.
        value: a number, or a word such as ``held``.
        kind: of the evidence it is from.
        slice: of the samples it is of.
        n, stderr, when: as far as they are stated.
        settings: what it depends on; two figures of other settings are not compared.
    """

    name: str
    value: float | str
    kind: str
    slice: str = ""
    n: int = 0
    stderr: float | None = None
    when: str = ""
    settings: Mapping[str, Any] = field(default_factory=dict)

    @property
    def about(self) -> str:
        """``n 500, 2026-01-31``"""
        return ", ".join(part for part in (f"n {self.n}" if self.n else "", self.when[:10]) if part)


def joined(versions: Iterable[Record]) -> dict[str, Any]:
    """The evidence of several records of one content: key by key, the last one that was recorded counts."""
    found: dict[str, Any] = {}
    for record in sorted(versions, key=lambda one: (one.created, one.name, one.version)):
        for kind, value in thaw(record.evidence).items():
            found[kind] = {**found.get(kind, {}), **value}
    return found


def figures(evidence: Mapping[str, Any], subject: str = evaluation.SELF) -> list[Figure]:
    """The figures in evidence, of the version itself or of what it is held against."""
    found = [
        Figure(one.label, float(one.value), evaluation.KEY, one.slice, one.n, one.stderr, one.when, one.settings)
        for one in evaluation.read(evidence)
        if one.subject == subject
    ]
    if subject != evaluation.SELF:
        return found
    for level in verification.read(evidence):
        where = f"{verification.KEY}.{level.level}"
        found.append(Figure(where, HELD if level.ok else FAILED, verification.KEY, when=level.when))
        found += _plain(where, level.figures, verification.KEY, level.when)
    for kind, value in evidence.items():
        if kind not in (evaluation.KEY, verification.KEY):
            found += _plain(kind, value, kind, "")
    return found


def _plain(where: str, values: Mapping[str, Any], kind: str, when: str) -> list[Figure]:
    found = []
    for name, value in values.items():
        if isinstance(value, bool):
            found.append(Figure(f"{where}.{name}", str(value).lower(), kind, when=when))
        elif isinstance(value, (int, float)):
            found.append(Figure(f"{where}.{name}", float(value), kind, when=when))
        elif isinstance(value, str):
            found.append(Figure(f"{where}.{name}", value, kind, when=when))
        elif isinstance(value, Mapping):
            found += _plain(f"{where}.{name}", value, kind, when)
    return found


def named(found: Iterable[Figure], asked: str, part: str = "") -> list[Figure]:
    """The figures that a name means: ``acc`` every task's, ``tickets/acc`` that task's, ``kl`` and ``model.kl`` those of a
    verification, ``verification`` the verdict of each of its levels.

    Args:
        part: a slice, ``*`` for every slice, empty for figures over all samples.
    """
    return [one for one in found if (one.slice == part or (part == "*" and bool(one.slice))) and _means(one, asked)]


def _means(one: Figure, asked: str) -> bool:
    if one.kind == evaluation.KEY:
        task, _, metric = re.sub(r"\[[^\]]*\]", "", one.name).rpartition("/")
        wanted, slash, which = asked.rpartition("/")
        return which in (metric, metric.partition(":")[0]) and (not slash or wanted == task)
    if asked == verification.KEY:
        return one.kind == verification.KEY and one.name.count(".") == 1
    return one.name == asked or one.name.endswith(f".{asked}")
