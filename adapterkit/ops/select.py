"""Exact order statistics and sums of streamed deltas, the same whatever the block size."""

from __future__ import annotations

from math import fsum
from typing import TYPE_CHECKING

from adapterkit.errors import AdapterError
from adapterkit.ops.rows import blocks, device_of

if TYPE_CHECKING:
    from collections.abc import Sequence

    import torch

    from adapterkit.ops.rows import DeltaRows
else:
    from adapterkit.ops._torch import torch

_LOW = 16
_BUCKETS = 1 << (31 - _LOW)
_INF_BUCKET = 0x7F800000 >> _LOW


def kth_magnitudes(delta: DeltaRows, ks: Sequence[int]) -> list[float]:
    """The ``k``-th largest absolute value of a delta for each ``k`` (1 = the largest), exactly.

    A radix select: for non-negative float32 the order of the values is the order of their bits, so two histograms
    (upper 15 bits, then the lower 16 bits inside the buckets wanted) find each value in two passes.

    Raises:
        AdapterError: an entry is NaN or infinite.
    """
    m, n = delta.shape
    if not ks:
        return []
    if min(ks) < 1 or max(ks) > m * n:
        raise ValueError(f"k must be in 1..{m * n}")
    where = device_of(delta)
    coarse = torch.zeros(_BUCKETS, dtype=torch.int64, device=where)
    for start, stop in blocks(delta.shape):
        coarse += torch.bincount(_bits(delta.rows(start, stop)) >> _LOW, minlength=_BUCKETS)
    if int(coarse[_INF_BUCKET:].sum()):
        raise AdapterError("a delta has NaN or infinite entries", "check the adapter it came from")
    places = [_locate(coarse, k) for k in ks]
    fine = {bucket: torch.zeros(1 << _LOW, dtype=torch.int64, device=where) for bucket, _ in places}
    for start, stop in blocks(delta.shape):
        bits = _bits(delta.rows(start, stop))
        upper = bits >> _LOW
        for bucket, histogram in fine.items():
            lower = bits[upper == bucket] & ((1 << _LOW) - 1)
            histogram += torch.bincount(lower, minlength=1 << _LOW)
    found = [(bucket << _LOW) | _locate(fine[bucket], rest)[0] for bucket, rest in places]
    return [float(v) for v in torch.tensor(found, dtype=torch.int32).view(torch.float32)]


def _bits(rows: torch.Tensor) -> torch.Tensor:
    return rows.abs().view(torch.int32).flatten()


def _locate(histogram: torch.Tensor, k: int) -> tuple[int, int]:
    """The bucket of the k-th largest item, and which largest item of that bucket it is."""
    from_top = histogram.flip(0).cumsum(0)
    place = int(torch.searchsorted(from_top, k))
    above = int(from_top[place - 1]) if place else 0
    return len(histogram) - 1 - place, k - above


def energy(delta: DeltaRows) -> float:
    """The squared Frobenius norm in float64."""
    return fsum(v for start, stop in blocks(delta.shape) for v in row_energies(delta.rows(start, stop)))


def row_energies(rows: torch.Tensor) -> list[float]:
    """The squared norm of each row, added in an order that depends on the row alone."""
    # torch.sum may split a block differently by its height; halving adds the same pairs whatever the block.
    squares = rows.double().square()
    while squares.shape[1] > 1:
        half = (squares.shape[1] + 1) // 2
        rest = squares[:, half:]
        squares = squares[:, :half].clone()
        squares[:, : rest.shape[1]] += rest
    return [float(v) for v in squares.flatten().cpu().tolist()]
