"""`convert`: the same content in another format, in one streaming pass."""

from __future__ import annotations

import time
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from adapterkit.bases import open_model
from adapterkit.checkpoint.plan import default_jobs, parse_size
from adapterkit.verbs.conversions.conversion import Conversion, ConvertOptions, Progress, Recorder, Ref, Run
from adapterkit.verbs.conversions.formats import ADAPTERS, find_format

FLOATS = frozenset({"F64", "F32", "F16", "BF16"})
"""Types that a model can be in and not be called quantized."""

if TYPE_CHECKING:
    from adapterkit.verbs.report import ConvertReport


def plan_convert(
    src: Ref,
    *,
    to: str | None = None,
    out: Ref | None = None,
    max_shard_size: str | None = None,
    jobs: int | None = None,
    headers_only: bool = True,
    **options: Any,
) -> Conversion:
    """Plan a conversion from headers alone; see `convert` for the arguments.

    With ``headers_only`` a source on the Hub is not downloaded, so the plan can be shown but not executed.
    """
    form = find_format(to, out)
    limit = None if max_shard_size is None else parse_size(max_shard_size)
    asked = ConvertOptions(max_shard_size=limit, headers_only=headers_only, **options)
    form.check(asked)
    return form.planner()(src, asked, jobs or default_jobs())


def convert(
    src: Ref,
    out: Ref,
    *,
    to: str | None = None,
    max_shard_size: str | None = None,
    jobs: int | None = None,
    force: bool = False,
    resume: bool = False,
    allow_pickle: bool = False,
    progress: Progress | None = None,
    **options: Any,
) -> ConvertReport:
    """Write the same content in another format; nothing is loaded whole.

    Args:
        src: a model or an adapter; `adapterkit.verbs.conversions.formats.FORMATS` says which formats are made of which.
        out: the file or folder to make; it appears whole or not at all.
        to: the format, a key of that table; by default what the suffix of ``out`` says.
        max_shard_size: like ``5GB``; the output is written as a set of files of that size.
        jobs: worker threads; the output bytes do not depend on it.
        force: replace an existing output.
        resume: continue an interrupted run, and leave the same behind if interrupted.
        allow_pickle: load weights that are pickles, in a process of its own and as tensors only; see `unpickled`.
        progress: called now and then with bytes done and bytes in all.
        options: those of `ConvertOptions`, as ``base`` and ``quantization``.

    Raises:
        NotFound, CheckpointError, AdapterError, TargetError, OutputError, UsageError, UnsafeError
    """
    if allow_pickle:
        from adapterkit.pickles import unpickled

        how: dict[str, Any] = {"jobs": jobs, "force": force, "progress": progress, "max_shard_size": max_shard_size}
        with unpickled(src, Path(out).absolute().parent) as folder:
            return replace(_convert(folder, out, src, to=to, **how, **options), src=str(src))
    return _convert(
        src,
        out,
        src,
        to=to,
        max_shard_size=max_shard_size,
        jobs=jobs,
        force=force,
        resume=resume,
        progress=progress,
        **options,
    )


def _convert(
    src: Ref,
    out: Ref,
    original: Ref,
    *,
    to: str | None = None,
    max_shard_size: str | None = None,
    jobs: int | None = None,
    force: bool = False,
    resume: bool = False,
    progress: Progress | None = None,
    **options: Any,
) -> ConvertReport:
    """``original`` is what the record names where ``src`` is a passing copy of it."""
    from adapterkit.verbs.merge import peak_memory

    started = time.monotonic()
    how: dict[str, Any] = {"max_shard_size": max_shard_size, "jobs": jobs, "headers_only": False}
    planned = plan_convert(src, to=to, out=out, **how, **options)
    record = planned.record() or _recorder(planned, original, Path(out), ConvertOptions(**options))
    measured = planned.write(Path(out), Run(record, jobs, force, resume, progress))
    return planned.report(out, **measured, seconds=time.monotonic() - started, peak_memory=peak_memory())


def _recorder(planned: Conversion, src: Ref, out: Path, options: ConvertOptions) -> Recorder:
    """What writes ``adapterkit.json``: which source became this, and by which options."""
    from adapterkit.provenance.record import base_parent, converted_parent, parameters_of, recorder

    model = planned.to not in ADAPTERS
    parents = [converted_parent(src, model)]
    if options.base is not None:
        parents.insert(0, base_parent(open_model(options.base)))
    asked = {name: getattr(options, name) for name in sorted(options.given() - {"base", "quantization"})}
    parameters = {"to": planned.to, **parameters_of({**asked, **planned.plan.request})}
    if not model:
        return recorder(
            "convert", "adapter", parameters, parents, method="lora" if options.plain else "", name=out.name
        )
    kind = "converted" if set(planned.types) <= FLOATS else "quantized"
    mix = options.quantization.mix if options.quantization is not None else None
    return recorder("convert", kind, parameters, parents, method=mix or "")
