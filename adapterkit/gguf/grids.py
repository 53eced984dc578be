"""Coarse grids in plain weights: 16-bit values that were decoded from 4 bits lie on few levels, whatever file they are in.

A change that is merged onto such values and written in 4 bits again is rounded away for the most part. The levels are
counted in a sample of blocks of neighbours, from raw bytes.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from adapterkit.checkpoint.tensor import Tensor

BLOCK = 32  # neighbours in a row that share a scale in every 4-bit type of GGUF
LEVELS = 16  # of 4 bits
SAMPLE = 16  # blocks that are looked at
_WIDTHS = {"F16": 2, "BF16": 2, "F32": 4}


def on_four_bits(tensor: Tensor) -> bool:
    """Whether the stored values of a matrix lie on at most 16 levels in nearly every block of 32 neighbours.

    A random block of 16-bit values has about 31 different ones. Zeros are not counted, since weights may be sparse. False
    for what is not stored as plain floats, or too small to tell.
    """
    extent, width = tensor.extent, _WIDTHS.get(tensor.dtype.code)
    if extent is None or width is None or len(tensor.shape) < 2 or tensor.shape[-1] % BLOCK:
        return False
    blocks = tensor.numel // BLOCK
    seen = few = 0
    for index in range(min(SAMPLE, blocks)):
        at = index * blocks // min(SAMPLE, blocks)
        data = extent.source.read(extent.offset + at * BLOCK * width, BLOCK * width)
        values = [data[i : i + width] for i in range(0, len(data), width)]
        there = [one for one in values if any(one)]
        if len(there) > LEVELS + LEVELS // 2:
            seen += 1
            few += len(set(there)) <= LEVELS
    return seen >= 4 and few >= 0.9 * seen
