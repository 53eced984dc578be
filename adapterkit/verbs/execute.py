"""`execute`: carry out a saved plan, or one part of it."""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Iterable, Mapping
from dataclasses import asdict, replace
from functools import cached_property
from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

from adapterkit.checkpoint.cut import PlanPart, cut
from adapterkit.checkpoint.files import LocalFile
from adapterkit.checkpoint.journal import MADE
from adapterkit.checkpoint.pins import check_pins, compare
from adapterkit.checkpoint.plan import Plan
from adapterkit.checkpoint.results import IN_PARTS, STAGED, ResultFile
from adapterkit.errors import CheckpointError, NotFound, OutputError, UsageError, option
from adapterkit.ops.device import check_name, check_there
from adapterkit.places import Address, address_of, writable
from adapterkit.stores.meter import Meter, moving
from adapterkit.verbs.job import Job, Measured, Progress, peak_memory, run
from adapterkit.verbs.pinned import pinned
from adapterkit.verbs.placed import device_of
from adapterkit.verbs.report import PartReport
from adapterkit.verbs.sliced import PartOpener

if TYPE_CHECKING:
    from adapterkit.checkpoint.files import Source
    from adapterkit.checkpoint.store_out import StoreOut
    from adapterkit.checkpoint.write import Room, Writing
    from adapterkit.verbs.sliced import Opened

VERBS = ("merge", "convert", "combine", "extract", "resize", "verify")
"""Verbs whose plans can be saved; each has a function `replan`, which plans again from a plan's request, for an output."""
REST = "beside"  # in a plan's request: what was asked for beside the output
RESTS = ("mmproj", "server", "attest", "full_record")  # the options of it; no byte of the weights depends on them


