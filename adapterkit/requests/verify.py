"""What a verification is asked for."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import field
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

from adapterkit.errors import UsageError
from adapterkit.places import Address
from adapterkit.requests.groups import RUNNING, THRESHOLDS, Limits, OfAdapters, OntoBase, Ruled, device_option
from adapterkit.requests.merge import MergeRequest
from adapterkit.requests.option import (
    CALL,
    FLAG,
    INPUT,
    NUMBER,
    PATH,
    READ_THERE,
    REF,
    RUN,
    VALUES,
    WHOLE,
    WRITTEN_THERE,
    opt,
)
from adapterkit.requests.workers import WRITTEN_JOBS, OnWorkers
from adapterkit.values import dataclass

if TYPE_CHECKING:
    from adapterkit.requests.groups import Adapters, Base, Progress, Ref

LEVELS = ("load", "tensors", "layers", "model")
EVIDENCE = "Evidence"
_IN_LOCK = {"recipe": "the lock holds the findings; verify in parts is a command of its own"}
PLANNING = ("dry_run", "save_plan", "resume", "force")


@dataclass(frozen=True, eq=False, repr=False)
class VerifyRequest(OntoBase, OfAdapters, Ruled, Limits, OnWorkers):
    """A verification. Options of the merge that are not named are taken from the record beside MERGED."""

    VERB: ClassVar[str] = "verify"
    FIRST: ClassVar[tuple[str, ...]] = ("base", "adapters", "weights", "level", "prompts", "as_trained")

    merged: Base = field(metadata=opt("The folder, the GGUF file, the registry name or the Hub id.", REF, role=INPUT))
    base: Base = field(
        kw_only=True,
        metadata=opt("What the adapters were folded onto.", REF, role=INPUT, metavar="BASE", flag="--base"),
    )
    adapters: Adapters = field(
        kw_only=True,
        metadata=opt(
            "An adapter that was folded in; once for each, in order.", REF,
            role=INPUT, many=True, flag="--adapter", metavar="ADAPTER",
        ),
    )  # fmt: skip
    level: str | None = field(
        default=None,
        kw_only=True,
        metadata=opt(
            "How deep to look; each level does the ones before it too: load reads headers and lets transformers build "
            "the model without weights. By default tensors, or model when --prompts, --max-kl or --min-top1 is given.",
            role=RUN, group=THRESHOLDS, choices=LEVELS, recipe="verify.level",
        ),
    )  # fmt: skip
    prompts: Ref | None = field(
        default=None,
        kw_only=True,
        metadata=opt(
            "Text or JSON Lines; else a mixed set.", PATH,
            role=RUN, group=THRESHOLDS, metavar="FILE", recipe="verify.prompts", store=READ_THERE,
        ),
    )  # fmt: skip
    max_kl: float | None = field(
        default=None,
        kw_only=True,
        metadata=opt(
            "Exit with 3 when the mean KL divergence is larger (nats).", NUMBER,
            role=RUN, group=THRESHOLDS, metavar="X", low=0, recipe="verify.max-kl",
        ),
    )  # fmt: skip
    min_top1: float | None = field(
        default=None,
        kw_only=True,
        metadata=opt(
            "Exit with 3 when fewer tokens agree, as 0.99.", NUMBER,
            role=RUN, group=THRESHOLDS, metavar="Y", low=0, high=1, recipe="verify.min-top1",
        ),
    )  # fmt: skip
    residual: Ref | None = field(
        default=None,
        kw_only=True,
        metadata=opt(
            "What merge --residual wrote beside MERGED; by default what its record names. Limits are of the two.", REF,
            role=RUN, group=THRESHOLDS, metavar="REF", elsewhere={"recipe": "no output of a recipe has one"},
        ),
    )  # fmt: skip
    on_purpose: tuple[str, ...] | str = field(
        default=(),
        kw_only=True,
        metadata=opt(
            "Metadata of a GGUF file that was set otherwise than the base's on purpose, as tokenizer.chat_template.",
            role=RUN, group=THRESHOLDS, many=True, metavar="KEY",
            elsewhere={"recipe": "a recipe sets no such metadata"},
        ),
    )  # fmt: skip
    pre: str | None = field(
        default=None,
        kw_only=True,
        metadata=opt(
            "The pre-tokenizer of a GGUF output, where it was named.", role=VALUES, metavar="NAME",
            elsewhere={"cli": "read from the record", "recipe": "read from the output's own key"},
        ),
    )  # fmt: skip
    out: Ref | Address | None = field(
        default=None,
        kw_only=True,
        metadata=opt(
            "Write the report as JSON to this file or address in a store. Workers on other machines need to reach it.",
            PATH, role=RUN, group=EVIDENCE, short="-o", store=WRITTEN_THERE, elsewhere=_IN_LOCK,
        ),
    )  # fmt: skip
    jobs: int | None = field(
        default=None,
        kw_only=True,
        metadata=opt("Worker threads.", WHOLE, group=RUNNING, low=1, elsewhere={"recipe": "of build"}),
    )
    device: str = device_option(
        "Level layers stays on the CPU, and llama.cpp answers as it was built.", role=RUN, recipe="verify.device"
    )
    dry_run: bool = field(
        default=False,
        kw_only=True,
        metadata=opt(
            "Show what would be compared, from headers alone.", FLAG,
            group=RUNNING, elsewhere={"recipe": "build --plan"},
        ),
    )  # fmt: skip
    save_plan: Ref | None = field(
        default=None,
        kw_only=True,
        metadata=opt(
            "Write the plan of the comparison and stop.", PATH,
            group=RUNNING, metavar="FILE", store=WRITTEN_THERE,
            elsewhere={"recipe": "a plan is of one verb, carried out in parts"},
        ),
    )  # fmt: skip
    resume: bool = field(
        default=False,
        kw_only=True,
        metadata=opt(
            "With --on: continue an interrupted run; keep finished comparisons if interrupted again.", FLAG,
            group=RUNNING, needs=("on",), elsewhere=_IN_LOCK,
        ),
    )  # fmt: skip
    force: bool = field(
        default=False,
        kw_only=True,
        metadata=opt("Replace the report if it exists.", FLAG, group=RUNNING, needs=("out",), elsewhere=_IN_LOCK),
    )
    progress: Progress | None = field(
        default=None,
        kw_only=True,
        metadata=opt(
            "Called now and then with bytes done and bytes in all.", CALL,
            group=RUNNING, elsewhere={"cli": "a bar on standard error", "recipe": "a bar on standard error"},
        ),
    )  # fmt: skip

    def check(self) -> None:
        # Whether an option of the merge means something is decided by what the record beside MERGED says of the others.
        if not self.adapters:
            raise UsageError("no adapter was given", "name what was folded in with --adapter")
        deep = [name for name in ("max_kl", "min_top1", "prompts") if getattr(self, name) is not None]
        if deep and self.level not in (None, "model"):
            raise UsageError(f"{self.spelled(deep[0])} needs the models to answer", "add --level model")
        self.check_needs([*OnWorkers.options(), "resume", "force"])
        self.check_workers()
        in_parts = self.on is not None or self.workers is not None or self.save_plan is not None
        if in_parts and self.depth < LEVELS.index("tensors"):
            raise UsageError("level load compares no tensor, so there is nothing for workers", "leave out --level")
        if self.on is not None and self.out is None and not self.dry_run and self.far:
            raise UsageError(
                "nothing says where the report goes, and workers on other machines have to see that place",
                "add -o FILE",
            )

    @property
    def writes(self) -> bool:
        """Whether something is compared, and not only planned."""
        return not self.dry_run and self.save_plan is None

    @property
    def planned(self) -> bool:
        """Whether the comparison is a plan, which workers can execute, or makes a file."""
        return not self.writes or self.on is not None or self.out is not None

    @property
    def far(self) -> bool:
        """Whether workers may run on other machines."""
        return self.on in WRITTEN_JOBS or self.address is not None

    @property
    def target(self) -> Path | Address | None:
        """Where the report goes."""
        return self.out if self.out is None or isinstance(self.out, Address) else Path(self.out)

    @property
    def depth(self) -> int:
        """The number of the deepest level."""
        if self.level is not None:
            return LEVELS.index(self.level)
        deep = self.prompts is not None or self.max_kl is not None or self.min_top1 is not None
        return LEVELS.index("model" if deep else "tensors")

    def stated(self) -> dict[str, Any]:
        """The request as JSON, for a plan: inputs by name, and the options that were named."""
        assert isinstance(self.adapters, tuple)
        adapters = [_ref(one) for one in self.adapters]
        inputs: dict[str, Any] = {"merged": _ref(self.merged), "base": _ref(self.base), "adapters": adapters}
        own = {"jobs", "progress", "out", *PLANNING, *OnWorkers.options()}
        named = {name: getattr(self, name) for name in sorted(self.named - inputs.keys() - own)}
        return {"verb": self.VERB, **inputs, **{name: _plain(value) for name, value in named.items()}}

    def of_merge(self) -> dict[str, Any]:
        """The options of the merge that were named."""
        return {name: getattr(self, name) for name in self.options() if name in self.named and name in OF_VALUES}


def _ref(value: Any) -> str:
    return str(getattr(value, "ref", value))


def _plain(value: Any) -> Any:
    """A value as JSON has it."""
    if isinstance(value, Mapping):
        return {str(name): _plain(one) for name, one in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(one) for one in value]
    return value if value is None or isinstance(value, (bool, int, float)) else _ref(value)


OF_VALUES = frozenset(
    name for name, option in VerifyRequest.options().items() if option.role == VALUES and name in MergeRequest.options()
) | {"pre"}
"""Options of a merge that decide values, so that a verification has them too."""


def merge_options(request: MergeRequest) -> Mapping[str, Any]:
    """What a verification takes over from the request of the merge it is about."""
    return {name: value for name, value in request.given().items() if name in OF_VALUES}
