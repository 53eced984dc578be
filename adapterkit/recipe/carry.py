"""How each kind of step is planned and carried out: as the request of its verb, with the options that the recipe gives."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from adapterkit.ops.device import check_there
from adapterkit.recipe.lock import Pinned
from adapterkit.recipe.schema import Table, known_options
from adapterkit.recipe.steps import AUTO, COMBINE, MERGE, Input, Step, reference
from adapterkit.requests.adapters import CombineRequest
from adapterkit.requests.convert import ConvertRequest
from adapterkit.requests.merge import MergeRequest
from adapterkit.verbs.job import Job, run
from adapterkit.verbs.placed import device_of

if TYPE_CHECKING:
    from adapterkit.checkpoint.write import Ready

Ref = str | Path
Progress = Callable[[int, int], None]
Pins = Mapping[str, Pinned]
# Options whose values are files, which a step names as its inputs.
_FILES = ("imatrix", "mmproj", "calibration", "metadata", "tensor_type_file")


@dataclass(frozen=True)
class How:
    """How a build writes: worker threads, whether interrupted work is used, and who is told of progress."""

    jobs: int | None = None
    resume: bool = False
    progress: Progress | None = None


def opened_as(one: Input, pins: Pins) -> Ref:
    """What to open for an input: its path, or what it is pinned to."""
    from adapterkit.recipe.parse import shown

    return pins[shown(one.place)].pin if one.path is None else reference(one.path)


def request_of(step: Step, pins: Pins, how: How, *, force: bool = False) -> Any:
    """The request of a step's verb."""
    given: dict[str, Any] = {**step.asked.options, "out": step.out, "force": force}
    given |= {"jobs": how.jobs, "resume": how.resume, "progress": how.progress}
    for name in _FILES:
        one = getattr(step, name)
        if one is not None:
            given[name] = opened_as(one, pins)
    base = None if step.base is None else opened_as(step.base, pins)
    if step.verb == MERGE:
        return MergeRequest.bound(
            {**given, **_of_base(step, pins), **_of_adapters(step, pins), "base": base, "to": step.to}
        )
    if step.verb == COMBINE:
        if given.get("dtype") == "auto":
            del given["dtype"]
        return CombineRequest.bound({**given, **_of_base(step, pins), **_of_adapters(step, pins), "base": base})
    assert step.source is not None
    if step.compressor is not None:
        given["compressor"] = step.compressor
    return ConvertRequest.bound({**given, "src": opened_as(step.source, pins), "to": step.to, "base": base})


def _of_base(step: Step, pins: Pins) -> dict[str, Any]:
    """What the recipe says of the base, beside which it is."""
    found = {} if step.choice is None else dict(step.choice.options)
    if step.base16 is not None:
        found["base16"] = opened_as(step.base16, pins)
    return found


def _of_adapters(step: Step, pins: Pins) -> dict[str, Any]:
    """The adapters, how strongly each counts, and how they go together."""
    adapters = [opened_as(one, pins) for one in step.adapters]
    return {**step.combination.options, "adapters": adapters, "weights": [one.weight for one in step.adapters]}


def planned(step: Step, pins: Pins, how: How, *, headers_only: bool, force: bool = False) -> Any:
    """A step that is planned from headers alone: what its verb's module plans, with a `job`."""
    request = request_of(step, pins, how, force=force)
    if step.verb == MERGE:
        from adapterkit.verbs.merge import planned as merge

        return merge(request, headers_only=headers_only, fingerprints=False)
    if step.verb == COMBINE:
        from adapterkit.verbs.combine import planned as combine

        return combine(request)
    from adapterkit.verbs.convert import planned as convert

    return convert(request, headers_only=headers_only)


def job_of(step: Step, pins: Pins, how: How, *, force: bool) -> Job:
    """A step, ready to be carried out."""
    job: Job = planned(step, pins, how, headers_only=False, force=force).job()
    check_there(device_of(job.plan.request))
    return job


def carry(jobs: Sequence[Job], how: How, before: Callable[[Sequence[Ready]], None] = lambda ready: None) -> list[Any]:
    """Carry out jobs abreast; a report for each.

    Args:
        before: called with all outputs when they are whole, before the first has its name.
    """
    return run(jobs, workers=how.jobs, resume=how.resume, progress=how.progress, before=before)


def combine_step(step: Step, pins: Pins, how: How, *, force: bool) -> Any:
    """Carry out a combination of adapters; its report."""
    return carry([job_of(step, pins, how, force=force)], how)[0]


def settings(step: Step) -> dict[str, Any]:
    """What of a step, beside the content of its inputs, decides the bytes that it writes."""
    asked, combination = _said(step.asked), _said(step.combination)
    base = {} if step.choice is None else _said(step.choice)
    return {"verb": step.verb, "to": step.to, "asked": asked, "combination": combination, "base": base}


def _said(table: Table) -> dict[str, Any]:
    """The options of a table that are not at their defaults; files count by their content."""
    known = {one.name: one for one in known_options(table.TABLE).values()}
    return {
        name: value
        for name, value in table.options.items()
        if (name not in (*_FILES, "base16") or value == AUTO) and value != known[name].default
    }
