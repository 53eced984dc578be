"""`merge --residual`: output and residual together are base + adapter, whatever the output's format rounds away."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from stored_formats import FORMATS
from test_keep import OTHER, TOUCHED, adapter_of, base_of, shape_of, stored

from adapterkit import merge, verify
from adapterkit.checkpoint.decoded import dequantized
from adapterkit.checkpoint.open import open_checkpoint
from adapterkit.checkpoint.plan import Plan
from adapterkit.cli import main
from adapterkit.errors import CheckpointError, OutputError, UsageError
from adapterkit.verbs.execute import execute

KEY = f"base_model.model.{TOUCHED}.lora_"


def inputs(folder: Path, name: str, size: float = 0.02) -> tuple[Path, Path, torch.Tensor]:
    """A quantized base, an adapter on one of its two layers, and that layer's W + delta in float64."""
    base = base_of(folder, name)
    rows, columns = shape_of(base)
    tuned = adapter_of(folder, torch.randn(rows, 4, generator=torch.Generator().manual_seed(8)) * size, columns)
    factors = load_file(tuned / "adapter_model.safetensors")
    wanted = values(base).double() + factors[f"{KEY}B.weight"].double() @ factors[f"{KEY}A.weight"].double()
    return base, tuned, wanted


def values(folder: Path, name: str = TOUCHED) -> torch.Tensor:
    handle = dequantized(open_checkpoint(folder))[f"{name}.weight"]
    return handle.read_wide(0, handle.numel).view(handle.shape).float()


def product(residual: Path, key: str = KEY) -> torch.Tensor:
    """B A as PEFT applies it."""
    config = json.loads((residual / "adapter_config.json").read_text())
    factors = load_file(residual / "adapter_model.safetensors")
    scale = config["lora_alpha"] / config["r"]
    return scale * factors[f"{key}B.weight"].double() @ factors[f"{key}A.weight"].double()


@pytest.mark.parametrize("name", FORMATS)
def test_the_two_together_are_the_merge(tmp_path: Path, name: str) -> None:
    base, tuned, wanted = inputs(tmp_path, name)
    report = merge(base, [tuned], tmp_path / "out", quant="keep", residual=1000)
    assert report.residual is not None
    assert report.residual.modules == 1
    residual = tmp_path / "out-residual"
    written = values(tmp_path / "out").double()
    lost = (wanted - written).norm()
    # Factors of 16 bits, and decoding that rounds to 16 where the format's library does.
    assert (written + product(residual) - wanted).norm() <= 3e-3 * max(lost, 0.05 * wanted.norm())
    factors = load_file(residual / "adapter_model.safetensors")
    assert set(factors) == {f"{KEY}A.weight", f"{KEY}B.weight"}  # what is not touched is byte-equal and needs nothing


def test_a_small_rank_is_the_best_of_its_rank(tmp_path: Path) -> None:
    base, tuned, wanted = inputs(tmp_path, "nf4 double")
    report = merge(base, [tuned], tmp_path / "out", quant="keep", residual=3)
    lost = (wanted - values(tmp_path / "out").double()).numpy()
    singular = np.linalg.svd(lost, compute_uv=False)
    left = np.linalg.norm(lost - product(tmp_path / "out-residual").numpy())
    best = np.sqrt((singular[3:] ** 2).sum())
    assert best <= left * (1 + 1e-6)
    assert left <= 1.01 * best
    assert report.residual is not None
    assert report.residual.held == pytest.approx(1 - left**2 / (singular**2).sum(), abs=1e-3)
    record = json.loads((tmp_path / "out/adapterkit.json").read_text())
    assert record["operation"]["parameters"]["residual"] == 3
    assert record["evidence"]["residual"]["held"] == pytest.approx(report.residual.held, rel=1e-4)
    assert "vllm serve" in report.residual.command


def test_a_config_that_names_modules_of_16_bits(tmp_path: Path) -> None:
    base, tuned, wanted = inputs(tmp_path, "ct int4")
    config = json.loads((base / "config.json").read_text())
    config["quantization_config"]["ignore"] = ["model.embed_tokens"]
    (base / "config.json").write_text(json.dumps(config))
    merge(base, [tuned], tmp_path / "out", quant="keep", residual=1000)
    written = values(tmp_path / "out").double()
    assert (written + product(tmp_path / "out-residual") - wanted).norm() <= 3e-3 * (wanted - written).norm()


