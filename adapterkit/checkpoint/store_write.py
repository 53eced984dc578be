"""Plans become outputs in stores: whole, or a range of a file at a time."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from typing import TYPE_CHECKING

from adapterkit.checkpoint.cut import whole_files
from adapterkit.checkpoint.limits import check_memory
from adapterkit.checkpoint.objects import window_memory
from adapterkit.checkpoint.schedule import sent_at_once
from adapterkit.checkpoint.sink import run_together
from adapterkit.checkpoint.store_out import StoreOut
from adapterkit.checkpoint.store_sink import StoreSink, default_store_jobs, written
from adapterkit.errors import OutputError
from adapterkit.places import Address
from adapterkit.stores.connect import open_store

if TYPE_CHECKING:
    from pathlib import Path

    from adapterkit.checkpoint.cut import PlanPart
    from adapterkit.checkpoint.listing import Listing
    from adapterkit.checkpoint.plan import Plan

Progress = Callable[[int, int], None]


@dataclass(frozen=True)
class StoreWriting:
    """One output of several that are written together.

    Attributes:
        made: the output.
        side_files: small files beside the weights, where the output is a folder.
        record: more small files, asked for when the weights are there.
    """

    made: StoreOut
    side_files: Mapping[str, bytes]
    record: Callable[[Listing], Mapping[str, bytes]] | None = None


def write_to_stores(
    writings: Sequence[StoreWriting],
    *,
    jobs: int | None = None,
    resume: bool = False,
    progress: Progress | None = None,
) -> list[StoreSink]:
    """Execute several plans abreast. Each output appears after the last byte of all of them is sent; what a run without
    ``resume`` leaves when it fails is nothing.

    Raises:
        OutOfMemory: this process may not use as much memory as it takes.
        OutputError: another run claimed a target or took over.
        AuthError, StoreError, CheckpointError
    """
    with ExitStack() as held:
        for one in writings:
            plan = one.made.plan
            check_memory(
                plan.peak_memory + store_memory(plan, one.made.out, jobs or default_store_jobs()), str(one.made.out)
            )
        for one in writings:
            one.made.begin(resume=resume)
            if not resume:
                held.callback(one.made.abandon)
        sinks = [written(one.made, jobs=jobs, progress=progress) for one in writings]
        files = [(sink, whole_files(one.made.plan.files)) for sink, one in zip(sinks, writings, strict=True)]
        run_together(files, jobs=sinks[0].jobs, progress=progress)
        for one in writings:
            one.made.finish(one.side_files, one.record)
        held.pop_all()
    return sinks


def store_memory(plan: Plan, out: Path | Address, jobs: int) -> int:
    """Bytes of memory beyond a plan's estimate: what is read ahead from a store, and what is on its way to one."""
    sent = max((sent_at_once(file) for file in plan.files), default=0) if isinstance(out, Address) else 0
    if isinstance(out, Address) and out.scheme != "s3":
        sent *= 2  # a part, and the request that it becomes
    held = open_store(out).buffers * min(jobs, len(plan.files)) if isinstance(out, Address) else 0
    return window_memory(plan.inputs, jobs) + jobs * sent + held


def send_part(made: StoreOut, part: PlanPart, *, jobs: int | None = None, progress: Progress | None = None) -> int:
    """Send one part of a plan, as one worker of several; the output is begun as one that they share.

    Returns:
        How many computed tensors in it another run had sent.

    Raises:
        OutputError: the target is claimed for another plan.
        AuthError, StoreError, CheckpointError
    """
    sink = written(made, jobs=jobs, progress=progress)
    sink.run([part])
    return sink.reused


def parts_left(made: StoreOut, parts: Sequence[PlanPart]) -> list[PlanPart]:
    """Of some parts of a plan, those whose bytes are not all in the store."""
    made.uploads.look()
    missing = {file.name: set(made.uploads.missing(file)) for file in made.plan.files}
    return [
        part
        for part in parts
        if any(
            one.number in missing[part.file.name] for one in made.schedule(part.file).of_range(part.start, part.stop)
        )
    ]


def finish_in_store(
    made: StoreOut,
    *,
    side_files: Mapping[str, bytes],
    record: Callable[[Listing], Mapping[str, bytes]] | None = None,
    parts: Sequence[PlanPart] | None = None,
) -> None:
    """Make the output of a plan whose parts were sent by several workers.

    Raises:
        OutputError: parts are missing, the target is there already, or it is claimed for another plan.
        AuthError, StoreError
    """
    made.check(resume=True, record=record is not None)
    missing = [str(part.index) for part in parts_left(made, parts or whole_files(made.plan.files))]
    if missing:
        raise OutputError(f"{made.out}: parts {', '.join(missing[:8])} are not done", "execute them, then finish again")
    made.shared()
    made.finish(side_files, record)
