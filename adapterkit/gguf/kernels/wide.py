"""The inner loops of the searches for torch: products of all elements at once, sums row by row in C's order."""

from __future__ import annotations

from functools import cache
from typing import Any

import torch

LEVELS = (-127, -104, -83, -65, -49, -35, -22, -10, 1, 13, 25, 38, 53, 69, 89, 113)


def _summed(terms: torch.Tensor, count: int) -> tuple[torch.Tensor, ...]:
    """``count`` sums over the first dimension of ``terms`` [elements, count, ...], one element after the other."""
    first, *rows = terms.unbind(0)
    total = first + 0.0  # C starts at 0, which turns a first -0 into 0
    for row in rows:
        torch.add(total, row, out=total)
    return total.unbind(0) if count > 1 else (total,)


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
    terms = x.new_empty(n, 3, *x.shape[1:])
    wq = torch.mul(w, q, out=terms[:, 0])
    torch.mul(wq, q, out=terms[:, 1])
    torch.mul(wq, x, out=terms[:, 2])
    return _summed(terms, 3)


def grid_error(x: Any, w: Any, codes: Any, sub: Any, n: int, scale: Any, low: Any, absolute: bool) -> torch.Tensor:
    """See ``search._grid_error``."""
    d = codes[:, sub] * scale
    d.add_(low).sub_(x[:, sub])
    if absolute:
        d.abs_()
    else:
        torch.mul(d, d, out=d)
    d.mul_(w[:, sub])
    return _summed(d, 1)[0]


def symmetric_sums(
    x: Any, w: Any, wx: Any, sub: Any, n: int, inverse: Any, low: float, high: float
) -> tuple[torch.Tensor, ...]:
    """See ``search._symmetric_sums``."""
    x = x[:, sub]
    q = x * inverse
    q.clamp_(low, high).round_()
    terms = x.new_empty(n, 2, *x.shape[1:])
    torch.mul(wx[:, sub], q, out=terms[:, 0])
    torch.mul(w[:, sub], q, out=terms[:, 1]).mul_(q)
    return _summed(terms, 2)


def nonlinear_sums(x: Any, w: Any, sub: Any, inverse: Any) -> tuple[torch.Tensor, ...]:
    """See ``codebooks._nonlinear_sums``."""
    x = x[:, sub]
    level = nonlinear_value(x * inverse)
    terms = x.new_empty(x.shape[0], 2, *x.shape[1:])
    wq = torch.mul(w[:, sub], level, out=terms[:, 1])
    torch.mul(wq, x, out=terms[:, 0])
    wq.mul_(level)
    return _summed(terms, 2)


@cache
def _tables(device: torch.device) -> tuple[torch.Tensor, torch.Tensor]:
    """IQ4's levels, and the middles between them."""
    levels = torch.tensor(LEVELS, dtype=torch.float32, device=device)
    return levels, (levels[1:] + levels[:-1]) / 2


def nonlinear_index(value: torch.Tensor) -> torch.Tensor:
    """See ``codebooks._nonlinear_index``."""
    return torch.bucketize(value, _tables(value.device)[1], right=True, out_int32=True)


def nonlinear_value(value: torch.Tensor) -> torch.Tensor:
    """See ``codebooks._nonlinear_value``."""
    return _tables(value.device)[0][nonlinear_index(value)]
