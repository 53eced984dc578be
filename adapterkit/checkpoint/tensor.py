"""Tensor handles: what a header says, and rows on demand.

A handle is a node of a view. `Stored` is a leaf, a byte range of a file that the kernel can copy without Python seeing
it; every other node computes. A computing node always works on its own fixed grid of blocks, a function of its shape
alone, because the last bit of a float32 product depends on the block it was computed in: so the same element has the
same bytes whoever asks, with any number of threads, alone or after a resume.
"""

from __future__ import annotations

import threading
from abc import ABC, abstractmethod
from math import prod
from typing import TYPE_CHECKING

from adapterkit.dtypes import F16
from adapterkit.errors import CheckpointError
from adapterkit.values import dataclass

if TYPE_CHECKING:
    import numpy as np
    import numpy.typing as npt
    import torch

    from adapterkit.checkpoint.files import Source
    from adapterkit.dtypes import DType
    from adapterkit.ops.device import Device

BLOCK = 1 << 19  # elements per block: few enough for a cache, enough that Python around them does not count


@dataclass(frozen=True)
class Extent:
    """A plain byte range of a file."""

    source: Source
    offset: int
    nbytes: int


class Tensor(ABC):
    """A lazy tensor: ``name``, ``dtype`` and ``shape`` are known, elements are read on demand."""

    name: str
    dtype: DType
    shape: tuple[int, ...]

    @property
    def numel(self) -> int:
        return prod(self.shape)

    @property
    def nbytes(self) -> int:
        return self.dtype.nbytes(self.shape)

    @property
    def extent(self) -> Extent | None:
        """The byte range that holds this tensor as it is, if there is one."""
        return None

    @property
    def block(self) -> int:
        """Elements per block of this node's grid; reads along it compute nothing twice."""
        return BLOCK

    @property
    def reads(self) -> int:
        """Bytes read to produce the whole tensor (an estimate, for plans)."""
        return self.nbytes

    @property
    def memory(self) -> int:
        """Bytes held while the tensor is produced, beside a worker's block buffers (an estimate, for plans)."""
        return 0

    @property
    def how(self) -> str:
        """A few words for the plan: what is done to produce the tensor."""
        return "copy"

    @abstractmethod
    def read(self, start: int, stop: int) -> torch.Tensor:
        """Elements ``start:stop`` of the flattened tensor, a 1-D torch tensor of this handle's dtype."""

    def read_wide(self, start: int, stop: int) -> torch.Tensor:
        """As `read`, before the rounding to this handle's dtype where the node computes in a wider one."""
        return self.read(start, stop)

    @property
    def plain(self) -> bool:
        """Whether `array` gives the bytes without torch, whose import is a second of a short run."""
        return False

    def array(self, start: int, stop: int) -> npt.NDArray[np.uint8]:
        """The bytes of elements ``start:stop``, uint8, where the tensor is `plain`."""
        raise NotImplementedError(self.name)

    def read_on(self, device: Device, start: int, stop: int) -> torch.Tensor:
        """As `read_wide`, on a device; nothing comes back from it where the node computes there itself."""
        return device.gather(self.read_wide, start, stop, self.block)

    def place_on(self, device: str) -> None:
        """Have what is encoded of this tensor be encoded on a device. What is only read or decoded is so on the CPU."""

    @property
    def on_cpu(self) -> frozenset[str]:
        """What of it is computed on the CPU though a device was named, in words; known when it has been read."""
        return frozenset()

    def raw(self) -> bytes:
        """All bytes, for small tensors: without torch where they lie in a file."""
        extent = self.extent
        if extent is not None:
            return extent.source.read(extent.offset, extent.nbytes)
        import torch

        return bytes(self.read(0, self.numel).contiguous().view(torch.uint8).numpy())

    def release(self) -> None:
        """Drop what was loaded to compute; a later read loads it again."""


