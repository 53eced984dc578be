"""A recipe is planned and carried out: what is unchanged stays, outputs of one fold are written in one pass."""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

from adapterkit import disk
from adapterkit.checkpoint.plan import BASELINE_MEMORY, WORKER_MEMORY, default_jobs
from adapterkit.places import Address, address_of
from adapterkit.recipe import after, in_store
from adapterkit.recipe.after import After, in_folder
from adapterkit.recipe.carry import How, carry, job_of, planned, settings
from adapterkit.recipe.cut_off import digests_of, is_ours, is_whole
from adapterkit.recipe.lock import (
    Lock,
    Locked,
    Pinned,
    Resolver,
    check_locked,
    check_outputs,
    lock_path,
    machine,
    read_lock,
    recipe_digest,
    versions,
    write_lock,
)
from adapterkit.recipe.parse import RecipeFile, read_recipe, shown
from adapterkit.recipe.report import AGAIN, NEW, UNCHANGED, BuildPlan, BuildReport, BuiltOutput, PlannedOutput
from adapterkit.recipe.spread import spread
from adapterkit.recipe.state import BESIDE, Coming, Made, State, key_of, output_files
from adapterkit.recipe.steps import CONVERT, Input, Step, check_inside, located, steps_of
from adapterkit.verbs.job import Measured, peak_memory

if TYPE_CHECKING:
    from adapterkit.checkpoint.write import Ready
    from adapterkit.verbs.job import Beside, Job

Note = Callable[[str], None]


def plan_build(
    recipe: str | Path | None = None, *, locked: bool = False, jobs: int | None = None, outside: bool = False
) -> BuildPlan:
    """Everything that `build` will do, from headers alone: no tensor is read, nothing is written.

    Args:
        recipe: the file; by default ``adapterkit.toml``, else ``pyproject.toml``, here.
        locked: hold it against the lock, and use what that pins.
        jobs: worker threads, for the estimate of memory.
        outside: outputs may lie outside of the recipe's folder.

    Raises:
        RecipeError, CheckFailed, NotFound, CheckpointError, AdapterError, TargetError, UnsafeError, AuthError, HubError
    """
    work = _Build(read_recipe(recipe), locked=locked, outside=outside)
    return work.plan(jobs or default_jobs())


def build(
    recipe: str | Path | None = None,
    *,
    locked: bool = False,
    jobs: int | None = None,
    force: bool = False,
    resume: bool = False,
    outside: bool = False,
    progress: Callable[[int, int], None] | None = None,
    note: Note = lambda text: None,
) -> BuildReport:
    """Carry out a recipe: make what is not there or was made from something else, then verify, register and push it.

    Args:
        recipe, locked, outside: see `plan_build`; without ``locked`` the lock is written anew.
        jobs: worker threads; the output bytes do not depend on it.
        force: replace outputs that this recipe did not make, or that were changed since.
        resume: continue an interrupted run, and leave the same behind if interrupted.
        progress: called now and then with bytes done and bytes in all.
        note: told what happens.

    Raises:
        CheckFailed: something moved that the lock holds, or a threshold of a verification does not hold.
        OutputError: an output is there that the recipe did not make.
        RecipeError, NotFound, CheckpointError, AdapterError, TargetError, UnsafeError, AuthError, HubError
    """
    work = _Build(read_recipe(recipe), locked=locked, outside=outside)
    return work.run(How(jobs, resume, progress), force=force, note=note)


