"""The tower of a model as a file beside the GGUF of its language model, written in the same pass."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from adapterkit.places import Address
from adapterkit.verbs.job import Job

if TYPE_CHECKING:
    from collections.abc import Mapping

    from adapterkit.checkpoint.files import Source
    from adapterkit.gguf.towers.make import FromTower

PREFIX = "mmproj-"


def tower_path(out: Path | Address) -> Path | Address:
    """Where the tower's file goes: beside the output, under its name with ``mmproj-`` in front."""
    return out.with_name(f"{PREFIX}{out.name}")


def tower_job(
    made: FromTower, out: Path | Address, sources: tuple[Source, ...], settings: Mapping[str, Any], *, force: bool
) -> Job:
    """The tower's file as a job of its own.

    Args:
        out: the GGUF output that it stands beside.
        settings: of the planner; the file is never split.
    """
    from adapterkit.gguf.plan import plan_gguf

    plan = plan_gguf(made.layout, **{**settings, "max_shard_size": None})
    return Job(
        plan=plan, tensors=made.tensors, sources=sources, out=tower_path(out), report=lambda measured: None, force=force
    )
