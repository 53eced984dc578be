from __future__ import annotations

import math

import pytest
import torch
from adapters import adapter, adapters, dense, families
from hypothesis import given, settings
from hypothesis import strategies as st

from adapterkit.errors import UsageError
from adapterkit.ops.lowrank import Factors, spectrum, stack
from adapterkit.ops.measure import compare, cosine, effective_rank, inner, norm, overlap, sign_conflict, stable_rank
from adapterkit.ops.rows import Dense


@settings(max_examples=50)
@given(families(most=2))
def test_norms_and_products_are_the_dense_ones(parts: list[Factors]) -> None:
    x, y = parts[0], parts[-1]
    size = float((x.b.double().abs() @ x.a.double().abs()).norm() * (y.b.double().abs() @ y.a.double().abs()).norm())
    assert norm(x) == pytest.approx(float(dense(x).norm()), abs=1e-12 * (1 + size))
    assert inner(x, y) == pytest.approx(float((dense(x) * dense(y)).sum()), abs=1e-12 * (1 + size))
    if norm(x) and norm(y):
        expected = torch.nn.functional.cosine_similarity(dense(x).flatten(), dense(y).flatten(), 0)
        assert cosine(x, y) == pytest.approx(float(expected), abs=1e-9)


def test_the_cosine_with_nothing() -> None:
    zero = Factors(torch.zeros(4, 1), torch.zeros(1, 3))
    assert cosine(zero, adapter(4, 3, 1, 0)) == 0


@given(st.integers(1, 40), st.floats(1e-3, 1e3))
def test_equal_singular_values_count_each(k: int, value: float) -> None:
    s = torch.full((k,), value, dtype=torch.float64)
    assert effective_rank(s) == pytest.approx(k)
    assert effective_rank(s, "participation") == pytest.approx(k)
    assert stable_rank(s) == pytest.approx(k)


def test_effective_ranks_by_hand() -> None:
    s = torch.tensor([3.0, 1.0, 0.0], dtype=torch.float64)
    entropy = -(0.75 * math.log(0.75) + 0.25 * math.log(0.25))
    assert effective_rank(s) == pytest.approx(math.exp(entropy))
    assert effective_rank(s, "participation") == pytest.approx(100 / 82)
    assert stable_rank(s) == pytest.approx(10 / 9)
    assert effective_rank(torch.zeros(3)) == stable_rank(torch.zeros(3)) == 0


def test_overlap_is_one_inside_and_zero_apart() -> None:
    part = adapter(30, 20, 4, 0)
    inside = Factors(part.b @ torch.randn(4, 2, generator=torch.Generator().manual_seed(1)), torch.randn(2, 20))
    assert overlap(part, inside) == pytest.approx(1)
    basis = torch.linalg.qr(torch.randn(30, 30, generator=torch.Generator().manual_seed(2))).Q
    left, right = (
        Factors(basis[:, :3].contiguous(), torch.ones(3, 20)),
        Factors(basis[:, 3:5].contiguous(), torch.ones(2, 20)),
    )
    assert overlap(left, right) == pytest.approx(0, abs=1e-6)
    assert overlap(left, right, "input") == pytest.approx(1)


@pytest.mark.parametrize("top", [None, 2])
@pytest.mark.parametrize("side", ["output", "input"])
def test_overlap_is_the_dense_formula(side: str, top: int | None) -> None:
    x, y = adapters(30, 20, 4, 6)
    bases = []
    for part in (x, y):
        found = torch.linalg.svd(dense(part))
        bases.append((found.U if side == "output" else found.Vh.T)[:, : top or part.rank])
    expected = float((bases[0].T @ bases[1]).square().sum()) / (top or 4)
    assert overlap(x, y, side, top) == pytest.approx(expected)  # type: ignore[arg-type]


def test_sign_conflicts_are_counted() -> None:
    x, y = adapters(40, 30, 3, 5)
    expected = float((dense(x) * dense(y) < 0).double().mean())
    assert sign_conflict(x, y) == expected
    # 20,000 samples: a standard deviation of 0.0035.
    assert sign_conflict(x, y, samples=20_000) == pytest.approx(expected, abs=0.015)
    assert sign_conflict(x, x) == 0
    assert sign_conflict(x, x.scaled(-1)) == 1
    assert sign_conflict(x, Factors(torch.zeros(40, 1), torch.zeros(1, 30))) == 0


def test_samples_need_factors() -> None:
    with pytest.raises(UsageError, match="sampled between low-rank"):
        sign_conflict(Dense(torch.ones(2, 2)), Dense(torch.ones(2, 2)), samples=3)


def test_compare_is_all_of_it() -> None:
    parts = adapters(30, 20, 4, 3)
    parts.append(stack(parts))
    found = compare(parts, samples=None)
    assert found.norms == tuple(norm(p) for p in parts)
    for i, x in enumerate(parts):
        for j, y in enumerate(parts):
            assert found.cosine[i][j] == pytest.approx(cosine(x, y))
            assert found.output_overlap[i][j] == pytest.approx(overlap(x, y))
            assert found.input_overlap[i][j] == pytest.approx(overlap(x, y, "input"))
            assert found.sign_conflict[i][j] == pytest.approx(sign_conflict(x, y))
    assert found.output_overlap[2][0] == pytest.approx(1)


def test_the_spectrum_is_the_dense_one() -> None:
    part = adapter(30, 20, 5, 0)
    assert torch.allclose(spectrum(part), torch.linalg.svdvals(dense(part))[:5])
