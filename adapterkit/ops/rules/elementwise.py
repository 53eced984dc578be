"""Rules on the entries of the true deltas, streamed by blocks of rows.

Where a rule needs a threshold over a whole matrix, a first pass finds it exactly (``ops/select.py``); random masks
come from the position of an entry (``ops/counter.py``). So no result depends on the block size. Every rule works on
one weight at a time; entries that tie with a threshold are kept. Sums over adapters run in float64.
"""

from __future__ import annotations

from math import fsum
from typing import TYPE_CHECKING, Annotated

from adapterkit.errors import UsageError, counted, option
from adapterkit.ops.counter import stream, uniform
from adapterkit.ops.rows import ComputedRows, DeltaRows, add, blocks, common_shape
from adapterkit.ops.rules.parameters import Density, Election, Normalize, Own, Seed, Share
from adapterkit.ops.rules.registry import PerAdapter, Range, rule
from adapterkit.ops.select import kth_magnitudes, row_energies

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    import torch
else:
    from adapterkit.ops._torch import torch


@rule(paper="2306.01708", space="dense")
def ties(
    deltas: Sequence[DeltaRows],
    *,
    density: Density = 0.2,
    majority: Election = "total",
    normalize: Normalize = "weights",
    own_signs: Own = False,
    weights: Sequence[float] = (),
) -> DeltaRows:
    """Keep the largest entries of each delta, elect a sign per entry, average those that agree (TIES).

    Yadav et al., algorithm 1: trim to the top ``density`` by magnitude; gamma = sgn(sum_t tau_t);
    mean of the tau_t whose sign is gamma. An entry whose sum is exactly 0 has no elected sign and becomes 0. By
    ``frequency`` the sign that more adapters have wins, as in PEFT, and where they draw, that of the sum. The paper has no
    weights; with some, tau_t = w_t delta_t, and the mean divides by the weights that agree (mergekit's ``normalize: true``;
    a negative weight counts as its size), by their number, or not at all. ``ties-peft`` is what PEFT computes.
    """
    cuts = [_cut(delta, share) for delta, share in zip(deltas, _each(density, deltas), strict=True)]
    fuse = _Election(weights, majority, normalize, own_signs)
    return _streamed(deltas, lambda rows, _: fuse(_trimmed(rows, cuts)))


@rule(paper="2306.01708", space="dense")
def ties_peft(
    deltas: Sequence[DeltaRows], *, density: Density = 0.2, majority: Election = "total", weights: Sequence[float] = ()
) -> DeltaRows:
    """TIES as PEFT's add_weighted_adapter has it: signs by the deltas before their weights, mean by number."""
    found: DeltaRows = ties(
        deltas, density=density, majority=majority, normalize="count", own_signs=True, weights=weights
    )
    return found


@rule(paper="2311.03099", space="dense")
def dare(deltas: Sequence[DeltaRows], *, density: Density = 0.5, seed: Seed = 0, key: str = "") -> DeltaRows:
    """Drop entries at random, rescale the rest by 1/density, sum (DARE).

    Yu et al.: m ~ Bernoulli(p), (1 - m) delta / (1 - p) with drop rate p = 1 - ``density``, so the expected result is
    the weighted sum.
    """
    masked = _dropper(deltas, density, seed, key)
    return _streamed(deltas, lambda rows, start: add(masked(rows, start)))


@rule(paper="2311.03099", space="dense")
def dare_ties(
    deltas: Sequence[DeltaRows],
    *,
    density: Density = 0.5,
    majority: Election = "total",
    normalize: Normalize = "count",
    own_signs: Own = False,
    seed: Seed = 0,
    key: str = "",
    weights: Sequence[float] = (),
) -> DeltaRows:
    """DARE's random drop in place of TIES's trim, then elected signs and the mean of those that agree.

    The mean divides by the number of those that agree; mergekit's own default is ``normalize: none``.
    """
    masked = _dropper(deltas, density, seed, key)
    fuse = _Election(weights, majority, normalize, own_signs)
    return _streamed(deltas, lambda rows, start: fuse(masked(rows, start)))


