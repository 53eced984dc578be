"""What the LoRA variants compute, on plain tensors.

Everything is float32 unless said otherwise; weights are ``[out, in]``.
"""

from __future__ import annotations

import torch


def block_diagonal(factor: torch.Tensor, blocks: int) -> torch.Tensor:
    """``[rows, columns/blocks]``, its rows in ``blocks`` chunks, as the block-diagonal ``[rows, columns]`` it stands for."""
    rows, columns = factor.shape
    out = factor.new_zeros(rows, columns * blocks)
    for block, part in enumerate(factor.chunk(blocks, dim=0)):
        start = block * part.shape[0]
        out[start : start + part.shape[0], block * columns : (block + 1) * columns] = part
    return out


def pooled(a: torch.Tensor, group: int) -> torch.Tensor:
    """QA-LoRA's A for the full width (arXiv:2309.14717): inputs are averaged over ``group`` and times ``in/group``.

    ``[r, in/group]`` to ``[r, in]``.
    """
    return a.repeat_interleave(group, dim=1) * (a.shape[1] / group)


def residual(
    kind: str, w: torch.Tensor, rank: int, scale: float, turned: bool = False
) -> tuple[torch.Tensor, torch.Tensor]:
    """The low-rank part that an initialisation took out of W before training, as factors ``left @ right``.

    Args:
        kind: ``pissa`` (arXiv:2404.02948: the ``rank`` largest singular triples), ``olora`` (arXiv:2406.01775: scale times
            the first ``rank`` columns of Q and rows of R) or ``kasa`` (arXiv:2412.06071: the ``rank`` smallest triples).
        w: ``[out, in]``.
        turned: the module stores W as ``[in, out]``, which is what OLoRA then decomposes.

    PEFT repeats the same decomposition in float32 when it loads such an adapter, so this does too.
    """
    if kind == "olora":
        q, r = torch.linalg.qr(w.T if turned else w)
        left, right = scale * q[:, :rank], r[:rank]
        return (right.T, left.T) if turned else (left, right)
    u, s, v = torch.linalg.svd(w, full_matrices=False)
    part = slice(None, rank) if kind == "pissa" else slice(len(s) - rank, None)
    return u[:, part] * s[part], v[part]


def to_norm(v: torch.Tensor, magnitude: torch.Tensor, norm: torch.Tensor) -> torch.Tensor:
    """DoRA (arXiv:2402.09353, eq. 5): m * V / ||V||; ``magnitude`` and ``norm`` broadcast against ``v``."""
    return (magnitude / norm) * v
