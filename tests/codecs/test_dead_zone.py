"""The dead zone: a few cells of the table that `bench/studies/fidelity.py` prints, against figures of another program.

Those were measured on 2048x2048 Gaussian weights with bitsandbytes, llama.cpp's Q8_0 and a plain 128x128 FP8, before any of
this code was there: retention <got, wanted>/|wanted|^2 when a change is written on the grid that its base sits on already.
"""

from __future__ import annotations

import pytest


@pytest.fixture(scope="module")
def weights():
    pytest.importorskip("numba")
    from bench.studies import fidelity

    return fidelity.Weights(side=1024)


@pytest.mark.parametrize(
    ("name", "size", "kept"),
    [
        ("bf16", 0.001, 0.53),
        ("bf16", 0.003, 0.93),
        ("nf4", 0.001, 0.002),
        ("nf4", 0.01, 0.015),
        ("nf4", 0.03, 0.04),
        ("nf4", 0.1, 0.84),
        ("Q8_0", 0.001, 0.03),
        ("Q8_0", 0.003, 0.20),
        ("Q8_0", 0.01, 0.98),
        ("fp8", 0.003, 0.12),
        ("fp8", 0.01, 0.37),
        ("fp8", 0.03, 0.82),
    ],
)
def test_from_the_grid(weights, name: str, size: float, kept: float) -> None:
    assert weights.cell(name, size, on_grid=True).retention == pytest.approx(kept, abs=0.015)


@pytest.mark.parametrize(("size", "still"), [(0.001, 0.78), (0.003, 0.48), (0.01, 0.18)])
def test_entries_that_do_not_move_in_bfloat16(weights, size: float, still: float) -> None:
    assert weights.cell("bf16", size, on_grid=False).unmoved == pytest.approx(still, abs=0.01)


@pytest.mark.parametrize("name", ["nf4", "fp8", "int8", "Q8_0", "f16"])
def test_from_16_bits_a_change_survives_on_average(weights, name: str) -> None:
    assert weights.cell(name, 0.01, on_grid=False).retention == pytest.approx(1.0, abs=0.03)
