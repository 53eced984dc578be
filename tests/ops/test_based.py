"""Rules between the base and models, against mergekit's formulas in float64."""

from __future__ import annotations

import math

import pytest
import torch

from adapterkit.errors import UsageError
from adapterkit.ops.rows import Dense, materialize
from adapterkit.ops.rules import combine

SHAPES = [(24, 20), (31, 1), (3, 700)]


def drawn(shape: tuple[int, int], seed: int, size: float = 1.0) -> torch.Tensor:
    return size * torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def made(method: str, deltas: list[torch.Tensor], base: torch.Tensor | None = None, **given: object) -> torch.Tensor:
    rows = None if base is None else Dense(base)
    return materialize(combine([Dense(delta) for delta in deltas], method, base=rows, **given)).double()


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("t", [0.0, 0.3, 1.0])
def test_slerp_between_weights(shape: tuple[int, int], t: float) -> None:
    base, delta = drawn(shape, 1), drawn(shape, 2, 0.7)
    w, model = base.double(), base.double() + delta.double()
    angle = math.acos(float((w * model).sum() / w.norm() / model.norm()))
    expected = (math.sin((1 - t) * angle) * w + math.sin(t * angle) * model) / math.sin(angle) - w
    assert torch.allclose(made("slerp-weights", [delta], base, t=t), expected, atol=2e-6)


def test_slerp_of_weights_that_point_the_same_way_is_a_blend() -> None:
    base, delta = drawn((8, 8), 1), drawn((8, 8), 2, 1e-3)
    assert torch.allclose(made("slerp-weights", [delta], base, t=0.25), 0.25 * delta.double(), atol=1e-9)


@pytest.mark.parametrize("shape", [(24, 20), (900, 1), (3, 700)], ids=str)
def test_arcee_fusion(shape: tuple[int, int]) -> None:
    base, delta = drawn(shape, 1), drawn(shape, 2, 0.3)
    a, b = base, base + delta
    if shape[1] == 1:
        a, b = a.flatten(), b.flatten()
    p, q = torch.softmax(b, -1) + 1e-8, torch.softmax(a, -1) + 1e-8
    importance = ((b - a).abs() * (p * torch.log(p / q)).sum(-1, keepdim=True)).flatten()
    in_order = importance.sort().values
    q1, q2, q3 = (in_order[int(share * (len(in_order) - 1))] for share in (0.25, 0.5, 0.75))
    kept = (importance >= q2 + 1.5 * (q3 - q1)).view(shape)
    found = made("arcee-fusion", [delta], base)
    assert 0 < kept.double().mean() < 0.5
    assert ((found != 0) == kept).double().mean() > 0.995  # the sums' last bits decide at the threshold
    assert torch.equal(found[kept & (found != 0)], delta.double()[kept & (found != 0)])


@pytest.mark.parametrize("raised", [False, True])
def test_ram(raised: bool) -> None:
    deltas = [drawn((16, 12), seed) * (drawn((16, 12), 10 + seed) > 0) for seed in range(3)]
    stack = torch.stack(deltas).double()
    moved = stack.abs() > 0.1
    count = moved.sum(0)
    factors = torch.ones(3).double()
    if raised:
        shared, unique = ((moved & (count > 1)).sum((1, 2)), (moved & (count == 1)).sum((1, 2)))
        factors = 1 + 0.5 * (shared / unique).clamp(max=0.7).double()
    expected = (stack * moved * torch.where(count == 1, factors.view(3, 1, 1), 1 / count.clamp(min=1))).sum(0)
    given = {"r": 0.5, "alpha": 0.7} if raised else {}
    found = made("ramplus-tl" if raised else "ram", deltas, epsilon=0.1, **given)
    assert torch.allclose(found, expected, atol=1e-6)


def test_nearswap() -> None:
    delta = drawn((9, 7), 3)
    expected = delta.double().sign() * delta.double().abs().clamp(max=0.2)
    assert torch.allclose(made("nearswap", [delta], t=0.2), expected, atol=1e-7)


@pytest.mark.parametrize("filter_wise", [False, True])
def test_model_stock_of_whole_changes_that_point_apart(filter_wise: bool) -> None:
    deltas = [drawn((10, 6), seed) for seed in (1, 2, 5)]
    stack = torch.stack(deltas).double()
    flat = stack if filter_wise else stack.flatten(1)[:, None]
    pairs = [torch.nn.functional.cosine_similarity(flat[i], flat[j], dim=-1) for i in range(3) for j in range(i)]
    c = torch.stack(pairs).mean(0)
    assert (c < 0).any()
    t = (3 * c / (1 + 2 * c))[:, None]
    found = made("model-stock", deltas, filter_wise=filter_wise, signed=True)
    assert torch.allclose(found, t * stack.mean(0), atol=2e-6)
    unsigned = made("model-stock", deltas, filter_wise=filter_wise)
    assert torch.allclose(unsigned, torch.where(c[:, None] < 0, 0.0, t) * stack.mean(0), atol=2e-6)


def test_refusals() -> None:
    delta = drawn((4, 4), 1)
    with pytest.raises(UsageError, match="looks at the base's own values"):
        combine([Dense(delta)], "slerp-weights")
    with pytest.raises(UsageError, match="between the base and one model, and got 2"):
        combine([Dense(delta), Dense(delta)], "arcee-fusion", base=Dense(delta))
    with pytest.raises(UsageError, match="takes one model or adapter, and got 2"):
        combine([Dense(delta), Dense(delta)], "nearswap")
    with pytest.raises(UsageError, match="3 values of a parameter for 2 adapters"):
        combine([Dense(delta), Dense(delta)], "ties", density=[0.1, 0.2, 0.3])
