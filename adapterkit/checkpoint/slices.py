"""The slice of a plan that one part needs: which bytes of which inputs its tensors are made of, and what they resolved to.

Who executes one part of a model in 163 files need not open the other 162. Yet rules look at the names of all tensors: a
stack of experts, a tied head, a fused projection could be resolved otherwise where some of them are out of sight. So a plan
says of every group of tensors that are computed what they were resolved to, as a digest
(`adapterkit.checkpoint.resolved`). A worker plans its slice alone, and takes what comes out only where it has that digest.
Else it opens the whole plan. So a slice may cost time, and never changes a byte.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import field
from typing import Any

from adapterkit.values import dataclass

GROUP = 32  # computed tensors that share a digest, at most; fewer where what they are made of changes

Ranges = dict[str, list[tuple[int, int]]]  # by name of an input: starts and stops of bytes, ascending


@dataclass(frozen=True)
class StepGroup:
    """Tensors of one output file that follow each other.

    Attributes:
        first, count: of the file's steps.
        digest: what those that are computed were resolved to; empty where that cannot be said.
        reads: what they are made of.
    """

    first: int
    count: int
    digest: str
    reads: Ranges

    def overlaps(self, low: int, high: int) -> bool:
        return self.first < high and low < self.first + self.count


Slices = Mapping[str, tuple[StepGroup, ...]]
"""By output file."""


@dataclass(frozen=True)
class Slice:
    """What is opened of a plan's inputs.

    Attributes:
        inputs: the names of all of them.
        wanted: the tensors of which are opened.
    """

    inputs: frozenset[str]
    wanted: Ranges
    _starts: dict[str, list[int]] = field(default_factory=dict)

    def holds(self, name: str, offset: int) -> bool:
        """Whether a tensor at this place of an input belongs to it."""
        ranges = self.wanted.get(name)
        if not ranges:
            return False
        starts = self._starts.get(name)
        if starts is None:
            starts = self._starts[name] = [start for start, _ in ranges]
        at = bisect_right(starts, offset) - 1
        return at >= 0 and offset < max(ranges[at][1], ranges[at][0] + 1)


_current: ContextVar[Slice | None] = ContextVar("slice", default=None)


def current() -> Slice | None:
    """The slice that is being opened; None where inputs are opened whole."""
    return _current.get()


@contextmanager
def only(some: Slice) -> Iterator[None]:
    """Open nothing but a slice of a plan's inputs."""
    token = _current.set(some)
    try:
        yield
    finally:
        _current.reset(token)


def joined(ranges: Iterable[tuple[str, int, int]]) -> Ranges:
    """Ranges of inputs as (name, start, stop), sorted, and joined where they touch."""
    found: Ranges = {}
    for name, start, stop in sorted(ranges):
        own = found.setdefault(name, [])
        if own and start <= own[-1][1]:
            own[-1] = (own[-1][0], max(own[-1][1], stop))
        else:
            own.append((start, stop))
    return found


def to_data(slices: Slices) -> dict[str, Any]:
    """As JSON: the names of inputs once, and for each file its groups."""
    numbers: dict[str, int] = {}
    files = {
        file: [
            [
                group.first,
                group.count,
                group.digest,
                [
                    [numbers.setdefault(name, len(numbers)), *[end for one in ranges for end in one]]
                    for name, ranges in group.reads.items()
                ],
            ]
            for group in groups
        ]
        for file, groups in slices.items()
    }
    return {"names": list(numbers), "files": files}


def from_data(data: Mapping[str, Any]) -> Slices:
    """Out of JSON.

    Raises:
        ValueError, TypeError, KeyError, IndexError: it is something else.
    """
    names = [str(name) for name in data["names"]]
    return {
        str(file): tuple(
            StepGroup(
                int(first),
                int(count),
                str(digest),
                {names[number]: list(zip(ends[::2], ends[1::2], strict=True)) for number, *ends in reads},
            )
            for first, count, digest, reads in groups
        )
        for file, groups in data["files"].items()
    }
