"""An adapter that is computed slot by slot, as a stage of a job: what combine, extract and resize have in common."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from functools import cached_property, partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

from adapterkit.adapters.adapter import WEIGHTS
from adapterkit.adapters.write_peft import (
    Extras,
    FactorStore,
    adapter_tensors,
    config_json,
    factors_as_bytes,
    factors_at,
    ranks_of,
)
from adapterkit.checkpoint.folder import ADAPTER_CONFIG
from adapterkit.checkpoint.plan import Plan, plan_file
from adapterkit.checkpoint.results import STAGED, Result, planned_results
from adapterkit.checkpoint.write import Room, Writing, identity
from adapterkit.dtypes import F32
from adapterkit.errors import UnsupportedAdapter, option
from adapterkit.ops.device import CPU, opened
from adapterkit.ops.threads import FEW
from adapterkit.places import here
from adapterkit.verbs.ordered import in_order
from adapterkit.verbs.report import ModuleRank

if TYPE_CHECKING:
    import torch

    from adapterkit.adapters.factors import Slot
    from adapterkit.adapters.formats.contents import Contents
    from adapterkit.adapters.names import Names
    from adapterkit.checkpoint.files import Source
    from adapterkit.checkpoint.results import ResultFile, Results
    from adapterkit.checkpoint.tensor import Tensor
    from adapterkit.checkpoint.write import Stage
    from adapterkit.dtypes import DType
    from adapterkit.ops.lowrank import Truncated
    from adapterkit.places import Address
    from adapterkit.verbs.job import Measured, Recorder

# Slots with their ranks, and what reads B and A of one: the plan of what is written, and its tensors.
Form = Callable[["Mapping[Slot, int]", Callable[["Slot"], Any]], "tuple[Plan, Sequence[Tensor]]"]

TOGETHER = 32  # slots whose decompositions a device computes together
_SAID = 512  # bytes of JSON that a slot says beside its name
ESTIMATED = "ranks and errors are known when the factors are computed; the size is the most that it can be"


@dataclass(frozen=True)
class FactorWork:
    """How an adapter is computed.

    Attributes:
        slots: in the order of the file.
        sizes: bytes that each reads, for progress.
        compute: of a slot: the rank it had (0 where it had none) and its deltas as factors, one per expert; None where
            nothing is left of it.
        extras: what goes in beside the factors of these slots.
        config: every field of the config but the ranks.
        bound: the largest rank that a slot can come out with, about.
        sources: the files that are read.
        request: what was asked for, for the plan.
        record: what writes ``adapterkit.json``.
        dtype, own_ranks, to: see the request.
        names: those of the base, where there is one.
        like: the file that it is made of, whose metadata it keeps.
        form: what is written of slots of these ranks, in the place of PEFT's folder: the plan and its tensors.
        most: the largest rank that a slot can come out with, whatever its values; by default ``bound``.
        device: where decompositions are computed.
        several: as ``compute``, of several slots, whose decompositions are then computed together.
        again: what makes the job again, beside ``request``, for workers that execute it in parts.
    """

    slots: Sequence[Slot]
    sizes: Sequence[int]
    compute: Callable[[Slot], tuple[int, Sequence[Truncated]] | None]
    extras: Callable[[Sequence[Slot]], Extras]
    config: Callable[[Sequence[Slot], Extras], Mapping[str, Any]]
    bound: Callable[[Slot], int]
    sources: tuple[Source, ...]
    request: Mapping[str, Any] = field(default_factory=dict)
    record: Recorder | None = None
    dtype: DType = F32
    own_ranks: bool = False
    to: str = "peft"
    names: Names | None = None
    like: Contents | None = None
    form: Form | None = None
    most: Callable[[Slot], int] | None = None
    device: str = CPU
    several: Callable[[Sequence[Slot]], list[tuple[int, Sequence[Truncated]] | None]] | None = None
    again: Mapping[str, Any] = field(default_factory=dict)

    def plan(self) -> Plan:
        """An upper bound of what will be written, from headers alone."""
        bounds = {slot: max(1, self.bound(slot)) for slot in self.slots}
        ranks = bounds if self.own_ranks else dict.fromkeys(bounds, max(bounds.values(), default=1))
        if self.form is not None:
            made = self.form(ranks, _unread)[0]
            return replace(made, request={**self.request, STAGED: True})
        tensors = adapter_tensors(ranks, Extras(), self.dtype, _unread)
        made = plan_file(WEIGHTS, tensors, {"format": "pt"})
        return Plan(made.files, made.metadata, made.peak_memory, {}, {**self.request, STAGED: True})

    def stage(self, out: Path | Address | None) -> Callable[[Room], Writing]:
        """The function that computes the factors and gives what is to be written."""

        def run(room: Room) -> Writing:
            return self._run(room, here(out) if out is not None else Path())

        return run

    def results(self, out: Path | Address | None) -> Callable[[], Results]:
        """The factors of each slot as results of their own, which workers compute in parts."""

        def made() -> Results:
            given = {**self.request, **self.again}
            return planned_results(self._results, self.sources, given, partial(self._of_results, out))

        return made

    @cached_property
    def _results(self) -> list[Result]:
        found = []
        for slot, reads in zip(self.slots, self.sizes, strict=True):
            rank = max(1, (self.most or self.bound)(slot))
            said = _SAID + 2 * len(json.dumps(slot.parameter)) + 24 * slot.count
            data = 4 * slot.count * rank * sum(slot.shape)
            compute = partial(self._result, slot)
            found.append(Result(slot.parameter, said, data, reads, f"factors, rank {rank} at most", compute))
        return found

    def _result(self, slot: Slot) -> tuple[Any, list[bytes]]:
        found = self._computed([slot])[0]
        if found is None:
            return None, []
        before, cuts = found
        row = asdict(module_rank(slot, cuts, before))
        data = [part for cut in cuts for part in factors_as_bytes(cut.factors)]
        return {"row": row, "ranks": [cut.factors.rank for cut in cuts]}, data

    def _of_results(self, out: Path | Address | None, found: ResultFile) -> Stage:
        def run(room: Room) -> Writing:
            return self._made(_Found(self.slots, found), here(out) if out is not None else Path())

        return run

    def _run(self, room: Room, out: Path) -> Writing:
        store = FactorStore(room.folder, identity(self.plan(), self.sources), resume=room.resume)
        reused = len(store.rows)
        todo = [at for at, slot in enumerate(self.slots) if slot.parameter not in store.rows]

        count = 1 if self.device == CPU or self.several is None else TOGETHER
        runs = [todo[at : at + count] for at in range(0, len(todo), count)]

        def work(run: Sequence[int]) -> list[tuple[int, tuple[int, Sequence[Truncated]] | None]]:
            return list(zip(run, self._computed([self.slots[at] for at in run]), strict=True))

        sizes = [sum(self.sizes[at] for at in run) for run in runs]
        for run in in_order(work, runs, room.jobs, sizes, room.progress, FEW):
            for at, found in run:
                if found is not None:
                    before, cuts = found
                    slot = self.slots[at]
                    store.add(slot, [cut.factors for cut in cuts], asdict(module_rank(slot, cuts, before)))
        return self._made(store, out, reused)

    def _computed(self, slots: Sequence[Slot]) -> list[tuple[int, Sequence[Truncated]] | None]:
        """What is left of slots, on the CPU again."""
        from adapterkit.ops.there import back

        device = opened(self.device)
        with device.at_work():
            found = [self.compute(slot) for slot in slots] if self.several is None else self.several(slots)
            return [None if one is None else (one[0], [back(device, cut) for cut in one[1]]) for one in found]

    def _made(self, store: Factored, out: Path, reused: int = 0) -> Writing:
        """What is written of factors that are there."""
        used = [slot for slot in self.slots if slot.parameter in store.rows]
        extras = self.extras(used)
        ranks = store.ranks(used, own=self.own_ranks)
        rows = tuple(_row(store.rows[slot.parameter]) for slot in used)
        if self.form is not None:
            plan, tensors = self.form(ranks, store.read)
            facts: dict[str, Any] = {"modules": rows, "known": reused}
            named = {tensor.name: tensor for tensor in tensors}
            return Writing(plan, named, self.sources, out, {}, self.record, facts=facts, close=store.close)
        config = config_json(self.config(used, extras), ranks)
        tensors = adapter_tensors(ranks, extras, self.dtype, store.read)
        plan = plan_file(WEIGHTS, tensors, {"format": "pt"})
        side = {**extras.side, ADAPTER_CONFIG: (json.dumps(config, indent=2, sort_keys=True) + "\n").encode()}
        carried = (*extras.whole, *extras.tokens)
        facts = {"config": config, "modules": rows, "carried": carried, "extras": extras, "known": reused}
        handles = {tensor.name: tensor for tensor in tensors}
        made = Writing(plan, handles, self.sources, out, side, self.record, facts=facts, close=store.close)
        return made if self.to == "peft" else self._restyled(made, config)

    def _restyled(self, made: Writing, config: Mapping[str, Any]) -> Writing:
        """The same factors in the file of another program."""
        from adapterkit.adapters.adapter import Adapter
        from adapterkit.adapters.config import AdapterConfig
        from adapterkit.adapters.formats.plain import scaled_factors, why_not_scaled
        from adapterkit.adapters.formats.write_single import STYLES, as_single
        from adapterkit.adapters.keys import PREFIX

        tensors = {name.removeprefix(PREFIX): tensor for name, tensor in made.tensors.items()}
        adapter = Adapter(str(made.out), AdapterConfig(config, str(made.out)), tensors, self.sources[0])
        factors = scaled_factors(adapter, convolutions=self.to in STYLES)
        if factors is None:
            raise UnsupportedAdapter(
                f"{why_not_scaled(adapter, convolutions=self.to in STYLES)}, which no file of {self.to} holds",
                f"write {option('to', 'peft')}",
            )
        if self.to == "mlx":
            from adapterkit.adapters.formats.write import as_mlx

            folder = as_mlx(adapter, *factors)
            plan = plan_file(folder.weights, list(folder.tensors.values()), folder.metadata)
            return replace(made, plan=plan, tensors=folder.tensors, side_files=folder.side)
        files = as_single(replace(adapter, contents=self.like), *factors, STYLES[self.to], self.names)
        plan = plan_file(files.weights, list(files.tensors.values()), files.metadata)
        if made.out.suffix == ".safetensors":
            plan = replace(plan, layout="file")
        return replace(made, plan=plan, tensors=files.tensors, side_files={})


class Factored(Protocol):
    """Factors that are there: `FactorStore`, or what workers computed."""

    @property
    def rows(self) -> Mapping[str, Any]: ...

    def ranks(self, slots: Sequence[Slot], *, own: bool) -> dict[Slot, int]: ...

    def read(self, slot: Slot) -> list[tuple[torch.Tensor, torch.Tensor]]: ...

    def close(self) -> None: ...


class _Found:
    """Factors that workers computed, in their file of results."""

    def __init__(self, slots: Sequence[Slot], file: ResultFile) -> None:
        self._file = file
        said = {slot.parameter: file.made(slot.parameter, partial(_as_said, slot)) for slot in slots}
        self.rows = {name: one[0] for name, one in said.items() if one is not None}
        self._ranks = {name: one[1] for name, one in said.items() if one is not None}

    def ranks(self, slots: Sequence[Slot], *, own: bool) -> dict[Slot, int]:
        return ranks_of(slots, self._ranks, own=own)

    def read(self, slot: Slot) -> list[tuple[torch.Tensor, torch.Tensor]]:
        found, offset = [], 0
        for rank in self._ranks[slot.parameter]:
            nbytes = 4 * rank * sum(slot.shape)
            found.append(factors_at(self._file.data(slot.parameter, offset, nbytes), rank, slot.shape))
            offset += nbytes
        return found

    def close(self) -> None:
        pass


def _as_said(slot: Slot, said: Any) -> tuple[Mapping[str, Any], list[int]] | None:
    """A row of the table and the rank of each delta, out of a result; None where nothing is left of the slot."""
    if said is None:
        return None
    _row(said["row"])
    ranks = [int(rank) for rank in said["ranks"]]
    if len(ranks) != slot.count or min(ranks) < 0:
        raise ValueError("ranks of something else")
    return said["row"], ranks


def module_rank(slot: Slot, found: Sequence[Truncated], before: int = 0) -> ModuleRank:
    """A row of the table: what was kept of a module, experts taken together."""
    total = sum(one.norm**2 for one in found)
    lost = sum(one.error**2 for one in found)
    return ModuleRank(
        slot.parameter,
        slot.shape,
        max(one.rank for one in found),
        total**0.5,
        (lost / total) ** 0.5 if total else 0.0,
        before,
    )


def _row(said: Mapping[str, Any]) -> ModuleRank:
    return ModuleRank(**{**said, "shape": tuple(said["shape"])})


def sent(measured: Measured) -> dict[str, Any]:
    """What was asked of object stores, for a report; of a dry run nothing, since what is read is known when it is."""
    return {} if measured.dry_run else asdict(measured.moved)


def _unread(slot: Slot) -> Any:
    raise AssertionError(f"{slot.parameter} of a plan was read")