class OpenPlan:
    """A plan, cut into parts, whose inputs are opened once: who executes many parts keeps it.

    Args:
        plan: to be executed.
        out: where its output goes.
        part_size: work of a part (see `adapterkit.checkpoint.cut`); with None a part is a file.
        job: the plan's, where it is open already.
    """

    def __init__(
        self, plan: Plan, out: str | Path | Address, part_size: int | None = None, *, job: Job | None = None
    ) -> None:
        self.plan, self.out = plan, writable(out, "the output")
        self._part_size, self._job = part_size, job
        self._slices = PartOpener(plan, lambda: _replanned(plan, self.out), inputs_of(plan))
        self._alone: StoreOut | None = None
        self._checked = False

    @cached_property
    def parts(self) -> list[PlanPart]:
        """The parts, in the order of the files."""
        if not has_parts(self.plan):
            raise no_parts(self.plan, "execute it whole")
        return cut(self.plan, self._part_size)

    @cached_property
    def job(self) -> Job:
        """The plan's job, made again.

        Raises:
            CheckpointError: the inputs are not those of the plan.
        """
        return _again(self.plan, self.out) if self._job is None else self._job

    def ready(self) -> None:
        """Import what every part needs, before the first; the inputs are opened when a part first computes something."""
        import_module("torch")
        check_there(self.device)

    @property
    def device(self) -> str:
        """Where the plan says that its blocks are computed."""
        return device_of(self.plan.request)

    @property
    def has_results(self) -> bool:
        """Whether the parts are results, from which the output is made at the end."""
        return self.plan.request.get(STAGED) == IN_PARTS

    @cached_property
    def place(self) -> Path | Address:
        """Where parts go: results for an output in a store lie beside it until it is made, by the name of their plan."""
        if self.has_results and isinstance(self.out, Address):
            return self.out.with_name(f".{self.out.name}.results-{self.plan.digest[:12]}")
        return self.out

    @cached_property
    def _work(self) -> Job:
        """The job whose plan is executed in parts: the plan's own, or its results as an output of their own."""
        job = self.job
        if not self.has_results:
            return job
        assert job.results is not None
        return Job(self.plan, job.results().tensors, job.sources, self.place, job.report)

    @cached_property
    def in_store(self) -> StoreOut:
        """The output in a store, or its results, which this worker has part in."""
        made = self._work.in_store()
        made.begin(shared=True)
        if self.has_results and made.is_there() and not self._are_ours(made):
            made.remove()
        return made

    def _are_ours(self, results: StoreOut) -> bool:
        """Whether results that are there as one object are of the inputs as they are now. The plan does not know every value of
        inputs on a machine; so the output is claimed before its results are gathered, with the state of these inputs.

        Raises:
            OutputError: an input here changed since; it is named.
        """
        if results.store.marked and all(source.path is None for source in self.job.sources):
            return True
        final = self._final().in_store()
        claimed = final.claimed()
        if claimed is None:
            words = f"{final.claim.changed_here()} changed since {self.out} was begun"
            raise OutputError(words, f"begin anew with {option('force', True)}")
        return claimed

    def execute(
        self, index: int, *, jobs: int | None = None, progress: Callable[[int, int], None] | None = None
    ) -> PartReport:
        """Execute one part into the hidden folder beside the output.

        Raises:
            UsageError: there is no such part.
            CheckpointError: the inputs are not those of the plan, or changed.
            OutputError: the disk is full, or parts of another plan are being written there.
        """
        with moving() as meter:
            return self._execute(index, meter, jobs, progress)

    def _execute(self, index: int, meter: Meter, jobs: int | None, progress: Progress | None) -> PartReport:
        from adapterkit.checkpoint.parts import part_of, write_part

        started, spent = time.monotonic(), time.process_time()
        part = part_of(self.parts, index)
        if isinstance(self.out, Path):
            alone = self._opened_alone(part)
            if alone is None:
                check_there(self.device)
            tensors, sources = (self._work.tensors, self.job.sources) if alone is None else alone
            reused = write_part(self.plan, part, tensors, sources, self.out, jobs=jobs, progress=progress)
        else:
            from adapterkit.checkpoint.store_write import send_part

            check_there(self.device)
            reused = send_part(self._sent_to(part), part, jobs=jobs, progress=progress)
        return PartReport(
            str(self.out),
            index,
            len(self.parts),
            part.file.name,
            part.nbytes,
            time.monotonic() - started,
            peak_memory(),
            start=part.start,
            reads=part.reads,
            reused=reused,
            cpu_seconds=time.process_time() - spent,
            **asdict(meter.moved),
        )

    def _opened_alone(self, part: PlanPart) -> Opened | None:
        """What a part needs of the inputs; None where the whole plan is open, or has to be."""
        if self._job is not None or "job" in self.__dict__:
            return None
        if not self._checked:
            check_pins(self.plan.pins)
            self._checked = True
        return self._slices.open(part)

    def _sent_to(self, part: PlanPart) -> StoreOut:
        """The output in a store, which knows the tensors of the file that a part lies in: parts of objects end where blocks
        of tensors do."""
        from adapterkit.checkpoint.hashes import has_room
        from adapterkit.checkpoint.store_out import StoreOut

        file = part if part.whole else PlanPart(part.index, part.file, 0, part.file.nbytes)
        whole = self.has_results or "in_store" in self.__dict__ or has_room(self.plan)
        alone = None if whole else self._opened_alone(file)
        if alone is None:
            return self.in_store
        tensors, sources = alone
        if self._alone is None:
            assert isinstance(self.place, Address)
            self._alone = StoreOut(self.plan, {}, (), self.place)
            self._alone.know(tensors, sources)
            self._alone.begin(shared=True)
        else:
            self._alone.know(tensors, sources)
        return self._alone

    def left(self) -> list[PlanPart]:
        """The parts that are not done."""
        from adapterkit.checkpoint.parts import left

        if isinstance(self.out, Address):
            from adapterkit.checkpoint.store_write import parts_left

            made = self._work.in_store()
            there = self.has_results and made.is_there() and self._are_ours(made)
            return [] if there else parts_left(made, self.parts)
        return left(self.plan, self.parts, self.out)

    def check(self, *, force: bool = False) -> None:
        """Refuse a target that exists, lies in an input, cannot be written, or has no room.

        Raises:
            UsageError, OutputError
        """
        replace(self.job, out=self.out, force=force).check_target(resume=True)
        for one in self._beside(force=force):
            one.check()
        if not self._rest_is_made():
            for other in self.job.also:
                replace(other, force=force).check_target(resume=True)

    def check_task(self, *, force: bool = False) -> None:
        """As `check`, for one task of many on a disk as far as no input has to be opened for it: each part sees that it lies in
        no input and has room, and the task that makes the output makes all checks.

        Raises:
            UsageError, OutputError, CheckpointError
        """
        if isinstance(self.out, Address) or self.has_results:
            self.check(force=force)
            return
        check_pins(self.plan.pins)
        targets = [self.out, *(self.plan.targets(self.out).values() if self.plan.layout == "file" else ())]
        there = next((path for path in targets if os.path.lexists(path)), None)
        if there is not None and not force:
            raise OutputError(f"{there} exists", f"choose another name, or replace it with {option('force', True)}")

    def _beside(self, *, force: bool) -> list[Any]:
        """What goes next to the output."""
        return [replace(cast("Any", one), force=force) for one in self.job.beside]

    def _rest_is_made(self) -> bool:
        """Whether an earlier end of this plan made what stands beside the output, and was ended before the output."""
        from adapterkit.disk import partial_folder, read_inside

        if isinstance(self.out, Address):
            return False  # an object names its plan
        folder = partial_folder(self.out)
        return folder.is_dir() and read_inside(folder, MADE) == self.plan.digest.encode()

    def _make_rest(self, *, force: bool) -> None:
        """Write the other outputs of the plan, such as a tower's file. They are there before the output is.

        Raises:
            OutputError: one exists, or the disk is full.
        """
        if not self.job.also:
            return
        from adapterkit.disk import partial_folder, write_inside

        force = force or self._rest_is_made()

        def ready(found: Any) -> None:
            if isinstance(self.out, Path):
                write_inside(partial_folder(self.out), MADE, self.plan.digest.encode())

        run([replace(other, force=force) for other in self.job.also], resume=True, before=ready)

    def take_over(self) -> None:
        """Take the place of a run of another plan that claimed the output in a store, and may be gone.

        Raises:
            AuthError, StoreError
        """
        if not isinstance(self.out, Address):
            return
        results = replace(self._work, force=True).in_store()
        results.begin(shared=True)
        if self.has_results:
            made = self._final(force=True).in_store()
            if made.claimed() is None:  # it is of inputs that have changed since, and so are its results
                results.remove()
                made.begin(shared=True)

    def is_there(self) -> bool:
        """Whether the output of this plan is in its place, and nobody makes it anew. An object of a store names its plan, which
        knows inputs in stores by their content; all else is known by what the output says of itself, see
        `adapterkit.verbs.recorded.is_recorded`. Names, sizes and dates prove nothing."""
        from adapterkit.verbs.recorded import is_recorded

        if isinstance(self.out, Address):
            made = self._final().in_store() if self.has_results else self.job.in_store()
            if not (made.is_made() if self.has_results else made.is_there()):
                return False
            named = made.store.marked and all(source.path is None for source in self.job.sources)
            return named or is_recorded(replace(self.job, out=self.out))
        return self._looks_whole(self.out) and is_recorded(replace(self.job, out=self.out))

    def tidy(self) -> None:
        """Take away what another task, which ended at the same moment, may have left of an output that is there."""
        if isinstance(self.out, Address):
            (self._final() if self.has_results else self.job).in_store().tidy()

    def _looks_whole(self, out: Path) -> bool:
        """Whether an output on this disk may be there, as far as names and sizes tell."""
        from adapterkit.checkpoint.publish import partial_folder

        if partial_folder(out).exists():
            return False
        if self.has_results:
            return out.exists()
        sizes = {file.name: file.nbytes for file in self.plan.files}
        targets = self.plan.targets(out).items()
        return all(path.is_file() and path.stat().st_size == sizes[name] for name, path in targets)

    def is_newer_than(self, plan: Path) -> bool:
        """Whether the output was made after a plan file; of a store whose objects name their plan, that is not asked."""
        if isinstance(self.out, Address):
            return self.job.in_store().is_newer_than(plan.stat().st_mtime)
        files: Iterable[Path] = self.plan.targets(self.out).values()
        if self.has_results:
            files = [self.out] if self.out.is_file() else [path for path in self.out.rglob("*") if path.is_file()]
        made = min((path.stat().st_mtime_ns for path in files), default=0)
        return made >= plan.stat().st_mtime_ns

    def is_busy(self) -> bool:
        """Whether somebody is at the hidden folder at this moment."""
        from adapterkit.disk import is_busy, partial_folder

        if isinstance(self.out, Address):
            return False  # a store does not know who is at it; workers of one plan do each other no harm
        return is_busy(partial_folder(self.out))

    def forget_stale(self) -> None:
        """Forget what was done here of inputs that have changed since."""
        from adapterkit.checkpoint.parts import forget
        from adapterkit.checkpoint.write import identity

        if isinstance(self.out, Address):
            return  # the plan has the ETag of each input, and each request asks for it
        forget(self.plan, self.out, identity(self.plan, self.job.sources))

    def _close(self, *, force: bool) -> tuple[str, ...]:
        job = self.job
        if isinstance(self.out, Address):
            from adapterkit.checkpoint.store_write import finish_in_store

            made = replace(job, force=force).in_store()
            self._make_rest(force=force)
            finish_in_store(made, side_files=job.side, record=job.record, parts=self.parts)
            return (*made.notes, *(note for one in self._beside(force=force) for note in one.write()))
        from adapterkit.checkpoint.parts import finish_parts

        beside = self._beside(force=force)

        def first() -> None:
            for one in beside:
                one.check()  # what a part alone did not ask, and what may have changed since the plan
            self._make_rest(force=force)

        finish_parts(
            *(job.plan, self.out),
            side_files=job.side,
            force=force,
            record=job.record,
            parts=self.parts,
            first=first,
        )
        return tuple(note for one in beside for note in one.write())

    def finish(self, *, force: bool = False, more: Callable[[Measured], Measured] = lambda measured: measured) -> Any:
        """Make the output of parts that are all done, and what stands beside it; the report of the verb.

        Args:
            more: adds to what is measured what the parts took.

        Raises:
            OutputError: parts are missing, or the output exists.
            CheckpointError: an input changed meanwhile.
        """
        started, job = time.monotonic(), self.job
        if self.has_results:
            return self._finish_results(force, more)
        with moving() as meter:
            notes = self._close(force=force)
            spent = time.monotonic() - started
            measured = Measured(spent, peak_memory(), plan=job.plan, notes=notes, moved=meter.moved)
        return job.report(more(measured))

    def _final(self, *, force: bool = False) -> Job:
        """The job that makes the output of results; its stage is still to be told where they are."""
        beside = tuple(self._beside(force=force))
        return replace(self.job, out=self.out, force=force, beside=beside, digest=self.plan.digest)

    def _finish_results(self, force: bool, more: Callable[[Measured], Measured]) -> Any:
        """Make the output of results that are all there."""
        results = self.job.results
        assert results is not None
        missing = [str(part.index) for part in self.left()]
        if missing:
            raise OutputError(
                f"{self.out}: parts {', '.join(missing[:8])} are not done", "execute them, then finish again"
            )
        made = self._gathered(force) if isinstance(self.out, Address) else None

        def stage(room: Room) -> Writing:
            from adapterkit.checkpoint.parts import check_done

            (file,) = self.plan.files
            source: Source | None
            if made is not None:
                source = made.source(file)
            else:
                check_done(self.plan, self.parts, room.folder, self.out)
                source = LocalFile(room.folder / file.name)
            if source is None:
                raise OutputError(f"the results in {self.place} are gone", "run it again")
            return results().stage(ResultFile(source, results().tensors))(room)

        job = self._final(force=force)
        last = replace(job, stage=stage, report=lambda measured: job.report(more(measured)))
        report = run([last], resume=True)[0]
        if made is not None:
            made.remove()
        return report

    def discard(self) -> None:
        """Take away what workers left of an output in a store, if it is claimed for this plan."""
        self.in_store.discard()
        if self.has_results:
            made = self._work.in_store()
            if made.is_there():
                made.remove()
            self._final().in_store().discard()

    def _gathered(self, force: bool) -> StoreOut:
        """The results in a store, as one object; the output is claimed before they are, see `_are_ours`."""
        from adapterkit.checkpoint.store_write import finish_in_store

        made = self._work.in_store()
        self._final(force=force).in_store().begin(resume=True)
        if not made.is_there():
            finish_in_store(made, side_files={}, parts=self.parts)
        return made


