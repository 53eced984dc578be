from __future__ import annotations

from itertools import product

import pytest
import torch
from adapters import adapter, adapters, dense

from adapterkit.ops.lowrank import Factors
from adapterkit.ops.rules import combine


def matrix(found: object) -> torch.Tensor:
    assert isinstance(found, Factors)
    return dense(found)


def best_partition(units: torch.Tensor, k: int) -> torch.Tensor:
    """The centres of the k-means optimum up to sign, over all labels and signs; units are rows."""
    best, centres = float("inf"), units
    for labels in product(range(k), repeat=len(units)):
        if len(set(labels)) < k:
            continue
        for signs in product((1.0, -1.0), repeat=len(units)):
            signed = units * torch.tensor(signs, dtype=units.dtype)[:, None]
            mask = torch.tensor(labels)
            means = torch.stack([signed[mask == c].mean(0) for c in range(k)])
            cost = float((signed - means[mask]).square().sum())
            if cost < best:
                best, found = cost, (mask, means)
                centres = torch.stack(
                    [m * units[found[0] == c].abs().amax(1).mean() / m.abs().max() for c, m in enumerate(means)]
                )
    return centres


def test_the_optimum_of_a_small_case() -> None:
    parts = adapters(5, 4, 2, 2, seed=4)
    units = []
    for part in parts:
        for b, a in zip(part.b.double().T, part.a.double(), strict=True):
            ratio = (a.norm() / b.norm()).sqrt()
            units.append(torch.cat([b * ratio, a / ratio]))
    centres = best_partition(torch.stack(units), 2)
    expected = (4 / 2) ** 0.5 * centres[:, :5].T @ centres[:, 5:]
    assert torch.allclose(matrix(combine(parts, "lego", rank=2)), expected, atol=1e-5)


def test_two_of_the_same_adapter() -> None:
    # r clusters of two equal units: each centre is the unit, and N / k = 2.
    part = adapter(20, 15, 4, 1)
    assert torch.allclose(matrix(combine([part, part], "lego")), 2**0.5 * dense(part), atol=1e-5)


def test_the_split_between_the_factors_does_not_matter() -> None:
    parts = adapters(20, 15, 3, 3, seed=2)
    gauge = torch.tensor([4.0, -0.5, -1.0])
    moved = [parts[0], Factors(parts[1].b * gauge, parts[1].a / gauge[:, None])]
    assert torch.allclose(matrix(combine(moved, "lego")), matrix(combine(parts, "lego")), atol=1e-5)


@pytest.mark.parametrize("rank", [6, 9])
def test_enough_clusters_for_every_unit_give_the_sum(rank: int) -> None:
    parts = adapters(20, 15, 3, 3)
    assert torch.allclose(matrix(combine(parts, "lego", rank=rank)), sum(dense(p) for p in parts), atol=1e-5)


def test_the_rank_is_the_number_of_clusters() -> None:
    found = combine(adapters(20, 15, 5, 5, 5), "lego", rank=4)
    assert isinstance(found, Factors)
    assert found.rank <= 4


def test_zero_adapters() -> None:
    zero = Factors(torch.zeros(6, 2), torch.zeros(2, 5))
    part = adapter(6, 5, 2, 0)
    assert float(matrix(combine([zero, zero], "lego")).norm()) == 0
    assert torch.allclose(matrix(combine([zero, part], "lego")), dense(part), atol=1e-5)
