"""LoRA-LEGO: cluster the rank-1 units of all adapters and build one adapter from the centres."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated

from adapterkit.ops.counter import stream, uniform
from adapterkit.ops.lowrank import Factors
from adapterkit.ops.rows import common_shape
from adapterkit.ops.rules.parameters import Rank
from adapterkit.ops.rules.registry import Range, rule

if TYPE_CHECKING:
    from collections.abc import Sequence

    import torch
else:
    from adapterkit.ops._torch import torch

_STEPS = 100
_STARTS = 10


@rule(paper="2409.16167", space="factors")
def lego(
    parts: Sequence[Factors],
    *,
    rank: Rank = None,
    seed: Annotated[int, Range(0, 2**63 - 1), "seed of the starting centres"] = 0,
) -> Factors:
    """Cluster the rank-1 units of all adapters; each cluster's centre is a unit of the result (LoRA-LEGO).

    Zhao et al.: k-means over units [a_i, b_i]; each centre is rescaled to the mean infinity norm of its
    members, and the result by sqrt(N / k), N the number of units. A unit b_i a_i is the same for (c b_i, a_i / c), so
    norms are balanced first, and units are compared and averaged up to sign.
    """
    m, _ = common_shape(parts)
    units = torch.cat([_units(part) for part in parts])
    units = units[units.abs().amax(1) > 0]
    k = rank or max(part.rank for part in parts)
    if len(units) == 0:
        return parts[0]
    if len(units) <= k:
        # Every unit is its own centre: the sum of the adapters, and nothing to rescale.
        centres, scale = units, 1.0
    else:
        centres, scale = _reweighted(units, *_cluster(units, k, seed)), (len(units) / k) ** 0.5
    return Factors((centres[:, :m] * scale).T.contiguous().float(), centres[:, m:].contiguous().float())


def _units(part: Factors) -> torch.Tensor:
    """The rank-1 units of an adapter as rows [b_i, a_i], both halves of the same norm."""
    b, a = part.b.double().T, part.a.double()
    nb, na = b.norm(dim=1, keepdim=True), a.norm(dim=1, keepdim=True)
    ratio = torch.where((nb > 0) & (na > 0), (na / nb).sqrt(), 0.0)
    return torch.cat([b * ratio, torch.where(ratio > 0, a / ratio, 0.0)], 1)


def _cluster(units: torch.Tensor, k: int, seed: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """The best of several k-means runs, up to sign: centres [k, d], labels [N], signs [N]."""
    runs = [_lloyd(units, _start(units, k, stream(seed, i, "lego"))) for i in range(_STARTS)]
    return min(runs, key=lambda run: _inertia(units, *run))


def _lloyd(units: torch.Tensor, centres: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    labels, signs = _assign(units, centres)
    for _ in range(_STEPS):
        members = torch.nn.functional.one_hot(labels, len(centres)).double().T * signs
        counts = members.abs().sum(1, keepdim=True)
        # A centre that lost its members stays where it is.
        centres = torch.where(counts > 0, members @ units / counts.clamp(min=1), centres)
        new, signs = _assign(units, centres)
        if bool((new == labels).all()):
            break
        labels = new
    return centres, labels, signs


def _assign(units: torch.Tensor, centres: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """The nearest centre of each unit, the unit taken with either sign, and that sign."""
    dots = units @ centres.T
    labels = (centres.square().sum(1) - 2 * dots.abs()).argmin(1)
    chosen = dots.gather(1, labels[:, None])[:, 0]
    return labels, torch.where(chosen < 0, -1.0, 1.0).double()


def _start(units: torch.Tensor, k: int, source: int) -> torch.Tensor:
    """k-means++ (Arthur and Vassilvitskii, SODA 2007) with the distance up to sign."""
    draws = uniform(source, 0, k)
    chosen = [int(draws[0] * len(units))]
    for draw in draws[1:]:
        centres = units[torch.tensor(chosen)]
        gaps = centres.square().sum(1) - 2 * (units @ centres.T).abs() + units.square().sum(1, keepdim=True)
        mass = gaps.amin(1).clamp(min=0).cumsum(0)
        chosen.append(min(int(torch.searchsorted(mass, draw * mass[-1], right=True)), len(units) - 1))
    return units[torch.tensor(chosen)]


def _inertia(units: torch.Tensor, centres: torch.Tensor, labels: torch.Tensor, signs: torch.Tensor) -> float:
    return float((units * signs[:, None] - centres[labels]).square().sum())


def _reweighted(units: torch.Tensor, centres: torch.Tensor, labels: torch.Tensor, signs: torch.Tensor) -> torch.Tensor:
    """Centres with members, each at the mean infinity norm of its members: averaging shrinks them."""
    out = []
    for i, centre in enumerate(centres):
        members = units[labels == i]
        if len(members):
            out.append(centre * (members.abs().amax(1).mean() / centre.abs().amax().clamp(min=1e-300)))
    return torch.stack(out)
