"""How one output file becomes an object: its bytes cut into parts, each copied by the store or sent from here.

S3 takes an object as at most 10,000 parts of 5 MiB to 5 GiB, the last one of any size; what holds there holds in the other
stores. Runs of bytes that lie in an object of the same store as they are become copied parts. What lies between is sent;
where that is less than a part may be, it takes the beginning of the run behind it along. Parts are cut between blocks of a
tensor, so that nothing is computed twice. The cut follows from the plan alone: every worker finds the same parts under the
same numbers.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import TYPE_CHECKING

from adapterkit.errors import UsageError

if TYPE_CHECKING:
    from adapterkit.checkpoint.plan import Plan, PlannedFile
    from adapterkit.checkpoint.plan_file import PlanStep
    from adapterkit.checkpoint.tensor import Tensor

LEAST = 5 << 20  # bytes of a part that is not the last
MOST_PARTS = 10_000
SENT = 16 << 20  # bytes of a part that is sent, about
COPIED = 1 << 30  # bytes of a part that is copied, at most; the store takes up to 5 GiB, at some 100 MB a second


@dataclass(frozen=True)
class Segment:
    """Bytes of an output file that come from one place.

    Attributes:
        offset, nbytes: in the output file.
        source, source_offset: an input file that holds them as they are.
        step: a tensor that is computed.
        data: bytes that the plan knows, as a function.
    """

    offset: int
    nbytes: int
    source: str | None = None
    source_offset: int = 0
    step: PlanStep | None = None
    data: Callable[[], bytes] | None = None

    @property
    def stop(self) -> int:
        return self.offset + self.nbytes


@dataclass(frozen=True)
class ObjectPart:
    """One part of an object.

    Attributes:
        number: from 1.
        start, stop: bytes of the object.
        source, source_offset: of a part that the store copies.
    """

    number: int
    start: int
    stop: int
    source: str | None = None
    source_offset: int = 0

    @property
    def nbytes(self) -> int:
        return self.stop - self.start


@dataclass(frozen=True)
class Schedule:
    """The parts of one file, in order, and where its bytes come from."""

    file: PlannedFile
    segments: tuple[Segment, ...]
    parts: tuple[ObjectPart, ...]

    @property
    def sent(self) -> int:
        """Bytes that leave this machine."""
        return sum(part.nbytes for part in self.parts if part.source is None)

    @property
    def inside(self) -> int:
        """Bytes that the store copies."""
        return sum(part.nbytes for part in self.parts if part.source is not None)

    def within(self, start: int, stop: int) -> list[Segment]:
        """The segments that have bytes in a range."""
        first = bisect_right([one.offset for one in self.segments], start) - 1
        found = []
        for one in self.segments[max(first, 0) :]:
            if one.offset >= stop:
                break
            if one.stop > start:
                found.append(one)
        return found

    def of_range(self, start: int, stop: int) -> list[ObjectPart]:
        """The parts that begin in a range, so that ranges which make up the file have each part once."""
        return [part for part in self.parts if start <= part.start < max(stop, 1)]


def sent_at_once(file: PlannedFile) -> int:
    """About how many bytes of a file a worker holds and sends as one part."""
    return max(SENT, -(-file.nbytes // (MOST_PARTS // 2)))


def schedule(
    plan: Plan,
    file: PlannedFile,
    tensors: Mapping[str, Tensor],
    inside: Callable[[Segment], bool],
    *,
    ranges: bool = True,
) -> Schedule:
    """The parts of a file.

    Args:
        tensors: the handles that the plan was made from.
        inside: whether the store can copy bytes of an input.
        ranges: whether it copies ranges; else what is copied is one part.

    Raises:
        UsageError: more than S3 takes.
    """
    segments = tuple(_joined(_segments(plan, file)))
    runs = _runs(segments, inside)
    parts: list[ObjectPart] = []
    sent = sent_at_once(file)
    for start, stop, source, offset in runs:
        if source is None:
            bounds = _cuts(segments, tensors, start, stop, sent)
        else:
            bounds = [*range(start, stop, COPIED), stop] if ranges else [start, stop]
            if len(bounds) > 2 and bounds[-1] - bounds[-2] < LEAST:
                bounds[-2] -= LEAST
        for low, high in pairwise(bounds):
            parts.append(ObjectPart(len(parts) + 1, low, high, source, offset + low - start if source else 0))
    if not parts:
        parts.append(ObjectPart(1, 0, file.nbytes))
    if len(parts) > MOST_PARTS:
        raise UsageError(f"{file.name} would be an object of {len(parts)} parts, and S3 takes {MOST_PARTS}", "shard it")
    return Schedule(file, segments, tuple(parts))


def _segments(plan: Plan, file: PlannedFile) -> Iterator[Segment]:
    """All bytes of a file, in order."""
    if file.verbatim is not None:
        yield Segment(0, file.nbytes, file.verbatim, 0)
        return
    found: list[Segment] = []
    if not file.head:
        first = min((step.offset for step in file.steps), default=file.nbytes)
        found.append(Segment(0, first, data=lambda: plan.header(file)))
    for chunk in file.head:
        if chunk.source is not None:
            found.append(Segment(chunk.offset, chunk.nbytes, chunk.source, chunk.source_offset))
        else:
            found.append(Segment(chunk.offset, chunk.nbytes, data=lambda chunk=chunk: chunk.content))  # type: ignore[misc]
    found += [Segment(at, nbytes, data=lambda nbytes=nbytes: bytes(nbytes)) for at, nbytes in file.gaps]  # type: ignore[misc]
    for step in file.steps:
        if step.source is not None:
            found.append(Segment(step.offset, step.nbytes, step.source, step.source_offset))
        else:
            found.append(Segment(step.offset, step.nbytes, step=step))
    yield from sorted((one for one in found if one.nbytes), key=lambda one: one.offset)


def _joined(segments: Iterator[Segment]) -> Iterator[Segment]:
    """Segments of one source that follow one another there too, as one."""
    last: Segment | None = None
    for one in segments:
        if (
            last is not None
            and last.source is not None
            and last.source == one.source
            and last.source_offset + last.nbytes == one.source_offset
            and last.stop == one.offset
        ):
            last = Segment(last.offset, last.nbytes + one.nbytes, last.source, last.source_offset)
            continue
        if last is not None:
            yield last
        last = one
    if last is not None:
        yield last


_Run = tuple[int, int, "str | None", int]  # start, stop, source, offset in it


def _runs(segments: Sequence[Segment], inside: Callable[[Segment], bool]) -> list[_Run]:
    """What is copied and what is sent, in order; each long enough for a part, but for the last."""
    found: list[_Run] = []
    for one in segments:
        copied = one.source is not None and one.nbytes >= LEAST and inside(one)
        start, source, offset = one.offset, one.source if copied else None, one.source_offset if copied else 0
        short = found and found[-1][2] is None and found[-1][1] - found[-1][0] < LEAST
        if copied and short:
            taken = LEAST - (found[-1][1] - found[-1][0])
            if one.nbytes - taken < LEAST:
                copied, source, offset = False, None, 0
            else:
                found[-1] = (found[-1][0], start + taken, None, 0)
                start, offset = start + taken, offset + taken
        if not copied and found and found[-1][2] is None:
            found[-1] = (found[-1][0], one.stop, None, 0)
        else:
            found.append((start, one.stop, source, offset))
    return found


def _cuts(segments: Sequence[Segment], tensors: Mapping[str, Tensor], start: int, stop: int, size: int) -> list[int]:
    """Where a run that is sent is cut: into parts of about ``size``, between blocks."""
    found = [start]
    while stop - found[-1] > size * 3 // 2:
        found.append(_bound(segments, tensors, found[-1], found[-1] + size, stop))
    if len(found) > 1 and stop - found[-1] < LEAST:
        found.pop()
    return [*found, stop]


def _bound(segments: Sequence[Segment], tensors: Mapping[str, Tensor], start: int, wanted: int, stop: int) -> int:
    """The last bound between blocks that is not behind ``wanted`` and leaves a whole part; else the next one behind it."""
    at = bisect_right([one.offset for one in segments], wanted) - 1
    one = segments[at]
    if one.step is None:
        return wanted
    grid = block_bytes(tensors[one.step.tensor])
    low = one.offset + (wanted - one.offset) // grid * grid
    if low - start >= LEAST:
        return low
    return min(low + grid, one.stop, stop)


def block_bytes(tensor: Tensor) -> int:
    """Bytes of a block of a tensor's own grid."""
    return max(tensor.dtype.nbytes((tensor.block,)), 1)