class Stored(Tensor):
    """A tensor as it lies in a file."""

    def __init__(self, name: str, dtype: DType, shape: tuple[int, ...], source: Source, offset: int) -> None:
        self.name, self.dtype, self.shape = name, dtype, shape
        self.source, self.offset = source, offset
        self._nbytes = dtype.nbytes(shape)

    @property
    def nbytes(self) -> int:
        return self._nbytes

    @property
    def extent(self) -> Extent:
        return Extent(self.source, self.offset, self.nbytes)

    def read(self, start: int, stop: int) -> torch.Tensor:
        import torch

        out = torch.empty(stop - start, dtype=self.dtype.torch)
        if stop > start:
            view = memoryview(out.view(torch.uint8).numpy())  # type: ignore[arg-type]
            self.source.read_into(view, self.offset + start * self.dtype.bits // 8)
        return out

    def __repr__(self) -> str:
        return f"Stored({self.name!r}, {self.dtype}, {list(self.shape)})"


class Renamed(Tensor):
    """Another tensor under a new name, for checkpoints that store one tensor twice."""

    def __init__(self, name: str, inner: Tensor) -> None:
        self.name, self.dtype, self.shape, self.inner = name, inner.dtype, inner.shape, inner

    @property
    def extent(self) -> Extent | None:
        return self.inner.extent

    @property
    def block(self) -> int:
        return self.inner.block

    @property
    def reads(self) -> int:
        return self.inner.reads

    @property
    def how(self) -> str:
        return self.inner.how

    def read(self, start: int, stop: int) -> torch.Tensor:
        return self.inner.read(start, stop)

    def read_wide(self, start: int, stop: int) -> torch.Tensor:
        return self.inner.read_wide(start, stop)

    def read_on(self, device: Device, start: int, stop: int) -> torch.Tensor:
        return self.inner.read_on(device, start, stop)

    def place_on(self, device: str) -> None:
        self.inner.place_on(device)

    @property
    def on_cpu(self) -> frozenset[str]:
        return self.inner.on_cpu

    def release(self) -> None:
        self.inner.release()


class Transposed(Tensor):
    """A matrix on its side; it is held whole while it is read."""

    def __init__(self, inner: Tensor) -> None:
        self.name, self.dtype, self.shape, self.inner = inner.name, inner.dtype, inner.shape[::-1], inner
        self._lock = threading.Lock()
        self._whole: torch.Tensor | None = None

    @property
    def reads(self) -> int:
        return self.inner.reads

    @property
    def memory(self) -> int:
        return self.inner.memory + 8 * self.numel

    @property
    def how(self) -> str:
        return self.inner.how

    def read(self, start: int, stop: int) -> torch.Tensor:
        return self.read_wide(start, stop).to(self.dtype.torch)

    def read_wide(self, start: int, stop: int) -> torch.Tensor:
        with self._lock:
            if self._whole is None:
                whole = self.inner.read_wide(0, self.numel).view(self.inner.shape)
                self._whole = whole.T.contiguous().view(-1)
            return self._whole[start:stop]

    def release(self) -> None:
        with self._lock:
            self._whole = None
        self.inner.release()


def rounded(wide: torch.Tensor, dtype: DType, name: str) -> torch.Tensor:
    """``wide`` rounded to nearest even in ``dtype``; ``name`` is for the error.

    Raises:
        CheckpointError: float16 (up to 65504) cannot hold a value, which would become infinite.
    """
    found = wide.to(dtype.torch)
    if dtype is F16 and found.isinf().any() and (found.isinf() & ~wide.isinf()).any():
        largest = wide[~wide.isinf()].abs().max().item()
        raise CheckpointError(f"'{name}' holds {largest:.6g}, more than float16 can", "write bf16 or f32")
    return found


class Cast(Tensor):
    """A tensor in another floating dtype, rounded once to nearest even."""

    def __init__(self, inner: Tensor, dtype: DType) -> None:
        self.name, self.dtype, self.shape, self.inner = inner.name, dtype, inner.shape, inner

    @property
    def block(self) -> int:
        return self.inner.block

    @property
    def reads(self) -> int:
        return self.inner.reads

    @property
    def how(self) -> str:
        return f"{self.inner.dtype} to {self.dtype}"

    def read(self, start: int, stop: int) -> torch.Tensor:
        return rounded(self.inner.read(start, stop), self.dtype, self.name)

    def release(self) -> None:
        self.inner.release()


class Retyped(Cast):
    """As `Cast`, from the values that the inner tensor has before its own rounding."""

    @property
    def how(self) -> str:
        inner = self.inner.how
        return super().how if inner == "copy" else inner

    @property
    def memory(self) -> int:
        return self.inner.memory

    def read(self, start: int, stop: int) -> torch.Tensor:
        return rounded(self.inner.read_wide(start, stop), self.dtype, self.name)
