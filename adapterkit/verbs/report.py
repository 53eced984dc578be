"""Reports: what a verb did, as frozen values; ``--json`` prints them as they stand."""

from __future__ import annotations

import json
from dataclasses import asdict, field
from typing import TYPE_CHECKING, Any

from adapterkit.errors import counted
from adapterkit.values import dataclass

if TYPE_CHECKING:
    from adapterkit.adapters.fidelity import FidelityReport
    from adapterkit.requests.groups import Limits


@dataclass(frozen=True)
class Forecast:
    """What so many workers would take, planned and not run.

    Attributes:
        bytes_down, bytes_up: of all workers, from the inputs and into the output.
        seconds: until the last worker ends; of a worker that moves bytes in both directions while it computes.
        busy: share of the workers' time in which they have something to do.
        money: workers times hours times the price of one.
        bandwidth: bytes a second in each direction; ``jobs``: threads of a worker.
    """

    workers: int
    parts: int
    bytes_down: int
    bytes_up: int
    seconds: float
    busy: float
    money: float
    bandwidth: float
    jobs: int


@dataclass(frozen=True)
class AdapterUse:
    """One adapter of a merge.

    Attributes:
        method: as the config names it: ``LORA``.
        label: as its authors write it: ``DoRA``.
    """

    ref: str
    method: str
    weight: float
    commit: str | None = None
    base: str | None = None
    label: str = ""


@dataclass(frozen=True)
class ResidualReport:
    """What rounding took of a merge, as a LoRA beside its output.

    Attributes:
        out: the folder, or the GGUF file.
        rank: of the factors, at most.
        modules: how many weights have factors; ``nbytes``: of their file.
        held: share of the squared norm of what rounding took that the factors hold; None before it is computed.
        command: serves output and residual together.
        notes: weights that have none, and why.
    """

    out: str
    rank: int
    modules: int
    nbytes: int
    held: float | None
    command: str
    notes: tuple[str, ...] = ()


@dataclass(frozen=True)
class MergeReport:
    """What a merge did, or with ``dry_run`` would do.

    Sizes are bytes, times seconds.

    Attributes:
        base_values: of the base, what was folded onto: as stored, decoded, the 16-bit original, or as trained.
        method: how the deltas of several adapters became one.
        fidelity: what of the change survives in the output, when that was asked for.
        min_retention, min_cosine: the least share and the least cosine that were asked for.
        max_error, max_dead: the largest error beside the change, and how many tensors may lose theirs.
        touched: tensors with a change folded in; ``copied`` are byte-identical to the base's.
        reused: of the touched ones, how many a resumed run found finished.
        peak_memory: measured over the process, or estimated for a dry run.
        requests, bytes_down, bytes_up, bytes_inside: of object stores: what was asked, read, sent, and copied by a store
            itself; for a dry run, what would be.
        residual: what rounding took, where that was asked for; ``fidelity`` is of the output alone.
    """

    out: str
    base: str
    base_commit: str | None
    adapters: tuple[AdapterUse, ...]
    dtype: str
    files: tuple[str, ...]
    nbytes: int
    tensors: int
    touched: int
    copied: int
    added: tuple[str, ...] = ()
    reused: int = 0
    parameters: int = 0
    seconds: float = 0.0
    peak_memory: int = 0
    base_values: str = "as stored"
    method: str = "linear"
    fidelity: FidelityReport | None = None
    min_retention: float | None = None
    min_cosine: float | None = None
    max_error: float | None = None
    max_dead: int | None = None
    dry_run: bool = False
    notes: tuple[str, ...] = field(default=())
    requests: int = 0
    bytes_down: int = 0
    bytes_up: int = 0
    bytes_inside: int = 0
    forecast: tuple[Forecast, ...] = ()
    residual: ResidualReport | None = None

    @property
    def ok(self) -> bool:
        """Whether as much of the change survives as was asked for."""
        return not self.unmet

    @property
    def unmet(self) -> tuple[str, ...]:
        """What was asked of the change and does not hold, in words."""
        return () if self.fidelity is None else unmet(self.fidelity, self)


def unmet(found: FidelityReport, asked: MergeReport | Limits) -> tuple[str, ...]:
    """What was asked of a change and does not hold, in words."""
    words = []
    least, cosine = asked.min_retention, asked.min_cosine
    if least is not None and not found.retention >= least:
        words.append(f"less than {least:.1%} of the change survives")
    if cosine is not None and not found.cosine >= cosine:
        words.append(f"what is written of the change has cosine {found.cosine:.4f} with it, less than {cosine:g}")
    error = found.error if found.weighed is None else found.weighed
    if asked.max_error is not None and not error <= asked.max_error:
        words.append(f"the error beside the change is {error:.3g}, more than {asked.max_error:g}")
    if asked.max_dead is not None and len(found.dead) > asked.max_dead:
        has = "has" if len(found.dead) == 1 else "have"
        some = f"{len(found.dead)} of {counted(len(found.tensors), 'changed tensor')} {has} a cosine or a retention below 0.5"
        words.append(f"{some}, more than {asked.max_dead} (the report names them)")
    return tuple(words)


