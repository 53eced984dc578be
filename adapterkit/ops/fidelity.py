"""How much of a change survives rounding: sums over blocks, and the numbers that come of them.

With W the base, D the change that was wanted (W' - W before rounding) and G the one that was written: relative size
|D|/|W|; unmoved, the share of entries where G is nothing; retention <G, D>/|D|^2, 1 when all of the change is there;
cosine <G, D>/(|G||D|), less than 1 by what rounding adds; error |G-D|/|D|, and the same with every column weighed by how
strongly inputs use it.
"""

from __future__ import annotations

from dataclasses import dataclass, fields, replace
from math import isfinite, sqrt
from operator import attrgetter

import torch

from adapterkit.ops.threads import one_thread


@dataclass(frozen=True)
class FidelitySums:
    """Sums over entries: how many, how many moved, <W, W>, <D, D>, <G, D>, <G, G>, and <G-D, G-D> where it is asked for; and
    how many entries were left out because W, W' or what was written is NaN or infinite there (``odd``), and at how many of
    them W' is neither (``lost``). ``weighed_ee`` and ``weighed_dd`` are <G-D, G-D> and <D, D> with each column times its
    importance, of blocks that have one."""

    count: float = 0.0
    moved: float = 0.0
    ww: float = 0.0
    dd: float = 0.0
    gd: float = 0.0
    gg: float = 0.0
    ee: float = 0.0
    odd: float = 0.0
    lost: float = 0.0
    weighed_ee: float = 0.0
    weighed_dd: float = 0.0

    def __add__(self, other: FidelitySums) -> FidelitySums:
        return FidelitySums(*(mine + theirs for mine, theirs in zip(self.values(), other.values(), strict=True)))

    def values(self) -> tuple[float, ...]:
        """The sums in the order of the fields, without the deep copies of ``dataclasses.astuple``."""
        found: tuple[float, ...] = _VALUES(self)
        return found

    def scaled(self, factor: float) -> FidelitySums:
        """The sums, scaled as if ``factor`` times as many entries had been measured; the counts stay."""
        made = FidelitySums(*(value * factor for value in self.values()))
        return replace(made, odd=self.odd, lost=self.lost)

    @property
    def relative(self) -> float:
        """\\|D|/|W|"""
        return sqrt(self.dd / self.ww) if self.ww else 0.0

    @property
    def retention(self) -> float:
        """<G, D>/|D|^2; 1 for a change of nothing."""
        return self.gd / self.dd if self.dd else 1.0

    @property
    def cosine(self) -> float:
        if not self.dd:
            return 1.0
        return self.gd / sqrt(self.gg * self.dd) if self.gg else 0.0

    @property
    def unmoved(self) -> float:
        return 1 - self.moved / self.count if self.count else 0.0

    @property
    def error(self) -> float:
        """\\|G-D|/|D|; as a part of |W| where nothing was trained."""
        return sqrt(self.ee / self.dd) if self.dd else self.off

    @property
    def weighed_error(self) -> float | None:
        """The error with each column times its importance; None where no block had one."""
        return sqrt(self.weighed_ee / self.weighed_dd) if self.weighed_dd else None

    @property
    def off(self) -> float:
        """\\|G-D|/|W|"""
        return sqrt(self.ee / self.ww) if self.ww else (1.0 if self.ee else 0.0)

    @property
    def uncertainty(self) -> float:
        """Standard error of the retention, were the error noise that knows nothing of D."""
        return sqrt(self.ee / self.dd / self.count) if self.dd and self.count else 0.0


@one_thread()
def block_sums(
    base: torch.Tensor,
    wanted: torch.Tensor,
    got: torch.Tensor,
    *,
    error: bool = False,
    importance: torch.Tensor | None = None,
) -> FidelitySums:
    """The sums of one block.

    Products are summed in float32, which a block of 1 MB can bear, and blocks in float64. On one thread, as more of them add
    in another order: that is the sixth digit of a figure in a record.

    Args:
        base: W, of any floating dtype.
        wanted: W' before rounding, of any floating dtype.
        got: what was written, of any floating dtype.
        error: <G-D, G-D> too.
        importance: float32 ``[columns]``, the mean square of each column's inputs, where the block is whole rows of them.
    """
    w, new, there = (tensor.reshape(-1).float() for tensor in (base, wanted, got))
    odd = lost = 0
    d, g = new - w, there - w
    dots = _dots(w, d, g, there - new if error else None)
    if not all(map(isfinite, dots)):  # a value that is not finite has a square that is not
        right = torch.isfinite(w) & torch.isfinite(new)
        kept = right & torch.isfinite(there)
        odd, lost = w.numel() - int(kept.sum()), int((right & ~kept).sum())
        if odd:
            w, new, there = w[kept], new[kept], there[kept]
            d, g = new - w, there - w
            dots = _dots(w, d, g, there - new if error else None)
    if not all(map(isfinite, dots)):  # squares that float32 cannot hold
        moved, w, d, g = dots[0], _double(w), _double(d), _double(g)
        dots = [moved, *_dots(w, d, g, d - g if error else None)[1:]]
    sums = FidelitySums(float(w.numel()), *dots)
    if importance is not None and not odd and w.numel() % len(importance) == 0:
        off, change = (_double(v.view(-1, len(importance))).square().sum(0) for v in (g - d, d))
        by = _double(importance).to(off.device)
        sums = replace(sums, weighed_ee=float(off @ by), weighed_dd=float(change @ by))
    return replace(sums, odd=float(odd), lost=float(lost)) if odd else sums


def _dots(w: torch.Tensor, d: torch.Tensor, g: torch.Tensor, e: torch.Tensor | None) -> list[float]:
    """How many entries moved, <W, W>, <D, D>, <G, D>, <G, G>, and <E, E> where there is an E."""
    # 1 where an entry moved: arithmetic, because comparisons are ten times slower than it.
    moved = (g * 1e38).clamp_(-1, 1)
    dots = [moved.dot(moved), w.dot(w), d.dot(d), g.dot(d), g.dot(g), *(() if e is None else (e.dot(e),))]
    return [float(one) for one in dots]


def _double(values: torch.Tensor) -> torch.Tensor:
    """In float64, on the CPU where the device has none (Metal)."""
    return (values.cpu() if values.device.type == "mps" else values).double()


_VALUES = attrgetter(*(one.name for one in fields(FidelitySums)))


@dataclass(frozen=True)
class Fidelity:
    """The numbers of a tensor, or of many: ``error`` where it was asked for, ``weighed`` where there was importance."""

    relative: float
    unmoved: float
    retention: float
    cosine: float
    error: float = 0.0
    weighed: float | None = None

    @classmethod
    def of(cls, sums: FidelitySums) -> Fidelity:
        """From summed blocks; a change of nothing is kept whole."""
        if sums.dd == 0:
            return cls(0.0, sums.unmoved, 1.0, 1.0)
        relative = sums.relative if sums.ww else float("inf")
        return cls(relative, sums.unmoved, sums.retention, sums.cosine, sums.error, sums.weighed_error)
