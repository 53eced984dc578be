"""A plan cut into parts: runs of whole tensors of one output file, each about as much work as the others.

No byte depends on where a plan is cut. A part is a range of bytes between two tensors, so what is done is known by ranges,
and a run that goes on with other cuts knows what is left.
"""

from __future__ import annotations

from bisect import bisect_right
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence

    from adapterkit.checkpoint.plan import Plan, PlannedFile
    from adapterkit.checkpoint.plan_file import PlanStep

PART_SIZE = 1_000_000_000  # bytes of work in a part, where nothing else is said
FOR_EACH = 8  # parts that each worker has at least, where that leaves them large enough: so the last ones end together
LEAST = 50_000_000  # bytes of work below which a part is not worth its beginning and its end
COPY, COMPUTE, ENCODE = 0.25, 1.0, 8.0
"""What a byte costs that is copied, read to be computed, and written in a type with scales (bench/results/quantize.json,
merge.json: a core computes some 0.4 GB a second of a merge, and encodes a tenth of that)."""
_DENSE = frozenset({"F64", "F32", "F16", "BF16", "C64", "I64", "I32", "I16", "I8", "U8", "BOOL"})


@dataclass(frozen=True)
class PlanPart:
    """A range of one output file.

    Attributes:
        index: its number in the cut.
        file: of the plan.
        start, stop: bytes of the file.
        cost: work, in bytes of a plain merge.
    """

    index: int
    file: PlannedFile
    start: int
    stop: int
    cost: float = 0.0

    @property
    def nbytes(self) -> int:
        """Bytes that it writes."""
        return self.stop - self.start

    @property
    def whole(self) -> bool:
        """Whether it is all of its file."""
        return self.nbytes == self.file.nbytes

    @cached_property
    def steps(self) -> tuple[PlanStep, ...]:
        """The tensors in it."""
        if self.whole:
            return tuple(self.file.steps)
        return tuple(step for step in self.file.steps if self.start <= step.offset < self.stop)

    @property
    def name(self) -> str:
        """What stands for it in the names of files; a file of a pipeline's component lies in a folder."""
        name = self.file.name.replace("/", "+")
        return name if self.whole else f"{name}.{self.start}-{self.stop}"

    @property
    def reads(self) -> int:
        """Bytes that are read for it (an estimate)."""
        return sum(step.reads for step in self.steps)


def whole_files(files: Iterable[PlannedFile]) -> list[PlanPart]:
    """Every file as one part."""
    return [PlanPart(index, file, 0, file.nbytes) for index, file in enumerate(files)]


def cost_of(step: PlanStep) -> float:
    """The work of a tensor, in bytes of a plain merge."""
    if step.source is not None:
        return COPY * step.nbytes
    return COMPUTE * step.reads + (COMPUTE if step.dtype in _DENSE else ENCODE) * step.nbytes


def cut(plan: Plan, size: int | None = PART_SIZE) -> list[PlanPart]:
    """The parts of a plan, in the order of its files; with None each file is one.

    Args:
        size: work of a part, in bytes of a plain merge; a tensor is never cut, so one that is more is a part alone.
    """
    if size is None:
        return whole_files(plan.files)
    found: list[PlanPart] = []
    for file in plan.files:
        steps = sorted(file.steps, key=lambda step: step.offset)
        costs = [cost_of(step) for step in steps]
        places = _places(costs, max(1, -(-int(sum(costs)) // size)))
        bounds = [0, *(steps[place].offset for place in places), file.nbytes]
        edges = [0, *places, len(steps)]
        for start, stop, first, last in zip(bounds, bounds[1:], edges, edges[1:], strict=False):
            found.append(PlanPart(len(found), file, start, stop, sum(costs[first:last])))
    return found


def elements_between(file: PlannedFile, start: int, stop: int) -> float:
    """By how much an output goes on between two bytes of a file: elements of its tensors, whether they are copied or computed,
    so that outputs of one base go on side by side; bytes of a file that is copied whole, whose tensors nobody asked for."""
    if file.verbatim is not None:
        return stop - start
    first = bisect_right(file.steps, start, key=lambda step: step.offset + step.nbytes)
    found = 0.0
    for index in range(first, len(file.steps)):
        step = file.steps[index]
        if step.offset >= stop:
            break
        here = min(stop, step.offset + step.nbytes) - max(start, step.offset)
        found += step.elements * here / step.nbytes if step.nbytes else 0.0
    return found


def even_size(plan: Plan, workers: int, least: int = LEAST) -> int:
    """Work of a part for so many workers: `PART_SIZE`, or less where there would be few parts for each."""
    total = sum(cost_of(step) for file in plan.files for step in file.steps)
    return max(min(PART_SIZE, int(total / (FOR_EACH * workers)) + 1), least)


def _places(costs: Sequence[float], count: int) -> list[int]:
    """Where to cut, so that each of at most ``count`` pieces costs about the same: indexes of first tensors."""
    total, done = sum(costs), 0.0
    places: list[int] = []
    for index, cost in enumerate(costs):
        # A cut comes before the tensor whose middle lies past the next mark.
        if index and len(places) + 1 < count and done + cost / 2 >= total * (len(places) + 1) / count:
            places.append(index)
        done += cost
    return places


def shares(parts: Sequence[PlanPart], count: int) -> list[list[PlanPart]]:
    """The parts dealt out to so many workers: the largest first, each to who has least to do."""
    dealt: list[list[PlanPart]] = [[] for _ in range(count)]
    loads = [0.0] * count
    for part in sorted(parts, key=lambda part: (-part.cost, part.index)):
        least = min(range(count), key=loads.__getitem__)
        dealt[least].append(part)
        loads[least] += part.cost
    return dealt
