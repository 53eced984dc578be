"""`--residual RANK`: what rounding took of a merge, as a LoRA beside the output.

For every weight that the output encodes, D = (W + delta) - decode(what is written), and the best factors of that rank
(truncated SVD). Output and residual together are the merge: W + delta = output + D. The factors are computed in the same
run, weight by weight, from the values that a reader of the output will have.
"""

from __future__ import annotations

import json
import shlex
import threading
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

from adapterkit.adapters.write_peft import Extras
from adapterkit.checkpoint.plan import BASELINE_MEMORY, default_jobs
from adapterkit.dtypes import F16
from adapterkit.errors import CheckpointError, UsageError, option
from adapterkit.places import Address
from adapterkit.verbs.factors import FactorWork
from adapterkit.verbs.job import Job
from adapterkit.verbs.report import ModuleRank, ResidualReport
from adapterkit.verbs.residual_folder import FolderForm
from adapterkit.verbs.residual_gguf import GGUFForm
from adapterkit.verbs.residual_of import ENDING, WHOLE, OfMerge, Rows, residual_path

if TYPE_CHECKING:
    from adapterkit.adapters.factors import Slot
    from adapterkit.checkpoint.write import Room, Writing
    from adapterkit.ops.lowrank import Truncated

LEAST = 0.01  # share of a loss that rounding its factors may take
MOST = 0.5  # share of what rounding takes, below which the report says that the factors hold little of it


class _Difference:
    """Rows of what is wanted minus what is written."""

    def __init__(self, shape: tuple[int, int], written: Rows, wanted: Rows) -> None:
        self.shape, self._written, self._wanted = shape, written, wanted

    def rows(self, start: int, stop: int) -> Any:
        return self._wanted(start, stop) - self._written(start, stop)


def _spoiled(cuts: Sequence[Truncated]) -> float:
    """The norm, about, of what rounding the factors to 16 bits adds; infinite where they do not fit."""
    total = 0.0
    for cut in cuts:
        off = 0.0
        for factor in (cut.factors.a, cut.factors.b):
            size, lost = float(factor.double().norm()), float((factor.half().double() - factor.double()).norm())
            off += lost / size if size else 0.0
        total += (off * cut.norm) ** 2
    return float(total**0.5)


