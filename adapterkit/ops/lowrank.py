"""Exact algebra on low-rank deltas: everything through QR factors, never through the m x n matrix.

With B_t of shape [m, r_t] and A_t of shape [r_t, n], stack B = [B_1 | B_2 | ...] and A = [A_1; A_2; ...]. From the
thin QRs B = P X and A^T = Q Y, each delta is B_t A_t = P (X_t Y_t^T) Q^T: a small core between orthonormal
bases, so norms, spectra and the best rank-R approximation of any combination cost O((m + n) R^2).

Stored factors are float32; QR, SVD and sums run in float64 and are rounded once, so that ``stack`` equals the
float64 sum to 1e-6 and a truncation equals the dense optimum to 1e-5 (both relative, measured in the tests).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from adapterkit.errors import AdapterError, UsageError, counted
from adapterkit.ops.rows import TILE, common_shape
from adapterkit.ops.threads import one_thread

if TYPE_CHECKING:
    from collections.abc import Sequence

    import torch
else:
    from adapterkit.ops._torch import torch

RELATIVE_ZERO = 1e-6
"""Singular values below this share of the largest are rounding of float32 factors, not directions."""


@dataclass(frozen=True, eq=False)
class Factors:
    """A low-rank delta ``b @ a`` with the adapter's scaling already folded in.

    ``b`` is ``[m, r]``, ``a`` is ``[r, n]``; r may exceed min(m, n).

    Raises:
        AdapterError: the shapes do not fit, a factor is empty, or an entry is NaN or infinite.
    """

    b: torch.Tensor
    a: torch.Tensor

    def __post_init__(self) -> None:
        b, a = self.b, self.a
        if b.ndim != 2 or a.ndim != 2 or b.shape[1] != a.shape[0]:
            raise AdapterError(
                f"low-rank factors of shapes {list(b.shape)} and {list(a.shape)} do not fit",
                "expected [m, r] and [r, n]",
            )
        if b.numel() == 0 or a.numel() == 0:
            raise AdapterError(
                f"low-rank factors of shapes {list(b.shape)} and {list(a.shape)} are empty",
                "save the adapter again, with the sharded parameters gathered",
            )
        if not (bool(torch.isfinite(b).all()) and bool(torch.isfinite(a).all())):
            raise AdapterError("a low-rank factor has NaN or infinite entries", "use an earlier checkpoint")

    @property
    def shape(self) -> tuple[int, int]:
        return self.b.shape[0], self.a.shape[1]

    @property
    def place(self) -> torch.device:
        """Where they are."""
        return self.b.device

    @property
    def rank(self) -> int:
        """The inner dimension, which bounds the rank of the delta."""
        return self.b.shape[1]

    def rows(self, start: int, stop: int) -> torch.Tensor:
        """Rows of the delta, summed in float64 tile by tile and rounded to float32 once."""
        first = start - start % TILE
        a = self.a.double()
        if a.device.type != "cpu" and stop > start:  # one product: a device has bits of its own anyway
            return (self.b[start:stop].double() @ a).float()
        tiles = [self.b[i : i + TILE].double() @ a for i in range(first, stop, TILE)]
        if not tiles:
            return self.a.new_empty((0, a.shape[1]), dtype=torch.float32)
        return torch.cat(tiles)[start - first : stop - first].float()

    def entries(self, i: torch.Tensor, j: torch.Tensor) -> torch.Tensor:
        """The entries at rows ``i`` and columns ``j`` (int64, same length) in float64."""
        i, j = i.to(self.b.device), j.to(self.b.device)
        return (self.b[i].double() * self.a.T[j].double()).sum(1)

    def scaled(self, weight: float) -> Factors:
        """``weight`` times the delta; the weight, sign and all, goes into ``b``."""
        if weight == 1.0:
            return self
        return Factors((self.b.double() * weight).float(), self.a)

    def padded(self, rank: int) -> Factors:
        """The same delta with inner dimension at least ``rank``, filled with zeros: some formats want one rank."""
        extra = rank - self.rank
        if extra <= 0:
            return self
        b = torch.nn.functional.pad(self.b, (0, extra))
        return Factors(b, torch.nn.functional.pad(self.a, (0, 0, 0, extra)))


@dataclass(frozen=True, eq=False)
class Svd:
    """``u @ diag(s) @ v.T`` in float64: ``u`` [m, k], ``s`` [k] descending, ``v`` [n, k]."""

    u: torch.Tensor
    s: torch.Tensor
    v: torch.Tensor

    def factors(self, rank: int | None = None) -> Factors:
        """The leading ``rank`` triples as float32 factors, sqrt(s) on each side so that both have the same scale."""
        k = len(self.s) if rank is None else min(rank, len(self.s))
        root = self.s[:k].sqrt()
        return Factors((self.u[:, :k] * root).float(), (self.v[:, :k] * root).T.contiguous().float())

    @property
    def rank(self) -> int:
        """How many singular values are not rounding."""
        return numerical_rank(self.s)


@dataclass(frozen=True, eq=False)
class Core:
    """Deltas between shared orthonormal bases: ``left @ cores[t] @ right.T``, all float64.

    ``left`` is [m, p], ``right`` is [n, q], each core [p, q] with p = min(m, R), q = min(n, R), R the sum of ranks.
    """

    left: torch.Tensor
    right: torch.Tensor
    cores: tuple[torch.Tensor, ...]

    @one_thread()
    def svd(self, core: torch.Tensor) -> Svd:
        """The singular value decomposition of ``left @ core @ right.T``."""
        u, s, vh = torch.linalg.svd(core, full_matrices=False)
        return Svd(self.left @ u, s, self.right @ vh.T)

    def lift(self, core: torch.Tensor) -> Factors:
        """``left @ core @ right.T`` as balanced factors of its numerical rank (at least 1)."""
        found = self.svd(core)
        return found.factors(max(1, found.rank))


@dataclass(frozen=True, eq=False)
class Truncated:
    """An approximation of a delta and what it costs.

    ``error`` is the Frobenius norm of what was cut (before the factors are rounded to float32), ``norm`` that of
    the whole delta, ``spectrum`` its singular values in float64 (the leading ones when not all were computed).
    """

    factors: Factors
    spectrum: torch.Tensor
    error: float
    norm: float

    @property
    def rank(self) -> int:
        return self.factors.rank

    @property
    def relative_error(self) -> float:
        return self.error / self.norm if self.norm else 0.0

    @property
    def energy(self) -> float:
        """The share of the squared Frobenius norm that is kept."""
        return 1.0 - self.relative_error**2


def stack(parts: Sequence[Factors], weights: Sequence[float] | None = None) -> Factors:
    """``sum(w_t * delta_t)``, exactly, at the sum of the ranks: ``b = [w_1 B_1 | ...]``, ``a = [A_1; ...]``."""
    common_shape(parts)
    weights = [1.0] * len(parts) if weights is None else weights
    if len(weights) != len(parts):
        given = counted(len(weights), "weight was", "weights were")
        raise UsageError(f"{given} given for {counted(len(parts), 'adapter')}", "give one weight per adapter")
    scaled = [part.scaled(weight) for part, weight in zip(parts, weights, strict=True)]
    return Factors(torch.cat([p.b.float() for p in scaled], 1), torch.cat([p.a.float() for p in scaled], 0))


@one_thread()
def core_of(parts: Sequence[Factors]) -> Core:
    """The shared bases of all parts and the core of each (QR of the stacked factors)."""
    common_shape(parts)
    left, x = torch.linalg.qr(torch.cat([part.b.double() for part in parts], 1))
    right, y = torch.linalg.qr(torch.cat([part.a.double() for part in parts], 0).T)
    ranks = [part.rank for part in parts]
    cores = tuple(xt @ yt.T for xt, yt in zip(x.split(ranks, 1), y.split(ranks, 1), strict=True))
    return Core(left, right, cores)


def svd(factors: Factors) -> Svd:
    """The exact singular value decomposition of a delta; at most ``min(m, n, r)`` triples."""
    core = core_of([factors])
    return core.svd(core.cores[0])


@one_thread()
def spectrum(factors: Factors) -> torch.Tensor:
    """The singular values of a delta, descending, float64; at most ``min(m, n, r)`` of them."""
    s: torch.Tensor = torch.linalg.svdvals(core_of([factors]).cores[0])
    return s


def numerical_rank(s: torch.Tensor) -> int:
    """How many of the descending singular values ``s`` are above rounding (``RELATIVE_ZERO``)."""
    return int((s > RELATIVE_ZERO * s[0]).sum()) if len(s) and float(s[0]) > 0 else 0


def truncate(
    factors: Factors, *, rank: int | None = None, energy: float | None = None, max_error: float | None = None
) -> Truncated:
    """The best approximation in the Frobenius norm (Eckart-Young) that meets the bounds given.

    Args:
        rank: at most this inner dimension.
        energy: the smallest rank that keeps this share of the squared norm; capped by ``rank``.
        max_error: the smallest rank with at most this relative error; capped by ``rank``.

    Raises:
        UsageError: a bound is out of range.
    """
    check_bounds(rank, energy, max_error)
    return cut(svd(factors), rank, energy, max_error)


def truncate_all(
    parts: Sequence[Factors], *, rank: int | None = None, energy: float | None = None, max_error: float | None = None
) -> list[Truncated]:
    """As `truncate`, of several deltas. On a device those of equal shapes are decomposed together.

    Raises:
        UsageError: a bound is out of range.
    """
    check_bounds(rank, energy, max_error)
    alike: dict[object, list[int]] = {}
    for at, part in enumerate(parts):
        # LAPACK takes them one by one anyway, and its bits on the CPU are those of a single one.
        key = at if part.b.device.type == "cpu" else (part.b.shape, part.a.shape, part.b.device)
        alike.setdefault(key, []).append(at)
    found: dict[int, Truncated] = {}
    for places in alike.values():
        several = [parts[at] for at in places]
        for at, one in zip(places, [svd(several[0])] if len(places) == 1 else _svds(several), strict=True):
            found[at] = cut(one, rank, energy, max_error)
    return [found[at] for at in range(len(parts))]


def _svds(parts: Sequence[Factors]) -> list[Svd]:
    """The decompositions of deltas of equal shapes, in one call each of QR and SVD."""
    left, x = torch.linalg.qr(torch.stack([part.b for part in parts]).double())
    right, y = torch.linalg.qr(torch.stack([part.a for part in parts]).double().mT)
    u, s, vh = torch.linalg.svd(x @ y.mT, full_matrices=False)
    us, vs = left @ u, right @ vh.mT
    return [Svd(us[at], s[at], vs[at]) for at in range(len(parts))]


def cut(found: Svd, rank: int | None, energy: float | None, max_error: float | None) -> Truncated:
    """A complete decomposition, cut where the bounds say."""
    squares = found.s.square()
    # Summed from the small end: a tail of 1e-12 must not drown in a total of 1.
    tails = torch.cat([squares.flip(0).cumsum(0).flip(0), squares.new_zeros(1)])
    k = pick_rank(tails, float(tails[0]), rank, energy, max_error)
    return Truncated(found.factors(k), found.s, float(tails[k]) ** 0.5, float(tails[0]) ** 0.5)


def pick_rank(
    tails: torch.Tensor, total: float, rank: int | None, energy: float | None, max_error: float | None
) -> int:
    """The smallest rank whose cut energy ``tails[rank]`` meets the bounds, at most ``rank``, at least 1.

    ``tails[k]`` is the squared norm left after k triples; ``len(tails)`` is returned when no rank in it meets them.
    """
    allowed = total
    if energy is not None:
        allowed = min(allowed, (1.0 - energy) * total)
    if max_error is not None:
        allowed = min(allowed, max_error**2 * total)
    cap = len(tails) - 1 if rank is None else min(rank, len(tails) - 1)
    if energy is None and max_error is None:
        return max(1, cap)
    # The slack is float64 rounding of the sums, so that energy=1 means "all but rounding", not "all bits".
    enough = (tails <= allowed + 1e-14 * total).nonzero()
    needed = int(enough[0]) if len(enough) else len(tails)
    return max(1, min(needed, rank) if rank is not None else needed)


def check_bounds(rank: int | None, energy: float | None, max_error: float | None) -> None:
    """Refuse bounds that no truncation can mean."""
    if rank is not None and rank < 1:
        raise UsageError(f"rank must be at least 1, got {rank}", "leave it out to keep every direction")
    if energy is not None and not 0 < energy <= 1:
        raise UsageError(f"energy must be in (0, 1], got {energy:g}", "0.99 keeps 99 % of the squared norm")
    if max_error is not None and not 0 <= max_error < 1:
        raise UsageError(f"max_error must be in [0, 1), got {max_error:g}", "0.1 allows a relative error of 10 %")
