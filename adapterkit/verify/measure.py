"""What a block of a tensor shows: how much of the change is there, and how far it is from the formula.

With W the base, D the change that was trained (W' - W before rounding) and G what is there (found - W).
"""

from __future__ import annotations

from dataclasses import astuple, dataclass
from math import sqrt

import torch

_SPACING = {torch.bfloat16: 2.0**-7, torch.float16: 2.0**-10, torch.float32: 2.0**-23, torch.float64: 2.0**-52}


@dataclass(frozen=True)
class Sums:
    """Sums over entries: how many, how many moved, <W,W>, <D,D>, <G,D>, <G,G>, and <G-D, G-D>."""

    count: float = 0.0
    moved: float = 0.0
    ww: float = 0.0
    dd: float = 0.0
    gd: float = 0.0
    gg: float = 0.0
    ee: float = 0.0

    def __add__(self, other: Sums) -> Sums:
        return Sums(*(mine + theirs for mine, theirs in zip(astuple(self), astuple(other), strict=True)))

    @property
    def relative(self) -> float:
        """\\|D|/|W|"""
        return sqrt(self.dd / self.ww) if self.ww else 0.0

    @property
    def retention(self) -> float:
        """<G,D>/|D|^2; 1 for a change of nothing."""
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
    def off(self) -> float:
        """\\|G-D|/|W|"""
        return sqrt(self.ee / self.ww) if self.ww else (1.0 if self.ee else 0.0)

    @property
    def uncertainty(self) -> float:
        """Standard error of the retention, were the error noise that knows nothing of D."""
        return sqrt(self.ee / self.dd / self.count) if self.dd and self.count else 0.0


def block_sums(base: torch.Tensor, wanted: torch.Tensor, found: torch.Tensor) -> Sums:
    """The sums of one block; all three of one size, of any floating dtype. Products are summed in float32."""
    w = base.reshape(-1).float()
    new, there = wanted.reshape(-1).float(), found.reshape(-1).float()
    d, g, e = new - w, there - w, there - new
    moved = (g * 1e38).clamp_(-1, 1)  # 1 where an entry moved: arithmetic, because comparisons are much slower
    dots = (moved.dot(moved), w.dot(w), d.dot(d), g.dot(d), g.dot(g), e.dot(e))
    return Sums(float(w.numel()), *(float(dot) for dot in dots))


def steps(base: torch.Tensor, wanted: torch.Tensor, found: torch.Tensor) -> float:
    """The largest distance of ``found`` to ``wanted``, in steps of found's dtype at that value: 0.5 is what rounding
    to the nearest gives, up to 1 what rounding once more gives. Infinite where the one is finite and the other not.

    Beside the step of the value itself, that of the change counts, and that of the block's root mean square change: a tool
    that rounds the change, or sums its products in another order, is off by so much where W' is near zero.
    """
    w, new, there = (t.reshape(-1).float() for t in (base, wanted, found))
    if not new.numel():
        return 0.0
    spacing = _SPACING[found.dtype]
    off = (there - new).abs_()
    if not torch.isfinite(off).all():
        same = (there == new) | (there.isnan() & new.isnan())
        if not bool(same[~torch.isfinite(off)].all()):
            return float("inf")
        off[same] = 0
    change = (new - w).nan_to_num_(0, 0, 0).abs_()
    change += change.square().mean().sqrt()
    # The power of two below a float32 is its exponent's bits.
    largest = torch.maximum(new.abs(), there.abs()).nan_to_num_(0, 0, 0)
    step = (largest.view(torch.int32) & 0x7F800000).view(torch.float32)
    step += change
    return float((off / step.mul_(spacing).clamp_(min=1e-44)).max())
