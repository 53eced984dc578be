"""`convert`: the same content in another format, in one streaming pass."""

from __future__ import annotations

import time
from collections.abc import Mapping
from dataclasses import replace
from functools import partial
from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING, Any

from adapterkit.bases import open_model
from adapterkit.checkpoint.plan import default_jobs
from adapterkit.errors import UsageError, option
from adapterkit.places import Address, address_of
from adapterkit.requests.call import takes
from adapterkit.requests.convert import ConvertPlanRequest, ConvertRequest
from adapterkit.requests.formats import Format, find_format, formats
from adapterkit.verbs.beside import beside_of
from adapterkit.verbs.carry import carry_out
from adapterkit.verbs.conversions.adapters import filed
from adapterkit.verbs.conversions.conversion import Conversion
from adapterkit.verbs.job import Recorder
from adapterkit.verbs.ladder import abreast, plans_of, rungs
from adapterkit.verbs.pinned import pinned_plan
from adapterkit.verbs.placed import computed_on

if TYPE_CHECKING:
    from collections.abc import Sequence

    from adapterkit.checkpoint.checkpoint import Checkpoint
    from adapterkit.checkpoint.files import FirstSeen
    from adapterkit.checkpoint.listing import Listing
    from adapterkit.verbs.job import Job
    from adapterkit.verbs.report import ConvertReport

FLOATS = frozenset({"F64", "F32", "F16", "BF16"})
"""Types that a model can be in and not be called quantized."""


@takes(ConvertPlanRequest)
def plan_convert(request: ConvertPlanRequest) -> Conversion:
    """Plan a conversion from headers alone; see `convert`.

    With ``headers_only`` a source on the Hub is not downloaded, so the plan can be shown but not executed.
    """
    made = planned(request, headers_only=request.headers_only)
    return replace(made, plan=pinned_plan(made.plan, made.sources))


def planned(request: ConvertRequest, *, headers_only: bool = True, named: Any = None) -> Conversion:
    """See `plan_convert`.

    Args:
        named: the source as the caller named it, for the record; it differs where the request reads a temporary copy.
    """
    form = find_format(request.to, request.out)
    request.check_format(form)
    asked = ConvertPlanRequest.of(request, headers_only=headers_only)
    found: Conversion = _planner(form)(asked, request.jobs or default_jobs())
    source = request.src if named is None else named
    again = {"verb": request.VERB, "src": str(source), "to": form.name, **_stated(request)}
    if request.target is not None and request.target.suffix == ".safetensors":
        if not form.single:
            raise UsageError(f"{form.name} is a folder, not a file", "name the output without .safetensors")
        found = replace(found, plan=filed(found.plan, request.target))
    plan = replace(found.plan, request={**again, **({"staged": True} if found.stage is not None else {})})
    folder = address_of(source) or Path(str(source)).expanduser()
    return replace(
        found,
        src=found.src if named is None else str(named),
        plan=plan,
        request=request,
        # A file without tensors is no model, which a record would name by them.
        record=None if request.vocab_only else found.record or _recorder(found, source, request),
        beside=beside_of(
            request,
            [request.base, source],
            source=folder if isinstance(folder, Address) or folder.is_dir() else None,
            plan=plan,
            sources=found.sources,
        ),
    )


def _planner(form: Format) -> Any:
    """The function that plans a conversion to a format, from a request and the number of worker threads."""
    module, _, function = form.planner.partition(":")
    return getattr(import_module(f"adapterkit.verbs.conversions.{module}"), function)


