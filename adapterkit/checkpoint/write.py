"""`write_together`: views and their plans become folders (or, for plans of other files, those files)."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any

from adapterkit import disk
from adapterkit.checkpoint.cut import whole_files
from adapterkit.checkpoint.files import check_unchanged, states_here
from adapterkit.checkpoint.folder import RECORD
from adapterkit.checkpoint.hashes import fill
from adapterkit.checkpoint.journal import CLAIM, Journal, forget_parts
from adapterkit.checkpoint.limits import check_memory
from adapterkit.checkpoint.pipeline import lead_of
from adapterkit.checkpoint.plan import default_jobs
from adapterkit.checkpoint.publish import (
    check_output,
    is_left_over,
    named_beside,
    publish,
    publish_files,
    staging,
    write_beside,
)
from adapterkit.checkpoint.sink import Sink, run_together

if TYPE_CHECKING:
    from pathlib import Path

    from adapterkit.checkpoint.files import Source
    from adapterkit.checkpoint.plan import Plan, PlannedFile
    from adapterkit.checkpoint.tensor import Tensor


Stage = Callable[["Room"], "Writing"]
"""Computes, in the hidden folder, what a plan has to be made of; gives what is to be written then."""


@dataclass(frozen=True)
class Room:
    """Where and how a stage works.

    Attributes:
        folder: the hidden folder.
        jobs: worker threads.
        resume: use what an interrupted run left in the folder, once it is proved.
        progress: called now and then with bytes done and bytes in all.
    """

    folder: Path
    jobs: int
    resume: bool = False
    progress: Callable[[int, int], None] | None = None


@dataclass(frozen=True)
class Writing:
    """One output: a folder, or the files that its plan is of, which appears whole or not at all.

    Attributes:
        plan: what to write; ``tensors`` and ``sources`` are the handles and files it was made from.
        out: the folder to make, or the file; several files get ``-00001-of-00003`` and so on before its suffix.
        side_files: small files to write beside the weights, by relative name.
        record: more small files, asked for when everything else lies in the hidden folder, which it is given; beside
            an output that is a file they get its name and a dot before theirs.
        stage: run first; what it gives is written in the place of this one.
        made: names of files and folders that a stage left in the hidden folder for the output.
        facts: what a stage found out, for the report.
        close: lets go of what the stage left open.
        parts: the digest of the plan whose parts, in the hidden folder, the stage makes it of.
    """

    plan: Plan
    tensors: Mapping[str, Tensor]
    sources: Sequence[Source]
    out: Path
    side_files: Mapping[str, bytes] = field(default_factory=dict)
    record: Callable[[Path], Mapping[str, bytes]] | None = None
    stage: Stage | None = None
    made: frozenset[str] = frozenset()
    facts: Mapping[str, Any] = field(default_factory=dict)
    close: Callable[[], None] | None = None
    parts: str = ""


@dataclass(frozen=True)
class Ready:
    """An output that lies whole in the hidden folder, and has no name yet.

    Attributes:
        keep: of a folder, the names at its top; what else lies in the hidden folder is taken away.
        beside: small files that get their names after those of an output that is no folder.
    """

    writing: Writing
    folder: Path
    keep: frozenset[str] = frozenset()
    beside: Mapping[str, bytes] = field(default_factory=dict)

    @property
    def out(self) -> Path:
        return self.writing.out

    def files(self) -> dict[Path, Path | bytes]:
        """Every file, by where it will be: where it lies now, or its bytes."""
        if self.writing.plan.layout == "file":
            found: dict[Path, Path | bytes] = {named_beside(self.out, name): data for name, data in self.beside.items()}
            targets = self.writing.plan.targets(self.out)
            return {**{target: self.folder / name for name, target in targets.items()}, **found}
        inside = [path.relative_to(self.folder) for path in sorted(self.folder.rglob("*")) if path.is_file()]
        return {self.out / path: self.folder / path for path in inside if path.parts[0] in self.keep}

    def publish(self, *, force: bool) -> None:
        """Give it its name: the folder, or each of its files.

        Raises:
            OutputError: the target appeared meanwhile, or the disk refuses.
        """
        plan, out = self.writing.plan, self.out
        try:
            if plan.layout != "file":
                publish(self.folder, out, keep=set(self.keep), force=force)
                return
            ours = is_left_over(out)  # asked before the new output has that name
            publish_files(self.folder, plan.targets(out), force=force)
            for name, data in self.beside.items():
                write_beside(out, name, data, force=force or (ours and name == RECORD))
        except OSError as error:
            raise disk.refused(error, str(out), out.parent) from error


@dataclass(frozen=True)
class Done:
    """What was written: the plan as it was carried out, computed tensors that were re-used, and a stage's facts."""

    plan: Plan
    reused: int
    facts: Mapping[str, Any]


