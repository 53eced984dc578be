"""Combination methods inside a fold: the changes of several adapters on one parameter become one change, untruncated."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from adapterkit.adapters.change import Change, Kernel, LowRank, StackedLowRank, Weights
from adapterkit.adapters.factors import ModuleDelta, Slot
from adapterkit.ops.settings import depths

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence

    import torch

    from adapterkit.adapters.adapter import Adapter
    from adapterkit.adapters.bound_rule import BoundRule
    from adapterkit.adapters.target import Target
    from adapterkit.adapters.ties import Weighted
    from adapterkit.ops.rows import DeltaRows


def combined_edits(
    items: Sequence[Weighted], rule: BoundRule, adapters: Sequence[Adapter], names: Iterable[str]
) -> tuple[Weighted, ...]:
    """The edits with those of one matrix combined by ``rule``; whole parameters, token rows and vectors stay as they are.

    Args:
        adapters: all of them, in order.
        names: of the base's tensors, by which layers are counted.

    Raises:
        UsageError: a parameter has values for another number of adapters.
    """
    rule.check_count(len(adapters))
    depth = depths(names)
    places = {id(adapter): place for place, adapter in enumerate(adapters)}
    groups: dict[Target, list[Weighted]] = {}
    for item in items:
        if _is_delta(item) and item.weight:
            groups.setdefault(item.edit.target, []).append(item)
    done: list[Weighted] = []
    for item in items:
        group = groups.get(item.edit.target, []) if _is_delta(item) and item.weight else []
        if not group:
            done.append(item)
        elif item is group[0]:
            parameter = item.edit.target.parameter
            here = rule.here(parameter, depth(parameter), [places[id(one.adapter)] for one in group])
            change = _combined(group, here)
            done.append(replace(item, edit=replace(item.edit, change=change), weight=1.0))
    return tuple(done)


def _is_delta(item: Weighted) -> bool:
    edit = item.edit
    whole = edit.override or edit.change.replaced is not None or edit.change.stored is not None
    return not whole and (len(edit.target.shape) > 1 or item.adapter.whole)


def _combined(group: Sequence[Weighted], rule: BoundRule) -> Change:
    target = group[0].edit.target
    rows, columns = target.matrix
    count = target.shape[0] if target.stacked and len(target.shape) == 3 else 1
    slot = Slot(target.parameter, "", "linear", (rows // count, columns), count)
    refs = [item.adapter.ref for item in group]
    weights = [item.weight for item in group]

    def load(base: Weights) -> Kernel:
        loaded = [ModuleDelta(slot, item.adapter, item.edit.change, base).load() for item in group]
        found = []
        for index, parts in enumerate(zip(*loaded, strict=True)):
            key = slot.parameter if count == 1 else f"{slot.parameter}.{index}"
            found.append(rule.apply(parts, weights, refs, key, base=BaseRows(base, slot.shape, index)))
        return _kernel(found)

    changes = [item.edit.change for item in group]
    words = " + ".join(dict.fromkeys(change.how for change in changes))
    return Change(f"{rule} of {words}", load, sum(c.reads for c in changes), 3 * sum(c.memory for c in changes))


def _kernel(found: Sequence[DeltaRows]) -> Kernel:
    import torch

    from adapterkit.ops.lowrank import Factors

    factors = [one for one in found if isinstance(one, Factors)]
    if len(factors) < len(found):
        return RowDeltas(found)
    if len(factors) == 1:
        return LowRank(factors[0].b, factors[0].a, 1.0)
    rank = max(one.rank for one in factors)
    padded = [one.padded(rank) for one in factors]
    return StackedLowRank(torch.stack([one.b for one in padded]), torch.stack([one.a for one in padded]), 1.0)


@dataclass(frozen=True)
class BaseRows:
    """The base's own rows, of one matrix of a stack of them, for rules that look at them."""

    weights: Weights
    shape: tuple[int, int]
    index: int

    def rows(self, start: int, stop: int) -> torch.Tensor:
        first = self.index * self.shape[0]
        return self.weights.read(first + start, first + stop)


class RowDeltas(Kernel):
    """W plus deltas that give rows, one after the other: of one matrix, or of a stack of experts."""

    def __init__(self, deltas: Sequence[DeltaRows]) -> None:
        self._deltas = deltas
        self._height = deltas[0].shape[0]

    def new(self, w: torch.Tensor, rows: range) -> torch.Tensor:
        out = w.clone()
        done = 0
        while done < len(rows):
            expert, first = divmod(rows[done], self._height)
            count = min(len(rows) - done, -((first - self._height) // rows.step))
            last = first + (count - 1) * rows.step + 1
            out[done : done + count] += self._deltas[expert].rows(first, last)[:: rows.step]
            done += count
        return out
