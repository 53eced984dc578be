"""`save`: any view becomes a folder."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from adapterkit.checkpoint.plan import default_jobs, parse_size, plan_safetensors
from adapterkit.checkpoint.write import Writing, write_together

if TYPE_CHECKING:
    from collections.abc import Callable

    from adapterkit.checkpoint.checkpoint import Checkpoint
    from adapterkit.checkpoint.plan import Plan


def save(
    view: Checkpoint,
    out: str | Path,
    *,
    max_shard_size: str | None = None,
    jobs: int | None = None,
    force: bool = False,
    progress: Callable[[int, int], None] | None = None,
) -> Plan:
    """Write a view as a Hugging Face folder with its side files; gives the plan that was executed.

    Args:
        view: a checkpoint, or what `fold` made of one (its ``checkpoint``).
        out: the folder to make; it appears whole or not at all.
        max_shard_size: like ``5GB``; by default the view's own shards are kept.
        jobs: worker threads.
        force: replace an existing folder.
        progress: called now and then with bytes done and bytes in all.

    Raises:
        OutputError, UsageError, CheckpointError
    """
    limit = None if max_shard_size is None else parse_size(max_shard_size)
    plan = plan_safetensors(view, max_shard_size=limit, jobs=jobs or default_jobs())
    files = {file.name: file.bytes() for file in view.side_files}
    one = Writing(plan, view, view.sources, Path(out), files)
    write_together([one], jobs=jobs, force=[force], progress=progress)
    return plan
