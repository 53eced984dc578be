"""`resize`: the same adapter at another rank, the best one there is."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from adapterkit.adapters.write_peft import Extras, PeftWriter, peft_config
from adapterkit.checkpoint.files import check_unchanged
from adapterkit.checkpoint.plan import default_jobs
from adapterkit.checkpoint.publish import check_target, staging
from adapterkit.errors import UnsupportedAdapter, UsageError
from adapterkit.provenance.record import recorder
from adapterkit.verbs.combine import check_rank, module_rank, output_dtype, parents, side_files
from adapterkit.verbs.family import Family, carried, open_family
from adapterkit.verbs.merge import peak_memory
from adapterkit.verbs.ordered import in_order
from adapterkit.verbs.report import ModuleRank, ResizeReport

if TYPE_CHECKING:
    import torch

    from adapterkit.adapters.adapter import Adapter
    from adapterkit.adapters.factors import Slot
    from adapterkit.checkpoint.checkpoint import Checkpoint
    from adapterkit.checkpoint.tensor import Tensor
    from adapterkit.ops.lowrank import Truncated

Ref = str | Path


def resize(
    adapter: Ref | Adapter,
    out: Ref,
    *,
    rank: int | None = None,
    energy: float | None = None,
    max_error: float | None = None,
    base: Ref | Checkpoint | None = None,
    dtype: str = "f32",
    own_ranks: bool = False,
    jobs: int | None = None,
    force: bool = False,
    allow_unknown: bool = False,
    progress: Callable[[int, int], None] | None = None,
) -> ResizeReport:
    """Bring a low-rank adapter to another rank: per layer the best approximation in the Frobenius norm.

    DoRA's magnitudes are kept as they are; it is the product B A between them that is cut.

    Args:
        adapter: PEFT folder or Hub id, or an open adapter, of a method whose change is a low-rank product.
        out: the folder to make; it appears whole or not at all.
        rank: at most this rank in every layer.
        energy: the smallest rank that keeps this share of a layer's squared norm.
        max_error: the smallest rank with at most this relative error in a layer.
        base: the base, for methods whose factors do not tell the shapes (VeRA, ...).
        dtype: of the factors: ``f32``, ``bf16`` or ``f16``.
        own_ranks: every layer keeps its own rank, instead of one for all.
        jobs: worker threads; the output does not depend on it.
        force: replace an existing folder.
        allow_unknown: go on where the config has fields that are not known here.
        progress: called now and then with bytes done and bytes in all.

    Raises:
        UsageError: no bound, or one that nothing can meet.
        UnsupportedAdapter: its change is no low-rank product.
        NotFound, AdapterError, OutputError, UnsafeError, AuthError, HubError
    """
    started = time.monotonic()
    if rank is None and energy is None and max_error is None:
        raise UsageError("nothing says how small the adapter is to be", "give --rank, --energy or --max-error")
    stored = output_dtype(dtype)
    family = open_family([adapter], base, allow_unknown=allow_unknown, bare=True)
    (one,), (part,) = family.adapters, family.parts
    notes = [*family.notes, *check_rank(rank, energy, family.slots.values(), max_error)]
    over = carried(family)
    target = Path(out)
    folders = [] if one.folder is None else [one.folder]
    check_target(target, folders, 2 * one.nbytes, force=force)
    rows: list[ModuleRank] = []
    with staging(target, resume=False) as folder:
        writer = PeftWriter(folder, stored)
        try:
            sizes = [part.deltas[name].change.reads for name in family.slots]

            def work(slot: Slot) -> tuple[Slot, int, list[Truncated]]:
                return slot, *_resized(family, slot, rank, energy, max_error)

            for slot, before, found in in_order(
                work, list(family.slots.values()), jobs or default_jobs(), sizes, progress
            ):
                writer.add(slot, [cut.factors for cut in found])
                rows.append(module_rank(slot, found, before))
            biases = {module: _scaled(*bias) for module, bias in part.biases.items()}
            extras = Extras(over.whole, over.tokens, part.magnitudes, biases, side_files([one], notes))
            config = peft_config(list(family.slots.values()), [one.config.raw], extras, dora=bool(part.magnitudes))
            asked = {"rank": rank, "energy": energy, "max_error": max_error, "dtype": dtype}
            record = recorder("resize", "adapter", asked, parents(family, [1.0]), method="lora")
            check_unchanged(family.sources)
            config = writer.finish(target, config, extras, own_ranks=own_ranks, force=force, record=record)
        finally:
            writer.close()
    return ResizeReport(
        out=str(out),
        adapter=one.ref,
        method=one.config.peft_type,
        rank=int(config["r"]),
        own_ranks=bool(config["rank_pattern"]),
        modules=tuple(rows),
        nbytes_before=one.nbytes,
        nbytes=(target / "adapter_model.safetensors").stat().st_size,
        seconds=time.monotonic() - started,
        peak_memory=peak_memory(),
        notes=tuple(notes),
    )


def _resized(
    family: Family, slot: Slot, rank: int | None, energy: float | None, max_error: float | None
) -> tuple[int, list[Truncated]]:
    from adapterkit.ops.lowrank import Factors, truncate

    _, experts = family.load(slot.parameter)
    found: list[Truncated] = []
    before = 0
    for (delta,) in experts:
        if not isinstance(delta, Factors):
            adapter = family.adapters[0]
            raise UnsupportedAdapter(
                f"{adapter.ref} cannot be resized: its change of {slot.parameter} "
                f"({family.parts[0].deltas[slot.parameter].change.how}) is no low-rank product",
                "make a LoRA of it with combine --base BASE --rank R",
            )
        before = max(before, delta.rank)
        found.append(truncate(delta, rank=rank, energy=energy, max_error=max_error))
    return before, found


def _scaled(bias: Tensor, scaling: float) -> torch.Tensor:
    from adapterkit.adapters.change import matrix

    return (matrix(bias).double() * scaling).float()


def total_kept(modules: Sequence[ModuleRank]) -> tuple[float, float]:
    """Over all layers: the share of the squared norm that was kept, and the relative error."""
    total = sum(row.norm**2 for row in modules)
    lost = sum((row.norm * row.error) ** 2 for row in modules)
    return (1 - lost / total, (lost / total) ** 0.5) if total else (1.0, 0.0)
