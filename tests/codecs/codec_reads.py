"""How the tests read decoded tensors."""

from __future__ import annotations

import torch

from adapterkit.checkpoint.checkpoint import Checkpoint
from adapterkit.checkpoint.decoded import dequantized


def values(checkpoint: Checkpoint, name: str) -> torch.Tensor:
    """A tensor of the dequantized checkpoint, read in one piece."""
    tensor = dequantized(checkpoint)[name]
    return tensor.read(0, tensor.numel).view(tensor.shape)


def wide(checkpoint: Checkpoint, name: str) -> torch.Tensor:
    tensor = dequantized(checkpoint)[name]
    return tensor.read_wide(0, tensor.numel).view(tensor.shape)


def check_ranges(checkpoint: Checkpoint, name: str, seed: int = 0) -> None:
    """Any range of a decoded tensor has the elements of the whole."""
    tensor = dequantized(checkpoint)[name]
    whole = tensor.read(0, tensor.numel)
    generator = torch.Generator().manual_seed(seed)
    for _ in range(8):
        start, stop = sorted(torch.randint(0, tensor.numel + 1, (2,), generator=generator).tolist())
        assert torch.equal(tensor.read(start, stop), whole[start:stop])
