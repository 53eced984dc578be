"""Adapters whose stacked ``lora_B`` has the expert slowest, as Unsloth trained them until 2026-09-17 (unsloth-zoo#1269).

The formula is written out expert by expert, from the columns that belong to each; PEFT's own merge of the same factors,
packed its way, is a second witness.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from click.testing import CliRunner
from models import assert_merged, edit_config, make_adapter, peft_merged, read_tensors, write_adapter

import adapterkit
from adapterkit.cli import app, main
from adapterkit.errors import AdapterError, UsageError

EXPERTS, RANK, ALPHA = 4, 3, 5
MODULE, PARAMETERS = "mlp.experts", ["mlp.experts.gate_up_proj", "mlp.experts.down_proj"]
GROUPED = "grouped_by_expert"


@pytest.fixture
def trained(make_base: Callable[..., Path], tmp_path: Path) -> tuple[Path, Path, dict[str, torch.Tensor]]:
    """A base, an adapter that Unsloth packed, and the merged tensors in float64 according to PEFT."""
    from peft import LoraConfig

    base = make_base("qwen3_moe", "float32")
    config = LoraConfig(r=RANK, lora_alpha=ALPHA, target_modules=[], target_parameters=PARAMETERS)
    peft = make_adapter(tmp_path / "peft-adapter", base, config)
    exact = peft_merged(base, peft, tmp_path / "peft").exact
    slowest = {}
    for name, tensor in read_tensors(peft).items():
        if name.endswith("lora_B.weight"):
            # Column j of the new order is expert j // r, its factor j % r; PEFT keeps that one at (j % r) * experts + j // r.
            order = [(j % RANK) * EXPERTS + j // RANK for j in range(tensor.shape[1])]
            tensor = tensor[:, order]
        slowest[name] = tensor
    fields = json.loads((peft / "adapter_config.json").read_text())
    return base, write_adapter(tmp_path / "adapter", slowest, **fields), exact


def test_unsloth_zoo_issue_1269_by_the_switch(
    trained: tuple[Path, Path, dict[str, torch.Tensor]], tmp_path: Path
) -> None:
    base, adapter, exact = trained
    adapterkit.merge(base, [adapter], tmp_path / "out", expert_order="slowest")
    assert_merged(base, tmp_path / "out", exact)
    adapterkit.merge(base, [adapter], tmp_path / "other")
    one, other = (read_tensors(tmp_path / name) for name in ("out", "other"))
    assert any(not torch.equal(one[name], other[name]) for name in one)


@pytest.mark.parametrize(
    "fields",
    [
        {"lora_B_layout": GROUPED},
        {
            "lora_B_layout": "rank_major",
            "unsloth_fused_expert_lora": {
                "parameters": {
                    name: {"lora_B_layout": GROUPED, "num_experts": EXPERTS} for name in ("gate_up_proj", "down_proj")
                }
            },
        },
    ],
    ids=["whole", "per_parameter"],
)
def test_unsloth_zoo_issue_1232_by_the_config(
    fields: dict[str, Any], trained: tuple[Path, Path, dict[str, torch.Tensor]], tmp_path: Path
) -> None:
    """What the config states counts, and counts before the switch."""
    base, adapter, exact = trained
    edit_config(adapter, **fields)
    adapterkit.merge(base, [adapter], tmp_path / "out", expert_order="fastest")
    assert_merged(base, tmp_path / "out", exact)


def test_formula_expert_by_expert(make_base: Callable[..., Path], tmp_path: Path) -> None:
    """delta_e = s B[:, e r : (e+1) r] A[e r : (e+1) r], in float64, on a stack that is stored as it is in memory."""
    base = make_base("llama4", "float32")
    name = "model.layers.0.feed_forward.experts.down_proj"
    stored = read_tensors(base)[name].double()
    experts, rows, columns = stored.shape
    generator = torch.Generator().manual_seed(3)
    a = torch.randn(experts * RANK, columns, generator=generator)
    b = torch.randn(rows, experts * RANK, generator=generator)
    key = "base_model.model.model.layers.0.feed_forward.experts"
    adapter = write_adapter(
        tmp_path / "adapter",
        {f"{key}.lora_A.weight": a, f"{key}.lora_B.weight": b},
        r=RANK,
        lora_alpha=ALPHA,
        target_parameters=["feed_forward.experts.down_proj"],
    )
    adapterkit.merge(base, [adapter], tmp_path / "out", expert_order="slowest")
    merged = read_tensors(tmp_path / "out")[name].double()
    for expert in range(experts):
        part = slice(expert * RANK, (expert + 1) * RANK)
        wanted = stored[expert] + ALPHA / RANK * (b[:, part].double() @ a[part].double())
        assert (merged[expert] - wanted).abs().max() < 2e-6 * wanted.abs().max()


def test_the_order_is_in_the_plan_and_in_the_record(
    trained: tuple[Path, Path, dict[str, torch.Tensor]], tmp_path: Path
) -> None:
    base, adapter, exact = trained
    plan = tmp_path / "plan.json"
    words = ["merge", str(base), str(adapter), "--expert-order", "slowest"]
    assert CliRunner().invoke(app, [*words, "--save-plan", str(plan)]).exit_code == 0
    assert json.loads(plan.read_text())["request"]["expert_order"] == "slowest"
    assert CliRunner().invoke(app, ["execute", str(plan), "-o", str(tmp_path / "out")]).exit_code == 0
    assert_merged(base, tmp_path / "out", exact)
    record = json.loads((tmp_path / "out" / "adapterkit.json").read_text())
    assert record["operation"]["parameters"]["expert_order"] == "slowest"


def test_verification_goes_by_the_record_and_by_the_switch(
    trained: tuple[Path, Path, dict[str, torch.Tensor]], tmp_path: Path
) -> None:
    base, adapter, _ = trained
    out = tmp_path / "out"
    adapterkit.merge(base, [adapter], out, expert_order="slowest")
    words = ["verify", str(out), "--base", str(base), "--adapter", str(adapter)]

    def code(*more: str) -> object:
        with pytest.raises(SystemExit) as end:
            main([*words, *more])
        return end.value.code

    assert code("--no-attach") == 0
    (out / "adapterkit.json").unlink()
    assert code() == 3
    assert code("--expert-order", "slowest") == 0


def test_an_adapter_of_unsloth_that_does_not_say_is_told_of(
    trained: tuple[Path, Path, dict[str, torch.Tensor]], tmp_path: Path
) -> None:
    base, adapter, _ = trained
    edit_config(adapter, base_model_name_or_path="unsloth/Qwen3-30B-A3B")
    assert "expert_order=" in " ".join(adapterkit.plan_merge(base, [adapter]).notes)
    assert "expert_order=" not in " ".join(adapterkit.plan_merge(base, [adapter], expert_order="slowest").notes)
    edit_config(adapter, lora_B_layout="rank_major")
    assert "expert_order=" not in " ".join(adapterkit.plan_merge(base, [adapter]).notes)


def test_orders_that_are_not_known(trained: tuple[Path, Path, dict[str, torch.Tensor]]) -> None:
    base, adapter, _ = trained
    with pytest.raises(UsageError, match="is not a value of expert_order"):
        adapterkit.plan_merge(base, [adapter], expert_order="sideways")
    edit_config(adapter, lora_B_layout="sideways")
    with pytest.raises(AdapterError, match="'lora_B_layout' is 'sideways'"):
        adapterkit.plan_merge(base, [adapter])


def test_a_recipe_says_it_for_its_merges_and_combinations(
    trained: tuple[Path, Path, dict[str, torch.Tensor]], tmp_path: Path
) -> None:
    from adapterkit.recipe.run import build

    base, adapter, exact = trained
    recipe = tmp_path / "adapterkit.toml"
    recipe.write_text(
        f'base = "{base}"\nadapters.one = "{adapter}"\nmerge.expert-order = "slowest"\nverify = "tensors"\n'
        'outputs.merged = "merged"\noutputs.same = {path = "same", to = "adapter"}\n'
        'outputs.again = {path = "again", from = "merged", to = "f32"}\n'
    )
    build(recipe)
    assert_merged(base, tmp_path / "merged", exact)
    adapterkit.merge(base, [tmp_path / "same"], tmp_path / "by-the-combination")
    assert_merged(base, tmp_path / "by-the-combination", exact)
    recipe.write_text(recipe.read_text().replace("slowest", "fastest"))
    report = build(recipe)
    assert report.changed == 3
    with pytest.raises(AssertionError):
        assert_merged(base, tmp_path / "merged", exact)
