from __future__ import annotations

import dense_formulas as formulas
import pytest
import torch
from adapters import adapters

from adapterkit.errors import UsageError
from adapterkit.ops import rows
from adapterkit.ops.lowrank import Factors
from adapterkit.ops.rows import ComputedRows, DeltaRows, Dense, materialize
from adapterkit.ops.rules import combine

WEIGHTS = [1.0, 0.7, -0.4]

RULES = {
    "ties": {"density": 0.3},
    "dare": {"density": 0.4, "seed": 3},
    "dare-ties": {"density": 0.4, "seed": 3},
    "magnitude-prune": {"density": 0.3},
    "della": {"density": 0.5, "epsilon": 0.2, "seed": 3},
    "breadcrumbs": {"density": 0.6, "gamma": 0.1},
    "sce": {"density": 0.5},
}


def parts() -> list[Factors]:
    return adapters(23, 31, 4, 6, 3, seed=1)


def weighted(weights: list[float] = WEIGHTS) -> list[torch.Tensor]:
    """What the rules see: float32 rows of the weighted deltas, in float64."""
    return [materialize(p.scaled(w)).double() for p, w in zip(parts(), weights, strict=True)]


def close(found: DeltaRows, expected: torch.Tensor) -> bool:
    return torch.allclose(materialize(found).double(), expected, rtol=1e-6, atol=1e-9)


@pytest.mark.parametrize("majority", ["total", "frequency"])
@pytest.mark.parametrize("density", [0.05, 0.2, 0.5, 1.0])
def test_ties(density: float, majority: str) -> None:
    given = {"density": density, "majority": majority}
    found = combine(parts(), "ties", weights=WEIGHTS, normalize="count", **given)
    assert close(found, formulas.ties(weighted(), density, majority))
    assert close(combine(parts(), "ties", **given), formulas.ties(weighted([1.0] * len(parts())), density, majority))


@pytest.mark.parametrize("density", [0.1, 0.5, 1.0])
def test_magnitude_prune(density: float) -> None:
    found = combine(parts(), "magnitude-prune", weights=WEIGHTS, density=density)
    assert close(found, formulas.magnitude_prune(weighted(), density))


@pytest.mark.parametrize("density", [0.1, 0.5, 1.0])
def test_dare(density: float) -> None:
    dropped = formulas.dropped(weighted(), density, 11, "w")
    assert close(combine(parts(), "dare", weights=WEIGHTS, density=density, seed=11, key="w"), sum(dropped))
    found = combine(parts(), "dare-ties", weights=WEIGHTS, density=density, seed=11, key="w")
    assert close(found, formulas.elect_and_average(dropped))


@pytest.mark.parametrize(("density", "epsilon"), [(0.5, 0.2), (0.3, 0.29), (0.7, 0.0)])
def test_della(density: float, epsilon: float) -> None:
    pruned = formulas.della(weighted(), density, epsilon, 5, "w")
    given = {"density": density, "epsilon": epsilon, "seed": 5}
    assert close(combine(parts(), "della", weights=WEIGHTS, key="w", **given), formulas.elect_and_average(pruned))
    assert close(combine(parts(), "della", weights=WEIGHTS, key="w", elect=False, **given), sum(pruned))


@pytest.mark.parametrize(("density", "gamma"), [(0.6, 0.1), (0.9, 0.1), (0.5, 0.0), (1.0, 0.0), (0.3, 0.002)])
def test_breadcrumbs(density: float, gamma: float) -> None:
    found = combine(parts(), "breadcrumbs", weights=WEIGHTS, density=density, gamma=gamma)
    assert close(found, formulas.breadcrumbs(weighted(), density, gamma))


@pytest.mark.parametrize("renormalize", [True, False])
@pytest.mark.parametrize("density", [0.1, 0.5, 1.0])
def test_sce(density: float, renormalize: bool) -> None:
    found = combine(parts(), "sce", weights=WEIGHTS, density=density, renormalize=renormalize)
    assert close(found, formulas.sce(weighted(), density, renormalize))


