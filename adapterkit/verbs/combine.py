"""`combine`: several adapters become one plain LoRA adapter."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from adapterkit.adapters.adapter import WEIGHTS
from adapterkit.adapters.bound_rule import BoundRule, check_weights
from adapterkit.adapters.merged import StoredWeights
from adapterkit.adapters.write_peft import Extras, InMemory, PeftWriter, peft_config
from adapterkit.checkpoint.files import check_unchanged
from adapterkit.checkpoint.plan import default_jobs
from adapterkit.checkpoint.publish import check_target, staging
from adapterkit.dtypes import F32
from adapterkit.errors import TargetError, UsageError
from adapterkit.provenance.record import adapter_parent, base_parent, recorder
from adapterkit.verbs.family import Family, carried, open_family
from adapterkit.verbs.merge import peak_memory
from adapterkit.verbs.ordered import in_order
from adapterkit.verbs.report import AdapterUse, CombineReport, ModuleRank

if TYPE_CHECKING:
    import torch

    from adapterkit.adapters.adapter import Adapter
    from adapterkit.adapters.factors import Slot
    from adapterkit.checkpoint.checkpoint import Checkpoint
    from adapterkit.checkpoint.tensor import Tensor
    from adapterkit.dtypes import DType
    from adapterkit.ops.lowrank import Factors, Truncated
    from adapterkit.ops.rows import DeltaRows
    from adapterkit.registry.record import Parent

NOISE = 1e-6  # relative error that float32 leaves in W' - W anyway

Ref = str | Path
Progress = Callable[[int, int], None]


def combine(
    adapters: Sequence[Ref | Adapter] | Family,
    out: Ref,
    *,
    method: str = "linear",
    weights: Sequence[float] | None = None,
    scale: float = 1.0,
    space: str | None = None,
    rank: int | None = None,
    energy: float | None = None,
    base: Ref | Checkpoint | None = None,
    dtype: str = "f32",
    own_ranks: bool = False,
    jobs: int | None = None,
    force: bool = False,
    residual_base: bool = False,
    allow_unknown: bool = False,
    progress: Progress | None = None,
    **parameters: Any,
) -> CombineReport:
    """Combine adapters into one plain LoRA that PEFT, vLLM and llama.cpp load.

    Modules stream through one by one; no delta of a LoRA adapter is ever formed unless the method needs its entries.

    Args:
        adapters: PEFT folders or Hub ids, open adapters, or what `open_family` made of them.
        out: the folder to make; it appears whole or not at all.
        method: a row of `adapterkit.ops.rules.RULES`.
        weights: one per adapter, any sign, 1 each by default; a list, a numpy array or a torch tensor.
        scale: factor of the result, the lambda of the papers.
        space: ``knots``, ``core`` or ``ctm``: align the adapters there, with ``method`` as the inner rule.
        rank: at most this rank in every module.
        energy: the smallest rank that keeps this share of every module's squared norm.
        base: the base of the adapters, for methods whose change depends on the weights.
        dtype: of the factors: ``f32``, ``bf16`` or ``f16``.
        own_ranks: every module keeps its own rank (`rank_pattern`), instead of one rank for all.
        jobs: worker threads; the output does not depend on it.
        force: replace an existing folder.
        residual_base, allow_unknown: see `fold`.
        progress: called now and then with bytes done and bytes in all.
        **parameters: those of the method.

    Raises:
        UsageError: arguments that contradict each other, a rank that no layer has, or a result of full rank.
        TargetError: adapters of different bases, or that bring different values for the same parameter.
        NotFound, AdapterError, OutputError, CheckpointError, UnsafeError, AuthError, HubError
    """
    started = time.monotonic()
    rule = BoundRule(method, space, scale, parameters)
    stored = output_dtype(dtype)
    family = (
        adapters
        if isinstance(adapters, Family)
        else open_family(adapters, base, residual_base=residual_base, allow_unknown=allow_unknown)
    )
    factors = check_weights(weights, len(family.adapters))
    notes = [*family.notes, *check_rank(rank, energy, family.slots.values())]
    if rule.dense and rank is None and energy is None:
        raise UsageError(
            f"method {rule.row.name} gives deltas of full rank",
            "give --rank R or --energy E, or --space core, or fold them in with merge --method",
        )
    asked = {"method": method, "scale": scale, "space": space, "rank": rank, "energy": energy, "dtype": dtype}
    made = make_adapter(
        family,
        rule,
        factors,
        Path(out),
        record=recorder("combine", "combined", asked | dict(parameters), parents(family, factors), method="lora"),
        dtype=stored,
        rank=rank,
        energy=energy,
        own_ranks=own_ranks,
        jobs=jobs,
        force=force,
        progress=progress,
    )
    notes += made.notes
    config = made.config
    return CombineReport(
        out=str(out),
        method=rule.method,
        space=rule.space or "",
        scale=scale,
        parameters=dict(parameters),
        adapters=tuple(
            AdapterUse(a.ref, a.config.peft_type, w, a.commit, a.config.base)
            for a, w in zip(family.adapters, factors, strict=True)
        ),
        base=str(config["base_model_name_or_path"] or ""),
        rank=int(config["r"]),
        own_ranks=bool(config["rank_pattern"]),
        modules=made.modules,
        carried=made.carried,
        nbytes=made.nbytes,
        seconds=time.monotonic() - started,
        peak_memory=peak_memory(),
        notes=tuple(notes),
    )


@dataclass(frozen=True)
class MadeAdapter:
    """What `make_adapter` wrote.

    Attributes:
        config: as written.
        modules: what was kept of each.
        carried: whole parameters and token rows taken over.
        nbytes: of the weight file.
    """

    config: Mapping[str, Any]
    modules: tuple[ModuleRank, ...]
    carried: tuple[str, ...]
    nbytes: int
    notes: tuple[str, ...]


def make_adapter(
    family: Family,
    rule: BoundRule,
    weights: Sequence[float],
    target: Path,
    *,
    record: Callable[[Path], Mapping[str, bytes]],
    dtype: DType = F32,
    rank: int | None = None,
    energy: float | None = None,
    full: bool = False,
    own_ranks: bool = False,
    jobs: int | None = None,
    force: bool = False,
    progress: Progress | None = None,
) -> MadeAdapter:
    """Write the combination of a family as one plain LoRA; see `combine`, and `combined` for ``full``.

    Raises:
        OutputError, TargetError, UsageError
    """
    over = carried(family)
    notes = []
    if over.whole or over.tokens:
        notes.append(f"carried over as they are: {', '.join([*over.whole, *over.tokens])[:400]}")
    folders = [adapter.folder for adapter in family.adapters if adapter.folder is not None]
    check_target(target, folders, _estimate(family, rank), force=force)
    bounds: dict[str, Any] = {"rank": rank, "energy": energy, "full": full}
    rows: list[ModuleRank] = []
    with staging(target, resume=False) as folder:
        writer = PeftWriter(folder, dtype)
        try:
            for slot, found in combined(family, rule, weights, jobs=jobs, progress=progress, **bounds):
                writer.add(slot, [one.factors for one in found])
                rows.append(module_rank(slot, found))
            biases, summed = _biases(family, weights, rule.scale, over.whole)
            extras = Extras({**over.whole, **summed}, over.tokens, {}, biases, side_files(family.adapters, notes))
            config = peft_config(
                [slot for slot in family.slots.values() if any(weights[i] for i, _ in family.deltas(slot.parameter))],
                [adapter.config.raw for adapter in family.adapters],
                extras,
                base=None if family.base is None else family.base.ref,
            )
            check_unchanged(family.sources)
            config = writer.finish(target, config, extras, own_ranks=own_ranks, force=force, record=record)
        finally:
            writer.close()
    nbytes = (target / WEIGHTS).stat().st_size
    return MadeAdapter(config, tuple(rows), (*over.whole, *over.tokens), nbytes, tuple(notes))


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
        users, experts = family.load(slot.parameter)
        used = [factors[i] for i in users]
        if not any(used):
            return None
        refs = [family.adapters[i].ref for i in users]
        found = []
        for index, parts in enumerate(experts):
            key = slot.parameter if slot.count == 1 else f"{slot.parameter}.{index}"
            found.append(_combined(rule, parts, used, refs, key, rank, energy, full))
        return slot, tuple(found)

    slots = list(family.slots.values())
    sizes = [sum(delta.change.reads for _, delta in family.deltas(slot.parameter)) for slot in slots]
    for item in in_order(one, slots, jobs or default_jobs(), sizes, progress):
        if item is not None:
            yield item


def _combined(
    rule: BoundRule,
    parts: Sequence[DeltaRows],
    weights: Sequence[float],
    refs: Sequence[str],
    key: str,
    rank: int | None,
    energy: float | None,
    full: bool,
) -> Truncated:
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
            "give --rank R or --energy E, or fold it in with merge",
        )
    if rule.method == "svd" and isinstance(result, Factors):
        whole = stack([part for part in parts if isinstance(part, Factors)], [w * rule.scale for w in weights])
        return _cut(result, norm(whole), norm(result)) if energy is None else low_rank(whole, rank=rank, energy=energy)
    if isinstance(result, Factors) and energy is None and (rank is None or result.rank <= rank):
        size = norm(result)
        return _cut(result, size, size)
    found = low_rank(result, rank=rank, energy=energy)
    return Truncated(found.factors, found.spectrum[:1], found.error, found.norm)


def _cut(factors: Factors, whole: float, kept: float) -> Truncated:
    """The best approximation of a delta of norm ``whole``, itself of norm ``kept``."""
    import torch

    from adapterkit.ops.lowrank import Truncated

    return Truncated(factors, torch.empty(0), max(0.0, whole**2 - kept**2) ** 0.5, whole)


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
    return [f"rank {rank} is more than {len(small)} layers have, as {small[0]}"] if small else []


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
        raise UsageError("some adapters train biases (lora_bias) in layers where others do not", "add --base BASE")
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


def _estimate(family: Family, rank: int | None) -> int:
    """Bytes of the output and of the factors that wait beside it."""
    total = 0
    for slot in family.slots.values():
        most = rank or sum(_rank_of(delta.change.how) for _, delta in family.deltas(slot.parameter))
        total += 8 * slot.count * min(most, slot.largest_rank) * sum(slot.shape)
    return total + sum(tensor.nbytes for part in family.parts for tensor in part.whole.values())


def _rank_of(how: str) -> int:
    """The rank in the words of a change, as in ``lora r=16``."""
    digits = "".join(c for c in how.partition("r=")[2].partition(" ")[0] if c.isdigit())
    return int(digits or 16)
