"""The scan of a change: what is planted is found, and what was only trained is not. Rates are in docs/scan.md."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from click.testing import CliRunner
from models import plain_adapter, plain_base, read_tensors
from safetensors.torch import save_file

from adapterkit.adapters.load import load_adapter
from adapterkit.adapters.scan import LIMIT, ModuleFigures, module_figures, scan_adapter, scan_files
from adapterkit.cli import app
from adapterkit.errors import UnsafeError
from adapterkit.provenance.register import register
from adapterkit.registry import fsck
from adapterkit.verbs.check import check
from bench.studies import scan as study


@pytest.fixture(scope="module")
def tensors() -> dict[str, torch.Tensor]:
    torch.set_num_threads(1)
    return study.trained(3)


def test_the_figures_are_those_of_the_dense_change(tensors: dict[str, torch.Tensor], tmp_path: Path) -> None:
    (one,) = [
        one
        for one in study.figures_of(tensors, tmp_path / "a")
        if one.parameter.endswith("layers.2.self_attn.q_proj.weight")
    ]
    path = "base_model.model.model.layers.2.self_attn.q_proj"
    dense = (tensors[f"{path}.lora_B.weight"] @ tensors[f"{path}.lora_A.weight"]).double()
    s = torch.linalg.svdvals(dense)
    total = float(dense.square().sum())
    assert one.norm == pytest.approx(float(dense.norm()), rel=1e-5)
    assert one.top == pytest.approx(float(s[0]) ** 2 / total, rel=1e-5)
    assert one.row == pytest.approx(float(dense.square().sum(1).max()) / total, rel=1e-5)
    assert one.column == pytest.approx(float(dense.square().sum(0).max()) / total, rel=1e-5)
    assert (one.kind, one.layer, one.rank) == ("q_proj", 2, study.RANK)


def test_nothing_stands_out_of_what_was_only_trained(tensors: dict[str, torch.Tensor], tmp_path: Path) -> None:
    report = scan_adapter(load_adapter(study.written(tensors, tmp_path / "a")))
    assert report.oddities == ()
    assert report.score <= LIMIT


@pytest.mark.parametrize("kind", ["spike", "row", "column"])
def test_what_is_planted_stands_out(tensors: dict[str, torch.Tensor], tmp_path: Path, kind: str) -> None:
    changed = dict(tensors)
    path = "base_model.model.model.layers.5.mlp.up_proj"
    study.spike(changed, 6.0, torch.Generator().manual_seed(0), path, kind)
    report = scan_adapter(load_adapter(study.written(changed, tmp_path / "a")))
    # Each module is named by the figure that is furthest off: of one direction, in one row or column, or large at all.
    assert {one.code for one in report.oddities} <= {"scan-spike", "scan-size", f"scan-{kind}"}
    assert {one.parameter for one in report.oddities} == {"model.layers.5.mlp.up_proj.weight"}
    assert report.score > LIMIT


def test_a_spike_everywhere_is_seen_only_beside_others(tensors: dict[str, torch.Tensor], tmp_path: Path) -> None:
    def figures(value: dict[str, torch.Tensor]) -> dict[str, ModuleFigures]:
        return {one.parameter: one for one in study.figures_of(value, tmp_path / "peer")}

    peers = []
    for seed in range(7):  # more adapters like it, a little different
        noise = torch.Generator().manual_seed(seed)
        near = {key: one * (1 + 0.1 * torch.randn(one.shape, generator=noise)) for key, one in tensors.items()}
        peers.append(figures(near))
    changed = dict(tensors)
    study.planted("everywhere")(changed, 4.0, 1)
    adapter = load_adapter(study.written(changed, tmp_path / "a"))
    assert scan_adapter(adapter, peers=peers).score > 1.5 * scan_adapter(adapter).score
    assert scan_adapter(adapter, peers=peers[:3]).score == scan_adapter(adapter).score  # too few to say


def changed_config(folder: Path, **fields: Any) -> None:
    path = folder / "adapter_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **fields}))


def test_hidden_parts_are_errors(tmp_path: Path) -> None:
    base = plain_base(tmp_path / "base")
    adapter = plain_adapter(tmp_path / "adapter", base)
    tensors = read_tensors(adapter)
    some = next(key for key in tensors if key.endswith("lora_A.weight"))
    other = some.replace("lora_A", "lora_B")
    tensors[some] = torch.cat([tensors[some]] * 3)
    tensors[other] = torch.cat([tensors[other]] * 3, 1)
    save_file(tensors, adapter / "adapter_model.safetensors", metadata={"format": "pt"})
    found = scan_adapter(load_adapter(adapter)).oddities
    assert "scan-hidden-rank" in [one.code for one in found if one.level == "error"]


def test_token_rows(tmp_path: Path) -> None:
    base = plain_base(tmp_path / "base")
    adapter = plain_adapter(tmp_path / "adapter", base)
    rows = torch.ones(10, read_tensors(base)["model.embed_tokens.weight"].shape[1])
    rows[7] *= 100
    tensors = {
        **read_tensors(adapter),
        "base_model.model.model.embed_tokens.token_adapter.trainable_tokens_delta": rows,
    }
    save_file(tensors, adapter / "adapter_model.safetensors", metadata={"format": "pt"})
    changed_config(adapter, trainable_token_indices={"embed_tokens": list(range(20, 30))})
    (odd,) = [one for one in scan_adapter(load_adapter(adapter)).oddities if one.code == "scan-token"]
    assert "token 27 " in odd.message


def test_files_that_do_not_belong(tmp_path: Path) -> None:
    for name in (
        "adapter_config.json",
        "adapter_model.safetensors",
        "README.md",
        "tokenizer.json",
        "chat_template.jinja",
    ):
        (tmp_path / name).write_text("")
    assert scan_files(tmp_path) == []
    for name in ("modeling_custom.py", "training_args.bin", "notes.xyz"):
        (tmp_path / name).write_text("")
    assert {(one.level, one.code) for one in scan_files(tmp_path)} == {
        ("error", "scan-code"),
        ("error", "scan-pickle"),
        ("warning", "scan-file"),
    }


def test_check_and_register(home: Path, tmp_path: Path) -> None:
    base = plain_base(tmp_path / "base")
    adapter = plain_adapter(tmp_path / "adapter", base, base_model_name_or_path="org/base", revision="a" * 40)
    clean = CliRunner().invoke(app, ["check", str(base), str(adapter), "--scan"])
    assert clean.exit_code == 0
    assert "beside 0 other adapters" in clean.output
    for seed in range(6):
        register(
            plain_adapter(tmp_path / f"peer-{seed}", base, seed=seed, base_model_name_or_path="org/base"),
            f"peer-{seed}",
        )
    register(adapter, "tone", scan=True)
    assert "beside 6 other adapters" in CliRunner().invoke(app, ["check", str(base), str(adapter), "--scan"]).output
    assert len(list((home / "scans").iterdir())) >= 6
    for path in (home / "scans").iterdir():
        path.write_bytes(b"{")  # made again
    assert "beside 6 other adapters" in CliRunner().invoke(app, ["check", str(base), str(adapter), "--scan"]).output
    assert fsck.fsck().clean
    (adapter / "hook.py").write_text("import os")
    said = CliRunner().invoke(app, ["check", str(base), str(adapter), "--scan", "--output-format", "sarif"])
    (run,) = json.loads(said.output)["runs"]
    assert "scan-code" in {result["ruleId"] for result in run["results"] if result["level"] == "error"}
    assert check(base, adapter, scan=True).exit_code == 3
    with pytest.raises(UnsafeError, match=r"hook\.py is code"):
        register(adapter, "hooked", scan=True)
    assert module_figures(load_adapter(adapter))[1] == []
