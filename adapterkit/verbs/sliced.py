"""What a worker opens of a plan: as little as a part needs."""

from __future__ import annotations

import logging
import time
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING

from adapterkit.checkpoint.copies import SeenFiles, copies
from adapterkit.checkpoint.pins import compare, pins_of, unseen
from adapterkit.checkpoint.plan import step_of
from adapterkit.checkpoint.resolved import Describer, described, slice_of, slices_of
from adapterkit.checkpoint.slices import only
from adapterkit.checkpoint.values import is_planned

if TYPE_CHECKING:
    from collections.abc import Callable

    from adapterkit.checkpoint.cut import PlanPart
    from adapterkit.checkpoint.files import Source
    from adapterkit.checkpoint.plan import Plan
    from adapterkit.checkpoint.slices import Slice, StepGroup
    from adapterkit.checkpoint.tensor import Tensor
    from adapterkit.verbs.job import Job

log = logging.getLogger("adapterkit.slices")

Opened = tuple[Mapping[str, "Tensor"], Sequence["Source"]]
A_TENSOR = 30e-6  # seconds that it takes to open each tensor of a plan
LEAST = 0.5  # seconds of slices that are always worth it


class PartOpener:
    """Opens parts of a plan, each alone.

    Args:
        plan: that is executed.
        replan: plans again what the plan asks for, of inputs as they are opened at that moment.
        named: the inputs as the user gave them.
    """

    def __init__(self, plan: Plan, replan: Callable[[], Job], named: Sequence[str] = ()) -> None:
        self._plan, self._replan = plan, replan
        self._seen = SeenFiles(named)
        self._last: tuple[object, Opened] | None = None
        self._spent = 0.0

    def open(self, part: PlanPart) -> Opened | None:
        """The tensors of a part, and all files of the plan's inputs; None where the whole plan has to be opened, or will have
        cost less than slices by now."""
        copied = copies(self._plan, part, self._seen)
        if copied is not None:
            return copied
        key = (part.file.name, part.start, part.stop)
        if self._last is not None and self._last[0] == key:
            return self._last[1]
        if self._spent > LEAST + A_TENSOR * sum(len(file.steps) for file in self._plan.files):
            return None
        started = time.monotonic()
        wanted = slice_of(self._plan, part)
        found = None if wanted is None else self._sliced(part, *wanted)
        self._spent += time.monotonic() - started
        if found is not None:
            self._last = (key, found)
        return found

    def _sliced(self, part: PlanPart, some: Slice, groups: Sequence[StepGroup]) -> Opened | None:
        """A part that was planned alone, if that came out as in the plan."""
        try:
            with only(some):
                job = self._replan()
                tensors = job.tensors if job.results is None else job.results().tensors
                different = self._different(part, groups, tensors) or self._others(some, job.sources)
        # Of a slice any rule may say that something is missing. Whether that is so shows when the whole plan is opened.
        except Exception as error:
            different = f"{type(error).__name__}: {error}"
        if different:
            log.debug("part %d of %s is opened with the whole plan: %s", part.index, part.file.name, different)
            return None
        log.debug("part %d of %s is opened alone: %d inputs", part.index, part.file.name, len(some.wanted))
        return tensors, job.sources

    def _different(self, part: PlanPart, groups: Sequence[StepGroup], tensors: Mapping[str, Tensor]) -> str:
        """What came out otherwise."""
        for step in part.steps:
            if step.tensor not in tensors or step_of(tensors[step.tensor], step.offset) != step:
                return f"{step.tensor} is planned otherwise"
        describer = Describer()
        for group in groups:
            steps = part.file.steps[group.first : group.first + group.count]
            names = [step.tensor for step in steps if step.source is None]
            if described(names, tensors, describer)[0] != group.digest:
                return f"one of {names[0]} and {len(names) - 1} that follow it is resolved otherwise"
        return ""

    def _others(self, some: Slice, sources: Sequence[Source]) -> str:
        """What input is another than that of the plan."""
        plan = self._plan
        names = {source.name for source in sources}
        missing = next((name for name in some.wanted if name not in names), None)
        if missing is not None:
            return f"{missing} is not opened"
        for source in sources:
            said = plan.inputs.get(source.name, "")
            if not said.startswith(f"{source.size}:") or (
                (source.version or source.name in some.wanted) and not is_planned(source, said)
            ):
                return f"{source.name} changed"
        if unseen(plan.pins):
            now = pins_of(sources)
            compare({name: said for name, said in plan.pins.items() if name in now}, now)
        return ""


def with_slices(job: Job) -> Job:
    """A job whose executed plan says of each part what it needs.

    Results (of a combination, an extraction, a verification) are made of a model or adapters as a whole, and so is what a rule
    makes of adapters. Their plans say nothing: a worker opens everything at once, and does not try less before.
    """
    if job.results is not None or not job.sliced:
        return job
    return replace(job, plan=replace(job.plan, slices=slices_of(job.plan, job.tensors)))
