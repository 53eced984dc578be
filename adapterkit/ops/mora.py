"""MoRA (arXiv:2405.12130): one square matrix between a compression of the input and a decompression to the output.

Weights are ``[out, in]``. The compressions are those of the authors' fork of PEFT, by its ``mora_type``.
"""

from __future__ import annotations

import torch


def grouped(rank: int, width: int) -> torch.Tensor:
    """Which of ``rank`` runs of neighbours each of ``width`` places belongs to; the first runs are one longer."""
    short = width // rank
    longer = width - rank * short
    places = torch.arange(width)
    edge = longer * (short + 1)
    return torch.where(places < edge, places // (short + 1), longer + (places - edge) // max(short, 1))


def compressed(rank: int, width: int, shared: bool) -> torch.Tensor:
    """What reaches the square matrix, ``[rank, width]`` of counts: runs of neighbours summed, or (``shared``) every place c to
    c mod rank, where the input is first filled up to a multiple of the rank with its own beginning."""
    counts = torch.zeros(rank, width)
    if not shared:
        counts[grouped(rank, width), torch.arange(width)] = 1
        return counts
    places = torch.arange(width + -width % rank)
    return counts.index_put_((places % rank, places % width), torch.ones(()), accumulate=True)


def turned_blocks(square: torch.Tensor, blocks: int) -> torch.Tensor:
    """Type 6: the matrix after a rotary embedding of its input at position 0, 1, ..., ``[blocks, r, r]``."""
    rank = len(square)
    half = rank // 2
    inverse = 1.0 / 10000 ** (torch.arange(0, rank, 2, dtype=torch.float64) / rank)
    angles = torch.arange(blocks, dtype=torch.float64)[:, None, None] * inverse
    first, second = square[:, :half], square[:, half:]
    cos, sin = angles.cos(), angles.sin()
    return torch.cat((first * cos + second * sin, second * cos - first * sin), dim=2)


def rotary_rows(blocks: torch.Tensor, shape: tuple[int, int], rows: torch.Tensor) -> torch.Tensor:
    """Rows of type 6's delta: row o belongs to block o // r (blocks repeat), which reads r inputs from r * block on; the
    last one starts over where the input ends."""
    count, rank, _ = blocks.shape
    block = rows // rank % count
    places = (block[:, None] * rank + torch.arange(rank)) % shape[1]
    return torch.zeros(len(rows), shape[1]).scatter_add_(1, places, blocks[block, rows % rank])
