"""`ReadBack`: a weight that will be written quantized, as it is read again from what is written of it."""

from __future__ import annotations

import threading
from typing import TYPE_CHECKING

from adapterkit.checkpoint.tensor import Tensor

if TYPE_CHECKING:
    from collections.abc import Callable

    import torch


class InFull(Tensor):
    """Another handle whose bytes were all read at once: ranges of it compute nothing again.

    Of a type with several elements in a byte, whole bytes are read.
    """

    def __init__(self, inner: Tensor) -> None:
        import torch

        self.name, self.dtype, self.shape = inner.name, inner.dtype, inner.shape
        numel, block = inner.numel, inner.block
        parts = [inner.read(start, min(start + block, numel)) for start in range(0, numel, block)]
        self._held = torch.cat(parts) if len(parts) > 1 else parts[0] if parts else inner.read(0, 0)

    def read(self, start: int, stop: int) -> torch.Tensor:
        held, numel = len(self._held), max(self.numel, 1)
        return self._held[start * held // numel : stop * held // numel]


class ReadBack(Tensor):
    """The values that a reader of the output will have.

    Args:
        floats: what is written.
        load: encodes all of it, and gives a handle of the decoded values.
        held: bytes of what `load` holds.
    """

    def __init__(self, floats: Tensor, load: Callable[[], Tensor], held: int) -> None:
        self.name, self.dtype, self.shape = floats.name, floats.dtype, floats.shape
        self._load, self._bytes = load, held
        self._reads, self._memory = floats.reads, floats.memory
        self._lock = threading.Lock()
        self._decoded: Tensor | None = None

    @property
    def reads(self) -> int:
        return self._reads

    @property
    def memory(self) -> int:
        return self._bytes + self._memory

    def read(self, start: int, stop: int) -> torch.Tensor:
        return self.read_wide(start, stop).to(self.dtype.torch)

    def read_wide(self, start: int, stop: int) -> torch.Tensor:
        with self._lock:
            if self._decoded is None:
                self._decoded = self._load()
            decoded = self._decoded
        return decoded.read_wide(start, stop)

    def release(self) -> None:
        with self._lock:
            self._decoded = None
