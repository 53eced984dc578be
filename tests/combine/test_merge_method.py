"""`merge --method`: against `combine` where nothing is lost, and against dense formulas."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from models import make_adapter, plain_adapter, plain_base, read_bytes, read_tensors

from adapterkit import combine, merge
from adapterkit.cli import main
from adapterkit.errors import UsageError


def delta(adapter: Path, name: str, scale: float = 2.0) -> torch.Tensor:
    factors = read_tensors(adapter)
    key = f"base_model.model.{name.removesuffix('.weight')}"
    return scale * factors[f"{key}.lora_B.weight"].double() @ factors[f"{key}.lora_A.weight"].double()


@pytest.fixture
def base(tmp_path: Path) -> Path:
    return plain_base(tmp_path / "base", dtype="float32")


@pytest.fixture
def adapters(tmp_path: Path, base: Path) -> list[Path]:
    return [plain_adapter(tmp_path / name, base, seed=i) for i, name in enumerate("abc")]


def ties(deltas: list[torch.Tensor], density: float) -> torch.Tensor:
    """TIES (arXiv:2306.01708, algorithm 1) in float64."""
    kept = []
    for one in deltas:
        size = one.abs().flatten().sort(descending=True).values
        kept.append(torch.where(one.abs() >= size[int(density * one.numel()) - 1], one, 0.0))
    sign = sum(kept, torch.zeros(())).sign()
    agree = [(x.sign() == sign) & (x != 0) for x in kept]
    total = sum((x * m for x, m in zip(kept, agree, strict=True)), torch.zeros(()))
    count = sum((m.double() for m in agree), torch.zeros(()))
    return total / count.clamp(min=1)


def test_ties_is_not_truncated(base: Path, adapters: list[Path], tmp_path: Path) -> None:
    weights = [1.0, 0.5, -2.0]
    report = merge(
        base,
        adapters,
        tmp_path / "out",
        weights=weights,
        method="ties",
        scale=0.7,
        parameters={"density": 0.3, "normalize": "count"},
    )
    before, after = read_tensors(base), read_tensors(tmp_path / "out")
    for name in ("model.layers.0.self_attn.q_proj.weight", "model.layers.2.mlp.up_proj.weight"):
        wanted = 0.7 * ties([w * delta(a, name) for a, w in zip(adapters, weights, strict=True)], 0.3)
        got = after[name].double() - before[name].double()
        assert (got - wanted).norm() / wanted.norm() < 1e-6
        assert torch.linalg.matrix_rank(wanted) > 12
    assert report.method == "ties density=0.3 normalize=count lambda=0.7"


@pytest.mark.parametrize("method", ["cat", "core", "tsv", "iso-c", "lego", "model-stock", "svd", "knots"])
def test_methods_of_low_rank_give_what_combine_gives(
    method: str, base: Path, adapters: list[Path], tmp_path: Path
) -> None:
    combine(adapters, tmp_path / "one", method=method)
    merge(base, [tmp_path / "one"], tmp_path / "two-steps")
    merge(base, adapters, tmp_path / "one-step", method=method)
    got, wanted = read_tensors(tmp_path / "one-step"), read_tensors(tmp_path / "two-steps")
    for name, value in wanted.items():
        assert (got[name] - value).abs().max() < 2e-5


def test_the_plain_sum_is_left_as_it_was(base: Path, adapters: list[Path], tmp_path: Path) -> None:
    merge(base, adapters, tmp_path / "plain")
    merge(base, adapters, tmp_path / "linear", method="linear")
    merge(base, adapters, tmp_path / "scaled", method="linear", scale=0.5)
    assert read_bytes(tmp_path / "plain") == read_bytes(tmp_path / "linear")
    before, whole, half = (read_tensors(tmp_path / name) for name in ("base", "plain", "scaled"))
    for name, value in before.items():
        assert (half[name] - value - (whole[name] - value) / 2).abs().max() < 5e-6


@pytest.mark.parametrize("kind", ["gpt2", "mixtral", "llama"])
def test_transposed_and_stacked_parameters(kind: str, make_base: Callable[..., Path], tmp_path: Path) -> None:
    """A density of 1 and the sum: DARE then drops nothing, so it is the plain sum, by the path of rows."""
    from peft import LoraConfig

    base = make_base(kind)
    told: dict[str, Any] = {
        "gpt2": {"target_modules": ["c_attn", "c_proj"], "fan_in_fan_out": True},
        "mixtral": {"target_modules": ["q_proj"], "target_parameters": ["experts.gate_up_proj", "experts.down_proj"]},
        "llama": {"target_modules": ["q_proj", "embed_tokens"], "bias": "none"},
    }[kind]
    adapters = [make_adapter(tmp_path / f"a{i}", base, LoraConfig(r=3, **told), seed=i) for i in range(2)]
    merge(base, adapters, tmp_path / "sum", weights=[1, -0.5])
    merge(base, adapters, tmp_path / "rows", weights=[1, -0.5], method="dare", parameters={"density": 1.0})
    before, wanted, got = read_tensors(base), read_tensors(tmp_path / "sum"), read_tensors(tmp_path / "rows")
    changed = 0
    for name, value in wanted.items():
        changed += not torch.equal(value, before.get(name, value))
        assert (got[name] - value).abs().max() < 5e-6, name
    assert changed > 2


def test_bytes_depend_on_the_seed_and_not_on_threads(base: Path, adapters: list[Path], tmp_path: Path) -> None:
    for name, jobs, seed in (("a1", 1, 3), ("a2", 4, 3), ("b", 1, 4)):
        merge(base, adapters, tmp_path / f"out-{name}", method="dare-ties", parameters={"seed": seed}, jobs=jobs)
    assert read_bytes(tmp_path / "out-a1") == read_bytes(tmp_path / "out-a2") != read_bytes(tmp_path / "out-b")


def test_on_the_command_line_and_from_a_plan(
    capsys: pytest.CaptureFixture[str], base: Path, adapters: list[Path], tmp_path: Path
) -> None:
    def run(*arguments: object) -> str:
        with pytest.raises(SystemExit) as stopped:
            main([str(a) for a in arguments])
        assert not stopped.value.code
        return capsys.readouterr().out

    how = ["--method", "ties", "--density", "0.4", "--lambda", "0.5", "--space", "core"]
    report = json.loads(run("merge", base, *adapters, "-o", tmp_path / "out", *how, "--json"))
    assert report["method"] == "ties in core density=0.4 lambda=0.5"
    run("merge", base, *adapters, "--save-plan", tmp_path / "plan.json", *how)
    run("execute", tmp_path / "plan.json", "-o", tmp_path / "again", "--part", 0)
    run("execute", tmp_path / "plan.json", "-o", tmp_path / "again", "--finish")
    assert read_bytes(tmp_path / "again") == read_bytes(tmp_path / "out")
    assert "by ties" in run("merge", base, *adapters, "--dry-run", *how)


@pytest.mark.parametrize(
    ("how", "words"),
    [
        ({"method": "ties", "parameters": {"density": 2}}, "density of method ties must be"),
        ({"method": "dare", "space": "knots", "scale": float("nan")}, "must be a finite number"),
        ({"method": "svd", "parameters": {"seed": 1}}, "has no parameter seed"),
    ],
)
def test_bad_parameters(how: dict[str, Any], words: str, base: Path, adapters: list[Path], tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=words):
        merge(base, adapters, tmp_path / "out", **how)
    assert not (tmp_path / "out").exists()


def test_a_method_says_that_it_takes_changes_of_the_unmerged_weight(
    make_base: Callable[..., Path], tmp_path: Path
) -> None:
    """Without a method two DoRAs compose as PEFT runs them; a method sums (here: drops nothing of) their own changes."""
    from peft import LoraConfig

    base = make_base("llama")
    config = {"r": 3, "target_modules": ["q_proj"], "use_dora": True}
    adapters = [make_adapter(tmp_path / f"a{i}", base, LoraConfig(**config), seed=i) for i in range(2)]
    report = merge(base, adapters, tmp_path / "rows", method="dare", parameters={"density": 1.0})
    assert any("change of the unmerged weights" in note for note in report.notes)
    for number, adapter in enumerate(adapters):
        merge(base, [adapter], tmp_path / f"one{number}")
    before, got, *ones = (read_tensors(folder) for folder in (base, tmp_path / "rows", *tmp_path.glob("one*")))
    name = "model.layers.0.self_attn.q_proj.weight"
    assert (got[name] - before[name] - sum(one[name] - before[name] for one in ones)).abs().max() < 5e-6


def lora(names: list[str]) -> Any:
    from peft import LoraConfig

    return LoraConfig(r=4, lora_alpha=8, target_modules=names)


def _some(base: Path, tmp_path: Path) -> list[Path]:
    """Two adapters of which one acts on more modules."""
    targets = (["q_proj", "up_proj"], ["q_proj"])
    return [make_adapter(tmp_path / f"a{i}", base, lora(names), seed=i) for i, names in enumerate(targets)]


@pytest.mark.parametrize("verb", ["merge", "combine"])
def test_a_value_for_each_adapter_counts_where_only_one_acts(
    verb: str, make_base: Callable[..., Path], tmp_path: Path
) -> None:
    """Weight and density of the first adapter on a module that the second does not touch."""
    base = make_base("llama")
    adapters = _some(base, tmp_path)
    given: dict[str, Any] = {"method": "magnitude-prune", "parameters": {"density": [1.0, 0.5], "weight": [0.25, 2.0]}}
    if verb == "merge":
        merge(base, adapters, tmp_path / "out", **given)
        got = read_tensors(tmp_path / "out")["model.layers.0.mlp.up_proj.weight"].double()
        got -= read_tensors(base)["model.layers.0.mlp.up_proj.weight"].double()
    else:
        combine(adapters, tmp_path / "out", rank=16, base=base, **given)
        got = delta(tmp_path / "out", "model.layers.0.mlp.up_proj.weight", scale=1.0)
    wanted = 0.25 * delta(adapters[0], "model.layers.0.mlp.up_proj.weight")
    assert (got - wanted).norm() / wanted.norm() < 1e-5


def test_combine_knows_how_deep_a_layer_lies(make_base: Callable[..., Path], tmp_path: Path) -> None:
    base = make_base("llama")
    adapters = [make_adapter(tmp_path / f"a{i}", base, lora(["q_proj"]), seed=i) for i in range(2)]
    weight = [[{"value": [0.0, 1.0]}], [{"value": [1.0, 0.0]}]]
    combine(adapters, tmp_path / "out", method="linear", parameters={"weight": weight}, rank=8)
    first, last = (f"model.layers.{layer}.self_attn.q_proj.weight" for layer in (0, 1))
    for name, whose in ((first, 1), (last, 0)):
        wanted = delta(adapters[whose], name)
        assert (delta(tmp_path / "out", name, scale=1.0) - wanted).norm() / wanted.norm() < 1e-5


def test_values_for_another_number_of_adapters_are_refused_when_planned(
    make_base: Callable[..., Path], tmp_path: Path
) -> None:
    base = make_base("llama")
    adapters = _some(base, tmp_path)
    for given in ({"density": [0.1, 0.2, 0.3]}, {"weight": [1.0]}):
        name, values = next(iter(given.items()))
        with pytest.raises(UsageError, match=f"{len(values)} values? of {name} for 2 adapters"):
            merge(base, adapters, tmp_path / "out", method="ties", parameters=given, dry_run=True)
        with pytest.raises(UsageError, match=f"{len(values)} values? of {name} for 2 adapters"):
            combine(adapters, tmp_path / "out", method="ties", parameters=given, rank=4, dry_run=True)
    with pytest.raises(UsageError, match="looks at the base's own values"):
        combine(adapters[:1], tmp_path / "out", method="slerp-weights", rank=4, dry_run=True)
