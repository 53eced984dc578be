from __future__ import annotations

import dense_formulas as formulas
import pytest
import torch
from adapters import adapter, adapters, dense

from adapterkit.ops.lowrank import Factors
from adapterkit.ops.rules import combine
from adapterkit.ops.rules.spectral import nearest_orthonormal


def deltas(parts: list[Factors]) -> list[torch.Tensor]:
    return [dense(p) for p in parts]


def close(found: object, expected: torch.Tensor) -> bool:
    assert isinstance(found, Factors)
    return float((dense(found) - expected).norm()) <= 1e-5 * float(expected.norm())


@pytest.mark.parametrize("shape", [(40, 33), (33, 40)])
def test_tsv(shape: tuple[int, int]) -> None:
    parts = adapters(*shape, 5, 5, 5)
    assert close(combine(parts, "tsv"), formulas.tsv(deltas(parts), 5))


def test_tsv_drops_triples_when_ranks_fill_the_matrix() -> None:
    parts = adapters(12, 30, 8, 8)
    assert close(combine(parts, "tsv"), formulas.tsv(deltas(parts), 6))


def test_tsv_of_the_same_adapter_twice_is_the_adapter() -> None:
    part = adapter(20, 15, 3, 0)
    assert close(combine([part, part], "tsv"), dense(part))


def test_iso_c() -> None:
    parts = adapters(40, 33, 5, 3, 4)
    found = combine(parts, "iso-c")
    assert close(found, formulas.iso_c(deltas(parts), 12))
    assert isinstance(found, Factors)
    s = torch.linalg.svdvals(dense(found))[:12]
    assert float(s.std() / s.mean()) < 1e-6


@pytest.mark.parametrize("common", [0.0, 0.5, 0.8, 1.0])
def test_iso_cts(common: float) -> None:
    parts = adapters(40, 33, 6, 6, 6)
    assert close(combine(parts, "iso-cts", common=common), formulas.iso_cts(deltas(parts), 18, common))


def test_iso_cts_with_everything_common_is_iso_c() -> None:
    parts = adapters(40, 33, 6, 4)
    expected = combine(parts, "iso-c")
    assert isinstance(expected, Factors)
    assert close(combine(parts, "iso-cts", common=1.0), dense(expected))


@pytest.mark.parametrize("name", ["tsv", "iso-c", "iso-cts"])
def test_zero_stays_zero(name: str) -> None:
    zero = Factors(torch.zeros(9, 2), torch.zeros(2, 7))
    found = combine([zero, zero], name)
    assert isinstance(found, Factors)
    assert float(dense(found).norm()) == 0


@pytest.mark.parametrize("name", ["tsv", "iso-c", "iso-cts"])
def test_rounding_directions_are_not_amplified(name: str) -> None:
    # Two adapters in one subspace: half of the stacked directions are rounding.
    part, other = adapter(30, 25, 4, 1), adapter(30, 25, 4, 2)
    parts = [part, Factors(part.b, part.a.flip(0).contiguous()), other]
    found = combine(parts, name)
    assert isinstance(found, Factors)
    assert torch.linalg.matrix_rank(dense(found), rtol=1e-4) <= 8


def test_nearest_orthonormal_is_procrustes() -> None:
    x = torch.randn(9, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    q = nearest_orthonormal(x)
    assert torch.allclose(q, formulas.orthonormal(x))
    assert torch.allclose(q.T @ q, torch.eye(4, dtype=torch.float64))
