"""`combine`: several adapters become one plain LoRA adapter."""

from __future__ import annotations

import re
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

from adapterkit.adapters.bound_rule import BoundRule, check_weights
from adapterkit.adapters.merged import StoredWeights
from adapterkit.adapters.write_peft import Extras, InMemory, peft_config
from adapterkit.checkpoint.plan import default_jobs
from adapterkit.dtypes import F32
from adapterkit.errors import TargetError, UsageError, counted, option
from adapterkit.ops.device import CPU, opened
from adapterkit.ops.threads import FEW
from adapterkit.provenance.record import adapter_parent, base_parent, recorder
from adapterkit.requests.adapters import CombineRequest
from adapterkit.requests.call import takes
from adapterkit.verbs.beside import beside_of
from adapterkit.verbs.carry import carry_out
from adapterkit.verbs.factors import ESTIMATED, FactorWork, sent
from adapterkit.verbs.family import Family, carried, open_family
from adapterkit.verbs.job import Job, Measured, Recorder
from adapterkit.verbs.ordered import in_order
from adapterkit.verbs.placed import FACTORS, computed_on, said
from adapterkit.verbs.report import AdapterUse, CombineReport

if TYPE_CHECKING:
    import torch

    from adapterkit.adapters.adapter import Adapter
    from adapterkit.adapters.factors import Slot
    from adapterkit.adapters.formats.contents import Contents
    from adapterkit.checkpoint.listing import Listing
    from adapterkit.checkpoint.plan import Plan
    from adapterkit.checkpoint.tensor import Tensor
    from adapterkit.checkpoint.write import Room, Writing
    from adapterkit.dtypes import DType
    from adapterkit.ops.device import Device
    from adapterkit.ops.lowrank import Factors, Truncated
    from adapterkit.ops.rows import DeltaRows
    from adapterkit.places import Address
    from adapterkit.registry.record import Parent

_PLAIN = re.compile(r"(?P<kind>\w+) r=(?P<rank>\d+)(?: x\d+)?", re.ASCII)
NOISE = 1e-6  # relative error that float32 leaves in W' - W anyway

Ref = str | Path
Progress = Callable[[int, int], None]


@dataclass(frozen=True)
class Combination:
    """A combination that is planned: everything is checked, no tensor is read.

    Attributes:
        request: what was asked for.
        making: how the adapter is computed.
        notes: what a user should know.
    """

    request: CombineRequest
    making: Making
    notes: tuple[str, ...]

    @property
    def plan(self) -> Plan:
        """What will be written, at most."""
        return self.making.work().plan()

    def job(self) -> Job:
        """The combination as what an executor takes."""
        asked, family = self.request, self.making.family
        work = self.making.work(self._record)
        return Job(
            plan=work.plan(),
            tensors={},
            sources=work.sources,
            out=None if asked.out is None else asked.target,
            report=self.report,
            inputs=tuple(adapter.folder for adapter in family.adapters if adapter.folder is not None),
            beside=() if asked.out is None else beside_of(asked, [asked.base, *_refs(asked.adapters)]),
            stage=work.stage(None if asked.out is None else asked.target),
            results=work.results(None if asked.out is None else asked.target),
            record=work.record,
            force=asked.force,
        )

    def _record(self, folder: Path | Listing) -> Mapping[str, bytes]:
        asked = self.request.stated("method", "scale", "space", "rank", "energy", "dtype")
        made_of = parents(self.making.family, self.making.weights)
        return recorder("combine", "combined", asked, made_of, method="lora", evidence=self._evidence)(folder)

    def _evidence(self) -> dict[str, Any]:
        return computed_on(self.request.device, agrees=FACTORS)

    def report(self, measured: Measured) -> CombineReport:
        """What was done, or would be."""
        asked, family, rule = self.request, self.making.family, self.making.rule
        facts, plan = measured.facts, measured.plan
        config = facts.get("config", {})
        known = [adapter.config.base for adapter in family.adapters if adapter.config.base]
        base = config.get("base_model_name_or_path") or (known or [""])[0]
        bounds = [self.making.bound(slot) for slot in family.slots.values()]
        notes = [
            *self.notes,
            *facts.get("notes", ()),
            *([ESTIMATED] if measured.dry_run else said(asked.device, agrees=FACTORS)),
            *measured.notes,
        ]
        return CombineReport(
            out="" if asked.out is None else str(asked.out),
            method=rule.method,
            space=rule.space or "",
            scale=asked.scale,
            parameters=dict(asked.parameters),
            adapters=tuple(
                AdapterUse(a.ref, a.config.peft_type, w, a.commit, a.config.base, a.config.label)
                for a, w in zip(family.adapters, self.making.weights, strict=True)
            ),
            base=str(base or ""),
            rank=int(config.get("r", max(bounds, default=1))),
            own_ranks=bool(config.get("rank_pattern", asked.own_ranks and measured.dry_run)),
            modules=facts.get("modules", ()),
            carried=facts.get("carried", ()),
            nbytes=0 if plan is None else plan.nbytes,
            seconds=measured.seconds,
            peak_memory=measured.peak_memory,
            reused=facts.get("known", 0),
            dry_run=measured.dry_run,
            **sent(measured),
            notes=tuple(dict.fromkeys(notes)),
        )


