"""Methods that multiply W by a rotation: orthogonal blocks, butterflies, Householder reflections, rotated pairs.

Weights are rows of ``[out, in]`` in float32; rotations are made in float64 and rounded once.
"""

from __future__ import annotations

import torch


def skew(upper: torch.Tensor, size: int) -> torch.Tensor:
    """Skew-symmetric ``[n, size, size]`` from the entries above the diagonal, ``[n, size*(size-1)/2]``, row by row."""
    rows, columns = torch.triu_indices(size, size, 1)
    q = upper.new_zeros(len(upper), size, size)
    q[:, rows, columns] = upper
    return q - q.mT


def constrained(q: torch.Tensor, eps: float) -> torch.Tensor:
    """COFT (arXiv:2306.07280; PEFT 0.21): blocks whose norm passes eps/sqrt(n) are scaled back to it."""
    limit = eps / len(q) ** 0.5
    norm = torch.linalg.matrix_norm(q, keepdim=True)
    return torch.where(norm <= limit, q, q * (limit / norm))


def cayley(q: torch.Tensor) -> torch.Tensor:
    """(I - Q) (I + Q)^-1 of skew-symmetric ``[n, b, b]``: orthogonal (arXiv:2306.07280)."""
    eye = torch.eye(q.shape[-1], dtype=q.dtype)
    turn: torch.Tensor = torch.linalg.solve(eye + q, eye - q, left=False)
    return turn


def cayley_neumann(q: torch.Tensor, terms: int, halved: bool = True) -> torch.Tensor:
    """OFT's truncated series (arXiv:2506.19847): I + 2Q + 2Q^2 + ...

    It approximates (I + Q) (I - Q)^-1, the inverse of `cayley`: the two settings turn opposite ways, and an adapter means
    the one it was trained with. PEFT since 0.18 (``halved``) takes the last power once, Q^(terms-1), and at least Q^3;
    before, all powers twice.
    """
    r = torch.eye(q.shape[-1], dtype=q.dtype).expand_as(q).clone()
    last = terms - 1 if terms < 3 or not halved else max(terms - 1, 3)
    power = q
    for exponent in range(1, last + 1):
        power = power if exponent == 1 else power @ q
        r += power if halved and exponent == last and exponent > 1 else 2 * power
    return r


def times_blocks(w: torch.Tensor, blocks: torch.Tensor) -> torch.Tensor:
    """``w @ blockdiag(blocks)``; ``w`` ``[k, n*b]``, blocks ``[n, b, b]`` or one for all, ``[1, b, b]``."""
    size = blocks.shape[-1]
    parts = w.view(len(w), -1, size).transpose(0, 1)
    return torch.matmul(parts, blocks).transpose(0, 1).reshape(w.shape)


def butterfly_order(n: int, blocks: int, half: int) -> torch.Tensor:
    """BOFT's permutation of one factor (arXiv:2311.06243; PEFT 0.21): in each of ``blocks`` runs of ``0..n-1``,
    the chunks of ``half`` at even places come first, then those at odd places."""
    chunks = torch.arange(n).view(blocks, -1, half)
    return torch.cat((chunks[:, 0::2], chunks[:, 1::2]), dim=1).flatten()


def times_butterfly(w: torch.Tensor, factors: torch.Tensor, orders: list[torch.Tensor] | None) -> torch.Tensor:
    """``w @ (M_f ... M_1)^T`` with ``M_i = P_i blockdiag(R_i) P_i^T``; factors ``[f, n, b, b]``, orders as
    `butterfly_order`, None for a single factor, which is not permuted."""
    for index, blocks in enumerate(factors):
        if orders is None:
            w = times_blocks(w, blocks.mT)
            continue
        scattered = torch.empty_like(w)
        scattered[:, orders[index]] = w
        w = times_blocks(scattered, blocks.mT)[:, orders[index]]
    return w


def woven(w: torch.Tensor, factors: torch.Tensor) -> torch.Tensor:
    """``M_f ... M_1 W``, BOFT as LyCORIS 4.1.3 has it; ``w`` ``[n*b, columns]``, factors ``[f, n, b, b]``.

    Before the blocks of factor i, two runs of ``2^i b/2`` rows become one run of pairs, and are parted again after them.
    """
    rows, columns = w.shape
    _, count, size, _ = factors.shape
    for stage, blocks in enumerate(factors):
        half = size // 2 << stage
        paired = w.view(-1, 2, half, columns).transpose(1, 2).reshape(count, size, columns)
        w = torch.bmm(blocks, paired).view(-1, half, 2, columns).transpose(1, 2).reshape(rows, columns)
    return w


def within(q: torch.Tensor, limit: float) -> torch.Tensor:
    """LyCORIS's and sd-scripts' constraint of OFT: all blocks scaled back together where their norm passes ``limit``."""
    norm = torch.linalg.vector_norm(q) + 1e-8
    return q * (limit / norm) if norm > limit else q


def orthonormal(u: torch.Tensor) -> torch.Tensor:
    """The columns of ``u`` made orthonormal in their order (Gram-Schmidt)."""
    q: torch.Tensor
    q, r = torch.linalg.qr(u)
    signs: torch.Tensor = r.diagonal().sign()
    return q * signs


def reflect(w: torch.Tensor, u: torch.Tensor) -> torch.Tensor:
    """HRA (arXiv:2405.17484): ``w @ prod_j (I - 2 u_j u_j^T)`` over the unit columns of ``u`` ``[in, r]``, in order."""
    for column in u.T:
        w = torch.addr(w, w @ column, column, alpha=-2.0)
    return w


def road(
    theta: torch.Tensor, alpha: torch.Tensor, variant: int, group: int
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """RoAd's rotation (arXiv:2409.00119) as ``cos``, ``sin`` and ``partner``: row j of R W is
    ``cos[j] W[j] + sin[j] W[partner[j]]``, all ``[out]``.

    Rows j and j + group/2 of each group are a pair. Variant 1 shares angle and length in a pair, 2 has them for each row,
    4 has one for the cosine and one for the sine of each row.
    """
    half = group // 2
    if variant == 4:
        angles, lengths = theta.view(-1, 2, group), alpha.view(-1, 2, group)
        cos, sin = (angles[:, 0].cos() * lengths[:, 0]).flatten(), (angles[:, 1].sin() * lengths[:, 1]).flatten()
    else:
        if variant == 1:
            theta, alpha = (t.view(-1, half).repeat_interleave(2, dim=0).flatten() for t in (theta, alpha))
        cos, sin = alpha * theta.cos(), alpha * theta.sin()
    places = torch.arange(len(cos)).view(-1, 2, half)
    partner = places.flip(1).flatten()
    sign = torch.ones(2, 1)
    sign[0] = -1
    return cos, (sin.view(-1, 2, half) * sign).flatten(), partner