@dataclass(frozen=True)
class PartReport:
    """One part of a plan that was executed alone, in bytes and seconds.

    Attributes:
        file: that it is, or that it lies in, from the byte ``start``.
        reads: bytes that it takes from the inputs (an estimate).
        reused: computed tensors that an interrupted run had finished.
        cpu_seconds: of the process, in all its threads.
        requests, bytes_down, bytes_up, bytes_inside: of object stores, as in `MergeReport`.
    """

    out: str
    part: int
    parts: int
    file: str
    nbytes: int
    seconds: float
    peak_memory: int
    start: int = 0
    reads: int = 0
    reused: int = 0
    cpu_seconds: float = 0.0
    requests: int = 0
    bytes_down: int = 0
    bytes_up: int = 0
    bytes_inside: int = 0


@dataclass(frozen=True)
class ModuleRank:
    """What was kept of one module.

    Attributes:
        module: the parameter.
        shape: of its delta (of one expert's).
        rank: of the result.
        norm: Frobenius norm of the delta before it was cut to that rank.
        error: Frobenius norm of what was cut, as a part of ``norm``.
        before: the rank it had, where there was one.
    """

    module: str
    shape: tuple[int, int]
    rank: int
    norm: float
    error: float
    before: int = 0

    @property
    def energy(self) -> float:
        """The share of the squared norm that was kept."""
        return 1.0 - self.error**2


@dataclass(frozen=True)
class ConvertReport:
    """What a conversion did, or with ``dry_run`` would do; sizes are bytes, times seconds.

    Attributes:
        to: the format that was written.
        copied: tensors that are byte-identical to the source's.
        types: how many tensors have each type.
        reused: of the computed ones, how many a resumed run found finished.
        modules: what was kept of each delta, where they were decomposed.
        requests, bytes_down, bytes_up, bytes_inside: of object stores, as in `MergeReport`.
    """

    src: str
    out: str
    to: str
    files: tuple[str, ...]
    nbytes: int
    tensors: int
    copied: int
    types: dict[str, int] = field(default_factory=dict)
    reused: int = 0
    seconds: float = 0.0
    peak_memory: int = 0
    dry_run: bool = False
    modules: tuple[ModuleRank, ...] = ()
    notes: tuple[str, ...] = ()
    requests: int = 0
    bytes_down: int = 0
    bytes_up: int = 0
    bytes_inside: int = 0
    forecast: tuple[Forecast, ...] = ()


@dataclass(frozen=True)
class CombineReport:
    """What a combination gave.

    Attributes:
        scale: the lambda.
        rank: of the modules, or of most of them when each has its own.
        own_ranks: whether ranks differ.
        carried: whole parameters and token rows taken over from one adapter.
    """

    out: str
    method: str
    space: str
    scale: float
    parameters: dict[str, Any]
    adapters: tuple[AdapterUse, ...]
    base: str
    rank: int
    own_ranks: bool
    modules: tuple[ModuleRank, ...]
    carried: tuple[str, ...]
    nbytes: int
    seconds: float
    peak_memory: int
    reused: int = 0
    dry_run: bool = False
    notes: tuple[str, ...] = ()
    requests: int = 0
    bytes_down: int = 0
    bytes_up: int = 0
    bytes_inside: int = 0
    forecast: tuple[Forecast, ...] = ()


@dataclass(frozen=True)
class ResizeReport:
    """What resizing an adapter gave; ``rank`` is that of most layers when they differ (``own_ranks``)."""

    out: str
    adapter: str
    method: str
    rank: int
    own_ranks: bool
    modules: tuple[ModuleRank, ...]
    nbytes_before: int
    nbytes: int
    seconds: float
    peak_memory: int
    reused: int = 0
    dry_run: bool = False
    notes: tuple[str, ...] = ()
    requests: int = 0
    bytes_down: int = 0
    bytes_up: int = 0
    bytes_inside: int = 0
    forecast: tuple[Forecast, ...] = ()


@dataclass(frozen=True)
class ExtractReport:
    """What an extraction gave.

    Attributes:
        saved: parameters that are stored whole.
        unchanged: parameters that do not differ.
    """

    out: str
    base: str
    tuned: str
    rank: int
    own_ranks: bool
    modules: tuple[ModuleRank, ...]
    saved: tuple[str, ...]
    unchanged: int
    nbytes: int
    seconds: float
    peak_memory: int
    reused: int = 0
    dry_run: bool = False
    notes: tuple[str, ...] = ()
    requests: int = 0
    bytes_down: int = 0
    bytes_up: int = 0
    bytes_inside: int = 0
    forecast: tuple[Forecast, ...] = ()


def to_json(report: Any) -> str:
    """A report (or any frozen value) as JSON."""
    return json.dumps(asdict(report), indent=2, ensure_ascii=False)
