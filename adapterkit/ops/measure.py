"""What can be said about adapters from their factors: size, direction, spectrum, overlap, conflict."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

from adapterkit.errors import UsageError
from adapterkit.ops.counter import stream, uniform
from adapterkit.ops.lowrank import Factors, core_of, numerical_rank, svd
from adapterkit.ops.rows import DeltaRows, blocks, common_shape

if TYPE_CHECKING:
    from collections.abc import Sequence

    import torch
else:
    from adapterkit.ops._torch import torch

Side = Literal["output", "input"]


def norm(factors: Factors) -> float:
    """The Frobenius norm of the delta."""
    return float(torch.linalg.matrix_norm(core_of([factors]).cores[0]))


def inner(x: Factors, y: Factors) -> float:
    """The Frobenius inner product ``<X, Y> = tr((A_x A_y^T)^T (B_x^T B_y))``."""
    common_shape([x, y])
    return float(((x.a.double() @ y.a.double().T) * (x.b.double().T @ y.b.double())).sum())


def cosine(x: Factors, y: Factors) -> float:
    """The cosine between two deltas seen as vectors; 0 when one of them is zero."""
    size = norm(x) * norm(y)
    return max(-1.0, min(1.0, inner(x, y) / size)) if size else 0.0


def effective_rank(s: torch.Tensor, form: Literal["entropy", "participation"] = "entropy") -> float:
    """How many directions the singular values ``s`` amount to; 0 for a zero delta.

    ``entropy``: exp of the Shannon entropy of s / sum(s) (Roy and Vetterli, EUSIPCO 2007).
    ``participation``: (sum s^2)^2 / sum s^4, the participation ratio of the energies.
    """
    s = s[s > 0].double()
    if not len(s):
        return 0.0
    if form == "entropy":
        p = s / s.sum()
        return float(torch.exp(-(p * p.log()).sum()))
    energies = (s / s[0]).square()
    return float(energies.sum().square() / energies.square().sum())


def stable_rank(s: torch.Tensor) -> float:
    """``||X||_F^2 / ||X||_2^2`` from descending singular values; 0 for a zero delta."""
    return float((s / s[0]).double().square().sum()) if len(s) and float(s[0]) > 0 else 0.0


def overlap(x: Factors, y: Factors, side: Side = "output", top: int | None = None) -> float:
    """How far two deltas use the same directions, in [0, 1]: ``||U_x^T U_y||_F^2 / min(i, j)``.

    The measure of the LoRA paper (arXiv 2106.09685, equation 4), over the ``top`` singular directions of each (all
    that are not rounding when left out). ``side`` says which: output (left) or input (right) directions.
    """
    common_shape([x, y])
    u, v = _directions(x, side, top), _directions(y, side, top)
    smaller = min(u.shape[1], v.shape[1])
    return float((u.T @ v).square().sum()) / smaller if smaller else 0.0


def _directions(factors: Factors, side: Side, top: int | None) -> torch.Tensor:
    found = svd(factors)
    k = numerical_rank(found.s) if top is None else min(top, numerical_rank(found.s))
    return (found.u if side == "output" else found.v)[:, :k]


def sign_conflict(x: DeltaRows, y: DeltaRows, samples: int | None = None, seed: int = 0) -> float:
    """The share of entries at which two deltas have opposite signs, of those where both are nonzero.

    Every entry is looked at, block by block; or, for factors, ``samples`` entries drawn with ``seed``.

    Raises:
        UsageError: samples are asked of deltas that are not factors.
    """
    shape = common_shape([x, y])
    if samples is not None:
        if not (isinstance(x, Factors) and isinstance(y, Factors)):
            raise UsageError("sign conflicts can be sampled between low-rank deltas only", "leave samples out")
        i, j = _positions(shape, samples, seed)
        pairs = [(x.entries(i, j), y.entries(i, j))]
        products = (a * b for a, b in pairs)
    else:
        products = (x.rows(a, b).double() * y.rows(a, b) for a, b in blocks(shape))
    opposite = same = 0
    for product in products:
        opposite += int((product < 0).sum())
        same += int((product > 0).sum())
    return opposite / (opposite + same) if opposite + same else 0.0


def _positions(shape: tuple[int, int], samples: int, seed: int) -> tuple[torch.Tensor, torch.Tensor]:
    i = uniform(stream(seed, 0, "sign_conflict/rows"), 0, samples) * shape[0]
    j = uniform(stream(seed, 0, "sign_conflict/columns"), 0, samples) * shape[1]
    return i.long(), j.long()


@dataclass(frozen=True)
class Comparison:
    """Adapters on one weight, each against each; all matrices are symmetric, as nested tuples."""

    norms: tuple[float, ...]
    cosine: tuple[tuple[float, ...], ...]
    output_overlap: tuple[tuple[float, ...], ...]
    input_overlap: tuple[tuple[float, ...], ...]
    sign_conflict: tuple[tuple[float, ...], ...]


def compare(parts: Sequence[Factors], samples: int | None = 65536, seed: int = 0) -> Comparison:
    """Norms, and pairwise cosine, subspace overlap and sign conflict (sampled, or exact with ``samples=None``)."""
    common_shape(parts)

    def table(measure: str) -> tuple[tuple[float, ...], ...]:
        values: dict[tuple[int, int], float] = {}
        for i, x in enumerate(parts):
            for j, y in enumerate(parts[: i + 1]):
                values[i, j] = values[j, i] = _pair(measure, x, y, samples, seed)
        return tuple(tuple(values[i, j] for j in range(len(parts))) for i in range(len(parts)))

    return Comparison(tuple(norm(part) for part in parts), *(table(name) for name in _PAIRS))


_PAIRS = ("cosine", "output", "input", "conflict")


def _pair(measure: str, x: Factors, y: Factors, samples: int | None, seed: int) -> float:
    if measure == "cosine":
        return cosine(x, y)
    if measure == "conflict":
        return sign_conflict(x, y, samples, seed)
    return overlap(x, y, "output" if measure == "output" else "input")
