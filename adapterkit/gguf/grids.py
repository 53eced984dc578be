"""Coarse grids in plain weights: 16-bit values that were decoded from 4 bits lie on few levels, whatever file they are in.

A change that is merged onto such values and written in 4 bits again is rounded away for the most part. The levels are
counted in a sample of blocks of neighbours, from raw bytes.
"""

from __future__ import annotations

from statistics import median
from typing import TYPE_CHECKING

from adapterkit.adapters.merged import Merged
from adapterkit.checkpoint.decoded import Decoded
from adapterkit.checkpoint.tensor import Transposed

if TYPE_CHECKING:
    from adapterkit.checkpoint.tensor import Tensor

FEW_BITS = 5  # formats of so many bits and fewer lose a change to values that lie on such a grid already
FEW = 0.66  # of the values of a block that are not zero, at most this share is distinct on a grid of five bits
BLOCK = 32  # neighbours in a row that share a scale in every 4-bit type of GGUF
LEVELS = 16  # of 4 bits
SAMPLE = 16  # blocks that are looked at
_WIDTHS = {"F16": 2, "BF16": 2, "F32": 4}


def on_four_bits(tensor: Tensor) -> bool:
    """Whether the stored values of a matrix lie on at most 16 levels in nearly every block of 32 neighbours.

    A random block of 16-bit values has about 31 different ones. Zeros are not counted, since weights may be sparse, and levels
    have to come up again: grids of three levels are mostly zeros. False for what is not stored as plain floats, or too small
    to tell.
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
        there = [one for one in values if any(one[:-1]) or one[-1] & 0x7F]  # neither zero nor -0
        if len(there) >= BLOCK // 4:
            seen += 1
            few += len(set(there)) <= min(LEVELS, FEW * len(there))
    return seen >= 4 and few >= 0.9 * seen


def few_bits(tensor: Tensor) -> bool:
    """Whether the values of a weight lie on a grid of five bits or fewer, without reading more than some blocks of it.

    A weight that is stored quantized is known by its size, a base as trained by its format. Of stored floats, blocks of 32
    are looked at, along the rows and, of a matrix, along the columns (a Conv1D is stored on its side): at most two thirds
    of the values of a block are distinct. False for what is too small to tell.
    """
    inner = tensor.inner if isinstance(tensor, Transposed) else tensor
    if isinstance(inner, Decoded):
        return 8 * inner.reads < (FEW_BITS + 1) * inner.numel
    if isinstance(inner, Merged):
        return any(inner.how.startswith(f"as trained in {kind}") for kind in ("nf4", "fp4"))
    extent, width = tensor.extent, _WIDTHS.get(tensor.dtype.code)
    if extent is None or width is None or len(tensor.shape) < 2:
        return False
    source, origin, columns = extent.source, extent.offset, tensor.shape[-1]
    rows = tensor.numel // columns if columns else 0

    def along(step: int, lines: int, length: int, across: int) -> bool:
        """``lines`` lines of ``length`` values that lie ``step`` apart; the next line begins ``across`` later."""
        if length < BLOCK or not lines:
            return False
        shares = []
        per, count = length // BLOCK, min(SAMPLE, lines * (length // BLOCK))
        for index in range(count):
            line, block = divmod(index * lines * per // count, per)
            at = origin + (line * across + block * BLOCK * step) * width
            if step == 1:
                data = source.read(at, BLOCK * width)
                values = [data[i : i + width] for i in range(0, len(data), width)]
            else:
                values = [source.read(at + i * step * width, width) for i in range(BLOCK)]
            there = [one for one in values if any(one[:-1]) or one[-1] & 0x7F]  # neither zero nor -0
            if 2 * len(there) >= BLOCK:
                shares.append(len(set(there)) / len(there))
        return len(shares) >= 4 and median(shares) <= FEW

    return along(1, rows, columns, columns) or (len(tensor.shape) == 2 and along(columns, columns, rows, 1))
