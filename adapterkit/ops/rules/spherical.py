"""Rules on the sphere: the deltas of one weight as vectors, between whose directions is turned, not blended.

Each gives a weighted sum of the deltas whose coefficients depend on the deltas themselves, and only on their inner products.
So those are taken once (of low-rank deltas without forming any), the rest is arithmetic on a small matrix, and sums of low-rank
deltas stay low-rank. mergekit's rules of the same names act so on task vectors, that is, where its ``base_model`` is given.
"""

from __future__ import annotations

from math import acos, cos, fsum, sin, sqrt
from typing import TYPE_CHECKING, Annotated

from adapterkit.errors import UsageError
from adapterkit.ops.gram import inner_products
from adapterkit.ops.lowrank import Factors, stack
from adapterkit.ops.rows import ComputedRows, DeltaRows, add, common_shape
from adapterkit.ops.rules.registry import Range, rule

if TYPE_CHECKING:
    from collections.abc import Sequence

    import torch

_ALIKE = 0.9995  # cosine above which two directions are blended: the turn between them is lost in rounding
_SMALL = 1e-12


@rule(paper="", space="core", inner=True)
def slerp(
    parts: Sequence[DeltaRows], *, t: Annotated[float, Range(0, 1), "where between the first and the second"] = 0.5
) -> DeltaRows:
    """Spherical interpolation between two deltas: their directions turn at constant speed (slerp).

    Shoemake, SIGGRAPH 1985: (sin((1 - t) a) x + sin(t a) y) / sin(a), a the angle between x and y.
    """
    _two(parts, "slerp")
    return _summed(parts, between(inner_products(parts), t))


@rule(paper="", space="core", inner=True)
def nuslerp(parts: Sequence[DeltaRows], *, weights: Sequence[float] = ()) -> DeltaRows:
    """Spherical interpolation whose place is the weights' (nuslerp): t = w_2 / (w_1 + w_2)."""
    _two(parts, "nuslerp")
    shares = _shares(weights, "nuslerp")
    # What came in is w x already. However alike two are, mergekit turns between them.
    gram = _unweighted(inner_products(parts), weights)
    return _summed(parts, [c / w for c, w in zip(between(gram, shares[1], 1.0), weights, strict=True)])


@rule(paper="", space="core", inner=True)
def multislerp(parts: Sequence[DeltaRows], *, weights: Sequence[float] = ()) -> DeltaRows:
    """Any number of deltas on the sphere: blended in the plane that touches it at their mean (multislerp).

    With u_i the directions, w_i the weights (summing to 1) and m the direction of sum w_i u_i: the vectors from m to u_i along
    the plane that touches the sphere at m are averaged and mapped back; the length is the mean of the norms.
    """
    shares = _shares(weights, "multislerp")
    gram = _unweighted(inner_products(parts), weights)
    return _summed(parts, [c / w for c, w in zip(tangent_mean(gram, shares), weights, strict=True)])


@rule(paper="", space="core", inner=True)
def karcher(
    parts: Sequence[DeltaRows],
    *,
    steps: Annotated[int, Range(1), "most steps towards the mean"] = 100,
    weights: Sequence[float] = (),
) -> DeltaRows:
    """The mean of the directions by angles, at the mean of the norms (Karcher mean).

    Karcher, Comm. Pure Appl. Math. 1977: the point with the smallest squared angles to all, found by fixed-point steps
    along the mean of the logarithms.
    """
    shares = _shares(weights, "karcher")
    gram = _unweighted(inner_products(parts), weights)
    return _summed(parts, [c / w for c, w in zip(mean_by_angles(gram, shares, steps), weights, strict=True)])


def tangent_mean(gram: list[list[float]], shares: Sequence[float]) -> list[float]:
    """The coefficients of `multislerp` for vectors with these inner products and shares, which add up to 1.

    Raises:
        UsageError: the vectors cancel out.
    """
    norms, units, mean = _start(gram, shares)
    if not any(mean):
        return mean
    dots = [_dot(mean, _one(i, units), gram) for i in range(len(shares))]
    along = fsum(w * d for w, d in zip(shares, dots, strict=True))
    tangent = [w * u - along * m for w, u, m in zip(shares, units, mean, strict=True)]
    turn = _norm(tangent, gram)
    found = (
        mean if turn < _SMALL else [m * cos(turn) + t * sin(turn) / turn for m, t in zip(mean, tangent, strict=True)]
    )
    length = fsum(w * n for w, n in zip(shares, norms, strict=True))
    return [length * c for c in found]


