"""Rules as PEFT and mergekit have them: PEFT's own functions, mergekit's arithmetic written out, and the sphere by geometry."""

from __future__ import annotations

import pytest
import torch
from adapters import adapters

from adapterkit.errors import UsageError
from adapterkit.ops.lowrank import Factors
from adapterkit.ops.rows import Dense, materialize
from adapterkit.ops.rules import combine

WEIGHTS = [0.7, 0.2, 1.9]
SHAPE = (24, 20)


def deltas() -> list[torch.Tensor]:
    return [materialize(part) for part in adapters(*SHAPE, 5, 3, 4)]


def made(method: str, weights: list[float] | None = None, **given: object) -> torch.Tensor:
    return materialize(combine([Dense(delta) for delta in deltas()], method, weights=weights, **given)).double()


def close(found: torch.Tensor, expected: torch.Tensor) -> bool:
    return torch.allclose(found, expected.double(), rtol=2e-6, atol=2e-7)


@pytest.mark.parametrize("density", [0.25, 0.5, 1.0])
@pytest.mark.parametrize("majority", ["total", "frequency"])
def test_ties_as_peft_has_it(density: float, majority: str) -> None:
    from peft.utils.merge_utils import ties

    # PEFT elects by the sum where adapters draw by number, as here it cannot: three adapters, no zeros after a tie.
    if majority == "frequency" and density < 1:
        pytest.skip("with trimmed entries an even number of adapters votes, and PEFT takes a draw for plus")
    expected = ties(deltas(), torch.tensor(WEIGHTS), density, majority)
    assert close(made("ties-peft", WEIGHTS, density=density, majority=majority), expected)
    given = {"normalize": "count", "own_signs": True, "density": density, "majority": majority}
    assert close(made("ties", WEIGHTS, **given), expected)


def mergekit(pruned: list[torch.Tensor], weights: list[float], *, consensus: bool, normalize: bool) -> torch.Tensor:
    """generalized_task_arithmetic: weigh, mask by the sign of the sum, sum, divide by the weights that agree."""
    w = torch.tensor(weights).double()[:, None, None]
    found = torch.stack([delta.double() for delta in pruned]) * w
    mask = torch.ones_like(found)
    if consensus:
        mask = (found.sign() == torch.where(found.sum(0) >= 0, 1, -1)).double()
    divisor = (w * mask).sum(0) if normalize else torch.tensor(1.0)
    return (found * mask).sum(0) / torch.where(divisor.abs() < 1e-8, 1.0, divisor)


def top(delta: torch.Tensor, count: int) -> torch.Tensor:
    return delta * (delta.abs() >= delta.abs().flatten().topk(count).values[-1])


@pytest.mark.parametrize("normalize", [True, False])
@pytest.mark.parametrize("weights", [[1.0, 1.0, 1.0], WEIGHTS, [8e-8, 1e-7, 3e-8]], ids=str)
def test_ties_as_mergekit_has_it(weights: list[float], normalize: bool) -> None:
    expected = mergekit([top(delta, 240) for delta in deltas()], weights, consensus=True, normalize=normalize)
    if min(weights) < 1e-6 and normalize:
        expected = mergekit(
            [top(delta, 240) for delta in deltas()], [w * 1e7 for w in weights], consensus=True, normalize=True
        )
    found = made("ties", weights, density=0.5, **({} if normalize else {"normalize": "none"}))
    assert torch.allclose(found, expected, rtol=1e-5, atol=1e-6 * float(expected.abs().max()))


@pytest.mark.parametrize("normalize", [True, False])
def test_task_arithmetic_as_mergekit_has_it(normalize: bool) -> None:
    expected = mergekit(deltas(), WEIGHTS, consensus=False, normalize=normalize)
    given = {"normalize": "weights"} if normalize else {}
    assert close(made("linear", WEIGHTS, **given), expected)
    low = combine(adapters(*SHAPE, 5, 3, 4), "linear", weights=WEIGHTS, **given)
    assert isinstance(low, Factors)
    assert close(materialize(low).double(), expected)


def breadcrumb(delta: torch.Tensor, density: float, gamma: float) -> torch.Tensor:
    order = delta.abs().flatten().argsort(descending=True)
    outliers = int(gamma * delta.numel())
    mask = torch.zeros(delta.numel())
    mask[order[outliers : outliers + int(density * delta.numel())]] = 1
    return delta * mask.view_as(delta)


