"""What is known about a weight that is not what it should be: some of its values, and those of its relatives."""

from __future__ import annotations

import re
from dataclasses import dataclass
from functools import cached_property
from math import prod
from typing import TYPE_CHECKING

from adapterkit.adapters.merged import Merged, in_dtype
from adapterkit.dtypes import F32

if TYPE_CHECKING:
    import torch

    from adapterkit.checkpoint.tensor import Tensor
    from adapterkit.verbs.verify.subject import Item, Subject
    from adapterkit.verbs.verify.tensors import Judged

MOST = 1 << 21  # elements of a weight that are looked at
SKETCH = 1 << 12  # elements of another one
RELATIVES = 256
NUMBER = re.compile(r"(?<=\.)\d+(?=\.)")


def window(shape: tuple[int, ...], most: int) -> tuple[int, int, int]:
    """Which part of a weight is looked at: matrices, rows of each, columns. The first rows of every expert of a stack."""
    if len(shape) < 2:
        return 1, min(prod(shape), most), 1
    count = shape[0] if len(shape) == 3 else 1
    rows, columns = (shape[-2], shape[-1]) if len(shape) == 3 else (shape[0], prod(shape[1:]))
    wanted = max(1, most // max(count * columns, 1))
    # Whole heads, whose width is a power of two or three times one, as far as that can be had.
    whole = wanted // 768 * 768 or wanted // 64 * 64 or wanted
    return count, min(rows, whole), columns


def values(tensor: Tensor, most: int) -> torch.Tensor:
    """That part in float32, ``[matrices, rows, columns]``."""
    import torch

    count, rows, columns = window(tensor.shape, most)
    step = tensor.numel // count
    parts = [tensor.read_wide(i * step, i * step + rows * columns).float() for i in range(count)]
    found = parts[0] if count == 1 else torch.cat(parts)
    return found.reshape(count, rows, columns).clone()


@dataclass
class Suspect:
    """One weight that is off.

    With W the base, D the change that was trained, F what is there; float32 ``[matrices, rows, columns]``, the same part
    of each.
    """

    judged: Judged
    family: Relatives

    def release(self) -> None:
        """Drop what was loaded to compute its values."""
        for tensor in (before(self.item), after(self.item), self.item.values):
            tensor.release()

    @property
    def item(self) -> Item:
        return self.judged.item

    @property
    def name(self) -> str:
        return self.item.name

    @cached_property
    def base(self) -> torch.Tensor:
        return values(before(self.item), MOST)

    @cached_property
    def change(self) -> torch.Tensor:
        import torch

        item = self.item
        if not item.touched or (item.merged is None and item.base is None):
            return torch.zeros_like(self.base)
        return values(after(item), MOST) - self.base

    @cached_property
    def there(self) -> torch.Tensor:
        return values(self.item.values, MOST)

    @cached_property
    def beyond(self) -> torch.Tensor:
        """What is there beyond the base."""
        return self.there - self.base

    @cached_property
    def wrong(self) -> float:
        """\\|E - D|^2, which a hypothesis has to explain."""
        return float((self.beyond - self.change).double().square().sum())

    @cached_property
    def noise(self) -> float:
        """\\|.|^2 of what rounding or the format adds to this part when all is right."""
        ours = self.judged.ours
        own = ours.ee / ours.count * self.base.numel() if ours.count else 0.0
        if self.item.format is None:
            dtype = self.item.values.dtype.torch
            exact = self.base + self.change
            own = max(own, float((exact.to(dtype).float() - exact).double().square().sum()))
        # Float32 sums of another order, where there is no other rounding.
        return (
            own + 1e-12 * float(self.base.double().square().sum()) + 1e-12 * float(self.change.double().square().sum())
        )

    def left(self, explanation: torch.Tensor) -> float:
        """The share of what is wrong that is still wrong if ``explanation`` is what was added to W."""
        rest = float((self.beyond - explanation).double().square().sum())
        return max(0.0, rest - 4 * self.noise) / self.wrong if self.wrong else 1.0

    def alone(self, number: int) -> torch.Tensor:
        """The change of one adapter alone, as strongly as it was asked for."""
        merged = self.item.merged
        assert merged is not None
        owner = self.family.subject.adapters[number].ref
        mine = tuple(pair for pair in merged.applied if pair[0].owner == owner)
        if not mine:
            return self.base * 0
        part = Merged(merged.name, merged.base, mine, F32, merged.columns, factor=merged.factor)
        return values(part, MOST) - self.base

    @property
    def owners(self) -> list[int]:
        """The adapters that change this weight."""
        merged = self.item.merged
        if merged is None:
            return list(range(len(self.family.subject.adapters))) if self.item.base is not None else []
        owners = {applied.owner for applied, _ in merged.applied}
        refs = [adapter.ref for adapter in self.family.subject.adapters]
        return [number for number, ref in enumerate(refs) if ref in owners and refs.index(ref) == number]

    @cached_property
    def relatives(self) -> list[Item]:
        """Weights of the same shape, the nearest by name first."""
        mine = NUMBER.sub("*", self.name)
        same = [one for one in self.family.by_shape.get(self.item.floats.shape, ()) if one.name != self.name]
        same.sort(key=lambda one: (NUMBER.sub("*", one.name) != mine, _distance(one.name, self.name)))
        return same[:RELATIVES]


def _distance(one: str, other: str) -> float:
    mine, theirs = NUMBER.findall(one), NUMBER.findall(other)
    if len(mine) != len(theirs):
        return 1e9
    # The layer counts for more than the expert.
    return float(sum(1000.0**-i * abs(int(a) - int(b)) for i, (a, b) in enumerate(zip(mine, theirs, strict=True))))


class Relatives:
    """All weights of a subject, as relatives of each other."""

    def __init__(self, subject: Subject) -> None:
        self.subject = subject
        self.by_shape: dict[tuple[int, ...], list[Item]] = {}
        for item in subject.items:
            self.by_shape.setdefault(item.floats.shape, []).append(item)
        self._sketches: dict[tuple[str, str], torch.Tensor] = {}

    def base_sketch(self, item: Item) -> torch.Tensor:
        return self._sketch("base", item.name, before(item))

    def wanted_sketch(self, item: Item) -> torch.Tensor:
        return self._sketch("wanted", item.name, after(item))

    def change_sketch(self, item: Item) -> torch.Tensor:
        return self.wanted_sketch(item) - self.base_sketch(item)

    def _sketch(self, what: str, name: str, tensor: Tensor) -> torch.Tensor:
        if (what, name) not in self._sketches:
            self._sketches[what, name] = values(tensor, SKETCH)
            tensor.release()
        return self._sketches[what, name]


def before(item: Item) -> Tensor:
    """The weight without its change."""
    if item.merged is not None:
        return item.merged.base
    return item.base or item.floats


def after(item: Item) -> Tensor:
    """The weight with its change, not rounded."""
    return in_dtype(item.merged, F32) if item.merged is not None else item.floats
