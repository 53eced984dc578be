"""How far a block of a tensor is from the formula, in steps of its dtype.

With W the base and W' what was trained, before rounding.
"""

from __future__ import annotations

import torch

_SPACING = {torch.bfloat16: 2.0**-7, torch.float16: 2.0**-10, torch.float32: 2.0**-23, torch.float64: 2.0**-52}


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
