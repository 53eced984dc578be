from __future__ import annotations

import pytest
import torch
from dense_formulas import splitmix64, uniforms

from adapterkit.ops.counter import stream, uniform


def test_the_published_sequence() -> None:
    # The first outputs for seed 1234567 (Rosetta Code, "Pseudo-random numbers/Splitmix64").
    known = [6457827717110365317, 3203168211198807973, 9817491932198370423, 4593380528125082431, 16408922859458223821]
    assert [splitmix64(1234567 + (i + 1) * 0x9E3779B97F4A7C15) for i in range(5)] == known
    assert uniform(1234567, 0, 5).tolist() == [(z >> 11) / 2**53 for z in known]


@pytest.mark.parametrize("seed", [0, 1, 2**63 - 1])
def test_python_integers_agree(seed: int) -> None:
    assert torch.equal(uniform(stream(seed, 3, "layer.0"), 0, 300).view(20, 15), uniforms(seed, 3, "layer.0", (20, 15)))


def test_an_entry_is_a_function_of_its_position() -> None:
    start = stream(7, 0, "w")
    whole = uniform(start, 0, 1000)
    assert torch.equal(torch.cat([uniform(start, i, 8) for i in range(0, 1000, 8)]), whole)
    assert torch.equal(uniform(start, 2**40 + 5, 3), uniform(start, 2**40, 8)[5:])


def test_names_give_different_streams() -> None:
    starts = {stream(seed, adapter, key) for seed in (0, 1) for adapter in (0, 1) for key in ("", "a", "b")}
    assert len(starts) == 12


def test_the_distribution_is_uniform() -> None:
    counts = torch.histc(uniform(stream(0, 0, ""), 0, 200_000), bins=100, min=0, max=1)
    chi2 = float(((counts - 2000) ** 2 / 2000).sum())
    # 99 degrees of freedom: mean 99, standard deviation 14.
    assert 50 < chi2 < 160
