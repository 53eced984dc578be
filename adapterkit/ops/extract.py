"""A low-rank adapter out of any delta that gives rows: a fine-tune's difference, or the result of a dense rule.

``low_rank`` needs one pass over the rows per iteration and memory for two thin matrices. Subspace iteration on
D^T D (Halko, Martinsson and Tropp, SIAM Review 2011, section 4.5): from an orthonormal X [n, l], one pass gives both
Y = D X and Z = D^T Y; the singular values of Y say what X captures, and the next X is an orthonormal basis of Z.
Since D X X^T is a projection, ||D - best rank-k of D X X^T||^2 = ||D||^2 - (sum of the k largest s_i(Y)^2) exactly, so
the error reported is not an estimate, and the iteration stops when what another pass could still gain is small.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from adapterkit.ops.counter import stream, uniform
from adapterkit.ops.lowrank import Factors, Svd, Truncated, check_bounds, cut, pick_rank, truncate
from adapterkit.ops.rows import Dense, blocks, device_of, elements_on, materialize
from adapterkit.ops.select import energy as energy_of
from adapterkit.ops.threads import one_thread

if TYPE_CHECKING:
    import torch

    from adapterkit.ops.rows import DeltaRows
else:
    from adapterkit.ops._torch import torch

TOLERANCE = 0.002
"""Stop when the error still to gain, extrapolated, is below this share: the promise is 1 % of the optimum."""

_MAX_PASSES = 30
_FIRST_GUESS = 16

_HELD = 1 << 24
"""Matrices up to this many entries (64 MiB) are computed once and kept; the bits are the same either way."""


_HELD_THERE = 1 << 28
"""On a device 1 GiB: each pass would read them again, and send them there."""


@dataclass(frozen=True, eq=False)
class _Sketch:
    """``u diag(s) v^T`` of D projected on a subspace of dimension l, and the basis to go on with."""

    found: Svd
    basis: torch.Tensor


@one_thread()
def low_rank(
    delta: DeltaRows,
    *,
    rank: int | None = None,
    energy: float | None = None,
    max_error: float | None = None,
    exact: bool = False,
    seed: int = 0,
) -> Truncated:
    """The delta at a rank or under a bound, within 1 % of the optimal Frobenius error (``exact``: at the optimum).

    Args:
        delta: [m, n]; factors are truncated exactly, without a pass over rows.
        rank: at most this inner dimension.
        energy: the smallest rank found that keeps this share of the squared norm; capped by ``rank``.
        max_error: the smallest rank found with at most this relative error; capped by ``rank``.
        exact: a dense float64 SVD; holds the whole matrix.
        seed: of the random start; the result is the same for the same seed.

    Raises:
        UsageError: a bound is out of range.
    """
    check_bounds(rank, energy, max_error)
    if isinstance(delta, Factors):
        return truncate(delta, rank=rank, energy=energy, max_error=max_error)
    small = min(delta.shape)
    most = _HELD if device_of(delta).type == "cpu" else _HELD_THERE
    if delta.shape[0] * delta.shape[1] <= most:
        delta = Dense(materialize(delta))
    total = 0.0 if exact else energy_of(delta)
    bounded = energy is not None or max_error is not None
    target = min(rank or _FIRST_GUESS, _FIRST_GUESS) if bounded else rank
    while not exact and target is not None and (width := 2 * target + 8) < small // 2:
        found = _leading(delta, target, width, total, seed)
        tails = _tails(found.s[:target], total)
        k = pick_rank(tails, total, rank, energy, max_error)
        if k <= target:
            return Truncated(found.factors(k), found.s[:target], float(tails[k]) ** 0.5, total**0.5)
        target *= 2
    return _dense(delta, rank, energy, max_error)


def _dense(delta: DeltaRows, rank: int | None, energy: float | None, max_error: float | None) -> Truncated:
    u, s, vh = torch.linalg.svd(materialize(delta).double(), full_matrices=False)
    return cut(Svd(u, s, vh.T), rank, energy, max_error)


def _leading(delta: DeltaRows, k: int, width: int, total: float, seed: int) -> Svd:
    """About the ``k`` leading triples, from a subspace of dimension ``width`` iterated until it has settled."""
    basis = _start(delta.shape[1], width, seed)
    kept: list[float] = []
    for _ in range(_MAX_PASSES):
        sketch = _pass(delta, basis)
        kept.append(float(sketch.found.s[:k].square().sum()))
        if _settled(kept, total):
            break
        basis = sketch.basis
    return sketch.found


def _settled(kept: list[float], total: float) -> bool:
    """Whether the energy further passes would add, by the geometric trend so far, is small against the error."""
    left = total - kept[-1]
    if left <= 1e-12 * total:
        return True
    if len(kept) < 3:
        return False
    gain, before = kept[-1] - kept[-2], kept[-2] - kept[-3]
    if gain <= 0:
        return True
    ratio = min(gain / before, 0.95) if before > 0 else 0.95
    # An error that is a share t too large is an energy that is about 2t of the squared error too small.
    return gain * ratio / (1 - ratio) <= 2 * TOLERANCE * left


def _pass(delta: DeltaRows, basis: torch.Tensor) -> _Sketch:
    m, n = delta.shape
    basis = basis.to(device_of(delta))
    y = torch.empty((m, basis.shape[1]), dtype=torch.float64, device=basis.device)
    z = torch.zeros((n, basis.shape[1]), dtype=torch.float64, device=basis.device)
    for start, stop in blocks((m, n), elements_on(basis.device)):
        rows = delta.rows(start, stop).double()
        y[start:stop] = rows @ basis
        z += rows.T @ y[start:stop]
    q, r = torch.linalg.qr(y)
    u, s, vh = torch.linalg.svd(r, full_matrices=False)
    return _Sketch(Svd(q @ u, s, basis @ vh.T), torch.linalg.qr(z)[0])


def _start(n: int, width: int, seed: int) -> torch.Tensor:
    """An orthonormal [n, width] from uniform entries in [-1, 1)."""
    draws = uniform(stream(seed, 0, "low_rank"), 0, n * width).view(n, width)
    q: torch.Tensor
    q, _ = torch.linalg.qr(draws.mul_(2).sub_(1))
    return q


def _tails(s: torch.Tensor, total: float) -> torch.Tensor:
    """The energy left after 0, 1, ... leading triples."""
    captured = torch.cat([s.new_zeros(1), s.square().cumsum(0)])
    return (total - captured).clamp(min=0)