def execute(
    plan: Plan,
    out: str | Path | Address,
    *,
    part: int | None = None,
    part_size: int | None = None,
    jobs: int | None = None,
    device: str | None = None,
    force: bool = False,
    resume: bool = False,
    progress: Callable[[int, int], None] | None = None,
) -> Any:
    """Execute a saved plan: one part of it into the hidden folder beside ``out``, or the end of it when all are done.

    The inputs are opened again and the plan is made again; it must come out the same. Where the files of an output are
    known only when its values are (a combination, an extraction), the parts are results, and the end makes the files of them;
    such a plan of which no part is done is carried out whole.

    Args:
        part_size: work of a part in bytes; with None a part is a file.
        device: compute there and not where the plan says; see `on_device`.

    Returns:
        A `PartReport` for a part, else the report of the verb.

    Raises:
        CheckpointError: the inputs are not those of the plan.
        UsageError: there is no such part, or no such device.
        OutputError: parts are missing or the disk is full.
    """
    started = time.monotonic()
    plan = on_device(plan, device)
    opened = OpenPlan(plan, out, part_size)
    if part is not None:
        return opened.execute(part, jobs=jobs, progress=progress)
    if not has_parts(plan) or (opened.has_results and len(opened.left()) == len(opened.parts)):
        job = replace(opened.job, out=opened.out, force=force)
        return run([job], workers=jobs, resume=resume, progress=progress, started=started)[0]
    return opened.finish(force=force)