@rule(paper="", space="dense")
def magnitude_prune(deltas: Sequence[DeltaRows], *, density: Density = 0.2) -> DeltaRows:
    """Keep the largest entries of each delta and sum; no election, no rescaling."""
    cuts = [_cut(delta, share) for delta, share in zip(deltas, _each(density, deltas), strict=True)]
    return _streamed(deltas, lambda rows, _: add(_trimmed(rows, cuts)))


@rule(paper="2406.11617", space="dense")
def della(
    deltas: Sequence[DeltaRows],
    *,
    density: Density = 0.5,
    epsilon: Annotated[
        float, Range(0, 0.5), PerAdapter, "half-width of the range of keep probabilities around density"
    ] = 0.1,
    elect: Annotated[bool, "elect signs and average as TIES does, instead of the sum"] = True,
    normalize: Normalize = "count",
    seed: Seed = 0,
    key: str = "",
    weights: Sequence[float] = (),
) -> DeltaRows:
    """Drop at random, small entries of a row more often than large ones, rescale, elect, average (DELLA).

    Deep et al. (MAGPRUNE, row-wise): the keep probability of an entry grows linearly with the rank of its
    magnitude in its row, from density - epsilon to density + epsilon as in the authors' released code; what is kept is
    divided by its probability. ``density=1`` keeps everything.
    """
    shares = _each(density, deltas)
    widths = _each(epsilon, deltas)
    for share, width in zip(shares, widths, strict=True):
        if share == 1 or (width < share and share + width <= 1):
            continue
        raise UsageError(
            f"density {share:g} with epsilon {width:g} gives keep probabilities outside (0, 1]",
            "choose epsilon below density and at most 1 - density",
        )
    n = common_shape(deltas)[1]
    streams = [stream(seed, i, key) for i in range(len(deltas))]

    def masked(rows: list[torch.Tensor], start: int) -> list[torch.Tensor]:
        out = []
        for x, source, share, width in zip(rows, streams, shares, widths, strict=True):
            if share == 1:
                out.append(x)
                continue
            keep = _keep_probabilities(x, share, width)
            drawn = uniform(source, start * n, x.numel(), x.device).view_as(x)
            out.append(torch.where(drawn < keep, x.double() / keep, 0.0))
        return out

    fuse: Callable[[list[torch.Tensor]], torch.Tensor] = (
        _Election(weights, "total", normalize, own_signs=False) if elect else add
    )
    return _streamed(deltas, lambda rows, start: fuse(masked(rows, start)))


Gamma = Annotated[float, Range(0, 1), PerAdapter, "share of entries dropped as outliers, the largest ones"]


@rule(paper="2312.06795", space="dense")
def breadcrumbs(
    deltas: Sequence[DeltaRows],
    *,
    density: Density = 0.85,
    gamma: Gamma = 0.01,
    normalize: Normalize = "none",
    weights: Sequence[float] = (),
) -> DeltaRows:
    """Drop the largest outliers and the smallest entries of each delta, sum the rest (Model Breadcrumbs).

    Davari and Belilovsky: the mask of a layer is 0 beyond the top ``gamma`` and below the part that
    leaves ``density`` of the entries; then the sum. ``gamma=0`` keeps the outliers.
    """
    banded = _banded(deltas, density, gamma)
    divisor = total_of(weights, normalize)
    return _streamed(deltas, lambda rows, _: add(banded(rows)) / divisor)


@rule(paper="2312.06795", space="dense")
def breadcrumbs_ties(
    deltas: Sequence[DeltaRows],
    *,
    density: Density = 0.85,
    gamma: Gamma = 0.01,
    majority: Election = "total",
    normalize: Normalize = "none",
    own_signs: Own = False,
    weights: Sequence[float] = (),
) -> DeltaRows:
    """The entries that Model Breadcrumbs keeps, then elected signs as in TIES."""
    banded = _banded(deltas, density, gamma)
    fuse = _Election(weights, majority, normalize, own_signs)
    return _streamed(deltas, lambda rows, _: fuse(banded(rows)))


