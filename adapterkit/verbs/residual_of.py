"""What the two forms of a residual have in common: the merge that it belongs to, and what is subtracted from what."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol

if TYPE_CHECKING:
    from pathlib import Path

    from adapterkit.adapters.adapter import Adapter
    from adapterkit.adapters.factors import Slot
    from adapterkit.adapters.fold import Folded
    from adapterkit.checkpoint.checkpoint import Checkpoint
    from adapterkit.checkpoint.plan import Plan
    from adapterkit.places import Address
    from adapterkit.requests.merge import MergeRequest
    from adapterkit.verbs.outputs import Output

WHOLE = 1 << 28  # entries of a difference up to which it is held in memory, where it is computed once
Rows = Callable[[int, int], Any]  # rows ``start:stop`` of a matrix in float32
ENDING = "-residual"


def residual_path(out: Path | Address) -> Path | Address:
    """Where the residual of an output goes: beside it, ``OUT-residual`` or ``OUT-residual.gguf``."""
    if out.suffix == ".gguf":
        return out.with_name(f"{out.name.removesuffix('.gguf')}{ENDING}.gguf")
    return out.with_name(f"{out.name}{ENDING}")


class OfMerge(Protocol):
    """What a residual needs of the merge that it belongs to: `adapterkit.verbs.merge.Merge`."""

    @property
    def request(self) -> MergeRequest: ...
    @property
    def base(self) -> Checkpoint: ...
    @property
    def adapters(self) -> tuple[Adapter, ...]: ...
    @property
    def output(self) -> Output: ...
    @property
    def folded(self) -> Folded: ...
    @property
    def plan(self) -> Plan: ...
    @property
    def sources(self) -> tuple[Any, ...]: ...

    def again(self) -> Output:
        """The same output with handles of its own."""


@dataclass(frozen=True)
class Lost:
    """A slot whose deltas are what rounding took.

    Attributes:
        pieces: for each of its matrices, rows ``(written, wanted)`` and the tensors that they lie in.
        nbytes: that are held while one of them is computed.
    """

    slot: Slot
    pieces: tuple[tuple[Rows, Rows, frozenset[str]], ...]
    nbytes: int