def on_device(plan: Plan, device: str | None) -> Plan:
    """A plan that computes on another device: another plan, whose parts are no parts of this one.

    Raises:
        UsageError: no such name.
    """
    if device is None or check_name(device) == device_of(plan.request):
        return plan
    return replace(plan, request={**plan.request, "device": device})


def has_parts(plan: Plan) -> bool:
    """Whether the files of a plan can be executed one at a time."""
    return plan.request.get(STAGED) is not True


def no_parts(plan: Plan, hint: str) -> UsageError:
    """What is said of a plan whose files cannot be executed one at a time."""
    from adapterkit.requests.formats import formats

    to = str(plan.request.get("to") or "")
    form = formats().get(to)
    if form is not None and form.planner.startswith("compressor:"):
        why = f"{to} is written by llm-compressor, which quantizes each layer by what the layers before it put out"
    elif form is not None and form.adapter:
        why = f"the ranks of a computed adapter ({to}) are known when its values are, and it is small"
    else:
        why = "its files are known when its values are"
    return UsageError(f"this plan has no parts: {why}", hint)


def _again(plan: Plan, out: Path | Address) -> Job:
    """The job of a plan, made again from what it asks for.

    Raises:
        CheckpointError: it does not say which verb it is of, or comes out different.
    """
    check_pins(plan.pins)
    job = pinned(_replanned(plan, out))
    compare(plan.pins, job.executed.pins)
    compare(plan.inputs, job.executed.inputs)
    if job.executed.files != plan.files:
        raise CheckpointError(
            "an input changed since the plan was made, which comes out otherwise now", "make the plan again"
        )
    if job.results is not None:
        results = replace(job.results(), plan=plan)
        return replace(job, results=lambda: results)
    return replace(job, plan=replace(job.plan, request=plan.request))


