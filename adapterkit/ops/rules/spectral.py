"""Rules on singular vectors and values, in the core space of the adapters: TSV-M, Iso-C, Iso-CTS.

The papers define these on full m x n matrices. All singular vectors of low-rank deltas lie in the span of their
factors, so the core matrices (at most R x R, R the sum of ranks) give the same results; where a paper counts min(m, n)
singular values, a low-rank delta has R that are not zero, and R is what is counted here.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated

from adapterkit.ops.lowrank import Core, Factors, Svd, core_of, numerical_rank
from adapterkit.ops.rows import add
from adapterkit.ops.rules.registry import Range, rule

if TYPE_CHECKING:
    from collections.abc import Sequence

    import torch
else:
    from adapterkit.ops._torch import torch


@rule(paper="2412.00081", space="core", inner=True)
def tsv(parts: Sequence[Factors]) -> Factors:
    """Keep each adapter's share of singular triples and make their directions orthogonal across adapters (TSV-M).

    Gargiulo et al.: the top R/T triples of each of the T deltas; U = [U_1 ... U_T] and V likewise are replaced by the
    nearest orthonormal matrices (orthogonal Procrustes); the result is U diag(S) V^T.
    """
    core = core_of(parts)
    share = max(1, min(core.left.shape[1], core.right.shape[1]) // len(parts))
    triples = [_triples(matrix, share) for matrix in core.cores]
    u, s, v = (torch.cat(group, -1) for group in zip(*triples, strict=True))
    return core.lift(nearest_orthonormal(u) * s @ nearest_orthonormal(v).T)


@rule(paper="2502.04959", space="core", inner=True)
def iso_c(parts: Sequence[Factors]) -> Factors:
    """The weighted sum with all its singular values made equal to their mean (Iso-C).

    Marczak et al.: sum_t delta_t = U S V^T becomes mean(S) U V^T; the mean is over the nonzero s.
    """
    core = core_of(parts)
    u, s, v = _triples(add(core.cores), None)
    return _isotropic(core, u, s, v)


@rule(paper="2502.04959", space="core", inner=True)
def iso_cts(
    parts: Sequence[Factors],
    *,
    common: Annotated[float, Range(0, 1), "share of the directions taken from the sum, not from single adapters"] = 0.8,
) -> Factors:
    """Iso-C with the weakest directions of the sum replaced by the adapters' own (Iso-CTS).

    Marczak et al.: the top k directions of the sum, then (R - k)/T of each delta outside
    their span, (I - U_k U_k^T) delta_t; both sides made orthonormal (Procrustes); all singular values their mean.
    """
    core = core_of(parts)
    u, s, v = _triples(add(core.cores), None)
    size = max(1, numerical_rank(torch.linalg.svdvals(torch.cat(core.cores, 1))))
    own = round((size - int(size * common)) / len(parts))
    k = max(0, size - own * len(parts))
    u, s, v = u[:, :k], s[:k], v[:, :k]
    groups = [(u, s, v)] + [_triples(matrix - u @ (u.T @ matrix), own) for matrix in core.cores]
    u, s, v = (torch.cat(group, -1) for group in zip(*groups, strict=True))
    return _isotropic(core, nearest_orthonormal(u), s, nearest_orthonormal(v))


def nearest_orthonormal(x: torch.Tensor) -> torch.Tensor:
    """The polar factor of ``x``, P Q^T of its SVD P D Q^T: the solution of the orthogonal Procrustes problem.

    Directions that are not there (D = 0, as when two adapters are the same) are left out, so the result is unique.
    """
    if x.shape[1] == 0:
        return x
    p, d, qh = torch.linalg.svd(x, full_matrices=False)
    k = numerical_rank(d)
    polar: torch.Tensor = p[:, :k] @ qh[:k]
    return polar


def _isotropic(core: Core, u: torch.Tensor, s: torch.Tensor, v: torch.Tensor) -> Factors:
    level = float(s.mean()) if len(s) else 0.0
    # Not by another SVD: with all singular values equal, its vectors would be any rotation of these.
    return Svd(core.left @ u, torch.full_like(s, level), core.right @ v).factors() if len(s) else core.lift(u @ v.T)


def _triples(matrix: torch.Tensor, count: int | None) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """The leading singular triples of a core, without those that are rounding: their directions mean nothing."""
    u, s, vh = torch.linalg.svd(matrix, full_matrices=False)
    k = numerical_rank(s) if count is None else min(count, numerical_rank(s))
    return u[:, :k], s[:k], vh[:k].T