@pytest.mark.parametrize("name", RULES)
def test_no_bit_depends_on_blocks_or_threads(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    family = adapters(90, 53, 4, 6, 3, seed=2)
    expected = materialize(combine(family, name, weights=WEIGHTS, key="w", **RULES[name]))
    before = torch.get_num_threads()
    try:
        for block, threads in ((1, 1), (53 * 7, 2), (53 * 40, 1), (53 * 64, 2)):
            torch.set_num_threads(threads)
            monkeypatch.setattr(rows, "BLOCK_ELEMENTS", block)
            found = combine(family, name, weights=WEIGHTS, key="w", **RULES[name])
            assert torch.equal(materialize(found), expected)
            assert torch.equal(found.rows(11, 12), expected[11:12])
            assert torch.equal(found.rows(40, 83), expected[40:83])
    finally:
        torch.set_num_threads(before)


@pytest.mark.parametrize("name", RULES)
def test_deltas_that_are_not_low_rank(name: str) -> None:
    family = parts()
    blocks = [ComputedRows(p.shape, p.rows) for p in family]
    matrices = [Dense(materialize(p)) for p in family]
    expected = materialize(combine(family, name, key="w", **RULES[name]))
    assert torch.equal(materialize(combine(blocks, name, key="w", **RULES[name])), expected)
    assert torch.equal(materialize(combine(matrices, name, key="w", **RULES[name])), expected)


@pytest.mark.parametrize("name", ["dare", "dare-ties", "della"])
def test_masks_follow_seed_adapter_and_key(name: str) -> None:
    one = parts()[:1]

    def masked(seed: int, key: str, family: list[Factors] = one) -> torch.Tensor:
        return materialize(combine(family, name, density=0.5, seed=seed, key=key)) == 0

    assert torch.equal(masked(0, "w"), masked(0, "w"))
    assert not torch.equal(masked(0, "w"), masked(1, "w"))
    assert not torch.equal(masked(0, "w"), masked(0, "v"))
    assert not torch.equal(masked(0, "w"), masked(0, "w", [one[0], one[0]]))


@pytest.mark.parametrize(
    ("name", "given"), [("dare", {"density": 0.3}), ("della", {"density": 0.4, "epsilon": 0.2, "elect": False})]
)
def test_the_expected_result_is_the_sum(name: str, given: dict[str, float]) -> None:
    family = parts()
    expected = sum(materialize(p).double() for p in family)
    draws = torch.stack([materialize(combine(family, name, seed=s, **given)).double() for s in range(300)])
    # The error of a mean over independent draws, in units of its own standard error, has mean square 1.
    z = (draws.mean(0) - expected) / (draws.std(0) / 300**0.5)
    assert float(z.square().mean()) == pytest.approx(1, abs=0.2)
    assert abs(float(z.mean())) < 0.15


def test_the_share_that_dare_keeps() -> None:
    kept = materialize(combine(adapters(200, 200, 4), "dare", density=0.3)) != 0
    # 40,000 draws: a standard deviation of 0.0023.
    assert float(kept.float().mean()) == pytest.approx(0.3, abs=0.01)


def test_entries_that_tie_are_kept() -> None:
    level = Dense(torch.ones(10, 10))
    for name in ("ties", "magnitude-prune", "sce"):
        assert torch.equal(materialize(combine([level], name, density=0.1)), torch.ones(10, 10))
    assert torch.equal(materialize(combine([level], "breadcrumbs", density=0.5, gamma=0.2)), torch.ones(10, 10))


def test_a_drawn_vote_goes_to_the_sum() -> None:
    plus, minus = Dense(torch.tensor([[1.0, 3.0]])), Dense(torch.tensor([[-2.0, -2.0]]))
    found = combine([plus, minus], "ties", density=1.0, majority="frequency")
    assert materialize(found).tolist() == [[-2.0, 3.0]]


def test_an_exact_draw_elects_no_sign() -> None:
    plus, minus = Dense(torch.tensor([[1.0, 2.0]])), Dense(torch.tensor([[-1.0, 1.0]]))
    assert materialize(combine([plus, minus], "ties", density=1.0)).tolist() == [[0.0, 1.5]]


def test_parameters_that_contradict_each_other() -> None:
    with pytest.raises(UsageError, match="add up to more than 1"):
        combine(parts(), "breadcrumbs", density=0.9, gamma=0.2)
    with pytest.raises(UsageError, match="keep probabilities outside"):
        combine(parts(), "della", density=0.1, epsilon=0.2)
    with pytest.raises(UsageError, match="keep probabilities outside"):
        combine(parts(), "della", density=0.9, epsilon=0.2)
