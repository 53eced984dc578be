"""`encoded`: the handles of the tensors that an encoder makes of one weight, in one pass over it.

The codes are a function of each range alone; what their encoding finds on the way (scales) is kept for the handles that
come after them, and found again where it is missing, after a resume.
"""

from __future__ import annotations

import threading
from math import gcd
from typing import TYPE_CHECKING

from adapterkit.checkpoint.tensor import BLOCK, Tensor
from adapterkit.codecs.encode import beside

if TYPE_CHECKING:
    import torch

    from adapterkit.codecs.encode import Encoder
    from adapterkit.dtypes import DType


class _Encoding:
    """What the handles of one weight share."""

    def __init__(self, weight: Tensor, encoder: Encoder) -> None:
        self.weight, self.encoder = weight, encoder
        factor = encoder.unit // gcd(encoder.unit, weight.block)
        self.step = weight.block * factor if factor <= 4 else max(1, BLOCK // encoder.unit) * encoder.unit
        self._lock = threading.Lock()
        self._users = 1 + len(encoder.others)
        self._scales: torch.Tensor | None = None
        self._seen: set[int] = set()
        self._rest: dict[str, torch.Tensor] | None = None

    def codes(self, start: int) -> torch.Tensor:
        """The codes of the range that starts at element ``start``."""
        stop = min(start + self.step, self.weight.numel)
        # Before a merge's rounding to 16 bits, where there is one: the grid is the only rounding.
        codes, scales = self.encoder.encode(self.weight.read_wide(start, stop))
        at = self.encoder.scale_at(start)
        with self._lock:
            self._kept()[at : at + scales.numel()] = scales
            self._seen.add(start)
        return codes

    def rest(self, end: str) -> torch.Tensor:
        for start in range(0, self.weight.numel, self.step):
            if start not in self._seen and self._rest is None:
                self.codes(start)
        with self._lock:
            if self._rest is None:
                self._rest = self.encoder.finish(self._kept())
            return self._rest[end]

    def release(self) -> None:
        with self._lock:
            self._users -= 1
            if self._users <= 0:
                self._scales = self._rest = None
                self._seen.clear()
                self.weight.release()

    def _kept(self) -> torch.Tensor:
        import torch

        if self._scales is None:
            self._scales = torch.empty(self.encoder.scales)
        return self._scales


class Encoded(Tensor):
    """One of the tensors that an encoder makes of a weight; ``end`` None are the codes."""

    def __init__(self, name: str, dtype: DType, shape: tuple[int, ...], shared: _Encoding, end: str | None) -> None:
        self.name, self.dtype, self.shape, self._shared, self._end = name, dtype, shape, shared, end

    @property
    def weight(self) -> Tensor:
        """The floats that are encoded."""
        return self._shared.weight

    @property
    def block(self) -> int:
        return self._shared.step // self._shared.encoder.pack if self._end is None else BLOCK

    @property
    def reads(self) -> int:
        return self._shared.weight.reads if self._end is None else 0

    @property
    def memory(self) -> int:
        return self._shared.weight.memory + 8 * self._shared.encoder.scales

    @property
    def how(self) -> str:
        inner = self._shared.weight.how
        return f"{'' if inner == 'copy' else inner + ', '}to {self.dtype}"

    def read(self, start: int, stop: int) -> torch.Tensor:
        import torch

        if self._end is not None:
            return self._shared.rest(self._end).reshape(-1)[start:stop]
        first = start - start % self.block
        parts = [self._shared.codes(at * self._shared.encoder.pack) for at in range(first, stop, self.block)]
        found = parts[0] if len(parts) == 1 else torch.cat(parts)
        return found[start - first : stop - first]

    def release(self) -> None:
        self._shared.release()


def encoded(weight: Tensor, encoder: Encoder) -> list[Tensor]:
    """The handles of what ``encoder`` makes of ``weight``, codes first."""
    shared = _Encoding(weight, encoder)
    end, dtype, shape = encoder.codes
    found: list[Tensor] = [Encoded(weight.name + end, dtype, shape, shared, None)]
    for end, (dtype, shape) in encoder.others.items():
        found.append(Encoded(beside(weight.name, end), dtype, shape, shared, end))
    return found
