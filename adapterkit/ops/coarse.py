"""Whether weights lie on a coarse grid, by their values alone: few of them are distinct in every block."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch

BLOCK = 32  # values that are looked at together: no known format has a scale for fewer than 16
FEW = 0.66  # of the values of a block that are not zero, at most this share is distinct on a grid of five bits
MOST = 1 << 12  # blocks that are looked at
STEPS = 15  # of four bits: codes less their zero point are whole numbers up to this
NEAR = 0.006  # relative; rounding two values to bfloat16 moves their ratio by at most 2^-8
SOME = 8  # columns that others are compared with


def is_coarse(rows: torch.Tensor) -> bool:
    """Whether rows of a weight lie on a grid of five bits or fewer.

    A grid of b bits with one scale has at most 2^b values in a block of 32. How many of a format's are distinct depends on the
    weights; `FEW` was chosen by trying Gaussian ones. Zeros do not count, so that pruned weights are not taken for coarse ones.
    GPTQ with activation order scatters the columns of a group: two columns that share their scales have ratios of whole numbers
    up to 15 in every row, which other columns have by chance in some.

    Args:
        rows: ``[rows, columns]``, any float dtype; some rows are enough. Scales may run along either direction.
    """
    return _few(rows) or _few(rows.T) or _scattered(rows) or _scattered(rows.T)


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


def _scattered(rows: torch.Tensor) -> bool:
    """Whether columns anywhere in a matrix are whole multiples of one scale per row, four bits or fewer."""
    import torch

    if rows.dim() != 2 or rows.shape[0] < BLOCK or rows.shape[1] < BLOCK:
        return False
    w = rows[:: max(1, rows.shape[0] // (4 * BLOCK))].float().abs().contiguous()
    steps = range(1, STEPS + 1)
    ratios = torch.tensor(sorted({one / other for one in steps for other in steps}))
    middles = (ratios[1:] + ratios[:-1]) / 2
    found = 0
    for column in range(0, w.shape[1], max(1, -(-w.shape[1] // SOME))):
        one = w[:, column : column + 1]
        both = (one != 0) & (w != 0)
        ratio = torch.where(both, w / one, 1.0)
        nearest = ratios[torch.bucketize(ratio, middles)]
        held = ((ratio - nearest).abs() <= NEAR * nearest) & both
        enough = both.sum(0) >= BLOCK // 3
        alike = (held.sum(0) >= 0.97 * both.sum(0)) & enough
        found += int(alike.sum()) > BLOCK // 4  # itself, and others that share its scales
    return found > SOME // 2
