"""`resize`: the same adapter at another rank, the best one there is."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from adapterkit.adapters.write_peft import Extras, peft_config
from adapterkit.errors import UnsupportedAdapter, option
from adapterkit.ops.device import opened
from adapterkit.provenance.record import recorder
from adapterkit.requests.adapters import ResizeRequest
from adapterkit.requests.call import takes
from adapterkit.verbs.beside import beside_of
from adapterkit.verbs.carry import carry_out
from adapterkit.verbs.combine import check_rank, known_rank, output_dtype, parents, rank_of, side_files
from adapterkit.verbs.factors import ESTIMATED, FactorWork, sent
from adapterkit.verbs.family import Family, carried, open_family
from adapterkit.verbs.job import Job, Measured
from adapterkit.verbs.placed import FACTORS, computed_on, said
from adapterkit.verbs.report import ModuleRank, ResizeReport

if TYPE_CHECKING:
    import torch

    from adapterkit.adapters.factors import Slot
    from adapterkit.checkpoint.listing import Listing
    from adapterkit.checkpoint.tensor import Tensor
    from adapterkit.ops.device import Device
    from adapterkit.ops.lowrank import Truncated
    from adapterkit.places import Address


@dataclass(frozen=True)
class Resizing:
    """An adapter that is planned at another rank; no tensor is read.

    Attributes:
        request: what was asked for.
        family: the adapter alone, taken apart.
        notes: what a user should know.
    """

    request: ResizeRequest
    family: Family
    notes: tuple[str, ...]

    def job(self) -> Job:
        """The adapter as what an executor takes."""
        asked, (one,) = self.request, self.family.adapters
        work = self.work()
        out = None if asked.out is None else asked.target
        return Job(
            plan=work.plan(),
            tensors={},
            sources=work.sources,
            out=out,
            report=self.report,
            inputs=() if one.folder is None else (one.folder,),
            beside=() if out is None else beside_of(asked, [asked.base, asked.adapter]),
            stage=work.stage(out),
            results=work.results(out),
            record=work.record,
            force=asked.force,
        )

    def work(self) -> FactorWork:
        """How the adapter is computed, slot by slot."""
        asked, family = self.request, self.family
        (one,), (part,) = family.adapters, family.parts
        over = carried(family)

        def compute(slot: Slot) -> tuple[int, Sequence[Truncated]] | None:
            return several([slot])[0]

        def several(slots: Sequence[Slot]) -> list[tuple[int, Sequence[Truncated]] | None]:
            return _resized(family, slots, opened(asked.device), asked.rank, asked.energy, asked.max_error)

        def extras(_: Sequence[Slot]) -> Extras:
            biases = {module: _scaled(*bias) for module, bias in part.biases.items()}
            return Extras(over.whole, over.tokens, part.magnitudes, biases, side_files([one], []))

        def config(_: Sequence[Slot], extras: Extras) -> Mapping[str, Any]:
            slots = list(family.slots.values())
            return peft_config(slots, [one.config.raw], extras, dora=bool(part.magnitudes))

        again = {
            "verb": asked.VERB,
            "adapter": one.ref,
            "base": None if asked.base is None else str(getattr(asked.base, "ref", asked.base)),
            **asked.stated(*_STATED),
        }
        from adapterkit.adapters.formats.write_single import style_of

        return FactorWork(
            list(family.slots.values()),
            [part.deltas[name].change.reads for name in family.slots],
            compute,
            extras,
            config,
            self.bound,
            (one.source,),
            again,
            self._record,
            output_dtype(asked.dtype),
            asked.own_ranks,
            asked.styled(style_of(one)),
            family.names,
            one.contents,
            most=self.most,
            device=asked.device,
            several=several,
        )

    def most(self, slot: Slot) -> int:
        """The largest rank that a layer can come out with, whatever its values."""
        own = known_rank(self.family.parts[0].deltas[slot.parameter].change.how, _RANKED)
        return min(self.request.rank or slot.largest_rank, own or slot.largest_rank, slot.largest_rank)

    def bound(self, slot: Slot) -> int:
        """The largest rank that a layer can come out with, about."""
        most = rank_of(self.family.parts[0].deltas[slot.parameter].change.how)
        return min(self.request.rank or most, most, slot.largest_rank)

    def _record(self, folder: Path | Listing) -> Mapping[str, bytes]:
        asked = self.request.stated(*_STATED)
        return recorder(
            "resize", "adapter", asked, parents(self.family, [1.0]), method="lora", evidence=self._evidence
        )(folder)

    def _evidence(self) -> dict[str, Any]:
        return computed_on(self.request.device, agrees=FACTORS)

    def report(self, measured: Measured) -> ResizeReport:
        """What was done, or would be."""
        asked, (one,) = self.request, self.family.adapters
        facts = measured.facts
        config = facts.get("config", {})
        bounds = [self.bound(slot) for slot in self.family.slots.values()]
        return ResizeReport(
            out="" if asked.out is None else str(asked.out),
            adapter=one.ref,
            method=one.config.peft_type,
            rank=int(config.get("r", max(bounds, default=1))),
            own_ranks=bool(config.get("rank_pattern", asked.own_ranks and measured.dry_run)),
            modules=facts.get("modules", ()),
            nbytes_before=one.nbytes,
            nbytes=0 if measured.plan is None else measured.plan.nbytes,
            seconds=measured.seconds,
            peak_memory=measured.peak_memory,
            reused=facts.get("known", 0),
            dry_run=measured.dry_run,
            **sent(measured),
            notes=(
                *self.notes,
                *([ESTIMATED] if measured.dry_run else said(asked.device, agrees=FACTORS)),
                *measured.notes,
            ),
        )


_RANKED = ("lora", "adalora", "dora")
_STATED = ("rank", "energy", "max_error", "dtype")


def planned(request: ResizeRequest) -> Resizing:
    """Plan an adapter at another rank from headers alone; see `resize`."""
    family = open_family(
        [request.adapter],
        request.base,
        allow_unknown=request.allow_unknown,
        bare=True,
        style=request.styled("diffusers"),
    )
    notes = [*family.notes, *check_rank(request.rank, request.energy, family.slots.values(), request.max_error)]
    own = [known_rank(family.parts[0].deltas[name].change.how, _RANKED) for name in family.slots]
    if request.rank is not None and own and all(own) and max(filter(None, own)) < request.rank:
        ranks = f"rank {max(filter(None, own))} or less"
        notes.append(
            f"every layer has {ranks} already and keeps it: {option('rank', request.rank)} has nothing more to hold"
        )
    carried(family)
    side_files(family.adapters, notes)
    return Resizing(request, family, tuple(notes))


@takes(ResizeRequest)
def resize(request: ResizeRequest) -> ResizeReport:
    """Bring a low-rank adapter to another rank: per layer the best approximation in the Frobenius norm.

    DoRA's magnitudes are kept as they are; it is the product B A between them that is cut.

    Raises:
        UsageError: no bound, or one that nothing can meet.
        UnsupportedAdapter: its change is no low-rank product.
        NotFound, AdapterError, OutputError, UnsafeError, AuthError, HubError
    """
    started = time.monotonic()
    report: ResizeReport = carry_out(planned(request).job(), request, started)
    return report


def replan(data: Mapping[str, Any], out: Path | Address | None) -> Resizing:
    """The adapter of a saved plan, planned again."""
    given = {name: value for name, value in data.items() if name in ResizeRequest.options()}
    return planned(ResizeRequest.bound({**given, "out": out}))


def _resized(
    family: Family,
    slots: Sequence[Slot],
    device: Device,
    rank: int | None,
    energy: float | None,
    max_error: float | None,
) -> list[tuple[int, Sequence[Truncated]] | None]:
    """Slots at their new ranks, each with the rank that it had; decomposed together on a device."""
    from adapterkit.ops.lowrank import Factors, truncate_all
    from adapterkit.ops.there import there

    parts: list[Factors] = []
    counts: list[int] = []
    for slot in slots:
        _, experts = family.load(slot.parameter)
        for (delta,) in experts:
            if not isinstance(delta, Factors):
                adapter = family.adapters[0]
                raise UnsupportedAdapter(
                    f"{adapter.ref} cannot be resized: its change of {slot.parameter} "
                    f"({family.parts[0].deltas[slot.parameter].change.how}) is no low-rank product",
                    f"make a LoRA of it with combine {option('base', 'BASE')} {option('rank', 'R')}",
                )
            moved = there(device, delta)
            assert isinstance(moved, Factors)
            parts.append(moved)
        counts.append(len(experts))
    cuts = truncate_all(parts, rank=rank, energy=energy, max_error=max_error)
    found: list[tuple[int, Sequence[Truncated]] | None] = []
    at = 0
    for count in counts:
        found.append((max(part.rank for part in parts[at : at + count]), cuts[at : at + count]))
        at += count
    return found


def _scaled(bias: Tensor, scaling: float) -> torch.Tensor:
    from adapterkit.adapters.change import matrix

    return (matrix(bias).double() * scaling).float()


def total_kept(modules: Sequence[ModuleRank]) -> tuple[float, float]:
    """Over all layers: the share of the squared norm that was kept, and the relative error."""
    total = sum(row.norm**2 for row in modules)
    lost = sum((row.norm * row.error) ** 2 for row in modules)
    return (1 - lost / total, (lost / total) ** 0.5) if total else (1.0, 0.0)
