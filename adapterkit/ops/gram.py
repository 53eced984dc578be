"""Inner products between deltas of one weight."""

from __future__ import annotations

from typing import TYPE_CHECKING

from adapterkit.ops.lowrank import Factors
from adapterkit.ops.measure import inner
from adapterkit.ops.rows import DeltaRows, blocks, common_shape

if TYPE_CHECKING:
    from collections.abc import Sequence


def inner_products(parts: Sequence[DeltaRows]) -> list[list[float]]:
    """The inner products of all pairs, in float64."""
    count = len(parts)
    factors = [part for part in parts if isinstance(part, Factors)]
    if len(factors) == count:
        return [[inner(factors[i], factors[j]) for j in range(count)] for i in range(count)]
    found = [[0.0] * count for _ in range(count)]
    for start, stop in blocks(common_shape(parts)):
        rows = [part.rows(start, stop).double() for part in parts]
        for i in range(count):
            for j in range(i + 1):
                found[i][j] += float((rows[i] * rows[j]).sum())
    return [[found[max(i, j)][min(i, j)] for j in range(count)] for i in range(count)]