def write_together(
    writings: Sequence[Writing],
    *,
    jobs: int | None = None,
    force: Sequence[bool],
    resume: bool = False,
    progress: Callable[[int, int], None] | None = None,
    checked: bool = False,
    before: Callable[[Sequence[Ready]], None] = lambda ready: None,
) -> list[Done]:
    """Execute plans abreast, so that inputs they share come from the disk once; each output appears whole or not at all,
    all of them after the last byte is written.

    Args:
        jobs: worker threads.
        force: for each, whether it may replace what is there.
        resume: re-use what an interrupted run left and its content proves, and leave the same behind if interrupted.
        progress: called now and then with bytes done and bytes in all.
        checked: `check_output` was asked already.
        before: called with all of them when they are whole, before the first has its name.

    Raises:
        OutputError, UsageError, AdapterkitError
    """
    if not checked:
        for one, again in zip(writings, force, strict=True):
            check_output(one.plan, one.sources, one.out, force=again, record=one.record is not None)
    for one in writings:
        check_memory(one.plan.peak_memory, str(one.out))
    with ExitStack() as held:
        runs, staged = [], []
        for one in writings:
            folder = held.enter_context(staging(one.out, resume=resume))
            if not one.parts or disk.read_inside(folder, CLAIM) != one.parts.encode():
                forget_parts(folder)
            if one.stage is not None:
                try:
                    made = one.stage(Room(folder, jobs or default_jobs(), resume, progress))
                except OSError as error:
                    raise disk.refused(error, str(one.out), one.out.parent) from error
                one = replace(made, out=one.out, record=made.record or one.record)
                if one.close is not None:
                    held.callback(one.close)
            journal = Journal(folder, identity(one.plan, one.sources))
            sink = Sink(one.plan, one.tensors, one.sources, folder, jobs=1, journal=journal)
            runs.append((sink, folder))
            staged.append(one)
        parts = [(sink, whole_files(one.plan.files)) for (sink, _), one in zip(runs, staged, strict=True)]
        run_together(parts, jobs=jobs or default_jobs(), progress=progress)
        for one in writings:
            check_unchanged(one.sources)
        whole = [
            ready(replace(one, record=_checked(one)), folder) for (_, folder), one in zip(runs, staged, strict=True)
        ]
        before(whole)
        # What stands beside an output has its name before the output has: a kill in between leaves no output without it.
        for made_ready, again in reversed(list(zip(whole, force, strict=True))):
            made_ready.publish(force=again)
    return [Done(one.plan, sink.reused, one.facts) for (sink, _), one in zip(runs, staged, strict=True)]


def _checked(one: Writing) -> Callable[[Path], Mapping[str, bytes]] | None:
    """The record of an output, made while its inputs are still what they were: it may read them once more."""
    record = one.record
    if record is None:
        return None

    def made(folder: Path) -> Mapping[str, bytes]:
        files = record(folder)
        check_unchanged(one.sources)
        return files

    return made


def ready(one: Writing, folder: Path) -> Ready:
    """Put hashes, the index, the side files and the record into the hidden folder, which is whole then."""
    plan, out, record = one.plan, one.out, one.record
    extra = dict(one.side_files)
    if plan.in_folders:
        extra |= component_indexes(plan)
    elif len(plan.files) > 1:
        extra.setdefault(plan.index_name, index_json(plan))
    try:
        fill(plan, folder)
        if plan.layout == "file":
            return Ready(one, folder, beside=record(folder) if record is not None else {})
        for name, data in extra.items():
            disk.write_inside(folder, name, data)
        for name, data in (record(folder) if record is not None else {}).items():
            disk.write_inside(folder, name, data)
            extra[name] = data
    except OSError as error:
        raise disk.refused(error, str(out), out.parent) from error
    written = {file.name.partition("/")[0] for file in plan.files} | {name.partition("/")[0] for name in extra}
    return Ready(one, folder, keep=frozenset(written | one.made))


def finish(one: Writing, folder: Path, *, force: bool) -> None:
    """Make the hidden folder the target, with the index and the side files; or its files the targets themselves."""
    ready(one, folder).publish(force=force)


def index_json(plan: Plan) -> bytes:
    """``model.safetensors.index.json`` for a sharded plan, in the layout that transformers writes."""
    found = {"metadata": {"total_size": plan.total_size}, "weight_map": dict(sorted(plan.weight_map.items()))}
    return (json.dumps(found, indent=2) + "\n").encode()


def component_indexes(plan: Plan) -> dict[str, bytes]:
    """The indexes of a pipeline's components that are sharded, by their names in the output."""
    folders: dict[str, list[PlannedFile]] = {}
    for file in plan.files:
        folders.setdefault(lead_of(file.name), []).append(file)
    found = {}
    for lead, files in folders.items():
        if len(files) > 1:
            folder = lead.removesuffix(".")
            plain = tuple(
                replace(
                    file,
                    name=file.name.removeprefix(f"{folder}/"),
                    steps=tuple(step._replace(tensor=step.tensor.removeprefix(lead)) for step in file.steps),
                )
                for file in files
            )
            own = replace(plan, files=plain)
            found[f"{folder}/{own.index_name}"] = index_json(own)
    return found


def identity(plan: Plan, sources: Sequence[Source]) -> str:
    """The plan, and the inputs as they lie on this machine: a base that was replaced since makes a journal worthless."""
    return identity_of(plan, states_here(sources))


def identity_of(plan: Plan, states: Mapping[str, str]) -> str:
    """The same, of what `adapterkit.checkpoint.files.states_here` says."""
    digest = hashlib.sha256(plan.digest.encode())
    for name, state in states.items():
        digest.update(os.fsencode(f"{name}:{state}\n"))
    return digest.hexdigest()