@takes(ConvertRequest)
def convert(request: ConvertRequest) -> ConvertReport:
    """Write the same content in another format; nothing is loaded whole, and the output appears whole or not at all.

    `adapterkit.requests.formats.formats` says which formats are made of which, and which options they take.

    Raises:
        NotFound, CheckpointError, AdapterError, TargetError, OutputError, UsageError, UnsafeError
    """
    started = time.monotonic()
    report: ConvertReport
    if request.allow_pickle:
        from adapterkit.pickles import unpickled

        if address_of(request.src) is not None:
            raise UsageError(f"pickles are read from a disk, and {request.src} is in a store", "download it first")
        if request.save_plan is not None:
            raise UsageError(
                f"a plan is carried out without reading a pickle, so it cannot be saved with {option('allow_pickle', True)}",
                f"convert {request.src} to safetensors first, and plan from that",
            )
        target = request.target
        watched: list[FirstSeen] = []
        parents = target.absolute().parents if isinstance(target, Path) else (Path().absolute(),)
        place = next(parent for parent in parents if parent.is_dir())
        needed = partial(_base_of, request)
        with unpickled(request.src, place, needed, watched) as folder:
            read = [planned(one.reading(folder), headers_only=False, named=request.src) for one in rungs(request)]
            jobs = [_watching(one.job(), watched) for one in read]
            report = carry_out(abreast(jobs), request, started, plans_of(request, jobs))
            return report
    made = [planned(one, headers_only=not request.writes) for one in rungs(request)]
    jobs = [one.job() for one in made]
    report = carry_out(abreast(jobs), request, started, plans_of(request, jobs))
    return report


def _base_of(request: ConvertRequest) -> Checkpoint:
    return open_model(request.need_base("peft"), headers_only=True)


def _watching(job: Job, watched: Sequence[FirstSeen]) -> Job:
    """A job whose record names files that were read before it: they have to be the same still when it has named them."""
    record = job.record
    if record is None:
        return job

    def write(folder: Path | Listing) -> Mapping[str, bytes]:
        made = record(folder)
        for one in watched:
            one.check_unchanged()
        return made

    return replace(job, record=write)


def replan(data: Mapping[str, Any], out: Path | Address | None) -> Conversion:
    """The conversion of a saved plan, planned again."""
    given = {name: value for name, value in data.items() if name not in ("verb", "staged")}
    request = ConvertRequest.bound({**given, "out": out})
    return planned(request, headers_only=False)


def _stated(request: ConvertRequest) -> dict[str, Any]:
    """The options as JSON, for a plan file."""
    found = {**request.of_format()}
    if request.base is not None:
        found["base"] = str(getattr(request.base, "ref", request.base))
    found.pop("mmproj", None)
    return {name: _plain(value) for name, value in found.items()}


def _plain(value: Any) -> Any:
    if isinstance(value, tuple):
        return [_plain(one) for one in value]
    return str(value) if isinstance(value, (Path, Address)) else value


def _recorder(planned: Conversion, src: Any, request: ConvertRequest) -> Recorder:
    """What writes ``adapterkit.json``: which source became this, and by which options."""

    def write(folder: Path | Listing) -> Mapping[str, bytes]:
        from adapterkit.provenance.record import base_parent, converted_parent, parameters_of, recorder

        model = not formats()[planned.to].adapter
        parents = [converted_parent(src, model)]
        if request.base is not None:
            parents.insert(0, base_parent(open_model(request.base)))
        types = request.types
        asked = {name: value for name, value in request.of_format().items() if name in _RECORDED}
        if request.shard_size is not None:
            asked["max_shard_size"] = request.shard_size
        stated = parameters_of({**dict(sorted(asked.items())), **planned.plan.request})
        parameters = {"to": planned.to, **stated}
        out = request.target
        name = "" if out is None else out.name
        if not model:
            method = "lora" if request.plain else ""
            return recorder("convert", "adapter", parameters, parents, method=method, name=name)(folder)
        kind = "converted" if set(planned.types) <= FLOATS else "quantized"
        mix = types.mix if types is not None else None
        figures = partial(computed_on, request.device, planned.tensors.values())
        return recorder("convert", kind, parameters, parents, method=mix or "", evidence=figures, name=name)(folder)

    return write


_RECORDED = (
    *(
        "dtype",
        "pre",
        "plain",
        "rank",
        "energy",
        "double_quant",
        "skip_modules",
        "rounding",
        "calibration",
        "compressor",
    ),
)
