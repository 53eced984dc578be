"""`resize` against dense singular values and PEFT."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from models import live, load_model, make_adapter, plain_adapter, plain_base, read_tensors
from peft import AdaLoraConfig, LoHaConfig, LoraConfig

from adapterkit import resize
from adapterkit.cli import main
from adapterkit.errors import AdapterkitError, UnsupportedAdapter, UsageError


def dense(folder: Path, name: str, scale: float) -> torch.Tensor:
    factors = read_tensors(folder)
    return scale * factors[f"{name}.lora_B.weight"].double() @ factors[f"{name}.lora_A.weight"].double()


@pytest.mark.parametrize("bound", [{"rank": 3}, {"energy": 0.9}, {"max_error": 0.2}])
def test_every_layer_is_the_best_of_its_rank(bound: dict[str, float], tmp_path: Path) -> None:
    adapter = plain_adapter(tmp_path / "a", plain_base(tmp_path / "base"), rank=8, use_rslora=True)
    report = resize(adapter, tmp_path / "out", own_ranks=True, **bound)  # type: ignore[arg-type]
    assert len(report.modules) == 6
    for row in report.modules:
        name = f"base_model.model.{row.module.removesuffix('.weight')}"
        whole = dense(adapter, name, 8 / 8**0.5)
        u, s, vh = torch.linalg.svd(whole, full_matrices=False)
        tails = [float(s[k:].square().sum().sqrt() / s.norm()) for k in range(9)]
        wanted = {
            "rank": 3,
            "energy": next(k for k in range(9) if 1 - tails[k] ** 2 >= 0.9),
            "max_error": next(k for k in range(9) if tails[k] <= 0.2),
        }[next(iter(bound))]
        assert (row.before, row.rank) == (8, wanted)
        assert row.error == pytest.approx(tails[wanted], rel=1e-4)
        best = (u[:, :wanted] * s[:wanted]) @ vh[:wanted]
        assert (dense(tmp_path / "out", name, 1.0) - best).norm() / best.norm() < 1e-5


@pytest.mark.parametrize(("rank", "said"), [(6, True), (4, False), (2, False)])
def test_a_rank_that_no_layer_has_is_said_to_change_nothing(rank: int, said: bool, tmp_path: Path) -> None:
    adapter = plain_adapter(tmp_path / "a", plain_base(tmp_path / "base"))
    report = resize(adapter, tmp_path / "out", rank=rank)
    assert any("every layer has rank 4 or less already and keeps it" in note for note in report.notes) == said
    assert {row.rank for row in report.modules} == {min(rank, 4)}


@pytest.mark.parametrize("kind", ["dora", "dora embedding", "biases"])
def test_a_rank_that_is_large_enough_changes_nothing(kind: str, make_base: Callable[..., Path], tmp_path: Path) -> None:
    base = make_base("qwen2")
    told = {
        "dora": LoraConfig(r=4, lora_alpha=10, target_modules=["q_proj", "up_proj"], use_dora=True),
        "dora embedding": LoraConfig(r=4, target_modules=["embed_tokens", "v_proj"], use_dora=True),
        "biases": LoraConfig(r=4, target_modules=["q_proj"], lora_bias=True, modules_to_save=["lm_head"]),
    }[kind]
    adapter = make_adapter(tmp_path / "a", base, told)
    resize(adapter, tmp_path / "out", energy=1.0)
    got, wanted = (live(base, folder).merge_and_unload().state_dict() for folder in (tmp_path / "out", adapter))
    before = load_model(base, double=True).state_dict()
    for name, value in wanted.items():
        assert (got[name] - value).norm() <= 2e-6 * max(float((value - before[name]).norm()), 1e-3), name
    assert json.loads((tmp_path / "out" / "adapter_config.json").read_text())["use_dora"] is ("dora" in kind)


def test_dora_keeps_its_magnitudes_at_a_smaller_rank(make_base: Callable[..., Path], tmp_path: Path) -> None:
    base = make_base("llama")
    told = LoraConfig(r=6, target_modules=["q_proj"], use_dora=True)
    adapter = make_adapter(tmp_path / "a", base, told)
    resize(adapter, tmp_path / "out", rank=2)
    before, after = read_tensors(adapter), read_tensors(tmp_path / "out")
    name = "base_model.model.model.layers.0.self_attn.q_proj"
    assert torch.equal(before[f"{name}.lora_magnitude_vector"], after[f"{name}.lora_magnitude_vector"])
    assert after[f"{name}.lora_A.weight"].shape[0] == 2
    merged = live(base, tmp_path / "out").merge_and_unload().state_dict()["model.layers.0.self_attn.q_proj.weight"]
    assert torch.allclose(merged.norm(dim=1), after[f"{name}.lora_magnitude_vector"].double(), rtol=1e-5)


def test_another_low_rank_method_becomes_lora(make_base: Callable[..., Path], tmp_path: Path) -> None:
    base = make_base("llama")
    adapter = make_adapter(tmp_path / "a", base, AdaLoraConfig(init_r=4, target_modules=["q_proj"], total_step=10))
    resize(adapter, tmp_path / "out", rank=4)
    # PEFT's own delta of AdaLoRA divides by its rank number, 1e-5 more than an integer.
    got, wanted = (live(base, folder).merge_and_unload().state_dict() for folder in (tmp_path / "out", adapter))
    for name, value in wanted.items():
        assert (got[name] - value).abs().max() < 1e-5, name


def test_experts_are_cut_one_by_one(make_base: Callable[..., Path], tmp_path: Path) -> None:
    base = make_base("mixtral")
    told = LoraConfig(r=4, target_modules=[], target_parameters=["experts.gate_up_proj", "experts.down_proj"])
    adapter = make_adapter(tmp_path / "a", base, told)
    resize(adapter, tmp_path / "out", base=base, rank=2)
    before = load_model(base, double=True).state_dict()
    got, whole = (live(base, folder).merge_and_unload().state_dict() for folder in (tmp_path / "out", adapter))
    name = "model.layers.1.mlp.experts.down_proj"
    for expert in range(4):
        u, s, vh = torch.linalg.svd(whole[name][expert] - before[name][expert])
        best = (u[:, :2] * s[:2]) @ vh[:2]
        assert (got[name][expert] - before[name][expert] - best).norm() / best.norm() < 1e-5


@pytest.mark.parametrize(
    ("how", "error", "words"),
    [
        ({}, UsageError, "give --rank, --energy or --max-error"),
        ({"rank": 100}, UsageError, "larger than every layer"),
        ({"max_error": 1.5}, UsageError, "max_error must be in"),
    ],
)
def test_bad_bounds(how: dict[str, float], error: type[AdapterkitError], words: str, tmp_path: Path) -> None:
    adapter = plain_adapter(tmp_path / "a", plain_base(tmp_path / "base"))
    with pytest.raises(error, match=words):
        resize(adapter, tmp_path / "out", **how)  # type: ignore[arg-type]
    assert not (tmp_path / "out").exists()


def test_what_is_no_product_is_refused(make_base: Callable[..., Path], tmp_path: Path) -> None:
    base = make_base("llama")
    adapter = make_adapter(tmp_path / "a", base, LoHaConfig(r=2, target_modules=["q_proj"]))
    with pytest.raises(UnsupportedAdapter, match="is no low-rank product; make a LoRA of it with combine"):
        resize(adapter, tmp_path / "out", rank=2, base=base)
    assert not (tmp_path / "out").exists()


def test_the_table(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    adapter = plain_adapter(tmp_path / "a", plain_base(tmp_path / "base"))
    with pytest.raises(SystemExit) as stopped:
        main(["resize", str(adapter), "-o", str(tmp_path / "out"), "--rank", "2"])
    out = capsys.readouterr().out
    assert not stopped.value.code
    assert out.count("4 > 2") == 6
    assert "in all: " in out
