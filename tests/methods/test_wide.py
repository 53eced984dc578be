"""float64 bases: low-rank changes, trained rows and DoRA are added in float64; every other method's change is float32's."""

from __future__ import annotations

import warnings
from pathlib import Path

import pytest
import torch
from method_cases import Case, Net, make_net, merged_tensors, save_base, train

LORA = {"r": 4, "lora_alpha": 6}
WIDE = [
    Case("Lora", "Linear", LORA),
    Case("Lora", "Linear", {**LORA, "use_rslora": True}),
    Case("Lora", "Linear", {**LORA, "use_dora": True}),
    Case("Lora", "Linear with bias", {**LORA, "lora_bias": True}),
    Case("Lora", "Conv1D", LORA),
    Case("Lora", "Conv1D", {**LORA, "use_dora": True}),
    Case("Lora", "Conv2d", LORA),
    Case("Lora", "Embedding", LORA),
    Case("AdaLora", "Linear", {"init_r": 6, "total_step": 9}),
    Case("TrainableTokens", "Embedding", {"token_indices": [1, 5, 40]}),
]
NARROW = [
    Case("Lora", "Embedding", {**LORA, "use_dora": True}),
    Case("LoHa", "Linear", {"r": 4}),
    Case("LoKr", "Conv2d", {"r": 4}),
    Case("OFT", "Linear", {"r": 0, "oft_block_size": 16}, noise=0.05),
    Case("BOFT", "Linear", {"boft_block_size": 16}, noise=0.1),
    Case("HRA", "Linear", {"r": 6}),
    Case("IA3", "Conv1D", {"feedforward_modules": []}),
    Case("Vera", "Linear", {"r": 16}),
]


def error(case: Case, folder: Path) -> float:
    """The largest difference from PEFT's own merge in float64, as a part of the largest change."""
    from peft import PeftModel

    def net() -> Net:
        made = make_net().double()
        with torch.no_grad():
            for at, parameter in enumerate(made.parameters()):
                generator = torch.Generator().manual_seed(at)
                noise = torch.randn(parameter.shape, generator=generator, dtype=torch.float64)
                parameter.mul_(1 + 1e-9 * noise)  # values that float32 cannot hold
        return made

    base, adapter = folder / "base", folder / "adapter"
    save_base(net(), base, torch.float64)
    train(net().float(), case.config(), adapter, case.noise)
    ours = merged_tensors(base, adapter)
    with warnings.catch_warnings(), torch.no_grad():
        warnings.simplefilter("ignore")
        exact = PeftModel.from_pretrained(net(), str(adapter)).eval().double().merge_and_unload().state_dict()
    before = net().state_dict()
    assert {tensor.dtype for tensor in ours.values()} == {torch.float64}
    delta = max(float((exact[name] - before[name]).abs().max()) for name in before)
    assert delta > 0
    return max(float((ours[name] - exact[name]).abs().max()) for name in before) / delta


@pytest.mark.parametrize("case", WIDE, ids=str)
def test_changes_that_are_added_in_float64(case: Case, tmp_path: Path) -> None:
    assert error(case, tmp_path) < 1e-12


@pytest.mark.parametrize("case", NARROW, ids=str)
def test_changes_that_are_computed_in_float32_and_added_in_float64(case: Case, tmp_path: Path) -> None:
    assert error(case, tmp_path) < 3e-6
