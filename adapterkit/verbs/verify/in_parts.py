"""A verification as a job: its plan is of one result for each weight, so that workers compare them in parts.

What a worker says of a weight is the verdict and the sums that one process would have; whoever ends the job makes findings and
figures of them, and writes the report as one file of JSON.
"""

from __future__ import annotations

import base64
import json
import tempfile
import time
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass, replace
from functools import cached_property, partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from adapterkit.checkpoint.plan import Chunk, Plan, PlannedFile
from adapterkit.checkpoint.results import Result, planned_results
from adapterkit.checkpoint.write import Room, Writing
from adapterkit.foreign import json_value
from adapterkit.places import here
from adapterkit.requests.verify import LEVELS
from adapterkit.verbs.carry import carry_out
from adapterkit.verbs.job import Job, Measured
from adapterkit.verbs.report import to_json
from adapterkit.verbs.verify.report import VerifyReport
from adapterkit.verbs.verify.tensors import Judged, TensorComparison

if TYPE_CHECKING:
    from adapterkit.checkpoint.results import ResultFile, Results
    from adapterkit.checkpoint.write import Stage
    from adapterkit.places import Address
    from adapterkit.requests.verify import VerifyRequest
    from adapterkit.verbs.verify.opened import OpenVerification
    from adapterkit.verbs.verify.subject import Item

REPORT = "report.json"
_SAID = 1200  # bytes of JSON that a weight's verdict takes beside the names of its parts


@dataclass(frozen=True)
class VerifyJob:
    """A verification that is planned, and what makes a job of it.

    Attributes:
        out: where the report goes.
    """

    verification: OpenVerification
    out: Path | Address | None

    def job(self) -> Job:
        """The verification as what an executor takes."""
        from adapterkit.checkpoint.publish import input_paths

        made, asked = self.verification, self.verification.request
        started = time.monotonic()
        return Job(
            plan=_plan(b""),
            tensors={},
            sources=made.sources,
            out=self.out,
            report=self.report,
            # A report has no place in a folder that it is about: --force would replace its config.
            inputs=tuple(input_paths(Plan(()), made.sources)),
            stage=partial(self._stage, started),
            force=asked.force,
            results=lambda: self.results,
            alike=self._is_ours,
        )

    def _is_ours(self, data: bytes) -> bool:
        """Whether a report is of these inputs, by digest, and of what is asked of them."""
        try:
            said = json_value(data)
            read = [(one["role"], one["digest"], one["weight"]) for one in said["inputs"]]
            theirs = (read, said["level"], said["thresholds"], said["options"])
        except (ValueError, KeyError, TypeError):
            return False
        made = self.verification
        asked = (LEVELS[made.request.depth], asdict(made.thresholds), made.options)
        ours = [(one.role, one.digest, one.weight) for one in made.inputs()]
        return theirs == (ours, *json.loads(json.dumps(asked)))

    def _stage(self, started: float, room: Room) -> Writing:
        """Compare everything here."""
        made = self.verification
        judged = made.compared(room.jobs, room.progress) if made.by_tensors else ()
        return self._written(made.report(judged, started, room.jobs, None))

    @cached_property
    def results(self) -> Results:
        """The verdict of each weight as a result of its own."""
        made = self.verification
        comparison = TensorComparison(made.planned)
        found = [_result(comparison, item) for item in made.planned.items]
        return planned_results(found, made.sources, made.request.stated(), self._of_results)

    def _of_results(self, found: ResultFile) -> Stage:
        def stage(room: Room) -> Writing:
            made, started = self.verification, time.monotonic()
            judged = tuple(found.made(item.name, partial(Judged.of, item)) for item in made.planned.items)
            return self._written(made.report(judged, started, room.jobs, room.progress))

        return stage

    def _written(self, report: VerifyReport) -> Writing:
        """The report as a file."""
        data = (to_json(report) + "\n").encode()
        place = Path() if self.out is None else here(self.out)
        return Writing(_plan(data), {}, self.verification.sources, place, facts={"report": report})

    def report(self, measured: Measured) -> VerifyReport:
        """What was found, or that nothing was looked at."""
        made = self.verification
        report = measured.facts.get("report")
        if report is None:
            adapters, level = tuple(one.ref for one in made.loaded), LEVELS[made.request.depth]
            findings, notes = made.every, (*made.planned.notes, *measured.notes)
            planned = VerifyReport(False, made.found.ref, made.stored.ref, adapters, level, findings, dry_run=True)
            return replace(planned, notes=notes, seconds=measured.seconds, peak_memory=measured.peak_memory)
        assert isinstance(report, VerifyReport)
        nbytes = 0 if measured.plan is None else measured.plan.nbytes
        notes = (*report.notes, *measured.notes)
        return replace(report, notes=notes, nbytes=nbytes, seconds=measured.seconds, peak_memory=measured.peak_memory)


def carried_out(request: VerifyRequest, made: OpenVerification, started: float) -> VerifyReport:
    """Do with a verification what its request says: show it, save its plan, or carry it out, here or by workers.

    Without a place for the report, workers of this machine have one that goes with the run.
    """
    with ExitStack() as held:
        out = request.target
        if out is None and request.writes:
            out = Path(held.enter_context(tempfile.TemporaryDirectory(prefix="adapterkit-"))) / REPORT
        report: VerifyReport = carry_out(VerifyJob(made, out).job(), request, started)
        return report


def _plan(data: bytes) -> Plan:
    """The plan of a file with these bytes."""
    head = (Chunk(0, len(data), base64.b64encode(data).decode()),) if data else ()
    return Plan((PlannedFile(REPORT, len(data), (), head=head),), layout="file")


def _result(comparison: TensorComparison, item: Item) -> Result:
    names = [json.dumps(found.name) for _, found in item.parts]

    def compute() -> tuple[Any, Sequence[bytes]]:
        return comparison.alone(item).said(), ()

    said = _SAID + sum(len(name) + 2 for name in names)
    reads = item.nbytes + item.floats.reads
    return Result(item.name, said, 0, reads, f"compared: {item.floats.how}", compute, item.floats.memory)
