"""The combination rules as their papers write them: dense, float64, one whole matrix at a time.

Written from the definitions, with sorting where the package selects and Python integers where it uses tensors, so that
the two can disagree.
"""

from __future__ import annotations

from hashlib import blake2b
from math import ceil

import torch
from torch import Tensor

MASK = (1 << 64) - 1


def splitmix64(state: int) -> int:
    """One output of SplitMix64 for an advanced state (Steele, Lea and Flood, OOPSLA 2014)."""
    z = state & MASK
    z = ((z ^ (z >> 30)) * 0xBF58476D1CE4E5B9) & MASK
    z = ((z ^ (z >> 27)) * 0x94D049BB133111EB) & MASK
    return z ^ (z >> 31)


def uniforms(seed: int, adapter: int, key: str, shape: tuple[int, int]) -> Tensor:
    """The uniform number of each entry: the top 53 bits of output i of the stream."""
    start = int.from_bytes(blake2b(f"{seed}/{adapter}/{key}".encode(), digest_size=8).digest(), "little")
    count = shape[0] * shape[1]
    outputs = [splitmix64(start + (i + 1) * 0x9E3779B97F4A7C15) for i in range(count)]
    return torch.tensor([(z >> 11) / 2**53 for z in outputs], dtype=torch.float64).view(shape)


def top(x: Tensor, count: int) -> Tensor:
    """A mask of the ``count`` largest magnitudes (no ties in the tests)."""
    mask = torch.zeros(x.numel(), dtype=torch.bool)
    mask[x.abs().flatten().sort(descending=True).indices[:count]] = True
    return mask.view_as(x)


def elect_and_average(deltas: list[Tensor], majority: str = "total") -> Tensor:
    out = torch.zeros_like(deltas[0])
    for i in range(out.shape[0]):
        for j in range(out.shape[1]):
            values = [float(d[i, j]) for d in deltas]
            ahead = sum(v > 0 for v in values) - sum(v < 0 for v in values)
            vote = sum(values) if majority == "total" or ahead == 0 else ahead
            agreeing = [v for v in values if v * vote > 0]
            out[i, j] = sum(agreeing) / len(agreeing) if agreeing else 0.0
    return out


def ties(deltas: list[Tensor], density: float, majority: str = "total") -> Tensor:
    return elect_and_average([d * top(d, int(density * d.numel())) for d in deltas], majority)


def magnitude_prune(deltas: list[Tensor], density: float) -> Tensor:
    return sum(d * top(d, int(density * d.numel())) for d in deltas)


def dropped(deltas: list[Tensor], density: float, seed: int, key: str) -> list[Tensor]:
    masks = [uniforms(seed, t, key, d.shape) < density for t, d in enumerate(deltas)]
    return [d * mask / density for d, mask in zip(deltas, masks, strict=True)]


def della(deltas: list[Tensor], density: float, epsilon: float, seed: int, key: str) -> list[Tensor]:
    """The pruned deltas: in each row, rank r of n has keep probability density - epsilon + 2 epsilon r / (n - 1)."""
    out = []
    for t, d in enumerate(deltas):
        m, n = d.shape
        keep = torch.empty_like(d)
        for i in range(m):
            for rank, j in enumerate(sorted(range(n), key=lambda j, row=d[i]: abs(float(row[j])))):
                keep[i, j] = density - epsilon + 2 * epsilon * rank / (n - 1)
        out.append(d * (uniforms(seed, t, key, d.shape) < keep) / keep)
    return out


def breadcrumbs(deltas: list[Tensor], density: float, gamma: float) -> Tensor:
    out = torch.zeros_like(deltas[0])
    for d in deltas:
        outliers = int(gamma * d.numel())
        out += d * (top(d, outliers + int(density * d.numel())) & ~top(d, outliers))
    return out