@rule(paper="2408.07990", space="dense")
def sce(
    deltas: Sequence[DeltaRows],
    *,
    density: Share = 0.2,
    renormalize: Annotated[bool, "divide each entry by the coefficients of the adapters that remain in it"] = True,
) -> DeltaRows:
    """Select the entries that vary most across adapters, weigh adapters by energy, erase minority signs (SCE).

    Wan et al. (FuseChat): Select the top ``density`` of entries by variance over the deltas; Calculate
    eta_t = sum(delta_t^2) / sum over t of the same, on what was selected; Erase entries against the sign of the
    sum; then sum eta_t delta_t. ``renormalize`` divides by the eta that remain at an entry, as their merger does.
    """
    shape = common_shape(deltas)
    spread = ComputedRows(shape, lambda start, stop: _variance([d.rows(start, stop) for d in deltas]))
    cut = _cut(spread, density)
    energies: list[list[float]] = [[] for _ in deltas]
    for start, stop in blocks(shape):
        selected = _select([d.rows(start, stop) for d in deltas], cut)
        for mine, x in zip(energies, selected, strict=True):
            mine += row_energies(x)
    sums = [fsum(mine) for mine in energies]
    whole = fsum(sums)
    eta = [value / whole if whole else 1 / len(sums) for value in sums]

    def block(rows: list[torch.Tensor], _: int) -> torch.Tensor:
        selected = _select(rows, cut)
        sign = add(selected).sign()
        kept = [torch.where((x.sign() == sign) & (x != 0), x.double(), 0.0) for x in selected]
        merged = add([x * e for x, e in zip(kept, eta, strict=True)])
        if not renormalize:
            return merged
        weight = add([(x != 0) * e for x, e in zip(kept, eta, strict=True)])
        return torch.where(weight > 0, merged / weight, 0.0)

    return _streamed(deltas, block)


class _Election:
    """Steps 2 and 3 of TIES, algorithm 1: elect a sign per entry, then bring those that agree together.

    Args:
        weights: what each delta was multiplied by.
        majority, normalize, own_signs: see `ties`.
    """

    def __init__(self, weights: Sequence[float], majority: str, normalize: str, own_signs: bool) -> None:
        self._weights, self._majority, self._normalize, self._own = weights, majority, normalize, own_signs

    def __call__(self, tensors: Sequence[torch.Tensor]) -> torch.Tensor:
        voters = [x / w for x, w in zip(tensors, self._weights, strict=True)] if self._own else tensors
        sign = add(voters).sign()
        if self._majority == "frequency":
            votes = add([x.sign() for x in voters]).sign()
            sign = torch.where(votes == 0, sign, votes)
        agree = [(x.sign() == sign) & (x != 0) for x in voters]
        found = add([torch.where(mask, x, 0.0) for x, mask in zip(tensors, agree, strict=True)])
        if self._normalize == "none":
            return found
        sizes = [abs(w) if self._normalize == "weights" else 1.0 for w in self._weights]
        shares = add([mask.double() * size for mask, size in zip(agree, sizes, strict=True)])
        return torch.where(shares > 0, found / shares, 0.0)


def total_of(weights: Sequence[float], normalize: str) -> float:
    """What a whole sum is divided by: the weights, the number of adapters, or 1.

    Raises:
        UsageError: the weights add up to 0.
    """
    found = {"weights": fsum(weights), "count": float(len(weights)), "none": 1.0}[normalize]
    if found == 0:
        raise UsageError("the weights add up to 0, by which nothing can be divided", f"leave out {option('normalize')}")
    return found


def _banded(
    deltas: Sequence[DeltaRows], density: float, gamma: float
) -> Callable[[list[torch.Tensor]], list[torch.Tensor]]:
    """Breadcrumbs' mask: neither the largest nor the smallest entries of each delta."""
    pairs = list(zip(_each(density, deltas), _each(gamma, deltas), strict=True))
    for share, outliers in pairs:
        if share + outliers > 1:
            raise UsageError(
                f"density {share:g} and gamma {outliers:g} add up to more than 1", "keep at most what gamma leaves"
            )
    bands = [_band(delta, share, outliers) for delta, (share, outliers) in zip(deltas, pairs, strict=True)]

    def banded(rows: list[torch.Tensor]) -> list[torch.Tensor]:
        kept = []
        for x, (low, high) in zip(rows, bands, strict=True):
            size = x.abs()
            kept.append(torch.where((size >= low) & (size <= high), x, 0.0))
        return kept

    return banded