@dataclass(frozen=True)
class Making:
    """The combination of a family as one plain LoRA; see `combine`, and `combined` for ``full``."""

    family: Family
    rule: BoundRule
    weights: tuple[float, ...]
    target: Path | Address | None = None
    dtype: DType = F32
    rank: int | None = None
    energy: float | None = None
    full: bool = False
    own_ranks: bool = False
    to: str = "peft"
    request: Mapping[str, Any] = field(default_factory=dict)
    device: str = CPU

    def run(self, room: Room) -> Writing:
        """As the stage of a job."""
        return self.work().stage(self.target)(room)

    def work(self, record: Recorder | None = None) -> FactorWork:
        """How the adapter is computed, slot by slot.

        Raises:
            TargetError: adapters that bring different values for the same parameter.
        """
        family = self.family
        over = carried(family)
        slots = list(family.slots.values())
        sizes = [sum(delta.change.reads for _, delta in family.deltas(slot.parameter)) for slot in slots]
        own = {source.name: source for source in (adapter.source for adapter in family.adapters)}

        def extras(_: Sequence[Slot]) -> Extras:
            biases, summed = _biases(family, self.weights, self.rule.scale, over.whole)
            side = side_files(family.adapters, [])
            return Extras({**over.whole, **summed}, over.tokens, {}, biases, side)

        def config(_: Sequence[Slot], extras: Extras) -> Mapping[str, Any]:
            used = [slot for slot in slots if any(self.weights[i] for i, _ in family.deltas(slot.parameter))]
            configs = [adapter.config.raw for adapter in family.adapters]
            return peft_config(used, configs, extras, base=None if family.base is None else family.base.ref)

        return FactorWork(
            slots,
            sizes,
            self._compute,
            extras,
            config,
            self.bound,
            tuple(own.values()),
            self.request,
            record,
            self.dtype,
            self.own_ranks,
            self.to,
            family.names,
            _like(family),
            most=self.most,
            device=self.device,
            several=self._several,
        )

    def most(self, slot: Slot) -> int:
        """The largest rank that a slot can come out with, whatever its values."""
        words = (delta.change.how for _, delta in self.family.deltas(slot.parameter))
        whole = slot.largest_rank
        # A change of another kind is a product of at most twice its rank, or rows of full rank.
        own = sum(known_rank(how) or max(2 * rank_of(how), whole) for how in words)
        # What is not cut may have more than the layer's own rank.
        return min(self.rank, own) if self.rank is not None else own if self.energy is None else min(own, whole)

    def bound(self, slot: Slot) -> int:
        """The largest rank that a slot can come out with, about."""
        most = sum(rank_of(delta.change.how) for _, delta in self.family.deltas(slot.parameter))
        return min(self.rank or most, slot.largest_rank)

    def _compute(self, slot: Slot) -> tuple[int, Sequence[Truncated]] | None:
        return self._several([slot])[0]

    def _several(self, slots: Sequence[Slot]) -> list[tuple[int, Sequence[Truncated]] | None]:
        bounds = (self.rank, self.energy, self.full)
        how = (self.rule, self.weights, bounds, (self._depth, opened(self.device)))
        return [None if one is None else (0, one) for one in _of_slots(self.family, slots, *how)]

    @cached_property
    def _depth(self) -> Depth:
        return _depth_of(self.family)


