"""Importance matrices as files: GGUF (``llama-imatrix`` since 2025) or the older .dat."""

from __future__ import annotations

import os
from dataclasses import dataclass
from math import prod
from typing import TYPE_CHECKING, Any, BinaryIO

from adapterkit import disk
from adapterkit.errors import CheckpointError, NotFound
from adapterkit.gguf import imatrix
from adapterkit.gguf.reader import MAGIC

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence
    from pathlib import Path

    import torch

    from adapterkit.checkpoint.files import Source
    from adapterkit.gguf.checkpoint import GGUFCheckpoint

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
        NotFound, UnsafeError: there is none, or it is a pipe or a device.
        CheckpointError: damaged, or not one.
    """
    with open(disk.open_regular(path), "rb") as file:
        if os.fstat(file.fileno()).st_size > MAX_BYTES:
            raise CheckpointError(
                f"{path} is too large to be an importance matrix", "give the file llama-imatrix wrote"
            )
        magic = file.read(4)
        if magic != MAGIC:
            return Importance(*imatrix.parse_legacy(magic + file.read()))
    found = _opened(path)
    arrays = {name: tensor.read(0, tensor.numel).float().view(tensor.shape).numpy() for name, tensor in found.items()}
    datasets = found.header.get("imatrix.datasets", [])
    chunks = found.header.get("imatrix.chunk_count", 0)
    return Importance(imatrix.from_tensors(arrays), str(datasets[0]) if datasets else "", int(chunks))


@dataclass(frozen=True)
class SummedMatrices:
    """Matrices added up: squares and counts by weight, and what was said of the texts."""

    found: dict[str, tuple[torch.Tensor, torch.Tensor]]
    datasets: tuple[str, ...]
    chunks: int
    chunk: int
    sources: tuple[Source, ...]


def add_up(paths: Sequence[Path]) -> SummedMatrices:
    """The sums of GGUF matrices of one model; a weight that one of them lacks has what the others say.

    Raises:
        NotFound: no such file.
        CheckpointError: no importance matrix in GGUF, or shapes that differ.
    """
    found: dict[str, tuple[torch.Tensor, torch.Tensor]] = {}
    datasets: list[str] = []
    sources: list[Source] = []
    chunks, sizes = 0, []
    for path in paths:
        with _readable(path) as file:
            magic = file.read(4)
        if magic != MAGIC:
            raise CheckpointError(f"{path} is no GGUF file", "write it anew with llama-imatrix, or imatrix here")
        opened = _opened(path)
        for name in opened:
            weight, dot, kind = name.rpartition(".")
            if dot + kind != imatrix.SUMS:
                continue
            if weight + imatrix.COUNTS not in opened:
                raise CheckpointError(f"{path} has {name} and no {weight}{imatrix.COUNTS}", "make it again")
            squares, counts = _floats(opened, name), _floats(opened, weight + imatrix.COUNTS).reshape(-1)
            squares = squares.reshape(len(counts), -1)
            before = found.get(weight)
            if before is not None:
                if before[0].shape != squares.shape:
                    message = f"{path} has {list(squares.shape)} values for {weight}, and {paths[0]} other ones"
                    raise CheckpointError(message, "add up matrices of one model")
                squares, counts = before[0] + squares, before[1] + counts
            found[weight] = (squares, counts)
        datasets += [str(one) for one in opened.header.get("imatrix.datasets", [])]
        chunks += int(opened.header.get("imatrix.chunk_count", 0))
        sizes.append(int(opened.header.get("imatrix.chunk_size", 0)))
        sources += opened.sources
    if not found:
        raise CheckpointError("the files have no .in_sum2 tensors, so they are no importance matrices", "pass others")
    return SummedMatrices(found, tuple(dict.fromkeys(datasets)), chunks, max(sizes), tuple(sources))


def _floats(opened: GGUFCheckpoint, name: str) -> torch.Tensor:
    tensor = opened[name]
    return tensor.read(0, tensor.numel).float().view(tensor.shape)


def _readable(path: Path) -> BinaryIO:
    try:
        return open(disk.open_regular(path), "rb")
    except NotFound:
        raise NotFound(f"{path} does not exist", "give a file that imatrix or llama-imatrix wrote") from None


def _opened(path: Path) -> GGUFCheckpoint:
    from adapterkit.gguf.checkpoint import open_gguf

    found = open_gguf(path)
    if found.kind != "imatrix":
        raise CheckpointError(f"{path} is a GGUF {found.kind}, not an importance matrix", "give the one for this model")
    return found
