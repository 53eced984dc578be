"""Random adapters for the tests, and the dense delta they stand for."""

from __future__ import annotations

import torch
from hypothesis import strategies as st

from adapterkit.ops.lowrank import Factors


def adapter(m: int, n: int, rank: int, seed: int) -> Factors:
    generator = torch.Generator().manual_seed(seed)
    return Factors(torch.randn(m, rank, generator=generator), torch.randn(rank, n, generator=generator))


def adapters(m: int, n: int, *ranks: int, seed: int = 0) -> list[Factors]:
    return [adapter(m, n, rank, seed * 100 + i) for i, rank in enumerate(ranks)]


def dense(delta: Factors) -> torch.Tensor:
    """The delta in float64, straight from the factors."""
    return delta.b.double() @ delta.a.double()


@st.composite
def families(draw: st.DrawFn, most: int = 4) -> list[Factors]:
    """Some adapters of one weight: ranks differ, may exceed min(m, n), and some are zero or not of full rank."""
    m, n = draw(st.integers(1, 20)), draw(st.integers(1, 20))
    out = []
    for i in range(draw(st.integers(1, most))):
        found = adapter(m, n, draw(st.integers(1, 24)), draw(st.integers(0, 10**6)) * 10 + i)
        kind = draw(st.sampled_from(["full", "full", "full", "zero", "repeated"]))
        if kind == "zero":
            found = Factors(torch.zeros_like(found.b), found.a)
        elif kind == "repeated":
            found = Factors(found.b[:, :1].repeat(1, found.rank).contiguous(), found.a)
        out.append(found)
    return out
