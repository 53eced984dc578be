"""What an evaluation is asked for."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import field
from pathlib import Path
from typing import TYPE_CHECKING, ClassVar

from adapterkit.errors import UsageError
from adapterkit.ops.device import CPU
from adapterkit.requests.groups import MODEL_WHERE, RUNNING
from adapterkit.requests.option import (
    CALL,
    DEVICE,
    DEVICES,
    FLAG,
    INPUT,
    PATH,
    REF,
    SWITCH,
    TEXT,
    WHOLE,
    InHome,
    Request,
    opt,
)
from adapterkit.values import dataclass

if TYPE_CHECKING:
    from adapterkit.requests.groups import Ref

MODELS, TASKS, KEPT = "Models", "Tasks", "Evidence"


@dataclass(frozen=True, eq=False, repr=False)
class EvaluateRequest(InHome, Request):
    """Tasks of lm-evaluation-harness, and the models that they are run on."""

    VERB: ClassVar[str] = "evaluate"
    FIRST: ClassVar[tuple[str, ...]] = ("tasks", "base", "null", "include_path", "limit", "attach")

    ref: Ref = field(
        metadata=opt("An adapter, a merged model or a GGUF file: a path, or a registry name.", REF, role=INPUT)
    )
    tasks: Sequence[str] | str = field(
        metadata=opt(
            "Tasks of the harness, divided by commas; may be given again.", TEXT,
            role=INPUT, many=True, flag="--tasks", metavar="NAMES",
        )
    )  # fmt: skip
    base: Ref | None = field(
        default=None,
        kw_only=True,
        metadata=opt(
            "The base. Of an adapter, by default the one that its record or config names; of a model, it is measured too.",
            REF, group=MODELS, metavar="REF",
        ),
    )  # fmt: skip
    null: bool = field(
        default=False,
        kw_only=True,
        metadata=opt(
            "Also the base with the adapter's change set to zero, and with its values shuffled.", FLAG, group=MODELS
        ),
    )
    no_base: bool = field(
        default=False, kw_only=True, metadata=opt("Do not measure the base alone.", FLAG, group=MODELS)
    )
    include_path: Ref | None = field(
        default=None,
        kw_only=True,
        metadata=opt("A folder with tasks of your own.", PATH, group=TASKS, metavar="DIR"),
    )
    limit: int | None = field(
        default=None,
        kw_only=True,
        metadata=opt("Only so many samples of each task.", WHOLE, group=TASKS, metavar="N", low=1),
    )
    num_fewshot: int | None = field(
        default=None,
        kw_only=True,
        metadata=opt("Examples in the prompt; else what the task says.", WHOLE, group=TASKS, metavar="N", low=0),
    )
    chat_template: bool = field(
        default=False,
        kw_only=True,
        metadata=opt("Put prompts into the tokenizer's chat template.", FLAG, group=TASKS),
    )
    batch_size: str = field(default="1", kw_only=True, metadata=opt("A number, or auto.", group=RUNNING))
    device: str = field(default=CPU, kw_only=True, metadata=opt(MODEL_WHERE, DEVICE, group=RUNNING, metavar=DEVICES))
    dtype: str = field(
        default="auto", kw_only=True, metadata=opt("What weights are loaded as, in transformers' words.", group=RUNNING)
    )
    attach: bool = field(
        default=True,
        kw_only=True,
        metadata=opt("Add the figures to the record, where there is one.", SWITCH, group=KEPT),
    )
    say: Callable[[str], None] | None = field(
        default=None,
        kw_only=True,
        metadata=opt(
            "Gets a line when a model is begun.", CALL,
            group=RUNNING, elsewhere={"cli": "the lines go to standard error"},
        ),
    )  # fmt: skip
    home: Ref | None = field(
        default=None,
        kw_only=True,
        metadata=opt("The registry's folder.", PATH, elsewhere={"cli": "$ADAPTERKIT_HOME"}),
    )

    def check(self) -> None:
        super().check()
        if not self.names:
            raise UsageError("no task is named", f"give {self.spelled('tasks')}")

    @property
    def names(self) -> list[str]:
        """The tasks, one by one."""
        return [part.strip() for said in self.tasks for part in said.split(",") if part.strip()]

    @property
    def batch(self) -> int | str:
        """The size of a batch as the harness takes it."""
        return int(self.batch_size) if self.batch_size.isdigit() else self.batch_size

    @property
    def tasks_folder(self) -> str | None:
        """Where tasks of one's own are; absolute, since the harness runs elsewhere."""
        return None if self.include_path is None else str(Path(self.include_path).expanduser().resolve())
