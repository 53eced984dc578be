"""Rules on the sphere of whole weights: the base is one of the models, and what is turned is W, not a change of it.

mergekit's rules of the same names act so where no ``base_model`` is given. The weights W_i = W + delta_i and W itself are sums
of W and the deltas, so their inner products are those of W and the deltas, taken once.
"""

from __future__ import annotations

from math import fsum
from typing import TYPE_CHECKING, Annotated

from adapterkit.errors import UsageError
from adapterkit.ops.gram import inner_products
from adapterkit.ops.rows import ComputedRows, DeltaRows, common_shape
from adapterkit.ops.rules.registry import Range, rule
from adapterkit.ops.rules.spherical import between, mean_by_angles, tangent_mean

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    import torch

Own = Annotated[float, Range(0), "weight of the base itself, which is one of the models"]


@rule(paper="", space="dense", inner=False)
def nuslerp_weights(
    deltas: Sequence[DeltaRows], *, own: Own = 1.0, weights: Sequence[float] = (), base: DeltaRows
) -> DeltaRows:
    """Spherical interpolation between the weights of the base and of one model, at the place that both weights say."""
    if len(deltas) != 1:
        raise UsageError(
            f"method nuslerp-weights goes between the base and one model, and got {len(deltas)}",
            "use multislerp-weights",
        )
    return _of_whole(deltas, own, weights, base, lambda gram, shares: between(gram, shares[1], 1.0))


@rule(paper="", space="dense", inner=False)
def multislerp_weights(
    deltas: Sequence[DeltaRows], *, own: Own = 1.0, weights: Sequence[float] = (), base: DeltaRows
) -> DeltaRows:
    """The weights of the base and of models on the sphere, blended in the plane that touches it at their mean.

    `multislerp` has the formula; it blends changes of the base instead.
    """
    return _of_whole(deltas, own, weights, base, tangent_mean)


@rule(paper="2603.04972", space="dense", inner=False)
def karcher_weights(
    deltas: Sequence[DeltaRows],
    *,
    own: Own = 1.0,
    steps: Annotated[int, Range(1), "most steps towards the mean"] = 10,
    tolerance: Annotated[float, Range(0), "radians; a smaller step is the last"] = 1e-5,
    weights: Sequence[float] = (),
    base: DeltaRows,
) -> DeltaRows:
    """The mean of the weights of the base and of models by angles, at the mean of their norms.

    `karcher` has the formula; it is the mean of changes of the base instead.
    """
    return _of_whole(deltas, own, weights, base, lambda gram, shares: mean_by_angles(gram, shares, steps, tolerance))


def _of_whole(
    deltas: Sequence[DeltaRows],
    own: float,
    weights: Sequence[float],
    base: DeltaRows,
    coefficients: Callable[[list[list[float]], Sequence[float]], list[float]],
) -> DeltaRows:
    """What a rule makes of W and each W + delta_i, less W.

    Args:
        deltas: times their weights.
        own: the weight of W.
        coefficients: of the rule, for inner products and shares of W and each W + delta_i.
    """
    if any(weight < 0 for weight in weights):
        raise UsageError("a mean of whole weights takes no weight below 0", "leave out the model")
    weights = weights or (1.0,) * len(deltas)
    gram = inner_products([base, *deltas])
    # The products of W and the changes, without the weights that these came with.
    scale = [1.0, *weights]
    count = len(scale)
    plain = [[gram[i][j] / (scale[i] * scale[j]) for j in range(count)] for i in range(count)]
    whole = [
        [
            plain[0][0] + (plain[i][0] if i else 0.0) + (plain[0][j] if j else 0.0) + (plain[i][j] if i and j else 0.0)
            for j in range(count)
        ]
        for i in range(count)
    ]
    total = own + fsum(weights)
    found = coefficients(whole, [own / total, *(weight / total for weight in weights)])
    of_base = fsum([*found, -1.0])

    def block(start: int, stop: int) -> torch.Tensor:
        rows = of_base * base.rows(start, stop).double()
        for delta, weight, coefficient in zip(deltas, weights, found[1:], strict=True):
            rows += coefficient / weight * delta.rows(start, stop).double()
        return rows.float()

    return ComputedRows(common_shape(deltas), block)