def _family(request: CombineRequest) -> Family:
    """The adapters, held against each other and the base.

    Raises:
        TargetError: they are of different bases.
    """
    given: Any = request.adapters
    if isinstance(given, Family):
        return given
    return open_family(
        [request.narrowed(told(a, request)) for a in given],
        request.base,
        residual_base=request.residual_base,
        allow_unknown=request.allow_unknown,
        style=request.styled("diffusers"),
    )


def planned(request: CombineRequest) -> Combination:
    """Plan a combination from headers alone; see `combine`."""
    rule = BoundRule(request.method, request.space, request.scale, dict(request.parameters))
    stored = output_dtype(request.dtype)
    family = _family(request)
    weights = check_weights(request.adapter_weights, len(family.adapters))
    rule.check_count(len(family.adapters))
    if rule.row.based:
        raise UsageError(
            f"method {rule.row.name} looks at the base's own values, which no adapter holds", "fold them in with merge"
        )
    notes = [*family.notes, *check_rank(request.rank, request.energy, family.slots.values())]
    if rule.dense and request.rank is None and request.energy is None:
        raise UsageError(
            f"method {rule.row.name} gives deltas of full rank",
            f"give {option('rank', 'R')} or {option('energy', 'E')}, or {option('space', 'core')}, or fold them in with merge",
        )
    if rule.method != "linear":
        _check_layouts(family, rule)
    over = carried(family)
    if over.whole or over.tokens:
        notes.append(f"carried over as they are: {', '.join([*over.whole, *over.tokens])[:400]}")
    side_files(family.adapters, notes)
    from adapterkit.adapters.formats.write_single import style_of

    again = {
        "verb": request.VERB,
        "adapters": [adapter.ref for adapter in family.adapters],
        "base": None if request.base is None else str(getattr(request.base, "ref", request.base)),
        "weights": list(weights),
        **request.stated("method", "scale", "space", "rank", "energy", "dtype"),
        "parameters": dict(request.parameters),
    }
    making = Making(
        family,
        rule,
        weights,
        None if request.out is None else request.target,
        stored,
        request.rank,
        request.energy,
        own_ranks=request.own_ranks,
        to=request.styled(style_of(family.adapters[0])),
        request=again,
        device=request.device,
    )
    return Combination(request, making, tuple(notes))


def _check_layouts(family: Family, rule: BoundRule) -> None:
    """Adapters that name the same rows otherwise can be added up, and compared value by value only under one name.

    Raises:
        UsageError: one has the original names of its family, another diffusers'.
    """
    from adapterkit.adapters.families.names import family_of

    found: dict[str, Adapter] = {}
    for adapter, part in zip(family.adapters, family.parts, strict=True):
        told = family_of(part.deltas)
        if told is not None:
            found.setdefault(told[1], adapter)
    if len(found) > 1:
        one, other = found.values()
        raise UsageError(
            f"{one.ref} and {other.ref} name the same modules in two layouts, and {rule.method} compares them by name",
            f"convert one of them first: adapterkit convert FILE {option('to', 'diffusers')}",
        )


def _like(family: Family) -> Contents | None:
    """The first file, with the modules of all: which part of a pipeline each is of."""
    first, *others = (adapter.contents for adapter in family.adapters)
    if first is None:
        return None
    more = [module for other in others if other is not None for module in other.modules]
    return replace(first, modules=(*first.modules, *more))


