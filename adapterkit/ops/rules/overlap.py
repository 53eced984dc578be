"""Rules by how many models changed an entry, or by how far one moved it."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated

from adapterkit.errors import UsageError
from adapterkit.ops.rows import ComputedRows, DeltaRows, add, blocks, common_shape
from adapterkit.ops.rules.registry import Range, rule

if TYPE_CHECKING:
    from collections.abc import Sequence

    import torch

Moved = Annotated[float, Range(0), "how large an entry of a change must be to count as changed"]


@rule(paper="2601.13572", space="dense", inner=False)
def ram(deltas: Sequence[DeltaRows], *, epsilon: Moved = 1e-5) -> DeltaRows:
    """Entries that one change alone moves are taken whole, those of several are averaged over them (RAM)."""
    return _merged(deltas, epsilon, [1.0] * len(deltas))


@rule(paper="2601.13572", space="dense", inner=False)
def ramplus_tl(
    deltas: Sequence[DeltaRows],
    *,
    epsilon: Moved = 1e-5,
    r: Annotated[float, Range(0), "how strongly shared entries raise the unique ones"] = 0.1,
    alpha: Annotated[float, Range(0), "the largest ratio of shared to unique entries that counts"] = 0.2,
) -> DeltaRows:
    """RAM, with unique entries raised by the share of entries that others move too (RAM+, tensor-local).

    lambda = 1 + r min(shared / unique, alpha) for each change, as mergekit counts it, tensor by tensor.
    """
    shared, unique = [0] * len(deltas), [0] * len(deltas)
    for start, stop in blocks(common_shape(deltas)):
        moved = [delta.rows(start, stop).abs() > epsilon for delta in deltas]
        count = add([one.float() for one in moved])
        for place, one in enumerate(moved):
            shared[place] += int((one & (count > 1)).sum())
            unique[place] += int((one & (count == 1)).sum())
    raised = [1 + r * min(s / max(u, epsilon), alpha) for s, u in zip(shared, unique, strict=True)]
    return _merged(deltas, epsilon, raised)


def _merged(deltas: Sequence[DeltaRows], epsilon: float, raised: Sequence[float]) -> DeltaRows:
    def block(start: int, stop: int) -> torch.Tensor:
        import torch

        rows = [delta.rows(start, stop).double() for delta in deltas]
        moved = [one.abs() > epsilon for one in rows]
        count = add([one.double() for one in moved])
        found = [
            torch.where(there, torch.where(count == 1, one * factor, one / count.clamp(min=1)), 0.0)
            for one, there, factor in zip(rows, moved, raised, strict=True)
        ]
        return add(found).float()

    return ComputedRows(common_shape(deltas), block)


@rule(paper="", space="dense", inner=False)
def nearswap(
    deltas: Sequence[DeltaRows], *, t: Annotated[float, Range(0), "changes up to this size are taken whole"] = 1e-4
) -> DeltaRows:
    """One change, with entries larger than ``t`` cut down to ``t`` (NearSwap).

    As mergekit has it: delta min(t / max(abs(delta), 1e-6), 1).
    """
    if len(deltas) != 1:
        raise UsageError(f"method nearswap takes one model or adapter, and got {len(deltas)}", "name one")
    (delta,) = deltas

    def block(start: int, stop: int) -> torch.Tensor:
        rows = delta.rows(start, stop)
        return rows * (t / rows.abs().clamp(min=1e-6)).clamp(max=1)

    return ComputedRows(delta.shape, block)
