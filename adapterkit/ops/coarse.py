"""Whether weights lie on a coarse grid, by their values alone: few of them are distinct in every block."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch

BLOCK = 32  # values that are looked at together: no known format has a scale for fewer than 16
FEW = 0.66  # of the values of a block that are not zero, at most this share is distinct on a grid of five bits
MOST = 1 << 12  # blocks that are looked at


def is_coarse(rows: torch.Tensor) -> bool:
    """Whether rows of a weight lie on a grid of five bits or fewer.

    A grid of b bits with one scale has at most 2^b values in a block of 32. How many of a format's are distinct depends on the
    weights; `FEW` was chosen by trying Gaussian ones. Zeros do not count, so that pruned weights are not taken for coarse ones.

    Args:
        rows: ``[rows, columns]``, any float dtype; some rows are enough. Scales may run along either direction.
    """
    return _few(rows) or _few(rows.T)


def _few(rows: torch.Tensor) -> bool:
    import torch

    columns = rows.shape[-1] // BLOCK * BLOCK
    if rows.dim() != 2 or not columns:
        return False
    blocks = rows[:, :columns].reshape(-1, BLOCK)
    blocks = blocks[:: max(1, blocks.shape[0] // MOST)].float().sort(1).values
    first = torch.ones_like(blocks[:, :1], dtype=torch.bool)
    new = torch.cat([first, blocks[:, 1:] != blocks[:, :-1]], 1) & (blocks != 0)
    held = (blocks != 0).sum(1)
    full = held >= BLOCK // 2
    if int(full.sum()) < 8:
        return False
    return float((new.sum(1)[full] / held[full]).median()) <= FEW