def mean_by_angles(
    gram: list[list[float]], shares: Sequence[float], steps: int, tolerance: float = 1e-9
) -> list[float]:
    """The coefficients of `karcher` for vectors with these inner products and shares, which add up to 1.

    It ends after ``steps``, or before one that would turn by less than ``tolerance`` (radians).

    Raises:
        UsageError: the vectors cancel out.
    """
    count = len(shares)
    norms, units, found = _start(gram, shares)
    if not any(found):
        return found
    length = fsum(w * n for w, n in zip(shares, norms, strict=True))
    # A vector of zeros has no direction, and takes no part in the mean of them.
    pointing = fsum(w for w, n in zip(shares, norms, strict=True) if n)
    for _ in range(steps):
        step = [0.0] * count
        for i, share in enumerate(shares):
            if not norms[i]:
                continue
            dot = max(-1.0, min(1.0, _dot(found, _one(i, units), gram)))
            angle = acos(dot)
            factor = share / pointing * (angle / sin(angle) if angle > _SMALL and sin(angle) > _SMALL else 1.0)
            step = [s - factor * dot * f for s, f in zip(step, found, strict=True)]
            step[i] += factor * units[i]
        turn = _norm(step, gram)
        if turn < tolerance:
            break
        found = [f * cos(turn) + s * sin(turn) / turn for f, s in zip(found, step, strict=True)]
    return [length * c for c in found]


def _start(gram: list[list[float]], shares: Sequence[float]) -> tuple[list[float], list[float], list[float]]:
    """Norms, what makes unit vectors of them, and the direction of the weighted sum of those; zeros where all are zero."""
    norms = [sqrt(max(gram[i][i], 0.0)) for i in range(len(shares))]
    units = [1 / norm if norm else 0.0 for norm in norms]
    mean = [w * u for w, u in zip(shares, units, strict=True)]
    if not any(norms):
        return norms, units, mean
    size = _norm(mean, gram)
    if size < _SMALL:
        raise UsageError("the deltas point in opposite directions, so they have no mean on the sphere", "use linear")
    return norms, units, [c / size for c in mean]


def _two(parts: Sequence[DeltaRows], name: str) -> None:
    if len(parts) != 2:
        raise UsageError(f"method {name} goes between two adapters, got {len(parts)}", "use multislerp or karcher")


def _shares(weights: Sequence[float], name: str) -> list[float]:
    if any(weight <= 0 for weight in weights):
        raise UsageError(f"method {name} takes weights above 0", "leave out the adapter, or use linear")
    return [weight / fsum(weights) for weight in weights]


def _unweighted(gram: list[list[float]], weights: Sequence[float]) -> list[list[float]]:
    return [[gram[i][j] / (weights[i] * weights[j]) for j in range(len(gram))] for i in range(len(gram))]


def between(gram: list[list[float]], t: float, alike_above: float = _ALIKE) -> list[float]:
    """The coefficients of slerp; vectors with a larger cosine than ``alike_above`` are blended."""
    size = sqrt(max(gram[0][0] * gram[1][1], 0.0))
    alike = max(-1.0, min(1.0, gram[0][1] / size)) if size else 1.0
    angle = acos(alike)
    if abs(alike) > alike_above or sin(angle) < _SMALL:
        return [1 - t, t]
    return [sin((1 - t) * angle) / sin(angle), sin(t * angle) / sin(angle)]


def _one(index: int, units: Sequence[float]) -> list[float]:
    return [unit if i == index else 0.0 for i, unit in enumerate(units)]


def _dot(x: Sequence[float], y: Sequence[float], gram: list[list[float]]) -> float:
    return fsum(a * b * gram[i][j] for i, a in enumerate(x) for j, b in enumerate(y))


def _norm(x: Sequence[float], gram: list[list[float]]) -> float:
    return sqrt(max(_dot(x, x, gram), 0.0))


def _summed(parts: Sequence[DeltaRows], coefficients: Sequence[float]) -> DeltaRows:
    factors = [part for part in parts if isinstance(part, Factors)]
    if len(factors) == len(parts):
        return stack(factors, list(coefficients))

    def block(start: int, stop: int) -> torch.Tensor:
        rows = [part.rows(start, stop).double() * c for part, c in zip(parts, coefficients, strict=True)]
        return add(rows).float()

    return ComputedRows(common_shape(parts), block)
