from __future__ import annotations

import pytest
import torch
from adapters import adapter, adapters, dense, families
from hypothesis import given, settings
from hypothesis import strategies as st

from adapterkit.ops.lowrank import Factors
from adapterkit.ops.rows import Dense, materialize
from adapterkit.ops.rules import combine
from adapterkit.ops.rules.linear import stock_ratio

few = settings(max_examples=40)
signed = st.one_of(st.floats(1e-3, 4), st.floats(-4, -1e-3))


def scale(parts: list[Factors], weights: list[float]) -> float:
    return sum(
        abs(w) * float((p.b.double().abs() @ p.a.double().abs()).norm()) for p, w in zip(parts, weights, strict=True)
    )


@few
@given(families(), st.data())
def test_linear_is_the_weighted_sum_at_its_own_rank(parts: list[Factors], data: st.DataObject) -> None:
    weights = data.draw(st.lists(signed, min_size=len(parts), max_size=len(parts)))
    expected = sum(w * dense(p) for p, w in zip(parts, weights, strict=True))
    found = combine(parts, "linear", weights=weights)
    assert isinstance(found, Factors)
    assert float((dense(found) - expected).norm()) <= 1e-6 * scale(parts, weights)
    if len(parts) > 1:
        assert found.rank <= min(found.shape)


@few
@given(families(), st.integers(1, 24))
def test_svd_is_the_best_of_its_rank(parts: list[Factors], rank: int) -> None:
    expected = sum(dense(p) for p in parts)
    s = torch.linalg.svdvals(expected)
    found = combine(parts, "svd", rank=rank)
    assert isinstance(found, Factors)
    assert found.rank <= rank
    assert float((dense(found) - expected).norm()) == pytest.approx(
        float(s[rank:].norm()), abs=1e-5 * scale(parts, [1.0] * len(parts))
    )


def test_svd_keeps_the_largest_rank_by_default() -> None:
    found = combine(adapters(40, 30, 3, 7, 5), "svd")
    assert isinstance(found, Factors)
    assert found.rank == 7


def test_cat_keeps_the_factors_as_they_are() -> None:
    parts = adapters(12, 10, 2, 3)
    found = combine(parts, "cat", weights=[1.0, -2.0])
    assert isinstance(found, Factors)
    assert torch.equal(found.a, torch.cat([p.a for p in parts]))
    assert torch.equal(found.b, torch.cat([parts[0].b, -2 * parts[1].b], 1))


def test_linear_on_deltas_that_are_not_low_rank() -> None:
    x, y = (torch.randn(9, 8, generator=torch.Generator().manual_seed(i)) for i in (1, 2))
    found = materialize(combine([Dense(x), Dense(y)], "linear", weights=[0.5, -1.5]))
    assert torch.allclose(found, 0.5 * x - 1.5 * y, atol=1e-6)


def test_model_stock_is_the_published_ratio() -> None:
    shared = adapter(30, 20, 4, 9)
    parts = [combine([shared, p], "cat") for p in adapters(30, 20, 2, 3, 2, seed=3)]
    flat = [dense(p).flatten() for p in parts]  # type: ignore[arg-type]
    cosines = [float(torch.nn.functional.cosine_similarity(x, y, 0)) for i, x in enumerate(flat) for y in flat[:i]]
    c = sum(cosines) / 3
    t = 3 * c / (1 + 2 * c)
    found = combine(parts, "model-stock")
    assert torch.allclose(dense(found), t * sum(dense(p) for p in parts) / 3, atol=1e-5)  # type: ignore[arg-type]


def test_model_stock_at_its_ends() -> None:
    part = adapter(30, 20, 4, 9)
    assert stock_ratio([part]) == 1
    assert stock_ratio([part, part]) == pytest.approx(1)
    assert stock_ratio([part, part.scaled(-1)]) == 0
