"""What an evaluation measured, as records carry it: ``evidence["evaluation"]``, one object for each figure.

    {"tickets/acc": {"task": "tickets", "metric": "acc", "value": 0.71, "stderr": 0.02, "n": 500, "slice": "",
                     "subject": "self", "when": "2026-01-31T23:59:59Z", "tool": "lm-eval", "tool_version": "0.4.13",
                     "settings": {"num_fewshot": 0}, "source": "sha256 of the results file"}}

The figures of what it is held against (its base, its adapter with all zeros, its adapter shuffled) lie beside its own,
told apart by ``subject``.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

from adapterkit.errors import RegistryError, counted
from adapterkit.registry.canonical import freeze, thaw
from adapterkit.registry.names import check_sha256, check_time

KEY = "evaluation"
SELF, BASE, ZEROS, SHUFFLED = "self", "base", "zeros", "shuffled"
SUBJECTS = {
    SELF: "the version itself",
    BASE: "its base without it",
    ZEROS: "its base with its adapter's change set to zero",
    SHUFFLED: "its base with its adapter's values shuffled",
}
_FIELDS = {
    *("task", "metric", "value", "stderr", "n", "slice", "subject"),
    *("when", "tool", "tool_version", "settings", "source"),
}
_LINE = r"[^\x00-\x1f\x7f\[\]]{1,200}"


@dataclass(frozen=True)
class Score:
    """One figure of an evaluation.

    Attributes:
        task, metric: what was asked, and how answers were counted.
        value: the figure.
        stderr: its standard error, None where it is not stated.
        n: over how many samples, 0 where it is not stated.
        slice: a part of the task's samples, as ``lang=de``; empty for all of them.
        subject: whose figure it is, a key of `SUBJECTS`.
        when: UTC time, empty where it is not stated.
        tool, tool_version: what measured.
        settings: what else decides the figure, as the number of examples in the prompt; plain JSON.
        source: sha256 of the file that said so; empty where there was none.
    """

    task: str
    metric: str
    value: float
    stderr: float | None = None
    n: int = 0
    slice: str = ""
    subject: str = SELF
    when: str = ""
    tool: str = "unknown"
    tool_version: str = ""
    settings: Mapping[str, Any] = field(default_factory=dict)
    source: str = ""

    def __post_init__(self) -> None:
        where = f"evidence.evaluation of {str(self.task)[:80]!a}/{str(self.metric)[:80]!a}"
        for key in ("task", "metric", "tool"):
            if not isinstance(getattr(self, key), str) or not re.fullmatch(_LINE, getattr(self, key)):
                raise RegistryError(f"{where}: its {key} is not one line of at most 200 characters without brackets")
        for key in ("slice", "tool_version"):
            text = getattr(self, key)
            if not isinstance(text, str) or (text and not re.fullmatch(_LINE, text)):
                raise RegistryError(f"{where}: its {key} is not one line of at most 200 characters without brackets")
        if self.subject not in SUBJECTS:
            raise RegistryError(f"{where}: its subject is none of {', '.join(SUBJECTS)}")
        if not _number(self.value):
            raise RegistryError(f"{where} is {self.value}, which is no figure")
        if self.stderr is not None and not (_number(self.stderr) and self.stderr >= 0):
            raise RegistryError(f"{where}: its standard error is {self.stderr}, which is none")
        if type(self.n) is not int or not 0 <= self.n < 1 << 62:
            raise RegistryError(f"{where}: it was measured over {self.n} samples, which is no count")
        if self.when:
            check_time(self.when, f"{where}: when")
        if self.source:
            check_sha256(self.source, f"{where}: source")
        if not isinstance(self.settings, Mapping):
            raise RegistryError(f"{where}: its settings are not an object")
        object.__setattr__(self, "settings", freeze(self.settings, where))

    @property
    def label(self) -> str:
        """``task[slice]/metric``"""
        return f"{self.task}{f'[{self.slice}]' if self.slice else ''}/{self.metric}"

    @property
    def key(self) -> str:
        """Its name among the figures of a record; one measured again takes the place of the one before."""
        return self.label if self.subject == SELF else f"{self.subject}:{self.label}"

    def to_json(self) -> dict[str, Any]:
        """The object that a record holds."""
        return {key: thaw(getattr(self, key)) for key in sorted(_FIELDS)}


def _number(value: object) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)


def evidence_of(found: Iterable[Score]) -> dict[str, Any]:
    """The object that records hold under ``evaluation``.

    Raises:
        RegistryError: two figures have one name.
    """
    held: dict[str, Any] = {}
    for one in found:
        if one.key in held:
            raise RegistryError(f"{one.key} is measured twice", "give one file for each run")
        held[one.key] = one.to_json()
    return held


def read(evidence: Mapping[str, Any]) -> tuple[Score, ...]:
    """The figures in the evidence of a record, by name.

    Raises:
        RegistryError: what is there under ``evaluation`` is something else.
    """
    found = []
    for key, value in sorted(evidence.get(KEY, {}).items()):
        if not isinstance(value, Mapping) or value.keys() != _FIELDS:
            raise RegistryError(f"evidence.evaluation.{key} does not hold exactly {', '.join(sorted(_FIELDS))}")
        found.append(Score(**value))
    return tuple(found)


def read_shown(evidence: Mapping[str, Any]) -> tuple[tuple[Score, ...], str]:
    """The figures for readers, and a sentence where what is there is something else: one record from elsewhere must not
    hide all others.
    """
    try:
        return read(evidence), ""
    except RegistryError as error:
        return (), error.message


def sentence(one: Score) -> str:
    """``0.712 ± 0.02 over 500 samples; 2026-01-31, lm-eval 0.4.13``"""
    spread = f" \N{PLUS-MINUS SIGN} {one.stderr:.2g}" if one.stderr is not None else ""
    over = f" over {counted(one.n, 'sample')}" if one.n else " over an unstated number of samples"
    made = ", ".join(part for part in (one.when[:10], f"{one.tool} {one.tool_version}".strip()) if part)
    return f"{one.value:.4g}{spread}{over}; {made}"
