from __future__ import annotations

import pytest
import torch
from adapters import adapter, adapters, dense

from adapterkit.errors import UsageError
from adapterkit.ops import extract, rows
from adapterkit.ops.extract import low_rank
from adapterkit.ops.rows import ComputedRows, Dense, materialize
from adapterkit.ops.rules import combine

M, N = 220, 180


def with_spectrum(s: torch.Tensor, seed: int = 0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    u = torch.linalg.qr(torch.randn(M, len(s), generator=generator, dtype=torch.float64)).Q
    v = torch.linalg.qr(torch.randn(N, len(s), generator=generator, dtype=torch.float64)).Q
    return (u * s @ v.T).float()


def matrices() -> dict[str, torch.Tensor]:
    i = torch.arange(1, N + 1, dtype=torch.float64)
    generator = torch.Generator().manual_seed(1)
    signal = torch.randn(M, 6, generator=generator) @ torch.randn(6, N, generator=generator)
    return {
        "gaussian": torch.randn(M, N, generator=generator),
        "slow": with_spectrum(i**-0.25),
        "power": with_spectrum(i**-1.0),
        "exponential": with_spectrum(torch.exp(-i / 10)),
        "step": with_spectrum(torch.where(i <= 10, 1.0, 1e-3)),
        "signal and noise": signal + 3 * torch.randn(M, N, generator=generator),
    }


@pytest.mark.parametrize("name", matrices())
@pytest.mark.parametrize("rank", [1, 4, 12, 32])
def test_within_one_percent_of_the_optimum(name: str, rank: int) -> None:
    x = matrices()[name]
    optimum = float(torch.linalg.svdvals(x.double())[rank:].norm())
    found = low_rank(Dense(x), rank=rank)
    assert found.rank == rank
    assert float((dense(found.factors) - x).norm()) <= 1.01 * optimum
    assert found.error == pytest.approx(float((dense(found.factors) - x).norm()), rel=1e-4)
    assert found.norm == pytest.approx(float(x.double().norm()), rel=1e-9)


@pytest.mark.parametrize("name", matrices())
def test_exact(name: str) -> None:
    x = matrices()[name]
    s = torch.linalg.svdvals(x.double())
    found = low_rank(Dense(x), rank=12, exact=True)
    assert found.error == pytest.approx(float(s[12:].norm()), rel=1e-9)
    assert torch.allclose(found.spectrum, s)


@pytest.mark.parametrize("name", matrices())
@pytest.mark.parametrize("energy", [0.3, 0.9, 0.99])
def test_the_rank_that_an_energy_needs(name: str, energy: float) -> None:
    x = matrices()[name]
    s = torch.linalg.svdvals(x.double())
    needed = int((s.square().cumsum(0) < energy * s.square().sum()).sum()) + 1
    found = low_rank(Dense(x), energy=energy)
    assert needed <= found.rank <= needed + max(1, needed // 20)
    assert 1 - float((dense(found.factors) - x).norm() / x.norm()) ** 2 >= energy - 1e-6
    assert low_rank(Dense(x), energy=energy, exact=True).rank == needed
    assert low_rank(Dense(x), energy=energy, rank=3).rank == min(3, needed)


def test_the_rank_that_an_error_needs() -> None:
    x = matrices()["power"]
    s = torch.linalg.svdvals(x.double())
    found = low_rank(Dense(x), max_error=0.2)
    needed = next(k for k in range(N) if float(s[k:].norm() / s.norm()) <= 0.2)
    assert needed <= found.rank <= needed + 1
    assert found.relative_error <= 0.2


def test_a_low_rank_difference_is_found_exactly() -> None:
    part = adapter(M, N, 8, 3)
    found = low_rank(Dense(materialize(part)), rank=8)
    assert float((dense(found.factors) - dense(part)).norm()) <= 1e-6 * float(dense(part).norm())
    assert low_rank(Dense(materialize(part)), energy=0.999999).rank == 8


def test_factors_are_truncated_without_reading_rows() -> None:
    part = adapter(M, N, 8, 3)
    s = torch.linalg.svdvals(dense(part))
    assert low_rank(part, rank=4).error == pytest.approx(float(s[4:].norm()), rel=1e-9)


def test_streaming_gives_the_same_approximation(monkeypatch: pytest.MonkeyPatch) -> None:
    x = matrices()["power"]
    expected = dense(low_rank(Dense(x), rank=6).factors)
    monkeypatch.setattr(extract, "_HELD", 0)
    monkeypatch.setattr(rows, "BLOCK_ELEMENTS", 33 * N)
    widest = 0

    def block(start: int, stop: int) -> torch.Tensor:
        nonlocal widest
        widest = max(widest, stop - start)
        return x[start:stop]

    found = dense(low_rank(ComputedRows((M, N), block), rank=6).factors)
    assert widest <= 33
    assert float((found - expected).norm()) <= 1e-6 * float(expected.norm())


@pytest.mark.parametrize("name", ["ties", "dare", "sce"])
def test_a_dense_rule_comes_back_at_a_rank(name: str) -> None:
    parts = adapters(M, N, 4, 4)
    whole = materialize(combine(parts, name)).double()
    found = combine(parts, name, rank=8)
    optimum = float(torch.linalg.svdvals(whole)[8:].norm())
    assert float((dense(found) - whole).norm()) <= 1.01 * optimum  # type: ignore[arg-type]


def test_zero() -> None:
    found = low_rank(Dense(torch.zeros(M, N)), rank=4)
    assert (found.error, found.relative_error, found.energy) == (0.0, 0.0, 1.0)
    assert low_rank(Dense(torch.zeros(M, N)), energy=0.9).rank == 1


def test_more_rank_than_there_is() -> None:
    x = torch.randn(5, 9, generator=torch.Generator().manual_seed(0))
    found = low_rank(Dense(x), rank=64)
    assert found.rank == 5
    assert torch.allclose(dense(found.factors), x.double(), atol=1e-5)


def test_bounds_out_of_range() -> None:
    with pytest.raises(UsageError, match="energy must be in"):
        low_rank(Dense(torch.ones(2, 2)), energy=2.0)