def _replanned(plan: Plan, out: Path | Address) -> Job:
    """The job that a plan asks for, of inputs as they are.

    Raises:
        CheckpointError: it does not say which verb it is of.
    """
    verb = str(plan.request.get("verb"))
    if verb not in VERBS or not {"base", "src", "adapters", "adapter"} & set(plan.request):
        raise CheckpointError(
            "this plan does not say which merge it is of",
            f"write one with {option('save_plan')}",
        )
    try:
        asked = {name: value for name, value in plan.request.items() if name not in (REST, STAGED)}
        job: Job = import_module(f"adapterkit.verbs.{verb}").replan({**asked, **_rest_of(plan)}, out).job()
    except KeyError as error:
        raise CheckpointError(f"this plan of a {verb} does not say {error}", "make the plan again") from None
    except NotFound as error:
        if not any(not os.path.isabs(one) and address_of(one) is None for one in inputs_of(plan)):
            raise
        # Another folder is tried more often than an input goes away.
        hint = "a plan names its inputs as they were given: execute it in the folder where it was made, or give whole paths"
        raise NotFound(error.message, hint) from None
    return job


def inputs_of(plan: Plan) -> list[str]:
    """The inputs of a plan, by the names that they were given."""
    named = (plan.request.get(name) for name in ("base", "adapters", "adapter", "src", "tuned", "merged", "base16"))
    return [str(one) for value in named if value for one in (value if isinstance(value, list) else [value])]


def _rest_of(plan: Plan) -> dict[str, Any]:
    """What a plan was asked for beside its output.

    Raises:
        CheckpointError: that is no set of options.
    """
    found = plan.request.get(REST, {})
    if not isinstance(found, Mapping) or not set(found) <= set(RESTS):
        raise CheckpointError(f"{REST!r} of this plan is no set of options", "make the plan again")
    return dict(found)