def sce(deltas: list[Tensor], density: float, renormalize: bool) -> Tensor:
    stacked = torch.stack(deltas)
    selected = stacked * top(stacked.var(0, correction=0), int(density * deltas[0].numel()))
    energies = selected.square().sum((1, 2))
    eta = (energies / energies.sum())[:, None, None]
    agree = selected * selected.sum(0) > 0
    merged = (selected * agree * eta).sum(0)
    return torch.where(agree.any(0), merged / (agree * eta).sum(0), 0.0) if renormalize else merged


def orthonormal(x: Tensor) -> Tensor:
    """(X X^T)^(-1/2) X, the other way to write the solution of the orthogonal Procrustes problem."""
    values, vectors = torch.linalg.eigh(x.T @ x)
    return x @ vectors @ torch.diag(values.rsqrt()) @ vectors.T


def tsv(deltas: list[Tensor], share: int) -> Tensor:
    found = [torch.linalg.svd(d, full_matrices=False) for d in deltas]
    u = torch.cat([f.U[:, :share] for f in found], 1)
    s = torch.cat([f.S[:share] for f in found])
    v = torch.cat([f.Vh[:share].T for f in found], 1)
    return orthonormal(u) @ torch.diag(s) @ orthonormal(v).T


def iso_c(deltas: list[Tensor], rank: int) -> Tensor:
    found = torch.linalg.svd(sum(deltas), full_matrices=False)
    return found.S[:rank].mean() * found.U[:, :rank] @ found.Vh[:rank]


def iso_cts(deltas: list[Tensor], rank: int, common: float) -> Tensor:
    own = round((rank - int(rank * common)) / len(deltas))
    k = rank - own * len(deltas)
    found = torch.linalg.svd(sum(deltas), full_matrices=False)
    us, ss, vs = [found.U[:, :k]], [found.S[:k]], [found.Vh[:k].T]
    for d in deltas:
        rest = torch.linalg.svd(d - us[0] @ us[0].T @ d, full_matrices=False)
        us.append(rest.U[:, :own])
        ss.append(rest.S[:own])
        vs.append(rest.Vh[:own].T)
    return torch.cat(ss).mean() * orthonormal(torch.cat(us, 1)) @ orthonormal(torch.cat(vs, 1)).T


def knots_ties(deltas: list[Tensor], rank: int, density: float) -> Tensor:
    found = torch.linalg.svd(torch.cat(deltas, 1), full_matrices=False)
    rows = (torch.diag(found.S[:rank]) @ found.Vh[:rank]).split(deltas[0].shape[1], 1)
    return found.U[:, :rank] @ ties(list(rows), density)


def core_ties(pairs: list[tuple[Tensor, Tensor]], density: float) -> Tensor:
    u = torch.linalg.svd(torch.cat([b for b, _ in pairs], 1), full_matrices=False).U
    v = torch.linalg.svd(torch.cat([a for _, a in pairs], 0), full_matrices=False).Vh.T
    return u @ ties([u.T @ b @ a @ v for b, a in pairs], density) @ v.T


def ctm(deltas: list[Tensor], rank: int, beta: float) -> Tensor:
    """Compress-then-Merge with the sum, on whole matrices: eigenvectors of Gram matrices instead of SVDs."""
    norms = [d.norm() for d in deltas]
    mean = sum(norms) / len(norms)
    xs = [d / n * (beta * n + (1 - beta) * mean) for d, n in zip(deltas, norms, strict=True)]
    u = torch.linalg.eigh(sum(x @ x.T for x in xs)).eigenvectors[:, -rank:]
    v = torch.linalg.eigh(sum(x.T @ x for x in xs)).eigenvectors[:, -rank:]
    for _ in range(2000):
        u = torch.linalg.eigh(sum(x @ v @ v.T @ x.T for x in xs)).eigenvectors[:, -rank:]
        v = torch.linalg.eigh(sum(x.T @ u @ u.T @ x for x in xs)).eigenvectors[:, -rank:]
    return u @ sum(u.T @ d @ v for d in deltas) @ v.T


def rank_for_energy(s: Tensor, energy: float) -> int:
    kept = s.square().cumsum(0) / s.square().sum()
    return ceil(float((kept < energy - 1e-12).sum())) + 1
