"""Options of verbs whose plan has parts, which workers can execute."""

from __future__ import annotations

import re
from dataclasses import field
from pathlib import Path
from typing import TYPE_CHECKING, ClassVar

from adapterkit.errors import UsageError, option
from adapterkit.places import Address
from adapterkit.requests.groups import RUNNING
from adapterkit.requests.option import (
    CALL,
    COUNTS,
    DEVICE,
    DEVICES,
    FLAG,
    INPUT,
    NUMBER,
    OUTPUT_THERE,
    PAIRS,
    PATH,
    READ_THERE,
    WHOLE,
    Request,
    opt,
)
from adapterkit.values import dataclass

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from adapterkit.requests.groups import Progress, Ref

WORKERS = "Workers"
LOCAL, RAY, SLURM, K8S = "local", "ray", "slurm", "k8s"
ENGINES = (LOCAL, RAY, SLURM, K8S)
WRITTEN_JOBS = (SLURM, K8S)
"""Engines for which a job is written, and not waited for."""
BANDWIDTH, PRICE = "25Gb/s", 1.0

_RATE = re.compile(r"(\d+(?:\.\d+)?)\s*([KMGT]?)(b|B|bit)(?:/s|ps)", re.ASCII)
_HERE = {"recipe": "of run, which says where a plan is executed"}


@dataclass(frozen=True, kw_only=True, init=False, eq=False, repr=False)
class OnWorkers(Request):
    """Where the parts of a plan are executed. No byte depends on it."""

    on: str | None = field(
        default=None,
        metadata=opt(
            "Execute the plan in parts: by local processes, by Ray, or by a Slurm job array or Kubernetes job that is written.",
            group=WORKERS, choices=ENGINES, elsewhere=_HERE,
        ),
    )  # fmt: skip
    workers: int | str | None = field(
        default=None,
        metadata=opt(
            "How many workers. With --dry-run several, as 1,8,64: bytes, seconds and money of each are printed.",
            COUNTS, group=WORKERS, metavar="N", elsewhere=_HERE,
        ),
    )  # fmt: skip
    part_size: str | None = field(
        default=None,
        metadata=opt(
            "Work of a part, in bytes of a plain merge; by default 1GB, or less (down to 50MB) for eight parts a worker.",
            group=WORKERS, metavar="SIZE", needs=("on", "workers", "tasks"), elsewhere=_HERE,
        ),
    )  # fmt: skip
    address: str | None = field(
        default=None,
        metadata=opt(
            "Of ray: a cluster that runs, as ray://head:10001, or auto; by default one is started on this machine.",
            group=WORKERS, metavar="ADDRESS", needs=("on",), elsewhere=_HERE,
        ),
    )  # fmt: skip
    events: Ref | None = field(
        default=None,
        metadata=opt(
            "Append what happens to this file, a line of JSON each.", PATH,
            group=WORKERS, metavar="FILE", needs=("on",), elsewhere=_HERE,
        ),
    )  # fmt: skip
    template: Ref | None = field(
        default=None,
        metadata=opt(
            "Of slurm and k8s: your copy of the job's template (adapterkit run --print-template).", PATH,
            store=READ_THERE, group=WORKERS, metavar="FILE", needs=("on",), elsewhere=_HERE,
        ),
    )  # fmt: skip
    set: Sequence[tuple[str, str] | str] | Mapping[str, str] = field(
        default=(),
        metadata=opt(
            "A value for a place of the template, as image=registry/adapterkit:1; may be given again.", PAIRS,
            group=WORKERS, metavar="NAME=VALUE", needs=("on",), elsewhere=_HERE,
        ),
    )  # fmt: skip
    submit: bool = field(
        default=False,
        metadata=opt(
            "Of slurm and k8s: hand the job over (sbatch, kubectl), not only write it.", FLAG,
            group=WORKERS, needs=("on",), elsewhere=_HERE,
        ),
    )  # fmt: skip
    bandwidth: str = field(
        default=BANDWIDTH,
        metadata=opt(
            "What a worker reads, and writes at the same time, for the forecast of --dry-run --workers.",
            group=WORKERS, metavar="RATE", needs=("workers",), elsewhere=_HERE,
        ),
    )  # fmt: skip
    price: float = field(
        default=PRICE,
        metadata=opt(
            "Of an hour of a worker, for the same forecast; at 1 the money is hours.", NUMBER,
            group=WORKERS, metavar="X", low=0, needs=("workers",), elsewhere=_HERE,
        ),
    )  # fmt: skip

    def check(self) -> None:
        super().check()
        self.check_workers()

    def check_workers(self) -> None:
        """Refuse options of workers that contradict each other.

        Raises:
            UsageError
        """
        counts = self.counts
        dry = getattr(self, "dry_run", False)
        if len(counts) > 1 and not dry:
            raise UsageError(
                f"{option('workers', self.workers)} names several numbers",
                f"name one, or add {option('dry_run', True)}",
            )
        if counts and self.on is None and not dry:
            raise UsageError(
                f"{option('workers', self.workers)} means nothing here",
                f"say where: {option('on', LOCAL)}, ray, slurm or k8s",
            )
        if self.on is not None and getattr(self, "save_plan", None) is not None:
            raise UsageError("a plan that is saved is not executed", f"leave out {option('on')}, then run the plan")
        if self.on in WRITTEN_JOBS and not counts and not dry:
            raise UsageError(f"nothing says how many tasks the job of {self.on} has", f"add {option('workers', '8')}")
        if self.address is not None and self.on != RAY:
            raise UsageError(f"{option('address')} is of ray", f"add {option('on', RAY)}")
        for name in ("template", "set", "submit"):
            if getattr(self, name) and self.on not in WRITTEN_JOBS:
                raise UsageError(f"{option(name)} is of slurm and k8s", "leave it out")
        if self.events is not None and self.on in WRITTEN_JOBS:
            raise UsageError("a job that is written has its own log", f"leave out {option('events')}")
        parse_rate(self.bandwidth)

    @property
    def counts(self) -> tuple[int, ...]:
        """The numbers of workers.

        Raises:
            UsageError: not numbers.
        """
        words = [] if self.workers is None else str(self.workers).split(",")
        try:
            found = tuple(int(word) for word in words)
        except ValueError:
            found = (0,)
        if any(not 1 <= count <= 100_000 for count in found):
            raise UsageError(f"'{self.workers}' is no number of workers", "write it like 4, or 1,8,64")
        return found


