"""Adapters of which training saved only a part: runs of rows that are exactly zero.

Sharded training (FSDP, tensor parallelism, ZeRO-3) that saves one process's part into tensors of the full shape leaves the
rows of the others at zero. Such an adapter loads everywhere and is a fraction of what was trained (axolotl#3772). Training
itself does not do that: rows that are zero by chance, or because nothing ever reached them, lie scattered.

Only bytes are looked at, so nothing here needs torch.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from adapterkit.values import dataclass

if TYPE_CHECKING:
    from adapterkit.adapters.adapter import Adapter
    from adapterkit.checkpoint.tensor import Extent, Tensor

A, B = "lora_A.weight", "lora_B.weight"
FACTORS = ("lora_A.weight", "lora_B.weight", "lora_embedding_A", "lora_embedding_B")
LEAST = 0.5  # of the rows: two processes leave half of them
_PROBES = 8
_MOST = 1 << 26  # bytes of a factor that is looked at; an output layer's of rank 64 has 32 MiB


@dataclass(frozen=True)
class HalfSaved:
    """A factor whose rows are zero but for one run of them.

    Attributes:
        key: of the tensor.
        zeros, rows: how many of how many.
    """

    key: str
    zeros: int
    rows: int

    def __str__(self) -> str:
        return f"{self.zeros} of the {self.rows} rows of {self.key} are exactly zero"


def half_saved(adapter: Adapter) -> list[HalfSaved]:
    """Every factor of an adapter on this disk that looks saved in part; of one on the Hub nothing is read."""
    found = []
    for key, tensor in adapter.tensors.items():
        # Modules that were trained whole are sharded as factors are.
        if key.endswith(FACTORS) or (key.endswith(".weight") and len(tensor.shape) == 2):
            one = zero_rows(key, tensor, adapter.tensors.get(key.removesuffix(A) + B) if key.endswith(A) else None)
            if one is not None:
                found.append(one)
    return found


def zero_rows(key: str, tensor: Tensor, other: Tensor | None = None) -> HalfSaved | None:
    """What is zero of one factor, if it is at least half of it and the rest is one run of rows.

    Args:
        other: B of an A. Where its columns are zero at the same ranks, those are only padding (adapters of unequal ranks
            side by side), and nothing is lost.
    """
    extent = tensor.extent
    rows = tensor.shape[0] if len(tensor.shape) > 1 else 0
    if (
        extent is None
        or extent.source.path is None
        or rows < 2
        or not 0 < extent.nbytes <= _MOST
        or extent.nbytes % rows
    ):
        return None
    width = extent.nbytes // rows
    nothing = bytes(width)
    if rows > 4 * _PROBES and not _perhaps(extent, rows, width):
        return None
    data = extent.source.read(extent.offset, extent.nbytes)
    if nothing not in data or data.count(0) == len(data):
        return None
    full = [at for at in range(rows) if data[at * width : (at + 1) * width] != nothing]
    if not full or len(full) > (1 - LEAST) * rows or full[-1] - full[0] + 1 != len(full):
        return None
    if other is not None and _no_columns(other, rows, full[0], full[-1] + 1):
        return None
    return HalfSaved(key, rows - len(full), rows)


def _perhaps(extent: Extent, rows: int, width: int) -> bool:
    """Whether a few rows leave it open. A run of at most half of the rows has at most half of the probes, and one more; so
    of a factor that is whole, some rows are read and not all."""
    left = _PROBES // 2 + 1
    for probe in range(_PROBES):
        at = probe * rows // _PROBES
        left -= any(extent.source.read(extent.offset + at * width, width))
        if left < 0:
            return False
    return True


def _no_columns(tensor: Tensor, columns: int, first: int, end: int) -> bool:
    """Whether a matrix with that many columns is zero in all but those from ``first`` to ``end``."""
    extent = tensor.extent
    if extent is None or extent.source.path is None or len(tensor.shape) != 2 or tensor.shape[1] != columns:
        return False
    if not 0 < extent.nbytes <= _MOST or extent.nbytes % (tensor.shape[0] * columns):
        return False
    data = extent.source.read(extent.offset, extent.nbytes)
    size = extent.nbytes // (tensor.shape[0] * columns)
    before, after = bytes(first * size), bytes((columns - end) * size)
    rows = (data[at : at + columns * size] for at in range(0, len(data), columns * size))
    return all(row.startswith(before) and row.endswith(after) for row in rows)


def half_saved_note(adapter: Adapter) -> str | None:
    """The same in words for the whole adapter, whose name goes in front; None if it is sound."""
    found = half_saved(adapter)
    if not found:
        return None
    more = f", and likewise of {len(found) - 1} more" if len(found) > 1 else ""
    return (
        f"looks saved in part, as when sharded training saves one process's share: {found[0]}{more}; save it "
        "again from the gathered state, or from the checkpoint folder (adapterkit convert CKPT --to peft)"
    )
