from __future__ import annotations

import pytest
import torch
from adapters import adapter, adapters, dense, families
from dense_formulas import rank_for_energy
from hypothesis import given, settings
from hypothesis import strategies as st

from adapterkit.errors import AdapterError, UsageError
from adapterkit.ops.lowrank import Factors, core_of, numerical_rank, spectrum, stack, svd, truncate

few = settings(max_examples=60)
signed = st.one_of(st.just(0.0), st.floats(1e-3, 4), st.floats(-4, -1e-3))


def size(parts: list[Factors], weights: list[float]) -> float:
    """What rounding is measured against: the norm of the sum without any cancellation."""
    terms = [abs(w) * (p.b.double().abs() @ p.a.double().abs()) for p, w in zip(parts, weights, strict=True)]
    return float(sum(terms).norm())


@few
@given(families(), st.data())
def test_stack_is_the_weighted_float64_sum(parts: list[Factors], data: st.DataObject) -> None:
    weights = data.draw(st.lists(signed, min_size=len(parts), max_size=len(parts)))
    expected = sum(w * dense(p) for p, w in zip(parts, weights, strict=True))
    assert (dense(stack(parts, weights)) - expected).norm() <= 1e-6 * size(parts, weights)
    assert stack(parts, weights).rank == sum(p.rank for p in parts)


@few
@given(families())
def test_the_core_is_lossless(parts: list[Factors]) -> None:
    core = core_of(parts)
    for part, matrix in zip(parts, core.cores, strict=True):
        assert (core.left @ matrix @ core.right.T - dense(part)).norm() <= 1e-12 * (1 + size([part], [1]))
    assert (core.left.T @ core.left - torch.eye(core.left.shape[1])).norm() < 1e-12
    assert (core.right.T @ core.right - torch.eye(core.right.shape[1])).norm() < 1e-12


@few
@given(families(), st.integers(1, 24))
def test_truncation_is_the_dense_optimum(parts: list[Factors], rank: int) -> None:
    whole = stack(parts)
    expected = torch.linalg.svdvals(dense(whole))
    norm = float(expected.norm())
    optimum = float(expected[rank:].norm())
    found = truncate(whole, rank=rank)
    assert found.rank == min(rank, *whole.shape, whole.rank)
    assert float((dense(found.factors) - dense(whole)).norm()) == pytest.approx(optimum, abs=1e-5 * norm)
    assert found.error == pytest.approx(optimum, abs=1e-12 * (1 + norm))
    assert found.norm == pytest.approx(norm, rel=1e-12)
    assert torch.allclose(spectrum(whole), expected[: len(spectrum(whole))], atol=1e-12 * (1 + norm))


def test_truncation_is_the_dense_matrix() -> None:
    whole = stack(adapters(96, 80, 16, 16))
    u, s, vh = torch.linalg.svd(dense(whole), full_matrices=False)
    expected = u[:, :16] * s[:16] @ vh[:16]
    assert (dense(truncate(whole, rank=16).factors) - expected).norm() <= 1e-5 * expected.norm()


@few
@given(families(), st.floats(0.05, 1.0))
def test_energy_takes_the_smallest_rank(parts: list[Factors], energy: float) -> None:
    whole = stack(parts)
    s = torch.linalg.svdvals(dense(whole))
    found = truncate(whole, energy=energy)
    if float(s.norm()) == 0:
        assert (found.rank, found.error, found.energy) == (1, 0.0, 1.0)
        return
    assert found.energy >= energy - 1e-9
    if energy < 1:
        assert found.rank == rank_for_energy(s, energy)
    assert truncate(whole, energy=energy, rank=2).rank == min(found.rank, 2)


@few
@given(families(), st.floats(0.0, 0.99))
def test_max_error_takes_the_smallest_rank(parts: list[Factors], bound: float) -> None:
    whole = stack(parts)
    found = truncate(whole, max_error=bound)
    assert found.relative_error <= bound + 1e-7
    if found.rank > 1:
        assert truncate(whole, rank=found.rank - 1).relative_error > bound


