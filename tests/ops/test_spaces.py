from __future__ import annotations

import dense_formulas as formulas
import pytest
import torch
from adapters import adapters, dense, families
from hypothesis import given, settings

from adapterkit.errors import UsageError
from adapterkit.ops.lowrank import Factors
from adapterkit.ops.rules import RULES, combine
from adapterkit.ops.rules.spaces import tucker2


def matrix(found: object) -> torch.Tensor:
    assert isinstance(found, Factors)
    return dense(found)


def close(found: object, expected: torch.Tensor, tolerance: float = 1e-5) -> bool:
    return float((matrix(found) - expected).norm()) <= tolerance * float(expected.norm())


@settings(max_examples=40)
@given(families())
def test_knots_and_core_lose_nothing_with_the_linear_rule(parts: list[Factors]) -> None:
    weights = [(-0.5) ** i for i in range(len(parts))]
    expected = sum(w * dense(p) for p, w in zip(parts, weights, strict=True))
    size = sum(float((p.b.abs() @ p.a.abs()).norm()) for p in parts)
    for space in ("knots", "core"):
        assert float((matrix(combine(parts, space, rule="linear", weights=weights)) - expected).norm()) <= 1e-6 * size
        assert float((matrix(combine(parts, "linear", space=space, weights=weights)) - expected).norm()) <= 1e-6 * size
    assert (
        float((matrix(combine(parts, "core", rule="linear", balanced=True)) - sum(dense(p) for p in parts)).norm())
        <= 1e-6 * size
    )


@pytest.mark.parametrize("density", [0.3, 1.0])
def test_knots_with_ties(density: float) -> None:
    parts = adapters(26, 21, 4, 3, 5)
    expected = formulas.knots_ties([dense(p) for p in parts], 12, density)
    assert close(combine(parts, "knots", density=density), expected)
    assert close(combine(parts, "ties", space="knots", density=density), expected)


@pytest.mark.parametrize("density", [0.3, 1.0])
def test_core_with_ties(density: float) -> None:
    parts = adapters(26, 21, 4, 3, 5)
    expected = formulas.core_ties([(p.b.double(), p.a.double()) for p in parts], density)
    assert close(combine(parts, "core", density=density), expected)


def test_a_balanced_core_sees_the_deltas_only() -> None:
    parts = adapters(26, 21, 4, 4)
    moved = [Factors(p.b * 8, p.a / 8) if i else p for i, p in enumerate(parts)]
    assert close(combine(moved, "core", balanced=True), matrix(combine(parts, "core", balanced=True)))
    assert not close(combine(moved, "core"), matrix(combine(parts, "core")), 1e-2)


@pytest.mark.parametrize("name", ["tsv", "iso-c"])
@pytest.mark.parametrize("space", ["knots", "core"])
def test_spectral_rules_do_not_see_the_basis(name: str, space: str) -> None:
    parts = adapters(26, 21, 4, 4)
    assert close(combine(parts, name, space=space), matrix(combine(parts, name)))


@pytest.mark.parametrize("beta", [0.0, 0.25, 1.0])
def test_ctm_with_the_sum(beta: float) -> None:
    parts = [p.scaled(w) for p, w in zip(adapters(18, 15, 4, 4, 4), (1.0, 3.0, 0.3), strict=True)]
    found = combine(parts, "ctm", rule="linear", rank=5, beta=beta)
    assert close(found, formulas.ctm([dense(p) for p in parts], 5, beta), 1e-3)
    assert isinstance(found, Factors)
    assert found.rank == 5


def test_ctm_has_its_rank_by_construction() -> None:
    parts = adapters(30, 20, 4, 6)
    for rule in ("ties", "dare", "iso-c"):
        found = combine(parts, "ctm", rule=rule)
        assert isinstance(found, Factors)
        assert found.rank <= 6
    assert close(combine(parts, "ctm", rule="linear", rank=10), sum(dense(p) for p in parts))


def test_tucker_gains_on_its_start() -> None:
    xs = [dense(p) for p in adapters(12, 10, 5, 5, 5)]
    u0 = torch.linalg.svd(torch.cat(xs, 1)).U[:, :3]
    v0 = torch.linalg.svd(torch.cat([x.T for x in xs], 1)).U[:, :3]
    u, v = tucker2(xs, 3)
    captured = sum(float((u.T @ x @ v).square().sum()) for x in xs)
    assert captured >= sum(float((u0.T @ x @ v0).square().sum()) for x in xs)
    assert torch.allclose(u.T @ u, torch.eye(3, dtype=torch.float64))


@pytest.mark.parametrize("space", ["knots", "core", "ctm"])
def test_inner_parameters_reach_the_rule(space: str) -> None:
    parts = adapters(26, 21, 4, 4)
    masks = [
        matrix(combine(parts, "dare", space=space, density=0.5, seed=s, key=k))
        for s, k in ((0, "a"), (1, "a"), (0, "b"))
    ]
    assert not torch.allclose(masks[0], masks[1])
    assert not torch.allclose(masks[0], masks[2])
    assert torch.equal(masks[0], matrix(combine(parts, space, rule="dare", density=0.5, seed=0, key="a")))
    with pytest.raises(UsageError, match="density of method dare"):
        combine(parts, "dare", space=space, density=2)
    with pytest.raises(UsageError, match="has no parameter majority"):
        combine(parts, "dare", space=space, majority="total")


def test_every_inner_rule_runs_in_every_space() -> None:
    parts = adapters(26, 21, 4, 3)
    inner = [m.name for m in RULES.values() if m.inner]
    for space in ("knots", "core", "ctm"):
        (rules,) = [p.choices for p in RULES[space].parameters if p.name == "rule"]
        assert sorted(rules) == sorted(inner)
        for name in inner:
            assert torch.isfinite(matrix(combine(parts, name, space=space))).all()


@pytest.mark.parametrize(("method", "space"), [("cat", "core"), ("knots", "core"), ("ties", "linear")])
def test_what_cannot_run_in_a_space(method: str, space: str) -> None:
    with pytest.raises(UsageError, match="cannot run in space"):
        combine(adapters(9, 8, 2, 2), method, space=space)