@pytest.mark.parametrize("normalize", [True, False])
@pytest.mark.parametrize(("method", "consensus"), [("breadcrumbs", False), ("breadcrumbs-ties", True)])
def test_breadcrumbs_as_mergekit_has_it(method: str, consensus: bool, normalize: bool) -> None:
    pruned = [breadcrumb(delta, 0.6, 0.05) for delta in deltas()]
    expected = mergekit(pruned, WEIGHTS, consensus=consensus, normalize=normalize)
    given = {"density": 0.6, "gamma": 0.05, "normalize": "weights" if normalize else "none"}
    assert close(made(method, WEIGHTS, **given), expected)


def test_weights_that_add_up_to_nothing_divide_nothing() -> None:
    with pytest.raises(UsageError, match="add up to 0"):
        made("linear", [1.0, -2.0, 1.0], normalize="weights")


# ------------------------------------------------------------------ the sphere


def unit(x: torch.Tensor) -> torch.Tensor:
    return x / x.norm()


def log(point: torch.Tensor, other: torch.Tensor) -> torch.Tensor:
    """The vector at ``point`` that leads to ``other`` along the great circle; both of length 1."""
    straight = other - (point * other).sum() * point
    return torch.acos((point * other).sum().clamp(-1, 1)) * unit(straight)


@pytest.mark.parametrize("low_rank", [True, False])
@pytest.mark.parametrize("t", [0.0, 0.3, 1.0])
def test_slerp_and_nuslerp(t: float, low_rank: bool) -> None:
    parts = adapters(*SHAPE, 5, 3)
    x, y = (materialize(part).double() for part in parts)
    given = parts if low_rank else [Dense(x.float()), Dense(y.float())]
    angle = torch.acos((unit(x) * unit(y)).sum())
    expected = (torch.sin((1 - t) * angle) * x + torch.sin(t * angle) * y) / torch.sin(angle)
    assert close(materialize(combine(given, "slerp", t=t)).double(), expected)
    if 0 < t < 1:
        assert close(materialize(combine(given, "nuslerp", weights=[3 * (1 - t), 3 * t])).double(), expected)


def test_nearly_parallel_deltas_are_blended() -> None:
    x = deltas()[0]
    found = materialize(combine([Dense(x), Dense(x * 1.5)], "slerp", t=0.25)).double()
    assert close(found, 1.125 * x)


@pytest.mark.parametrize("low_rank", [True, False])
def test_karcher_is_where_the_logarithms_cancel(low_rank: bool) -> None:
    parts = adapters(*SHAPE, 5, 3, 4) if low_rank else [Dense(delta) for delta in deltas()]
    found = materialize(combine(parts, "karcher", weights=WEIGHTS)).double()
    xs = [delta.double() for delta in deltas()]
    shares = [w / sum(WEIGHTS) for w in WEIGHTS]
    assert sum(s * log(unit(found), unit(x)) for s, x in zip(shares, xs, strict=True)).norm() < 1e-5
    assert abs(found.norm() - sum(s * x.norm() for s, x in zip(shares, xs, strict=True))) < 1e-4


def test_multislerp_is_the_mean_in_the_touching_plane() -> None:
    xs = [delta.double() for delta in deltas()]
    shares = [w / sum(WEIGHTS) for w in WEIGHTS]
    mean = unit(sum(s * unit(x) for s, x in zip(shares, xs, strict=True)))
    tangent = sum(s * (unit(x) - (unit(x) * mean).sum() * mean) for s, x in zip(shares, xs, strict=True))
    turn = tangent.norm()
    on_sphere = mean * torch.cos(turn) + tangent * torch.sin(turn) / turn if turn > 1e-12 else mean
    expected = on_sphere * sum(s * x.norm() for s, x in zip(shares, xs, strict=True))
    assert close(made("multislerp", WEIGHTS), expected)


@pytest.mark.parametrize("method", ["slerp", "nuslerp"])
def test_between_two_only(method: str) -> None:
    with pytest.raises(UsageError, match="between two adapters"):
        made(method)


@pytest.mark.parametrize("method", ["nuslerp", "multislerp", "karcher"])
def test_weights_on_the_sphere_are_above_0(method: str) -> None:
    parts = [Dense(delta) for delta in deltas()[:2]]
    with pytest.raises(UsageError, match="above 0"):
        combine(parts, method, weights=[1.0, -1.0])


# ------------------------------------------------------------------ Model Stock by rows


def test_model_stock_of_every_row_by_itself() -> None:
    parts = adapters(*SHAPE, 5, 3, 4)
    xs = [materialize(part).double() for part in parts]
    found = materialize(combine(parts, "model-stock", filter_wise=True)).double()
    for row in range(SHAPE[0]):
        pairs = [torch.cosine_similarity(xs[i][row], xs[j][row], dim=0) for i in range(3) for j in range(i)]
        c = max(0.0, float(sum(pairs)) / 3)
        t = 3 * c / (1 + 2 * c)
        assert close(found[row], t * sum(x[row] for x in xs) / 3)
