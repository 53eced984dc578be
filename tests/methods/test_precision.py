"""bfloat16 bases: one rounding, so nearly every entry is the float64 result, correctly rounded."""

from __future__ import annotations

from pathlib import Path

import pytest
from method_cases import Case, correctly_rounded

CASES = [
    Case("AdaLora", "Linear", {"init_r": 6, "total_step": 9}),
    Case("Vera", "Linear", {"r": 16}),
    Case("IA3", "Linear", {"feedforward_modules": []}),
    Case("LoHa", "Linear", {"r": 4}),
    Case("LoKr", "Linear", {"r": 4}),
    Case("OFT", "Linear", {"r": 0, "oft_block_size": 16}, noise=0.05),
    Case("BOFT", "Linear", {"boft_block_size": 16}, noise=0.1),
    Case("HRA", "Linear", {"r": 6}),
    Case("Miss", "Linear", {"r": 8, "init_weights": "bat"}),
    Case("Hira", "Linear", {"r": 4}),
    Case("Gralora", "Linear", {"r": 8, "gralora_k": 4}, noise=0.05),
    Case("Road", "Linear", {"variant": "road_2", "group_size": 16}),
]


@pytest.mark.parametrize("case", CASES, ids=str)
def test_entries_are_the_float64_result_rounded(case: Case, tmp_path: Path) -> None:
    assert correctly_rounded(case, tmp_path) >= 0.9999
