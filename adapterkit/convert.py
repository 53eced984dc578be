"""`convert`: the same content in another format, in one streaming pass."""

from __future__ import annotations

import time
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from adapterkit.checkpoint.plan import default_jobs, parse_size
from adapterkit.conversions.conversion import Conversion, ConvertOptions, Progress, Ref
from adapterkit.conversions.formats import find_format

if TYPE_CHECKING:
    from adapterkit.report import ConvertReport


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
        src: a model or an adapter; `adapterkit.conversions.formats.FORMATS` says which formats are made of which.
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
    from adapterkit.merge import peak_memory

    started = time.monotonic()
    if allow_pickle:
        from adapterkit.pickles import unpickled

        how: dict[str, Any] = {"jobs": jobs, "force": force, "progress": progress, "max_shard_size": max_shard_size}
        with unpickled(src, Path(out).absolute().parent) as folder:
            return replace(convert(folder, out, to=to, **how, **options), src=str(src))
    how = {"max_shard_size": max_shard_size, "jobs": jobs, "headers_only": False}
    planned = plan_convert(src, to=to, out=out, **how, **options)
    measured = planned.write(Path(out), jobs=jobs, force=force, resume=resume, progress=progress)
    return planned.report(out, **measured, seconds=time.monotonic() - started, peak_memory=peak_memory())