def _streamed(deltas: Sequence[DeltaRows], rule: Callable[[list[torch.Tensor], int], torch.Tensor]) -> DeltaRows:
    """The delta whose rows are ``rule(rows of each delta, first row)``, rounded to float32."""
    return ComputedRows(
        common_shape(deltas), lambda start, stop: rule([d.rows(start, stop) for d in deltas], start).float()
    )


def _each(value: float | Sequence[float], deltas: Sequence[DeltaRows]) -> list[float]:
    """A parameter for each delta: one value for all, or one each.

    Raises:
        UsageError: another number of them.
    """
    found = [float(one) for one in value] if isinstance(value, (list, tuple)) else [float(value)] * len(deltas)  # type: ignore[arg-type]
    if len(found) != len(deltas):
        raise UsageError(
            f"{counted(len(found), 'value')} of a parameter for {counted(len(deltas), 'adapter')}",
            "give one, or one for each",
        )
    return found


def _cut(delta: DeltaRows, density: float) -> float:
    """The magnitude at or above which the largest ``density`` of the entries lie."""
    entries = delta.shape[0] * delta.shape[1]
    return kth_magnitudes(delta, [max(1, int(density * entries))])[0] if density < 1 else 0.0


def _band(delta: DeltaRows, density: float, gamma: float) -> tuple[float, float]:
    """The magnitudes between which entries are kept, both ends included."""
    entries = delta.shape[0] * delta.shape[1]
    outliers = min(int(gamma * entries), entries - 1)
    last = min(entries, outliers + max(1, int(density * entries)))
    high, low = kth_magnitudes(delta, [outliers + 1, last])
    return (low if last < entries else 0.0), high


def _trimmed(rows: Sequence[torch.Tensor], cuts: Sequence[float]) -> list[torch.Tensor]:
    return [torch.where(x.abs() >= cut, x, 0.0) for x, cut in zip(rows, cuts, strict=True)]


def _dropper(
    deltas: Sequence[DeltaRows], density: float, seed: int, key: str
) -> Callable[[list[torch.Tensor], int], list[torch.Tensor]]:
    """DARE's mask: each entry kept with probability ``density`` and divided by it."""
    n = common_shape(deltas)[1]
    streams = [stream(seed, i, key) for i in range(len(deltas))]
    shares = _each(density, deltas)

    def masked(rows: list[torch.Tensor], start: int) -> list[torch.Tensor]:
        kept = []
        for x, source, share in zip(rows, streams, shares, strict=True):
            if share == 1:
                kept.append(x)
                continue
            drawn = uniform(source, start * n, x.numel(), x.device).view_as(x)
            kept.append(torch.where(drawn < share, x.double() / share, 0.0))
        return kept

    return masked


def _keep_probabilities(x: torch.Tensor, density: float, epsilon: float) -> torch.Tensor:
    """Per row, from density - epsilon for the smallest magnitude to density + epsilon for the largest."""
    n = x.shape[1]
    order = x.abs().argsort(dim=1, stable=True)
    places = torch.linspace(-1, 1, n, dtype=torch.float64) if n > 1 else torch.zeros(1, dtype=torch.float64)
    places = places.to(x.device)
    keep = torch.empty(x.shape, dtype=torch.float64, device=x.device)
    return keep.scatter_(1, order, (density + epsilon * places).expand_as(keep))


def _variance(rows: Sequence[torch.Tensor]) -> torch.Tensor:
    """The variance over adapters at each entry, around their mean, in float32."""
    mean = add(rows) / len(rows)
    return (add([(x - mean).square() for x in rows]) / len(rows)).float()


def _select(rows: Sequence[torch.Tensor], cut: float) -> list[torch.Tensor]:
    varied = _variance(rows) >= cut
    return [torch.where(varied, x, 0.0) for x in rows]