class _Build:
    """A recipe with everything that is known of it before a byte is written."""

    def __init__(self, file: RecipeFile, *, locked: bool, outside: bool = False) -> None:
        file = spread(file)
        self.file, self.locked = file, locked
        self.steps = steps_of(file)
        if not outside:
            check_inside(file, self.steps)
        after.check(file, self.steps)
        self.by_name = {step.name: step for step in self.steps}
        self.state = State(file.path)
        self.lock_file = lock_path(file.path)
        self.before = read_lock(self.lock_file) if locked else None
        self.versions = versions(self.steps)
        self.resolver = Resolver(file, self.state, self.before)
        self.pins: dict[str, Pinned] = {}
        if locked:
            check_locked(self.lock_file, self.before, self._lock({}))

    # ------------------------------------------------------------------ what is there

    def _lock(self, outputs: Mapping[str, Made], machine: str = "") -> Lock:
        for step in self.steps:
            self._pin(step)
        made = {name: Locked(one.path, one.digest, one.files) for name, one in outputs.items()}
        pins = dict(sorted(self.pins.items()))
        return Lock(recipe_digest(self.file), self.versions, pins, made, machine)

    def _pin(self, step: Step) -> None:
        for one in step.inputs:
            if one.output is None and shown(one.place) not in self.pins:
                self.pins[shown(one.place)] = self.resolver.pinned(one)

    def _key(self, step: Step, digests: Mapping[str, str]) -> str | None:
        """What decides the bytes of a step; None while something that it needs is not made yet."""
        self._pin(step)
        inputs = []
        for role, one in step.roles:
            if one.output is not None and one.output not in digests:
                return None
            digest = digests[one.output] if one.output is not None else self.pins[shown(one.place)].digest
            inputs.append([role, self._label(one), digest, one.weight])
        date = os.environ.get("SOURCE_DATE_EPOCH", "")
        return key_of({**settings(step), "inputs": inputs, "versions": self.versions, "date": date})

    def _label(self, one: Input) -> str:
        """The name that a record of the output gives it."""
        if isinstance(one.path, Address):
            return str(one.path)
        return one.path.resolve().name if one.path is not None else self.pins[shown(one.place)].pin

    def _known(self, step: Step) -> Made | None:
        """What this recipe made there before, if it lies there as it was made."""
        made = self.state.made.get(step.name)
        if made is None or made.path != in_folder(step.out, self.file.folder) or not made.files:
            return None
        if isinstance(step.out, Address):
            found = in_store.present(step.out, is_file=step.is_file, names=made.files)
            return made if in_store.states(found) == dict(made.stored) else None
        if not os.path.lexists(step.out) and not step.is_file:  # a set of files has no file of the output's own name
            return None
        return made if self.state.is_there(made, self.file.folder) else None

    def _state(self, step: Step, digests: Mapping[str, str]) -> tuple[str, str, Made | None]:
        """Whether there is something to do, why, and what is there."""
        made = self._known(step)
        if made is None:
            changed = step.name in self.state.made and self._lies_there(step)
            return NEW, "changed since it was made" if changed else "not made yet", None
        key = self._key(step, digests)
        if key == made.key:
            return UNCHANGED, "as it was made", made
        waits = [name for name in step.needs if name not in digests]
        why = f"when {waits[0]} is there" if waits else "made from something else"
        return AGAIN, why, made

    def _lies_there(self, step: Step) -> bool:
        """Whether something lies in the place of an output."""
        if isinstance(step.out, Address):
            return bool(in_store.present(step.out, is_file=step.is_file, names=[step.out.name]))
        return os.path.lexists(step.out)

    def _origin(self, step: Step) -> Step:
        """The merge at the root of a chain of conversions."""
        while step.verb == CONVERT and step.source is not None and step.source.output is not None:
            step = self.by_name[step.source.output]
        return step

    # ------------------------------------------------------------------ plan

    def plan(self, jobs: int) -> BuildPlan:
        digests: dict[str, str] = {}
        states = {}
        for step in self.steps:
            self._take_up(step)
            state, why, made = self._state(step, digests)
            states[step.name] = (state, why)
            if state == UNCHANGED and made is not None:
                digests[step.name] = made.identity
        groups = _groups([step for step in self.steps if states[step.name][0] != UNCHANGED])
        abreast = {name: group for group in groups for name in group}
        rows = []
        for step in self.steps:
            self._pin(step)
            group = tuple(name for name in abreast.get(step.name, ()) if name != step.name)
            rows.append(self._row(step, *states[step.name], group, jobs))
        made_now = {row.name: row for row in rows if row.state != UNCHANGED}
        peak = max((_abreast([made_now[name] for name in group], jobs) for group in groups), default=0)
        nbytes = sum(row.nbytes or 0 for row in made_now.values())
        return BuildPlan(str(self.file.path), str(self.lock_file), self.locked, tuple(rows), len(groups), nbytes, peak)

    def _row(self, step: Step, state: str, why: str, group: tuple[str, ...], jobs: int) -> PlannedOutput:
        about: dict[str, Any] = {}
        waits = any(one.output is not None and not self._lies_there(self.by_name[one.output]) for one in step.inputs)
        with located(self.file, "outputs", step.name):
            if not waits:
                made = planned(step, self.pins, How(jobs), headers_only=True, force=True)
                job = made.job()
                for one in job.beside:
                    one.check()
                report = job.report(Measured(plan=job.plan, dry_run=True))
                about = {
                    "files": tuple(path.name for path in job.plan.targets(step.out).values()),
                    "nbytes": job.plan.nbytes,
                    "peak_memory": job.plan.peak_memory,
                    "tensors": len(job.plan.steps),
                    "touched": getattr(report, "touched", None),
                    "notes": report.notes,
                }
        return PlannedOutput(
            name=step.name,
            verb=step.verb,
            to=step.to,
            out=str(step.out),
            state=state,
            why=why,
            reads=tuple(_reads(one) for one in step.inputs),
            abreast=group,
            then=after.words(step),
            **about,
        )

    # ------------------------------------------------------------------ run

    def run(self, how: How, *, force: bool, note: Note) -> BuildReport:
        started = time.monotonic()
        made: dict[str, Made] = {}
        reports: dict[str, Mapping[str, Any]] = {}
        states: dict[str, str] = {}
        passes, notes = 0, list[str]()
        if not force:
            after.check_pages(self.file, self.steps, self.state)
        for step in self.steps:
            self._pin(step)
        for step in self.steps:
            if step.name in made:
                continue
            digests = {name: one.identity for name, one in made.items()}
            self._take_up(step, how)
            state, why, there = self._state(step, digests)
            if state == UNCHANGED and there is not None:
                made[step.name], states[step.name] = there, UNCHANGED
            else:
                group = self._group(step, made, digests, how)
                note(f"{', '.join(one.name for one in group)}: {why}")
                passes += 1
                for one, report in zip(group, self._make(group, digests, how, force=force), strict=True):
                    states[one.name] = NEW if one.name not in self.state.made else AGAIN
                    made[one.name] = self._note_made(one, report, digests)
                    reports[one.name] = report
                if self.before is not None:
                    fresh = {one.name: made[one.name] for one in group}
                    check_outputs(self.lock_file, self.before, self._locked(fresh))
        if self.before is not None:
            notes += check_outputs(self.lock_file, self.before, self._locked(made))
        follow = After(self.file, self.state, self.pins, how, note)
        for step in self.steps:
            with located(self.file, "outputs", step.name):
                made[step.name] = follow.run(step, self._origin(step), made[step.name])
            self.state.made[step.name] = made[step.name]
        self._forget(made)
        written = False
        if not self.locked:
            kind = machine() if passes else self._machine_before()
            written = write_lock(self.lock_file, self._lock(made, kind))
        return BuildReport(
            recipe=str(self.file.path),
            lock=str(self.lock_file),
            locked=self.locked,
            outputs=tuple(self._built(step, states[step.name], made[step.name], reports) for step in self.steps),
            inputs={name: asdict(pin) for name, pin in sorted(self.pins.items())},
            changed=sum(state != UNCHANGED for state in states.values()),
            passes=passes,
            lock_written=written,
            seconds=time.monotonic() - started,
            peak_memory=peak_memory(),
            notes=tuple(notes),
        )

    def _group(self, step: Step, made: Mapping[str, Made], digests: Mapping[str, str], how: How) -> list[Step]:
        """The step, and those of the same inputs that have to be made too: merges of one fold, conversions of one source."""
        if step.shares == step.name:
            return [step]
        later = [one for one in self.steps if one.name not in made and one.name != step.name]
        same = [one for one in later if one.shares == step.shares]
        for one in same:
            self._take_up(one, how)
        return [step, *(one for one in same if self._state(one, digests)[0] != UNCHANGED)]

    def _make(
        self, group: Sequence[Step], digests: Mapping[str, str], how: How, *, force: bool
    ) -> list[dict[str, Any]]:
        # What this recipe made and nobody touched since may be replaced without asking.
        replace = [force or self._known(one) is not None or self._cut_off(one, how) for one in group]
        jobs = []
        for one, again in zip(group, replace, strict=True):
            with located(self.file, "outputs", one.name):
                after.check_packages(one)
                jobs.append(job_of(one, self.pins, how, force=again))
                self._check_pinned(one, jobs[-1])
        for one, job in zip(group, jobs, strict=True):
            self._note_begun(one, job, digests)
        with located(self.file, "outputs", group[0].name):
            found = carry(jobs, how, lambda ready: self._note_coming(group, jobs, digests, ready))
        return [asdict(report) for report in found]

    def _check_pinned(self, step: Step, job: Job) -> None:
        for one in step.inputs:
            pin = None if one.output is not None else self.pins[shown(one.place)]
            address = None if pin is None or pin.kind != "store" else address_of(pin.pin)
            if pin is not None and address is not None:
                in_store.check_pinned(address, pin.files, job)

    def _note_begun(self, step: Step, job: Job, digests: Mapping[str, str]) -> None:
        """Note that an output in a store is begun, and what lay in its place. What it will be is known when it is there."""
        if isinstance(step.out, Address):
            key = self._key(step, digests)
            assert key is not None
            self.state.coming[step.name] = Coming(key, str(step.out), self._states_there(step, job))
            self.state.save()

    def _states_there(self, step: Step, job: Job) -> dict[str, str]:
        """Size and ETag of each object in the place of an output."""
        assert isinstance(step.out, Address)
        with located(self.file, "outputs", step.name):
            names = self._names(step, _names_of(job))
            return in_store.states(in_store.present(step.out, is_file=step.is_file, names=names))

    def _note_coming(
        self, group: Sequence[Step], jobs: Sequence[Job], digests: Mapping[str, str], ready: Sequence[Ready]
    ) -> None:
        """Note what outputs will be before they have their names, so that the next build knows them if this is its last
        act."""
        for step, job in zip(group, jobs, strict=True):
            key = self._key(step, digests)
            assert key is not None
            outs = {job.out, *(other.out for other in job.also)}
            files = digests_of(self.state, step, [one for one in ready if one.out in outs])
            self.state.coming[step.name] = Coming(key, in_folder(step.out, self.file.folder), files)
        self.state.save()

    def _coming(self, step: Step) -> Coming | None:
        coming = self.state.coming.get(step.name)
        return coming if coming is not None and coming.path == in_folder(step.out, self.file.folder) else None

    def _take_up(self, step: Step, how: How | None = None) -> None:
        """Take an output for made that a build gave its name and was cut off before it noted that.

        Without ``how``, for a plan, nothing is written, and an output with files beside it is not looked at.
        """
        if isinstance(step.out, Address):
            if how is not None:
                self._take_up_there(step, how)
            return
        if how is not None and (step.name in self.state.made or step.name in self.state.coming):
            with disk.writing(step.out.name, step.out.parent):
                disk.recover(step.out)
        coming = self._coming(step)
        if coming is None:
            return
        more: dict[str, str] = {}
        if not is_whole(self.state, step, coming.files):
            return
        if step.asked.server is not None or step.projector is not None:
            if how is None:
                return
            beside = self._beside(step, how)
            more = self._beside_made(beside)
            there = self.state.hash_files(output_files(step.out, more))
            if any(digest != more[name] for name, digest in there.items()):
                return
            for one in beside:  # again, which also takes away what was cut off of it
                one.write()
        made = Made(coming.key, coming.path, {**coming.files, **more})
        if how is not None:
            before = self.state.made.get(step.name)
            old = {} if before is None or not step.is_file or before.path != made.path else before.files
            for name in set(old) - set(made.files):  # parts of a set that had more of them
                path = step.out.parent / name
                if path.is_file() and self.state.sha256(path) == old[name]:
                    path.unlink()
            del self.state.coming[step.name]
        self.state.made[step.name] = made

    def _take_up_there(self, step: Step, how: How) -> None:
        """As `_take_up`, of an output in a store: whether it is whole, its objects say, which name their plan. Where nothing
        changed since before it was begun, that run wrote nothing."""
        from adapterkit.verbs.execute import OpenPlan
        from adapterkit.verbs.pinned import pinned

        assert isinstance(step.out, Address)
        coming = self._coming(step)
        if coming is None:
            return
        with located(self.file, "outputs", step.name):
            job = pinned(job_of(step, self.pins, how, force=True))  # as a run names it
            if self._states_there(step, job) == dict(coming.files):
                del self.state.coming[step.name]
                return
            if not OpenPlan(job.executed, step.out, None, job=job).is_there():
                return
            for one in job.beside:  # what may have been cut off
                one.write()
        made = self._stored(step, coming.key, _names_of(job))
        self.state.made[step.name] = made
        del self.state.coming[step.name]

    def _stored(self, step: Step, key: str, files: Iterable[str]) -> Made:
        """What is known of an output in a store that was made; what an earlier one left beside it is taken away."""
        assert isinstance(step.out, Address)
        found = in_store.present(step.out, is_file=step.is_file, names=self._names(step, files))
        before = self.state.made.get(step.name)
        if before is not None and before.path == str(step.out):
            in_store.drop(
                step.out, before.stored, [name for name in before.stored if name not in found], is_file=step.is_file
            )
        return Made(key, str(step.out), in_store.digests(step.out, found), stored=in_store.states(found))

    def _beside(self, step: Step, how: How) -> tuple[Beside, ...]:
        """What is written next to an output, whatever lies there."""
        with located(self.file, "outputs", step.name):
            return job_of(step, self.pins, how, force=True).beside

    @staticmethod
    def _beside_made(beside: Sequence[Beside]) -> dict[str, str]:
        """The sha256 of what lies beside an output, by its name, as it is written for the output that is there."""
        return {path.name: digest for one in beside for path, digest in (one.made() or {}).items()}

    def _cut_off(self, step: Step, how: How) -> bool:
        """Whether all that lies where a step writes is what a build that was cut off was about to make, or what one made
        before it."""
        coming = self._coming(step)
        if coming is None or isinstance(step.out, Address):
            return False
        before = self.state.made.get(step.name)
        known = [coming.files, *([before.files] if before is not None and before.path == coming.path else [])]
        with located(self.file, "outputs", step.name):
            job = job_of(step, self.pins, how, force=True)
        if step.is_file and job.beside and is_whole(self.state, step, coming.files):
            known.append(self._beside_made(job.beside))
        return is_ours(self.state, step, job, known)

    def _note_made(self, step: Step, report: Mapping[str, Any], digests: Mapping[str, str]) -> Made:
        key = self._key(step, digests)
        assert key is not None
        names = self._names(step, report.get("files", ()))
        if isinstance(step.out, Address):
            self.state.made[step.name] = self._stored(step, key, names)
            self.state.coming.pop(step.name, None)
            self.state.save()
            return self.state.made[step.name]
        files = output_files(step.out, names) if step.is_file or step.out.is_dir() else {}
        before = self.state.made.get(step.name)
        if before is not None and step.is_file and before.path == in_folder(step.out, self.file.folder):
            for name in set(before.files) - set(files):  # parts of a set that had more of them
                (step.out.parent / name).unlink(missing_ok=True)
        if before is not None and before.path == in_folder(step.out, self.file.folder):
            self._drop_beside(step, {name: one for name, one in before.files.items() if name not in files})
        one = Made(key, in_folder(step.out, self.file.folder), self.state.hash_files(files))
        self.state.made[step.name] = one
        self.state.coming.pop(step.name, None)
        self.state.save()
        return one

    @staticmethod
    def _names(step: Step, files: Iterable[str]) -> list[str]:
        """The files that may belong to an output, beside those that its verb names."""
        beside = ("adapterkit.json", "Modelfile", "llama-server.sh")
        names = [*files, *(f"{step.out.name}.{name}" for name in beside)]
        if step.projector is not None:
            names.append(step.projector.name)
        if step.residual is not None:
            names.append(step.residual.name if step.is_file else f"{BESIDE}{step.residual.name}/")
        return names

    def _drop_beside(self, step: Step, files: Mapping[str, str]) -> None:
        """Take away a folder beside that of an output, as it was made before and belongs to it no more."""
        assert isinstance(step.out, Path)
        beside = {name: step.out / name for name in files if name.startswith(BESIDE)}
        if beside and all(path.is_file() and self.state.sha256(path) == files[name] for name, path in beside.items()):
            for path in beside.values():
                path.unlink()
            for folder in {path.parent for path in beside.values()}:
                if not any(folder.iterdir()):
                    folder.rmdir()

    def _locked(self, made: Mapping[str, Made]) -> dict[str, Locked]:
        return {name: Locked(one.path, one.digest, one.files) for name, one in made.items()}

    def _machine_before(self) -> str:
        before = read_lock(self.lock_file)
        return "" if before is None else before.machine

    def _forget(self, made: Mapping[str, Made]) -> None:
        """Drop what is known of outputs that the recipe makes no more; the files stay."""
        self.state.made = {name: one for name, one in self.state.made.items() if name in made}
        self.state.coming = {name: one for name, one in self.state.coming.items() if name in made}
        self.state.save()

    def _built(self, step: Step, state: str, made: Made, reports: Mapping[str, Mapping[str, Any]]) -> BuiltOutput:
        if isinstance(step.out, Address):
            sizes = [int(state.partition(":")[0]) for state in made.stored.values()]
        else:
            sizes = [path.stat().st_size for path in output_files(step.out, made.files).values()]
        return BuiltOutput(
            name=step.name,
            verb=step.verb,
            to=step.to,
            out=str(step.out),
            state=state,
            digest=made.digest,
            files=dict(made.files),
            nbytes=sum(sizes),
            report=reports.get(step.name),
            after={name: {k: v for k, v in value.items() if k != "key"} for name, value in made.after.items()},
        )


def _names_of(job: Job) -> list[str]:
    """The names of the weight files that a job makes in a store."""
    every = [(one, one.out) for one in (job, *job.also) if isinstance(one.out, Address)]
    return [path.name for one, out in every for path in one.plan.targets(out).values()]


def _groups(steps: Sequence[Step]) -> list[tuple[str, ...]]:
    """Steps that are written abreast: merges of the same fold, conversions of the same source; every other one alone."""
    found: dict[Any, list[str]] = {}
    for step in steps:
        found.setdefault(step.shares, []).append(step.name)
    return [tuple(names) for names in found.values()]


def _abreast(rows: Sequence[PlannedOutput], jobs: int) -> int:
    """Memory of outputs that are written together: each may hold a tensor, the rest is shared."""
    shared = BASELINE_MEMORY + jobs * WORKER_MEMORY
    return shared + sum(max(0, (row.peak_memory or shared) - shared) for row in rows)


def _reads(one: Input) -> str:
    text = f"outputs.{one.output}" if one.output is not None else one.ref
    return f"{text} x {one.weight:g}" if one.weight != 1 else text
