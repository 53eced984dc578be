from __future__ import annotations

import pytest
import torch
from adapters import adapter
from hypothesis import given, settings
from hypothesis import strategies as st

from adapterkit.errors import AdapterError
from adapterkit.ops import rows
from adapterkit.ops.rows import Dense
from adapterkit.ops.select import energy, kth_magnitudes, row_energies


@settings(max_examples=80)
@given(
    st.lists(
        st.one_of(st.floats(width=32, allow_nan=False, allow_infinity=False), st.sampled_from([0.0, -0.0, 1.0, -1.0])),
        min_size=1,
        max_size=60,
    ),
    st.data(),
)
def test_the_value_that_sorting_finds(values: list[float], data: st.DataObject) -> None:
    columns = data.draw(st.sampled_from([c for c in range(1, len(values) + 1) if len(values) % c == 0]))
    matrix = torch.tensor(values, dtype=torch.float32).view(-1, columns)
    ks = data.draw(st.lists(st.integers(1, len(values)), min_size=1, max_size=4))
    expected = sorted((abs(v) for v in values), reverse=True)
    assert kth_magnitudes(Dense(matrix), ks) == [expected[k - 1] for k in ks]


def test_no_ks() -> None:
    assert kth_magnitudes(Dense(torch.ones(2, 2)), []) == []


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_entries_that_are_not_numbers(bad: float) -> None:
    with pytest.raises(AdapterError, match="NaN or infinite"):
        kth_magnitudes(Dense(torch.tensor([[1.0, bad]])), [1])


@pytest.mark.parametrize("k", [0, 5])
def test_k_out_of_range(k: int) -> None:
    with pytest.raises(ValueError, match=r"k must be in 1\.\.4"):
        kth_magnitudes(Dense(torch.ones(2, 2)), [k])


def test_energy_is_exact(monkeypatch: pytest.MonkeyPatch) -> None:
    part = adapter(203, 517, 7, 1)
    monkeypatch.setattr(rows, "BLOCK_ELEMENTS", 1000)
    assert energy(part) == pytest.approx(float(part.rows(0, 203).double().square().sum()), rel=1e-12)


def test_the_energy_of_a_row_does_not_depend_on_its_neighbours() -> None:
    # Wide rows on two threads: there torch.sum adds a lone row in another order than it adds many.
    block = adapter(48, 70_001, 3, 1).rows(0, 48)
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        assert row_energies(block) == [row_energies(block[i : i + 1])[0] for i in range(48)]
    finally:
        torch.set_num_threads(before)
