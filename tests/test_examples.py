"""The examples that need no training run as they are written."""

from __future__ import annotations

import runpy
from pathlib import Path

import pytest
import torch
from models import plain_adapter, plain_base, read_bytes, read_tensors

import adapterkit

EXAMPLES = Path(__file__).parent.parent / "examples"


def run(monkeypatch: pytest.MonkeyPatch, name: str, *arguments: Path) -> None:
    monkeypatch.setattr("sys.argv", [name, *map(str, arguments)])
    runpy.run_path(str(EXAMPLES / name), run_name="__main__")


def test_merge(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    base = plain_base(tmp_path / "base")
    adapter = plain_adapter(tmp_path / "adapter", base)
    run(monkeypatch, "merge.py", base, adapter, tmp_path / "out")
    assert "6 tensors will change" in capsys.readouterr().out
    adapterkit.merge(base, [adapter], tmp_path / "same")
    assert read_bytes(tmp_path / "out") == read_bytes(tmp_path / "same")


def test_several_adapters(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    base = plain_base(tmp_path / "base", dtype="float32")
    one, two = (plain_adapter(tmp_path / f"adapter{seed}", base, seed=seed) for seed in (1, 2))
    run(monkeypatch, "several_adapters.py", base, one, two, tmp_path / "out")
    name, _, values = capsys.readouterr().out.partition(" ")
    stored, factors = read_tensors(base), [read_tensors(folder) for folder in (one, two)]
    module = f"base_model.model.{name.removesuffix('.weight')}"
    deltas = [of[f"{module}.lora_B.weight"].double() @ of[f"{module}.lora_A.weight"].double() for of in factors]
    wanted = stored[name].double() + 2 * (0.7 * deltas[0] + 0.3 * deltas[1])
    shown = torch.tensor([float(value) for value in values.strip(" []\n").split(",")], dtype=torch.float64)
    assert (shown - wanted.flatten()[:8]).abs().max() < 2e-6 * wanted.abs().max()
    merged = read_tensors(tmp_path / "out")[name]
    assert merged.dtype is torch.bfloat16
    assert ((merged.double() - wanted).abs() <= 2**-8 * wanted.abs()).all()
