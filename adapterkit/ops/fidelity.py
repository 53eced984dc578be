"""How much of a change survives rounding: sums over blocks, and the four numbers that come of them.

With W the base, D the change that was wanted (W' - W before rounding) and G the one that was written: relative size
|D|/|W|; unmoved, the share of entries where G is nothing; retention <G, D>/|D|^2, 1 when all of the change is there;
cosine <G, D>/(|G||D|), less than 1 by what rounding adds.
"""

from __future__ import annotations

from dataclasses import dataclass
from math import sqrt

import torch


@dataclass(frozen=True)
class Sums:
    """What is added up over blocks: entries, entries that moved, <W, W>, <D, D>, <G, D>, <G, G>."""

    count: float = 0.0
    moved: float = 0.0
    ww: float = 0.0
    dd: float = 0.0
    gd: float = 0.0
    gg: float = 0.0

    def __add__(self, other: Sums) -> Sums:
        return Sums(
            self.count + other.count,
            self.moved + other.moved,
            self.ww + other.ww,
            self.dd + other.dd,
            self.gd + other.gd,
            self.gg + other.gg,
        )


def block_sums(base: torch.Tensor, wanted: torch.Tensor, got: torch.Tensor) -> Sums:
    """The sums of one block.

    Products are summed in float32, which a block of 1 MB can bear, and blocks in float64.

    Args:
        base: W, of any floating dtype.
        wanted: W' before rounding, float32.
        got: what was written, of any floating dtype.
    """
    w = base.reshape(-1).float()
    d = wanted.reshape(-1) - w
    g = got.reshape(-1).float() - w
    # 1 where an entry moved: arithmetic, because comparisons are ten times slower than it.
    moved = (g * 1e38).clamp_(-1, 1)
    dots = (moved.dot(moved), w.dot(w), d.dot(d), g.dot(d), g.dot(g))
    return Sums(float(w.numel()), *(float(dot) for dot in dots))


@dataclass(frozen=True)
class Fidelity:
    """The four numbers of a tensor, or of many."""

    relative: float
    unmoved: float
    retention: float
    cosine: float

    @classmethod
    def of(cls, sums: Sums) -> Fidelity:
        """From summed blocks; a change of nothing is kept whole."""
        unmoved = 1 - sums.moved / sums.count if sums.count else 0.0
        if sums.dd == 0:
            return cls(0.0, unmoved, 1.0, 1.0)
        relative = sqrt(sums.dd / sums.ww) if sums.ww else float("inf")
        cosine = sums.gd / sqrt(sums.gg * sums.dd) if sums.gg else 0.0
        return cls(relative, unmoved, sums.gd / sums.dd, cosine)
