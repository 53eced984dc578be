"""Several GGUF types of one model in one pass: ``--quant Q8_0,Q5_K_M,Q4_K_M``."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any, TypeVar

from adapterkit.errors import UsageError, option

if TYPE_CHECKING:
    from adapterkit.checkpoint.plan import Plan
    from adapterkit.verbs.job import Job

Asked = TypeVar("Asked")


def rungs(request: Any) -> tuple[Any, ...]:
    """The request once for each type it names; itself alone where that is one.

    What goes beside the output once (a tower's file) goes beside the first.

    Raises:
        UsageError: the output is no GGUF file, or a type is named twice.
    """
    names = types_of(request.quant)
    if len(names) < 2:
        return (request,)
    out = request.target
    planned = request.save_plan is not None and out is None and request.to == "gguf"  # the plan says no place
    if not planned and (out is None or out.suffix != ".gguf" or request.to not in (None, "gguf")):
        raise UsageError(f"{option('quant', request.quant)} is for GGUF outputs", "name the output like OUT.gguf")
    if request.on is not None:
        raise UsageError("several types are one pass of one process", f"leave out {option('on')}, or name one type")
    first, *others = (
        replace(request, quant=name, out=None if out is None else place_of(out, name), to=request.to) for name in names
    )
    return (first, *(replace(one, mmproj=None) for one in others))


def types_of(quant: str | None) -> tuple[str, ...]:
    """The types that ``quant`` names.

    Raises:
        UsageError: one is named twice, or none between two commas.
    """
    names = tuple(one.strip() for one in (quant or "").split(","))
    if len(names) > 1 and (not all(names) or len({name.upper() for name in names}) != len(names)):
        raise UsageError(f"{option('quant', quant)} names a type twice or none", "write it like Q8_0,Q4_K_M")
    return names


def place_of(path: Any, name: str) -> Any:
    """Where the file of a type goes: ``OUT-Q4_K_M.gguf`` beside ``OUT.gguf``. Of the plans it is the same."""
    return path.with_name(f"{path.stem}-{name.upper()}{path.suffix}")


def plans_of(request: Any, jobs: Sequence[Job]) -> dict[Any, Plan]:
    """The plans to save, one for each type, and where: each can be carried out by itself, by workers too."""
    if request.save_plan is None:
        return {}
    path, names = request.save_plan, types_of(request.quant)
    if len(jobs) == 1:
        return {path: jobs[0].plan}
    return {place_of(path, name): job.plan for name, job in zip(names, jobs, strict=True)}


def abreast(jobs: list[Job]) -> Job:
    """The first job with the others in its pass."""
    first, *others = jobs
    if not others:
        return first
    report: Callable[[Any], Any] = first.report
    names = ", ".join(f"{job.out} ({job.plan.nbytes:,} bytes)" for job in others)

    def said(measured: Any) -> Any:
        return report(replace(measured, notes=(*measured.notes, f"written in the same pass: {names}")))

    beside = tuple(one for job in others for one in job.also)  # each type has its own residual
    return replace(first, report=said, also=(*first.also, *others, *beside))
