"""Rules that look at the base's own values beside the deltas: of a whole model W' = W + delta, not of the change alone."""

from __future__ import annotations

from math import acos, sin, sqrt
from typing import TYPE_CHECKING, Annotated

from adapterkit.errors import UsageError
from adapterkit.ops.rows import ComputedRows, DeltaRows, blocks, common_shape
from adapterkit.ops.rules.registry import Range, rule
from adapterkit.ops.select import kth_magnitudes

if TYPE_CHECKING:
    from collections.abc import Sequence

    import torch

_ALIKE = 0.9995  # as in `adapterkit.ops.rules.spherical`
_EPS = 1e-8


@rule(paper="", space="dense", inner=False)
def slerp_weights(
    deltas: Sequence[DeltaRows],
    *,
    t: Annotated[float, Range(0, 1), "where between the base and the model"] = 0.5,
    base: DeltaRows,
) -> DeltaRows:
    """Spherical interpolation between the weights of the base and of one model: what mergekit calls slerp.

    Shoemake, SIGGRAPH 1985: (sin((1 - t) a) W + sin(t a) W') / sin(a), a the angle between W and W' as vectors. Weights that
    point nearly the same way (cosine above 0.9995) are blended. `slerp` turns between two changes instead.
    """
    delta = _one(deltas, "slerp-weights")
    of_base = of_model = dot = 0.0
    for start, stop in blocks(delta.shape):
        w = base.rows(start, stop).double()
        model = w + delta.rows(start, stop).double()
        of_base, of_model, dot = of_base + _sum(w * w), of_model + _sum(model * model), dot + _sum(w * model)
    norms = [sqrt(square) if sqrt(square) > _EPS else 1.0 for square in (of_base, of_model)]
    alike = max(-1.0, min(1.0, dot / norms[0] / norms[1]))
    first, second = 1 - t, t
    if abs(alike) <= _ALIKE:
        angle = acos(alike)
        first, second = sin((1 - t) * angle) / sin(angle), sin(t * angle) / sin(angle)

    def block(start: int, stop: int) -> torch.Tensor:
        w = base.rows(start, stop).double()
        return ((first + second - 1) * w + second * delta.rows(start, stop).double()).float()

    return ComputedRows(delta.shape, block)


@rule(paper="", space="dense", inner=False)
def arcee_fusion(deltas: Sequence[DeltaRows], *, base: DeltaRows) -> DeltaRows:
    """The entries of one model's change that matter most, by size and moved softmax (Arcee Fusion).

    As mergekit has it: importance = abs(delta) KL(softmax(W') || softmax(W)) by rows, with 1e-8 added to each probability.
    Entries at or above median + 1.5 (q3 - q1) of it are taken. The quartiles are exact here; of larger tensors mergekit samples
    a million entries.
    """
    delta = _one(deltas, "arcee-fusion")
    rows, columns = delta.shape
    # A vector is one row to the softmax.
    flat = columns == 1

    def importance(start: int, stop: int) -> torch.Tensor:
        import torch

        change, w = delta.rows(start, stop), base.rows(start, stop)
        if not flat:
            p, q = (torch.softmax(one.float(), dim=-1) + _EPS for one in (w + change, w))
            return change.abs() * (p * torch.log(p / q)).sum(-1, keepdim=True)
        return change.abs() * divergence

    divergence = _divergence(delta, base) if flat else 0.0
    scores = ComputedRows(delta.shape, importance)
    count = rows * columns
    # The k-th smallest is the (n - k)-th largest, counted from 0.
    quartiles = kth_magnitudes(scores, [count - int(q * (count - 1)) for q in (0.25, 0.5, 0.75)])
    threshold = quartiles[1] + 1.5 * (quartiles[2] - quartiles[0])

    def block(start: int, stop: int) -> torch.Tensor:
        import torch

        return torch.where(importance(start, stop) >= threshold, delta.rows(start, stop), 0.0)

    return ComputedRows(delta.shape, block)


def _divergence(delta: DeltaRows, base: DeltaRows) -> float:
    """KL(softmax(W') || softmax(W)) of a vector."""
    import torch

    w, change = (one.rows(0, delta.shape[0]).flatten().float() for one in (base, delta))
    p, q = (torch.softmax(one, dim=-1) + _EPS for one in (w + change, w))
    return float((p * torch.log(p / q)).sum())


def _one(deltas: Sequence[DeltaRows], name: str) -> DeltaRows:
    common_shape(deltas)
    if len(deltas) != 1:
        raise UsageError(f"method {name} is between the base and one model, and got {len(deltas)}", "name one model")
    return deltas[0]


def _sum(values: torch.Tensor) -> float:
    return float(values.sum())
