"""What a build that was cut off left under the names of its outputs: known by its bytes, never by its name alone."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from adapterkit.checkpoint.folder import RECORD
from adapterkit.checkpoint.publish import named_beside
from adapterkit.disk.folders import MARK
from adapterkit.disk.locks import LOCK_FILE
from adapterkit.recipe.state import BESIDE, State, output_files
from adapterkit.recipe.steps import Step

if TYPE_CHECKING:
    from adapterkit.checkpoint.write import Ready
    from adapterkit.verbs.job import Job

Digests = Mapping[str, str]


def digests_of(state: State, step: Step, ready: Sequence[Ready]) -> dict[str, str]:
    """The sha256 of every file of an output that has no name yet, by its name then: inside of a folder, or from there, else
    beside."""
    top = step.here.parent if step.is_file else step.here
    found = {}
    for one in ready:
        for target, now in one.files().items():
            name = Path(os.path.relpath(target, top)).as_posix()
            found[name] = state.sha256_before(now) if isinstance(now, Path) else hashlib.sha256(now).hexdigest()
    return found


def is_whole(state: State, step: Step, files: Digests) -> bool:
    """Whether an output lies there byte for byte, and in its folder nothing beside it."""
    found = output_files(step.here, files)
    return bool(files) and set(found) == set(files) and state.hash_files(found) == dict(files)


def is_ours(state: State, step: Step, job: Job, known: Sequence[Digests]) -> bool:
    """Whether everything that a job would replace is among what builds made or were about to make.

    Args:
        known: sha256 by name, of several outputs; files of a folder all have to be of the same one.
    """
    if not step.is_file:
        folders = [step.here, *(one for one in step.beside_here if one == step.residual)]
        if any(os.path.lexists(one) and (one.is_symlink() or not one.is_dir()) for one in folders):
            return False
        beside = [] if step.residual is None else [f"{BESIDE}{step.residual.name}/"]
        found = output_files(step.here, beside)
        plain = {name: path for name, path in found.items() if path.name != MARK and not LOCK_FILE.fullmatch(path.name)}
        return bool(plain) and state.hash_files(plain) in [dict(files) for files in known]
    names = {name for files in known for name in files}
    for one in (job, *job.also):
        assert isinstance(one.out, Path)
        names |= {path.name for path in one.plan.targets(one.out).values()} | {named_beside(one.out, RECORD).name}
    names |= {path.name for path in _beside(step)}
    there = [step.here.parent / name for name in sorted(names)]
    if any(path.is_symlink() or (path.exists() and not path.is_file()) for path in there):
        return False
    files = {path.name: path for path in there if path.is_file()}
    return bool(files) and all(
        digest in [one.get(name) for one in known] for name, digest in state.hash_files(files).items()
    )


def _beside(step: Step) -> list[Path]:
    """What a step writes next to a file when that is there."""
    found = [one for one in step.beside_here if one == step.projector]
    if step.asked.server is not None:
        from adapterkit.serving.handover import file_of

        found.append(named_beside(step.here, file_of(step.asked.server).suffix))
    return found