def told(adapter: Ref | Adapter, request: CombineRequest) -> Adapter:
    """An adapter, opened, and read as the options say."""
    from adapterkit.adapters.adapter import Adapter as Opened
    from adapterkit.bases import open_adapter

    return request.told(adapter if isinstance(adapter, Opened) else open_adapter(adapter))


@takes(CombineRequest)
def combine(request: CombineRequest) -> CombineReport:
    """Combine adapters into one plain LoRA that PEFT, vLLM and llama.cpp load.

    Modules stream through one by one; no delta of a LoRA adapter is ever formed unless the method needs its entries.
    ``adapters`` may also be what `open_family` made of them. Parameters of a method may be given as keywords of their own.

    Raises:
        UsageError: arguments that contradict each other, a rank that no layer has, or a result of full rank.
        TargetError: adapters of different bases, or that bring different values for the same parameter.
        NotFound, AdapterError, OutputError, CheckpointError, UnsafeError, AuthError, HubError
    """
    if request.method == "arrow":
        from adapterkit.verbs.arrow import arrow

        _family(request)  # each of them is read alone below, and only together it shows that they are of one base
        return arrow(request, combine, told)
    started = time.monotonic()
    report: CombineReport = carry_out(planned(request).job(), request, started)
    return report


def replan(data: Mapping[str, Any], out: Path | Address | None) -> Combination:
    """The combination of a saved plan, planned again."""
    known = {name for name, _ in CombineRequest.options().items()}
    given = {name: value for name, value in data.items() if name in known}
    return planned(CombineRequest.bound({**given, "out": out}))


def _refs(adapters: Any) -> list[Any]:
    return list(adapters) if isinstance(adapters, tuple) else [adapter.ref for adapter in adapters.adapters]


def combined(
    family: Family,
    rule: BoundRule,
    weights: Sequence[float] | torch.Tensor | None = None,
    *,
    rank: int | None = None,
    energy: float | None = None,
    full: bool = False,
    jobs: int | None = None,
    progress: Progress | None = None,
) -> Iterator[tuple[Slot, tuple[Truncated, ...]]]:
    """The combination in memory, module by module: what a search over weights needs, without a file.

    Gives each slot with its deltas as factors, one per expert, and what truncating them cost. A delta without a low rank
    that no bound was given for is refused, or with ``full`` decomposed down to the noise of float32.

    Raises:
        UsageError: the result has no low rank, and no rank was given.
    """
    factors = check_weights(weights, len(family.adapters))  # type: ignore[arg-type]

    def one(slot: Slot) -> tuple[Slot, tuple[Truncated, ...]] | None:
        (found,) = _of_slots(family, [slot], rule, factors, (rank, energy, full), (depth, opened(CPU)))
        return None if found is None else (slot, found)

    depth = _depth_of(family)
    slots = list(family.slots.values())
    sizes = [sum(delta.change.reads for _, delta in family.deltas(slot.parameter)) for slot in slots]
    for item in in_order(one, slots, jobs or default_jobs(), sizes, progress, FEW):
        if item is not None:
            yield item


Bounds = tuple["int | None", "float | None", bool]
"""Rank, energy, and whether a delta without a low rank is decomposed down to the noise of float32."""


Depth = Callable[[str], float]


def _depth_of(family: Family) -> Depth:
    """How deep each weight lies: among the layers of the base, or of the adapters where there is none."""
    from adapterkit.ops.settings import depths

    return depths(family.slots if family.base is None else family.base)


