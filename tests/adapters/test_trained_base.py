"""Adapters that say they were trained on quantized values: said where the base has others, and nowhere else."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
import torch
from models import plain_adapter, plain_base, read_tensors

import adapterkit
from adapterkit.adapters.load import load_adapter
from adapterkit.adapters.trained_base import trained_base

PEFT = """---
library_name: peft
---
## Training procedure

The following `bitsandbytes` quantization config was used during training:
- quant_method: QuantizationMethod.BITS_AND_BYTES
- _load_in_8bit: False
- _load_in_4bit: True
- load_in_8bit: False
- load_in_4bit: True
- bnb_4bit_quant_type: nf4
- bnb_4bit_use_double_quant: True
"""
AXOLOTL = """```yaml\nbase_model: org/model\nload_in_8bit: false\nload_in_4bit: true\nadapter: qlora\n```\n"""
USE = """```python\nmodel = load("org/model", BitsAndBytesConfig(load_in_4bit=True))\n```\n"""


@pytest.fixture
def base(tmp_path: Path) -> Path:
    return plain_base(tmp_path / "base", layers=1, width=128, dtype="float32")


@pytest.mark.parametrize(
    ("files", "named", "wanted"),
    [
        ({"README.md": PEFT}, "org/model", ("nf4", True)),
        ({"README.md": AXOLOTL}, "org/model", ("nf4", None)),
        ({"README.md": USE}, "org/model", None),
        (
            {"args.json": json.dumps({"quant_method": "bnb", "quant_bits": 4, "bnb_4bit_quant_type": "fp4"})},
            "m",
            ("fp4", None),
        ),
        ({"args.json": json.dumps({"quant_method": "hqq", "quant_bits": 4})}, "m", None),
        ({"args.json": json.dumps({"quant_method": "bnb", "quant_bits": None})}, "m", None),
        (
            {"args.json": json.dumps({"quant_method": "bnb", "quant_bits": 4, "bnb_4bit_quant_type": None})},
            "m",
            ("nf4", None),
        ),
        ({"training_args.yaml": "quantization_bit: 8\nquantization_method: bnb\n"}, "m", ("int8", None)),
        ({}, "unsloth/llama-3-8b-bnb-4bit", ("nf4", None)),
        ({}, "unsloth/Qwen3-4B-unsloth-bnb-4bit", ("nf4", None)),
        ({}, "mlx-community/model-4bit", ("4 bits", None)),
        ({}, "org/Model-AWQ", ("awq", None)),
        ({}, "org/llama-4bitter", None),
    ],
)
def test_whatever_a_trainer_writes(
    base: Path, tmp_path: Path, files: dict[str, str], named: str, wanted: tuple[str, bool | None] | None
) -> None:
    adapter = plain_adapter(tmp_path / "a", base, base_model_name_or_path=named)
    for name, text in files.items():
        (adapter / name).write_text(text)
    found = trained_base(load_adapter(adapter))
    assert (None if found is None else (found.grid, found.double)) == wanted


def test_a_base_that_is_a_folder_speaks_for_itself(base: Path, tmp_path: Path) -> None:
    config = json.loads((base / "config.json").read_text())
    config["quantization_config"] = {"quant_method": "bitsandbytes", "load_in_4bit": True, "bnb_4bit_quant_type": "nf4"}
    there = tmp_path / "there"
    there.mkdir()
    (there / "config.json").write_text(json.dumps(config))
    found = trained_base(load_adapter(plain_adapter(tmp_path / "a", base, base_model_name_or_path=str(there))))
    assert found is not None
    assert (found.grid, found.double) == ("nf4", False)


def test_a_merge_says_it_and_how_far_the_base_is(base: Path, tmp_path: Path) -> None:
    """The distance is that of bitsandbytes' own NF4, nested scales or not (they hardly move it)."""
    adapter = plain_adapter(tmp_path / "a", base)
    (adapter / "README.md").write_text(PEFT)
    report = adapterkit.merge(base, [adapter], tmp_path / "out")
    (note,) = [text for text in report.notes if "was trained on a base in nf4 with nested scales" in text]
    assert "as_trained='nf4'" in note
    before, after = read_tensors(base), read_tensors(tmp_path / "out")
    functional = pytest.importorskip("bitsandbytes.functional")
    far = []
    for name in before:
        delta = after[name].float() - before[name].float()
        if before[name].dim() == 2 and delta.any():
            flat = before[name].float().reshape(1, -1)
            codes, state = functional.quantize_4bit(flat, quant_type="nf4", blocksize=64)
            far.append((functional.dequantize_4bit(codes, state) - flat).norm() / delta.norm())
    said = float(re.search(r"moves the base ([0-9.e+-]+) times", note)[1])
    assert float(min(far)) * 0.9 <= said <= float(max(far)) * 1.1
    assert torch.tensor(far).isfinite().all()
    assert any(one.code == "quantized-base" for one in adapterkit.check(base, [adapter]).findings)
    asked = adapterkit.check(base, [adapter], as_trained="nf4", double_quant=True)
    assert not any(one.code == "quantized-base" for one in asked.findings)
    as_trained = adapterkit.merge(base, [adapter], tmp_path / "same", as_trained="nf4", double_quant=True)
    assert not any("was trained on a base in" in text for text in as_trained.notes)
    adapterkit.merge(base, [adapter], tmp_path / "packed", quant="nf4")
    adapterkit.convert(tmp_path / "packed", tmp_path / "decoded", to="bf16")
    decoded = adapterkit.merge(tmp_path / "decoded", [adapter], tmp_path / "on-decoded")
    assert not any("was trained on a base in" in text for text in decoded.notes)
    other = adapterkit.merge(base, [adapter], tmp_path / "other", as_trained="nf4")
    assert any("and the base is taken as trained in nf4" in text for text in other.notes)


@pytest.mark.parametrize("said", ["~nobody-here/model", "~", "model\0-bnb-4bit-x", "/dev/zero"])
def test_a_base_that_is_no_place_here(said: str, base: Path, tmp_path: Path) -> None:
    """Whoever made the adapter wrote it: it is looked up, and never an error."""
    adapter = plain_adapter(tmp_path / "a", base, base_model_name_or_path=said)
    assert adapterkit.check(base, [adapter]).touched == adapterkit.merge(base, [adapter], tmp_path / "out").touched