def test_a_dry_run_says_its_size_and_writes_nothing(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    base, tuned, _ = inputs(tmp_path, "ct int4")
    out, residual = tmp_path / "out", tmp_path / "out-residual"
    planned = merge(base, [tuned], out, quant="keep", residual=4, dry_run=True).residual
    assert not out.exists()
    assert not residual.exists()
    done = merge(base, [tuned], out, quant="keep", residual=4).residual
    assert planned is not None
    assert done is not None
    assert planned.held is None
    assert planned.nbytes == done.nbytes == (residual / "adapter_model.safetensors").stat().st_size
    with pytest.raises(OutputError):
        merge(base, [tuned], tmp_path / "out", quant="keep", residual=4)
    with pytest.raises(SystemExit):
        main(["merge", str(base), str(tuned), "-o", str(out), "--quant", "keep", "--residual", "4", "--force"])
    assert "out-residual: rank 4" in capsys.readouterr().out
    assert 'base_model: "out"\n' in (residual / "README.md").read_text()


def test_it_is_the_same_by_any_road(tmp_path: Path) -> None:
    """One thread or three, workers of their own, and a run that was cut off and goes on: the same bytes."""
    base, tuned, _ = inputs(tmp_path, "fp8 blocks")
    name = "adapter_model.safetensors"
    merge(base, [tuned], tmp_path / "one/out", quant="keep", residual=2, jobs=1)
    expected = (tmp_path / "one/out-residual" / name).read_bytes()
    merge(base, [tuned], tmp_path / "two/out", quant="keep", residual=2, jobs=3)
    merge(base, [tuned], tmp_path / "three/out", quant="keep", residual=2, on="local", workers=1)
    # A saved plan, carried out in parts, and elsewhere than planned.
    plan = tmp_path / "plan.json"
    merge(base, [tuned], tmp_path / "planned", quant="keep", residual=2, yes_lossy=True, save_plan=plan)
    made = Plan.from_json(plan.read_bytes())
    (tmp_path / "five").mkdir()
    for part in range(len(made.files)):
        execute(made, tmp_path / "five/out", part=part)
    assert not (tmp_path / "five/out-residual").exists()
    assert execute(made, tmp_path / "five/out").residual.rank == 2
    (tmp_path / "four").mkdir()
    (tmp_path / "four/out-residual").mkdir()
    (tmp_path / "four/out-residual/else").write_text("theirs")
    with pytest.raises(Exception, match="out-residual"):
        merge(base, [tuned], tmp_path / "four/out", quant="keep", residual=2)
    assert not (tmp_path / "four/out").exists()
    for place in ("two", "three", "five"):
        assert (tmp_path / place / "out-residual" / name).read_bytes() == expected
        assert (tmp_path / place / "out/config.json").read_bytes() == (base / "config.json").read_bytes()


def test_what_was_cut_off_goes_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import adapterkit.verbs.residual as module

    base, tuned, _ = inputs(tmp_path, "int8")
    merge(base, [tuned], tmp_path / "whole/out", quant="keep", residual=2)
    write = module.FolderForm.config

    def cut(*args: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(module.FolderForm, "config", cut)
    with pytest.raises(KeyboardInterrupt):
        merge(base, [tuned], tmp_path / "cut/out", quant="keep", residual=2, resume=True)
    assert not (tmp_path / "cut/out").exists()
    assert not (tmp_path / "cut/out-residual").exists()
    monkeypatch.setattr(module.FolderForm, "config", write)
    monkeypatch.setattr(module.Residual, "_cuts", None)  # the factors are there already
    merge(base, [tuned], tmp_path / "cut/out", quant="keep", residual=2, resume=True)
    name = "adapter_model.safetensors"
    whole = (tmp_path / "whole/out-residual" / name).read_bytes()
    assert (tmp_path / "cut/out-residual" / name).read_bytes() == whole


def test_no_output_appears_before_its_residual(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from adapterkit.checkpoint.write import Ready

    base, tuned, _ = inputs(tmp_path, "int8")
    publish, seen = Ready.publish, []

    def once(self: Ready, *, force: bool) -> None:
        if seen:
            raise KeyboardInterrupt
        seen.append(self.out.name)
        publish(self, force=force)

    monkeypatch.setattr(Ready, "publish", once)
    with pytest.raises(KeyboardInterrupt):
        merge(base, [tuned], tmp_path / "out", quant="keep", residual=2)
    assert seen == ["out-residual"]
    assert not (tmp_path / "out").exists()


def test_verify_measures_the_two_together(tmp_path: Path) -> None:
    base, tuned, _ = inputs(tmp_path, "nf4", size=0.001)
    out, residual = tmp_path / "out", tmp_path / "out-residual"
    merge(base, [tuned], out, quant="keep", residual=150)
    report = verify(out, base=base, adapters=[tuned], level="tensors", min_cosine=0.99, max_dead=0)
    assert report.ok
    assert report.tensors.cosine < 0.5
    assert report.pair.cosine > 0.999
    assert report.residual == str(residual)
    # One of another output makes it worse, and is named; with none the figures are of MERGED alone.
    factors = load_file(residual / "adapter_model.safetensors")
    factors[f"{KEY}B.weight"] = factors[f"{KEY}B.weight"].flip(0).contiguous()
    save_file(factors, residual / "adapter_model.safetensors")
    wrong = verify(out, base=base, adapters=[tuned], level="tensors")
    assert "other residual" in {finding.kind for finding in wrong.findings}
    assert not wrong.ok
    residual.rename(tmp_path / "elsewhere")
    alone = verify(out, base=base, adapters=[tuned], level="tensors")
    assert not alone.ok
    assert {"no residual", "swallowed"} <= {finding.kind for finding in alone.findings}


@pytest.mark.parametrize("size", [1e30, 1e-24])
def test_what_16_bits_cannot_hold_is_refused(tmp_path: Path, size: float) -> None:
    base, tuned, _ = inputs(tmp_path, "int8", size=size)
    with pytest.raises(CheckpointError, match="q_proj"):
        merge(base, [tuned], tmp_path / "out", quant="keep", residual=4)
    assert not (tmp_path / "out").exists()


REFUSED = {
    "nothing is encoded": {"dtype": "bf16"},
    "every weight left the grid": {"quant": "keep", "keep_touched": "bf16"},
    "one file": {"quant": "keep", "out": "out.safetensors"},
    "a limit": {"quant": "keep", "min_cosine": 0.9},
    "a job that is written": {"quant": "keep", "on": "slurm", "workers": 2},
}


@pytest.mark.parametrize("why", REFUSED)
def test_what_has_no_residual_is_refused(tmp_path: Path, why: str) -> None:
    base, tuned, _ = inputs(tmp_path, "fp8 tensor")
    asked: dict[str, Any] = {"out": "out", **REFUSED[why]}
    with pytest.raises(UsageError):
        merge(base, [tuned], tmp_path / asked.pop("out"), residual=2, **asked)
    assert not (tmp_path / "out").exists()
    assert not (tmp_path / "out-residual").exists()


def test_a_folder_that_left_its_grid_whole_says_so(tmp_path: Path) -> None:
    """Where nothing is quantized any more, the config does not send readers to look for it."""
    base, tuned, wanted = inputs(tmp_path, "nf4")
    kept = {name: tensor for name, tensor in stored(base).items() if not name.startswith(OTHER)}  # the other layer goes
    for file in (*base.glob("*.safetensors"), base / "model.safetensors.index.json"):
        file.unlink()
    save_file(kept, base / "model.safetensors", metadata={"format": "pt"})
    merge(base, [tuned], tmp_path / "out", quant="keep", keep_touched="bf16")
    assert "quantization_config" not in json.loads((tmp_path / "out/config.json").read_text())
    assert (values(tmp_path / "out").double() - wanted).norm() <= 0.01 * wanted.norm()