def _of_slots(
    family: Family,
    slots: Sequence[Slot],
    rule: BoundRule,
    weights: Sequence[float],
    bounds: Bounds,
    where: tuple[Depth, Device],
) -> list[tuple[Truncated, ...] | None]:
    """The combined deltas of slots, one per expert; None where every weight is 0. On a device all are cut together.

    Args:
        where: how deep each weight lies, and what it is computed on.
    """
    from adapterkit.ops.lowrank import Factors, Truncated, truncate_all
    from adapterkit.ops.there import there

    (rank, energy, _), (depth, device) = bounds, where
    made: list[list[Truncated | Factors] | None] = []
    for slot in slots:
        users, experts = family.load(slot.parameter)
        used = [weights[i] for i in users]
        if not any(used):
            made.append(None)
            continue
        refs = [family.adapters[i].ref for i in users]
        here = rule.here(slot.parameter, depth(slot.parameter), users)
        made.append([])
        for index, parts in enumerate(experts):
            key = slot.parameter if slot.count == 1 else f"{slot.parameter}.{index}"
            moved = [there(device, part) for part in parts]
            made[-1].append(_combined(here, moved, used, refs, key, *bounds))  # type: ignore[union-attr]
    whole = [one for found in made for one in found or () if isinstance(one, Factors)]
    cuts = iter(truncate_all(whole, rank=rank, energy=energy))

    def cut(one: Truncated | Factors) -> Truncated:
        if isinstance(one, Truncated):
            return one
        found = next(cuts)
        return Truncated(found.factors, found.spectrum[:1], found.error, found.norm)

    return [None if found is None else tuple(cut(one) for one in found) for found in made]


def _combined(
    rule: BoundRule,
    parts: Sequence[DeltaRows],
    weights: Sequence[float],
    refs: Sequence[str],
    key: str,
    rank: int | None,
    energy: float | None,
    full: bool,
) -> Truncated | Factors:
    """The combined delta: cut to the bounds, or factors that are still to be."""
    from adapterkit.ops.extract import low_rank
    from adapterkit.ops.lowrank import Factors, Truncated, stack
    from adapterkit.ops.measure import norm

    wanted = rank
    if rule.has_rank and rank is None and energy is not None:
        wanted = sum(part.rank for part in parts if isinstance(part, Factors)) or None  # the energy decides
    result = rule.apply(parts, weights, refs, key, wanted)
    if full and rank is None and energy is None:
        if isinstance(result, Factors) and result.rank <= min(result.shape):
            size = norm(result)
            return _cut(result, size, size)
        return low_rank(result, max_error=NOISE, exact=True)
    if not isinstance(result, Factors) and rank is None and energy is None:
        dense = next((ref for part, ref in zip(parts, refs, strict=True) if not isinstance(part, Factors)), refs[0])
        raise UsageError(
            f"{dense} has no low rank at {key}, so the result has none either",
            f"give {option('rank', 'R')} or {option('energy', 'E')}, or fold it in with merge",
        )
    if rule.method == "svd" and isinstance(result, Factors):
        whole = stack([part for part in parts if isinstance(part, Factors)], [w * rule.scale for w in weights])
        return _cut(result, norm(whole), norm(result)) if energy is None else low_rank(whole, rank=rank, energy=energy)
    if isinstance(result, Factors) and energy is None and (rank is None or result.rank <= rank):
        size = norm(result)
        return _cut(result, size, size)
    if isinstance(result, Factors):
        return result
    found = low_rank(result, rank=rank, energy=energy)
    return Truncated(found.factors, found.spectrum[:1], found.error, found.norm)


def _cut(factors: Factors, whole: float, kept: float) -> Truncated:
    """The best approximation of a delta of norm ``whole``, itself of norm ``kept``."""
    import torch

    from adapterkit.ops.lowrank import Truncated

    return Truncated(factors, torch.empty(0), max(0.0, whole**2 - kept**2) ** 0.5, whole)


def parents(family: Family, weights: Sequence[float]) -> list[Parent]:
    """What a record says an adapter was made from."""
    found = [] if family.base is None else [base_parent(family.base)]
    return found + [adapter_parent(a, weight=w) for a, w in zip(family.adapters, weights, strict=True)]


