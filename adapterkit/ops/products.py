"""Structured deltas that are products of small factors, computed for the rows that are asked for.

Weights are ``[out, in]``, float32; ``rows`` are row numbers of W.
"""

from __future__ import annotations

import torch


def conv_factors(a: torch.Tensor, b: torch.Tensor, t: torch.Tensor | None) -> tuple[torch.Tensor, torch.Tensor]:
    """The two matrices of a LyCORIS pair (arXiv:2309.14859).

    Without a core ``t`` they are ``a [out, r]`` and ``b [r, in*k]``. With the Tucker core of a convolution, ``t [r, r, *k]``,
    ``a [r, out]`` and ``b [r, in]``, they are ``a^T`` and the core with ``in`` put into its second side.
    """
    if t is None:
        return a, b
    right = torch.einsum("ij...,jc->ic...", t, b)
    return a.T.contiguous(), right.reshape(right.shape[0], -1)


def loha_rows(
    first: tuple[torch.Tensor, torch.Tensor], second: tuple[torch.Tensor, torch.Tensor], rows: slice
) -> torch.Tensor:
    """LoHa (arXiv:2108.06098): (a1 b1) * (a2 b2), of these rows."""
    return (first[0][rows] @ first[1]) * (second[0][rows] @ second[1])


def kron_rows(w1: torch.Tensor, w2: torch.Tensor, rows: torch.Tensor) -> torch.Tensor:
    """LoKr (arXiv:2309.14859): rows of the Kronecker product of two matrices."""
    high, low = rows // len(w2), rows % len(w2)
    return (w1[high][:, :, None] * w2[low][:, None, :]).reshape(len(rows), -1)


def kron_conv1d(w1: torch.Tensor, w2: torch.Tensor) -> torch.Tensor:
    """PEFT 0.21's delta of a one-dimensional convolution with a whole ``w2 [k, n, size]``, as ``[out, in*size]``.

    It multiplies ``w1`` along the last two dimensions instead of the first two (LyCORIS does the latter), and the adapter
    was trained with that.
    """
    out = w1.shape[0] * w2.shape[0]
    return torch.kron(w1.unsqueeze(0), w2.contiguous()).reshape(out, -1)


def circulant_rows(kernel: torch.Tensor, rows: torch.Tensor) -> torch.Tensor:
    """C3A (arXiv:2407.19342): rows of the matrix of circulant blocks; kernel ``[out/b, in/b, b]``.

    Entry (a, c) of a block is kernel[(c - a) mod b].
    """
    size = kernel.shape[-1]
    block, inner = rows // size, rows % size
    turned = (torch.arange(size) - inner[:, None]) % size
    picked = kernel[block].gather(2, turned[:, None, :].expand(-1, kernel.shape[1], -1))
    return picked.reshape(len(rows), -1)


def gralora(a: torch.Tensor, b: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """GraLoRA (arXiv:2505.20355) as one low-rank product per block of rows.

    Args:
        a: ``[k, in/k, r]``; b: ``[k, r, out/k]``.

    Returns:
        left ``[k, out/k, r]`` and right ``[k, r, in]``: rows of block q are ``left[q] @ right[q]``. Block (q, n) of the delta
        is the slice q of A_n times the slice n of B_q.
    """
    k, width, rank = a.shape
    part = rank // k
    right = a.new_zeros(k, rank, k * width)
    for q in range(k):
        for n in range(k):
            right[q, n * part : (n + 1) * part, n * width : (n + 1) * width] = a[n, :, q * part : (q + 1) * part].T
    return b.mT.contiguous(), right


def bat_rows(w: torch.Tensor, blocks: torch.Tensor, rows: range) -> torch.Tensor:
    """Bone's Bat variant (arXiv:2409.15371): each r x r block of W becomes W + W B + B.

    Args:
        w: these rows of W; blocks: ``[out/r, r, r]``, one B for each r rows of W.
    """
    size = blocks.shape[-1]
    out = torch.empty_like(w)
    done = 0
    while done < len(rows):
        block, first = divmod(rows[done], size)
        count = min(len(rows) - done, -((first - size) // rows.step))
        here = w[done : done + count].view(count, -1, size)
        inner = blocks[block]
        out[done : done + count] = (here + here @ inner + inner[first :: rows.step][:count, None]).view(count, -1)
        done += count
    return out


def delora_diagonal(a: torch.Tensor, b: torch.Tensor, strength: torch.Tensor) -> torch.Tensor:
    """DeLoRA's scale of each rank (arXiv:2503.18225): lambda / (r |A_k| |B_k|), norms at least 1e-4."""
    norms: torch.Tensor = a.norm(dim=1).clamp(min=1e-4) * b.norm(dim=0).clamp(min=1e-4)
    return strength / len(a) / norms


def times_inputs(w: torch.Tensor, a1: torch.Tensor, a2: torch.Tensor) -> torch.Tensor:
    """``W a1 a2`` over the inputs of a layer, at every position of a convolution's kernel alike (GLoRA in LyCORIS).

    Args:
        w: ``[rows, in*k]``, input by input; a1: ``[in, r]``; a2: ``[r, in]``.
    """
    inputs = w.view(len(w), len(a1), -1).transpose(1, 2)
    return (inputs @ a1 @ a2).transpose(1, 2).reshape(w.shape)
