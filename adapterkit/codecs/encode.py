"""`Encoder`: how one weight becomes the tensors that a format stores of it, range by range.

The same encoder writes a format anew, from a weight of 16 bits, and writes a stored weight again after a change. In the
second case it is given the values from before the change too: what shares a scale and did not change keeps its codes and
its scale, whatever tool made them.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Callable

    import torch

    from adapterkit.dtypes import DType

LARGE = 1 << 22  # elements that share a scale, from which on they are read twice instead of held


@dataclass(frozen=True)
class TensorSpec:
    """A tensor that an encoder makes: its whole name, dtype and shape."""

    name: str
    dtype: DType
    shape: tuple[int, ...]


class Encoder(ABC):
    """How one weight is written.

    Attributes:
        made: the tensors that it makes, the codes first.
        unit: elements; ranges start at multiples of it, and what a range gives depends on no other.
        unit_codes: elements of the codes per unit, where it streams.
        streams: the codes of a range lie together in the stored tensor. Otherwise all are held until the last is known.
        twice: the weight is read once before, by `look`, because what shares a scale is too large to be held.
        memory: bytes that are held until the last tensor is written.
        anywhere: `look`, `encode` and `values` take values on any device, and give what they make there. `settle` and
            `finish` get tensors on the CPU.
        called: a few words for what stays on the CPU, where that is all of it.
    """

    made: tuple[TensorSpec, ...]
    unit: int
    unit_codes: int = 0
    streams: bool = True
    twice: bool = False
    memory: int = 0
    anywhere: bool = True
    called: str = ""

    def look(self, start: int, new: torch.Tensor, old: torch.Tensor | None) -> torch.Tensor:
        """What `settle` needs of a range, any float tensor; see `encode` for the arguments."""
        raise NotImplementedError

    def settle(self, seen: list[torch.Tensor]) -> None:
        """Take what `look` gave of all ranges, in order."""
        raise NotImplementedError

    @abstractmethod
    def encode(self, start: int, new: torch.Tensor, old: torch.Tensor | None) -> tuple[torch.Tensor, ...]:
        """Codes of a range, and what `finish` needs of it.

        Args:
            start: the element that the range starts at.
            new: flat float values to be stored.
            old: flat values that are stored now, or None when nothing of the stored weight is to be kept.

        Returns:
            The codes (flat where the encoder streams), and tensors that are put together along their first dimension.
        """

    @abstractmethod
    def finish(self, held: tuple[torch.Tensor, ...]) -> dict[str, torch.Tensor]:
        """All tensors but streamed codes, flat, by name; ``held`` is what all ranges gave, without streamed codes."""

    @abstractmethod
    def values(self, start: int, encoded: tuple[torch.Tensor, ...]) -> torch.Tensor:
        """What `encode` gave for a range, decoded again: flat float32."""

    def end(self) -> None:
        """Drop what was kept of the stored weight."""


class InStep(Encoder):
    """An encoder whose scale over the whole weight is shared with the weights that servers run as one with it.

    Attributes:
        largest: gives the largest magnitude of all of them; set before the first range is encoded.
    """

    largest: Callable[[], float] | None = None
