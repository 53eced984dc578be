"""The inner loops of the searches for torch: products of all elements at once, sums row by row in C's order."""

from __future__ import annotations

import threading
from functools import cache
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import torch
else:
    from adapterkit.ops._torch import torch

LEVELS = (-127, -104, -83, -65, -49, -35, -22, -10, 1, 13, 25, 38, 53, 69, 89, 113)


class Terms:
    """Scratch buffers ``[elements, count, ...]`` and views of their rows, reused: a fresh allocation costs page faults."""

    def __init__(self, x: torch.Tensor, count: int) -> None:
        held = x.new_empty(x.shape[0], count, *x.shape[1:])
        self.parts = held.unbind(1)
        self._rows = held.unbind(0)
        self._firsts = self.parts[0].unbind(0)

    def sums(self) -> tuple[torch.Tensor, ...]:
        """Of every part, over the elements, one after the other."""
        return _sum(self._rows).unbind(0)

    def sum(self) -> torch.Tensor:
        """Of the first part."""
        return _sum(self._firsts)


def _sum(rows: tuple[torch.Tensor, ...]) -> torch.Tensor:
    total = rows[0] + 0.0  # C starts at 0, which turns a first -0 into 0
    for row in rows[1:]:
        torch.add(total, row, out=total)
    return total


_kept = threading.local()


def _terms(x: torch.Tensor, count: int) -> Terms:
    held: dict[Any, Terms] = _kept.__dict__.setdefault("terms", {})
    key = (x.shape, x.device, count)
    if key not in held:
        held[key] = Terms(x, count)
    return held[key]


def forget() -> None:
    """Give this thread's room back."""
    _kept.__dict__.clear()


def grid_sums(
    x: Any, w: Any, codes: Any, sub: Any, n: int, inverse: Any, low: Any, top: float, exact: bool
) -> tuple[torch.Tensor, ...]:
    """See ``search._grid_sums``."""
    from adapterkit.gguf.kernels.rounding import clamp, nearest

    x, w, q = x[:, sub], w[:, sub], codes[:, sub]
    torch.sub(x, low, out=q)
    q.mul_(inverse)
    if exact:
        q.copy_(clamp(nearest(q).float(), 0.0, top))
    else:
        q.clamp_(0.0, top).round_()
    terms = _terms(x, 3)
    wq, wqq, wqx = terms.parts
    torch.mul(w, q, out=wq)
    torch.mul(wq, q, out=wqq)
    torch.mul(wq, x, out=wqx)
    return terms.sums()


def grid_error(x: Any, w: Any, codes: Any, sub: Any, n: int, scale: Any, low: Any, absolute: bool) -> torch.Tensor:
    """See ``search._grid_error``."""
    x = x[:, sub]
    terms = _terms(x, 3)
    d = terms.parts[0]
    torch.mul(codes[:, sub], scale, out=d).add_(low).sub_(x)
    if absolute:
        d.abs_()
    else:
        torch.mul(d, d, out=d)
    d.mul_(w[:, sub])
    return terms.sum()


def symmetric_sums(
    x: Any, w: Any, wx: Any, sub: Any, n: int, inverse: Any, low: float, high: float
) -> tuple[torch.Tensor, ...]:
    """See ``search._symmetric_sums``."""
    x = x[:, sub]
    (q,) = _terms(x, 1).parts
    torch.mul(x, inverse, out=q).clamp_(low, high).round_()
    terms = _terms(x, 2)
    wxq, wqq = terms.parts
    torch.mul(wx[:, sub], q, out=wxq)
    torch.mul(w[:, sub], q, out=wqq).mul_(q)
    return terms.sums()


def nonlinear_sums(x: Any, w: Any, sub: Any, inverse: Any) -> tuple[torch.Tensor, ...]:
    """See ``codebooks._nonlinear_sums``."""
    x = x[:, sub]
    level = nonlinear_value(x * inverse)
    terms = _terms(x, 2)
    wqx, wqq = terms.parts
    torch.mul(w[:, sub], level, out=wqq)
    torch.mul(wqq, x, out=wqx)
    wqq.mul_(level)
    return terms.sums()


@cache
def _tables(device: torch.device) -> tuple[torch.Tensor, torch.Tensor]:
    """IQ4's levels, and the middles between them."""
    levels = torch.tensor(LEVELS, dtype=torch.float32).to(device)
    return levels, (levels[1:] + levels[:-1]) / 2


def nonlinear_index(value: torch.Tensor) -> torch.Tensor:
    """See ``codebooks._nonlinear_index``."""
    return torch.bucketize(value, _tables(value.device)[1], right=True, out_int32=True)


def nonlinear_value(value: torch.Tensor) -> torch.Tensor:
    """See ``codebooks._nonlinear_value``."""
    return _tables(value.device)[0][nonlinear_index(value)]
