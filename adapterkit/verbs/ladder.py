"""Several GGUF types of one model in one pass: ``--quant Q8_0,Q5_K_M,Q4_K_M``."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import TYPE_CHECKING, Any, TypeVar

from adapterkit.errors import UsageError, option

if TYPE_CHECKING:
    from adapterkit.verbs.job import Job

Asked = TypeVar("Asked")


def rungs(request: Any) -> tuple[Any, ...]:
    """The request once for each type it names; itself alone where that is one.

    What goes beside the output once (a tower's file) goes beside the first.

    Raises:
        UsageError: the output is no GGUF file, or a type is named twice.
    """
    names = [one.strip() for one in (request.quant or "").split(",")]
    if len(names) < 2:
        return (request,)
    out = request.target
    if out is None or out.suffix != ".gguf" or request.to not in (None, "gguf"):
        raise UsageError(f"{option('quant', request.quant)} is for GGUF outputs", "name the output like OUT.gguf")
    if not all(names) or len({name.upper() for name in names}) != len(names):
        raise UsageError(f"{option('quant', request.quant)} names a type twice or none", "write it like Q8_0,Q4_K_M")
    if request.on is not None:
        raise UsageError("several types are one pass of one process", f"leave out {option('on')}, or name one type")
    if request.save_plan is not None:
        raise UsageError("a plan is of one output", "save a plan for each type")
    first, *others = (
        replace(request, quant=name, out=out.with_name(f"{out.stem}-{name.upper()}.gguf"), to=request.to)
        for name in names
    )
    return (first, *(replace(one, mmproj=None) for one in others))


def abreast(jobs: list[Job]) -> Job:
    """The first job with the others in its pass."""
    first, *others = jobs
    if not others:
        return first
    report: Callable[[Any], Any] = first.report
    names = ", ".join(str(job.out) for job in others)

    def said(measured: Any) -> Any:
        return report(replace(measured, notes=(*measured.notes, f"written in the same pass: {names}")))

    beside = tuple(one for job in others for one in job.also)  # each type has its own residual
    return replace(first, report=said, also=(*first.also, *others, *beside))