@dataclass
class Residual:
    """The residual of one merge: planned from headers, computed when its job runs.

    Attributes:
        merge: whose output it stands beside.
        rank: the largest that a weight gets.
        found: what was kept of each weight, once that is known.
    """

    merge: OfMerge
    rank: int
    found: tuple[ModuleRank, ...] = field(default=(), init=False)

    @property
    def out(self) -> Path | Address | None:
        target = self.merge.request.target
        return None if target is None else residual_path(target)

    @cached_property
    def _form(self) -> FolderForm | GGUFForm:
        form = GGUFForm if self.merge.request.form == "gguf" or self.merge.request.to == "gguf" else FolderForm
        return form(self.merge, self.merge.output)

    @cached_property
    def slots(self) -> tuple[Slot, ...]:
        """The places that get factors.

        Raises:
            UsageError: the output encodes nothing, or no weight that a LoRA can stand beside.
        """
        slots = tuple(self._form.slots)
        if not slots:
            why = self._form.skipped[0] if self._form.skipped else "no weight of this output is put on a grid"
            raise UsageError(f"there is nothing for a residual: {why}", f"leave out {option('residual')}")
        return slots

    def job(self) -> Job:
        """The residual as a job beside that of the output."""
        work = self.work
        out = self.out
        jobs = self.merge.request.jobs or default_jobs()
        widest = sorted((self._form.held(slot) for slot in self.slots), reverse=True)
        plan = replace(work.plan(), peak_memory=BASELINE_MEMORY + sum(widest[:jobs]))
        return Job(
            plan=plan,
            tensors={},
            sources=self.merge.sources,
            out=out,
            report=lambda measured: None,
            inputs=tuple(a.folder for a in self.merge.adapters if a.folder is not None),
            stage=self._stage,
            force=self.merge.request.force,
        )

    def _stage(self, room: Room) -> Writing:
        made = self.work.stage(self.out)(room)
        self.found = made.facts["modules"]
        return made

    @cached_property
    def work(self) -> FactorWork:
        """How the factors are computed."""
        shown, merge = self._form, self.merge
        fresh: list[FolderForm | GGUFForm] = []
        lock = threading.Lock()

        def form() -> FolderForm | GGUFForm:
            # Handles of its own: those of the output are read by its writer at the same time.
            with lock:
                if not fresh:
                    fresh.append(type(shown)(merge, merge.again()))
                return fresh[0]

        def compute(slot: Slot) -> tuple[int, Sequence[Truncated]] | None:
            cuts = self._cuts(form(), slot)
            return (0, cuts) if any(cut.norm for cut in cuts) else None

        def extras(used: Sequence[Slot]) -> Extras:
            if not used:
                raise UsageError("rounding took nothing of this merge", f"leave out {option('residual')}")
            return Extras(side={"README.md": self._card().encode()})

        def config(used: Sequence[Slot], extras: Extras) -> Mapping[str, Any]:
            return shown.config(used, self._named())

        return FactorWork(
            self.slots,
            [8 * slot.count * slot.shape[0] * slot.shape[1] for slot in self.slots],
            compute,
            extras,
            config,
            lambda slot: min(self.rank, slot.largest_rank),
            merge.sources,
            {**merge.plan.request, "part": "residual"},
            dtype=F16,
            form=shown.form,
        )

    def _cuts(self, form: FolderForm | GGUFForm, slot: Slot) -> list[Truncated]:
        from adapterkit.ops.extract import low_rank
        from adapterkit.ops.rows import Dense, materialize

        lost = form.lost(slot)
        cuts = []
        for at, (written, wanted, tensors) in enumerate(lost.pieces):
            delta: Any = _Difference(slot.shape, written, wanted)
            if slot.shape[0] * slot.shape[1] <= WHOLE:
                delta = Dense(materialize(delta))
            cuts.append(low_rank(delta, rank=min(self.rank, slot.largest_rank)))
            still = lost.pieces[at + 1][2] if at + 1 < len(lost.pieces) else frozenset()
            form.release(tensors - still)
        if _spoiled(cuts) > LEAST * sum(cut.norm**2 for cut in cuts) ** 0.5:
            raise CheckpointError(
                f"what rounding took of '{slot.parameter}' is too large or too small for factors of 16 bits",
                f"leave out {option('residual')}",
            )
        return cuts

    def _named(self) -> str:
        """What the residual calls the output that it stands beside."""
        target = self.merge.request.target
        return "" if target is None else target.name

    @property
    def command(self) -> str:
        """What serves output and residual together; empty where no output is named."""
        from adapterkit.serving.servers import servers

        target, out = self.merge.request.target, self.out
        if target is None or out is None:
            return ""
        gguf = isinstance(self._form, GGUFForm)
        server = servers()["llama.cpp" if gguf else "vllm"]
        row, ranks, path = server.launch, server.ranks, shlex.quote(str(out))
        assert row is not None
        rank = max(min(self.rank, slot.largest_rank) for slot in self.slots)
        # vLLM takes the factors of stacked experts in the order of an older PEFT.
        stacked = any(slot.kind == "stacked" for slot in self.slots)
        if not gguf and (stacked or not self._generates or (ranks is not None and rank > ranks.largest)):
            return f"PeftModel.from_pretrained(model, {str(out)!r}), where model is that of {str(target)!r} in transformers"
        rank = next((step for step in (ranks.steps if ranks is not None else ()) if step >= rank), rank)
        each = row.each.format(name=out.name.removesuffix(".gguf"), path=path)
        first = self.merge.plan.names(target)[0] if gguf else ""
        base = str(target.with_name(first.rpartition("/")[2])) if first else str(target)
        return row.adapters.format(base=shlex.quote(base), each=each, count=1, rank=rank)

    @property
    def _generates(self) -> bool:
        """Whether the model is one that answers: what vLLM serves adapters of."""
        named = self.merge.folded.checkpoint.config.get("architectures") or ()
        ends = ("ForCausalLM", "LMHeadModel", "ForConditionalGeneration")
        return not named or any(str(name).endswith(ends) for name in named)

    def _card(self) -> str:
        name = self._named()
        return (
            f"---\nbase_model: {json.dumps(name)}\nlibrary_name: peft\ntags:\n- lora\n---\n\n# What rounding took of {name}\n\n"
            f"`{name}` is a base with an adapter folded in, written in a coarse format. These factors of rank {self.rank} are\n"
            "what its rounding took. Load them on that output, always: together they are the model that was trained; the\n"
            "output alone is not.\n\n"
            "```python\nfrom peft import PeftModel\nfrom transformers import AutoModelForCausalLM\n\n"
            f"model = AutoModelForCausalLM.from_pretrained({name!r})\n"
            f"model = PeftModel.from_pretrained(model, {name + ENDING!r})\n```\n"
        )

    def report(self) -> ResidualReport:
        """What is written beside the output; its size as planned, which is less where ranks come out smaller."""
        total = sum(one.norm**2 for one in self.found)
        left = sum((one.norm * one.error) ** 2 for one in self.found)
        held = 1 - left / total if total else None
        notes = tuple(self._form.skipped)
        if held is not None and held < MOST:
            notes = (
                f"the residual holds {held:.1%} of what rounding takes: the rest is noise of no small rank",
                *notes,
            )
        return ResidualReport(
            "" if self.out is None else str(self.out),
            self.rank,
            len(self.found) or len(self.slots),
            self.work.plan().nbytes,
            held,
            self.command,
            notes,
        )

    def evidence(self) -> dict[str, Any]:
        """Figures for the record of the output."""
        said = self.report()
        held = None if said.held is None else float(f"{said.held:.6g}")
        return {"residual": {"rank": said.rank, "modules": said.modules, "bytes": said.nbytes, "held": held}}
