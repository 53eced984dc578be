"""NaN, infinities and tensors without values in a base: said, counted, left out of the figures; nothing breaks on them."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from models import plain_adapter, plain_base, read_tensors
from safetensors.torch import save_file

import adapterkit
from adapterkit.cli import main
from adapterkit.errors import AdapterError
from adapterkit.ops.fidelity import Fidelity, block_sums

TOUCHED, UNTOUCHED = "model.layers.0.self_attn.q_proj.weight", "model.layers.0.input_layernorm.weight"


def damaged(folder: Path, name: str, value: float, at: int = 3) -> Path:
    path = folder / "model.safetensors"
    tensors = read_tensors(folder)
    tensors[name].view(-1)[at] = value
    save_file(tensors, path, metadata={"format": "pt"})
    return folder


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("name", [TOUCHED, UNTOUCHED])
def test_a_base_with_an_odd_value(value: float, name: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    base = plain_base(tmp_path / "base", layers=2)
    adapter = plain_adapter(tmp_path / "adapter", base)
    clean = adapterkit.merge(base, [adapter], tmp_path / "clean", fidelity=True)
    damaged(base, name, value)
    report = adapterkit.merge(base, [adapter], tmp_path / "out", fidelity=True)
    said = [note for note in report.notes if "not finite" in note]
    if name == TOUCHED:
        assert said == [f"1 merged values are not finite (NaN or infinite), in {TOUCHED}"]
    assert report.fidelity is not None
    assert clean.fidelity is not None
    assert report.fidelity.retention == pytest.approx(clean.fidelity.retention, abs=0.05)
    found = adapterkit.verify(tmp_path / "out", base=base, adapters=[adapter])
    assert found.ok
    kinds = [(one.kind, one.severity, one.tensors) for one in found.findings if one.kind == "not finite"]
    assert kinds == ([("not finite", "warning", (TOUCHED,))] if name == TOUCHED else [])
    assert all(math.isfinite(x) for x in (found.tensors.retention, found.tensors.cosine, found.tensors.error))
    for command in (
        ["verify", tmp_path / "out", "--base", base, "--adapter", adapter, "--json"],
        ["inspect", base, "--json"],
        ["merge", base, adapter, "-o", tmp_path / "again", "--fidelity", "--json"],
    ):
        capsys.readouterr()
        with pytest.raises(SystemExit) as end:
            main([str(word) for word in command])
        assert end.value.code == 0, command
        json.loads(capsys.readouterr().out, parse_constant=lambda text: pytest.fail(text))


def test_an_adapter_with_an_odd_value(tmp_path: Path) -> None:
    base = plain_base(tmp_path / "base", layers=2)
    adapter = plain_adapter(tmp_path / "adapter", base)
    path = adapter / "adapter_model.safetensors"
    tensors = read_tensors(adapter)
    key = next(key for key in tensors if "q_proj" in key and "lora_B" in key)
    tensors[key].view(-1)[0] = math.nan
    save_file(tensors, path)
    with pytest.raises(AdapterError, match="holds NaN or infinite values"):
        adapterkit.merge(base, [adapter], tmp_path / "out", fidelity=True)
    with pytest.raises(AdapterError, match="holds NaN or infinite values"):
        adapterkit.verify(base, base=base, adapters=[adapter])


def test_values_that_were_lost_are_still_an_error(tmp_path: Path) -> None:
    """NaN where the formula gives a number is no odd base."""
    base = plain_base(tmp_path / "base", layers=2)
    adapter = plain_adapter(tmp_path / "adapter", base)
    adapterkit.merge(base, [adapter], tmp_path / "out")
    damaged(tmp_path / "out", TOUCHED, math.nan)
    found = adapterkit.verify(tmp_path / "out", base=base, adapters=[adapter])
    assert not found.ok
    assert math.isfinite(found.tensors.error)


def test_sums_leave_out_what_is_not_finite() -> None:
    torch.manual_seed(0)
    w, d = torch.randn(64, dtype=torch.float64), torch.randn(64, dtype=torch.float64) / 100
    new = w + d
    got = new.bfloat16()
    odd = new.clone()
    odd[5] = math.nan
    base = w.clone()
    base[7] = math.inf
    sums = block_sums(base, odd, got, error=True)
    keep = [i for i in range(64) if i not in (5, 7)]
    g = got.double()[keep] - w[keep]
    assert (sums.count, sums.odd, sums.lost) == (62, 2, 0)
    assert sums.retention == pytest.approx(float(g @ d[keep] / (d[keep] @ d[keep])), rel=1e-3)
    lost = got.clone()
    lost[9] = math.nan
    assert block_sums(w, new, lost).lost == 1


def test_sums_of_values_whose_squares_overflow() -> None:
    w = torch.full((8,), 1e30)
    sums = block_sums(w, w * 1.5, w * 1.25, error=True)
    one = Fidelity.of(sums)
    assert (one.relative, one.retention, one.cosine) == pytest.approx((0.5, 0.5, 1.0), rel=1e-5)
    assert math.isfinite(sums.ee)


def test_tensors_without_values(tmp_path: Path) -> None:
    base = plain_base(tmp_path / "base", layers=2)
    adapter = plain_adapter(tmp_path / "adapter", base)
    tensors: dict[str, Any] = read_tensors(base)
    tensors |= {"empty.one": torch.zeros(0, 7), "scalar.one": torch.tensor(1.0), "n" * 1000: torch.ones(2, 2)}
    save_file(tensors, base / "model.safetensors", metadata={"format": "pt"})
    adapterkit.merge(base, [adapter], tmp_path / "out", fidelity=True)
    found = adapterkit.verify(tmp_path / "out", base=base, adapters=[adapter])
    assert found.ok
    assert sum(found.tensors.counts.values()) == len(tensors)
    assert adapterkit.inspect(base).tensors == len(tensors)
