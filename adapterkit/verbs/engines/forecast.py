"""What workers would take, from the plan alone."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from adapterkit.checkpoint.cut import cost_of, shares
from adapterkit.verbs.report import Forecast

if TYPE_CHECKING:
    from adapterkit.checkpoint.cut import PlanPart

CORE = 0.8e9
"""Bytes of a plain merge, read and written, that a core computes in a second (bench/results/merge.json, rounded)."""
OPENING, OF_A_TENSOR = 2.0, 30e-6
"""Seconds that a worker takes to start and open a plan whole, and for each of its tensors (bench/results/huge.json, rounded).
One that has a few parts opens less."""


def seconds_of(part: PlanPart, bandwidth: float, jobs: int) -> float:
    """How long a worker has to do with a part: as long as the slowest of reading, writing and computing."""
    computed = sum(cost_of(step) for step in part.steps if step.source is None)
    return max(part.reads / bandwidth, part.nbytes / bandwidth, computed / (CORE * jobs))


def opening(tensors: int) -> float:
    """How long a worker that opens the whole plan takes until it can begin."""
    return OPENING + OF_A_TENSOR * tensors


def forecast(parts: Sequence[PlanPart], count: int, *, bandwidth: float, price: float, jobs: int) -> Forecast:
    """The forecast for so many workers.

    Args:
        bandwidth: of a worker, in bytes a second, in each direction.
        price: of an hour of a worker.
        jobs: threads of a worker.
    """
    working = min(count, len(parts))
    start = opening(sum(len(part.steps) for part in parts))
    loads = [start + sum(seconds_of(part, bandwidth, jobs) for part in share) for share in shares(parts, working)]
    seconds = max(loads)
    return Forecast(
        workers=count,
        parts=len(parts),
        bytes_down=sum(part.reads for part in parts),
        bytes_up=sum(part.nbytes for part in parts),
        seconds=seconds,
        busy=sum(loads) / (count * seconds),
        money=price * count * seconds / 3600,
        bandwidth=bandwidth,
        jobs=jobs,
    )
