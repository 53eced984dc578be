"""Weighted sums: exact, concatenated, truncated, or weighted by how well the adapters agree."""

from __future__ import annotations

from math import fsum, sqrt
from typing import TYPE_CHECKING, Annotated

from adapterkit.ops.gram import inner_products
from adapterkit.ops.lowrank import Factors, core_of, stack, truncate
from adapterkit.ops.rows import ComputedRows, DeltaRows, add, blocks, common_shape, scaled, total
from adapterkit.ops.rules.elementwise import total_of
from adapterkit.ops.rules.parameters import Normalize, Rank
from adapterkit.ops.rules.registry import rule

if TYPE_CHECKING:
    from collections.abc import Sequence

    import torch


@rule(paper="2212.04089", space="core", inner=True)
def linear(parts: Sequence[DeltaRows], *, normalize: Normalize = "none", weights: Sequence[float] = ()) -> DeltaRows:
    """The exact weighted sum of the deltas, at the smallest rank that holds it (task arithmetic).

    Task arithmetic (Ilharco et al.): tau_new = sum_t tau_t, here with tau_t = w_t delta_t. Deltas that
    are not low-rank are summed row by row. ``normalize`` divides the sum by the weights, or by the number of adapters.
    """
    divisor = total_of(weights, normalize)
    if divisor != 1:
        parts = [scaled(part, 1 / divisor) for part in parts]
    factors = [part for part in parts if isinstance(part, Factors)]
    if len(factors) < len(parts):
        return total(parts)
    if len(factors) == 1:
        return factors[0]
    core = core_of(factors)
    return core.lift(add(core.cores))


@rule(paper="", space="factors")
def cat(parts: Sequence[Factors]) -> Factors:
    """The exact weighted sum with the factors side by side; the rank is the sum of the ranks."""
    return stack(parts)


@rule(paper="", space="core")
def svd(parts: Sequence[Factors], *, rank: Rank = None) -> Factors:
    """The best approximation of the weighted sum at a given rank (Eckart-Young, by QR and a small SVD)."""
    return truncate(stack(parts), rank=rank or max(part.rank for part in parts)).factors


@rule(paper="2403.19522", space="factors")
def model_stock(
    parts: Sequence[DeltaRows],
    *,
    filter_wise: Annotated[bool, "an angle and a ratio for each row, as the paper has it for filters"] = False,
    signed: Annotated[bool, "deltas that point apart lead away from their mean, as in mergekit"] = False,
) -> DeltaRows:
    """The mean of the deltas, shrunk towards the base the more they disagree (Model Stock).

    Jang et al.: W = t mean(W_t) + (1 - t) W_0 with t = N c / (1 + (N - 1) c) and c the
    cosine between deltas, here the mean over pairs. Deltas that point apart (c < 0) are outside the geometry of the
    paper; c is taken as 0 then, unless ``signed``. LoRA deltas are often near orthogonal, and t near 0 with them.
    """
    factors = [part for part in parts if isinstance(part, Factors)]
    low_rank = len(factors) == len(parts)
    # A vector is one filter.
    if not filter_wise or len(parts) == 1 or common_shape(parts)[1] == 1:
        share = stock_ratio(parts, signed=signed) / len(parts)
        return stack(factors, [share] * len(parts)) if low_rank else total([scaled(part, share) for part in parts])
    shares = _row_ratios(parts, signed=signed) / len(parts)
    if low_rank:
        return stack([Factors((part.b.double() * shares[:, None]).float(), part.a) for part in factors])
    whole = total(parts)
    return ComputedRows(
        whole.shape, lambda start, stop: (whole.rows(start, stop).double() * shares[start:stop, None]).float()
    )


def _row_ratios(parts: Sequence[DeltaRows], *, signed: bool) -> torch.Tensor:
    """Model Stock's t of every row, in float64."""
    import torch

    n = len(parts)
    found = []
    lowest = -1.0 if signed else 0.0
    for start, stop in blocks(common_shape(parts)):
        units = [torch.nn.functional.normalize(part.rows(start, stop).double(), dim=1) for part in parts]
        pairs = [(units[i] * units[j]).sum(1) for i in range(n) for j in range(i)]
        c = (add(pairs) / len(pairs)).clamp(min=lowest)
        below = 1 + (n - 1) * c
        # Where it is 0 there is no ratio: the base stays.
        found.append(torch.where(below.abs() < 1e-6, 0.0, n * c / torch.where(below == 0, 1.0, below)))
    return torch.cat(found)


def stock_ratio(parts: Sequence[DeltaRows], *, signed: bool = False) -> float:
    """The interpolation ratio t of Model Stock; 1 for one adapter."""
    n = len(parts)
    if n == 1:
        return 1.0
    products = inner_products(parts)
    sizes = [sqrt(products[i][i]) for i in range(n)]
    pairs = [products[i][j] / sizes[i] / sizes[j] if sizes[i] * sizes[j] else 0.0 for i in range(n) for j in range(i)]
    c = max(-1.0 if signed else 0.0, fsum(pairs) / len(pairs))
    below = 1 + (n - 1) * c
    return n * c / below if abs(below) >= 1e-6 else 0.0
