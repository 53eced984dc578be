"""Importance matrices as files: GGUF (``llama-imatrix`` since 2025) or the older .dat."""

from __future__ import annotations

from dataclasses import dataclass
from math import prod
from typing import TYPE_CHECKING, Any

from adapterkit.errors import CheckpointError
from adapterkit.gguf import imatrix
from adapterkit.gguf.reader import MAGIC

if TYPE_CHECKING:
    from collections.abc import Mapping
    from pathlib import Path

MAX_BYTES = 1 << 30


@dataclass(frozen=True)
class Importance:
    """Importance values by tensor name, and where they come from."""

    values: Mapping[str, Any]
    dataset: str = ""
    chunks: int = 0

    def of(self, name: str, shape: tuple[int, ...]) -> Any:
        """Float32 ``[matrices, columns]`` for a tensor, or None when the file has none for it.

        Raises:
            CheckpointError: the file was made for another model.
        """
        return imatrix.for_tensor(self.values, name, shape[-1], prod(shape[:-2]) if len(shape) > 2 else 1)


def load_importance(path: Path) -> Importance:
    """Read an importance matrix.

    Raises:
        CheckpointError: damaged, or not one.
    """
    if path.stat().st_size > MAX_BYTES:
        raise CheckpointError(f"{path} is too large to be an importance matrix", "give the file llama-imatrix wrote")
    with path.open("rb") as file:
        magic = file.read(4)
    if magic != MAGIC:
        return Importance(*imatrix.parse_legacy(path.read_bytes()))
    from adapterkit.gguf.checkpoint import open_gguf

    found = open_gguf(path)
    if found.kind != "imatrix":
        raise CheckpointError(f"{path} is a GGUF {found.kind}, not an importance matrix", "give the one for this model")
    arrays = {name: tensor.read(0, tensor.numel).float().view(tensor.shape).numpy() for name, tensor in found.items()}
    datasets = found.header.get("imatrix.datasets", [])
    chunks = found.header.get("imatrix.chunk_count", 0)
    return Importance(imatrix.from_tensors(arrays), str(datasets[0]) if datasets else "", int(chunks))
