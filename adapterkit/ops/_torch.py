"""``torch``, imported at its first use: the methods table must be readable without paying for the import."""

from __future__ import annotations

from types import ModuleType
from typing import Any


class _LazyTorch(ModuleType):
    def __getattr__(self, name: str) -> Any:
        import torch as real

        return getattr(real, name)


torch = _LazyTorch("torch")
