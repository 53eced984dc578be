"""A job whose plan says of every input what it was when the job was planned: weights, and what was read or is copied beside."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from adapterkit.checkpoint.files import LocalFile, Source
from adapterkit.checkpoint.objects import object_file
from adapterkit.checkpoint.pins import pin, pins_of
from adapterkit.checkpoint.values import known_by

if TYPE_CHECKING:
    from adapterkit.checkpoint.plan import Plan

AnyJob = TypeVar("AnyJob")  # a `Job`; that module asks for this one

NAMED = ("imatrix", "calibration", "metadata", "tensor_type_file")  # options that name a file which decides values


def pinned(job: AnyJob) -> AnyJob:
    """The job, and those that are written in its pass, with plans that hold their inputs.

    Raises:
        CheckpointError: an input changed since it was read.
    """
    given: Any = job
    made = replace(given, plan=pinned_plan(given.plan, given.sources), also=tuple(map(pinned, given.also)))
    if given.results is None:
        return made  # type: ignore[no-any-return]
    found = given.results()
    results = replace(found, plan=pinned_plan(found.plan, given.sources))
    return replace(made, results=lambda: results)  # type: ignore[no-any-return]


def pinned_plan(plan: Plan, sources: Sequence[Source]) -> Plan:
    """A plan that holds its inputs, by the weight files that it is made of.

    Raises:
        CheckpointError: one changed since it was read.
    """
    inputs = dict(plan.inputs)
    for source in sources:
        inputs[source.name] = known_by(source, inputs.get(source.name))
    return replace(plan, inputs=inputs, pins={**pins_of(sources), **_named(plan.request)})


def _named(request: Mapping[str, Any]) -> dict[str, str]:
    found = {}
    for option in NAMED:
        name = request.get(option)
        if isinstance(name, str):
            path = Path(name).expanduser()
            one = LocalFile(path).seen if path.is_file() else object_file(name)
            if one is not None:
                found[name] = pin(one)
    return found
