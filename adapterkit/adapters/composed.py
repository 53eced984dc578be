"""Several adapters whose changes of one weight depend on it: what the second sees is not W but what the first made of it.

Summing ``f_k(W) - W`` is right for changes that are additions. Others multiply W or bring it to a norm, and PEFT with several
adapters active applies them one after the other; so does this, in the order given. `Change.composes` says how:

========  ==============================================================  =========================================
word      with V what the adapters before made of W                       methods
========  ==============================================================  =========================================
sum       V + (f(W) - W)                                                  all that are not below
after     f(V)                                                            IA3, HRA, BOFT, RoAd, MiSS "bat", OFT of an
                                                                          embedding
before    f(V), the last adapter first                                    OFT of a layer: PEFT turns the input by the
                                                                          first, then by the next (its own merge has it
                                                                          reversed)
scaled    m / ||W + delta|| * (V + delta)                                 DoRA, beside DoRA and LoRA
alone     none                                                            inits that take something out of W, OSF
========  ==============================================================  =========================================

Checked against PEFT 0.21.2 with two adapters active (tests/adapters/test_composed.py). PEFT holds one method in a model, so
a change that is not a sum beside one of another method is refused: merge one of the two first.
"""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING

from adapterkit.adapters.change import AFTER, ALONE, BEFORE, SCALED, SUM, Change, Kernel, Weights
from adapterkit.errors import UnsupportedAdapter, option

if TYPE_CHECKING:
    from collections.abc import Sequence

    import torch

    from adapterkit.adapters.target import Target
    from adapterkit.adapters.ties import Weighted


def composed_edits(items: Sequence[Weighted]) -> tuple[tuple[Weighted, ...], tuple[str, ...]]:
    """The edits with those of one weight that are no sums made one, and a note on the order if there are any.

    Raises:
        UnsupportedAdapter: nothing says how two of them go together.
    """
    groups: dict[Target, list[Weighted]] = {}
    for item in items:
        change = item.edit.change
        if item.weight and not item.edit.override and change.replaced is None and change.stored is None:
            groups.setdefault(item.edit.target, []).append(item)
    ordered = {target: order for target, group in groups.items() if (order := _ordered(group)) is not None}
    if not ordered:
        return tuple(items), ()
    done = []
    for item in items:
        order = ordered.get(item.edit.target)
        if order is None or item not in groups[item.edit.target]:
            done.append(item)
        elif item is groups[item.edit.target][0]:
            done.append(replace(item, edit=replace(item.edit, change=_composed(order)), weight=1.0))
    refs = list(dict.fromkeys(item.adapter.ref for item in groups[next(iter(ordered))]))
    words = f"the adapters change weights by what depends on them, so their order matters: {', then '.join(refs)}"
    return tuple(done), (words,)


def separate_note(items: Sequence[Weighted]) -> tuple[str, ...]:
    """What to say where a combination rule takes changes apart that would compose without one."""
    dependent = {id(item.adapter) for item in items if item.weight and item.edit.change.composes != SUM}
    if not dependent or len({id(item.adapter) for item in items}) == 1:
        return ()
    return ("the method combines each adapter's change of the unmerged weights; without a method they would compose",)


def _ordered(group: Sequence[Weighted]) -> list[Weighted] | None:
    """The changes of one weight in the order in which they apply; None where they are simply summed.

    Raises:
        UnsupportedAdapter: they do not go together.
    """
    kinds = [item.edit.change.composes for item in group]
    if len({id(item.adapter) for item in group}) == 1 or set(kinds) == {SUM}:
        return None
    if set(kinds) <= {SUM, ALONE} and kinds.count(ALONE) == 1:
        return None
    methods = {item.adapter.config.peft_type for item in group}
    if len(methods) == 1 and (len(set(kinds)) == 1 or set(kinds) == {SUM, SCALED}) and ALONE not in kinds:
        return list(reversed(group)) if BEFORE in kinds else list(group)
    if len(methods) == 1 and set(kinds) == {ALONE}:
        one, two = group[:2]
        raise UnsupportedAdapter(
            f"{one.adapter.ref} ({one.edit.change.how}) and {two.adapter.ref} ({two.edit.change.how}) were each trained on "
            f"what their own initialisation left of {one.edit.target.parameter}, so no order of them is what was trained",
            f"convert each with {option('plain', True)} to a LoRA of the base first: those add up",
        )
    dependent = next(item for item in group if item.edit.change.composes != SUM)
    other = next(item for item in group if item.adapter is not dependent.adapter)
    raise UnsupportedAdapter(
        f"{dependent.adapter.ref} ({dependent.edit.change.how}) changes {dependent.edit.target.parameter} by what depends on "
        f"its values, and {other.adapter.ref} ({other.edit.change.how}) changes it too: PEFT has no model with both",
        "merge one of them, then the other into the result, in the order that you mean",
    )


def _composed(order: Sequence[Weighted]) -> Change:
    changes = [item.edit.change for item in order]
    steps = [(change, item.weight) for change, item in zip(changes, order, strict=True)]

    def load(weights: Weights) -> Kernel:
        if any(change.composes in (AFTER, BEFORE) for change in changes):
            chain = _Chain(())
            for change, weight in steps:
                chain = _Chain((*chain.steps, (change.load(_Result(weights, chain)), weight)))
            return chain
        return _Scaled(tuple((change.load(weights), weight) for change, weight in steps))

    return Change(
        " then ".join(change.how for change in changes),
        load,
        sum(change.reads for change in changes),
        sum(change.memory for change in changes),
    )


def _toward(old: torch.Tensor, new: torch.Tensor, weight: float) -> torch.Tensor:
    return new if weight == 1 else old + weight * (new - old)


class _Chain(Kernel):
    """One change after the other, each of what the one before left."""

    def __init__(self, steps: tuple[tuple[Kernel, float], ...]) -> None:
        self.steps = steps

    def new(self, w: torch.Tensor, rows: range) -> torch.Tensor:
        for kernel, weight in self.steps:
            w = _toward(w, kernel.new(w, rows), weight)
        return w


class _Scaled(Kernel):
    """DoRA after others: it scales their changes too, by a norm that it takes of the unmerged W."""

    def __init__(self, steps: tuple[tuple[Kernel, float], ...]) -> None:
        self._steps = steps

    def new(self, w: torch.Tensor, rows: range) -> torch.Tensor:
        found = w
        for kernel, weight in self._steps:
            found = _toward(found, kernel.on(w, found, rows), weight)
        return found


class _Result(Weights):
    """A parameter as the changes before left it, for the changes that read more of it than their rows."""

    def __init__(self, weights: Weights, chain: _Chain) -> None:
        self._weights, self._chain = weights, chain
        self.shape, self.dtype = weights.shape, weights.dtype

    def read(self, start: int, stop: int) -> torch.Tensor:
        return self._chain.new(self._weights.read(start, stop), range(start, stop))

    def other(self, target: Target) -> Weights:
        return self._weights.other(target)
