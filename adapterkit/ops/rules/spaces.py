"""Spaces in which adapters line up before an inner rule combines them: KnOTS, Core Space, Compress-then-Merge.

Each gives every adapter coordinates in one shared basis, hands the coordinates to the inner rule, and maps the
result back. With the linear rule, KnOTS and Core Space lose nothing: they equal the weighted sum.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, Any

from adapterkit.ops.lowrank import Core, Factors, core_of, numerical_rank, svd
from adapterkit.ops.rows import materialize
from adapterkit.ops.rules.parameters import Rank, Rule
from adapterkit.ops.rules.registry import RULES, Range, rule

if TYPE_CHECKING:
    from collections.abc import Sequence

    import torch
else:
    from adapterkit.ops._torch import torch

_HOOI_STEPS = 200
_HOOI_GAIN = 1e-10


@rule(paper="2410.19735", space="core")
def knots(parts: Sequence[Factors], *, rule: Rule = "ties", key: str = "", **inner: Any) -> Factors:
    """Combine in the shared output basis of all adapters, found by one SVD (KnOTS).

    Stoica et al.: [delta_1 ... delta_T] = U S [V_1 ... V_T]^T; the rule combines the S V_t^T [k, n], as in
    the released code, and U maps the result back.
    """
    core = core_of(parts)
    # right is orthonormal, so the SVD of the concatenated deltas is that of the concatenated cores.
    u, s, _ = torch.linalg.svd(torch.cat(core.cores, 1), full_matrices=False)
    u = u[:, : max(1, numerical_rank(s))]
    rows = core.right.T.contiguous()
    merged = _apply(rule, [Factors(u.T @ matrix, rows) for matrix in core.cores], key, inner)
    return Factors((core.left @ u).float(), merged)


@rule(paper="2509.17786", space="core")
def core(
    parts: Sequence[Factors],
    *,
    rule: Rule = "ties",
    balanced: Annotated[bool, "split each delta evenly between B and A first, so that only the delta counts"] = False,
    key: str = "",
    **inner: Any,
) -> Factors:
    """Combine R x R matrices in the reference bases of the stacked factors (Core Space).

    Panariello et al.: U_B = left singular vectors of [B_1 ... B_T], V_A = right singular vectors of
    [A_1; ...; A_T]; the rule combines M_t = U_B^T B_t A_t V_A; the result is U_B M V_A^T. The bases depend on how the
    scaling is split between B and A; ``balanced`` removes that freedom.
    """
    if balanced:
        parts = [svd(part).factors() for part in parts]
    found = reference_bases(parts)
    merged = _apply(rule, [_coordinates(matrix) for matrix in found.cores], key, inner)
    return found.lift(merged.double())


@rule(paper="2606.03723", space="core")
def ctm(
    parts: Sequence[Factors],
    *,
    rule: Rule = "ties",
    rank: Rank = None,
    beta: Annotated[float, Range(0, 1), "how much of the adapters' own norms counts when the basis is chosen"] = 0.25,
    key: str = "",
    **inner: Any,
) -> Factors:
    """Project all adapters on one pair of rank-r bases, then combine r x r matrices (Compress-then-Merge).

    He et al.: the bases are the Tucker-2 decomposition (HOSVD, then HOOI) of the core matrices, each
    rescaled to the norm beta ||M_t|| + (1 - beta) mean ||M_t||; the rule combines C_t = U^T delta_t V.
    The result has rank r by construction.
    """
    found = reference_bases(parts)
    r = rank or max(part.rank for part in parts)
    u, v = tucker2(_rescaled(found.cores, beta), r)
    merged = _apply(rule, [_coordinates(u.T @ matrix @ v) for matrix in found.cores], key, inner)
    return Core(found.left @ u, found.right @ v, ()).lift(merged.double())


def reference_bases(parts: Sequence[Factors]) -> Core:
    """The core in the singular bases of the stacked factors, strongest direction first."""
    core = core_of(parts)
    p = torch.linalg.svd(core.left.T @ torch.cat([part.b.double() for part in parts], 1))[0]
    q = torch.linalg.svd(core.right.T @ torch.cat([part.a.double() for part in parts], 0).T)[0]
    return Core(core.left @ p, core.right @ q, tuple(p.T @ matrix @ q for matrix in core.cores))


def tucker2(matrices: Sequence[torch.Tensor], rank: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Orthonormal U, V of at most ``rank`` columns that maximise ``sum_t ||U^T M_t V||^2`` (locally).

    De Lathauwer, De Moor and Vandewalle, SIAM J. Matrix Anal. Appl. 2000: start from the HOSVD, then alternate.
    """
    u = _leading(torch.cat(list(matrices), 1), rank)
    v = _leading(torch.cat([x.T for x in matrices], 1), rank)
    before = 0.0
    for _ in range(_HOOI_STEPS):
        u = _leading(torch.cat([x @ v for x in matrices], 1), rank)
        v = _leading(torch.cat([x.T @ u for x in matrices], 1), rank)
        captured = float(sum((u.T @ x @ v).square().sum() for x in matrices))
        if captured - before <= _HOOI_GAIN * captured:
            break
        before = captured
    return u, v


def _leading(matrix: torch.Tensor, rank: int) -> torch.Tensor:
    u: torch.Tensor = torch.linalg.svd(matrix, full_matrices=False)[0]
    return u[:, :rank]


def _rescaled(matrices: Sequence[torch.Tensor], beta: float) -> list[torch.Tensor]:
    norms = [float(torch.linalg.matrix_norm(x)) for x in matrices]
    mean = sum(norms) / len(norms)
    return [x * (beta + (1 - beta) * mean / own) if own else x for x, own in zip(matrices, norms, strict=True)]


def _coordinates(matrix: torch.Tensor) -> Factors:
    return Factors(matrix, torch.eye(matrix.shape[1], dtype=torch.float64).to(matrix.device))


def _apply(rule: str, parts: Sequence[Factors], key: str, inner: dict[str, Any]) -> torch.Tensor:
    """The inner rule's result as a float32 matrix."""
    found = RULES[rule]
    return materialize(found.function(parts, **inner, **({"key": key} if found.keyed else {})))
