"""NaN, infinities and tensors without values in a base: said, counted, left out of the figures; nothing breaks on them."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from models import plain_adapter, plain_base, read_tensors
from safetensors.torch import load_file, save_file

import adapterkit
from adapterkit.checkpoint import odd
from adapterkit.cli import main
from adapterkit.dtypes import DTYPES
from adapterkit.errors import AdapterError, CheckpointError
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
    (said,) = [note for note in report.notes if "not finite" in note]
    words = "merged" if name == TOUCHED else "input"
    assert said.startswith(f"1 {words} values are not finite (NaN or infinite), in {name}")
    assert report.fidelity is not None
    assert clean.fidelity is not None
    assert report.fidelity.retention == pytest.approx(clean.fidelity.retention, abs=0.05)
    found = adapterkit.verify(tmp_path / "out", base=base, adapters=[adapter])
    assert found.ok
    kinds = [(one.kind, one.severity, one.tensors) for one in found.findings if one.kind == "not finite"]
    assert kinds == [("not finite", "warning", (name,))]
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


FLOATS = (
    "float64",
    "float32",
    "float16",
    "bfloat16",
    "float8_e4m3fn",
    "float8_e5m2",
    "float8_e4m3fnuz",
    "float8_e5m2fnuz",
)


@pytest.mark.parametrize("name", FLOATS)
def test_odd_values_are_counted_in_bytes_as_torch_counts_them(name: str) -> None:
    dtype = next(row for row in DTYPES.values() if row.torch_name == name)
    size = dtype.bits // 8
    every = torch.arange(1 << min(dtype.bits, 16)).to(torch.int64)
    bits = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}[size]
    high = every << (dtype.bits - 16) if size > 2 else every  # sign and exponent, and the first bits behind them
    values = high.to(bits).view(getattr(torch, name))
    wanted = int((~torch.isfinite(values.double())).sum())
    assert wanted > 0
    assert odd.count(values.view(torch.uint8).numpy().tobytes(), dtype) == wanted
    assert odd.count_in(values, dtype) == wanted


def test_values_of_other_dtypes_are_not_odd() -> None:
    for dtype in DTYPES.values():
        if not dtype.is_float or dtype.bits < 8:
            assert odd.count(b"\xff" * 64, dtype) == 0


@pytest.mark.parametrize("place", [0, 4097, 70_000, -1])
def test_what_a_merge_says_of_a_large_tensor_that_it_copies(place: int, tmp_path: Path) -> None:
    """16 KiB of each are looked at: the first and last values are, others may not be; `verify` reads all."""
    base = plain_base(tmp_path / "base", layers=1)
    adapter = plain_adapter(tmp_path / "adapter", base)
    tensors = read_tensors(base) | {"large.one": torch.ones(400, 400)}
    tensors["large.one"].view(-1)[place] = math.nan
    save_file(tensors, base / "model.safetensors", metadata={"format": "pt"})
    report = adapterkit.merge(base, [adapter], tmp_path / "out")
    said = [note for note in report.notes if "not finite" in note]
    assert bool(said) == (place in (0, -1))
    assert all("large.one" in note and "verify looks at all" in note for note in said)
    found = adapterkit.verify(tmp_path / "out", base=base, adapters=[adapter])
    assert [one.tensors for one in found.findings if one.kind == "not finite"] == [("large.one",)]
    assert not [note for note in adapterkit.merge(base, [adapter], dry_run=True).notes if "not finite" in note]


@pytest.mark.parametrize("to", ["f16", "f32", "bf16"])
def test_what_a_conversion_says(to: str, tmp_path: Path) -> None:
    base = damaged(plain_base(tmp_path / "base", layers=1), UNTOUCHED, math.nan)
    report = adapterkit.convert(base, to=to, out=tmp_path / "out")
    assert [UNTOUCHED in note for note in report.notes if "not finite" in note] == [True]


@pytest.mark.parametrize("to", ["nf4", "int8", "fp8"])
@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_a_value_that_would_spread_is_not_quantized(to: str, value: float, tmp_path: Path) -> None:
    """One NaN in a block is a block of NaN, so this is no copy of what was there."""
    base = damaged(plain_base(tmp_path / "base", layers=1, width=128), TOUCHED, value)
    adapter = plain_adapter(tmp_path / "adapter", base)
    for write in (
        lambda: adapterkit.convert(base, to=to, out=tmp_path / "out"),
        lambda: adapterkit.merge(base, [adapter], tmp_path / "out", quant=to),
    ):
        with pytest.raises(CheckpointError, match=f"'{TOUCHED}' cannot be .*: its value at 3 is not finite"):
            write()
        assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("to", ["nf4", "int8", "mxfp4", "nvfp4", "fp8-block"])
@pytest.mark.parametrize("shape", [(0, 128), (128, 0)])
def test_a_linear_layer_without_values_is_not_quantized(to: str, shape: tuple[int, int], tmp_path: Path) -> None:
    base = plain_base(tmp_path / "base", layers=1, width=128)
    tensors = load_file(base / "model.safetensors")
    name = next(name for name in tensors if "q_proj" in name)
    save_file({**tensors, name: torch.zeros(shape)}, base / "model.safetensors", metadata={"format": "pt"})
    adapterkit.convert(base, to=to, out=tmp_path / "out")
    assert load_file(tmp_path / "out" / "model.safetensors")[name].shape == shape
    adapterkit.convert(tmp_path / "out", to="bf16", out=tmp_path / "back")
    assert load_file(tmp_path / "back" / "model.safetensors")[name].shape == shape