def parse_rate(text: str) -> float:
    """Bytes a second of ``25Gb/s`` (bits) or ``800MB/s`` (bytes).

    Raises:
        UsageError: not a rate.
    """
    found = _RATE.fullmatch(text.strip())
    rate = 0.0 if found is None else float(found[1]) * 1000.0 ** " KMGT".index(found[2] or " ")
    if found is None or not rate:
        raise UsageError(f"'{text}' is not a rate", "write it like 25Gb/s (bits) or 800MB/s (bytes)")
    return rate if found[3] == "B" else rate / 8


ON_DEVICE = (
    "Compute on this device instead of the plan's: cpu, cuda (of several cuda:1) or mps. This makes another plan of it: "
    "parts that are done of the old one are not used."
)


@dataclass(frozen=True, eq=False, repr=False)
class RunRequest(OnWorkers):
    """A saved plan that is executed by workers."""

    VERB: ClassVar[str] = "run"

    plan: Ref = field(metadata=opt("The plan that --save-plan of a verb wrote.", PATH, role=INPUT, store=READ_THERE))
    out: Ref | Address | None = field(
        default=None,
        metadata=opt(
            "The folder or file to make; an address in a store too.", PATH, role=INPUT, short="-o", store=OUTPUT_THERE
        ),
    )
    jobs: int | None = field(
        default=None,
        kw_only=True,
        metadata=opt("Worker threads of each worker.", WHOLE, group=RUNNING, low=1, elsewhere=_HERE),
    )
    dry_run: bool = field(
        default=False,
        kw_only=True,
        metadata=opt("Show the parts, and what workers would take.", FLAG, group=RUNNING, elsewhere=_HERE),
    )
    force: bool = field(
        default=False, kw_only=True, metadata=opt("Replace OUT if it exists.", FLAG, group=RUNNING, elsewhere=_HERE)
    )
    progress: Progress | None = field(
        default=None,
        kw_only=True,
        metadata=opt(
            "Called now and then with bytes done and bytes in all.", CALL,
            group=RUNNING, elsewhere={"cli": "a bar on standard error", **_HERE},
        ),
    )  # fmt: skip
    device: str | None = field(
        default=None,
        kw_only=True,
        metadata=opt(
            ON_DEVICE, DEVICE, group=RUNNING, metavar=DEVICES, elsewhere=_HERE,
        ),
    )  # fmt: skip
    task: int | None = field(
        default=None,
        kw_only=True,
        metadata=opt(
            "Be one task of a job array: execute the share of this number (from 0) of --tasks; the last to end makes OUT.",
            WHOLE, group=WORKERS, low=0, metavar="I", needs=("tasks",), elsewhere=_HERE,
        ),
    )  # fmt: skip
    tasks: int | None = field(
        default=None,
        kw_only=True,
        metadata=opt(
            "How many tasks the job array has.",
            WHOLE, group=WORKERS, low=1, metavar="N", needs=("task",), elsewhere=_HERE,
        ),
    )  # fmt: skip

    def __post_init__(self) -> None:
        if self.on is None and self.task is None:
            object.__setattr__(self, "on", LOCAL)
        super().__post_init__()

    def check(self) -> None:
        super().check()
        if self.task is not None and self.tasks is not None and self.task >= self.tasks:
            raise UsageError(f"there is no task {self.task} of {self.tasks}", f"they are 0 to {self.tasks - 1}")
        if self.task is not None and self.on is not None:
            raise UsageError("a task of a job array executes its parts itself", f"leave out {option('on')}")

    @property
    def target(self) -> Path | Address | None:
        """Where the output goes."""
        return self.out if self.out is None or isinstance(self.out, Address) else Path(self.out)
