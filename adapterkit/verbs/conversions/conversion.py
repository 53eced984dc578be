"""A conversion that is planned."""

from __future__ import annotations

from collections import Counter
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from adapterkit.bases import open_adapter, open_model
from adapterkit.checkpoint import odd
from adapterkit.checkpoint.open import is_object, locate
from adapterkit.errors import NotFound, size
from adapterkit.places import address_of
from adapterkit.verbs.job import Job
from adapterkit.verbs.placed import place
from adapterkit.verbs.placed import said as computed_in_words
from adapterkit.verbs.report import ConvertReport

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from adapterkit.checkpoint.files import Source
    from adapterkit.checkpoint.plan import Plan
    from adapterkit.checkpoint.tensor import Tensor
    from adapterkit.checkpoint.write import Stage
    from adapterkit.gguf.checkpoint import GGUFCheckpoint
    from adapterkit.requests.convert import ConvertRequest
    from adapterkit.verbs.calibration import Calibration
    from adapterkit.verbs.job import Beside, Measured, Recorder

Ref = str | Path


@dataclass(frozen=True)
class Conversion:
    """A conversion that is planned: everything is checked, no tensor is read.

    Attributes:
        src: what is converted.
        to: the format.
        plan: what the sink will write, from ``tensors`` and ``sources``.
        side: small files beside the weights, where the output is a folder.
        record: what writes ``adapterkit.json``.
        stage: what has to be computed before the plan is known; ``room`` is what it may need on the disk, in bytes.
        request: what was asked for.
        beside: what goes next to the output.
        also: what is written in the same pass.
        named: what the record names, where it was opened for the plan.
        calibration: what weights are rounded by, where that is with feedback.
    """

    src: str
    to: str
    plan: Plan
    tensors: Mapping[str, Tensor]
    sources: tuple[Source, ...]
    types: dict[str, int]
    side: Mapping[str, bytes]
    notes: tuple[str, ...] = ()
    record: Recorder | None = None
    stage: Stage | None = None
    request: ConvertRequest | None = None
    beside: tuple[Beside, ...] = ()
    also: tuple[Job, ...] = ()
    named: tuple[Any, ...] = ()
    calibration: Calibration | None = None

    @property
    def peak_memory(self) -> int:
        """The estimate, in bytes."""
        return self.plan.peak_memory

    def _recorded(self) -> Sequence[Any]:
        """What the record names that lies in a store: it is opened once more to be read."""
        from adapterkit.requests.formats import formats

        if self.named:
            return self.named
        found: list[Any] = []
        if address_of(self.src) is not None:
            found.append(open_adapter(self.src) if formats()[self.to].adapter else open_model(self.src))
        base = getattr(self.request, "base", None)
        return (*found, *([open_model(base)] if base is not None and address_of(base) is not None else ()))

    def job(self) -> Job:
        """The conversion as what an executor takes."""
        assert self.request is not None
        place(self.tensors.values(), self.request.device)
        for one in self.also:
            place(one.tensors.values(), self.request.device)
        return Job(
            plan=self.plan,
            tensors=self.tensors,
            sources=self.sources,
            out=self.request.target,
            report=self.report,
            side=self.side,
            record=self.record,
            beside=self.beside,
            recorded=self._recorded,
            stage=self.stage,
            force=self.request.force,
            also=self.also,
        )

    def report(self, measured: Measured) -> ConvertReport:
        """What was done, or would be."""
        assert self.request is not None
        plan = self.plan if measured.plan is None else measured.plan
        out = self.request.out
        said: dict[str, Any] = {
            "files": plan.names(self.request.target or Path("-")),
            "nbytes": plan.nbytes,
            "tensors": len(plan.steps),
            "copied": sum(1 for step in plan.steps if step.source is not None),
            "types": self.types,
            "notes": self.notes,
            **measured.facts,
        }
        copied = {} if measured.dry_run else odd.sampled(self.tensors.values())
        said["notes"] = (*said["notes"], *measured.notes, *self._fed_back(measured.dry_run), *odd.said(copied))
        if not measured.dry_run:
            said["notes"] += computed_in_words(self.request.device, self.tensors.values())
        return ConvertReport(
            src=self.src,
            out="" if out is None else str(out),
            to=self.to,
            reused=measured.reused,
            seconds=measured.seconds,
            peak_memory=measured.peak_memory,
            dry_run=measured.dry_run,
            **asdict(measured.moved),
            **said,
        )

    def _fed_back(self, dry_run: bool) -> tuple[str, ...]:
        """What is said of rounding with feedback."""
        made, asked = self.calibration, self.request
        if made is None or asked is None:
            return ()
        if dry_run:
            disk = f"{size(made.disk)} of disk"
            return (
                f"the model reads {asked.calibration} first; the inputs of its layers are kept meanwhile in at most {disk}",
            )
        return (f"rounded with feedback, by {made.tokens} tokens of {asked.calibration}",)


def gguf_file(src: Any) -> GGUFCheckpoint | None:
    """The GGUF file that ``src`` names, or None where it names something else.

    Raises:
        NotFound: there is no such file or folder.
        CheckpointError, UnsafeError, AuthError, HubError
    """
    from adapterkit.gguf.checkpoint import GGUFCheckpoint

    path = Path(src).expanduser()
    if path.is_file() or is_object(src, (".gguf",)):
        opened = open_model(src)
        return opened if isinstance(opened, GGUFCheckpoint) else None
    if not path.exists():
        locate(src, headers_only=True)
        raise NotFound(f"{src} is not a file here", "download it first")
    return None


def count_types(tensors: Mapping[str, Tensor]) -> dict[str, int]:
    """How many tensors have each type."""
    return dict(Counter(tensor.dtype.code for tensor in tensors.values()).most_common())
