"""One output file of a plan at a time: what a cluster runs.

Each part is written into the hidden folder beside the target, by any machine that sees it, in any order and at the same
time; when all parts say they are done, `finish_parts` makes the folder the target. The bytes are those of one whole run.
"""

from __future__ import annotations

import os
import stat
from typing import TYPE_CHECKING

from adapterkit.checkpoint.journal import Journal
from adapterkit.checkpoint.plan import default_jobs
from adapterkit.checkpoint.publish import check_target, input_paths, partial_folder, staging
from adapterkit.checkpoint.sink import Sink
from adapterkit.checkpoint.write import Writing, finish, identity
from adapterkit.disk import read_inside, write_inside
from adapterkit.errors import OutputError, UsageError, option

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence
    from pathlib import Path

    from adapterkit.checkpoint.files import Source
    from adapterkit.checkpoint.plan import Plan
    from adapterkit.checkpoint.tensor import Tensor


def write_part(
    plan: Plan,
    index: int,
    tensors: Mapping[str, Tensor],
    sources: Sequence[Source],
    out: Path,
    *,
    jobs: int | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> None:
    """Write ``plan.files[index]`` into the hidden folder of ``out``; a part that was interrupted resumes.

    Raises:
        UsageError: there is no such part.
        OutputError, AdapterkitError: as for a whole run.
    """
    if not 0 <= index < len(plan.files):
        raise UsageError(f"there is no part {index}", f"this plan has parts 0 to {len(plan.files) - 1}")
    file = plan.files[index]
    inputs = input_paths(plan, sources)
    check_target(out, inputs, file.nbytes, force=True, held=[partial_folder(out) / file.name])
    with staging(out, resume=True, shared=True) as folder:
        journal = Journal(folder, identity(plan, sources), f".journal.{index}.jsonl")
        Sink(plan, tensors, sources, folder, jobs=jobs or default_jobs(), journal=journal, progress=progress).run(
            [file]
        )
        write_inside(folder, _note(file.name), plan.digest.encode())


def finish_parts(
    plan: Plan,
    out: Path,
    *,
    side_files: Mapping[str, bytes],
    force: bool = False,
    record: Callable[[Path], Mapping[str, bytes]] | None = None,
) -> None:
    """Make the target once every part is done.

    Raises:
        OutputError: parts are missing, or belong to another plan.
    """
    if os.path.lexists(out) and not force:
        raise OutputError(f"{out} exists", f"choose another name, or replace it with {option('force', True)}")
    if not partial_folder(out).is_dir():
        raise OutputError(f"{out}: no part is done", "execute the parts, then finish")
    with staging(out, resume=True) as folder:
        missing = [str(i) for i, file in enumerate(plan.files) if not _done(plan, folder, file.name, file.nbytes)]
        if missing:
            raise OutputError(f"{out}: parts {', '.join(missing[:8])} are not done", "execute them, then finish again")
        finish(Writing(plan, {}, (), out, side_files, record), folder, force=force)


def _note(name: str) -> str:
    return f".done.{name}"


def _done(plan: Plan, folder: Path, name: str, nbytes: int) -> bool:
    try:
        proved = read_inside(folder, _note(name)) == plan.digest.encode()
        info = (folder / name).lstat()
        return proved and stat.S_ISREG(info.st_mode) and info.st_size == nbytes
    except FileNotFoundError:
        return False
