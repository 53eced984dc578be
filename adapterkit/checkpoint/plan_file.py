"""The plan as JSON: what the tensors of a model have in common is said once, so that 92,000 of them stay below 8 MB.

Every file lists the names of its tensors in the order of their bytes, and beside them columns:

* ``kinds``: for each tensor the row of the table ``kinds`` that has its dtype, shape, bytes, how it is made, and how many
  bytes are read for it;
* ``offsets``: ``[offset, count]`` for each run of tensors that lie end to end;
* ``copies``: ``[first, count, source, offset]`` for each run of tensors that are copied from bytes that lie end to end in
  one file of ``sources``; all others are computed.

The steps of a file become values when they are asked for: who executes one part needs those of one file.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from math import prod
from typing import Any, NamedTuple, overload

COLUMNS = ("tensors", "kinds", "offsets", "copies")


class PlanStep(NamedTuple):
    """One tensor of an output file: copied from ``source`` when that is set, else computed."""

    tensor: str
    dtype: str
    shape: tuple[int, ...]
    offset: int
    nbytes: int
    how: str
    reads: int
    source: str | None = None
    source_offset: int = 0

    @property
    def elements(self) -> int:
        """How many elements the tensor has."""
        return prod(self.shape)


class StepKind(NamedTuple):
    """What tensors have in common."""

    dtype: str
    shape: tuple[int, ...]
    nbytes: int
    how: str
    reads: int


class Tables:
    """The rows that the columns of all files refer to."""

    def __init__(self, kinds: Sequence[Sequence[Any]], sources: Sequence[str]) -> None:
        self.kinds = [
            StepKind(str(d), tuple(map(int, shape)), int(n), str(how), int(r)) for d, shape, n, how, r in kinds
        ]
        self.sources = [str(name) for name in sources]

    def data(self) -> dict[str, Any]:
        """As JSON."""
        return {"kinds": [[*kind] for kind in self.kinds], "sources": self.sources}


class Steps(Sequence[PlanStep]):
    """The steps of a file of a plan that was read, made of its columns when they are first asked for."""

    def __init__(self, columns: Mapping[str, Any], tables: Tables) -> None:
        """See that the columns fit each other.

        Raises:
            ValueError, TypeError, KeyError: they do not.
        """
        self.columns = {name: columns[name] for name in COLUMNS}
        self.tables = tables
        self._made: tuple[PlanStep, ...] | None = None
        names, kinds = self.columns["tensors"], self.columns["kinds"]
        if not all(type(name) is str for name in names) or not all(type(kind) is int for kind in kinds):
            raise TypeError("a tensor or a kind")
        known = not kinds or 0 <= min(kinds) <= max(kinds) < len(tables.kinds)
        if not known or len(names) != len(kinds) or sum(count for _, count in self.columns["offsets"]) != len(names):
            raise ValueError("columns of different lengths")
        for first, count, source, offset in self.columns["copies"]:
            if not 0 <= first < first + count <= len(names) or not 0 <= source < len(tables.sources) or offset < 0:
                raise ValueError("a copy of something else")

    def __len__(self) -> int:
        return len(self.columns["tensors"])

    @overload
    def __getitem__(self, index: int) -> PlanStep: ...
    @overload
    def __getitem__(self, index: slice) -> tuple[PlanStep, ...]: ...
    def __getitem__(self, index: int | slice) -> PlanStep | tuple[PlanStep, ...]:
        return self._all()[index]

    def __iter__(self) -> Iterator[PlanStep]:
        return iter(self._all())

    def __eq__(self, other: object) -> bool:
        return isinstance(other, (tuple, Steps)) and self._all() == tuple(other)

    def __hash__(self) -> int:
        return hash(self._all())

    def _all(self) -> tuple[PlanStep, ...]:
        if self._made is None:
            self._made = tuple(_steps(self.columns, self.tables))
        return self._made


def _steps(columns: Mapping[str, Any], tables: Tables) -> Iterator[PlanStep]:
    names, kinds = columns["tensors"], columns["kinds"]
    sources: dict[int, tuple[str, int]] = {}
    for first, count, source, offset in columns["copies"]:
        for index in range(first, first + count):
            sources[index] = (tables.sources[source], offset)
            offset += tables.kinds[kinds[index]].nbytes
    index = 0
    for offset, count in columns["offsets"]:
        for index in range(index, index + count):  # noqa: B020
            dtype, shape, nbytes, how, reads = tables.kinds[kinds[index]]
            yield PlanStep(names[index], dtype, shape, offset, nbytes, how, reads, *sources.get(index, ()))
            offset += nbytes
        index += 1 if count else 0


def columns_of(files: Sequence[Sequence[PlanStep]]) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """The steps of files as JSON: the tables, and for each file its columns."""
    read = [steps for steps in files if isinstance(steps, Steps)]
    if read and len(read) == len(files) and all(steps.tables is read[0].tables for steps in read):
        return read[0].tables.data(), [steps.columns for steps in read]
    kinds: dict[tuple[Any, ...], int] = {}
    sources: dict[str, int] = {}
    found = []
    for steps in files:
        names, of_kind = [], []
        offsets: list[list[int]] = []
        copies: list[list[int]] = []
        there, copied = -1, ("", -1)
        for index, step in enumerate(steps):
            tensor, dtype, shape, offset, nbytes, how, reads, source, source_offset = step
            names.append(tensor)
            of_kind.append(kinds.setdefault((dtype, shape, nbytes, how, reads), len(kinds)))
            if offset == there:
                offsets[-1][1] += 1
            else:
                offsets.append([offset, 1])
            there = offset + nbytes
            if source is None:
                copied = ("", -1)
                continue
            if copied == (source, source_offset):
                copies[-1][1] += 1
            else:
                copies.append([index, 1, sources.setdefault(source, len(sources)), source_offset])
            copied = (source, source_offset + nbytes)
        found.append({"tensors": names, "kinds": of_kind, "offsets": offsets, "copies": copies})
    return {"kinds": [[*kind] for kind in kinds], "sources": list(sources)}, found


def to_text(data: Mapping[str, Any]) -> str:
    """JSON with a line for each key, and for each file."""
    lines = [f" {_dumps(name)}: {_dumps(value)}" for name, value in data.items() if name != "files"]
    files = ",\n".join(f"  {_dumps(file)}" for file in data["files"])
    return "{\n" + ",\n".join([*lines, f' "files": [\n{files}\n ]']) + "\n}\n"


def _dumps(value: Any) -> str:
    return json.dumps(value, separators=(",", ":"), ensure_ascii=False)
