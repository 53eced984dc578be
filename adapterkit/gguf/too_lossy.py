"""Which changes would drown in the types that a GGUF output gives them, measured before it is planned."""

from __future__ import annotations

from typing import TYPE_CHECKING

from adapterkit.adapters.fidelity import Watch, merged_tensors

if TYPE_CHECKING:
    from collections.abc import Callable

    from adapterkit.adapters.fidelity import Through
    from adapterkit.adapters.fold import Folded

BLOCKS = 2  # of each tensor, spread over it


def too_lossy(
    folded: Folded, through: Callable[[str, tuple[int, ...]], Through | None], below: float
) -> tuple[frozenset[str], int]:
    """The changed tensors whose change comes out with a cosine less than ``below``, and how many were measured.

    The cosine between the change that was wanted and the one that is written falls with what the type loses of the change
    and with the noise it adds; see `adapterkit.ops.fidelity`.

    Args:
        folded: what `fold` made, in floats.
        through: what the types do to rows; see `adapterkit.verbs.outputs.Output`.
    """
    watch = Watch(folded, "gguf", through)
    for tensor in merged_tensors(folded).values():
        blocks = range(0, tensor.numel, tensor.block)
        for start in sorted({blocks[index * len(blocks) // BLOCKS] for index in range(BLOCKS)}):
            tensor.read(start, min(start + tensor.block, tensor.numel))
        tensor.release()
    watch.stop()
    report = watch.report()
    return frozenset(one.name for one in report.tensors if one.cosine < below), len(report.tensors)
