"""What a verification found, as records carry it: ``evidence["verification"]``, one object for each level.

    {"tensor": {"ok": true, "figures": {"max_abs": 0.0}, "thresholds": {}, "when": "2026-01-31T23:59:59Z",
                "tool": "adapterkit", "tool_version": "0.1.0"}, "model": {...}}

A level that is verified again takes the place of what it found before.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

from adapterkit._version import __version__
from adapterkit.errors import RegistryError
from adapterkit.registry import evaluation
from adapterkit.registry.canonical import freeze, thaw
from adapterkit.registry.names import check_time

KEY = "verification"
_WORD = r"[A-Za-z0-9][A-Za-z0-9._+ -]{0,63}"
_FIELDS = {"ok", "figures", "thresholds", "when", "tool", "tool_version"}


@dataclass(frozen=True)
class Verification:
    """One level of verification.

    Attributes:
        level: how deep it looked, such as ``tensor``, ``layer`` or ``model``.
        ok: whether every threshold held.
        figures: what was measured, by name: numbers, text or lists of them.
        thresholds: the limits it was held against, by the option that sets them (``max_kl``).
        when: UTC time, like ``2026-01-31T23:59:59Z``; empty where the same run is to give the same bytes.
        tool: what measured; ``tool_version`` its version.
    """

    level: str
    ok: bool
    figures: Mapping[str, Any]
    thresholds: Mapping[str, Any] = field(default_factory=dict)
    when: str = ""
    tool: str = "adapterkit"
    tool_version: str = __version__

    def __post_init__(self) -> None:
        if not isinstance(self.level, str) or not re.fullmatch(_WORD, self.level):
            raise RegistryError(f"evidence.verification: {self.level!a} is not the name of a level")
        where = f"evidence.verification.{self.level}"
        if type(self.ok) is not bool:
            raise RegistryError(f"{where}.ok is neither true nor false")
        for key in ("figures", "thresholds"):
            if not isinstance(getattr(self, key), Mapping):
                raise RegistryError(f"{where}.{key} is not an object")
            object.__setattr__(self, key, freeze(getattr(self, key), f"{where}.{key}"))
        for key in ("tool", "tool_version"):
            if not isinstance(getattr(self, key), str) or not re.fullmatch(_WORD, getattr(self, key)):
                raise RegistryError(f"{where}.{key} is not a plain word")
        if self.when:
            check_time(self.when, f"{where}.when")

    def to_json(self) -> dict[str, Any]:
        """The object of this level, without its name."""
        return {
            "ok": self.ok,
            "figures": thaw(self.figures),
            "thresholds": thaw(self.thresholds),
            "when": self.when,
            "tool": self.tool,
            "tool_version": self.tool_version,
        }


def evidence_of(levels: Iterable[Verification]) -> dict[str, Any]:
    """The object that records hold under ``verification``."""
    return {level.level: level.to_json() for level in levels}


def read(evidence: Mapping[str, Any]) -> tuple[Verification, ...]:
    """The levels in the evidence of a record, in the order of their names.

    Raises:
        RegistryError: what is there under ``verification`` is something else.
    """
    found = evidence.get(KEY, {})
    levels = []
    for level, value in sorted(found.items()):
        if not isinstance(value, Mapping) or value.keys() != _FIELDS:
            raise RegistryError(f"evidence.verification.{level} does not hold exactly {', '.join(sorted(_FIELDS))}")
        levels.append(Verification(level, **value))
    return tuple(levels)


def lines(evidence: Mapping[str, Any]) -> tuple[tuple[str, str], ...]:
    """``(what, found)`` for readers: a line for each kind of evidence, and one for each level of a verification."""
    found = []
    for kind, value in evidence.items():
        if kind == KEY:
            found += [(f"{KEY}: {level.level}", sentence(level)) for level in read(evidence)]
        elif kind == evaluation.KEY:
            scores, wrong = evaluation.read_shown(evidence)
            found += [(one.key, evaluation.sentence(one)) for one in scores] + ([(kind, wrong)] if wrong else [])
        else:
            found.append((kind, ", ".join(f"{name} {_plain(figure)}" for name, figure in value.items())))
    return tuple(found)


def sentence(level: Verification) -> str:
    """``held: max_kl 0.002 (limit 0.01), top1 0.998; 2026-01-31, adapterkit 0.1.0``"""
    limits = {name.partition("_")[2]: limit for name, limit in level.thresholds.items()} | dict(level.thresholds)
    parts = [
        f"{name} {_plain(figure)}" + (f" (limit {_plain(limits[name])})" if name in limits else "")
        for name, figure in level.figures.items()
    ]
    told = {name for name in level.thresholds if name in level.figures or name.partition("_")[2] in level.figures}
    parts += [f"{name} {_plain(limit)}" for name, limit in level.thresholds.items() if name not in told]
    made = ", ".join(part for part in (level.when[:10], f"{level.tool} {level.tool_version}") if part)
    return f"{'held' if level.ok else 'did not hold'}: {', '.join(parts) or 'no figures'}; {made}"


def _plain(value: Any) -> str:
    if isinstance(value, float):
        return f"{value:.4g}"
    if isinstance(value, tuple):
        return " ".join(map(_plain, value))
    if isinstance(value, Mapping):
        return " ".join(f"{key} {_plain(item)}" for key, item in value.items())
    return str(value)


def kinds(evidence: Mapping[str, Any]) -> tuple[str, ...]:
    """The kinds of evidence, sorted; a verification that did not hold is called ``verification-failed``."""
    held = all(value["ok"] for value in evidence.get(KEY, {}).values())
    return tuple(sorted(f"{kind}-failed" if kind == KEY and not held else kind for kind in evidence))
