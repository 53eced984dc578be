"""Methods whose large matrices are random, fixed and shared by all modules: how they are made and used.

Weights are ``[out, in]``. Random numbers come from torch's CPU generator, whose streams are the same on every machine.
"""

from __future__ import annotations

import math
from functools import lru_cache

import torch


@lru_cache(maxsize=2)
def uniform_pair(seed: int, a_shape: tuple[int, int], b_shape: tuple[int, int]) -> tuple[torch.Tensor, torch.Tensor]:
    """VeRA's A and B from their seed: Kaiming-uniform (gain sqrt 2) over the last dimension, A first (arXiv:2310.11454;
    PEFT 0.21)."""
    generator = torch.Generator(device="cpu").manual_seed(seed)
    pair = []
    for shape in (a_shape, b_shape):
        bound = math.sqrt(3.0) * (math.sqrt(2.0) / math.sqrt(shape[1]))
        pair.append(torch.empty(shape, dtype=torch.float32).uniform_(-bound, bound, generator=generator))
    return pair[0], pair[1]


@lru_cache(maxsize=2)
def sparse_pair(
    seed: int, a_shape: tuple[int, ...], b_shape: tuple[int, ...], sparsity: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """RandLoRA's sparse A and B from their seed (arXiv:2502.00987): entries -1, 0, 1 with probabilities
    1/2s, 1 - 1/s, 1/2s, brought to unit deviation; A is drawn first."""
    generator = torch.Generator(device="cpu").manual_seed(seed)
    edge = 1 / (2 * sparsity)
    pair = []
    for shape in (a_shape, b_shape):
        drawn = torch.rand(shape, generator=generator)
        signs = (drawn > 1 - edge).float() - (drawn < edge).float()
        pair.append(signs / signs.std())
    return pair[0], pair[1]


def randlora(
    a: torch.Tensor, b: torch.Tensor, lam: torch.Tensor, gamma: torch.Tensor, shape: tuple[int, int]
) -> tuple[torch.Tensor, torch.Tensor]:
    """RandLoRA's delta as factors ``left @ right`` (arXiv:2502.00987).

    Args:
        a: ``[r, 1, >= min]``; b: ``[>= max, >= n, r]``, with ``min, max`` of ``shape``.
        lam: ``[r, n]``; gamma ``[n, min]``.
        shape: ``(out, in)``.

    A is flattened with the rank slowest, B with the base slowest, as PEFT 0.21 trains it: the pairs do not match, and the
    trained numbers belong to this pairing.
    """
    bases, small = gamma.shape
    left = b[: max(shape), :bases].reshape(max(shape), -1)
    right = (a[:, :bases, :small] * lam[:, :, None] * gamma).reshape(-1, small)
    return (left, right) if shape[1] == small else (right.T.contiguous(), left.T.contiguous())


def from_bank(weights: torch.Tensor, indices: torch.Tensor, bank: torch.Tensor) -> torch.Tensor:
    """VB-LoRA (arXiv:2405.15179): mixtures of bank vectors; weights and indices ``[..., k]`` give ``[..., length]``."""
    return (weights.unsqueeze(-1) * bank[indices]).sum(-2)


def top_mixture(logits: torch.Tensor, k: int) -> tuple[torch.Tensor, torch.Tensor]:
    """The softmax weights of the ``k`` largest logits, and where they are (arXiv:2405.15179)."""
    best, indices = logits.topk(k, dim=-1)
    return best.softmax(-1), indices


def tiny_projection(seed: int, count: int, rank: int) -> torch.Tensor:
    """TinyLoRA's fixed random matrices of one layer, ``[count, rank, rank]``, normal with variance 1/rank (PEFT 0.21)."""
    generator = torch.Generator(device="cpu").manual_seed(seed)
    return torch.normal(mean=0.0, std=1.0 / rank**0.5, size=(count, rank, rank), generator=generator)