def check_rank(rank: int | None, energy: float | None, slots: Any, max_error: float | None = None) -> list[str]:
    """Refuse bounds that nothing can meet; a note where a rank is more than some layers have.

    Raises:
        UsageError
    """
    from adapterkit.ops.lowrank import check_bounds

    check_bounds(rank, energy, max_error)
    found = list(slots)
    if rank is None or not found:
        return []
    widest = max(found, key=lambda slot: slot.largest_rank)
    if rank > widest.largest_rank:
        raise UsageError(
            f"rank {rank} is larger than every layer ({widest.parameter} is {widest.shape[0]} x {widest.shape[1]})",
            f"use at most {widest.largest_rank}",
        )
    small = [slot.parameter for slot in found if slot.largest_rank < rank]
    return (
        [f"rank {rank} is more than {counted(len(small), 'layer has', 'layers have')}, as {small[0]}"] if small else []
    )


def output_dtype(name: str) -> Any:
    """The dtype of factors in the output.

    Raises:
        UsageError
    """
    from adapterkit.dtypes import BY_LABEL

    if name not in ("f32", "bf16", "f16"):
        raise UsageError(f"'{name}' is no dtype for factors", "use f32, bf16 or f16")
    return BY_LABEL.get(name, F32)


def side_files(adapters: Sequence[Adapter], notes: list[str]) -> dict[str, bytes]:
    """The tokenizer of the first adapter that brings one."""
    brought = [adapter for adapter in adapters if adapter.side_files]
    if not brought:
        return {}
    files = {file.name: file.bytes() for file in brought[0].side_files}
    if any({file.name: file.bytes() for file in other.side_files} != files for other in brought[1:]):
        notes.append(f"the adapters bring different tokenizers; that of {brought[0].ref} was taken")
    return files


def _biases(
    family: Family, weights: Sequence[float], scale: float, whole: Mapping[str, Tensor]
) -> tuple[dict[str, torch.Tensor], dict[str, Tensor]]:
    """What becomes of trained ``lora_B.bias``: the weighted sum, whatever the method, for they are no matrices.

    PEFT's ``lora_bias`` is for all modules or none. Where some have none, the base's biases are stored whole instead.

    Returns:
        Sums for ``lora_B.bias`` by module, and whole biases by key; one of the two is empty.
    """
    from adapterkit.adapters.change import matrix
    from adapterkit.adapters.names import Names

    found: dict[str, torch.Tensor] = {}
    for part, weight in zip(family.parts, weights, strict=True):
        for module, (bias, scaling) in part.biases.items():
            add = matrix(bias).double() * (weight * scale * scaling)
            found[module] = found[module] + add if module in found else add
    if found.keys() == {slot.module for slot in family.slots.values()} or not found:
        return {module: bias.float() for module, bias in found.items()}, {}
    if family.base is None:
        raise UsageError(
            "some adapters train biases (lora_bias) in layers where others do not", f"add {option('base', 'BASE')}"
        )
    names = Names(family.base.shapes, family.base.config)
    done: dict[str, Tensor] = {}
    for module, add in found.items():
        key = f"{module}.bias"
        target = names.find(key)
        if target is None or key in whole:
            raise TargetError(
                f"two adapters change '{key}', or the base has none", "fold one of them in with merge first"
            )
        before = StoredWeights(target, family.base.tensors)
        done[key] = InMemory(key, before.read(0, add.numel()).double().view(-1) + add)
    return {}, done


def known_rank(how: str, plain: Sequence[str] = ("lora", "adalora")) -> int | None:
    """The rank in the words of a change that is a low-rank product and nothing else; None of any other.

    Args:
        plain: what such changes are called.
    """
    found = _PLAIN.fullmatch(how)
    return int(found["rank"]) if found is not None and found["kind"] in plain else None


def rank_of(how: str) -> int:
    """The rank in the words of a change, as in ``lora r=16``."""
    digits = "".join(c for c in how.partition("r=")[2].partition(" ")[0] if c.isdigit())
    return int(digits or 16)
