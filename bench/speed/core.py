"""Combining two rank-16 adapters at rank 16: small core matrices against the dense way.

    python -m bench speed core [N ...]

The dense way is what PEFT 0.21's ``add_weighted_adapter(combination_type="svd")`` does: form the n x n delta, take
``torch.linalg.svd`` of it (``full_matrices=True`` is its default), keep 16 triples. Both run in this process with the
same number of threads; times are the best of three (dense at 4096 once), errors are relative to the norm of the sum.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Callable

import torch

from adapterkit.ops.lowrank import Factors
from adapterkit.ops.rules import combine
from bench.common import results

RANK = 16
WEIGHTS = (0.7, 0.3)


def adapter(n: int, seed: int) -> Factors:
    """Factors of the scale that training leaves: A as initialised, B small."""
    generator = torch.Generator().manual_seed(seed)
    return Factors(0.01 * torch.randn(n, RANK, generator=generator), torch.randn(RANK, n, generator=generator) / n**0.5)


def dense_svd(parts: list[Factors]) -> torch.Tensor:
    delta = sum((w * (p.b @ p.a) for p, w in zip(parts, WEIGHTS, strict=True)), torch.zeros(()))
    u, s, vh = torch.linalg.svd(delta, full_matrices=True)
    return (u[:, :RANK] * s[:RANK]) @ vh[:RANK]


def core_svd(parts: list[Factors]) -> Factors:
    found = combine(parts, "svd", weights=WEIGHTS, rank=RANK)
    assert isinstance(found, Factors)
    return found


def best(function: Callable[[], object], times: int) -> tuple[float, object]:
    took = []
    for _ in range(times):
        start = time.perf_counter()
        result = function()
        took.append(time.perf_counter() - start)
    return min(took), result


def main(sizes: list[int]) -> None:
    print(f"torch {torch.__version__}, {torch.get_num_threads()} threads, two adapters of rank {RANK} -> rank {RANK}")
    results.head("n", "core, ms", "dense, ms", "ratio", "core's error", "dense's error", "difference")
    for n in sizes:
        parts = [adapter(n, 1), adapter(n, 2)]
        fast, factors = best(lambda parts=parts: core_svd(parts), 3)  # type: ignore[misc]
        slow, matrix = best(lambda parts=parts: dense_svd(parts), 1 if n >= 4096 else 3)  # type: ignore[misc]
        assert isinstance(factors, Factors)
        assert isinstance(matrix, torch.Tensor)
        exact = sum((w * (p.b.double() @ p.a.double()) for p, w in zip(parts, WEIGHTS, strict=True)), torch.zeros(()))
        ours = factors.b.double() @ factors.a.double()
        norm = float(exact.norm())
        errors = [float((x - exact).norm()) / norm for x in (ours, matrix.double())]
        difference = float((ours - matrix).norm()) / norm
        times = (f"{fast * 1e3:.1f}", f"{slow * 1e3:.0f}", f"{slow / fast:.0f}")
        results.row(str(n), *times, *(f"{error:.7f}" for error in errors), f"{difference:.1e}")


if __name__ == "__main__":
    main([int(n) for n in sys.argv[1:]] or [1024, 2048, 4096])
