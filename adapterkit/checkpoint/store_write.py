"""Plans become outputs in stores: whole, or a range of a file at a time."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from typing import TYPE_CHECKING

from adapterkit.checkpoint.sink import run_together
from adapterkit.checkpoint.store_out import StoreOut
from adapterkit.checkpoint.store_sink import StoreSink, written
from adapterkit.errors import OutputError

if TYPE_CHECKING:
    from adapterkit.checkpoint.listing import Listing
    from adapterkit.checkpoint.plan import PlannedFile

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
        OutputError: another run claimed a target or took over.
        AuthError, StoreError, CheckpointError
    """
    with ExitStack() as held:
        for one in writings:
            one.made.begin(resume=resume)
            if not resume:
                held.callback(one.made.abandon)
        sinks = [written(one.made, jobs=jobs, progress=progress) for one in writings]
        files = [(sink, one.made.plan.files) for sink, one in zip(sinks, writings, strict=True)]
        run_together(files, jobs=sinks[0].jobs, progress=progress)
        for one in writings:
            one.made.finish(one.side_files, one.record)
        held.pop_all()
    return sinks


def write_ranges(
    made: StoreOut,
    ranges: Sequence[tuple[PlannedFile, int, int]],
    *,
    jobs: int | None = None,
    progress: Progress | None = None,
) -> int:
    """Send the parts of objects that begin in some ranges of files, as one worker of several of the same plan.

    Returns:
        How many computed tensors another run had sent.

    Raises:
        OutputError: the target is claimed for another plan.
        AuthError, StoreError, CheckpointError
    """
    made.begin(shared=True)
    sink = written(made, jobs=jobs, progress=progress)
    sink.run_ranges(ranges)
    return sink.reused


def ranges_left(made: StoreOut, ranges: Sequence[tuple[PlannedFile, int, int]]) -> list[int]:
    """Of some ranges of files, the places of those whose parts are not all in the store."""
    made.look()
    missing = {file.name: set(made.missing(file)) for file in {one[0].name: one[0] for one in ranges}.values()}
    return [
        place
        for place, (file, start, stop) in enumerate(ranges)
        if any(part.number in missing[file.name] for part in made.schedule(file).of_range(start, stop))
    ]


def finish_ranges(
    made: StoreOut,
    *,
    side_files: Mapping[str, bytes],
    record: Callable[[Listing], Mapping[str, bytes]] | None = None,
) -> None:
    """Make the output of a plan whose parts were sent by other workers.

    Raises:
        OutputError: parts are missing, the target is there already, or it is claimed for another plan.
        AuthError, StoreError
    """
    made.look()
    short = [file.name for file in made.plan.files if made.missing(file)]
    if short:
        raise OutputError(
            f"{made.out}: parts of {', '.join(short[:4])} are not done", "execute them, then finish again"
        )
    made.finish(side_files, record)
