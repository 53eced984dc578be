"""What a build will do, and what it did, as frozen values."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

UNCHANGED, NEW, AGAIN = "unchanged", "new", "again"


@dataclass(frozen=True)
class PlannedOutput:
    """One output of a plan.

    Attributes:
        name, verb, to, out: which step, what it is and where it goes.
        state: ``unchanged`` (nothing is done), ``new``, or ``again`` (what is there was made from something else).
        why: in words.
        reads: what it is made from.
        files, nbytes, peak_memory, tensors, touched: from headers; None where they depend on another output that is not
            made yet.
        abreast: the other outputs that are written beside it in one pass over the base.
        then: what is done when it is there.
    """

    name: str
    verb: str
    to: str
    out: str
    state: str
    why: str
    reads: tuple[str, ...]
    files: tuple[str, ...] | None = None
    nbytes: int | None = None
    peak_memory: int | None = None
    tensors: int | None = None
    touched: int | None = None
    abreast: tuple[str, ...] = ()
    then: tuple[str, ...] = ()
    notes: tuple[str, ...] = ()


@dataclass(frozen=True)
class BuildPlan:
    """Everything that a build will do.

    Attributes:
        passes: over bases and sources, one for every group of outputs that are written abreast.
        nbytes: that will be written, as far as headers tell.
        peak_memory: the largest of any pass.
    """

    recipe: str
    lock: str
    locked: bool
    outputs: tuple[PlannedOutput, ...]
    passes: int
    nbytes: int
    peak_memory: int
    notes: tuple[str, ...] = ()


@dataclass(frozen=True)
class BuiltOutput:
    """One output of a build.

    Attributes:
        state: as planned; ``unchanged`` ones were not touched.
        digest: sha256 over the lines that ``sha256sum`` prints of its files.
        files: sha256 of each.
        nbytes: of all of them.
        report: of the verb, where it ran.
        after: what was done then, and what came of it.
    """

    name: str
    verb: str
    to: str
    out: str
    state: str
    digest: str
    files: Mapping[str, str]
    nbytes: int
    report: Mapping[str, Any] | None = None
    after: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class BuildReport:
    """What a build did; times are seconds, memory bytes.

    Attributes:
        changed: how many outputs were made.
        inputs: what each reference of the recipe meant: its pin and the sha256 of what was read, by its key.
        lock_written: whether the lock says something new.
    """

    recipe: str
    lock: str
    locked: bool
    outputs: tuple[BuiltOutput, ...]
    inputs: Mapping[str, Mapping[str, Any]]
    changed: int
    passes: int
    lock_written: bool
    seconds: float
    peak_memory: int
    notes: tuple[str, ...] = ()