def test_both_factors_have_the_same_scale() -> None:
    found = svd(stack(adapters(30, 40, 4, 4))).factors()
    assert torch.allclose(found.b.norm(dim=0), found.a.norm(dim=1), rtol=1e-5)


def test_rounding_is_not_rank() -> None:
    part = adapter(30, 40, 4, 1)
    twice = Factors(torch.cat([part.b, part.b], 1), torch.cat([part.a, part.a], 0))
    assert numerical_rank(spectrum(twice)) == 4
    assert truncate(twice, energy=1).rank == 4
    assert numerical_rank(torch.tensor([1.0, 1e-5, 1e-7])) == 2
    assert numerical_rank(torch.zeros(3)) == 0


@few
@given(families(most=1), st.data())
def test_rows_are_the_rounded_product(parts: list[Factors], data: st.DataObject) -> None:
    (part,) = parts
    start = data.draw(st.integers(0, part.shape[0]))
    stop = data.draw(st.integers(start, part.shape[0]))
    rows = part.rows(start, stop)
    assert rows.dtype == torch.float32
    assert torch.allclose(rows.double(), dense(part)[start:stop], rtol=1e-7, atol=1e-12)


@pytest.mark.parametrize("threads", [1, 2])
def test_rows_do_not_depend_on_how_they_are_asked_for(threads: int) -> None:
    part = adapter(301, 517, 13, 5)
    before = torch.get_num_threads()
    whole = part.rows(0, 301)
    torch.set_num_threads(threads)
    try:
        for step in (1, 7, 32, 50, 300):
            asked = [part.rows(i, min(301, i + step)) for i in range(0, 301, step)]
            assert torch.equal(torch.cat(asked), whole)
    finally:
        torch.set_num_threads(before)


def test_padding_changes_the_rank_only() -> None:
    part = adapter(9, 7, 3, 2)
    assert part.padded(8).rank == 8
    assert torch.equal(dense(part.padded(8)), dense(part))
    assert part.padded(2) is part


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_any_float_dtype_comes_in(dtype: torch.dtype) -> None:
    part = adapter(12, 10, 3, 3)
    narrow = Factors(part.b.to(dtype), part.a.to(dtype))
    found = truncate(narrow, rank=3).factors
    assert (found.b.dtype, found.a.dtype) == (torch.float32, torch.float32)
    assert torch.allclose(dense(found), dense(narrow), atol=1e-5)


@pytest.mark.parametrize(
    ("b", "a", "says"),
    [
        (torch.ones(4, 2), torch.ones(3, 4), "do not fit"),
        (torch.ones(4), torch.ones(1, 4), "do not fit"),
        (torch.ones(4, 0), torch.ones(0, 4), "are empty"),
        (torch.full((4, 1), float("nan")), torch.ones(1, 4), "NaN or infinite"),
    ],
)
def test_factors_that_are_none(b: torch.Tensor, a: torch.Tensor, says: str) -> None:
    with pytest.raises(AdapterError, match=says):
        Factors(b, a)


def test_shapes_must_agree() -> None:
    with pytest.raises(AdapterError, match="different shapes"):
        stack([adapter(4, 4, 1, 0), adapter(4, 5, 1, 0)])
    with pytest.raises(UsageError, match="2 weights were given for 1 adapter"):
        stack([adapter(4, 4, 1, 0)], [1, 2])


@pytest.mark.parametrize(
    "bound", [{"rank": 0}, {"energy": 0.0}, {"energy": 1.5}, {"max_error": 1.0}, {"max_error": -0.1}]
)
def test_bounds_out_of_range(bound: dict[str, float]) -> None:
    with pytest.raises(UsageError, match=next(iter(bound))):
        truncate(adapter(4, 4, 1, 0), **bound)  # type: ignore[arg-type]
