"""Handles over an adapter's tensors: turned, cut out, or made by a function. Factors are small, so they are read whole."""

from __future__ import annotations

from math import prod
from typing import TYPE_CHECKING

from adapterkit.checkpoint.tensor import Tensor

if TYPE_CHECKING:
    from collections.abc import Callable

    import torch

    from adapterkit.dtypes import DType


class FunctionTensor(Tensor):
    """A tensor that a function makes; ``how`` is for plans."""

    def __init__(
        self, name: str, dtype: DType, shape: tuple[int, ...], make: Callable[[], torch.Tensor], how: str, reads: int
    ) -> None:
        self.name, self.dtype, self.shape = name, dtype, shape
        self._make, self._how, self._reads = make, how, reads

    @property
    def block(self) -> int:
        return max(self.numel, 1)

    @property
    def reads(self) -> int:
        return self._reads

    @property
    def memory(self) -> int:
        return 2 * self.nbytes

    @property
    def how(self) -> str:
        return self._how

    def read(self, start: int, stop: int) -> torch.Tensor:
        return self._make().to(self.dtype.torch).reshape(-1)[start:stop].contiguous()


def turned(name: str, inner: Tensor) -> Tensor:
    """A matrix, transposed."""
    rows, columns = inner.shape

    def make() -> torch.Tensor:
        return inner.read(0, inner.numel).view(rows, columns).T.contiguous()

    return FunctionTensor(name, inner.dtype, (columns, rows), make, "transposed", inner.nbytes)


def part(name: str, inner: Tensor, index: int) -> Tensor:
    """One entry along the first dimension."""
    shape = inner.shape[1:]
    size = prod(shape)

    def make() -> torch.Tensor:
        return inner.read(index * size, (index + 1) * size)

    return FunctionTensor(name, inner.dtype, shape, make, f"part {index}", inner.nbytes // max(inner.shape[0], 1))
