"""The one door to the methods: scale, combine, compress."""

from __future__ import annotations

from math import isfinite
from typing import TYPE_CHECKING, Any

from adapterkit.errors import UsageError, counted
from adapterkit.ops.extract import low_rank
from adapterkit.ops.lowrank import Factors
from adapterkit.ops.rows import DeltaRows, common_shape, scaled
from adapterkit.ops.rules.registry import ANY_DELTAS, RULES, CombinationRule, find
from adapterkit.ops.threads import one_thread

if TYPE_CHECKING:
    from collections.abc import Sequence


def combine(
    parts: Sequence[DeltaRows],
    method: str = "linear",
    *,
    weights: Sequence[float] | None = None,
    scale: float = 1.0,
    space: str | None = None,
    rank: int | None = None,
    energy: float | None = None,
    key: str = "",
    base: DeltaRows | None = None,
    **parameters: Any,
) -> DeltaRows:
    """One delta out of several of the same weight.

    Args:
        parts: the deltas, [m, n] each; factors for every method that is not dense.
        method: a name of the table, ``RULES``.
        weights: one per part, any sign, 1 when left out. A rule sees w_t delta_t: weights come before trimming and
            election. A part of weight 0 is left out.
        scale: factor of the result (the lambda of the papers).
        space: ``knots``, ``core`` or ``ctm``: combine there, with ``method`` as the inner rule.
        rank: at most this rank in the result, which then is ``Factors``.
        energy: the smallest rank that keeps this share of the squared norm; the result then is ``Factors``.
        key: name of the tensor, part of the seed of random masks, so that each tensor gets its own.
        base: the rows of the weight itself, for methods that look at them.
        **parameters: those of the method.

    Returns:
        ``Factors`` from methods that are not dense, or when a rank or energy is asked for; else rows, computed
        when they are asked for.

    Raises:
        UsageError: an unknown method or parameter, a value out of range, or a delta that is not low-rank given to a
            method that needs factors.
        AdapterError: the shapes differ.
    """
    chosen, parameters = _chosen(method, space, parameters)
    common_shape(parts)
    weighted, kept = _weighted(parts, weights)
    left = [place for place, weight in enumerate(weights or ()) if weight == 0]
    if chosen.space != "dense" and chosen.name not in ANY_DELTAS:
        for part in weighted:
            if not isinstance(part, Factors):
                raise UsageError(
                    f"method {chosen.name} combines low-rank factors only",
                    "use a dense method, or extract factors first",
                )
    if rank is not None and any(p.name == "rank" for p in chosen.parameters):
        parameters.setdefault("rank", rank)
    bound = chosen.bind(parameters)
    for name, value in bound.items():
        if isinstance(value, tuple) and left and len(value) == len(parts):
            bound[name] = tuple(one for place, one in enumerate(value) if place not in left)
    if chosen.keyed:
        bound["key"] = key
    if chosen.based:
        if base is None:
            raise UsageError(
                f"method {chosen.name} looks at the base's own values, and an adapter alone has none",
                "fold it into the base with merge",
            )
        bound["base"] = base
    if chosen.weighted or (chosen.nested and RULES[bound["rule"]].weighted):
        bound["weights"] = kept
    with one_thread():
        result = scaled(chosen.function(weighted, **bound), _finite(scale, "scale"))
    if rank is None and energy is None:
        return result
    if isinstance(result, Factors) and energy is None and rank is not None and result.rank <= rank:
        return result
    return low_rank(result, rank=rank, energy=energy).factors


def _chosen(method: str, space: str | None, parameters: dict[str, Any]) -> tuple[CombinationRule, dict[str, Any]]:
    chosen = find(method)
    if space is None or space == "dense":
        return chosen, dict(parameters)
    outer = find(space)
    if not (outer.nested and chosen.inner):
        spaces = ", ".join(m.name for m in RULES.values() if m.nested)
        raise UsageError(f"method {chosen.name} cannot run in space {space!r}", f"dense and core rules run in {spaces}")
    return outer, {**parameters, "rule": chosen.name}


def _weighted(parts: Sequence[DeltaRows], weights: Sequence[float] | None) -> tuple[list[DeltaRows], tuple[float, ...]]:
    """The deltas times their weights, and the weights, without those that are 0."""
    if weights is None:
        return list(parts), (1.0,) * len(parts)
    if len(weights) != len(parts):
        given = counted(len(weights), "weight was", "weights were")
        raise UsageError(f"{given} given for {counted(len(parts), 'adapter')}", "give one weight per adapter")
    kept = [(part, _finite(w, "weight")) for part, w in zip(parts, weights, strict=True) if w != 0]
    if not kept:
        raise UsageError("every weight is 0, so nothing is left to combine", "give at least one adapter a weight")
    return [scaled(part, w) for part, w in kept], tuple(w for _, w in kept)


def _finite(value: float, name: str) -> float:
    if not isfinite(value):
        raise UsageError(f"{name} must be a finite number, got {value}")
    return value
